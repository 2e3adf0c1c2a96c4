"""Device functions that the GEMM-shaped kernels share: which output tile a program owns, and its walk along K."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_of_program(pid, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(row tile, column tile) of a program, both int64: GROUP_M row tiles share a column tile before the next one."""
    programs_m = tl.cdiv(M, BLOCK_M)
    programs_n = tl.cdiv(N, BLOCK_N)
    per_group = GROUP_M * programs_n
    first_m = pid // per_group * GROUP_M
    group_m = min(programs_m - first_m, GROUP_M)
    pid_m = first_m + pid % per_group % group_m
    pid_n = pid % per_group // group_m
    return pid_m.to(tl.int64), pid_n.to(tl.int64)


@triton.jit
def halves(tile):
    """The left and right columns of a tile."""
    return tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def accumulate_base(
    acc, x_ptr, w_ptr, rows, columns, k_start, k_stop, stride_xm, stride_xk, stride_wn, stride_wk,
    BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + x[rows, k_start:k_stop] weight[columns, k_start:k_stop]^T; rows and columns lie inside the matrices.

    Rows past the edge were wrapped, not masked: their products land in elements that are never stored, and the loop's
    loads stay unpredicated. EVEN_K promises that BLOCK_K divides k_stop - k_start.
    """
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    x_ptrs = x_ptr + rows[:, None] * stride_xm + (k_start + offs_k)[None, :] * stride_xk
    w_ptrs = w_ptr + columns[None, :] * stride_wn + (k_start + offs_k)[:, None] * stride_wk
    x_step = tl.cast(stride_xk, tl.int64) * BLOCK_K
    w_step = tl.cast(stride_wk, tl.int64) * BLOCK_K
    for k in range(k_start, k_stop, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)  # [BLOCK_M, BLOCK_K]
            w = tl.load(w_ptrs)  # [BLOCK_K, BLOCK_N]
        else:
            x = tl.load(x_ptrs, mask=(offs_k < k_stop - k)[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=(offs_k < k_stop - k)[:, None], other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        x_ptrs += x_step
        w_ptrs += w_step
    return acc
