"""`VirtualTokens`: the module that makes an adapter's virtual tokens; one for each adapter, in `prompt_encoder`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

# The one name in the file of a prompt method.
PROMPT_KEY = "prompt_embeddings"


class VirtualTokens(nn.Module):
    """A table of vectors, a row for each virtual token, with or without layers that its rows go through.

    What is saved are the vectors that come out: those layers are not. An adapter that was read from a file is therefore
    the table alone, and so is one made in inference mode.
    """

    embedding: nn.Embedding

    @property
    def is_computed(self) -> bool:
        """Whether the rows go through layers, so that what is saved cannot be put back."""
        return False

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """The vectors of the virtual tokens `indices`: int64 [...] -> [..., width]."""
        return self.embedding(indices)

    def to_save(self) -> torch.Tensor:
        """What is saved, [rows, width], on the CPU: without dropout, whatever mode the module is in."""
        was_training = self.training
        self.eval()
        try:
            rows = torch.arange(self.embedding.num_embeddings, device=self.embedding.weight.device)
            return self(rows[None])[0].detach().cpu()
        finally:
            self.train(was_training)

    def check_can_load(self) -> None:
        """Raises ValueError if the vectors of a file cannot be put back."""
        if self.is_computed:
            raise ValueError(
                f"{PROMPT_KEY}: this adapter's virtual tokens come out of the layers of a {type(self).__name__}, which "
                "are not in the file, so training cannot go on from it. Without is_trainable, load_adapter takes the "
                "file's tokens in place of those layers"
            )

    def _load_adapter_state_dict(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """PEFT's functions load into an encoder by this name."""
        self.check_can_load()
        self.embedding.load_state_dict({"weight": state_dict[PROMPT_KEY]})


def rows_of(config: Any) -> int:
    """How many rows the table of prompt tuning and P-tuning has: a prompt for each part of the model."""
    return config.num_virtual_tokens * config.num_transformer_submodules
