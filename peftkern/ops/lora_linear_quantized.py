"""`lora_linear` over a quantized weight: the same operation, its base product read from 4 or 8 bits.

Kept for backward is what a dense weight's call keeps (x by reference, S, what dropout needs); the weight itself is kept
as it is stored, and backward decodes it again. One operator serves all formats: a weight crosses its boundary as a list
of tensors and a list of numbers (`flatten`), from which it is put together again.

Paths: "fused_4bit" and "decode_4bit" decode inside the kernel; "dequantize:PATH" writes the weight out dense into one
buffer, in blocks where it is large, and is the dense operation on PATH from there on: kernels by a list of launches in
which those that write it stand, plain PyTorch by that operation itself, block by block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from peftkern.backend import backend_in_force, device_info
from peftkern.ops import _lora_linear_torch as plain
from peftkern.ops._common import (
    Later,
    adapters_fit,
    apply_in_two,
    ask,
    autocast_dtype,
    check_adapters,
    dropout_seed,
    fake_gradients,
    is_plain,
    kept_s,
    needs_operator,
    none_if_empty,
    refuse_double_backward,
    taken_s,
    unflattened,
    without_autocast,
)
from peftkern.ops._dense_blocks import Quantized, blocks_of, dense_blocks
from peftkern.ops._kept import keep, kept
from peftkern.ops._rank_rows import fake_s
from peftkern.ops.lora_linear import _backward as dense_backward
from peftkern.ops.lora_linear import _forward as dense_forward
from peftkern.ops.plan import Plan, plan_lora_linear_quantized
from peftkern.weights import DENSE_DTYPES, Weight4bit, Weight8bit

Needs = tuple[bool, bool, bool, bool]  # x, lora_A, lora_B, bias


def flatten(weight: Quantized) -> tuple[list[torch.Tensor], list[int]]:
    """The weight's tensors, and its numbers: [N, K, blocksize]; a blocksize of 0 is the 8-bit format."""
    numbers = [*weight.shape, weight.blocksize if isinstance(weight, Weight4bit) else 0]
    return [t for t in weight.tensors() if t is not None], numbers


def unflatten(tensors: Sequence[torch.Tensor], numbers: Sequence[int]) -> Quantized:
    """The inverse of `flatten`; its `dtype` and `quant_type`, which no arithmetic reads, are not kept."""
    N, K, blocksize = numbers
    if blocksize == 0:
        return Weight8bit(tensors[0], tensors[1])
    nested: Any = dict(zip(("nested_absmax", "nested_code", "offset"), tensors[3:], strict=False))
    return Weight4bit(tensors[0], tensors[1], tensors[2], torch.Size((N, K)), blocksize, **nested)


def lora_linear_quantized(
    x: torch.Tensor,
    weight: Quantized,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """`lora_linear` for a weight that is not a tensor; see there. `dropout_p` is 0 where nothing is to be dropped."""
    cast = autocast_dtype(x)
    if cast is not None and x.dtype is not cast:
        x = x.to(cast)
    check_quantized("lora_linear", x, weight, lora_A, lora_B, bias, mixed=cast is not None)
    seed = None if dropout_p == 0.0 else dropout_seed(seed, x.device)
    path = plan_for(x, weight, lora_A.shape[0], backend_in_force()).path
    if needs_operator(x, lora_A, lora_B, *(t for t in weight.tensors() if t is not None)):
        tensors, numbers = flatten(weight)
        return _operator(x, tensors, lora_A, lora_B, bias, seed, numbers, scaling, dropout_p, path)[0]
    wanted = (x, lora_A, lora_B) if bias is None else (x, lora_A, lora_B, bias)
    if torch.is_grad_enabled() and any(t.requires_grad for t in wanted):
        rest = (weight, scaling, dropout_p, path)
        return apply_in_two(_LoraLinearQuantized, lora_A, x, lora_A, lora_B, bias, seed, rest)
    return _forward(x, weight, lora_A, lora_B, bias, seed, scaling, dropout_p, path)[0]


def check_quantized(
    operation: str,
    x: torch.Tensor,
    weight: Quantized,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    mixed: bool,
) -> None:
    """Refuse what does not fit: the checks of a dense weight of the same shape and device, in x's dtype."""
    if not isinstance(weight, Quantized):
        raise TypeError(f"weight: expected a tensor, a Weight4bit or a Weight8bit, got {type(weight).__name__}")
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{operation}: x: expected a tensor, got {type(x).__name__}")
    if x.dtype not in DENSE_DTYPES:
        raise TypeError(
            f"{operation}: x: expected float32, float16 or bfloat16 beside a quantized weight, got {x.dtype}"
        )
    if not adapters_fit(x, weight, lora_A, lora_B, bias):
        stand_in = x.new_empty((), device=weight.device).expand(weight.shape)  # a shape, no memory
        check_adapters(operation, x, stand_in, lora_A, lora_B, bias, mixed=mixed)


def plan_for(x: torch.Tensor, weight: Quantized, rank: int, backend: str) -> Plan:
    """The plan for x [..., K] and a quantized weight [N, K]."""
    N, K = weight.shape
    aligned = x.is_cpu or x.dim() < 2 or x.stride(-2) * x.element_size() % 16 == 0
    blocksize = weight.blocksize if isinstance(weight, Weight4bit) else 0
    sizes = (x.numel() // K, N, K, rank, blocksize)
    return ask(plan_lora_linear_quantized, *sizes, x.dtype, device_info(x.device), aligned, backend)


@without_autocast
def _forward(
    x: torch.Tensor,
    weight: Quantized,
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
    if not is_plain(path):
        return _forward_by_launches(x, weight, lora_A, lora_B, bias, seed, scaling, dropout_p, path, later)
    dense_path = path.partition(":")[2]
    if dense_path == "torch":
        return _forward_by_products(x, weight, lora_A, lora_B, bias, seed, scaling, dropout_p, later)
    y: Any = None
    s: Any = None
    for rows, dense in dense_blocks(weight, x.dtype, dense_path):
        part_bias = None if bias is None else bias[rows]
        part, s, mask = dense_forward(x, dense, lora_A, lora_B[rows], part_bias, seed, scaling, dropout_p, dense_path)
        if dense.shape[0] == weight.shape[0]:
            return part, s, mask
        y = part.new_empty(*part.shape[:-1], weight.shape[0]) if y is None else y
        y[..., rows] = part
    return y, s, mask  # each block made the same S and mask


def _forward_by_products(
    x: torch.Tensor,
    weight: Quantized,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    scaling: float,
    dropout_p: float,
    later: Later,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """`_forward` by torch's products: S and the mask once, then y by blocks of W; that is left to `later`, if given."""
    flat = plain.dense_rows(x.reshape(-1, x.shape[-1]))
    lora_A, lora_B = plain.adapters_to_multiply(flat, lora_A, lora_B)
    s, mask, alpha = plain.shrink(flat, lora_A, scaling, dropout_p, seed)
    bias = bias if bias is None else bias.to(x.dtype)

    def columns(rows: slice, dense: torch.Tensor) -> torch.Tensor:
        return plain.product(flat, dense, s, lora_B[rows], None if bias is None else bias[rows], alpha)

    def fill() -> None:
        for rows, dense in dense_blocks(weight, x.dtype, "torch"):
            y[:, rows] = columns(rows, dense)

    if later is None and len(blocks_of(weight, x.dtype)) == 1:
        ((rows, dense),) = dense_blocks(weight, x.dtype, "torch")
        y = columns(rows, dense)
    else:
        y = flat.new_empty(flat.shape[0], weight.shape[0])
        fill() if later is None else later.append(fill)
    return y if x.dim() == 2 else unflattened(y, x.shape[:-1]), s, mask


def _forward_by_launches(
    x: torch.Tensor,
    weight: Quantized,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    scaling: float,
    dropout_p: float,
    path: str,
    later: Later,
) -> tuple[torch.Tensor, torch.Tensor, None]:
    """`_forward` by launches that take the weight as it is stored."""
    from peftkern.ops import _lora_linear_triton as kernels

    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    dropout, arch = kernels.dropout(seed, dropout_p), device_info(x.device).arch
    y, s = kernels.forward(rows, weight, lora_A, lora_B, scaling, bias, dropout, path, arch, later)
    return unflattened(y, x.shape[:-1]), s, None


def _backward_by_launches(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    weight: Quantized,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    s: torch.Tensor | None,
    seed: torch.Tensor | None,
    scaling: float,
    dropout_p: float,
    path: str,
    needs: Needs,
    bias_dtype: torch.dtype | None,
) -> tuple[torch.Tensor | None, ...]:
    """`_backward` by launches that take the weight as it is stored."""
    from peftkern.ops import _lora_linear_triton as kernels

    N, K = weight.shape
    grad = dy.reshape(-1, N)
    rows = None if x is None else x.reshape(-1, K)
    dropout, arch = kernels.dropout(seed, dropout_p), device_info(dy.device).arch
    dx, da, db = kernels.backward(grad, rows, weight, lora_A, lora_B, s, scaling, dropout, path, arch, needs[:3])
    dbias = grad.sum(0, dtype=torch.float32).to(bias_dtype) if needs[3] else None
    return None if dx is None else dx.view(*dy.shape[:-1], K), da, db, dbias


@without_autocast
def _backward(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    weight: Quantized,
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
    """Gradients of (x [..., K], lora_A, lora_B, bias), None where `needs` does not ask."""
    needs_x, needs_a, needs_b, needs_bias = needs
    wanted = (needs_x, False, needs_a, needs_b, needs_bias)
    numbers = (scaling, dropout_p)

    def backward(dy, dense, lora_B, path):
        saved = (dy, x, dense, lora_A, lora_B, s, mask, seed, *numbers, path, wanted, bias_dtype)
        dx, _, da, db, dbias = dense_backward(*saved)
        return dx, da, db, dbias

    if not is_plain(path):
        return _backward_by_launches(dy, x, weight, lora_A, lora_B, s, seed, *numbers, path, needs, bias_dtype)
    dense_path = path.partition(":")[2]
    if not needs_x:  # no gradient here needs the weight: a stand-in of its shape will do
        return backward(dy, dy.new_empty(()).expand(weight.shape), lora_B, dense_path)
    sums: list[Any] = []
    for rows, dense in dense_blocks(weight, dy.dtype, dense_path):
        if dense.shape[0] == weight.shape[0]:
            return backward(dy, dense, lora_B, dense_path)
        dx, da, db, dbias = backward(dy[..., rows], dense, lora_B[rows], dense_path)
        if not sums:
            sums = [dx, da, [db], [dbias]]
            continue
        sums[0] += dx
        if da is not None:
            sums[1] += da
        sums[2].append(db)
        sums[3].append(dbias)
    dx, da, dbs, dbiases = sums
    return dx, da, torch.cat(dbs) if needs_b else None, torch.cat(dbiases) if needs_bias else None


class _LoraLinearQuantized(torch.autograd.Function):
    """The eager door."""

    @staticmethod
    def forward(ctx: Any, x, lora_A, lora_B, bias, seed, rest, later):
        weight, scaling, dropout_p, path = rest
        y, s, mask = _forward(x, weight, lora_A, lora_B, bias, seed, scaling, dropout_p, path, later)
        needs: Needs = ctx.needs_input_grad[:4]
        _, needs_a, needs_b, _ = needs
        own_s = kept_s(s, path) if needs_b else None
        keep(ctx, 4, x if needs_a else None, own_s, mask, seed if mask is None else None, lora_A, lora_B)
        ctx.weight = weight  # frozen, no activation, and here anyway
        ctx.numbers = (scaling, dropout_p, path, needs, None if bias is None else bias.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, dy):
        refuse_double_backward("lora_linear")
        x, s, mask, seed, lora_A, lora_B = kept(ctx, 6)
        saved = (x, ctx.weight, lora_A, lora_B, taken_s(s), mask, seed)
        return (*_backward(dy, *saved, *ctx.numbers), None, None, None)


# -- the operator -------------------------------------------------------------------------------------------------


@torch.library.custom_op("peftkern::lora_linear_quantized", mutates_args=())
def _operator(
    x: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    numbers: Sequence[int],
    scaling: float,
    dropout_p: float,
    path: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, S, mask); mask is empty unless the plain path drew one."""
    weight = unflatten(tensors, numbers)
    y, s, mask = _forward(x, weight, lora_A, lora_B, bias, seed, scaling, dropout_p, path)
    return y, s, x.new_empty(0, dtype=torch.bool) if mask is None else mask


@_operator.register_fake
def _(x, tensors, lora_A, lora_B, bias, seed, numbers, scaling, dropout_p, path):
    N, K, _ = numbers
    M = x.numel() // K
    mask_shape = (M, K) if seed is not None and is_plain(path) else (0,)
    return (
        x.new_empty(*x.shape[:-1], N),
        fake_s(x, M, lora_A.shape[0], path),
        x.new_empty(mask_shape, dtype=torch.bool),
    )


@torch.library.custom_op("peftkern::lora_linear_quantized_backward", mutates_args=())
def _operator_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    s: torch.Tensor,
    mask: torch.Tensor,
    seed: torch.Tensor | None,
    numbers: Sequence[int],
    scaling: float,
    dropout_p: float,
    path: str,
    needs: list[bool],
    bias_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of (x, lora_A, lora_B, bias), empty where not asked for."""
    weight = unflatten(tensors, numbers)
    rest: Any = (s, none_if_empty(mask), seed, scaling, dropout_p, path, tuple(needs), bias_dtype)
    grads = _backward(dy, x, weight, lora_A, lora_B, *rest)
    dx, da, db, dbias = (dy.new_empty(0) if g is None else g for g in grads)
    return dx, da, db, dbias


@_operator_backward.register_fake
def _(dy, x, tensors, lora_A, lora_B, s, mask, seed, numbers, scaling, dropout_p, path, needs, bias_dtype):
    N, K, _ = numbers
    full = (
        ((*dy.shape[:-1], K), dy.dtype),
        (lora_A.shape, lora_A.dtype),
        (lora_B.shape, lora_B.dtype),
        ((N,), bias_dtype),
    )
    return fake_gradients(dy, full, needs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, tensors, lora_A, lora_B, bias, seed, numbers, scaling, dropout_p, path = inputs
    _, s, mask = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, lora_A, lora_B, s, mask, seed, *tensors)
    ctx.numbers = (list(numbers), scaling, dropout_p, path)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _operator_autograd(ctx: Any, dy: torch.Tensor | None, *_: torch.Tensor | None) -> tuple[Any, ...]:
    needs_x, _, needs_a, needs_b, needs_bias, *_ = ctx.needs_input_grad
    needs = [needs_x, needs_a, needs_b, needs_bias]
    refuse_double_backward("lora_linear")
    x, lora_A, lora_B, s, mask, seed, *tensors = ctx.saved_tensors
    if dy is None:
        return (None, [None] * len(tensors), *(None,) * 8)
    grads = _operator_backward(dy, x, tensors, lora_A, lora_B, s, mask, seed, *ctx.numbers, needs, ctx.bias_dtype)
    dx, da, db, dbias = (g if need else None for g, need in zip(grads, needs, strict=True))
    return (dx, [None] * len(tensors), da, db, dbias, *(None,) * 5)


_operator.register_autograd(_operator_autograd, setup_context=_setup_context)
