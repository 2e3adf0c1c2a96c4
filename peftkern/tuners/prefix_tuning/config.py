"""`PrefixTuningConfig`: PEFT 0.21.2's fields, names and defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from peftkern.config import PromptLearningConfig, _expect, _expect_positive
from peftkern.utils.peft_types import PeftType


@dataclass
class PrefixTuningConfig(PromptLearningConfig):
    """Prefix tuning: keys and values that stand before those of the text, in each layer, are learned.

    Source: Li and Liang 2021, arXiv:2101.00190.

    Args:
        init_weights: "zero": keys and values start at zero; None: from normal numbers.
        encoder_hidden_size: For `prefix_projection`: the width of the hidden layer; None: `token_dim`.
        prefix_projection: Have them come out of a two-layer MLP while they are trained.

    The other fields are those of `PromptLearningConfig`.

    Raises:
        ValueError, TypeError: A value that is not allowed, by field.
    """

    init_weights: Literal["zero"] | None = None
    encoder_hidden_size: int | None = None
    prefix_projection: bool = False

    method: ClassVar[PeftType | None] = PeftType.PREFIX_TUNING

    def check(self) -> None:
        super().check()
        if self.init_weights not in (None, "zero"):
            raise ValueError(f"init_weights must be None or 'zero', got {self.init_weights!r}")
        _expect_positive("encoder_hidden_size", self.encoder_hidden_size, optional=True)
        _expect("prefix_projection", self.prefix_projection, (bool,), "True or False")
