"""Dropout without a stored mask: each tile draws its own part of one mask.

`keep[m, k]` is a pure function of (seed, m, k): word `k % 4` of Philox-4x32 with 7 rounds, key = seed, counter =
(k // 4, m, 0, 0), shifted right by one and compared with `round(p * 2^31)`. Four neighbours cost one Philox call, and
kernels with different tiles agree. The seed is read from device memory, so that a captured graph draws anew when its
owner writes a new seed. `peftkern.reference.dropout_mask` is the same function in plain PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@dataclass(frozen=True, slots=True)
class Dropout:
    """A dropout mask: `seed` is an int64 tensor of one element on the kernels' device, `p` the chance of dropping."""

    seed: torch.Tensor
    p: float

    @property
    def threshold(self) -> int:
        """The 31-bit word below which an element is dropped."""
        return min(round(self.p * 2**31), 2**31 - 1)

    @property
    def keep_scale(self) -> float:
        """What the kept elements are multiplied with."""
        return 1.0 / (1.0 - self.p)


@triton.jit
def keep_tile(seed, offs_m, k_start, threshold, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """keep[BLOCK_M, BLOCK_K] as int1, for rows offs_m [BLOCK_M] and columns k_start + arange(BLOCK_K).

    `k_start` must be a multiple of 4, `threshold` is `Dropout.threshold`. Rows and columns count modulo 2^32.
    """
    groups = (k_start // 4).to(tl.int32) + tl.arange(0, BLOCK_K // 4)  # [BLOCK_K / 4]
    rows = offs_m.to(tl.int32)[:, None] + tl.zeros((BLOCK_M, BLOCK_K // 4), tl.int32)
    columns = groups[None, :] + tl.zeros((BLOCK_M, BLOCK_K // 4), tl.int32)
    w0, w1, w2, w3 = tl.philox(seed, columns, rows, 0, 0, 7)  # each [BLOCK_M, BLOCK_K / 4]
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [BLOCK_M, BLOCK_K / 4, 2, 2], last axes flatten to word 0..3
    words = tl.reshape(words, (BLOCK_M, BLOCK_K))
    return (words >> 1).to(tl.int32) >= threshold
