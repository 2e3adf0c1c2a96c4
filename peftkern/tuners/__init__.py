"""The methods: a folder for each, with its configuration, layers and model."""

from peftkern.tuners.adalora import AdaLoraConfig, AdaLoraModel
from peftkern.tuners.ia3 import IA3Config, IA3Model
from peftkern.tuners.lora import LoraConfig, LoraModel, LoraRuntimeConfig
from peftkern.tuners.p_tuning import PromptEncoder, PromptEncoderConfig, PromptEncoderReparameterizationType
from peftkern.tuners.prefix_tuning import PrefixEncoder, PrefixTuningConfig
from peftkern.tuners.prompt_tuning import PromptEmbedding, PromptTuningConfig, PromptTuningInit
from peftkern.tuners.trainable_tokens import TrainableTokensConfig, TrainableTokensModel

__all__ = [
    "AdaLoraConfig",
    "AdaLoraModel",
    "IA3Config",
    "IA3Model",
    "LoraConfig",
    "LoraModel",
    "LoraRuntimeConfig",
    "PrefixEncoder",
    "PrefixTuningConfig",
    "PromptEmbedding",
    "PromptEncoder",
    "PromptEncoderConfig",
    "PromptEncoderReparameterizationType",
    "PromptTuningConfig",
    "PromptTuningInit",
    "TrainableTokensConfig",
    "TrainableTokensModel",
]
