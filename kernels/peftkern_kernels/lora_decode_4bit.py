"""Decoding over a 4-bit weight: `y = x deq(W)^T + bias + scaling * (keep * x / (1 - p)) A^T B^T` for at most 16 rows.

As lora_decode.py, in two launches: fp32 planes of x W^T and x A^T over parts of K, then their sum with the expand. A
byte of W holds two columns, so a step is two dots into one accumulator, W's even columns against x's even columns and
the odd ones likewise; putting W's columns back in order would cost a shuffle for each element, x's are few. Values are
rounded to x's dtype before they are multiplied, so that y is what a dense dequantized weight would give. Format and
source: format_4bit.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from .dropout import Dropout
from .format_4bit import NO_FUSION, Packed4bit, load_codes
from .gemm_tables import Tile
from .gemm_tile_4bit import decode_tile, start_scales, step_scales
from .launch import MOST_PROJECTIONS, Call, cdiv, compile_options, is_aligned, nbytes
from .lora_decode import low_rank_program, shrink_arguments
from .lora_decode_finish import MAX_ROWS, Planes, Projection, check_group, finish_call
from .projections import block_of_projection, blocks_of, numbered, of_projection
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
    x_ptr, packed_ptr, packed1_ptr, packed2_ptr, packed3_ptr, absmax_ptr, absmax1_ptr, absmax2_ptr, absmax3_ptr,
    code_ptr, code1_ptr, code2_ptr, code3_ptr,
    nested_absmax_ptr, nested_absmax1_ptr, nested_absmax2_ptr, nested_absmax3_ptr,
    nested_code_ptr, nested_code1_ptr, nested_code2_ptr, nested_code3_ptr,
    offset_ptr, offset1_ptr, offset2_ptr, offset3_ptr, a_ptr, a1_ptr, a2_ptr, a3_ptr, seed_ptr,
    y_planes_ptr, y_planes1_ptr, y_planes2_ptr, y_planes3_ptr,  # each [SPLIT, M, N]
    s_planes_ptr, s_planes1_ptr, s_planes2_ptr, s_planes3_ptr,  # each [SPLIT, M, R]
    M, N, N1, N2, N3, K, R, R1, R2, R3, row_words, k_part, part_words,
    stride_xm, stride_xk, stride_ar, stride_ak, threshold,
    GROUP: tl.constexpr, SHIFT: tl.constexpr, WORDS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, NUM_STAGES: tl.constexpr, OVERLAP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    programs_r = blocks_of(R, R1, R2, R3, BLOCK_N)  # A's come first, as in lora_decode.py
    k_start = tl.program_id(1) * k_part
    k_stop = tl.minimum(k_start + k_part, K)
    offs_m = tl.arange(0, BLOCK_M).to(tl.int64)
    if tl.program_id(0) < programs_r:
        low_rank_program(
            x_ptr, tl.program_id(0), a_ptr, a1_ptr, a2_ptr, a3_ptr, seed_ptr, s_planes_ptr, s_planes1_ptr,
            s_planes2_ptr, s_planes3_ptr, R, R1, R2, R3, offs_m, M, k_start, k_stop, stride_xm, stride_xk, stride_ar,
            stride_ak, threshold, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION,
        )  # fmt: skip
    else:
        which, block_n = block_of_projection(tl.program_id(0) - programs_r, N, N1, N2, N3, BLOCK_N)
        own_N = of_projection(which, N, N1, N2, N3)
        offs_n = block_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        nested_absmax, nested_code, offset = None, None, None
        if nested_absmax_ptr is not None:
            nested_absmax = of_projection(
                which, nested_absmax_ptr, nested_absmax1_ptr, nested_absmax2_ptr, nested_absmax3_ptr
            )
            nested_code = of_projection(which, nested_code_ptr, nested_code1_ptr, nested_code2_ptr, nested_code3_ptr)
            offset = of_projection(which, offset_ptr, offset1_ptr, offset2_ptr, offset3_ptr)
        acc = packed_rows_times_tokens(
            of_projection(which, packed_ptr, packed1_ptr, packed2_ptr, packed3_ptr),
            of_projection(which, absmax_ptr, absmax1_ptr, absmax2_ptr, absmax3_ptr),
            of_projection(which, code_ptr, code1_ptr, code2_ptr, code3_ptr),
            nested_absmax, nested_code, offset, x_ptr, offs_n % own_N, offs_m, M, K, row_words, k_start, k_stop,
            tl.program_id(1) * part_words, stride_xm, stride_xk,
            GROUP, SHIFT, WORDS, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, NUM_STAGES, PRECISION,
        )  # fmt: skip
        y_ptrs = of_projection(which, y_planes_ptr, y_planes1_ptr, y_planes2_ptr, y_planes3_ptr)
        y_ptrs += (tl.program_id(1) * M + offs_m)[None, :] * own_N + offs_n[:, None]
        tl.store(y_ptrs, acc, mask=(offs_m < M)[None, :] & (offs_n < own_N)[:, None])


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
    group = [Projection(a, b, scaling, out, s_out, bias)]
    return group_decode_4bit_calls(x, [weight], group, dropout=dropout, arch=arch, precision=precision)


def group_decode_4bit_calls(
    x: torch.Tensor,
    weights: Sequence[Packed4bit],
    group: Sequence[Projection],
    *,
    dropout: Dropout | None = None,
    arch: int,
    precision: str = "ieee",
    tile: Tile | None = None,
) -> list[Call]:
    """The same two launches for up to four projections of x, as `lora_decode.group_decode_calls`.

    Raises:
        ValueError: as there, or an odd K, or weights that one launch cannot read (see `weights_fit`).
    """
    check_group(x, weights, group)
    if x.shape[1] % 2:
        raise ValueError(f"weight: expected an even K on the 4-bit decode path, got {x.shape[1]}")
    if not weights_fit(weights):
        raise ValueError("weights: expected one blocksize and one kind of scales")
    if x.shape[0] == 0:
        return []
    planes, call = _planes_call(x, weights, [each.a for each in group], dropout, arch, precision, tile)
    overlap = call.constants["OVERLAP"]
    return [call, finish_call(planes, group, dropout, x.dtype, arch, precision, overlap=overlap)]


def weights_fit(weights: Sequence[Packed4bit]) -> bool:
    """Whether one launch can read them all: one blocksize, all or none double-quantized, words aligned alike."""
    kinds = {(w.blocksize, w.nested_absmax is None, w.packed.data_ptr() % 4 == 0) for w in weights}
    return len(kinds) == 1


def weight_arguments(weights: Sequence[Packed4bit]) -> dict[str, Any]:
    """The pointers, by name, of each weight's parts."""
    held = [w.arguments() for w in weights]
    pointers: dict[str, Any] = {}
    for name in held[0]:
        pointers |= numbered(name.replace("_ptr", "{}_ptr"), [each[name] for each in held])
    return pointers


def _occupancy(arch: int, projections: int) -> dict[str, int]:
    """Compile options against spills, where the assembler's own choice of occupancy has some."""
    if arch == 942 and projections == MOST_PROJECTIONS:
        return {"waves_per_eu": 2}  # pointers of four projections do not fit beside four waves
    # Elsewhere the assembler's own limit, four programs on a multiprocessor, costs no spill.
    return compile_options(arch) if 100 <= arch < 120 else {}


def _planes_call(
    x: torch.Tensor,
    weights: Sequence[Packed4bit],
    As: Sequence[torch.Tensor],
    dropout: Dropout | None,
    arch: int,
    precision: str,
    tile: Tile | None,
) -> tuple[Planes, Call]:
    """The first launch, and what it fills."""
    (M, K), sizes, ranks, first = x.shape, [w.N for w in weights], [a.shape[0] for a in As], weights[0]
    words = K % 8 == 0 and first.packed.data_ptr() % 4 == 0
    codes = 8 if words else 2
    aligned = words and K % 32 == 0 and is_aligned(x)
    if tile is None:
        tile = choose_decode_4bit(arch, x.dtype, M=M, N=sum(sizes), K=K, R=sum(ranks), aligned=aligned)
    # Columns of a row that surely share a block: a power of two that divides the row, the block and the tile.
    group = min(K & -K, first.blocksize, tile.block_k)
    k_part = cdiv(cdiv(K, tile.block_k), tile.split_k) * tile.block_k
    split = cdiv(K, k_part)
    planes = Planes.empty(split, x, sizes, ranks)
    call = Call(
        name="decode 4-bit: planes",
        kernel=_decode_4bit_planes_kernel,
        grid=(sum(cdiv(size, tile.block_n) for size in (*ranks, *sizes)), split, 1),
        args={
            **shrink_arguments(x, As, planes, dropout),
            **weight_arguments(weights),
            # In words (or bytes) by themselves: of K / 8 Triton would not know that it is a multiple of four.
            "row_words": K // codes,
            "k_part": k_part,
            "part_words": k_part // codes,
        },
        constants={
            "GROUP": group,
            "SHIFT": (first.blocksize // group).bit_length() - 1,
            "WORDS": words,
            "BLOCK_M": MAX_ROWS,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": tile.block_k,
            "EVEN_K": K % tile.block_k == 0,
            "NUM_STAGES": tile.num_stages,
            "OVERLAP": tile.overlap,
            "PRECISION": precision,
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        bytes=sum(w.nbytes for w in weights) + nbytes(x, *As, *planes.y, *planes.s),
        flops=2 * M * sum((*sizes, *ranks)) * K,
        options={**NO_FUSION, **_occupancy(arch, len(weights))},
    )
    return planes, call
