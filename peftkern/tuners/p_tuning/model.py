"""`PromptEncoder`: the virtual tokens of P-tuning."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from peftkern.tuners.p_tuning.config import PromptEncoderConfig, PromptEncoderReparameterizationType
from peftkern.tuners.prompt_learning.encoder import VirtualTokens, rows_of


class PromptEncoder(VirtualTokens):
    """A table of vectors whose rows go through a network: an MLP of three layers, or an LSTM and an MLP of two.

    In inference mode there is the table alone, of what came out. Parameters as in PEFT: `embedding`, `lstm_head`,
    `mlp_head`.

    Args:
        config: A `PromptEncoderConfig` with its sizes.

    Warns:
        UserWarning: `encoder_num_layers` of an MLP, which has no effect.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, hidden = config.token_dim, config.encoder_hidden_size
        self.embedding = nn.Embedding(rows_of(config), width)
        self.lstm_head: nn.LSTM | None = None
        self.mlp_head: nn.Sequential | None = None
        if config.inference_mode:
            return
        if config.encoder_reparameterization_type == PromptEncoderReparameterizationType.LSTM:
            self.lstm_head = nn.LSTM(
                width,
                hidden,
                num_layers=config.encoder_num_layers,
                dropout=config.encoder_dropout,
                bidirectional=True,
                batch_first=True,
            )
            head: list[nn.Module] = [nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, width)]
        else:
            if config.encoder_num_layers != PromptEncoderConfig.encoder_num_layers:
                given = config.encoder_num_layers
                warnings.warn(f"encoder_num_layers={given} has no effect on an MLP, only on an LSTM", stacklevel=2)
            head = [nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, width)]
        self.mlp_head = nn.Sequential(*head)

    @property
    def is_computed(self) -> bool:
        return self.mlp_head is not None

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        tokens = self.embedding(indices)
        if self.lstm_head is not None:
            tokens = self.lstm_head(tokens)[0]
        return tokens if self.mlp_head is None else self.mlp_head(tokens)
