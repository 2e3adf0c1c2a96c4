"""`gated_lora_linear`: a LoRA projection of `act(gate) * up`, the end of a gated MLP, as one operation.

By torch's operations the activations of a SwiGLU block that wait for backward are gate, act(gate), up and their
product h, each as wide as the MLP. Here it is gate and up: h is made in one pass, goes into the projection, and is made
again in backward, where the gradients of gate and up are one more pass and lie in the memory of h and its gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from peftkern.backend import backend_in_force
from peftkern.ops._common import (
    Later,
    apply_in_two,
    autocast_dtype,
    dropout_in_force,
    dropout_seed,
    fake_gradients,
    is_plain,
    kept_s,
    needs_operator,
    none_if_empty,
    number,
    refuse_double_backward,
    taken_s,
    without_autocast,
)
from peftkern.ops._gated_activation import ACTIVATIONS, gated, gated_again, gated_gradients
from peftkern.ops._kept import keep, kept
from peftkern.ops._lora_linear_shared_operator import flatten_all, unflatten_all
from peftkern.ops._rank_rows import fake_s
from peftkern.ops.lora_linear import _backward as dense_backward
from peftkern.ops.lora_linear import _forward as dense_forward
from peftkern.ops.lora_linear import lora_linear
from peftkern.ops.lora_linear import plan_for as plan_for_dense
from peftkern.ops.lora_linear_quantized import _backward as quantized_backward
from peftkern.ops.lora_linear_quantized import _forward as quantized_forward
from peftkern.ops.lora_linear_quantized import plan_for as plan_for_quantized
from peftkern.ops.lora_linear_shared import _check as check_projection
from peftkern.ops.plan import Plan
from peftkern.weights import Weight

Needs = tuple[bool, bool, bool]  # gate and up, lora_A, lora_B
_Kept = torch.Tensor | None


def gated_lora_linear(
    gate: torch.Tensor,
    up: torch.Tensor,
    weight: Weight,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None = None,
    *,
    activation: str = "silu",
    dropout_p: float = 0.0,
    training: bool = True,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """`y = h W^T + bias + scaling * dropout(h) A^T B^T` with `h = act(gate) * up` (Shazeer 2020, arXiv:2002.05202).

    Gradients flow to gate, up, lora_A and lora_B. Kept for backward: gate and up by reference, S [M, R], and a seed
    (kernels) or a mask (plain PyTorch); h is made again. Where the weight or the bias learns, it is `lora_linear` of an
    h that torch makes and keeps. Under autocast all is cast to its dtype. Double backward is not supported.

    Args:
        gate, up: [..., in_features], of one shape and dtype: float32, float16 or bfloat16 (float64 on the plain path);
            any strides.
        weight, lora_A, lora_B, scaling, bias: of the projection, as for `lora_linear`.
        activation: "silu", "gelu" or "gelu_tanh" (GELU's approximation by tanh).
        dropout_p, training, seed: as for `lora_linear`.

    Returns:
        [..., out_features] in gate's dtype (autocast's under autocast).

    Raises:
        TypeError, ValueError, RuntimeError: as `lora_linear`, of which x is `gate`.
        ValueError: an activation that is none of these, or gate and up that differ in shape or device.
    """
    scaling = number("gated_lora_linear: scaling", scaling)
    dropout_p = dropout_in_force(dropout_p, training)
    cast = autocast_dtype(gate)
    if cast is not None and isinstance(up, torch.Tensor) and not gate.dtype is up.dtype is cast:
        gate, up = gate.to(cast), up.to(cast)
    _check(gate, up, activation)
    check_projection(gate, weight, lora_A, lora_B, bias, mixed=cast is not None)
    seed = None if dropout_p == 0.0 else dropout_seed(seed, gate.device)
    learned = [t for t in (weight, bias) if isinstance(t, torch.Tensor) and t.requires_grad]
    if learned:
        h = ACTIVATIONS[activation][0](gate) * up
        return lora_linear(h, weight, lora_A, lora_B, scaling, bias, dropout_p=dropout_p, seed=seed)
    path = plan_for(gate, weight, lora_A.shape[0], backend_in_force()).path
    stored = [weight] if isinstance(weight, torch.Tensor) else [t for t in weight.tensors() if t is not None]
    if needs_operator(gate, up, lora_A, lora_B, *stored):
        tensors, numbers = flatten_all([weight])
        rest: Any = (bias, seed, numbers, scaling, dropout_p, activation, path)
        return _operator(gate, up, tensors, lora_A, lora_B, *rest)[0]
    arguments: Any = (gate, up, weight, lora_A, lora_B, bias, seed, scaling, dropout_p, activation, path)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (gate, up, lora_A, lora_B)):
        dense = weight if isinstance(weight, torch.Tensor) else None
        rest = (weight, bias, seed, scaling, dropout_p, activation, path)
        return apply_in_two(_GatedLoraLinear, lora_A, gate, up, lora_A, lora_B, dense, rest)
    return _forward(*arguments)[0]


def plan_for(gate: torch.Tensor, weight: Weight, rank: int, backend: str) -> Plan:
    """The plan for gate [..., K] and weight [N, K]: that of the projection, whose x is contiguous whatever gate is."""
    like = gate if gate.is_contiguous() else torch.empty_like(gate, memory_format=torch.contiguous_format)
    if isinstance(weight, torch.Tensor):
        return plan_for_dense(like, weight, rank, backend)
    return plan_for_quantized(like, weight, rank, backend)


def _check(gate: torch.Tensor, up: torch.Tensor, activation: str) -> None:
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(f"gated_lora_linear: activation: expected one of {list(ACTIVATIONS)}, got {activation!r}")
    for name, t in (("gate", gate), ("up", up)):
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"gated_lora_linear: {name}: expected a tensor, got {type(t).__name__}")
    if up.dtype != gate.dtype:
        raise TypeError(f"gated_lora_linear: up: expected gate's dtype {gate.dtype}, got {up.dtype}")
    if up.shape != gate.shape or up.device != gate.device:
        raise ValueError(
            f"gated_lora_linear: up: expected {list(gate.shape)} on {gate.device} as gate, got {list(up.shape)} on "
            f"{up.device}"
        )


@without_autocast
def _forward(
    gate: torch.Tensor,
    up: torch.Tensor,
    weight: Weight,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    scaling: float,
    dropout_p: float,
    activation: str,
    path: str,
    later: Later = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """y [..., N], S [M, R], and a mask [M, K] on the plain path with dropout. `later`: see `apply_in_two`."""
    K = gate.shape[-1]
    h = gated(gate.reshape(-1, K), up.reshape(-1, K), activation, path).view(gate.shape)
    if isinstance(weight, torch.Tensor):
        return dense_forward(h, weight, lora_A, lora_B, bias, seed, scaling, dropout_p, path, later)
    return quantized_forward(h, weight, lora_A, lora_B, bias, seed, scaling, dropout_p, path, later)


@without_autocast
def _backward(
    dy: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    weight: Weight,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    s: _Kept,
    mask: _Kept,
    seed: _Kept,
    scaling: float,
    dropout_p: float,
    activation: str,
    path: str,
    needs: Needs,
) -> tuple[_Kept, _Kept, _Kept, _Kept]:
    """Gradients of gate, up [..., K], lora_A and lora_B, None where `needs` does not ask."""
    needs_h, needs_a, needs_b = needs
    K, N = gate.shape[-1], weight.shape[0]
    rows = (gate.reshape(-1, K), up.reshape(-1, K))
    h: Any = None
    made: Any = None
    if needs_h:
        h, made = gated_again(*rows, activation, path, needs_a)
    elif needs_a:
        h = gated(*rows, activation, path)
    saved: Any = (dy.reshape(-1, N), h, weight, lora_A, lora_B, s, mask, seed, scaling, dropout_p, path)
    if isinstance(weight, torch.Tensor):
        wanted: Any = ((needs_h, False, needs_a, needs_b, False), None)
        dh, _, da, db, _ = dense_backward(*saved, *wanted)
    else:
        wanted = ((needs_h, needs_a, needs_b, False), None)
        dh, da, db, _ = quantized_backward(*saved, *wanted)
    if not needs_h:
        return None, None, da, db
    dgate, dup = gated_gradients(dh, *rows, made, activation, path)  # type: ignore[arg-type]
    return dgate.view(gate.shape), dup.view(gate.shape), da, db


class _GatedLoraLinear(torch.autograd.Function):
    """The eager door; the weight is an input of its own if it is dense, so that changing it in place is noticed."""

    @staticmethod
    def forward(ctx: Any, gate, up, lora_A, lora_B, dense, rest, later):
        weight, bias, seed, *numbers = rest
        arguments: Any = (gate, up, weight, lora_A, lora_B, bias, seed, *numbers, later)
        y, s, mask = _forward(*arguments)
        needs_gate, needs_up, needs_a, needs_b, *_ = ctx.needs_input_grad
        ctx.needs = (needs_gate or needs_up, needs_a, needs_b)
        path = numbers[-1]
        own_s = kept_s(s, path) if needs_b else None
        needs_h = needs_gate or needs_up or needs_a
        gated_by = (gate, up) if needs_h else (gate.new_empty(()).expand(gate.shape),) * 2  # shapes, no memory
        keep(ctx, 5, *gated_by, own_s, mask, seed if mask is None else None, lora_A, lora_B, dense)
        ctx.weight = None if dense is not None else weight  # quantized: frozen, no activation, and here anyway
        ctx.numbers = numbers
        return y

    @staticmethod
    def backward(ctx: Any, dy):
        refuse_double_backward("gated_lora_linear")
        gate, up, s, mask, seed, lora_A, lora_B, dense = kept(ctx, 8)
        weight = dense if ctx.weight is None else ctx.weight
        saved: Any = (dy, gate, up, weight, lora_A, lora_B, taken_s(s), mask, seed, *ctx.numbers, ctx.needs)
        dgate, dup, da, db = _backward(*saved)
        needs_gate, needs_up, *_ = ctx.needs_input_grad
        return dgate if needs_gate else None, dup if needs_up else None, da, db, None, None, None


# -- the operator -------------------------------------------------------------------------------------------------


@torch.library.custom_op("peftkern::gated_lora_linear", mutates_args=())
def _operator(
    gate: torch.Tensor,
    up: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    numbers: Sequence[int],
    scaling: float,
    dropout_p: float,
    activation: str,
    path: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, S, mask); mask is empty unless the plain path drew one."""
    (weight,) = unflatten_all(tensors, numbers)
    rest: Any = (bias, seed, scaling, dropout_p, activation, path)
    y, s, mask = _forward(gate, up, weight, lora_A, lora_B, *rest)
    s = s.to(gate.dtype)  # as the fake says; fp32 where masters met few rows
    return y, s, gate.new_empty(0, dtype=torch.bool) if mask is None else mask


@_operator.register_fake
def _(gate, up, tensors, lora_A, lora_B, bias, seed, numbers, scaling, dropout_p, activation, path):
    K = gate.shape[-1]
    M = gate.numel() // K
    return (
        gate.new_empty(*gate.shape[:-1], lora_B.shape[0]),
        fake_s(gate, M, lora_A.shape[0], path),
        gate.new_empty((M, K) if seed is not None and is_plain(path) else (0,), dtype=torch.bool),
    )


@torch.library.custom_op("peftkern::gated_lora_linear_backward", mutates_args=())
def _operator_backward(
    dy: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    s: torch.Tensor,
    mask: torch.Tensor,
    seed: torch.Tensor | None,
    numbers: Sequence[int],
    scaling: float,
    dropout_p: float,
    activation: str,
    path: str,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of (gate, up, lora_A, lora_B), empty where not asked for."""
    (weight,) = unflatten_all(tensors, numbers)
    kept: Any = (s, none_if_empty(mask), seed, scaling, dropout_p, activation, path, tuple(needs))
    grads = _backward(dy, gate, up, weight, lora_A, lora_B, *kept)
    dgate, dup, da, db = (dy.new_empty(0) if g is None else g for g in grads)
    return dgate, dup, da, db


@_operator_backward.register_fake
def _(dy, gate, up, tensors, lora_A, lora_B, s, mask, seed, numbers, scaling, dropout_p, activation, path, needs):
    needs_h, needs_a, needs_b = needs
    full = [(t.shape, t.dtype) for t in (gate, gate, lora_A, lora_B)]
    return fake_gradients(dy, full, (needs_h, needs_h, needs_a, needs_b))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    gate, up, tensors, lora_A, lora_B, _, seed, *numbers = inputs
    _, s, mask = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(gate, up, lora_A, lora_B, s, mask, seed, *tensors)
    ctx.numbers = numbers


def _operator_autograd(ctx: Any, dy: torch.Tensor | None, *_: torch.Tensor | None) -> tuple[Any, ...]:
    refuse_double_backward("gated_lora_linear")
    gate, up, lora_A, lora_B, s, mask, seed, *tensors = ctx.saved_tensors
    absent = [None] * len(tensors)
    if dy is None:
        return (None, None, absent, *(None,) * 9)
    needs_gate, needs_up, _, needs_a, needs_b, *_others = ctx.needs_input_grad
    needs = [needs_gate or needs_up, needs_a, needs_b]
    rest: Any = (s, mask, seed, *ctx.numbers, needs)
    dgate, dup, da, db = _operator_backward(dy, gate, up, tensors, lora_A, lora_B, *rest)
    grads = ((dgate, needs_gate), (dup, needs_up), (da, needs_a), (db, needs_b))
    dgate, dup, da, db = (g if need else None for g, need in grads)
    return (dgate, dup, absent, da, db, *(None,) * 7)


_operator.register_autograd(_operator_autograd, setup_context=_setup_context)
