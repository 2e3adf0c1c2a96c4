"""The methods: a folder for each, with its configuration, layers and model."""

from peftkern.tuners.adalora import AdaLoraConfig, AdaLoraModel
from peftkern.tuners.ia3 import IA3Config, IA3Model
from peftkern.tuners.lora import LoraConfig, LoraModel, LoraRuntimeConfig
from peftkern.tuners.trainable_tokens import TrainableTokensConfig, TrainableTokensModel

__all__ = [
    "AdaLoraConfig",
    "AdaLoraModel",
    "IA3Config",
    "IA3Model",
    "LoraConfig",
    "LoraModel",
    "LoraRuntimeConfig",
    "TrainableTokensConfig",
    "TrainableTokensModel",
]
