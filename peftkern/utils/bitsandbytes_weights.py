"""The quantized weights of bitsandbytes' layers, read by their attributes: bitsandbytes itself is not imported.

`Linear4bit` has its numbers in a QuantState, `Linear8bitLt` its scales in one of two places. What was put together from
them is kept with the module, so that a forward need not do it again.
"""

from __future__ import annotations

import operator
import sys
import warnings
from typing import Any

import torch
from torch import nn

from peftkern.weights import NESTED_BLOCKSIZE, Weight4bit, Weight8bit

# Where a weight that was put together is kept: an attribute of the module that holds its tensors.
_KEPT = "_peftkern_kept"


class Kept:
    """A weight that was put together, so that a forward need not do it again (10 us and more).

    Copies and pickles of a module get an empty one, or they would hold the weight's memory twice.
    """

    __slots__ = ("packed", "statistics", "weight")

    def __init__(self) -> None:
        self.weight: Any = None  # a Weight4bit, a Weight8bit, or nothing yet
        self.packed: Any = None
        self.statistics: tuple[Any, ...] = ()

    def still(self, address: int, *statistics: Any) -> bool:
        """Whether the weight's codes are still at this address, and its statistics these very tensors."""
        # Asked of the tensor each time: FSDP frees a parameter's memory and takes it anew.
        if self.weight is None or self.packed.data_ptr() != address:
            return False
        return all(map(operator.is_, self.statistics, statistics))

    def hold(self, weight: Any) -> Any:
        """Keep `weight` and return it."""
        self.weight = weight
        self.packed, *rest = weight.tensors()
        self.statistics = tuple(rest)
        return weight

    def __deepcopy__(self, memo: dict[int, Any]) -> Kept:
        return Kept()

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()


def kept_by(module: nn.Module) -> Kept:
    """What the module keeps; nothing yet, at first."""
    kept = module.__dict__.get(_KEPT)
    if kept is None:
        kept = module.__dict__[_KEPT] = Kept()
    return kept


def of_linear4bit(module: nn.Module) -> Weight4bit:
    """The weight of bitsandbytes' `Linear4bit`. Its numbers are in a QuantState: the weight's attribute, or, where the
    parameter was made anew (FSDP does), the module's."""
    weight = parameter_of(module)
    state = getattr(weight, "quant_state", None)
    if state is None:
        state = module.quant_state
    if state is None:
        raise ValueError(
            f"{type(module).__name__}: bitsandbytes has not quantized its weight yet; it does when the model is moved "
            "to a device, model.to('cuda') for one"
        )
    if state.__dict__.get("packing_format_for_cpu"):
        weight, state = _undo_cpu_packing(module, weight, state)
    if torch.compiler.is_compiling():
        return _from_state(weight, state)
    kept = kept_by(module)
    nested = state.state2
    if nested is None:
        unchanged = kept.still(_address(weight), state.absmax, state.code, None, None, None)
    else:
        if state.offset.dtype != torch.float32:
            state.offset = state.offset.float()  # bitsandbytes makes it in torch's default dtype
        unchanged = kept.still(_address(weight), state.absmax, state.code, nested.absmax, nested.code, state.offset)
    return kept.weight if unchanged else kept.hold(_from_state(weight, state))


def parameter_of(module: nn.Module) -> Any:
    """`module.weight`, more quickly where it is a parameter."""
    weight = module._parameters.get("weight")
    return module.weight if weight is None else weight


def _address(weight: torch.Tensor) -> int:
    # bitsandbytes' parameters send each method through Python, which costs more than all the rest here.
    with torch._C.DisableTorchFunctionSubclass():
        return weight.data_ptr()


def _from_state(weight: torch.Tensor, state: Any) -> Weight4bit:
    nested: Any = getattr(state, "state2", None)
    if nested is not None and nested.blocksize != NESTED_BLOCKSIZE:
        raise ValueError(f"nested_blocksize: expected {NESTED_BLOCKSIZE}, got {nested.blocksize}")
    return Weight4bit(
        weight.detach().view(-1).view(torch.uint8),
        state.absmax,
        state.code,
        state.shape,
        state.blocksize,
        state.quant_type,
        state.dtype,
        None if nested is None else nested.absmax,
        None if nested is None else nested.code,
        None if nested is None else state.offset.to(torch.float32),
    )


def _undo_cpu_packing(module: Any, weight: Any, state: Any) -> tuple[Any, Any]:
    """Put a weight back that bitsandbytes repacked for its CPU kernel in a forward in eval mode.

    The codes come back exactly. The scales do not: they were rounded to bfloat16 then. The layer is kept from being
    packed again, so that the rounding happens once.
    """
    # The module that defines the state's class has the inverse too; no import of ours.
    inverse = sys.modules[type(state).__module__]._convert_weight_packed_for_cpu_inverse
    weight.data, state = inverse(weight.data, state)
    if getattr(state, "state2", None) is None:
        state.state2 = None
        if state.absmax.dim() == 2:  # left [K / blocksize, N] by the inverse
            state.absmax = state.absmax.t().reshape(-1)
    else:
        state.state2.absmax, state.state2.dtype = state.state2.absmax.float(), torch.float32
        state.offset = state.offset.float()
    state.absmax = state.absmax if state.nested else state.absmax.float()
    weight.quant_state = module.quant_state = state
    module.support_avx512bf16_for_cpu = False
    warnings.warn(
        f"{type(module).__name__}: bitsandbytes repacked this weight for its CPU kernel in an earlier forward and "
        "rounded its scales to bfloat16. The codes are put back, the scales stay rounded: load the model anew, and "
        "adapt it before its first forward, to have them exactly.",
        stacklevel=4,
    )
    return weight, state


def of_linear8bit(module: nn.Module) -> Weight8bit | None:
    """The weight of bitsandbytes' `Linear8bitLt`: int8 in its parameter; the scales are the parameter's attribute
    until the first forward, which moves them to `module.state`."""
    state: Any = module.state
    if state.has_fp16_weights:
        return None
    data = parameter_of(module)
    scale = getattr(data, "SCB", None)
    if scale is None:
        scale = state.SCB
    if scale is None or data.dtype != torch.int8:
        raise ValueError(
            f"{type(module).__name__}: bitsandbytes has not quantized its weight yet; it does when the model is moved "
            "to a device, model.to('cuda') for one"
        )
    if scale.device != data.device:  # Module.to moves the parameter, and leaves behind what `state` holds
        scale = scale.to(data.device)
    if torch.compiler.is_compiling():
        return Weight8bit(data.detach(), scale, torch.float16)
    kept = kept_by(module)
    if kept.still(data.data_ptr(), scale):
        return kept.weight
    return kept.hold(Weight8bit(data.detach(), scale, torch.float16))  # bitsandbytes rounds to that first
