"""Whether an adapted layer's forward can be one operation, and the row of `peftkern.explain` that says so."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from peftkern.utils.quantized_modules import weight_of
from peftkern.weights import Weight4bit, Weight8bit

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
        r: Total rank of the active adapters.
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


def bare_weight(module: nn.Module) -> torch.Tensor | None:
    """The weight of an `nn.Linear` that is nothing but that; None of anything else, or of one that is in doubt.

    A quick yes to `why_called_as_is` and `plain_weight`, for the route that every call takes.
    """
    if type(module) is not nn.Linear:  # a parametrization changes the class
        return None
    held = module.__dict__
    if "_hf_hook" in held or "forward" in held:
        return None
    if held["_forward_hooks"] or held["_forward_pre_hooks"] or held["_backward_hooks"] or held["_backward_pre_hooks"]:
        return None
    weight = held["_parameters"].get("weight")
    return weight if type(weight) is nn.Parameter and not weight.is_meta else None


def why_called_as_is(module: nn.Module, forward: Any) -> str:
    """Why `module` must be called rather than its weight used: it does more than `forward`, a function of its class.

    "" if it does no more.
    """
    held = module.__dict__
    if "_hf_hook" in held:
        return "an accelerate hook is on it"
    if held["_forward_hooks"] or held["_forward_pre_hooks"] or held["_backward_hooks"] or held["_backward_pre_hooks"]:
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
    return None if weight is None or weight.device.type == "meta" else weight


def quantized_forward(module: nn.Module) -> Any:
    """The forward that a layer with a quantized weight has from bitsandbytes or peftkern."""
    kinds: tuple[Any, ...] = type(module).__mro__
    for kind in kinds:
        if kind.__name__ in _QUANTIZED_CLASSES and kind.__module__.startswith(_QUANTIZED_PACKAGES):
            return kind.forward
    return None


def plain_weight(module: nn.Module) -> torch.Tensor | None:
    """The weight of `module` if it is an ordinary tensor on a device, else None."""
    held = module.__dict__
    # FSDP1 keeps the gathered weight as an attribute beside the parameters.
    weight = held["_parameters"].get("weight", held.get("weight"))
    return weight if type(weight) in _PLAIN_TENSORS and not weight.is_meta else None
