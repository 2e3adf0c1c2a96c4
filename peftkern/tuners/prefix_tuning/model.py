"""`PrefixEncoder`: the keys and values of prefix tuning."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peftkern.tuners.prompt_learning.encoder import VirtualTokens


class PrefixEncoder(VirtualTokens):
    """A table with a row for each virtual token, which holds its key and value in every layer.

    With `prefix_projection`, and not in inference mode, narrower rows go through a two-layer MLP, `transform`.

    Args:
        config: A `PrefixTuningConfig` with its sizes.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        width = config.num_layers * 2 * config.token_dim
        self.heads = config.num_attention_heads
        self.layers = config.num_layers
        self.transform: nn.Sequential | None = None
        if config.prefix_projection and not config.inference_mode:
            self.embedding = nn.Embedding(config.num_virtual_tokens, config.token_dim)
            first = nn.Linear(config.token_dim, config.encoder_hidden_size)
            last = nn.Linear(config.encoder_hidden_size, width)
            self.transform = nn.Sequential(first, nn.Tanh(), last)
            starts_at = [last.weight, last.bias]
        else:
            self.embedding = nn.Embedding(config.num_virtual_tokens, width)
            starts_at = [self.embedding.weight]
        if config.init_weights == "zero":
            for parameter in starts_at:
                nn.init.zeros_(parameter)

    @property
    def is_computed(self) -> bool:
        return self.transform is not None

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        rows = self.embedding(indices)
        return rows if self.transform is None else self.transform(rows)

    def load_prompt_embeddings(self, prompt_embeddings: torch.Tensor) -> None:
        """Take the values of a file, [num_virtual_tokens, num_layers * 2 * token_dim].

        Raises:
            ValueError: Another shape; or with `prefix_projection`, whose MLP the file does not have.
        """
        self.check_can_load()
        if prompt_embeddings.shape != self.embedding.weight.shape:
            expected = list(self.embedding.weight.shape)
            raise ValueError(f"prompt_embeddings: expected shape {expected}, got {list(prompt_embeddings.shape)}")
        with torch.no_grad():
            self.embedding.weight.copy_(prompt_embeddings)

    def key_values(self, dtype: torch.dtype | None = None) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The key and the value of each layer, each [1, heads, num_virtual_tokens, head_dim], in `dtype` if given."""
        tokens = self.embedding.num_embeddings
        rows = self(torch.arange(tokens, device=self.embedding.weight.device))
        rows = rows if dtype is None else rows.to(dtype)
        # A row is layer 0's key, layer 0's value, layer 1's key, ... with the heads of each side by side.
        by_layer = rows.view(1, tokens, self.layers, 2, self.heads, -1).permute(2, 3, 0, 4, 1, 5)
        return [(layer[0], layer[1]) for layer in by_layer]
