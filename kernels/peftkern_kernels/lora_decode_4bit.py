"""Decoding over a 4-bit weight: `y = x deq(W)^T + bias + scaling * (keep * x / (1 - p)) A^T B^T` for at most 16 rows.

As lora_decode.py, in two launches: fp32 planes of x W^T and x A^T over parts of K, then their sum with the expand. A
byte of W holds two columns, so a step is two dots into one accumulator, W's even columns against x's even columns and
the odd ones likewise; putting W's columns back in order would cost a shuffle for each element, x's are few. Values are
rounded to x's dtype before they are multiplied, so that y is what a dense dequantized weight would give. Format and
source: format_4bit.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .dropout import Dropout
from .format_4bit import NO_FUSION, Packed4bit, load_codes
from .gemm_tile_4bit import decode_tile, start_scales, step_scales
from .launch import Call, cdiv, compile_options, is_aligned, nbytes, scratch, strides
from .lora_decode import MAX_ROWS, finish_call, rows_times_tokens
from .tables_4bit import choose_decode_4bit


@triton.jit
def packed_rows_times_tokens(
    packed_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, x_ptr, rows, offs_m, M, K,
    row_words, k_start, k_stop, word_start, stride_xm, stride_xk,
    GROUP: tl.constexpr, SHIFT: tl.constexpr, WORDS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, NUM_STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """fp32 [BLOCK_N, BLOCK_M] = deq(W)[rows, k_start:k_stop] x[offs_m, k_start:k_stop]^T."""
    CODES: tl.constexpr = 8 if WORDS else 2  # in what one load gives
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    STEP: tl.constexpr = BLOCK_K // GROUP
    codes = load_codes(code_ptr)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    offs_w = tl.arange(0, BLOCK_K // CODES)
    words_ptr = packed_ptr.to(tl.pointer_type(tl.int32)) if WORDS else packed_ptr
    packed_ptrs = words_ptr + (rows * row_words + word_start)[:, None] + offs_w[None, :]
    x_ptrs = x_ptr + (offs_m % M)[:, None] * stride_xm + (k_start + offs_k)[None, :] * stride_xk
    x_step = tl.cast(stride_xk, tl.int64) * BLOCK_K
    # Groups of a row count from the row's first; past its end x is 0, and any scale of the same row will do.
    last = K // GROUP - 1
    offs_g = k_start // GROUP + tl.arange(0, STEP)
    row_groups = (rows * (last + 1))[:, None]
    groups = row_groups + tl.minimum(offs_g, last)[None, :]  # [BLOCK_N, STEP]
    next_groups = row_groups + tl.minimum(offs_g + STEP, last)[None, :]
    next_scales, absmax, nested_absmax = start_scales(
        groups, next_groups, absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, SHIFT
    )
    for k in tl.range(k_start, k_stop, BLOCK_K, num_stages=NUM_STAGES):
        if EVEN_K:
            packed = tl.load(packed_ptrs)  # [BLOCK_N, BLOCK_K / CODES]
            x = tl.load(x_ptrs)  # [BLOCK_M, BLOCK_K]
        else:
            packed = tl.load(packed_ptrs, mask=(offs_w * CODES < k_stop - k)[None, :], other=0)
            x = tl.load(x_ptrs, mask=(offs_k < k_stop - k)[None, :], other=0.0)
        groups = row_groups + tl.minimum(offs_g, last)[None, :]
        groups_ahead = row_groups + tl.minimum(offs_g + 2 * STEP, last)[None, :]
        scales, next_scales, absmax, nested_absmax = step_scales(
            groups, groups_ahead, next_scales, absmax, nested_absmax, absmax_ptr, nested_absmax_ptr, nested_code_ptr,
            offset_ptr, SHIFT,
        )  # fmt: skip
        even, odd = decode_tile(packed, scales, codes, BLOCK_K // 2, DTYPE)  # each [BLOCK_N, BLOCK_K / 2]
        x_even, x_odd = tl.split(tl.reshape(x, (BLOCK_M, BLOCK_K // 2, 2)))
        acc = tl.dot(even, x_even.T, acc, input_precision=PRECISION)
        acc = tl.dot(odd, x_odd.T, acc, input_precision=PRECISION)
        packed_ptrs += BLOCK_K // CODES
        x_ptrs += x_step
        offs_g += STEP
    return acc


@triton.jit(do_not_specialize=["M", "threshold"])
def _decode_4bit_planes_kernel(
    x_ptr, packed_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, a_ptr, seed_ptr,
    y_planes_ptr, s_planes_ptr,  # ... -> [SPLIT, M, N] [SPLIT, M, R]
    M, N, K, R, row_words, k_part, part_words, stride_xm, stride_xk, stride_ar, stride_ak, threshold,
    GROUP: tl.constexpr, SHIFT: tl.constexpr, WORDS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, NUM_STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    programs_r = tl.cdiv(R, BLOCK_N)  # A's come first, as in lora_decode.py
    k_start = tl.program_id(1) * k_part
    k_stop = tl.minimum(k_start + k_part, K)
    offs_m = tl.arange(0, BLOCK_M).to(tl.int64)
    if tl.program_id(0) < programs_r:
        offs_r = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = rows_times_tokens(
            a_ptr, x_ptr, seed_ptr, offs_r % R, offs_m, M, k_start, k_stop, stride_ar, stride_ak, stride_xm,
            stride_xk, threshold, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, 1, PRECISION,
        )  # fmt: skip
        s_ptrs = s_planes_ptr + (tl.program_id(1) * M + offs_m)[None, :] * R + offs_r[:, None]
        tl.store(s_ptrs, acc, mask=(offs_m < M)[None, :] & (offs_r < R)[:, None])
    else:
        offs_n = (tl.program_id(0) - programs_r).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = packed_rows_times_tokens(
            packed_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, x_ptr, offs_n % N, offs_m,
            M, K, row_words, k_start, k_stop, tl.program_id(1) * part_words, stride_xm, stride_xk, GROUP, SHIFT,
            WORDS, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, NUM_STAGES, PRECISION,
        )  # fmt: skip
        y_ptrs = y_planes_ptr + (tl.program_id(1) * M + offs_m)[None, :] * N + offs_n[:, None]
        tl.store(y_ptrs, acc, mask=(offs_m < M)[None, :] & (offs_n < N)[:, None])


def decode_4bit_calls(
    x: torch.Tensor,
    weight: Packed4bit,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    out: torch.Tensor,
    s_out: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    dropout: Dropout | None = None,
    arch: int,
    precision: str = "ieee",
) -> list[Call]:
    """Launches that write `s_out[M, R] = scaling * (keep * x / (1 - p)) a^T` and
    `out = x deq(weight)^T + bias + s_out b^T`, where deq rounds to x's dtype.

    Args:
        x: [M, K] with M at most 16; any strides. weight: [N, K], 4-bit, K even.
        a: [R, K], b: [N, R]: x's dtype or fp32 masters.
        scaling: applied in fp32 before S is rounded.
        out: [M, N] and s_out: [M, R], written; any strides.
        bias: [N]. dropout: mask by (row, column) of x, on the low-rank part alone. arch: see `gemm_tables`.
        precision: `input_precision` of fp32 dots.

    Raises:
        ValueError: more than 16 rows, or an odd K: then bytes straddle rows, and the caller dequantizes.
    """
    if x.shape[0] == 0:
        return []
    y_planes, s_planes, planes = planes_4bit_call(x, weight, a, dropout=dropout, arch=arch, precision=precision)
    factor = float(scaling) * (1.0 if dropout is None else dropout.keep_scale)
    return [planes, finish_call(y_planes, s_planes, b, bias, factor, out, s_out, arch, precision)]


def planes_4bit_call(
    x: torch.Tensor,
    weight: Packed4bit,
    a: torch.Tensor,
    *,
    dropout: Dropout | None,
    arch: int,
    precision: str,
) -> tuple[torch.Tensor, torch.Tensor, Call]:
    """The first launch and the planes that it fills, as `lora_decode.planes_call`."""
    (M, K), N, R = x.shape, weight.N, a.shape[0]
    if M > MAX_ROWS:
        raise ValueError(f"x: expected at most {MAX_ROWS} rows on the decode path, got {M}")
    if K % 2:
        raise ValueError(f"weight: expected an even K on the 4-bit decode path, got {K}")
    words = K % 8 == 0 and weight.packed.data_ptr() % 4 == 0
    codes = 8 if words else 2
    aligned = words and K % 32 == 0 and is_aligned(x)
    tile = choose_decode_4bit(arch, x.dtype, M=M, N=N, K=K, R=R, aligned=aligned)
    # Columns of a row that surely share a block: a power of two that divides the row, the block and the tile.
    group = min(K & -K, weight.blocksize, tile.block_k)
    k_part = cdiv(cdiv(K, tile.block_k), tile.split_k) * tile.block_k
    split = cdiv(K, k_part)
    y_planes = scratch(split, M, N, dtype=torch.float32, device=x.device)
    s_planes = scratch(split, M, R, dtype=torch.float32, device=x.device)
    planes = Call(
        name="decode 4-bit: planes",
        kernel=_decode_4bit_planes_kernel,
        grid=(cdiv(R, tile.block_n) + cdiv(N, tile.block_n), split, 1),
        args={
            **weight.arguments(),
            "x_ptr": x,
            "a_ptr": a,
            **strides(a, "ar", "ak"),
            "seed_ptr": None if dropout is None else dropout.seed,
            "y_planes_ptr": y_planes,
            "s_planes_ptr": s_planes,
            "M": M,
            "N": N,
            "K": K,
            "R": R,
            # In words (or bytes) by themselves: of K / 8 Triton would not know that it is a multiple of four.
            "row_words": K // codes,
            "k_part": k_part,
            "part_words": k_part // codes,
            **strides(x, "xm", "xk"),
            "threshold": 0 if dropout is None else dropout.threshold,
        },
        constants={
            "GROUP": group,
            "SHIFT": (weight.blocksize // group).bit_length() - 1,
            "WORDS": words,
            "BLOCK_M": MAX_ROWS,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": tile.block_k,
            "EVEN_K": K % tile.block_k == 0,
            "NUM_STAGES": tile.num_stages,
            "PRECISION": precision,
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        bytes=weight.nbytes + nbytes(x, a, y_planes, s_planes),
        flops=2 * M * (N + R) * K,
        # Elsewhere the assembler's own limit, four programs on a multiprocessor, costs no spill.
        options={**NO_FUSION, **(compile_options(arch) if 100 <= arch < 120 else {})},
    )
    return y_planes, s_planes, planes
