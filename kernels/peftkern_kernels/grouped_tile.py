"""Device functions that the grouped GEMMs share: what a tile's sums start from, and their store."""

from __future__ import annotations

import triton
import triton.language as tl

from .lora_expand import low_rank_product


@triton.jit
def expert_start(
    s_ptr, b_ptr, bias_ptr, slot, expert, rows, columns, R, stride_sm, stride_sr, stride_be, stride_bn, stride_br,
    stride_bias_e, stride_bias_n,
    DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """fp32 [BLOCK_M, BLOCK_N] = s[rows] B_e[columns]^T + b_e[columns], whichever there is; zeros where `slot` is -1."""
    if s_ptr is not None:
        ranks = tl.where(slot >= 0, R, 0)
        acc = low_rank_product(
            s_ptr, b_ptr + expert * stride_be, rows, columns, ranks, ranks, stride_sm, stride_sr, stride_bn, stride_br,
            DTYPE, BLOCK_M, BLOCK_N, BLOCK_R, PRECISION,
        )  # fmt: skip
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + expert * stride_bias_e + columns * stride_bias_n).to(tl.float32)
        acc += tl.where(slot >= 0, bias, 0.0)[None, :]
    return acc


@triton.jit
def store_rows(out_ptr, acc, rows, offs_m, length, offs_n, N, stride_om, stride_on):
    """Store a tile's rows that are the expert's: those behind them are another's."""
    out_ptrs = out_ptr + rows[:, None] * stride_om + offs_n[None, :] * stride_on
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(offs_m < length)[:, None] & (offs_n < N)[None, :])
