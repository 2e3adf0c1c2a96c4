"""multi_decode_planes.py over 4-bit weights: W's programs decode, as those of one adapter do (lora_decode_4bit.py)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .adapters import Adapters
from .format_4bit import NO_FUSION, Packed4bit
from .gemm_tables import rank_block
from .launch import Call, cdiv, compile_options, is_aligned, nbytes
from .lora_decode import MAX_ROWS
from .lora_decode_4bit import packed_rows_times_tokens, weight_arguments, weights_fit
from .multi_decode_planes import Planes, factor_bytes, programs, shrink_arguments, shrink_beside_base
from .projections import block_of_projection, blocks_of, of_projection, sum_of
from .routing import Routing
from .tables_4bit import choose_decode_4bit


@triton.jit(do_not_specialize=["M", "B"])
def _multi_decode_4bit_planes_kernel(
    x_ptr, packed_ptr, packed1_ptr, packed2_ptr, packed3_ptr, absmax_ptr, absmax1_ptr, absmax2_ptr, absmax3_ptr,
    code_ptr, code1_ptr, code2_ptr, code3_ptr,
    nested_absmax_ptr, nested_absmax1_ptr, nested_absmax2_ptr, nested_absmax3_ptr,
    nested_code_ptr, nested_code1_ptr, nested_code2_ptr, nested_code3_ptr,
    offset_ptr, offset1_ptr, offset2_ptr, offset3_ptr, a_ptr, a1_ptr, a2_ptr, a3_ptr,
    y_planes_ptr, y_planes1_ptr, y_planes2_ptr, y_planes3_ptr,  # [SPLIT, M, sum of N], and of R
    s_planes_ptr, s_planes1_ptr, s_planes2_ptr, s_planes3_ptr,
    row_offset_ptr, row_offset1_ptr, row_offset2_ptr, row_offset3_ptr, rank_ptr, rank1_ptr, rank2_ptr, rank3_ptr,
    N, N1, N2, N3, R, R1, R2, R3, perm_ptr, blocks_ptr, B,
    M, K, row_words, k_part, part_words, stride_xm, stride_xk, stride_ar,
    GROUP: tl.constexpr, SHIFT: tl.constexpr, WORDS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, EVEN_K: tl.constexpr, NUM_STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    programs_r = B * blocks_of(R, R1, R2, R3, BLOCK_R)  # A's come first, as in multi_decode_planes.py
    k_start = tl.program_id(1) * k_part
    k_stop = tl.minimum(k_start + k_part, K)
    if tl.program_id(0) < programs_r:
        shrink_beside_base(
            x_ptr, tl.program_id(0), a_ptr, a1_ptr, a2_ptr, a3_ptr, s_planes_ptr, s_planes1_ptr, s_planes2_ptr,
            s_planes3_ptr, row_offset_ptr, row_offset1_ptr, row_offset2_ptr, row_offset3_ptr, rank_ptr, rank1_ptr,
            rank2_ptr, rank3_ptr, R, R1, R2, R3, perm_ptr, blocks_ptr, B, k_start, k_stop, M, stride_xm, stride_xk,
            stride_ar, BLOCK_M, BLOCK_R, BLOCK_K, EVEN_K, PRECISION,
        )  # fmt: skip
    else:
        which, block_n = block_of_projection(tl.program_id(0) - programs_r, N, N1, N2, N3, BLOCK_N)
        own_N = of_projection(which, N, N1, N2, N3)
        offs_m = tl.arange(0, BLOCK_M).to(tl.int64)
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
        y_ptrs += (tl.program_id(1) * M + offs_m)[None, :] * sum_of(N, N1, N2, N3) + offs_n[:, None]
        tl.store(y_ptrs, acc, mask=(offs_m < M)[None, :] & (offs_n < own_N)[:, None])


def group_planes_4bit_call(
    x: torch.Tensor,
    weights: Sequence[Packed4bit],
    group: Sequence[Adapters],
    routing: Routing,
    *,
    arch: int,
    precision: str,
) -> tuple[Planes, Call]:
    """The first launch over 4-bit weights, and what it fills.

    Raises:
        ValueError: an odd K, where bytes straddle rows, or weights that one launch cannot read.
    """
    M, K = x.shape
    if K % 2:
        raise ValueError(f"weight: expected an even K on the 4-bit decode path, got {K}")
    if not weights_fit(weights):
        raise ValueError("weights: expected one blocksize and one kind of scales")
    first, R, N = weights[0], max(a.max_rank for a in group), sum(a.N for a in group)
    words = K % 8 == 0 and first.packed.data_ptr() % 4 == 0
    codes = 8 if words else 2
    aligned = words and K % 32 == 0 and is_aligned(x)
    tile = choose_decode_4bit(arch, x.dtype, M=M, N=N, K=K, R=R, aligned=aligned)
    # Columns of a row that surely share a block: a power of two that divides the row, the block and the tile.
    columns = min(K & -K, first.blocksize, tile.block_k)
    k_part = cdiv(cdiv(K, tile.block_k), tile.split_k) * tile.block_k
    split, block_r = cdiv(K, k_part), rank_block(R, x.dtype)
    planes = Planes.empty(split, x, group)
    call = Call(
        name="decode 4-bit with many adapters: planes",
        kernel=_multi_decode_4bit_planes_kernel,
        grid=(programs(group, routing, tile.block_n, block_r), split, 1),
        args={
            **shrink_arguments(x, group, routing, planes),
            **weight_arguments(weights),
            # In words (or bytes) by themselves: of K / 8 Triton would not know that it is a multiple of four.
            "row_words": K // codes,
            "k_part": k_part,
            "part_words": k_part // codes,
        },
        constants={
            "GROUP": columns,
            "SHIFT": (first.blocksize // columns).bit_length() - 1,
            "WORDS": words,
            "BLOCK_M": MAX_ROWS,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": tile.block_k,
            "BLOCK_R": block_r,
            "EVEN_K": K % tile.block_k == 0,
            "NUM_STAGES": tile.num_stages,
            "PRECISION": precision,
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        bytes=sum(w.nbytes for w in weights) + nbytes(x, planes.y, planes.s) + factor_bytes(group, M),
        flops=2 * M * K * (N + sum(a.max_rank for a in group)),
        # Elsewhere the assembler's own limit, four programs on a multiprocessor, costs no spill.
        options={**NO_FUSION, **(compile_options(arch) if 100 <= arch < 120 else {})},
    )
    return planes, call
