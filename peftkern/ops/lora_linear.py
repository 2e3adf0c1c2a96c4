"""`lora_linear`: a frozen linear layer and its low-rank adapter as one differentiable operation.

The public function checks, draws a dropout seed, asks the plan once, and hands the path on, so that backward takes the
same one. Two doors lead to the same forward and backward: an autograd function in plain eager mode, which costs half
the dispatch, and a `torch.library` operator wherever something looks at operators (torch.compile, fake tensors,
selective checkpointing).
"""

from __future__ import annotations

from typing import Any

import torch

from peftkern.backend import backend_in_force, device_info
from peftkern.ops import _lora_linear_fp32, _lora_linear_torch
from peftkern.ops._common import (
    PLAIN_PATHS,
    Later,
    adapters_fit,
    apply_in_two,
    ask,
    autocast_dtype,
    calls_are_changed,
    check_adapters,
    dropout_in_force,
    dropout_seed,
    fake_gradients,
    in_dtype,
    kept_s,
    needs_operator,
    none_if_empty,
    number,
    refuse_double_backward,
    taken_s,
    unflattened,
    without_autocast,
)
from peftkern.ops._kept import keep, kept
from peftkern.ops._rank_rows import fake_s
from peftkern.ops.plan import Plan, plan_lora_linear
from peftkern.weights import Weight

Needs = tuple[bool, bool, bool, bool, bool]  # x, weight, lora_A, lora_B, bias


def lora_linear(
    x: torch.Tensor,
    weight: Weight,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """`y = x W^T + bias + scaling * dropout(x) A^T B^T` (LoRA, Hu et al. 2021, arXiv:2106.09685).

    Gradients flow to whichever of x, weight, lora_A, lora_B and bias require them; only those are computed. Kept for
    backward: x by reference, S = scaling * dropout(x) A^T [M, R], and a seed (kernels) or a mask of one byte an element
    (plain PyTorch). Under autocast, x, weight and bias are cast to its dtype. Double backward is not supported.

    Args:
        x: [..., in_features], float32, float16 or bfloat16 (float64 on the plain path); any strides.
        weight: [out_features, in_features] in x's dtype; any strides, so a transposed view will do. Or a `Weight4bit`
            or `Weight8bit`: decoded to x's dtype for each product, never kept dense, and frozen.
        lora_A: [r, in_features], in x's dtype or float32 (master weights, rounded to x's dtype where they are used, but
            for a 16-bit x of few rows on the plain path).
        lora_B: [out_features, r], likewise.
        scaling: multiplies the adapter's output, lora_alpha / r in PEFT's terms; not NaN.
        bias: [out_features] or None.
        dropout_p: probability of dropping an element of x on its way to the adapter, in [0, 1).
        training: dropout applies only if true.
        seed: int64 tensor of one element on x's device that fixes the dropout mask; drawn from torch's generator of
            that device if None.

    Returns:
        [..., out_features] in x's dtype (autocast's under autocast).

    Raises:
        TypeError: an argument's type or dtype is not one of the above.
        ValueError: shapes, devices or a number do not fit.
        RuntimeError: `use_backend("triton")` is in force and Triton kernels cannot run there.
    """
    if type(scaling) is not float or scaling != scaling:
        scaling = number("lora_linear: scaling", scaling)
    if not isinstance(weight, torch.Tensor):
        from peftkern.ops.lora_linear_quantized import lora_linear_quantized

        p = dropout_in_force(dropout_p, training)
        return lora_linear_quantized(x, weight, lora_A, lora_B, scaling, bias, dropout_p=p, seed=seed)
    # In the common case, told by a few comparisons, nothing more is to be checked or converted.
    common = adapters_fit(x, weight, lora_A, lora_B, bias) and not calls_are_changed()
    if not common:
        cast = autocast_dtype(x)
        if cast is not None:
            x = x.to(cast)
        if not adapters_fit(x, weight, lora_A, lora_B, bias):
            check_adapters("lora_linear", x, weight, lora_A, lora_B, bias, mixed=cast is not None)
    if type(dropout_p) is not float or dropout_p != 0.0:
        dropout_p = dropout_in_force(dropout_p, training)
    seed = None if dropout_p == 0.0 else dropout_seed(seed, x.device)
    path = plan_for(x, weight, lora_A.shape[0], backend_in_force()).path
    if not common and needs_operator(x, weight, lora_A, lora_B):
        return _operator(x, weight, lora_A, lora_B, bias, seed, scaling, dropout_p, path)[0]
    learns = torch.is_grad_enabled()
    base_learns = learns and (weight.requires_grad or (bias is not None and bias.requires_grad))
    if common and path == "torch" and seed is None and not base_learns:
        return multiply(x, weight, lora_A, lora_B, bias, scaling)
    if base_learns or (learns and (x.requires_grad or lora_A.requires_grad or lora_B.requires_grad)):
        return apply_in_two(_LoraLinear, lora_A, x, weight, lora_A, lora_B, bias, seed, scaling, dropout_p, path)
    return _forward(x, weight, lora_A, lora_B, bias, seed, scaling, dropout_p, path)[0]


def multiply(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    bias: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """`lora_linear` on the plain path of operands that fit as they are, without dropout, weight and bias frozen."""
    if torch.is_grad_enabled() and (x.requires_grad or lora_A.requires_grad or lora_B.requires_grad):
        return apply_in_two(_Products, lora_A, x, weight, lora_A, lora_B, bias, scaling)
    return _multiplied(x, weight, lora_A, lora_B, bias, scaling, None)[0]


def _multiplied(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    bias: torch.Tensor | None,
    scaling: float,
    later: Later,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y [..., N] and S [M, R] of `multiply`."""
    flat = x.dim() == 2
    rows = x if flat else x.reshape(-1, x.shape[-1])
    if x.dtype.itemsize == 2 or lora_A.dtype is not x.dtype:
        lora_A, lora_B = _lora_linear_torch.adapters_to_multiply(rows, lora_A, lora_B)
    y, s, _ = _lora_linear_torch.forward(rows, weight, lora_A, lora_B, scaling, bias, 0.0, None, later)
    return (y if flat else unflattened(y, x.shape[:-1])), s


def plan_for(x: torch.Tensor, weight: torch.Tensor, rank: int, backend: str) -> Plan:
    """The plan for x [..., K] and weight [N, K]."""
    N, K = weight.shape
    aligned = True
    if not x.is_cpu:
        size = x.element_size()
        rows = (x.stride(-2) if x.dim() > 1 else K, max(weight.stride()))
        aligned = all(stride * size % 16 == 0 for stride in rows)
    return ask(plan_lora_linear, x.numel() // K, N, K, rank, x.dtype, device_info(x.device), aligned, backend)


@without_autocast
def _forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    scaling: float,
    dropout_p: float,
    path: str,
    later: Later = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """y [..., N], S [M, R], and a mask [M, K] on the plain path with dropout. `later`: see `apply_in_two`."""
    flat = x.dim() == 2
    rows = x if flat else x.reshape(-1, x.shape[-1])
    dtype = x.dtype
    if weight.dtype != dtype:
        weight = weight.to(dtype)
    if bias is not None and bias.dtype != dtype:
        bias = bias.to(dtype)
    mask = None
    if path == "torch":
        lora_A, lora_B = _lora_linear_torch.adapters_to_multiply(rows, lora_A, lora_B)
        y, s, mask = _lora_linear_torch.forward(rows, weight, lora_A, lora_B, scaling, bias, dropout_p, seed, later)
    elif path == "torch_fp32":
        y, s, mask = _lora_linear_fp32.forward(rows, weight, lora_A, lora_B, scaling, bias, dropout_p, seed)
    else:
        from peftkern.ops import _lora_linear_triton as kernels

        dropout, arch = kernels.dropout(seed, dropout_p), device_info(x.device).arch
        y, s = kernels.forward(rows, weight, lora_A, lora_B, scaling, bias, dropout, path, arch, later)
    return (y if flat else unflattened(y, x.shape[:-1])), s, mask


@without_autocast
def _backward(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    s: torch.Tensor | None,
    mask: torch.Tensor | None,
    seed: torch.Tensor | None,
    scaling: float,
    dropout_p: float,
    path: str,
    needs: Needs,
    bias_dtype: torch.dtype | None,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of (x [..., K], weight, lora_A, lora_B, bias), None where `needs` does not ask."""
    needs_x, needs_w, needs_a, needs_b, needs_bias = needs
    flat = dy.dim() == 2
    grad = dy if flat else dy.reshape(-1, dy.shape[-1])
    rows = x if x is None or flat else x.reshape(-1, x.shape[-1])
    dtype = dy.dtype
    base = weight if weight.dtype == dtype else weight.to(dtype)
    wanted = (needs_x, needs_a, needs_b)
    if path == "torch":
        a, b = _lora_linear_torch.adapters_to_multiply(grad, lora_A, lora_B)
        dx, da, db = _lora_linear_torch.backward(grad, rows, base, a, b, s, mask, scaling, dropout_p, wanted)
    elif path == "torch_fp32":
        dx, da, db = _lora_linear_fp32.backward(grad, rows, base, lora_A, lora_B, s, mask, scaling, dropout_p, wanted)
    else:
        from peftkern.ops import _lora_linear_triton as kernels

        dropout, arch = kernels.dropout(seed, dropout_p), device_info(dy.device).arch
        dx, da, db = kernels.backward(grad, rows, base, lora_A, lora_B, s, scaling, dropout, path, arch, wanted)
    da, db = in_dtype(da, lora_A.dtype), in_dtype(db, lora_B.dtype)
    if dx is not None and not flat:
        dx = dx.view(*dy.shape[:-1], dx.shape[1])
    dw = (grad.t() @ rows).to(weight.dtype) if needs_w and rows is not None else None
    dbias = grad.sum(0, dtype=torch.float32 if dtype.itemsize == 2 else dtype).to(bias_dtype) if needs_bias else None
    return dx, dw, da, db, dbias


class _LoraLinear(torch.autograd.Function):
    """The eager door."""

    @staticmethod
    def forward(ctx: Any, x, weight, lora_A, lora_B, bias, seed, scaling, dropout_p, path, later):
        y, s, mask = _forward(x, weight, lora_A, lora_B, bias, seed, scaling, dropout_p, path, later)
        needs: Needs = ctx.needs_input_grad[:5]
        _, needs_w, needs_a, needs_b, _ = needs
        own_s = kept_s(s, path) if needs_b else None
        own_x, own_seed = x if needs_a or needs_w else None, seed if mask is None else None
        keep(ctx, 4, own_x, own_s, mask, own_seed, weight, lora_A, lora_B)
        ctx.numbers = (scaling, dropout_p, path, needs, None if bias is None else bias.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, dy):
        refuse_double_backward("lora_linear")
        x, s, mask, seed, weight, lora_A, lora_B = kept(ctx, 7)
        saved = (x, weight, lora_A, lora_B, taken_s(s), mask, seed)
        return (*_backward(dy, *saved, *ctx.numbers), None, None, None, None, None)


class _Products(torch.autograd.Function):
    """The eager door where the plain path only multiplies: nothing to drop, weight and bias frozen and in x's dtype.
    Where tensors are small, what `_LoraLinear` asks about these costs as much as a product."""

    @staticmethod
    def forward(ctx: Any, x, weight, lora_A, lora_B, bias, scaling, later):
        y, s = _multiplied(x, weight, lora_A, lora_B, bias, scaling, later)
        _, _, needs_a, needs_b, _, _, _ = ctx.needs_input_grad
        # S first, where `_LoraLinear` has it last: that tells what `kept_s` tells, and costs nothing.
        keep(ctx, 2, s if needs_b else None, x if needs_a else None, weight, lora_A, lora_B)
        ctx.scaling = scaling
        return y

    @staticmethod
    @without_autocast
    def backward(ctx: Any, dy):
        refuse_double_backward("lora_linear")
        s, x, weight, lora_A, lora_B = kept(ctx, 5)
        needs_x, _, needs_a, needs_b, _, _, _ = ctx.needs_input_grad
        flat = dy.dim() == 2
        grad = dy if flat else dy.reshape(-1, dy.shape[-1])
        rows = x if x is None or flat else x.reshape(-1, x.shape[-1])
        a, b = lora_A, lora_B
        converted = dy.dtype.itemsize == 2 or a.dtype is not dy.dtype
        if converted:
            a, b = _lora_linear_torch.adapters_to_multiply(grad, a, b)
        wanted = (needs_x, needs_a, needs_b)
        dx, da, db = _lora_linear_torch.backward(grad, rows, weight, a, b, s, None, ctx.scaling, 0.0, wanted)
        if converted:
            da, db = in_dtype(da, lora_A.dtype), in_dtype(db, lora_B.dtype)
        if dx is not None and not flat:
            dx = dx.view(*dy.shape[:-1], dx.shape[1])
        return dx, None, da, db, None, None, None


# -- the operator -------------------------------------------------------------------------------------------------


@torch.library.custom_op("peftkern::lora_linear", mutates_args=())
def _operator(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    scaling: float,
    dropout_p: float,
    path: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, S, mask); mask is empty unless the plain path drew one."""
    y, s, mask = _forward(x, weight, lora_A, lora_B, bias, seed, scaling, dropout_p, path)
    s = s.to(x.dtype)  # as the fake says; fp32 where masters met few rows
    return y, s, x.new_empty(0, dtype=torch.bool) if mask is None else mask


@_operator.register_fake
def _(x, weight, lora_A, lora_B, bias, seed, scaling, dropout_p, path):
    M = x.numel() // x.shape[-1]
    mask_shape = (M, x.shape[-1]) if seed is not None and path in PLAIN_PATHS else (0,)
    return (
        x.new_empty(*x.shape[:-1], weight.shape[0]),
        fake_s(x, M, lora_A.shape[0], path),
        x.new_empty(mask_shape, dtype=torch.bool),
    )


@torch.library.custom_op("peftkern::lora_linear_backward", mutates_args=())
def _operator_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    s: torch.Tensor,
    mask: torch.Tensor,
    seed: torch.Tensor | None,
    scaling: float,
    dropout_p: float,
    path: str,
    needs: list[bool],
    bias_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of (x, weight, lora_A, lora_B, bias), empty where not asked for."""
    wanted: Any = tuple(needs)
    grads = _backward(
        dy, x, weight, lora_A, lora_B, s, none_if_empty(mask), seed, scaling, dropout_p, path, wanted, bias_dtype
    )
    dx, dw, da, db, dbias = (dy.new_empty(0) if g is None else g for g in grads)
    return dx, dw, da, db, dbias


@_operator_backward.register_fake
def _(dy, x, weight, lora_A, lora_B, s, mask, seed, scaling, dropout_p, path, needs, bias_dtype):
    N, K = weight.shape
    full = (
        ((*dy.shape[:-1], K), dy.dtype),
        ((N, K), weight.dtype),
        (lora_A.shape, lora_A.dtype),
        (lora_B.shape, lora_B.dtype),
        ((N,), bias_dtype),
    )
    return fake_gradients(dy, full, needs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, weight, lora_A, lora_B, bias, seed, scaling, dropout_p, path = inputs
    _, s, mask = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, lora_A, lora_B, s, mask, seed)
    ctx.numbers = (scaling, dropout_p, path)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _operator_autograd(ctx: Any, dy: torch.Tensor | None, *_: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:5])
    refuse_double_backward("lora_linear")
    if dy is None:
        return (None,) * 9
    grads = _operator_backward(dy, *ctx.saved_tensors, *ctx.numbers, needs, ctx.bias_dtype)
    return (*(g if need else None for g, need in zip(grads, needs, strict=True)), None, None, None, None)


_operator.register_autograd(_operator_autograd, setup_context=_setup_context)
