"""`dora_linear`: a frozen linear layer and its weight-decomposed adapter as one differentiable operation.

DoRA learns the direction of each output's row of weights by LoRA and its length apart: V = W + scaling * B A, and the
weight is magnitude * V / |V|, row by row. |V| changes with A and B, so it is worked out at each call, in one pass over
W; as in the paper, no gradient flows through it. `dora_norm` gives it by itself, for a caller whose adapter stands
still: it can be handed in again and again.

What a call does is in `_dora_linear_call`; here are its arguments and its two doors (see `lora_linear`). One operator
serves dense and quantized weights (see `lora_linear_quantized` for how a weight crosses it).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from peftkern.backend import backend_in_force, device_info
from peftkern.ops import _dora_linear_call
from peftkern.ops._common import (
    FLOATS,
    PLAIN_PATHS,
    adapters_fit,
    apply_directly,
    ask,
    autocast_dtype,
    calls_are_changed,
    check_adapters,
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
    unflattened,
    without_autocast,
)
from peftkern.ops._dense_blocks import dense_blocks
from peftkern.ops._dora_linear_call import Made, Needs, Numbers
from peftkern.ops._dora_linear_torch import row_norms, wide_dtype
from peftkern.ops._rank_rows import fake_s
from peftkern.ops.ia3_linear import DENSE, _flatten, _sizes, _unflatten
from peftkern.ops.lora_linear_quantized import check_quantized
from peftkern.ops.plan import Plan, plan_dora_linear, plan_dora_norm
from peftkern.weights import DENSE_DTYPES, Weight, Weight4bit, Weight8bit


def dora_linear(
    x: torch.Tensor,
    weight: Weight,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    magnitude: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
) -> torch.Tensor:
    """`y = c * (x W^T + scaling * x A^T B^T) + bias`, `c = magnitude / |W + scaling * B A|` by rows of the weight
    (DoRA, Liu et al. 2024, arXiv:2402.09353).

    With dropout, x' = dropout(x): `y = x W^T + (c - 1) * (x' W^T) + c * (scaling * x' A^T B^T) + bias`, as in PEFT.
    Where a row of W + scaling * B A is all 0, c is 0.

    Gradients flow to whichever of x, weight, lora_A, lora_B, magnitude and bias require them, with the norm held
    constant; only those are computed. Kept for backward: x by reference, S [M, R], c * y's products u [M, out_features]
    if the magnitude learns, c and 1 / norm [out_features], and what `lora_linear` keeps of dropout. Under autocast, x,
    weight and bias are cast to its dtype for the products, and the norm is that of the weight as it is. Double backward
    is not supported.

    Args:
        x, weight, lora_A, lora_B, scaling, bias: as for `lora_linear`.
        magnitude: [out_features], in x's dtype or float32.
        dropout_p, training, seed: as for `lora_linear`.
        norm: what `dora_norm` gives for this weight and adapter, [out_features] in float32 (float64 beside float64), if
            the caller knows that nothing has changed since; worked out if None.

    Returns:
        [..., out_features] in x's dtype (autocast's under autocast).

    Raises:
        TypeError: an argument's type or dtype is not one of the above.
        ValueError: shapes, devices or a number do not fit.
        RuntimeError: `use_backend("triton")` is in force and Triton kernels cannot run there.
    """
    if type(scaling) is not float or scaling != scaling:
        scaling = number("dora_linear: scaling", scaling)
    dense = weight if isinstance(weight, torch.Tensor) else None
    changed = calls_are_changed()
    cast = autocast_dtype(x) if changed else None
    if cast is not None:
        x = x.to(cast)
    plain = dense is not None and adapters_fit(x, dense, lora_A, lora_B, bias)
    if dense is None:
        check_quantized("dora_linear", x, weight, lora_A, lora_B, bias, mixed=cast is not None)  # type: ignore[arg-type]
    elif not plain:
        check_adapters("dora_linear", x, dense, lora_A, lora_B, bias, mixed=cast is not None)
    plain = plain and type(magnitude) in (torch.Tensor, torch.nn.Parameter)
    _check_vectors(x, weight, magnitude, norm, mixed=cast is not None)
    p = dropout_in_force(dropout_p, training)
    seed = None if p == 0.0 else dropout_seed(seed, x.device)
    known = norm is not None and seed is None
    path = plan_for(x, weight, lora_A.shape[0], backend_in_force(), norm_is_known=known).path
    learns = torch.is_grad_enabled()
    keep_u = learns and magnitude.requires_grad
    norm = None if norm is None else norm.detach()
    rest = (scaling, p, path, keep_u)
    if changed or not plain:
        tensors, sizes = _flatten(weight)
        if needs_operator(x, lora_A, lora_B, magnitude, *tensors):
            return _operator(x, tensors, lora_A, lora_B, magnitude, bias, seed, norm, sizes, *rest)[0]
    wanted = (x, dense, lora_A, lora_B, magnitude, bias)
    if learns and any(t is not None and t.requires_grad for t in wanted):
        return apply_directly(_DoraLinear, x, dense, lora_A, lora_B, magnitude, bias, seed, norm, (weight, *rest))
    return _forward(x, weight, lora_A, lora_B, magnitude, bias, seed, norm, *rest)[0]


def dora_norm(
    weight: Weight,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    *,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The length of each row of `W + scaling * B A`, which is never formed whole; no gradient flows through it.

    Args:
        weight: [out_features, in_features] in float32, float16, bfloat16 or float64, any strides; or quantized.
        lora_A: [r, in_features] of any of those dtypes. lora_B: [out_features, r].
        scaling: a number, not NaN.
        dtype: what a quantized weight is decoded to: that of the x which it is to meet; by default the weight's own.

    Returns:
        [out_features] in float32 (float64 for a float64 weight).

    Raises:
        TypeError: an argument's type or dtype is not one of the above.
        ValueError: shapes, devices or a number do not fit.
        RuntimeError: `use_backend("triton")` is in force and Triton kernels cannot run there.
    """
    scaling = number("dora_norm: scaling", scaling)
    if isinstance(weight, torch.Tensor):
        decoded = weight.dtype
        if decoded not in FLOATS:
            raise TypeError(f"dora_norm: weight: expected float32, float16, bfloat16 or float64, got {decoded}")
    elif isinstance(weight, (Weight4bit, Weight8bit)):
        decoded = weight.dtype if dtype is None else dtype
        if decoded not in DENSE_DTYPES:
            raise TypeError(f"dora_norm: dtype: expected float32, float16 or bfloat16, got {decoded}")
    else:
        raise TypeError(
            f"dora_norm: weight: expected a tensor, a Weight4bit or a Weight8bit, got {type(weight).__name__}"
        )
    # The checks of a call with a row that fits: a shape, no memory.
    shape = weight.shape
    stand_in = torch.empty((), dtype=decoded, device=weight.device)
    row = stand_in.expand(1, shape[-1] if len(shape) else 1)
    check_adapters("dora_norm", row, stand_in.expand(shape), lora_A, lora_B, None, mixed=True)
    N, K = weight.shape
    path = ask(plan_dora_norm, N * K, decoded, device_info(weight.device), backend_in_force()).path
    tensors, sizes = _flatten(weight)
    if needs_operator(lora_A, lora_B, *tensors):
        detached = [t.detach() for t in tensors]
        return _norm_operator(detached, lora_A.detach(), lora_B.detach(), sizes, scaling, decoded, path)
    with torch.no_grad():
        return _norm(weight, lora_A, lora_B, scaling, decoded, path)


@without_autocast
def _norm(
    weight: Weight, lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float, decoded: torch.dtype, path: str
) -> torch.Tensor:
    """The norms of checked arguments, [N]."""
    if not isinstance(weight, torch.Tensor):
        blocks = dense_blocks(weight, decoded, path)
        return torch.cat([_norm(dense, lora_A, lora_B[rows], scaling, decoded, path) for rows, dense in blocks])
    if path in PLAIN_PATHS:
        return row_norms(weight, lora_A, lora_B, scaling)
    from peftkern.ops import _dora_linear_triton as kernels

    return kernels.norm(weight, lora_A, lora_B, scaling, device_info(weight.device).arch)


def _check_vectors(x: torch.Tensor, weight: Weight, magnitude: Any, norm: Any, *, mixed: bool) -> None:
    """Refuse a magnitude or a norm that cannot be one; `mixed` allows another float dtype (autocast)."""
    N, wide = weight.shape[0], wide_dtype(x.dtype)
    norm_dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64) if mixed else (wide,)
    for name, t, dtypes in (("magnitude", magnitude, (x.dtype, torch.float32)), ("norm", norm, norm_dtypes)):
        if t is None and name == "norm":
            continue
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"dora_linear: {name}: expected a tensor [out_features], got {type(t).__name__}")
        if t.dim() != 1 or t.shape[0] != N:
            raise ValueError(f"dora_linear: {name}: expected shape [{N}], got {list(t.shape)}")
        if t.dtype not in dtypes and not (mixed and name == "magnitude" and t.dtype in FLOATS):
            allowed = " or ".join(str(dtype) for dtype in dict.fromkeys(dtypes))
            raise TypeError(f"dora_linear: {name}: expected {allowed}, got {t.dtype}")
        if t.device != x.device:
            raise ValueError(f"dora_linear: {name}: expected device {x.device} as x, got {t.device}")


def plan_for(x: torch.Tensor, weight: Weight, rank: int, backend: str, *, norm_is_known: bool = False) -> Plan:
    """The plan for x [..., K] and weight [N, K]; `norm_is_known` if the norms are given and nothing is dropped."""
    N, K = weight.shape
    aligned, blocksize = True, None
    if not x.is_cpu:
        rows = [x.stride(-2)] if x.dim() > 1 else []
        rows += [max(weight.stride())] if isinstance(weight, torch.Tensor) else []
        aligned = all(stride * x.element_size() % 16 == 0 for stride in rows)
    if not isinstance(weight, torch.Tensor):
        blocksize = weight.blocksize if isinstance(weight, Weight4bit) else 0
    options = (x.dtype, device_info(x.device), aligned, backend)
    return ask(plan_dora_linear, x.numel() // K, N, K, rank, blocksize, norm_is_known, *options)


@without_autocast
def _forward(
    x: torch.Tensor,
    weight: Weight,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    magnitude: torch.Tensor,
    bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    norm: torch.Tensor | None,
    scaling: float,
    dropout_p: float,
    path: str,
    keep_u: bool,
) -> tuple[torch.Tensor, Made]:
    """y [..., N], and what was made for it."""
    flat = x.dim() == 2
    rows = x if flat else x.reshape(-1, x.shape[-1])
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    adapter = (lora_A, lora_B, magnitude, bias, seed, norm)
    made = _dora_linear_call.forward(rows, weight, *adapter, Numbers(scaling, dropout_p, path), keep_u)
    return (made.y if flat else unflattened(made.y, x.shape[:-1])), made


@without_autocast
def _backward(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    weight: Weight,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    s: torch.Tensor | None,
    mask: torch.Tensor | None,
    seed: torch.Tensor | None,
    u: torch.Tensor | None,
    c: torch.Tensor | None,
    inverse: torch.Tensor | None,
    numbers: Numbers,
    needs: Needs,
    dtypes: tuple[torch.dtype, torch.dtype | None],
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of (x [..., K], weight, lora_A, lora_B, magnitude, bias), None where `needs` does not ask; `dtypes` of
    the last two."""
    N, K = weight.shape
    flat = dy.dim() == 2
    grad = dy if flat else dy.reshape(-1, N)
    rows = x if x is None or flat else x.reshape(-1, K)
    saved = (lora_A, lora_B, s, mask, seed, u, c, inverse, numbers, needs)
    dx, dw, da, db, dm, dbias = _dora_linear_call.backward(grad, rows, weight, *saved)
    if dx is not None and not flat:
        dx = dx.view(*dy.shape[:-1], K)
    vectors = (None if t is None else t.to(dtype) for t, dtype in zip((dm, dbias), dtypes, strict=True))
    return dx, dw, da, db, *vectors


class _DoraLinear(torch.autograd.Function):
    """The eager door."""

    @staticmethod
    def forward(ctx: Any, x, dense, lora_A, lora_B, magnitude, bias, seed, norm, rest):
        weight, scaling, dropout_p, path, keep_u = rest
        vectors = (magnitude, bias, seed, norm)
        y, made = _forward(x, weight, lora_A, lora_B, *vectors, scaling, dropout_p, path, keep_u)
        needs: Needs = ctx.needs_input_grad[:6]
        needs_x, needs_w, needs_a, needs_b, needs_m, _ = needs
        drops = seed is not None and (needs_x or needs_w or needs_a)
        # Activations are x, S, u and the mask: weight and adapter exist anyway and are kept by reference.
        ctx.save_for_backward(
            x if needs_a or needs_w else None,
            dense,
            lora_A,
            lora_B,
            kept_s(made.s, path) if needs_b else None,
            made.mask if drops else None,
            seed if drops and made.mask is None else None,
            made.u,
            made.c if needs_x or needs_w or needs_a or needs_b else None,
            made.inverse if needs_m else None,
        )
        ctx.weight = None if dense is not None else weight  # quantized: frozen, no activation, and here anyway
        ctx.rest = (Numbers(scaling, dropout_p, path), needs, (magnitude.dtype, None if bias is None else bias.dtype))
        return y

    @staticmethod
    def backward(ctx: Any, dy):
        refuse_double_backward("dora_linear")
        x, dense, lora_A, lora_B, s, *kept = ctx.saved_tensors
        weight = dense if ctx.weight is None else ctx.weight
        return (*_backward(dy, x, weight, lora_A, lora_B, taken_s(s), *kept, *ctx.rest), None, None, None)


# -- the operators ------------------------------------------------------------------------------------------------


@torch.library.custom_op("peftkern::dora_norm", mutates_args=())
def _norm_operator(
    tensors: Sequence[torch.Tensor],
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    sizes: Sequence[int],
    scaling: float,
    decoded: torch.dtype,
    path: str,
) -> torch.Tensor:
    return _norm(_unflatten(tensors, sizes), lora_A, lora_B, scaling, decoded, path)


@_norm_operator.register_fake
def _(tensors, lora_A, lora_B, sizes, scaling, decoded, path):
    return lora_B.new_empty(lora_B.shape[0], dtype=wide_dtype(decoded))


@torch.library.custom_op("peftkern::dora_linear", mutates_args=())
def _operator(
    x: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    magnitude: torch.Tensor,
    bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    norm: torch.Tensor | None,
    sizes: Sequence[int],
    scaling: float,
    dropout_p: float,
    path: str,
    keep_u: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, S, mask, u, c, 1 / norm); mask is empty unless the plain path drew one, u unless it is kept."""
    rest = (magnitude, bias, seed, norm, scaling, dropout_p, path, keep_u)
    y, made = _forward(x, _unflatten(tensors, sizes), lora_A, lora_B, *rest)
    s = made.s.to(x.dtype)  # as the fake says; fp32 where masters met few rows
    mask = x.new_empty(0, dtype=torch.bool) if made.mask is None else made.mask
    return y, s, mask, x.new_empty(0) if made.u is None else made.u, made.c, made.inverse


@_operator.register_fake
def _(x, tensors, lora_A, lora_B, magnitude, bias, seed, norm, sizes, scaling, dropout_p, path, keep_u):
    N, K = _sizes(tensors, sizes)
    M = x.numel() // K
    wide = wide_dtype(x.dtype)
    mask_shape = (M, K) if seed is not None and is_plain(path) else (0,)
    return (
        x.new_empty(*x.shape[:-1], N),
        fake_s(x, M, lora_A.shape[0], path),
        x.new_empty(mask_shape, dtype=torch.bool),
        x.new_empty((M, N) if keep_u else (0,)),
        x.new_empty(N, dtype=wide),
        x.new_empty(N, dtype=wide),
    )


@torch.library.custom_op("peftkern::dora_linear_backward", mutates_args=())
def _operator_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    s: torch.Tensor,
    mask: torch.Tensor,
    seed: torch.Tensor | None,
    u: torch.Tensor,
    c: torch.Tensor,
    inverse: torch.Tensor,
    sizes: Sequence[int],
    scaling: float,
    dropout_p: float,
    path: str,
    needs: list[bool],
    magnitude_dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of (x, weight, lora_A, lora_B, magnitude, bias), empty where not asked for."""
    drawn = none_if_empty(mask)
    if seed is not None and is_plain(path):
        drawn = mask  # also of no rows, when it is as empty as one that was not drawn
    kept: Any = (s, drawn, seed if drawn is None else None, u if needs[4] else None, c, inverse)
    rest: Any = (Numbers(scaling, dropout_p, path), tuple(needs), (magnitude_dtype, bias_dtype))
    grads = _backward(dy, x, _unflatten(tensors, sizes), lora_A, lora_B, *kept, *rest)
    dx, dw, da, db, dm, dbias = (dy.new_empty(0) if g is None else g for g in grads)
    return dx, dw, da, db, dm, dbias


@_operator_backward.register_fake
def _(
    dy, x, tensors, lora_A, lora_B, s, mask, seed, u, c, inverse, sizes, scaling, dropout_p, path, needs,
    magnitude_dtype, bias_dtype,
):  # fmt: skip
    N, K = _sizes(tensors, sizes)
    full = (
        ((*dy.shape[:-1], K), dy.dtype),
        ((N, K), tensors[0].dtype),
        (lora_A.shape, lora_A.dtype),
        (lora_B.shape, lora_B.dtype),
        ((N,), magnitude_dtype),
        ((N,), bias_dtype),
    )
    return fake_gradients(dy, full, needs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, tensors, lora_A, lora_B, magnitude, bias, seed, _, sizes, scaling, dropout_p, path, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, lora_A, lora_B, seed, *output[1:], *tensors)
    ctx.numbers = (list(sizes), scaling, dropout_p, path)
    ctx.dtypes = (magnitude.dtype, None if bias is None else bias.dtype)


def _operator_autograd(ctx: Any, dy: torch.Tensor | None, *_: torch.Tensor | None) -> tuple[Any, ...]:
    refuse_double_backward("dora_linear")
    x, lora_A, lora_B, seed, s, mask, u, c, inverse, *tensors = ctx.saved_tensors
    frozen: list[Any] = [None] * len(tensors)
    if dy is None:
        return None, frozen, *(None,) * 11
    needs_x, needs_tensors, needs_a, needs_b, needs_m, needs_bias = ctx.needs_input_grad[:6]
    dense = len(ctx.numbers[0]) == len(DENSE)
    needs = [needs_x, dense and any(needs_tensors), needs_a, needs_b, needs_m, needs_bias]
    saved = (lora_A, lora_B, s, mask, seed, u, c, inverse)
    grads = _operator_backward(dy, x, tensors, *saved, *ctx.numbers, needs, *ctx.dtypes)
    dx, dw, da, db, dm, dbias = (g if need else None for g, need in zip(grads, needs, strict=True))
    return dx, frozen if dw is None else [dw], da, db, dm, dbias, *(None,) * 7


_operator.register_autograd(_operator_autograd, setup_context=_setup_context)
