"""P-tuning: configuration and the encoder of virtual tokens."""

from peftkern.tuners.p_tuning.config import PromptEncoderConfig, PromptEncoderReparameterizationType
from peftkern.tuners.p_tuning.model import PromptEncoder

__all__ = ["PromptEncoder", "PromptEncoderConfig", "PromptEncoderReparameterizationType"]
