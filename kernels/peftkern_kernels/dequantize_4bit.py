"""`out[N, K] = round(code[nibble] * s[block])`: a 4-bit weight made dense, in one launch and to the bit.

Half a byte is read and two or four are written for each element, so the time is that of the stores: each thread writes
16 contiguous bytes at a time, from a word that holds just the codes for them (four bytes for 16-bit results, two for
fp32). W is taken as flat, for blocks know nothing of rows. Scales are worked out on the way, one a word, so nothing
is kept beside `out`, double quantization or not. Formula and source: format_4bit.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .format_4bit import NO_FUSION, Packed4bit, block_scales, decode_in_order, load_codes
from .launch import Call, cdiv, nbytes
from .overlap import begin, overlap_options, overlaps
from .tables_4bit import choose_dequantize


@triton.jit
def _dequantize_4bit_kernel(
    packed_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, out_ptr,  # ... -> [numel]
    words, numel,
    BLOCKSIZE: tl.constexpr, WORD: tl.constexpr, WORD_CODES: tl.constexpr, BLOCK_WORDS: tl.constexpr,
    TAIL: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    begin(OVERLAP)
    codes = load_codes(code_ptr)
    start = tl.program_id(0).to(tl.int64) * BLOCK_WORDS
    offs_w = tl.arange(0, BLOCK_WORDS)
    mask = start + offs_w < words
    packed = tl.load((packed_ptr.to(tl.pointer_type(WORD)) + start) + offs_w, mask=mask, other=0)  # [BLOCK_WORDS]
    # A scale a word: a block is a whole number of words.
    last = (numel - 1) // BLOCKSIZE
    blocks = tl.minimum((start + offs_w) // (BLOCKSIZE // WORD_CODES), last)
    scales = block_scales(blocks, absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr)
    values = decode_in_order(packed, codes, WORD_CODES) * scales[:, None]  # [BLOCK_WORDS, WORD_CODES]
    offs = offs_w[:, None] * WORD_CODES + tl.arange(0, WORD_CODES)[None, :]
    tl.store((out_ptr + start * WORD_CODES) + offs, values.to(out_ptr.dtype.element_ty), mask=mask[:, None])
    if TAIL and tl.program_id(0) == 0:  # what is left over by whole words, fewer than WORD_CODES elements
        offs_t = tl.cast(words, tl.int64) * WORD_CODES + tl.arange(0, WORD_CODES)
        mask_t = offs_t < numel
        byte = tl.load(packed_ptr + offs_t // 2, mask=mask_t, other=0).to(tl.int32)
        scales_t = block_scales(offs_t * 0 + last, absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr)
        values_t = tl.gather(codes, (byte >> (4 - 4 * (offs_t % 2).to(tl.int32))) & 15, 0) * scales_t
        tl.store(out_ptr + offs_t, values_t.to(out_ptr.dtype.element_ty), mask=mask_t)


def dequantize_4bit_calls(weight: Packed4bit, out: torch.Tensor, *, arch: int) -> list[Call]:
    """The launch that writes `out[N, K] = round(code[nibble] * s[block])`, bit for bit as the format says.

    Args:
        weight: see `Packed4bit`.
        out: [N, K], contiguous, fp32, fp16 or bf16; written.
        arch: 80, 86, 89, 90, 100, 120; 942, 1100; 0 for the interpreter.

    Raises:
        ValueError: `out` has another shape or is not contiguous.
    """
    if tuple(out.shape) != (weight.N, weight.K) or not out.is_contiguous():
        raise ValueError(
            f"out: expected a contiguous tensor [{weight.N}, {weight.K}], got {list(out.shape)} with strides "
            f"{list(out.stride())}"
        )
    launch = choose_dequantize(arch, out.dtype)
    # 16 bytes of results are the codes of this many bytes, unless those do not start where such a word may.
    word_bytes = 8 // out.dtype.itemsize
    while weight.packed.data_ptr() % word_bytes:
        word_bytes //= 2
    numel, word_codes = weight.N * weight.K, 2 * word_bytes
    words = numel // word_codes
    return [
        Call(
            name="dequantize",
            kernel=_dequantize_4bit_kernel,
            grid=(max(1, cdiv(words, launch.block_words)), 1, 1),
            args={**weight.arguments(), "out_ptr": out, "words": words, "numel": numel},
            constants={
                "BLOCKSIZE": weight.blocksize,
                "WORD": {1: tl.uint8, 2: tl.int16, 4: tl.int32}[word_bytes],
                "WORD_CODES": word_codes,
                "BLOCK_WORDS": launch.block_words,
                "TAIL": numel % word_codes != 0,
                "OVERLAP": overlaps(arch),
            },
            num_warps=launch.num_warps,
            num_stages=1,
            bytes=weight.nbytes + nbytes(out),
            flops=numel,
            options=NO_FUSION | overlap_options(arch),
        )
    ]
