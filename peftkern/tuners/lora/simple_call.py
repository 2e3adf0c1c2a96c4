"""A layer's forward on a CPU that is what its last one was: one adapter on a bare `nn.Linear`, in plain PyTorch.

What `Linear.forward` finds out about its modules, and `lora_linear` about its operands, takes as long as the products
of a few tokens, and is nearly always what they found before. `SimpleCall` keeps it, and compares.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad

from peftkern.backend import current_backend, device_info
from peftkern.ops._common import adapters_fit, calls_are_changed
from peftkern.ops.lora_linear import plan_for
from peftkern.tuners.fusing import Unhooked

# Of a layer's own attributes.
_deciding = operator.itemgetter("_active_adapter", "merged_adapters", "scaling", "lora_bias", "use_dora", "_modules")
_NAMES = ("bias", "weight", "weight", "weight")  # of the parameters of the base layer, A and B


class SimpleCall:
    """What a forward found, for the next one. It is the layer's own: a copy of the layer has none (`Linear`).

    Compared are lists, by few calls: what Python does between products takes several times what it takes in a loop.

    Args:
        layer: the `Linear`.
        operands: what its forward has just been made of (`Linear._operands_if_simple`); `can_be` holds for them.
        dtype: of x.
    """

    __slots__ = ("_decided", "_found", "_insides", "_states", "_unhooked", "_weights")

    def __init__(self, layer: Any, operands: tuple[Any, ...], dtype: torch.dtype) -> None:
        weight, A, B, scaling, bias, _ = operands
        # Copies of what may change in place.
        self._decided = tuple(v if isinstance(v, str) else v.copy() for v in _deciding(layer.__dict__))
        active = layer._active_adapter
        name = active if isinstance(active, str) else active[0]
        held: dict[str, Any] = layer._modules
        containers = [held[kind]._modules for kind in ("lora_A", "lora_B", "lora_dropout")]
        modules = [held["base_layer"], *(container[name] for container in containers)]
        self._insides = [module.__dict__ for module in modules]
        parameters = [inside["_parameters"] for inside in (self._insides[0], *self._insides[:3])]
        self._weights = (parameters, [bias, weight, A, B])
        self._found = (containers, [dict(container) for container in containers], modules)
        lengths, kinds = [*map(len, self._insides)], [*map(type, modules)]
        own = (weight, A, B, bias, scaling)
        self._states = (dtype, A.dtype, weight.shape[1], current_backend(), layer._shared_input, lengths, kinds, own)
        self._unhooked = Unhooked(self._insides)

    @staticmethod
    def can_be(x: Any, operands: tuple[Any, ...], shared: Any) -> bool:
        """Whether a forward of these, by itself in its group if it is in one, is only products of plain PyTorch."""
        weight, A, B, _, bias, p = operands
        if type(x) is not torch.Tensor or not x.is_cpu or p != 0.0 or type(weight) is not nn.Parameter:
            return False
        if type(A) is not nn.Parameter:  # made for this call
            return False
        if shared is not None and not shared.leaves(x):
            return False
        if calls_are_changed() or not adapters_fit(x, weight, A, B, bias):
            return False
        if x.dtype in device_info(x.device).scalar_matmul:
            return False
        return plan_for(x, weight, A.shape[0], current_backend()).path == "torch"

    def operands(self, layer: dict[str, Any], x: Any) -> tuple[Any, ...] | None:
        """What the forward of the layer with this `__dict__` multiplies x with; None if anything is not as it was.

        Not under torch.compile."""
        dtype, adapter_dtype, K, backend, shared, lengths, kinds, operands = self._states
        if type(x) is not torch.Tensor or x.dtype is not dtype or not x.is_cpu or x.is_nested:
            return None
        # What `why_plain` and `calls_are_changed` ask, without their calls, which cost 2 us of the 60 of a small call.
        if torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() is not None:
            return None
        if torch._C._is_any_autocast_enabled() or torch._C._len_torch_dispatch_stack():
            return None
        if forward_ad._current_level >= 0 or current_backend() != backend:
            return None
        shape = x.shape
        if not shape or shape[-1] != K or _deciding(layer) != self._decided:
            return None
        if layer.get("_mixed") is not None or layer.get("_mixed_before") is not None or layer.get("_disable_adapters"):
            return None
        if layer.get("_shared_input") is not shared or (shared is not None and not shared.leaves(x)):
            return None
        containers, members, modules = self._found
        insides, (parameters, weights) = self._insides, self._weights
        # A forward of a module's own is one attribute more.
        if containers != members or [*map(len, insides)] != lengths or [*map(type, modules)] != kinds:
            return None
        if not all(map(operator.is_, map(dict.get, parameters, _NAMES), weights)):
            return None
        weight, A, B, bias, _ = operands
        if weight.dtype is not dtype or A.dtype is not adapter_dtype or B.dtype is not adapter_dtype:
            return None
        if not weight.is_cpu:
            return None
        dropout = insides[3]
        if dropout["training"] and dropout.get("p"):
            return None
        if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
            return None
        return operands if self._unhooked.still() else None
