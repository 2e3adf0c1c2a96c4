"""peftkern: fine-tune large models with adapters at the price of running them frozen.

`import peftkern as peft` serves code written for Hugging Face PEFT; `peftkern.ops` holds the operations,
`peftkern.nn` the layers for a loop of your own. Importing the package imports nothing else: a name brings its module.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peftkern import nn, ops
    from peftkern.adapter_bank import AdapterBank, BankFullError, UnknownAdapterError
    from peftkern.adapter_loss import per_adapter_loss, per_slot_loss
    from peftkern.auto import AutoPeftModel, AutoPeftModelForCausalLM
    from peftkern.backend import use_backend
    from peftkern.config import PeftConfig
    from peftkern.estimate import estimate_memory
    from peftkern.explain import explain
    from peftkern.integrations.chunked_loss import use_chunked_loss
    from peftkern.loftq import replace_lora_weights_loftq
    from peftkern.mapping import inject_adapter_in_model
    from peftkern.mapping_func import get_peft_model
    from peftkern.peft_model import PeftModel
    from peftkern.quantize import load_quantized, quantize_model, save_quantized
    from peftkern.status import get_layer_status, get_model_status
    from peftkern.tuners.adalora import AdaLoraConfig, AdaLoraModel
    from peftkern.tuners.ia3 import IA3Config, IA3Model
    from peftkern.tuners.lora import LoraConfig, LoraModel
    from peftkern.tuners.lora.eva import get_eva_state_dict, initialize_lora_eva_weights
    from peftkern.tuners.lora.gated_mlp import fuse_mlps
    from peftkern.tuners.lora.loraga import preprocess_loraga
    from peftkern.tuners.lora.shared_input import share_inputs
    from peftkern.tuners.p_tuning import PromptEncoder, PromptEncoderConfig
    from peftkern.tuners.prefix_tuning import PrefixEncoder, PrefixTuningConfig
    from peftkern.tuners.prompt_tuning import PromptEmbedding, PromptTuningConfig, PromptTuningInit
    from peftkern.tuners.trainable_tokens import TrainableTokensConfig, TrainableTokensModel
    from peftkern.utils.adapter_error import AdapterFileError
    from peftkern.utils.base_state_dict import get_base_model_state_dict, set_base_model_state_dict
    from peftkern.utils.error import NoMatchingPeftModuleError, PeftError
    from peftkern.utils.kbit import cast_mixed_precision_params, prepare_model_for_kbit_training
    from peftkern.utils.peft_types import PeftType, TaskType
    from peftkern.utils.quantized_files import QuantizedFileError
    from peftkern.utils.warning import PeftWarning

__version__ = "0.1.0"

_TASKS = ["", "ForCausalLM", "ForSeq2SeqLM", "ForSequenceClassification", "ForTokenClassification"]
_TASKS += ["ForQuestionAnswering", "ForFeatureExtraction"]

# Where each public name lives; a module is imported when one of its names is first used.
_HOMES = {
    "peftkern.adapter_bank": ["AdapterBank", "BankFullError", "UnknownAdapterError"],
    "peftkern.backend": ["use_backend"],
    "peftkern.explain": ["explain"],
    "peftkern.adapter_loss": ["per_adapter_loss", "per_slot_loss"],
    "peftkern.estimate": ["estimate_memory"],
    "peftkern.integrations.chunked_loss": ["use_chunked_loss"],
    "peftkern.config": ["PeftConfig", "PeftConfigMixin", "PromptLearningConfig"],
    "peftkern.loftq": ["replace_lora_weights_loftq"],
    "peftkern.mapping": [
        "PEFT_TYPE_TO_CONFIG_MAPPING",
        "PEFT_TYPE_TO_TUNER_MAPPING",
        "get_peft_config",
        "inject_adapter_in_model",
    ],
    "peftkern.mapping_func": ["get_peft_model"],
    "peftkern.peft_model": ["MODEL_TYPE_TO_PEFT_MODEL_MAPPING", *(f"PeftModel{suffix}" for suffix in _TASKS)],
    "peftkern.auto": [f"AutoPeftModel{suffix}" for suffix in _TASKS],
    "peftkern.quantize": ["load_quantized", "quantize_model", "save_quantized"],
    "peftkern.status": ["get_layer_status", "get_model_status"],
    "peftkern.tuners.adalora": ["AdaLoraConfig", "AdaLoraModel"],
    "peftkern.tuners.ia3": ["IA3Config", "IA3Model"],
    "peftkern.tuners.lora": [
        *("ArrowConfig", "BdLoraConfig", "EvaConfig", "KasaConfig", "LoftQConfig", "LoraConfig", "LoraGAConfig"),
        *("LoraModel", "LoraRuntimeConfig", "MontecloraConfig", "VeloraConfig"),
    ],
    "peftkern.tuners.lora.eva": ["get_eva_state_dict", "initialize_lora_eva_weights"],
    "peftkern.tuners.lora.gated_mlp": ["fuse_mlps"],
    "peftkern.tuners.lora.loraga": ["preprocess_loraga"],
    "peftkern.tuners.lora.shared_input": ["share_inputs"],
    "peftkern.tuners.p_tuning": ["PromptEncoder", "PromptEncoderConfig", "PromptEncoderReparameterizationType"],
    "peftkern.tuners.prefix_tuning": ["PrefixEncoder", "PrefixTuningConfig"],
    "peftkern.tuners.prompt_tuning": ["PromptEmbedding", "PromptTuningConfig", "PromptTuningInit"],
    "peftkern.tuners.trainable_tokens": ["TrainableTokensConfig", "TrainableTokensModel"],
    "peftkern.utils.adapter_error": ["AdapterFileError"],
    "peftkern.utils.base_state_dict": ["get_base_model_state_dict", "set_base_model_state_dict"],
    "peftkern.utils.error": ["NoMatchingPeftModuleError", "PeftError"],
    "peftkern.utils.kbit": ["cast_mixed_precision_params", "prepare_model_for_kbit_training"],
    "peftkern.utils.peft_types": ["PeftType", "TaskType"],
    "peftkern.utils.quantized_files": ["QuantizedFileError"],
    "peftkern.utils.save_and_load": [
        "get_peft_model_state_dict",
        "load_peft_weights",
        "set_peft_model_state_dict",
    ],
    "peftkern.utils.warning": ["PeftWarning"],
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}
# `peftkern.tuners.lora.LoraLayer` and the like work after `import peftkern` alone, as they do in PEFT.
_SUBMODULES = {
    "nn",
    "ops",
    "auto",
    "config",
    "functional",
    "helpers",
    "mapping",
    "mapping_func",
    "optimizers",
    "peft_model",
}
_SUBMODULES |= {"tuners", "utils"}

__all__ = ["__version__", "nn", "ops", *_HOME_OF]


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"peftkern.{name}")
    if name in _HOME_OF:
        value = getattr(importlib.import_module(_HOME_OF[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'peftkern' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
