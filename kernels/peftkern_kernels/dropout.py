"""Dropout without a stored mask: each tile draws its own part of one mask.

`keep[m, k]` is a pure function of (seed, m, k): 16 of the 128 bits of Philox-4x32 with 7 rounds (Salmon et al. 2011),
key = seed, counter = (k // 8, m, 0, 0): bits 16 (k % 8) and up. They are compared with `round(p * 2^16)`, so p counts
in steps of 2^-16. Eight neighbours cost one Philox call, and kernels with different tiles agree. The seed is read from
device memory, so that a captured graph draws anew when its owner writes a new seed. `peftkern.reference.dropout_mask`
is the same function in plain PyTorch.
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
        """The 16-bit number below which an element is dropped; 2^16 drops all."""
        return round(self.p * 2**16)

    @property
    def keep_scale(self) -> float:
        """What the kept elements are multiplied with."""
        return 1.0 / (1.0 - self.p)


@triton.jit
def _philox_4x32_7(seed, c0, c1):
    """Four uint32 words for the counter (c0, c1, 0, 0). As `tl.philox`, in 64-bit products: half the instructions."""
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    c0 = c0.to(tl.uint32)
    c1 = c1.to(tl.uint32)
    c2 = tl.zeros_like(c0)
    c3 = tl.zeros_like(c0)
    for _ in tl.static_range(7):
        product0 = c0.to(tl.uint64) * 0xD2511F53
        product2 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product2 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = product2.to(tl.uint32)
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = product0.to(tl.uint32)
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def keep_tile(seed, offs_m, k_start, threshold, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """keep[BLOCK_M, BLOCK_K] as int1, for rows offs_m [BLOCK_M] and columns k_start + arange(BLOCK_K).

    `k_start` and BLOCK_K must be multiples of 8, `threshold` is `Dropout.threshold`. Both count modulo 2^32.
    """
    groups = (k_start // 8).to(tl.int32) + tl.arange(0, BLOCK_K // 8)  # [BLOCK_K / 8]
    rows = offs_m.to(tl.int32)[:, None] + tl.zeros((BLOCK_M, BLOCK_K // 8), tl.int32)
    columns = groups[None, :] + tl.zeros((BLOCK_M, BLOCK_K // 8), tl.int32)
    w0, w1, w2, w3 = _philox_4x32_7(seed, columns, rows)  # each [BLOCK_M, BLOCK_K / 8]
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [BLOCK_M, BLOCK_K / 8, 2, 2], last axes flatten to word 0..3
    words = tl.reshape(words, (BLOCK_M, BLOCK_K // 2))
    numbers = tl.reshape(tl.join(words & 0xFFFF, words >> 16), (BLOCK_M, BLOCK_K))
    return numbers.to(tl.int32) >= threshold
