"""Gated MLPs of a model (SwiGLU, GeGLU) that keep `gate` and `up` for backward, not `act(gate)` nor the product.

An MLP's `forward` is taken over where its class's code is that of transformers' decoders, compiled to the very same
instructions (143 classes of transformers 5.23); one that computes anything else is left alone. From then on the end of
the MLP, from the outputs of gate and up on, is `ops.gated_lora_linear`, in eager mode; the projections of gate and up
are called as they were. Whatever looks at the modules in between (hooks on the activation or on down_proj, adapters
that are merged, disabled or several) or compiles the model gets the class's own forward, and so do a few tokens on a
CPU, where making the product again takes longer than anything that it saves.

`get_peft_model` does so for every such MLP whose last projection has an adapter; `fuse_mlps` undoes it.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import nn

from peftkern.ops import gated_lora_linear
from peftkern.ops._common import autocast_dtype
from peftkern.ops._lora_linear_traced import fitting_dtypes
from peftkern.ops.plan import JOINED_ELEMENTS
from peftkern.tuners.fusing import compute_dtype, has_global_hooks, is_bare, is_nested
from peftkern.tuners.lora.layer import Linear
from peftkern.utils.module_tree import modules_of, named_modules_of
from peftkern.utils.other import batch_in_force

FEW_ELEMENTS = JOINED_ELEMENTS  # of the MLP's input: on a CPU up to so many are few
_LEFT_ALONE = "_peftkern_own_forward"  # of an MLP that `fuse_mlps(enabled=False)` was told of


# -- what the code of a known MLP is: never called, compiled to be compared --------------------------------------


def _stored(self: Any, x: Any) -> Any:
    down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return down_proj  # noqa: RET504  (as the models have it: another instruction)


def _returned(self: Any, x: Any) -> Any:
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def _in_one(self: Any, x: Any) -> Any:
    up_states = self.gate_up_proj(x)
    gate, up_states = up_states.chunk(2, dim=-1)
    up_states = up_states * self.activation_fn(gate)
    return self.down_proj(up_states)


def _instructions(function: Any) -> Any:
    """What a function does, but for the names of its variables and what is written about it; None of no function."""
    code = getattr(function, "__code__", None)
    if code is None or function.__closure__:
        return None
    return code.co_code, code.co_names, tuple(c for c in code.co_consts if not isinstance(c, str | None))


_KNOWN = {_instructions(function): function is _in_one for function in (_stored, _returned, _in_one)}


@functools.cache
def _is_in_one(forward: Any) -> bool | None:
    """Whether the code of a known MLP has gate and up in one projection; None of any other code."""
    return _KNOWN.get(_instructions(forward))


def _activation(module: Any) -> str | None:
    """The name that `gated_lora_linear` has for an activation of torch or transformers; None of any other."""
    held = module.__dict__
    if not is_bare(module):
        return None
    kind = type(module)
    if kind is nn.SiLU:
        return None if module.inplace else "silu"  # in place it changes what gate_proj gave
    if kind is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}[module.approximate]
    if kind.__module__ != "transformers.activations":
        return None
    if kind.__name__ == "SiLUActivation":
        return "silu"
    act = held.get("act")
    if kind.__name__ == "GELUActivation":
        return "gelu" if act is nn.functional.gelu else None
    if kind.__name__ == "GELUTanh" and isinstance(act, functools.partial) and act.func is nn.functional.gelu:
        return "gelu_tanh"
    return None


def _end_of(mlp: Any) -> tuple[Any, tuple[Any, ...], str] | None:
    """(down_proj, its operands, the activation) where nothing looks at what lies between gate, up and the output, and
    the last product is one `lora_linear`; None elsewhere. Which batch is in force is not asked."""
    if has_global_hooks():
        return None
    down = mlp._modules["down_proj"]
    if not _is_lora(down) or not is_bare(down):
        return None
    operands = down._operands()
    activation = None if operands is None else _activation(_act_of(mlp))
    return None if operands is None or activation is None else (down, operands, activation)


def _act_of(mlp: Any) -> nn.Module:
    return mlp._modules["activation_fn" if _is_in_one(type(mlp).forward) else "act_fn"]


def _is_lora(layer: Any) -> bool:
    return isinstance(layer, Linear) and type(layer).forward is Linear.forward


def _fitting(down: Any, operands: tuple[Any, ...], gate: torch.Tensor, up: torch.Tensor) -> tuple[Any, ...] | None:
    """Weight, A, B, scaling and bias as the operation takes them beside gate and up; None if they do not fit."""
    if not isinstance(gate, torch.Tensor) or not isinstance(up, torch.Tensor):
        return None
    if gate.dtype != up.dtype or gate.shape != up.shape or not gate.is_floating_point():
        return None
    weight, A, B, scaling, bias, _ = operands
    if not isinstance(weight, torch.Tensor):
        # A quantized layer computes in its own dtype, whatever x has: left to it where that is another.
        dtype = compute_dtype(down._modules["base_layer"], gate.dtype)
        if dtype != gate.dtype or autocast_dtype(gate) not in (None, dtype):
            return None
    A, B, bias = fitting_dtypes((A, B, bias), gate.dtype, weight)
    return weight, A, B, scaling, bias


def _is_left(x: Any) -> bool:
    """Whether an MLP's input is left to its class's own forward."""
    return is_nested(x) or (isinstance(x, torch.Tensor) and x.is_cpu and x.numel() <= FEW_ELEMENTS)


def _forward(mlp: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The forward of a known MLP, of one tensor."""
    kind = type(mlp)
    in_one = None if kwargs or len(args) != 1 or _is_left(args[0]) else _is_in_one(kind.forward)
    # A compiler makes act(gate) and the product again by itself where that is cheaper than to keep them.
    end = None if in_one is None or torch.compiler.is_compiling() else _end_of(mlp)
    if end is None or batch_in_force(end[0]) is not None:
        return kind.forward(mlp, *args, **kwargs)
    held, (x,), (down, operands, activation) = mlp._modules, args, end
    if in_one:
        gate, up = held["gate_up_proj"](x).chunk(2, dim=-1)
    else:
        gate, up = held["gate_proj"](x), held["up_proj"](x)
    fitting = _fitting(down, operands, gate, up)
    if fitting is None:
        return down(_act_of(mlp)(gate) * up)
    return gated_lora_linear(gate, up, *fitting, activation=activation, dropout_p=operands[-1])


_forward.computes_what_the_class_does = True  # type: ignore[attr-defined]  # for what knows modules by their forward


# -- whose forward is taken over ----------------------------------------------------------------------------------


def _is_known(mlp: nn.Module) -> bool:
    """Whether a module is an MLP of known code, with an adapter on down_proj."""
    return _is_in_one(type(mlp).forward) is not None and _is_lora(mlp._modules.get("down_proj"))


def fuse_mlps(model: nn.Module, enabled: bool = True) -> list[str]:
    """Make gated MLPs keep only the outputs of gate and up for backward; see this module.

    A step keeps two tensors of the MLP's width where it kept four. Outputs and gradients are the same up to rounding:
    on a GPU `act(gate) * up` is rounded once, not twice. `get_peft_model` has done so already; this undoes it, or does
    it for a module that has LoRA layers of `peftkern.nn` and such a forward.

    Args:
        model: any module that has LoRA layers.
        enabled: False gives MLPs their class's forward back, for good: adapters that are added later do not change it.

    Returns:
        The names of the MLPs that it concerns: code that is known, with a LoRA layer as down_proj.

    Raises:
        TypeError: `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    names = []
    for name, mlp in named_modules_of(model):
        if _is_known(mlp):
            names.append(name)
            _release(mlp)
            mlp.__dict__[_LEFT_ALONE] = not enabled
            if enabled:
                _take(mlp)
    return names


def fuse_known_mlps(model: nn.Module) -> None:
    """`fuse_mlps`, but for MLPs that were left alone, or that have a forward of their own."""
    for mlp in modules_of(model):
        if _is_known(mlp) and not mlp.__dict__.get(_LEFT_ALONE) and "forward" not in mlp.__dict__:
            _take(mlp)


def release_mlps(model: nn.Module) -> None:
    """Give all MLPs their class's forward back."""
    for mlp in modules_of(model):
        _release(mlp)
        mlp.__dict__.pop(_LEFT_ALONE, None)


def is_fused(mlp: nn.Module) -> bool:
    """Whether a module's forward was taken over, also where an accelerate hook stands before it."""
    return any(_is_ours(mlp.__dict__.get(name)) for name in ("forward", "_old_forward"))


def _is_ours(forward: Any) -> bool:
    return isinstance(forward, functools.partial) and forward.func is _forward


class _EndOf:
    """Of a down_proj: the MLP whose forward was taken over.

    Args:
        mlp: that MLP.
    """

    def __init__(self, mlp: nn.Module) -> None:
        self.mlp = mlp

    def is_in_force(self, tokens: int) -> bool:
        """Whether its forward would be the operation now: no other method's or hooks' turn, no other forward."""
        known = _is_in_one(type(self.mlp).forward) is not None
        end = _end_of(self.mlp) if known and is_fused(self.mlp) else None
        if end is None:
            return False
        down, (weight, *_), _ = end
        return weight.device.type != "cpu" or tokens * down.out_features > FEW_ELEMENTS


def _take(mlp: Any) -> None:
    if "forward" not in mlp.__dict__:  # someone else's stays
        mlp.__dict__["forward"] = functools.partial(_forward, mlp)  # of which copies and pickles are the copy's own
        mlp._modules["down_proj"].__dict__["_ends_mlp"] = _EndOf(mlp)


def _release(mlp: Any) -> None:
    if is_fused(mlp):
        if _is_ours(mlp.__dict__.get("forward")):
            del mlp.__dict__["forward"]
        else:  # what an accelerate hook calls, and gives back when it goes
            mlp.__dict__["_old_forward"] = types.MethodType(type(mlp).forward, mlp)
        mlp._modules["down_proj"].__dict__.pop("_ends_mlp", None)
