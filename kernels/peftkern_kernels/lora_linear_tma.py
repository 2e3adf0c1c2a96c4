"""The frozen GEMM with the low-rank part in its accumulator, x and weight loaded through tensor descriptors.

`out = x W^T + bias + keep / (1 - p) * (S B^T)`, as in lora_linear.py, for sm_90 and later: the copy engine (TMA) moves
whole tiles into shared memory, so that no thread computes addresses and rows, columns and K past the edge read as zero.
S and B are small and any dtype; they come by plain loads. The weight is taken in either orientation: [N, K] row by row
(forward), or [K, N] row by row (dX, where the kernel's weight is W.t()).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .dropout import Dropout
from .gemm_tables import Tile
from .gemm_tile import tile_of_program
from .launch import Call, cdiv, is_aligned, nbytes, strides
from .lora_expand import expand_arguments, expand_rank_block, expand_tile, triton_dtype
from .multi_tile import MixedFactor


@triton.jit(do_not_specialize=["M", "threshold"])
def _lora_linear_tma_kernel(
    x_desc, w_desc, out_desc,  # [M, K], [N, K] or [K, N], [M, N]: descriptors; out_desc or out_ptr is None
    s_ptr, b_ptr, bias_ptr, seed_ptr, out_ptr,  # [M, R] [N, R] [N] [1] -> [M, N]
    M, N, K, R, stride_sm, stride_sr, stride_bn, stride_br, stride_bias, stride_om, stride_on, threshold, keep_scale,
    ids_ptr, row_in_adapter_ptr, row_offset_ptr, rank_ptr,
    DTYPE: tl.constexpr, WEIGHT_IS_KN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr, POOL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid_m, pid_n = tile_of_program(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row, column = (pid_m * BLOCK_M).to(tl.int32), (pid_n * BLOCK_N).to(tl.int32)  # descriptors count in int32
    acc = expand_tile(
        s_ptr, b_ptr, bias_ptr, seed_ptr, offs_m, offs_m % M, pid_n * BLOCK_N, offs_n % N, R, stride_sm, stride_sr,
        stride_bn, stride_br, stride_bias, threshold, keep_scale,
        ids_ptr, row_in_adapter_ptr, row_offset_ptr, rank_ptr, DTYPE, BLOCK_M, BLOCK_N, BLOCK_R, POOL, PRECISION,
    )  # fmt: skip
    if WEIGHT_IS_KN or POOL != "":
        # Where sums come straight from matrix instructions, the assembler has each one of the loop below wait for the
        # one before; not where other instructions have written them.
        acc = tl.where((offs_m < M)[:, None], acc, 0.0)
    for k in range(0, K, BLOCK_K):
        x = x_desc.load([row, k])  # [BLOCK_M, BLOCK_K]
        if WEIGHT_IS_KN:
            w = w_desc.load([k, column])  # [BLOCK_K, BLOCK_N]
        else:
            w = w_desc.load([column, k]).T
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    if out_desc is not None:
        out_desc.store([row, column], acc.to(DTYPE))
    else:
        out_ptrs = out_ptr + offs_m[:, None] * stride_om + offs_n[None, :] * stride_on
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])


def tma_calls(
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
    """The launch on descriptors, for a given tile; arguments as in `lora_linear.base_plus_expand_calls`.

    x must have 16-byte aligned rows, and weight or weight.t() too (`launch.is_aligned`); the others need not.
    """
    (M, N), K, R = out.shape, x.shape[1], b.shape[1]
    w_desc, weight_is_kn = weight_descriptor(weight, tile)
    through_descriptor = is_aligned(out) and out.dtype == x.dtype
    return [
        Call(
            name="base + expand",
            kernel=_lora_linear_tma_kernel,
            grid=(cdiv(M, tile.block_m) * cdiv(N, tile.block_n), 1, 1),
            args={
                **expand_arguments(s, b, bias, dropout),
                "x_desc": descriptor(x, tile.block_m, tile.block_k),
                "w_desc": w_desc,
                "out_desc": descriptor(out, tile.block_m, tile.block_n) if through_descriptor else None,
                "out_ptr": None if through_descriptor else out,
                "M": M,
                "N": N,
                "K": K,
                **strides(out, "om", "on"),
            },
            constants={
                "DTYPE": triton_dtype(x.dtype),
                "WEIGHT_IS_KN": weight_is_kn,
                "BLOCK_M": tile.block_m,
                "BLOCK_N": tile.block_n,
                "BLOCK_K": tile.block_k,
                "BLOCK_R": expand_rank_block(s, b, x.dtype, dropout),
                "GROUP_M": tile.group_m,
                "PRECISION": precision,
            },
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            bytes=nbytes(x, weight, s, b, bias, out),
            flops=2 * M * N * (K + R),
        )
    ]


def weight_descriptor(weight: torch.Tensor, tile: Tile) -> tuple[TensorDescriptor, bool]:
    """The descriptor of a weight [N, K] as it is stored, and whether that is [K, N]: weight or weight.t() has aligned
    rows."""
    if is_aligned(weight):
        return descriptor(weight, tile.block_n, tile.block_k), False
    return descriptor(weight.t(), tile.block_k, tile.block_n), True


def descriptor(matrix: torch.Tensor, block_rows: int, block_columns: int) -> TensorDescriptor:
    """A host-side descriptor of a row-contiguous matrix, read or written in tiles."""
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [block_rows, block_columns])
