"""Saving an adapter of PiSSA and its like as one for the unchanged base model, from what was saved before training."""

from __future__ import annotations

import os
from typing import Any

import torch

from peftkern.config import PeftConfig
from peftkern.tuners.lora.config import LoraConfig
from peftkern.tuners.lora.mutated_init import check_same_scaling, converted_config, subtract_initial
from peftkern.utils.adapter_files import PathLike, blamed_on_config, reading, weights_file
from peftkern.utils.save_and_load import check_lora_tensors, load_config, load_peft_weights


def read_initial_adapter(path: PathLike) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """The configuration and the tensors of the adapter that was saved before training; its files are only read.

    Raises:
        AdapterFileError: (a ValueError) A file is missing or damaged.
        ValueError: It is no LoRA.
    """
    path = os.fspath(path)
    with reading(path), blamed_on_config(path, {}):
        config: Any = load_config(path)
        if not isinstance(config, LoraConfig):
            raise ValueError(f"expected a LoRA to convert with, got {config.peft_type}")
        tensors = load_peft_weights(path)
        check_lora_tensors(weights_file(path), tensors, config)
    return config, tensors


def convert(
    config: PeftConfig, tensors: dict[str, torch.Tensor], initial: tuple[LoraConfig, dict[str, torch.Tensor]]
) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """What to save of a trained adapter so that it can be used over the base model as it was: see `mutated_init`.

    Raises:
        ValueError: It is no LoRA, its configuration cannot be converted, or `initial` is not the adapter that it was.
    """
    if not isinstance(config, LoraConfig):
        raise ValueError(f"path_initial_model_for_weight_conversion goes with LoRA, got {config.peft_type}")
    made = converted_config(config)
    check_same_scaling(config, initial[0])
    return made, subtract_initial(tensors, initial[1])
