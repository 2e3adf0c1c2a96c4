"""Small helpers of PEFT 0.21.2's `peft.helpers`: those that mean something for LoRA, DoRA and IA3."""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Iterator
from contextvars import Token
from typing import Any

from torch import nn

from peftkern.peft_model_base import PeftModel
from peftkern.tuners.lora.dora import keeps_norms
from peftkern.tuners.lora.layer import LoraLayer
from peftkern.tuners.tuner_layer import BaseTunerLayer
from peftkern.utils.adapter_error import AdapterFileError
from peftkern.utils.adapter_files import PathLike, read_config

__all__ = [
    "DoraCaching",
    "check_if_peft_model",
    "disable_input_dtype_casting",
    "rescale_adapter_scale",
    "update_forward_signature",
    "update_generate_signature",
    "update_signature",
]


def check_if_peft_model(model_name_or_path: PathLike) -> bool:
    """Whether a folder or Hub repository has an `adapter_config.json` that names a method, built here or not.

    False also where the Hub cannot be asked.
    """
    try:
        return isinstance(read_config(model_name_or_path).get("peft_type"), str)
    except AdapterFileError:
        return False


class DoraCaching:
    """DoRA's norms, kept from one forward to the next, for inference: `with DoraCaching(): ...`.

    Each forward of a DoRA layer takes the norms of its adapted rows, a pass over the weight. In eval mode and without
    gradients (`torch.no_grad`, `inference_mode`) they are kept, [out_features] in float32 for a layer, and made anew
    when the weight, the adapter or its scaling was changed, but for writing to a parameter's `.data`. Under
    torch.compile, in a CUDA graph, on embeddings and on layers that `explain` calls unfused they are made at each
    forward. B A, which PEFT keeps too, is never made.

    It holds within the block, or from `DoraCaching()(enabled)` on, for the thread that calls it.

    Args:
        enabled: False: within the block they are made at each forward.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._before: list[Token[bool]] = []

    def __enter__(self) -> None:
        self._before.append(keeps_norms.set(bool(self.enabled)))

    def __exit__(self, *_: object) -> None:
        keeps_norms.reset(self._before.pop())

    def __call__(self, enabled: bool = True) -> None:
        keeps_norms.set(bool(enabled))


@contextlib.contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float | int) -> Iterator[None]:
    """Within the block, every LoRA adapter of `model` has `multiplier` times its scaling.

    Between 0 and 1 the model is, for one adapter, what lies on the line between the base and the adapted weights
    (Wortsman et al. 2022, arXiv:2109.01903).

    Raises:
        TypeError: `multiplier` is no number.
        ValueError: `model` has no LoRA layer; or an adapter is merged, so that its scaling is in the base weight.
    """
    if isinstance(multiplier, bool) or not isinstance(multiplier, (float, int)):
        raise TypeError(f"multiplier: expected a float, got {multiplier!r} of type {type(multiplier).__name__}")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    if not layers:
        raise ValueError(f"model: expected one with LoRA layers, found none in this {type(model).__name__}")
    for name, layer in layers.items():
        if layer.merged:
            raise ValueError(f"model: adapters {layer.merged_adapters} are merged into {name!r}: unmerge them first")
    before = [(layer, dict(layer.scaling)) for layer in layers.values()]
    for layer, scaling in before:
        layer.scaling = {name: value * multiplier for name, value in scaling.items()}
    try:
        yield
    finally:
        for layer, scaling in before:
            layer.scaling = scaling


@contextlib.contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Within the block, adapters whose modules are called one by one take their input in the dtype that it has.

    For weights that lie in one dtype and compute in another, where hooks on each module cast them for its call
    (diffusers' layerwise casting): the cast to the dtype in which a weight lies would come before that hook.

    Args:
        model: With adapters.
        active: False: nothing is changed.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)] if active else []
    before = [layer.cast_input_dtype_enabled for layer in layers]
    for layer in layers:
        layer.cast_input_dtype_enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.cast_input_dtype_enabled = enabled


def update_forward_signature(model: PeftModel) -> None:
    """Has `help(model.forward)` and `inspect.signature` speak of the base model's arguments, if ours names none."""
    _speak_for_base(model, "forward")


def update_generate_signature(model: PeftModel) -> None:
    """The same of `model.generate`, where the base model has one."""
    if hasattr(model.get_base_model(), "generate"):
        _speak_for_base(model, "generate")


def update_signature(model: PeftModel, method: str = "all") -> None:
    """`update_forward_signature` ("forward"), `update_generate_signature` ("generate") or both ("all").

    Raises:
        ValueError: another `method`.
    """
    if method not in ("forward", "generate", "all"):
        raise ValueError(f"method: expected forward, generate or all, got {method!r}")
    if method != "generate":
        update_forward_signature(model)
    if method != "forward":
        update_generate_signature(model)


def _speak_for_base(model: PeftModel, name: str) -> None:
    """Puts a method of the base's description on this object; its class, and so other models, stay as they are."""
    if set(inspect.signature(getattr(model, name)).parameters) - {"args", "kwargs"}:
        return
    ours, theirs = getattr(type(model), name), getattr(type(model.get_base_model()), name)

    @functools.wraps(theirs, assigned=("__doc__", "__name__", "__annotations__"))
    def described(self: Any, *args: Any, **kwargs: Any) -> Any:
        return ours(self, *args, **kwargs)

    setattr(model, name, types.MethodType(described, model))
