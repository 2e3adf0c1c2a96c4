"""LoRA: configuration, layers and model."""

from peftkern.tuners.lora.attention import MultiheadAttention
from peftkern.tuners.lora.config import LoraConfig
from peftkern.tuners.lora.conv import Conv1d, Conv2d, Conv3d
from peftkern.tuners.lora.embedding import Embedding
from peftkern.tuners.lora.eva import get_eva_state_dict, initialize_lora_eva_weights
from peftkern.tuners.lora.experts import ParamWrapper
from peftkern.tuners.lora.layer import Linear, LoraLayer
from peftkern.tuners.lora.loraga import preprocess_loraga
from peftkern.tuners.lora.model import LoraModel
from peftkern.tuners.lora.variant_configs import (
    ArrowConfig,
    BdLoraConfig,
    CordaConfig,
    EvaConfig,
    KasaConfig,
    LoftQConfig,
    LoraGAConfig,
    LoraRuntimeConfig,
    MontecloraConfig,
    VeloraConfig,
)

__all__ = [
    "ArrowConfig",
    "BdLoraConfig",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "CordaConfig",
    "Embedding",
    "EvaConfig",
    "KasaConfig",
    "Linear",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "LoraLayer",
    "LoraModel",
    "LoraRuntimeConfig",
    "MontecloraConfig",
    "MultiheadAttention",
    "ParamWrapper",
    "VeloraConfig",
    "get_eva_state_dict",
    "initialize_lora_eva_weights",
    "preprocess_loraga",
]
