"""The methods: a folder for each, with its configuration, layers and model."""

from peftkern.tuners.lora import LoraConfig, LoraModel, LoraRuntimeConfig

__all__ = ["LoraConfig", "LoraModel", "LoraRuntimeConfig"]
