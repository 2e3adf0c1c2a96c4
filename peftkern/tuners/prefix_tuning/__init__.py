"""Prefix tuning: configuration and the encoder of keys and values."""

from peftkern.tuners.prefix_tuning.config import PrefixTuningConfig
from peftkern.tuners.prefix_tuning.model import PrefixEncoder

__all__ = ["PrefixEncoder", "PrefixTuningConfig"]
