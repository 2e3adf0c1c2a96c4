"""Whether an adapted layer's forward can be one operation, what that takes of the base layer, and the row of
`peftkern.explain` that says so."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from peftkern.backend import backend_in_force
from peftkern.ops.linear_quantized import linear_quantized
from peftkern.tuners.merging_quantized import is_merged_into_dense
from peftkern.tuners.tuner_layer import BaseTunerLayer
from peftkern.utils.quantized_modules import check_is_float, weight_of
from peftkern.weights import Weight, Weight4bit, Weight8bit

_PLAIN_TENSORS = (nn.Parameter, torch.Tensor)
# Linear layers with a quantized weight whose forward is known: these classes of these packages.
_QUANTIZED_CLASSES = ("Linear4bit", "Linear8bit", "Linear8bitLt")
_QUANTIZED_PACKAGES = ("bitsandbytes.", "peftkern.")


@dataclasses.dataclass(frozen=True)
class ExplainRow:
    """One line of `peftkern.explain`: an adapted layer, and whether its forward is one fused operation.

    Attributes:
        name: The layer's name in the model; filled in by the caller.
        kind: The class of the base layer.
        in_features, out_features: Of the base layer (num_embeddings and embedding_dim of an embedding).
        r: Total rank of the active adapters; 0 for a method without ranks.
        dtype: Of the base weight; of a quantized one, what it was quantized from.
        fused: Whether forward is one operation of `peftkern.ops`.
        reason: Why not, or "" if it is.
    """

    name: str
    kind: str
    in_features: int
    out_features: int
    r: int
    dtype: torch.dtype | None
    fused: bool
    reason: str


def why_plain() -> str:
    """Why no layer may run as a fused operation now, "" if each may.

    It may be the user's wish. And a transform of torch.func and forward-mode differentiation ask for the derivatives of
    each operation that is called, and torch.jit.trace, which an ONNX exporter is built on, writes each down: to them a
    fused operation is one that they do not know, and an adapter in plain PyTorch is what they do. Hooks that are for
    every module in the process want each one called.
    """
    if backend_in_force() == "unfused":
        return "use_backend('unfused')"
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func is in force"
    if forward_ad._current_level >= 0:
        return "differentiated in forward mode"
    if has_global_hooks():
        return "hooks of all modules are registered"
    return "" if torch._C._get_tracing_state() is None else "torch.jit is tracing"


def has_global_hooks() -> bool:
    """Whether hooks are registered for all modules, of forward or of backward."""
    forward = torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks
    return bool(forward or torch_module._global_backward_hooks or torch_module._global_backward_pre_hooks)


def has_own_bias(module: nn.Module) -> bool:
    """Whether a module has a bias among its parameters."""
    return module._parameters.get("bias") is not None


def has_hooks(module: dict[str, Any]) -> bool:
    """Whether the module with this `__dict__` has hooks, of forward or of backward."""
    forward = module["_forward_hooks"] or module["_forward_pre_hooks"]
    return bool(forward or module["_backward_hooks"] or module["_backward_pre_hooks"])


class Unhooked:
    """Modules, by their `__dict__`s, that have no hooks when this is made.

    Torch gives hooks numbers, whichever module they are for: while the next one's stays, nobody has registered any.
    """

    __slots__ = ("_modules", "_next")

    def __init__(self, modules: Sequence[dict[str, Any]]) -> None:
        self._modules, self._next = modules, _next_hook()

    def still(self) -> bool:
        """Whether they have none now."""
        following = _next_hook()
        if following != self._next:
            if has_global_hooks() or any(map(has_hooks, self._modules)):
                return False
            self._next = following
        return True


def _next_hook() -> float:
    """The number of the next hook. NaN, which equals nothing, from a torch that gives none."""
    number: float = getattr(RemovableHandle, "next_id", math.nan)
    return number


def is_nested(x: Any) -> bool:
    """Whether x is a nested tensor, of rows of several lengths: plain PyTorch knows them, operations do not."""
    return isinstance(x, torch.Tensor) and x.is_nested


def bare_weight(module: nn.Module) -> torch.Tensor | None:
    """The weight of an `nn.Linear` that is nothing but that; None of anything else, or of one that is in doubt.

    A quick yes to `why_called_as_is` and `plain_weight`, for the route that every call takes.
    """
    if type(module) is not nn.Linear or not is_bare(module):  # a parametrization changes the class
        return None
    weight = module.__dict__["_parameters"].get("weight")
    return weight if type(weight) is nn.Parameter and not weight.is_meta else None


def bare_quantized_weight(module: nn.Module) -> Weight4bit | Weight8bit | None:
    """The same of a quantized layer of bitsandbytes or peftkern, and no subclass of it."""
    kind: Any = type(module)
    return quantized_weight(module) if _is_quantized_class(kind) and is_bare(module) else None


@functools.cache
def _is_quantized_class(kind: Any) -> bool:
    """Whether modules of a class are quantized layers of bitsandbytes or peftkern."""
    return kind.__name__ in _QUANTIZED_CLASSES and kind.__module__.startswith(_QUANTIZED_PACKAGES)


def is_bare(module: nn.Module) -> bool:
    """Whether calling a module is calling its class's forward: it has no hooks, and no forward of its own."""
    held = module.__dict__
    return not ("_hf_hook" in held or "forward" in held or has_hooks(held))


def why_called_as_is(module: nn.Module, forward: Any) -> str:
    """Why `module` must be called rather than its weight used: it does more than `forward`, a function of its class.

    "" if it does no more, and nothing else wants it called (`why_plain`).
    """
    reason = why_plain()
    if reason:
        return reason
    held = module.__dict__
    if "_hf_hook" in held:
        return "an accelerate hook is on it"
    if has_hooks(held):
        return "it has hooks"
    if "forward" in held or type(module).forward is not forward:
        return f"{type(module).__name__} has a forward of its own"
    if "parametrizations" in held["_modules"]:
        return "its weight is parametrized"
    return ""


def quantized_weight(module: nn.Module) -> Weight4bit | Weight8bit | None:
    """The quantized weight of a layer whose forward is known, on a device; None of any other layer."""
    if type(module) is nn.Linear or not isinstance(module, nn.Module):
        return None
    weight = weight_of(module)
    return None if weight is None or weight.tensors()[0].is_meta else weight


def quantized_forward(module: nn.Module) -> Any:
    """The forward that a layer with a quantized weight has from bitsandbytes or peftkern."""
    kinds: tuple[Any, ...] = type(module).__mro__
    for kind in kinds:
        if _is_quantized_class(kind):
            return kind.forward
    return None


def plain_weight(module: nn.Module) -> torch.Tensor | None:
    """The weight of `module` if it is an ordinary tensor on a device, else None."""
    held = module.__dict__
    # FSDP1 keeps the gathered weight as an attribute beside the parameters.
    weight = held["_parameters"].get("weight", held.get("weight"))
    return weight if type(weight) in _PLAIN_TENSORS and not weight.is_meta else None


def describe_weight(module: nn.Module) -> str:
    """What the weight of `module` is that it cannot be used as it is."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return "missing"
    if weight.is_meta:
        return "on the meta device"
    # FSDP2 keeps a shard between calls and gathers it into a plain tensor for forward.
    gathered = " (a plain tensor within forward, if FSDP2 gathers it)" if type(weight).__name__ == "DTensor" else ""
    return f"a {type(weight).__name__}{gathered}"


def why_base_alone(layer: BaseTunerLayer, names: list[str]) -> str:
    """Why `layer`, whose active adapters are `names`, runs its base layer alone; "" if it does not."""
    if layer.disable_adapters:
        return "adapters are disabled: the base layer runs alone"
    if layer.merged:
        return f"{', '.join(layer.merged_adapters)} merged: the base layer runs alone"
    return "" if names else "no active adapter here: the base layer runs alone"


def compute_dtype(base: nn.Module, default: torch.dtype) -> torch.dtype:
    """What a quantized base layer casts its input to, else `default`, the dtype of x."""
    check_is_float(default)
    return getattr(base, "compute_dtype", None) or default


def weight_by_rows(base: nn.Module, transposed: bool) -> Weight:
    """The weight of a linear layer as [out_features, in_features]; `transposed` if it is stored the other way round.

    Raises:
        ValueError: It is neither quantized nor a plain tensor on a device.
    """
    quantized = quantized_weight(base)
    if quantized is not None:
        return quantized
    weight = plain_weight(base)
    if weight is None:
        raise ValueError("the base layer's weight is no plain tensor on a device")
    return weight.t() if transposed else weight


def base_alone(layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The base layer of a linear `layer` without adapters, by the arithmetic that it has with them.

    bitsandbytes' own forward would repack its weight for a CPU in eval mode, and round its scales.
    """
    base: Any = layer._modules["base_layer"]
    quantized = quantized_weight(base)
    if quantized is not None and not args and not kwargs:
        if not why_called_as_is(base, quantized_forward(base)):
            dtype = compute_dtype(base, x.dtype)
            return linear_quantized(x.to(dtype), quantized, base.bias).to(x.dtype)
    elif is_merged_into_dense(layer):
        return base(x.to(base.weight.dtype), *args, **kwargs).to(x.dtype)
    return base(x, *args, **kwargs)
