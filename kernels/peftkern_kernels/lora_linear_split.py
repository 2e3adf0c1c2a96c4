"""The frozen GEMM with the low-rank part, for few rows: K is split over programs, fp32 planes are summed in order.

With M = 128 rows an H200 has 32 tiles for 132 multiprocessors, and one program would walk all of the weight's K alone.
Here `split_k` programs share an output tile: each writes the fp32 plane of its part of x W^T; a second launch adds the
planes in a fixed order (same bits on every run), adds `keep / (1 - p) * (S B^T) + bias`, and rounds once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .dropout import Dropout
from .gemm_tables import Tile, rank_block
from .gemm_tile import accumulate_base, tile_of_program
from .launch import Call, cdiv, nbytes, scratch, strides
from .lora_expand import expand_arguments, expand_tile, triton_dtype
from .multi_tile import MixedFactor


@triton.jit(do_not_specialize=["M"])
def _base_planes_kernel(
    x_ptr, w_ptr, planes_ptr,  # [M, K] [N, K] -> fp32 [SPLIT, M, N], contiguous
    M, N, K, k_part, stride_xm, stride_xk, stride_wn, stride_wk,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid_m, pid_n = tile_of_program(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k_start = tl.program_id(1) * k_part
    acc = accumulate_base(
        tl.zeros((BLOCK_M, BLOCK_N), tl.float32), x_ptr, w_ptr, offs_m % M, offs_n % N, k_start,
        tl.minimum(k_start + k_part, K), stride_xm, stride_xk, stride_wn, stride_wk, BLOCK_K, EVEN_K, PRECISION,
    )  # fmt: skip
    plane_ptr = planes_ptr + tl.program_id(1).to(tl.int64) * M * N
    plane_ptrs = plane_ptr + offs_m[:, None] * N + offs_n[None, :]
    tl.store(plane_ptrs, acc, mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])


@triton.jit(do_not_specialize=["M", "threshold"])
def _sum_planes_kernel(
    planes_ptr, s_ptr, b_ptr, bias_ptr, seed_ptr, out_ptr,  # fp32 [SPLIT, M, N], [M, R] [N, R] [N] [1] -> [M, N]
    M, N, R, stride_sm, stride_sr, stride_bn, stride_br, stride_bias, stride_om, stride_on, threshold, keep_scale,
    ids_ptr, row_in_adapter_ptr, row_offset_ptr, rank_ptr,
    DTYPE: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, POOL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid_m, pid_n = tile_of_program(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, 1)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    plane_ptrs = planes_ptr + offs_m[:, None] * N + offs_n[None, :]
    base = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for plane in tl.static_range(SPLIT):  # unrolled, so that all loads are under way together
        base += tl.load(plane_ptrs + tl.cast(plane, tl.int64) * M * N, mask=mask, other=0.0)
    acc = expand_tile(
        s_ptr, b_ptr, bias_ptr, seed_ptr, offs_m, offs_m % M, pid_n * BLOCK_N, offs_n % N, R, stride_sm, stride_sr,
        stride_bn, stride_br, stride_bias, threshold, keep_scale,
        ids_ptr, row_in_adapter_ptr, row_offset_ptr, rank_ptr, DTYPE, BLOCK_M, BLOCK_N, BLOCK_R, POOL, PRECISION,
    )  # fmt: skip
    out_ptrs = out_ptr + offs_m[:, None] * stride_om + offs_n[None, :] * stride_on
    tl.store(out_ptrs, (base + acc).to(out_ptr.dtype.element_ty), mask=mask)


def split_calls(
    x: torch.Tensor,
    weight: torch.Tensor,
    s: torch.Tensor,
    b: torch.Tensor | MixedFactor,
    out: torch.Tensor,
    *,
    bias: torch.Tensor | None,
    dropout: Dropout | None,
    precision: str,
    tile: Tile,
) -> list[Call]:
    """The two launches for a given tile with `split_k` parts; arguments as in `lora_linear.base_plus_expand_calls`."""
    (M, N), K = out.shape, x.shape[1]
    k_part = cdiv(cdiv(K, tile.block_k), tile.split_k) * tile.block_k
    split = cdiv(K, k_part)
    planes = scratch(split, M, N, dtype=torch.float32, device=x.device)
    base = Call(
        name="base, K split",
        kernel=_base_planes_kernel,
        grid=(cdiv(M, tile.block_m) * cdiv(N, tile.block_n), split, 1),
        args={
            "x_ptr": x,
            "w_ptr": weight,
            "planes_ptr": planes,
            "M": M,
            "N": N,
            "K": K,
            "k_part": k_part,
            **strides(x, "xm", "xk"),
            **strides(weight, "wn", "wk"),
        },
        constants={
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": tile.block_k,
            "GROUP_M": tile.group_m,
            "EVEN_K": K % tile.block_k == 0,
            "PRECISION": precision,
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        bytes=nbytes(x, weight, planes),
        flops=2 * M * N * K,
    )
    total = sum_of_planes_call(
        planes, s, b, out, expand_arguments(s, b, bias, dropout), dtype=x.dtype, precision=precision
    )
    return [base, total]


def sum_of_planes_call(
    planes: torch.Tensor,
    s: torch.Tensor,
    b: torch.Tensor | MixedFactor,
    out: torch.Tensor,
    expand: dict[str, Any],
    *,
    dtype: torch.dtype,
    precision: str,
    narrow: bool = False,
    options: dict[str, Any] | None = None,
) -> Call:
    """The launch that writes the sum of fp32 `planes` [split, M, N], and the expand of s and b on top, to `out`.

    Args:
        expand: `expand_arguments` of s and b. dtype: what their product is taken in.
        narrow: as for `rank_block`. options: compile options.
    """
    split, M, N = planes.shape
    R = b.shape[1]
    block_m, block_n = 64, 32  # 64 rows at least: the least that Hopper's matrix instruction takes
    return Call(
        name="sum of planes + expand",
        kernel=_sum_planes_kernel,
        grid=(cdiv(M, block_m) * cdiv(N, block_n), 1, 1),
        args={**expand, "planes_ptr": planes, "out_ptr": out, "M": M, "N": N, **strides(out, "om", "on")},
        constants={
            "DTYPE": triton_dtype(dtype),
            "SPLIT": split,
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "BLOCK_R": rank_block(R, dtype, narrow=narrow),
            "PRECISION": precision,
        },
        num_warps=4,
        num_stages=1,
        options=options or {},
        bytes=nbytes(planes, s, b, expand["bias_ptr"], out),
        flops=2 * M * N * R + split * M * N,
    )
