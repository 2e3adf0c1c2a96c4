"""LoftQ for a model that is quantized already: adapters from the original weights, read from its checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from peftkern.ops import dequantize
from peftkern.peft_model_base import PeftModel
from peftkern.tuners.fusing import compute_dtype
from peftkern.tuners.lora.base_weight import low_rank_factors, write_factors
from peftkern.tuners.lora.dora import weight_norm
from peftkern.tuners.lora.layer import LoraLayer
from peftkern.tuners.merging_quantized import is_merged_into_dense
from peftkern.utils.adapter_error import shorten
from peftkern.utils.adapter_files import PathLike
from peftkern.utils.checkpoint_files import WEIGHTS, Checkpoint
from peftkern.utils.linear_layers import source_conv1d
from peftkern.utils.peft_types import PeftType
from peftkern.utils.quantized_files import QuantizedFileError
from peftkern.utils.quantized_modules import weight_of
from peftkern.weights import Weight4bit

_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class _Task:
    """A layer whose adapter is to be replaced."""

    name: str
    layer: Any
    weight: Weight4bit
    key: str
    transposed: bool


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: nn.Module,
    model_path: PathLike | None = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Give an adapter over 4-bit layers the factors of what quantizing them lost (LoftQ, arXiv:2310.08659), in place.

    For each layer B A becomes the nearest matrix of rank r to `W - dequantize(Q)`, W the original weight and Q the
    layer's, as forward dequantizes it; in float32. The quantized weights stay. One original weight is held at a time.
    As in PEFT the scaling is not divided out: make the adapter with `lora_alpha` equal to r. Layers in 8 bits, dense
    ones and embeddings are left alone. A magnitude of DoRA becomes the norms of the rows of dequantize(Q) + scaling *
    B A, as in a new adapter; PEFT leaves it at those of dequantize(Q).

    Args:
        peft_model: Of `get_peft_model`, with LoRA on 4-bit layers (peftkern's or bitsandbytes').
        model_path: The original, dense model: a folder with `model.safetensors` (or the path of that file), or with
            several files and their index, or the id of a repository on the Hub. None: what the model was loaded from,
            without downloading anything.
        adapter_name: The adapter.
        callback: Called as `callback(peft_model, name)` after each change, with the layer's name in the base model and
            without gradients; what it says no to is taken back. Measure there whether the change helps.

    Raises:
        TypeError: `peft_model` is no `PeftModel`.
        ValueError: No such adapter, nothing in 4 bits under it, it is merged, or it has no values yet; or
            `model_path` is None and the model does not say where it came from.
        QuantizedFileError: (a ValueError) A file or a tensor is missing, damaged or quantized, has another shape, or is
            not what the layer was quantized from. All names and shapes are checked before anything is changed; after
            any error, the callback's too, the adapter is as it was.
    """
    if not isinstance(peft_model, PeftModel):
        raise TypeError(f"peft_model: expected a PeftModel, got {type(peft_model).__name__}")
    if adapter_name not in peft_model.peft_config:
        raise ValueError(f"adapter_name: no adapter {adapter_name!r}; there are {sorted(peft_model.peft_config)}")
    if peft_model.peft_config[adapter_name].peft_type != PeftType.LORA:
        raise ValueError(f"peft_model: expected LoRA adapters, got {type(peft_model.base_model).__name__}")
    base = peft_model.get_base_model()
    layers = _layers_in_4_bits(base, adapter_name)
    checkpoint = _checkpoint_of(base, model_path)
    tasks = _checked_tasks(base, layers, checkpoint)
    undo: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        for task in tasks:
            A, B = task.layer.lora_A[adapter_name].weight, task.layer.lora_B[adapter_name].weight
            magnitude = [
                held[adapter_name].weight for held in [task.layer.lora_magnitude_vector] if adapter_name in held
            ]
            before = [(parameter, parameter.detach().clone()) for parameter in (A, B, *magnitude)]
            undo += before
            write_factors(A, B, *low_rank_factors(_residual(task, checkpoint), A.shape[0]))
            for parameter in magnitude:
                parameter.copy_(weight_norm(task.layer, adapter_name))
            if callback is not None and not callback(peft_model, task.name):
                _put_back(before)
    except BaseException:
        _put_back(undo)
        raise


def _put_back(values: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for parameter, value in values:
        parameter.copy_(value)


def _layers_in_4_bits(base: nn.Module, adapter_name: str) -> dict[str, Any]:
    """The layers with this adapter on a 4-bit weight, by name."""
    found: dict[str, Any] = {}
    for name, layer in base.named_modules():
        if not isinstance(layer, LoraLayer) or layer.stands_alone or adapter_name not in layer.lora_A:
            continue
        if is_merged_into_dense(layer):
            raise ValueError(f"adapters are merged into {name}: {layer.merged_adapters}; unmerge them first")
        if isinstance(weight_of(layer.get_base_layer()), Weight4bit):
            A: Any = layer.lora_A[adapter_name]
            if A.weight.is_meta:
                raise ValueError(f"the adapter {adapter_name!r} is on the meta device at {name}: load its values first")
            found[name] = layer
    if not found:
        raise ValueError(
            f"the adapter {adapter_name!r} is on no layer with a 4-bit weight: for a dense model use "
            "LoraConfig(init_lora_weights='loftq', loftq_config=LoftQConfig())"
        )
    return found


def _checkpoint_of(base: Any, model_path: PathLike | None) -> Checkpoint:
    if model_path is not None:
        folder, file = os.path.split(os.fspath(model_path))
        # PEFT takes the file's name too, also where there are several files instead.
        return Checkpoint(folder or os.curdir) if file == WEIGHTS else Checkpoint(model_path)
    known = getattr(getattr(base, "config", None), "_name_or_path", None) or base.__dict__.get("name_or_path")
    if not known:
        raise ValueError("model_path: expected a folder or a Hub id, since the model does not say its own; got None")
    hub: dict[str, Any] = {} if os.path.isdir(known) else {"local_files_only": True}
    return Checkpoint(known, **hub)


def _checked_tasks(base: Any, layers: dict[str, Any], checkpoint: Checkpoint) -> list[_Task]:
    """Each layer with the name of its original weight, which has been found to fit."""
    prefix = getattr(base, "base_model_prefix", "")
    known = _names_in(base, checkpoint)
    tasks = []
    for name, layer in layers.items():
        key = _key_of(f"{name}.weight", prefix, checkpoint, known)
        weight: Any = weight_of(layer.get_base_layer())
        transposed = source_conv1d(layer.get_base_layer()) is not None  # turned before it was quantized
        expected = list(weight.shape)[:: -1 if transposed else 1]
        dtype, shape = _stored(checkpoint, key)
        if dtype not in _FLOATS:
            reason = f"expected the original weight in one of {', '.join(_FLOATS)}, got {dtype}: is it quantized here?"
            raise QuantizedFileError(checkpoint.file_of(key), reason, key)
        if shape != expected:
            raise QuantizedFileError(checkpoint.file_of(key), f"expected shape {expected}, got {shape}", key)
        tasks.append(_Task(name, layer, weight, key, transposed))
    return tasks


def _names_in(base: Any, checkpoint: Checkpoint) -> dict[str, str]:
    """The names in the checkpoint, by themselves and by what transformers calls them now."""
    from peftkern.integrations.quantized_models import is_transformers_model, name_in_model

    renamed = name_in_model(base) if is_transformers_model(base) else str
    return {renamed(key): key for key in checkpoint} | {key: key for key in checkpoint}


def _key_of(key: str, prefix: str, checkpoint: Checkpoint, known: dict[str, str]) -> str:
    """The name in the checkpoint: a model saved with or without its head may have one prefix less or more."""
    names = [key, *([key.removeprefix(f"{prefix}."), f"{prefix}.{key}"] if prefix else [])]
    for name in names:
        if name in known:
            return known[name]
    tail = key.split(".")[-2]
    near = shorten(sorted(name for name in checkpoint if name.endswith(f"{tail}.weight")), 3) or "no name like it"
    raise QuantizedFileError(checkpoint.file_of(key), f"the original weight is missing; found {near}", key)


def _stored(checkpoint: Checkpoint, key: str) -> tuple[str, list[int]]:
    """The dtype and the shape of a tensor, from the file's header."""
    path = checkpoint.file_of(key)
    try:
        with safe_open(path, framework="pt") as file:
            held = file.get_slice(key)
            return held.get_dtype(), list(held.get_shape())
    except SafetensorError as error:
        raise QuantizedFileError(path, str(error), key) from error


def _residual(task: _Task, checkpoint: Checkpoint) -> torch.Tensor:
    """What quantizing the layer's weight lost: float32 [N, K] on the weight's device."""
    original = checkpoint[task.key].to(task.weight.device, torch.float32)
    original = original.t().contiguous() if task.transposed else original
    # The dtype that forward multiplies in: the adapter then makes up for its rounding too.
    held = dequantize(task.weight, compute_dtype(task.layer.base_layer, task.weight.dtype))
    size = original.norm()
    residual = original.sub_(held)
    error = residual.norm()
    if not bool(error.isfinite()):
        raise QuantizedFileError(checkpoint.file_of(task.key), "NaN or Inf in it", task.key)
    if error > size:
        reason = (
            f"it is not what {task.name} was quantized from: its distance from the layer's weight is "
            f"{error.item():.3g}, further than zeros would be ({size.item():.3g})"
        )
        raise QuantizedFileError(checkpoint.file_of(task.key), reason, task.key)
    return residual
