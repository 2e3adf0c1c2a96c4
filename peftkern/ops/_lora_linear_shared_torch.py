"""`lora_linear_shared` in plain PyTorch: the default on a CPU.

One product takes x to the ranks of all projections, one brings their dS back to dX and one makes all of dA, where each
projection by itself would read x or write dX again. dX is one buffer, to which every product is added in place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import linear

from peftkern.ops._base_product import add_base_backward, base
from peftkern.ops._common import Ranks, in_dtype
from peftkern.ops._lora_linear_torch import (
    FEW_ROWS,
    Kept,
    _as_number,
    apply_mask,
    dense_rows,
    gradient_of_b,
    keep_mask,
)
from peftkern.ops._projection_group import Group


def _scale(s: torch.Tensor, ranks: Ranks, scalings: Sequence[float]) -> None:
    """Multiply the columns of s [M, R] by their projection's scaling, in place."""
    if len(set(scalings)) == 1:
        s.mul_(scalings[0])
        return
    for columns, scaling in zip(ranks, scalings, strict=True):
        s[:, columns].mul_(scaling)


def _kept_scalings(group: Group, mask: Kept) -> Sequence[float]:
    """Each scaling, times 1 / (1 - p) where a mask was drawn."""
    return group.scalings if mask is None else [scaling / (1.0 - group.dropout_p) for scaling in group.scalings]


def forward(
    x: torch.Tensor,
    group: Group,
    lora_As: Sequence[torch.Tensor],
    lora_Bs: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    seed: torch.Tensor | None,
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor | None]:
    """x [M, K] -> each y [M, N], S [M, R] of all projections, and the mask [M, K] or None.

    S is (keep * x) A^T, times scaling / (1 - p) where there are more than `FEW_ROWS` rows.
    """
    mask = None
    dropped = x = dense_rows(x)
    if seed is not None:
        mask = keep_mask(seed, x.shape[0], x.shape[1], group.dropout_p)
        dropped = apply_mask(x, mask)
    scalings = _kept_scalings(group, mask)
    s = linear(dropped, _joined(lora_As, x.dtype))
    few = x.shape[0] <= FEW_ROWS
    if not few:
        _scale(s, group.columns, scalings)
    ys = []
    each = zip(group.weights, lora_Bs, biases, group.columns, scalings, strict=True)
    for weight, lora_B, bias, columns, scaling in each:
        y = base(x, weight, bias, group.dense_path)
        y.addmm_(dense_rows(s[:, columns]), in_dtype(lora_B, x.dtype).t(), alpha=scaling if few else 1.0)
        ys.append(y)
    return ys, s, mask


def backward(
    dys: Sequence[torch.Tensor],
    x: Kept,
    group: Group,
    lora_As: Sequence[torch.Tensor],
    lora_Bs: Sequence[torch.Tensor],
    s: Kept,
    mask: Kept,
    needs: tuple[bool, bool, Sequence[bool]],
) -> tuple[torch.Tensor | None, torch.Tensor | None, list[torch.Tensor | None]]:
    """Each dy [M, N] -> dX [M, K], dA [R, K] of all projections, each dB [N, r]; only what `needs` asks for."""
    needs_x, needs_a, needs_bs = needs
    M, dtype = dys[0].shape[0], dys[0].dtype
    few = M <= FEW_ROWS
    dx = da = None
    dbs: list[torch.Tensor | None] = []
    parts = []
    each = zip(dys, group.weights, lora_Bs, group.columns, _kept_scalings(group, mask), needs_bs, strict=True)
    for dy, weight, lora_B, columns, scaling, needs_b in each:
        dy = dense_rows(dy)
        if needs_x or needs_a:
            parts.append(dy.mm(in_dtype(lora_B, dtype)).mul_(scaling))
        if needs_x:
            dx = add_base_backward(dx, dy, weight, group.dense_path)
        db = gradient_of_b(dy, s[:, columns], 1.0, lora_B) if needs_b else None
        dbs.append(db.mul_(scaling) if few and db is not None else db)
    if needs_x or needs_a:
        ds = torch.cat(parts, dim=1)
    if dx is not None:
        joined = _joined(lora_As, dtype)
        if mask is None:
            dx.addmm_(ds, joined)
        else:
            dx.addcmul_(ds.mm(joined), _as_number(mask, dtype))
    if needs_a:
        da = ds.t().mm(x if mask is None else apply_mask(x, mask))
    return dx, da, dbs


def _joined(lora_As: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """A of all projections [R, K], rounded to `dtype`."""
    return in_dtype(torch.cat(tuple(lora_As)), dtype)
