"""`out = dy deq(W) + keep / (1 - p) * (ds a)` with W in 4 bits, decoded inside the GEMM: backward, for few rows.

The backward half of lora_linear_4bit.py, which says why. Here W's rows are the contraction and a byte pairs two columns
of the result: there are two accumulators, for the even and for the odd columns, interleaved once at the store. A tile
is 256 columns wide, so that 128 contiguous bytes of each of W's rows are read.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .dropout import Dropout, upper_threshold
from .format_4bit import NO_FUSION, Packed4bit, load_codes
from .gemm_tables import Tile
from .gemm_tables_4bit import choose_transposed_tile_4bit, fused_4bit_fits, unit_of
from .gemm_tile import tile_of_program
from .gemm_tile_4bit import base_calls, decode_tile, start_scales, step_scales, weight_arguments
from .launch import Call, cdiv, is_aligned, nbytes, strides
from .lora_expand import expand_mask, expand_rank_block, expand_tile
from .multi_tile import MixedFactor


@triton.jit(do_not_specialize=["M", "threshold"])
def _base_4bit_transposed_kernel(
    dy_ptr, packed_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr,
    s_ptr, b_ptr, bias_ptr, seed_ptr, out_ptr,  # dS [M, R], A^T [K, R], None, [1] -> [M, K], or fp32 [parts, M, K]
    M, N, K, R, row_words, row_units, part_rows,
    stride_ym, stride_yn, stride_sm, stride_sr, stride_bn, stride_br, stride_bias, stride_om, stride_ok,
    threshold, keep_scale,
    ids_ptr, row_in_adapter_ptr, row_offset_ptr, rank_ptr,
    WORD: tl.constexpr, WORD_BYTES: tl.constexpr, UNIT: tl.constexpr, SHIFT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNITS: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr, EVEN_N: tl.constexpr, POOL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = dy_ptr.dtype.element_ty
    BLOCK_K: tl.constexpr = UNITS * UNIT
    HALF: tl.constexpr = BLOCK_K // 2
    WORDS: tl.constexpr = HALF // WORD_BYTES
    pid_m, pid_k = tile_of_program(tl.program_id(0), M, K, BLOCK_M, BLOCK_K, GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = offs_m % M
    if s_ptr is not None:
        if seed_ptr is not None:  # drawn before the accumulators take their registers
            words = expand_mask(
                seed_ptr, offs_m, rows, pid_k * BLOCK_K, ids_ptr, row_in_adapter_ptr, POOL, BLOCK_M, BLOCK_K
            )
            upper = upper_threshold(threshold)
            keep_even, keep_odd = (words << 16) >= upper, words >= upper
        columns = (pid_k * BLOCK_K + 2 * tl.arange(0, HALF)) % K  # K is even
        acc_even = expand_tile(
            s_ptr, b_ptr, None, None, offs_m, rows, 0, columns, R, stride_sm, stride_sr, stride_bn, stride_br, 0,
            0, 1.0,
            ids_ptr, row_in_adapter_ptr, row_offset_ptr, rank_ptr, DTYPE, BLOCK_M, HALF, BLOCK_R, POOL, PRECISION,
        )  # fmt: skip
        acc_odd = expand_tile(
            s_ptr, b_ptr, None, None, offs_m, rows, 0, columns + 1, R, stride_sm, stride_sr, stride_bn, stride_br, 0,
            0, 1.0,
            ids_ptr, row_in_adapter_ptr, row_offset_ptr, rank_ptr, DTYPE, BLOCK_M, HALF, BLOCK_R, POOL, PRECISION,
        )  # fmt: skip
        if seed_ptr is not None:
            acc_even = tl.where(keep_even, acc_even * keep_scale, 0.0)
            acc_odd = tl.where(keep_odd, acc_odd * keep_scale, 0.0)
    else:
        acc_even = tl.zeros((BLOCK_M, HALF), tl.float32)
        acc_odd = tl.zeros((BLOCK_M, HALF), tl.float32)

    start = tl.program_id(1) * part_rows
    stop = tl.minimum(start + part_rows, N)
    offs_n = start + tl.arange(0, BLOCK_N)
    # Words past a row's end wrap onto its start: their columns are not stored. A unit is whole 16-byte loads.
    offs_w = (pid_k * WORDS + tl.arange(0, WORDS)) % row_words
    offs_w = tl.max_contiguous(tl.multiple_of(offs_w, 16 // WORD_BYTES), 16 // WORD_BYTES)
    row_step = tl.cast(row_words, tl.int64)
    packed_ptrs = packed_ptr.to(tl.pointer_type(WORD)) + offs_n[:, None] * row_step + offs_w[None, :]
    dy_step = tl.cast(stride_yn, tl.int64)
    dy_ptrs = dy_ptr + rows[:, None] * stride_ym + offs_n[None, :] * dy_step

    codes = load_codes(code_ptr)
    # 32 bits for indices of units: `fused_4bit_fits` refuses what has more. Clamped, for scales are loaded ahead.
    units = ((pid_k * UNITS + tl.arange(0, UNITS)) % row_units).to(tl.int32)[None, :]  # [1, UNITS]
    last = N - 1
    next_scales, absmax, nested = start_scales(
        tl.minimum(offs_n, last)[:, None] * row_units + units,
        tl.minimum(offs_n + BLOCK_N, last)[:, None] * row_units + units,
        absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, SHIFT,
    )  # fmt: skip
    for n in range(start, stop, BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        if EVEN_N:
            packed = tl.load(packed_ptrs)  # [BLOCK_N, WORDS]
            dy = tl.load(dy_ptrs)  # [BLOCK_M, BLOCK_N]
        else:
            packed = tl.load(packed_ptrs, mask=(offs_n < stop)[:, None], other=0)
            dy = tl.load(dy_ptrs, mask=(offs_n < stop)[None, :], other=0.0)
        scales, next_scales, absmax, nested = step_scales(
            tl.minimum(offs_n, last)[:, None] * row_units + units,
            tl.minimum(offs_n + 2 * BLOCK_N, last)[:, None] * row_units + units,
            next_scales, absmax, nested, absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, SHIFT,
        )  # fmt: skip
        even, odd = decode_tile(packed, scales, codes, HALF, DTYPE)  # [BLOCK_N, HALF]
        acc_even = tl.dot(dy, even, acc_even, input_precision=PRECISION)
        acc_odd = tl.dot(dy, odd, acc_odd, input_precision=PRECISION)
        packed_ptrs += row_step * BLOCK_N
        dy_ptrs += dy_step * BLOCK_N
    acc = tl.interleave(acc_even.to(out_ptr.dtype.element_ty), acc_odd.to(out_ptr.dtype.element_ty))
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    out_ptr += tl.program_id(1).to(tl.int64) * M * K
    out_ptrs = out_ptr + offs_m[:, None] * stride_om + offs_k[None, :] * stride_ok
    tl.store(out_ptrs, acc, mask=(offs_m < M)[:, None] & (offs_k < K)[None, :])


def base_4bit_transposed_plus_expand_calls(
    dy: torch.Tensor,
    weight: Packed4bit,
    ds: torch.Tensor,
    a: torch.Tensor | MixedFactor,
    out: torch.Tensor,
    *,
    dropout: Dropout | None = None,
    arch: int,
    precision: str = "ieee",
    tile: Tile | None = None,
) -> list[Call]:
    """Launches that write `out[M, K] = dy[M, N] deq(weight)[N, K] + keep / (1 - p) * (ds[M, R] a[R, K])`.

    Args:
        dy: [M, N], fp16 or bf16; any strides, fast where rows are contiguous and 16-byte aligned.
        weight: see `Packed4bit`; decoded to dy's dtype.
        ds: dS with the scaling in it. a: [R, K], or a pool's `MixedFactor`. Both of any float dtype, cast to dy's in
            registers.
        out: written in its own dtype; any strides.
        dropout: mask by (row, column) of `out`. arch, precision: as for `base_4bit_plus_expand_calls`.
        tile: in place of the table's; `block_n` (columns of `out`) a multiple of `unit_of(K, blocksize)`.

    Raises:
        ValueError: `fused_4bit_fits` says that these kernels cannot take the weight.
    """
    (M, N), K = dy.shape, weight.K
    if reason := fused_4bit_fits(N, K, weight.blocksize, dy.dtype):
        raise ValueError(f"weight: {reason}")
    if M == 0:
        return []
    unit = unit_of(K, weight.blocksize)
    b = a if isinstance(a, MixedFactor) else a.t()
    tile = tile or choose_transposed_tile_4bit(
        arch, M, N, K, aligned=is_aligned(dy), dropout=dropout is not None
    )  # fmt: skip

    def call_of(target: torch.Tensor, expand: dict[str, Any], steps: int, parts: int) -> Call:
        arguments, constants = weight_arguments(weight, unit)
        return Call(
            name="4-bit base^T + expand" if parts == 1 else "4-bit base^T, N split",
            kernel=_base_4bit_transposed_kernel,
            grid=(cdiv(M, tile.block_m) * cdiv(K, tile.block_n), parts, 1),
            args={
                **arguments,
                **expand,
                "dy_ptr": dy,
                "out_ptr": target,
                "M": M,
                "part_rows": steps * tile.block_k,
                **strides(dy, "ym", "yn"),
                "stride_om": target.stride(-2),
                "stride_ok": target.stride(-1),
            },
            constants={
                **constants,
                "BLOCK_M": tile.block_m,
                "BLOCK_N": tile.block_k,
                "UNITS": tile.block_n // unit,
                "BLOCK_R": expand_rank_block(ds, b, dy.dtype, dropout, most=tile.block_r),
                "GROUP_M": tile.group_m,
                "EVEN_N": N % tile.block_k == 0,
                "PRECISION": precision,
            },
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            bytes=weight.nbytes + nbytes(dy, target, *((ds, a) if parts == 1 else ())),
            flops=2 * M * K * (N + (b.shape[1] if parts == 1 else 0)),
            options=dict(NO_FUSION),
        )

    return base_calls(
        call_of, ds, b, out, steps=cdiv(N, tile.block_k), split=tile.split_k, bias=None, dropout=dropout,
        dtype=dy.dtype, arch=arch, precision=precision,
    )  # fmt: skip
