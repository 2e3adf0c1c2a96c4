"""`PromptEncoderConfig`: PEFT 0.21.2's fields, names and defaults."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import ClassVar

from peftkern.config import PromptLearningConfig, _expect, _expect_positive
from peftkern.utils.peft_types import PeftType


class PromptEncoderReparameterizationType(str, enum.Enum):  # noqa: UP042 - like PeftType
    """What a virtual token goes through: an MLP, or a bidirectional LSTM and an MLP."""

    MLP = "MLP"
    LSTM = "LSTM"


@dataclass
class PromptEncoderConfig(PromptLearningConfig):
    """P-tuning: vectors that stand before the text's word embeddings come out of a small network that is learned.

    Source: Liu et al. 2021, arXiv:2103.10385.

    Args:
        encoder_reparameterization_type: A `PromptEncoderReparameterizationType` or its string.
        encoder_hidden_size: The network's width; None: `token_dim`.
        encoder_num_layers: Of the LSTM; the MLP has a fixed number.
        encoder_dropout: Between the LSTM's layers; in [0, 1].

    The other fields are those of `PromptLearningConfig`.

    Raises:
        ValueError, TypeError: A value that is not allowed, by field.
    """

    encoder_reparameterization_type: str | PromptEncoderReparameterizationType = PromptEncoderReparameterizationType.MLP
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0

    method: ClassVar[PeftType | None] = PeftType.P_TUNING

    def __post_init__(self) -> None:
        super().__post_init__()
        kind = PromptEncoderReparameterizationType(self.encoder_reparameterization_type)
        self.encoder_reparameterization_type = kind

    def check(self) -> None:
        super().check()
        kinds = list(PromptEncoderReparameterizationType)
        if self.encoder_reparameterization_type not in kinds:
            known, got = ", ".join(kind.value for kind in kinds), self.encoder_reparameterization_type
            raise ValueError(f"encoder_reparameterization_type must be one of {known}, got {got!r}")
        _expect_positive("encoder_hidden_size", self.encoder_hidden_size, optional=True)
        _expect_positive("encoder_num_layers", self.encoder_num_layers)
        _expect("encoder_dropout", self.encoder_dropout, (int, float), "a number")
        if not 0 <= self.encoder_dropout <= 1:
            raise ValueError(f"encoder_dropout must be in [0, 1], got {self.encoder_dropout}")
