"""`out = x deq(W)^T + s b^T + bias` with W in 4 bits, decoded inside the GEMM: forward, for few and middling rows.

Writing W out in 16 bits and reading it back moves eight times the bytes of its codes; up to some hundred rows that is
longer than the product itself. Here a program decodes its tile of W in registers, on the way to the matrix instruction.
A byte holds a row's elements 2 j and 2 j + 1: the high nibbles are multiplied with x's even columns and the low ones
with its odd columns, into one accumulator. Decoded values are those of `dequantize_4bit`, so the result is that of
dequantizing first, up to the order of the sums. The expand `s b^T` starts the accumulator, as in lora_linear.py; where
tiles are few, K is split, as in lora_linear_split.py. The format's source: format_4bit.py. The backward half:
lora_linear_4bit_transposed.py.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .format_4bit import NO_FUSION, Packed4bit, load_codes
from .gemm_tables import Tile
from .gemm_tables_4bit import choose_tile_4bit, fused_4bit_fits, unit_of
from .gemm_tile import tile_of_program
from .gemm_tile_4bit import base_calls, decode_tile, start_scales, step_scales, weight_arguments
from .launch import Call, cdiv, is_aligned, nbytes, strides
from .lora_expand import expand_rank_block, expand_tile
from .lora_linear_4bit_transposed import base_4bit_transposed_plus_expand_calls
from .multi_tile import MixedFactor

__all__ = ["base_4bit_plus_expand_calls", "base_4bit_transposed_plus_expand_calls", "fused_4bit_fits"]


@triton.jit(do_not_specialize=["M", "threshold"])
def _base_4bit_kernel(
    x_ptr, packed_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr,
    s_ptr, b_ptr, bias_ptr, seed_ptr, out_ptr,  # [M, R] [N, R] [N] [1] -> [M, N], or fp32 [parts, M, N] if s is None
    M, N, K, R, row_words, row_units, part_units,
    stride_xm, stride_xk, stride_sm, stride_sr, stride_bn, stride_br, stride_bias, stride_om, stride_on,
    threshold, keep_scale,
    ids_ptr, row_in_adapter_ptr, row_offset_ptr, rank_ptr,
    WORD: tl.constexpr, WORD_BYTES: tl.constexpr, UNIT: tl.constexpr, SHIFT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNITS: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr, POOL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    HALF: tl.constexpr = UNITS * UNIT // 2  # bytes of a row in a step, and columns of each parity
    WORDS: tl.constexpr = HALF // WORD_BYTES
    pid_m, pid_n = tile_of_program(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows, columns = offs_m % M, offs_n % N
    if s_ptr is not None:
        acc = expand_tile(
            s_ptr, b_ptr, bias_ptr, seed_ptr, offs_m, rows, pid_n * BLOCK_N, columns, R, stride_sm, stride_sr,
            stride_bn, stride_br, stride_bias, threshold, keep_scale,
            ids_ptr, row_in_adapter_ptr, row_offset_ptr, rank_ptr, DTYPE, BLOCK_M, BLOCK_N, BLOCK_R, POOL, PRECISION,
        )  # fmt: skip
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)

    start = tl.program_id(1) * part_units
    stop = tl.minimum(start + part_units, row_units)
    offs_w = start * (UNIT // 2 // WORD_BYTES) + tl.arange(0, WORDS)
    packed_ptrs = packed_ptr.to(tl.pointer_type(WORD)) + columns[:, None] * row_words + offs_w[None, :]
    offs_k = start.to(tl.int64) * UNIT + tl.arange(0, UNITS * UNIT)
    x_ptrs = x_ptr + rows[:, None] * stride_xm + offs_k[None, :] * stride_xk
    x_step = tl.cast(stride_xk, tl.int64) * (UNITS * UNIT)

    codes = load_codes(code_ptr)
    # 32 bits for indices of units: `fused_4bit_fits` refuses what has more. Clamped, for scales are loaded ahead.
    units = columns.to(tl.int32)[:, None] * row_units + tl.arange(0, UNITS)[None, :]  # [BLOCK_N, UNITS]
    last = row_units - UNITS
    next_scales, absmax, nested = start_scales(
        units + start, units + tl.minimum(start + UNITS, last), absmax_ptr, nested_absmax_ptr, nested_code_ptr,
        offset_ptr, SHIFT,
    )  # fmt: skip
    for unit in range(start, stop, UNITS):
        packed = tl.load(packed_ptrs)  # [BLOCK_N, WORDS]
        x = tl.load(x_ptrs)  # [BLOCK_M, 2 * HALF]
        scales, next_scales, absmax, nested = step_scales(
            units + unit, units + tl.minimum(unit + 2 * UNITS, last), next_scales, absmax, nested, absmax_ptr,
            nested_absmax_ptr, nested_code_ptr, offset_ptr, SHIFT,
        )  # fmt: skip
        even, odd = decode_tile(packed, scales, codes, HALF, DTYPE)  # [BLOCK_N, HALF]
        x_even, x_odd = tl.split(tl.reshape(x, (BLOCK_M, HALF, 2)))
        acc = tl.dot(x_even, even.T, acc, input_precision=PRECISION)
        acc = tl.dot(x_odd, odd.T, acc, input_precision=PRECISION)
        packed_ptrs += WORDS
        x_ptrs += x_step
    out_ptr += tl.program_id(1).to(tl.int64) * M * N
    out_ptrs = out_ptr + offs_m[:, None] * stride_om + offs_n[None, :] * stride_on
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])


def base_4bit_plus_expand_calls(
    x: torch.Tensor,
    weight: Packed4bit,
    s: torch.Tensor,
    b: torch.Tensor | MixedFactor,
    out: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    arch: int,
    precision: str = "ieee",
    tile: Tile | None = None,
) -> list[Call]:
    """Launches that write `out[M, N] = x[M, K] deq(weight)[N, K]^T + s[M, R] b[N, R]^T + bias[N]`.

    Args:
        x: [M, K], fp16 or bf16; any strides, fast where rows are contiguous and 16-byte aligned.
        weight: see `Packed4bit`; decoded to x's dtype.
        s: S with the scaling in it. b: [N, R], or a pool's `MixedFactor`. Both of any float dtype, cast to x's in
            registers.
        out: written in its own dtype; any strides.
        bias: [N]. arch: 80, 86, 89, 90, 100, 120; 942, 1100; 0 for the interpreter.
        precision: as for the dense kernels, whose `input_precision` it is; 16-bit products do not depend on it.
        tile: in place of the table's; `block_k` a multiple of `unit_of(K, blocksize)` that divides K.

    Raises:
        ValueError: `fused_4bit_fits` says that these kernels cannot take the weight.
    """
    (M, K), N = x.shape, weight.N
    if reason := fused_4bit_fits(N, K, weight.blocksize, x.dtype):
        raise ValueError(f"weight: {reason}")
    if M == 0:
        return []
    unit = unit_of(K, weight.blocksize)
    tile = tile or choose_tile_4bit(arch, M, N, K, unit=unit, aligned=is_aligned(x))
    units = tile.block_k // unit

    def call_of(target: torch.Tensor, expand: dict[str, Any], steps: int, parts: int) -> Call:
        arguments, constants = weight_arguments(weight, unit)
        return Call(
            name="4-bit base + expand" if parts == 1 else "4-bit base, K split",
            kernel=_base_4bit_kernel,
            grid=(cdiv(M, tile.block_m) * cdiv(N, tile.block_n), parts, 1),
            args={
                **arguments,
                **expand,
                "x_ptr": x,
                "out_ptr": target,
                "M": M,
                "part_units": steps * units,
                **strides(x, "xm", "xk"),
                "stride_om": target.stride(-2),
                "stride_on": target.stride(-1),
            },
            constants={
                **constants,
                "BLOCK_M": tile.block_m,
                "BLOCK_N": tile.block_n,
                "UNITS": units,
                "BLOCK_R": expand_rank_block(s, b, x.dtype, None, most=tile.block_r),
                "GROUP_M": tile.group_m,
                "PRECISION": precision,
            },
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            bytes=weight.nbytes + nbytes(x, target, *((s, b, bias) if parts == 1 else ())),
            flops=2 * M * N * (K + (b.shape[1] if parts == 1 else 0)),
            options=dict(NO_FUSION),
        )

    return base_calls(
        call_of, s, b, out, steps=K // tile.block_k, split=tile.split_k, bias=bias, dropout=None, dtype=x.dtype,
        arch=arch, precision=precision,
    )  # fmt: skip
