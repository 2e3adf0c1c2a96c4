"""`ia3_linear` in plain PyTorch: the default on a CPU, and any device's path where kernels cannot run.

    output scaling      z = x W^T + b,  y = z * l;    g = dy * l,  dX = g W,  dl = sum over rows of dy * z
    feed-forward        u = x * l,  y = u W^T + b;    h = dy W,  dX = h * l,  dl = sum over rows of x * h

Products with l are taken in fp32 (float64 for that) and rounded once; column sums run in a fixed order, in blocks of
rows, so that nothing widened is as large as x. On the path "torch_fp32" (16-bit tensors on a CPU without 16-bit matrix
instructions) the matrix products are widened block by block too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.functional import linear

from peftkern.ops._lora_linear_torch import dense_rows

BLOCK_ROWS = 1024
Kept = Any  # a tensor that forward kept, or None where no gradient asks for it


def _row_blocks(M: int) -> Iterator[slice]:
    return (slice(start, min(start + BLOCK_ROWS, M)) for start in range(0, M, BLOCK_ROWS))


def slots_of(ids: torch.Tensor, slots: int) -> torch.Tensor:
    """int64 ids in [0, slots]; what is no slot becomes `slots`."""
    ids = ids.long()
    return torch.where((ids >= 0) & (ids < slots), ids, slots)


def scaled(a: torch.Tensor, scale: torch.Tensor, ids: torch.Tensor | None) -> torch.Tensor:
    """round(a * scale) [M, C] for scale [C]; with ids [M] and scale [slots, C], each row's own (1 for no slot)."""
    if ids is None and scale.dtype is a.dtype:
        return a * scale
    out = torch.empty_like(a, memory_format=torch.contiguous_format)
    if ids is None:
        return torch.mul(a, scale, out=out)
    table = torch.cat([scale, scale.new_ones(1, scale.shape[1])])
    slot = slots_of(ids, scale.shape[0])
    for rows in _row_blocks(a.shape[0]):
        torch.mul(a[rows], table[slot[rows]], out=out[rows])
    return out


def column_sums(a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor, ids: torch.Tensor | None) -> torch.Tensor:
    """The sum over rows of a * b [M, C] in scale's shape and dtype: of all rows, or of each slot's."""
    wide = torch.float64 if a.dtype == torch.float64 else torch.float32
    if ids is None and a.shape[0] <= BLOCK_ROWS:
        sums = (a.to(wide) * b).sum(0)
        return sums if scale.dtype is wide else sums.to(scale.dtype)
    if ids is None:
        total = a.new_zeros(scale.shape, dtype=wide)
        for rows in _row_blocks(a.shape[0]):
            total += (a[rows].to(wide) * b[rows]).sum(0, dtype=wide)
        return total.to(scale.dtype)
    slots = scale.shape[0]
    slot = slots_of(ids, slots)
    total = a.new_zeros(slots + 1, scale.shape[1], dtype=wide)
    for rows in _row_blocks(a.shape[0]):
        products = a[rows].to(wide) * b[rows]
        if a.is_cpu:
            total.index_add_(0, slot[rows], products)
        else:  # whose index_add_ has no fixed order
            for s in range(slots):
                total[s] += torch.where((slot[rows] == s)[:, None], products, 0).sum(0)
    return total[:slots].to(scale.dtype)


@torch.autocast("cpu", enabled=False)  # which would round the widened blocks again
def _linear_fp32(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    y = x.new_empty(x.shape[0], weight.shape[0])
    wide, wide_bias = weight.float(), None if bias is None else bias.float()
    for rows in _row_blocks(x.shape[0]):
        y[rows] = linear(x[rows].float(), wide, wide_bias)
    return y


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, path: str) -> torch.Tensor:
    """`x weight^T + bias` [M, N], a new tensor."""
    if path == "torch_fp32":
        return _linear_fp32(x, weight, bias)
    return linear(dense_rows(x), weight, bias)


def product_back(dy: torch.Tensor, weight: torch.Tensor, path: str) -> torch.Tensor:
    """`dy weight` [M, K], a new tensor."""
    return _linear_fp32(dy, weight.t(), None) if path == "torch_fp32" else dense_rows(dy).mm(weight)


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    ids: torch.Tensor | None,
    is_feedforward: bool,
    path: str,
    keep_z: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x [M, K], weight and bias in one dtype -> y [M, N], and z [M, N] if it is to be kept."""
    if is_feedforward:
        return product(scaled(x, scale, ids), weight, bias, path), None
    z = product(x, weight, bias, path)
    return scaled(z, scale, ids), z if keep_z else None


def backward(
    dy: torch.Tensor,
    x: Kept,
    weight: torch.Tensor,
    scale: torch.Tensor,
    z: Kept,
    ids: torch.Tensor | None,
    is_feedforward: bool,
    path: str,
    needs: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """dy [M, N] -> (dX [M, K], dl like scale, g [M, N]: the gradient that reaches the base layer's output).

    Each only if `needs` asks for it; g is dy itself for a feed-forward layer.
    """
    needs_x, needs_scale, needs_g = needs
    dx = dscale = g = None
    if is_feedforward:
        g = dy
        if needs_x or needs_scale:
            h = product_back(dy, weight, path)
            dscale = column_sums(h, x, scale, ids) if needs_scale else None
            dx = scaled(h, scale, ids) if needs_x else None
        return dx, dscale, g if needs_g else None
    if needs_scale:
        dscale = column_sums(dy, z, scale, ids)
    if needs_x or needs_g:
        g = scaled(dy, scale, ids)
        dx = product_back(g, weight, path) if needs_x else None
    return dx, dscale, g
