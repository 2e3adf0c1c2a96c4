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
    def kind(self) -> int:
        """What kernels are compiled for: 1 where at most half is dropped, 2 where more is (`_keep_pairs`)."""
        return 1 if self.threshold <= 2**15 else 2

    @property
    def keep_scale(self) -> float:
        """What the kept elements are multiplied with; 0 where none is kept."""
        return 1.0 / (1.0 - self.p) if self.threshold < 2**16 else 0.0


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
def mask_words(seed, offs_m, k_start, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """The numbers of rows offs_m [BLOCK_M] and columns k_start + arange(BLOCK_K) as uint32 [BLOCK_M, BLOCK_K / 2]: the
    lower 16 bits of a word are of its even column, the upper ones of its odd column.

    `k_start` and BLOCK_K must be multiples of 8. Rows and columns count modulo 2^32.
    """
    groups = (k_start // 8).to(tl.int32) + tl.arange(0, BLOCK_K // 8)  # [BLOCK_K / 8]
    rows = offs_m.to(tl.int32)[:, None] + tl.zeros((BLOCK_M, BLOCK_K // 8), tl.int32)
    columns = groups[None, :] + tl.zeros((BLOCK_M, BLOCK_K // 8), tl.int32)
    w0, w1, w2, w3 = _philox_4x32_7(seed, columns, rows)  # each [BLOCK_M, BLOCK_K / 8]
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))  # words 0..3 of each group side by side


@triton.jit
def upper_threshold(threshold):
    """What a number in the upper half of a word is compared with, word and all; one in the lower half is shifted up.

    2^16, which drops all, does not fit: of 2^32 - 1, which stands for it, `Dropout.keep_scale` takes care.
    """
    return tl.where(threshold > 0xFFFF, 0xFFFFFFFF, threshold.to(tl.uint32) << 16).to(tl.uint32)


@triton.jit
def keep_tile(seed, offs_m, k_start, threshold, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """keep[BLOCK_M, BLOCK_K] as int1; `threshold` is `Dropout.threshold`, the others as in `mask_words`."""
    words = mask_words(seed, offs_m, k_start, BLOCK_M, BLOCK_K)
    upper = upper_threshold(threshold)
    return tl.reshape(tl.join((words << 16) >= upper, words >= upper), (BLOCK_M, BLOCK_K))


@triton.jit
def drop_by_words(tile, words, threshold, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """fp32 `tile` [BLOCK_M, BLOCK_K] with zeros where `words` (`mask_words`) drop it."""
    upper = upper_threshold(threshold)
    even, odd = tl.split(tl.reshape(tile, (BLOCK_M, BLOCK_K // 2, 2)))
    # No change, for the threshold has 17 bits. But it ties the words to the tile, so that they change to the layout of
    # a product's sums as words; otherwise what is compared would, a byte for each element.
    words ^= even.to(tl.uint32, bitcast=True) & (threshold >> 17).to(tl.uint32)
    even = tl.where((words << 16) >= upper, even, 0.0)
    odd = tl.where(words >= upper, odd, 0.0)
    return tl.reshape(tl.join(even, odd), (BLOCK_M, BLOCK_K))


@triton.jit
def drop_tile(
    tile, seed, offs_m, k_start, threshold, DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):
    """`tile` [BLOCK_M, BLOCK_K] with zeros where it is dropped; DROPOUT is `Dropout.kind`, the others as in
    `mask_words`.

    16-bit numbers are dropped two at a time, as words are: no number is unpacked, compared or selected by itself.
    """
    words = mask_words(seed, offs_m, k_start, BLOCK_M, BLOCK_K)
    if tile.dtype.primitive_bitwidth == 16:
        even, odd = tl.split(tl.reshape(tile.to(tl.uint16, bitcast=True), (BLOCK_M, BLOCK_K // 2, 2)))
        pairs = (even.to(tl.uint32) | (odd.to(tl.uint32) << 16)) & _keep_pairs(words, threshold, DROPOUT)
        halves = tl.join(pairs.to(tl.uint16), (pairs >> 16).to(tl.uint16))
        kept = tl.reshape(halves, (BLOCK_M, BLOCK_K)).to(tile.dtype, bitcast=True)
    else:
        kept = drop_by_words(tile, words, threshold, BLOCK_M, BLOCK_K)
    return kept


@triton.jit
def _keep_pairs(words, threshold, DROPOUT: tl.constexpr):
    """uint32 with all 16 bits of a half set where that half of `words` is `threshold` or more.

    The upper bit of each half of `differences` tells whether the lower 15 bits of the word's half reach the
    threshold's: nothing is borrowed from the next half. With the word's own upper bit that decides.
    """
    UPPER_BITS: tl.constexpr = 0x80008000
    if DROPOUT == 1:
        differences = (words | UPPER_BITS) - threshold.to(tl.uint32) * 0x00010001
        decided = (differences | words) & UPPER_BITS
    else:
        differences = (words | UPPER_BITS) - (threshold - 0x8000).to(tl.uint32) * 0x00010001
        decided = (differences & words) & UPPER_BITS
    return decided | tl.umulhi(decided, 0xFFFE0000)  # 2^15 of a half times (1 - 2^-15): its lower 15 bits
