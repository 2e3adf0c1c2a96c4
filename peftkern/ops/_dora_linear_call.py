"""`dora_linear` forward and backward, whatever the weight and the path: `lora_linear`'s own, on x' and with c around.

    u = x' W^T + S B^T,  S = scaling * x' A^T          `lora_linear` of x', without a bias
    y = c * u + (x - x') W^T + bias                    x' = x but for dropout, where the middle term falls away
    g = c * dy,  dc = sum over rows of dy * u,  dm = dc / norm
    h, dA, dB = `lora_linear`'s backward on g and x'
    dX = h, or with dropout keep / (1 - p) * h + (1 - keep / (1 - p)) * (dY W)

With dropout this is PEFT's y = x W^T + (c - 1) * (x' W^T) + c * (S B^T) + bias, with its terms in another order: u,
which dc needs, is then one of two products and not a third.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from peftkern.backend import device_info
from peftkern.ops._common import PLAIN_PATHS
from peftkern.ops._dense_blocks import dense_blocks
from peftkern.ops._dora_linear_torch import combined, dropped, factors, mixed, row_norms, wide_dtype
from peftkern.ops._ia3_linear_torch import column_sums, product, product_back, scaled
from peftkern.ops._lora_linear_torch import keep_mask
from peftkern.ops.lora_linear import _backward as lora_backward
from peftkern.ops.lora_linear import _forward as lora_forward
from peftkern.weights import Weight

Needs = tuple[bool, bool, bool, bool, bool, bool]  # x, weight, lora_A, lora_B, magnitude, bias
Kept = Any  # a tensor that forward kept, or None where no gradient asks for it


@dataclass(frozen=True, slots=True)
class Numbers:
    """What a call is made with beside tensors: `scaling`, the chance of dropping (0 for none), and the path."""

    scaling: float
    dropout_p: float
    path: str


@dataclass(frozen=True, slots=True)
class Made:
    """What forward makes: y [M, N], S [M, R], the mask [M, K] of a plain path with dropout, u [M, N] if it is to be
    kept, c = magnitude / norm and 1 / norm [N]."""

    y: torch.Tensor
    s: torch.Tensor
    mask: torch.Tensor | None
    u: torch.Tensor | None
    c: torch.Tensor
    inverse: torch.Tensor


def forward(
    x: torch.Tensor,
    weight: Weight,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    magnitude: torch.Tensor,
    bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    norm: torch.Tensor | None,
    numbers: Numbers,
    keep_u: bool,
) -> Made:
    """x [M, K]; `norm` [N] if it is known. A quantized weight is made dense in blocks of its rows, each once for its
    norms and its products, unless its path decodes it."""
    options: Any = (seed, norm, numbers, keep_u)
    if isinstance(weight, torch.Tensor):
        return _dense_forward(x, weight, lora_A, lora_B, magnitude, bias, *options)
    how, _, dense_path = numbers.path.partition(":")
    if how != "dequantize":
        return _on_kernels(x, weight, weight, lora_A, lora_B, magnitude, bias, *options)
    N, parts = weight.shape[0], []
    within = Numbers(numbers.scaling, numbers.dropout_p, dense_path)
    y: Any = None
    u: Any = None
    for rows, dense in dense_blocks(weight, x.dtype, dense_path):
        b, m, ours, known = (None if t is None else t[rows] for t in (lora_B, magnitude, bias, norm))
        made = _dense_forward(x, dense, lora_A, b, m, ours, seed, known, within, keep_u)  # type: ignore[arg-type]
        if dense.shape[0] == N:
            return made
        y = x.new_empty(x.shape[0], N) if y is None else y
        y[:, rows] = made.y
        if made.u is not None:
            u = x.new_empty(x.shape[0], N) if u is None else u
            u[:, rows] = made.u
        parts.append(made)
    c, inverse = (torch.cat([getattr(part, name) for part in parts]) for name in ("c", "inverse"))
    return Made(y, parts[0].s, parts[0].mask, u, c, inverse)  # each block made the same S and mask


def _dense_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    magnitude: torch.Tensor,
    bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    norm: torch.Tensor | None,
    numbers: Numbers,
    keep_u: bool,
) -> Made:
    # The norms are those of the weight as it is; only its product is taken in x's dtype.
    rounded = weight if weight.dtype is x.dtype else weight.to(x.dtype)
    options = (seed, norm, numbers, keep_u)
    if numbers.path not in PLAIN_PATHS:
        return _on_kernels(x, rounded, weight, lora_A, lora_B, magnitude, bias, *options)
    if norm is None:
        norm = row_norms(weight, lora_A, lora_B, numbers.scaling)
    c, inverse = factors(magnitude, norm.to(wide_dtype(x.dtype)))
    mask = rest = None
    inner = x
    if seed is not None:
        mask = keep_mask(seed, x.shape[0], x.shape[1], numbers.dropout_p)
        inner = dropped(x, mask, numbers.dropout_p)
        rest = product(x - inner, rounded, None, numbers.path)
    adapters = (lora_A, lora_B, None, None, numbers.scaling, 0.0, numbers.path)
    u, s, _ = lora_forward(inner, rounded, *adapters)
    out = rest if rest is not None else torch.empty_like(u) if keep_u else u
    return Made(combined(u, c, bias, rest, out), s, mask, u if keep_u else None, c, inverse)


def _on_kernels(
    x: torch.Tensor,
    weight: Any,
    norm_weight: Any,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    magnitude: torch.Tensor,
    bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    norm: torch.Tensor | None,
    numbers: Numbers,
    keep_u: bool,
) -> Made:
    from peftkern.ops import _dora_linear_triton as kernels

    dropout, arch = kernels.dropout(seed, numbers.dropout_p), device_info(x.device).arch
    tensors = (x, weight, norm_weight, lora_A, lora_B, magnitude, bias, norm)
    y, s, u, c, inverse = kernels.forward(*tensors, numbers.scaling, dropout, numbers.path, arch, keep_u)
    return Made(y, s, None, u, c, inverse)


def backward(
    dy: torch.Tensor,
    x: Kept,
    weight: Weight,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    s: Kept,
    mask: Kept,
    seed: Kept,
    u: Kept,
    c: Kept,
    inverse: Kept,
    numbers: Numbers,
    needs: Needs,
) -> tuple[Any, ...]:
    """dy [M, N] -> gradients of (x [M, K], weight, lora_A, lora_B, magnitude, bias), None where `needs` does not ask;
    the last two wide."""
    needs_x, needs_w, needs_a, needs_b, _, needs_bias = needs
    dbias = dy.sum(0, dtype=torch.float32 if dy.dtype.itemsize == 2 else dy.dtype) if needs_bias else None
    dm = None
    how, _, dense_path = numbers.path.partition(":")
    if isinstance(weight, torch.Tensor) or how != "dequantize":
        saved: Any = (lora_A, lora_B, s, mask, seed, u, c, inverse, numbers, needs)
        return *_products_backward(dy, x, weight, *saved), dbias
    within = Numbers(numbers.scaling, numbers.dropout_p, dense_path)
    N = weight.shape[0]
    if not needs_x:  # no gradient here needs the weight: a stand-in of its shape will do
        stand_in = dy.new_empty(()).expand(weight.shape)
        saved = (lora_A, lora_B, s, mask, seed, u, c, inverse, within, needs)
        return *_products_backward(dy, x, stand_in, *saved), dbias
    sums: list[Any] = []
    for rows, dense in dense_blocks(weight, dy.dtype, dense_path):
        vectors = [None if t is None else t[..., rows] for t in (u, c, inverse)]
        saved = (lora_A, lora_B[rows], s, mask, seed, *vectors, within, needs)
        dx, _, da, db, dm = _products_backward(dy[:, rows], x, dense, *saved)
        if dense.shape[0] == N:
            return dx, None, da, db, dm, dbias
        if not sums:
            sums = [dx, da, [db], [dm]]
            continue
        sums[0] += dx
        if da is not None:
            sums[1] += da
        sums[2].append(db)
        sums[3].append(dm)
    dx, da, dbs, dms = sums
    return dx, None, da, torch.cat(dbs) if needs_b else None, torch.cat(dms) if needs[4] else None, dbias


def _products_backward(
    dy: torch.Tensor,
    x: Kept,
    weight: Any,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    s: Kept,
    mask: Kept,
    seed: Kept,
    u: Kept,
    c: Kept,
    inverse: Kept,
    numbers: Numbers,
    needs: Needs,
) -> tuple[Any, Any, Any, Any, Any]:
    """Gradients of (x, weight, lora_A, lora_B, magnitude), of a weight that is dense or that kernels decode."""
    needs_x, needs_w, needs_a, needs_b, needs_m, _ = needs
    plain = numbers.path in PLAIN_PATHS
    rounded = weight.to(dy.dtype) if isinstance(weight, torch.Tensor) else weight
    drops = mask is not None or seed is not None
    inner = x  # x'
    if not plain:
        from peftkern.ops import _dora_linear_triton as kernels

        dropout: Any = kernels.dropout(seed, numbers.dropout_p)
        arch = device_info(dy.device).arch
    if drops and (needs_a or needs_w):
        inner = dropped(x, mask, numbers.dropout_p) if plain else kernels.dropped(x, dropout, arch)
    dx: Any = None
    dc = g = dw = da = db = None
    wanted = (needs_x, needs_a, needs_b)
    if not plain:
        makes_g = any(wanted) or needs_w
        saved = (inner, rounded, lora_A, lora_B, s, u, c, numbers.scaling, dropout, numbers.path, arch)
        dx, da, db, dc, g = kernels.backward(dy, *saved, (*wanted, needs_m), makes_g)
    else:
        if needs_m:
            dc = column_sums(dy, u, inverse, None)
        if any(wanted):
            g = scaled(dy, c, None)
            frozen = (None, None, numbers.scaling, 0.0, numbers.path, (needs_x, False, needs_a, needs_b, False), None)
            dx, _, da, db, _ = lora_backward(g, inner, rounded, lora_A, lora_B, s, *frozen)
        if drops and needs_x:
            dx = mixed(dx, product_back(dy, rounded, numbers.path), mask, numbers.dropout_p)
    if needs_w:
        g = scaled(dy, c, None) if g is None else g
        dw = g.t() @ inner
        if drops:
            dw += dy.t() @ (x - inner)
        dw = dw.to(weight.dtype)
    return dx, dw, da, db, None if dc is None else dc * inverse
