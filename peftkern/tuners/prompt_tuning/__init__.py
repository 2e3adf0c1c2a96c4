"""Prompt tuning: configuration and the table of virtual tokens."""

from peftkern.tuners.prompt_tuning.config import PromptTuningConfig, PromptTuningInit
from peftkern.tuners.prompt_tuning.model import PromptEmbedding

__all__ = ["PromptEmbedding", "PromptTuningConfig", "PromptTuningInit"]
