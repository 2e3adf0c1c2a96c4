"""What initializations share that look at data (EVA, CorDA, LoRA-GA): which layers, the model's mode, and files."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from peftkern.tuners.lora.model import LoraModel
from peftkern.tuners.targets import is_linear, match_targets
from peftkern.utils.adapter_error import shorten
from peftkern.utils.adapter_files import PathLike, read_bin, replacing
from peftkern.utils.module_tree import modules_of, named_modules_of
from peftkern.utils.quantized_modules import holds_quantized


def linear_targets(model: nn.Module, config: Any) -> dict[str, nn.Module]:
    """The linear layers of a base model that `config` names, in the model's order; the configuration is not changed."""
    config = copy.deepcopy(config)  # whose targets are made explicit
    named = dict(named_modules_of(model))
    keys = match_targets(model, config, LoraModel.target_module_mapping, LoraModel.prefix)
    return {name: named[name] for name in keys if is_linear(named[name])}


def dense_targets(model: nn.Module, config: Any, what: str) -> dict[str, Any]:
    """`linear_targets`, which must be some, with dense weights.

    Raises:
        ValueError: There are none, or one is quantized; `what` wants them.
    """
    found = linear_targets(model, config)
    if not found:
        raise ValueError(f"{what}: target_modules={config.target_modules!r} names no linear layer")
    quantized = [name for name, layer in found.items() if holds_quantized(layer)]
    if quantized:
        raise ValueError(f"{what} needs dense weights, got a quantized one at {shorten(quantized, 3)}")
    return found


@contextlib.contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """In this context the model is in training or in evaluation mode; then each module is in its own again."""
    modes = [(module, module.training) for module in modules_of(model)]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def is_there(path: PathLike | None) -> bool:
    """Whether a file that keeps what was computed has been written."""
    return path is not None and os.path.exists(path) and os.path.getsize(path) > 0


def read_tensors(path: PathLike, wanted: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of a file that `write_tensors`, or PEFT, wrote, each on the device that `wanted` says.

    Raises:
        AdapterFileError: (a ValueError) The file is damaged or holds anything but tensors.
        ValueError: A name of `wanted` is not in it.
    """
    held = read_bin(os.fspath(path), "cpu")
    missing = [name for name in wanted if name not in held]
    if missing:
        raise ValueError(f"{os.fspath(path)}: no {shorten(missing, 3)} in it; was it made for another model?")
    return {name: held[name].to(device) for name, device in wanted.items()}


def write_tensors(path: PathLike, tensors: dict[str, torch.Tensor]) -> None:
    """Write tensors by `torch.save`, as PEFT does, by way of a file beside it."""
    path = os.path.abspath(path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with replacing(path) as file:
        torch.save({name: t.contiguous() for name, t in tensors.items()}, file)
