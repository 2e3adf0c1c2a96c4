"""`PromptEmbedding`: the virtual tokens of prompt tuning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from peftkern.tuners.prompt_learning.encoder import VirtualTokens, rows_of
from peftkern.tuners.prompt_tuning.config import PromptTuningInit


class PromptEmbedding(VirtualTokens):
    """A table of vectors, a row for each virtual token, in float32 at least.

    Args:
        config: A `PromptTuningConfig` with its sizes.
        word_embeddings: The model's, which SAMPLE_VOCAB and TEXT start from.
        text_ids: For TEXT: the tokens of `prompt_tuning_init_text`, int.

    In inference mode nothing is started from: the values come from a file.

    Raises:
        ValueError: No word embeddings or tokens to start from, or tokens that the word embeddings do not have.
    """

    def __init__(
        self, config: Any, word_embeddings: nn.Module | None = None, text_ids: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        rows = rows_of(config)
        self.embedding = nn.Embedding(rows, config.token_dim)
        if config.inference_mode or config.prompt_tuning_init == PromptTuningInit.RANDOM:
            return
        words: Any = word_embeddings
        if words is None:
            raise ValueError(
                f"word_embeddings: prompt_tuning_init {config.prompt_tuning_init.value} starts from them, got None"
            )
        vocabulary = words.weight.shape[0]
        if config.prompt_tuning_init == PromptTuningInit.SAMPLE_VOCAB:
            ids = torch.randint(0, vocabulary, (rows,))
        else:
            if not text_ids:
                raise ValueError(f"prompt_tuning_init_text: expected a text with tokens in it, got {text_ids!r}")
            if max(text_ids) >= vocabulary:
                raise ValueError(
                    f"tokenizer_name_or_path: its token {max(text_ids)} is not among the model's {vocabulary}"
                )
            ids = torch.tensor([text_ids[i % len(text_ids)] for i in range(rows)])
        with torch.no_grad():  # by a call, not a look at the weight: some models scale what they look up
            started = words(ids.to(words.weight.device)).detach()
        self.embedding.weight = nn.Parameter(started.float().clone())
