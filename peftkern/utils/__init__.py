"""Utilities under the names that PEFT's users import them by."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from peftkern.utils.constants import (
    CONFIG_NAME,
    INCLUDE_LINEAR_LAYERS_SHORTHAND,
    SAFETENSORS_WEIGHTS_NAME,
    TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING,
    WEIGHTS_NAME,
)
from peftkern.utils.error import NoMatchingPeftModuleError, PeftError
from peftkern.utils.other import (
    AuxiliaryTrainingWrapper,
    ModulesToSaveWrapper,
    _freeze_adapter,
    _get_submodules,
    _set_adapter,
    infer_device,
    transpose,
)
from peftkern.utils.peft_types import PeftType, TaskType
from peftkern.utils.warning import PeftWarning

if TYPE_CHECKING:
    from peftkern.utils.base_state_dict import get_base_model_state_dict, set_base_model_state_dict
    from peftkern.utils.kbit import cast_mixed_precision_params, prepare_model_for_kbit_training
    from peftkern.utils.save_and_load import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

# These know the tuners, which use this package, or are seldom wanted: imported when first asked for.
_LATER = dict.fromkeys(("get_peft_model_state_dict", "load_peft_weights", "set_peft_model_state_dict"), "save_and_load")
_LATER |= dict.fromkeys(("get_base_model_state_dict", "set_base_model_state_dict"), "base_state_dict")
_LATER |= dict.fromkeys(("cast_mixed_precision_params", "prepare_model_for_kbit_training"), "kbit")

__all__ = [
    "CONFIG_NAME",
    "INCLUDE_LINEAR_LAYERS_SHORTHAND",
    "SAFETENSORS_WEIGHTS_NAME",
    "TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING",
    "TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING",
    "TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING",
    "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
    "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING",
    "WEIGHTS_NAME",
    "AuxiliaryTrainingWrapper",
    "ModulesToSaveWrapper",
    "NoMatchingPeftModuleError",
    "PeftError",
    "PeftType",
    "PeftWarning",
    "TaskType",
    "_freeze_adapter",
    "_get_submodules",
    "_set_adapter",
    "cast_mixed_precision_params",
    "get_base_model_state_dict",
    "get_peft_model_state_dict",
    "infer_device",
    "load_peft_weights",
    "prepare_model_for_kbit_training",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
    "transpose",
]


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(importlib.import_module(f"peftkern.utils.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
