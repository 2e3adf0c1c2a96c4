"""`lora_linear` for 16-bit tensors on a CPU without 16-bit matrix instructions: products in fp32, block by block.

On such a CPU (x86 without AVX-512, for one) torch multiplies bfloat16 matrices with a scalar loop, tens to hundreds of
times slower than fp32 (`python -m bench.cpu_step` prints both). So blocks of rows, and the weight once a call, are
widened, multiplied, and rounded once at the store. Nothing widened outlives the call: what is kept for backward is as
on the plain path. Sums over all rows (dA, dB) stay in fp32 from block to block, in a fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import linear

from peftkern.ops._lora_linear_torch import Kept, apply_mask, keep_mask

BLOCK_ROWS = 1024  # 16 MB of fp32 x at 4096 features, next to 64 MB for a 4096 x 4096 weight


def _row_blocks(M: int) -> Iterator[slice]:
    return (slice(start, min(start + BLOCK_ROWS, M)) for start in range(0, M, BLOCK_ROWS))


@torch.autocast("cpu", enabled=False)  # which would round the widened blocks again
def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None,
    dropout_p: float,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """As `_lora_linear_torch.forward`, with adapters in any dtype."""
    M, N, R = x.shape[0], weight.shape[0], lora_A.shape[0]
    y, s, mask = x.new_empty(M, N), x.new_empty(M, R), None
    if seed is not None:
        mask = keep_mask(seed, M, x.shape[1], dropout_p)
        scaling = scaling / (1.0 - dropout_p)
    w, a, b_t = weight.float(), lora_A.float(), lora_B.float().t()
    wide_bias = None if bias is None else bias.float()
    for rows in _row_blocks(M):
        wide = x[rows].float()
        part = linear(wide, w, wide_bias)
        s_rows = linear(wide if mask is None else apply_mask(wide, mask[rows]), a)
        y[rows] = part.addmm_(s_rows, b_t, alpha=scaling)
        s[rows] = s_rows
    return y, s, mask


@torch.autocast("cpu", enabled=False)
def backward(
    dy: torch.Tensor,
    x: Kept,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    s: Kept,
    mask: torch.Tensor | None,
    scaling: float,
    dropout_p: float,
    needs: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """As `_lora_linear_torch.backward`; dA and dB are float32."""
    needs_x, needs_a, needs_b = needs
    M = dy.shape[0]
    if mask is not None:
        scaling = scaling / (1.0 - dropout_p)
    a, b = lora_A.float(), lora_B.float()
    dx = dy.new_empty(M, weight.shape[1]) if needs_x else None
    da = torch.zeros_like(a) if needs_a else None
    db = torch.zeros_like(b) if needs_b else None
    w = weight.float() if needs_x else None
    for rows in _row_blocks(M):
        wide = dy[rows].float()
        if dx is not None or da is not None:
            ds = wide.mm(b)
        if dx is not None and w is not None:
            part = wide.mm(w)
            if mask is None:
                part.addmm_(ds, a, alpha=scaling)
            else:
                part.add_(apply_mask(ds.mm(a), mask[rows]), alpha=scaling)
            dx[rows] = part
        if da is not None:
            dropped = x[rows].float()
            da.addmm_(ds.t(), dropped if mask is None else apply_mask(dropped, mask[rows]), alpha=scaling)
        if db is not None:
            db.addmm_(wide.t(), s[rows].float(), alpha=scaling)
    return dx, da, db
