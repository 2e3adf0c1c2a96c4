"""Which class configures and which class makes the adapters of each method; adapters in a bare model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from peftkern.config import PeftConfig, check_is_config, known_methods
from peftkern.tuners.adalora import AdaLoraConfig, AdaLoraModel
from peftkern.tuners.ia3 import IA3Config, IA3Model
from peftkern.tuners.lora import LoraConfig, LoraModel
from peftkern.tuners.p_tuning import PromptEncoder, PromptEncoderConfig
from peftkern.tuners.prefix_tuning import PrefixEncoder, PrefixTuningConfig
from peftkern.tuners.prompt_tuning import PromptEmbedding, PromptTuningConfig
from peftkern.tuners.trainable_tokens import TrainableTokensConfig, TrainableTokensModel
from peftkern.utils.peft_types import PeftType

PEFT_TYPE_TO_CONFIG_MAPPING: dict[str, type[PeftConfig]] = {
    PeftType.ADALORA: AdaLoraConfig,
    PeftType.IA3: IA3Config,
    PeftType.LORA: LoraConfig,
    PeftType.PREFIX_TUNING: PrefixTuningConfig,
    PeftType.PROMPT_TUNING: PromptTuningConfig,
    PeftType.P_TUNING: PromptEncoderConfig,
    PeftType.TRAINABLE_TOKENS: TrainableTokensConfig,
}
# What makes the adapters of a method: a tuner changes layers of a model, an encoder makes virtual tokens.
PEFT_TYPE_TO_TUNER_MAPPING: dict[str, type[Any]] = {
    PeftType.ADALORA: AdaLoraModel,
    PeftType.IA3: IA3Model,
    PeftType.LORA: LoraModel,
    PeftType.PREFIX_TUNING: PrefixEncoder,
    PeftType.PROMPT_TUNING: PromptEmbedding,
    PeftType.P_TUNING: PromptEncoder,
    PeftType.TRAINABLE_TOKENS: TrainableTokensModel,
}
# How the names of a method's parameters begin; of prompt methods, whose parameters have other names, as PEFT lists it.
PEFT_TYPE_TO_PREFIX_MAPPING: dict[str, str] = {
    name: getattr(tuner, "prefix", f"{PeftType(name).value.lower()}_")
    for name, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items()
}


def config_class(config: Mapping[str, Any]) -> type[PeftConfig]:
    """The configuration class that `config["peft_type"]` names.

    Raises:
        ValueError: It is missing, unknown, or a method that is not built.
    """
    known = known_methods()
    peft_type = config.get("peft_type")
    if peft_type is None:
        raise ValueError(f"peft_type is missing from the configuration; the methods known here: {known}")
    if not isinstance(peft_type, str) or peft_type not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ValueError(f"peft_type={peft_type!r} is not a method known here; those that are: {known}")
    return PEFT_TYPE_TO_CONFIG_MAPPING[peft_type]


def get_peft_config(config_dict: Mapping[str, Any]) -> PeftConfig:
    """The configuration that a dict describes; its `peft_type` says which class."""
    config = PeftConfig.from_dict(config_dict)
    if not isinstance(config, PeftConfig):
        raise TypeError(f"config_dict must describe an adapter, got {type(config).__name__}")
    return config


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> nn.Module:
    """Adapts `model` in place without wrapping it in a `PeftModel`.

    Args:
        peft_config: The adapter's configuration.
        model: The model; all but the adapter is frozen in it.
        adapter_name: The adapter's name; it becomes active.
        low_cpu_mem_usage: Make the adapter's weights on the meta device, to be filled from a file.
        state_dict: If given, the modules adapted are those that its keys name rather than `target_modules`.

    Returns:
        `model`. Its state dict now has the adapter's keys, such as `<module>.lora_A.<adapter_name>.weight`.

    Raises:
        TypeError: `peft_config` is no configuration of peftkern's.
        ValueError: The method puts no layers into a model; or see `BaseTuner`.
    """
    check_is_config("peft_config", peft_config)
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(peft_config.peft_type or "")
    if tuner is None or peft_config.is_prompt_learning:
        why = ", which changes no layers: use get_peft_model" if peft_config.is_prompt_learning else ""
        raise ValueError(f"inject_adapter_in_model cannot inject peft_type={str(peft_config.peft_type)!r}{why}")
    tuner(model, peft_config, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage, state_dict=state_dict)
    return model
