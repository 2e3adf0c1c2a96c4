"""bitsandbytes' 4-bit format in registers: scales of blocks, and codes to values.

For w of [N, K] and i the flat index n K + k: byte i // 2 of `packed` holds two codes, the high nibble for even i;
block b = i // blocksize, whose scale is

    s[b] = absmax[b]                                                              absmax float32
    s[b] = fl(fl(nested_code[absmax[b]] * nested_absmax[b // 256]) + offset)      absmax uint8 (double quantization)
    w[i] = round_to_dtype(fl(code[nibble] * s[b]))                                fl: rounded to float32

A kernel that promises these bits is launched with `NO_FUSION`: contracting the scale's product and sum into one FMA
would leave out a rounding. Values come by `tl.gather` from the 16 codes: Triton keeps them in shared memory, where 16
words lie in 16 banks, so that lanes which ask for different codes do not wait for each other. A table of 256 pairs
takes fewer instructions and more cycles, for its reads do meet in a bank. The format is that of Dettmers et al. 2023
(arXiv:2305.14314).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .launch import nbytes

# Compile options of a kernel whose scales are rounded twice, as the format says.
NO_FUSION = {"enable_fp_fusion": False}


@dataclass(frozen=True, slots=True, eq=False)
class Packed4bit:
    """A 4-bit weight as the launchers take it; nothing is checked here (`peftkern.weights.Weight4bit` does).

    Attributes:
        packed: uint8 [ceil(N K / 2)], contiguous.
        absmax: float32 or (double quantization) uint8 [ceil(N K / blocksize)].
        code: float32 [16].
        nested_absmax: float32 [ceil(blocks / 256)]; nested_code: float32 [256]; offset: float32, one element. None
            without double quantization.
        N, K: out_features, in_features.
        blocksize: a power of two from 32 to 4096.
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    code: torch.Tensor
    nested_absmax: torch.Tensor | None
    nested_code: torch.Tensor | None
    offset: torch.Tensor | None
    N: int
    K: int
    blocksize: int

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return nbytes(self.packed, self.absmax, self.code, self.nested_absmax, self.nested_code, self.offset)

    @property
    def word_aligned(self) -> bool:
        """Whether the bytes start at a multiple of 16, so that they may be read as words."""
        return self.packed.data_ptr() % 16 == 0

    def arguments(self) -> dict[str, torch.Tensor | None]:
        """The pointer arguments, by name, that every kernel over this format takes."""
        return {
            "packed_ptr": self.packed,
            "absmax_ptr": self.absmax,
            "code_ptr": self.code,
            "nested_absmax_ptr": self.nested_absmax,
            "nested_code_ptr": self.nested_code,
            "offset_ptr": self.offset,
        }


@triton.jit
def block_scales(blocks, absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr):
    """fp32 scales of a tile of block indices, any shape; all of them inside the array (clamp or wrap at the edges)."""
    scales = tl.load(absmax_ptr + blocks)
    if nested_absmax_ptr is not None:
        nested = tl.load(nested_code_ptr + scales.to(tl.int32))
        scales = nested * tl.load(nested_absmax_ptr + (blocks >> 8)) + tl.load(offset_ptr)
    return scales


@triton.jit
def load_codes(code_ptr):
    """fp32 [16]: the table that values are gathered from. Load it once, outside the loop."""
    return tl.load(code_ptr + tl.arange(0, 16))


@triton.jit
def decode_in_order(words, codes, WORD_CODES: tl.constexpr):
    """A tile of words [WORDS], WORD_CODES / 2 bytes each -> fp32 [WORDS, WORD_CODES], unscaled, in the order of W."""
    WORDS: tl.constexpr = words.shape[0]
    shifts = (tl.arange(0, WORD_CODES) ^ 1) * 4  # the high nibble of each byte comes first
    nibbles = (words.to(tl.int32)[:, None] >> shifts[None, :]) & 15
    return tl.reshape(tl.gather(codes, tl.reshape(nibbles, (WORDS * WORD_CODES,)), 0), (WORDS, WORD_CODES))
