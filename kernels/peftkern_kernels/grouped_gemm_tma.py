"""The GEMM over all experts with x and the stack of weights loaded through tensor descriptors, for sm_90 and later.

As grouped_gemm.py: the copy engine (TMA) moves whole tiles into shared memory. The stack has a descriptor of three axes
so that past an expert reads as zeros and not as the next one. A tile of x reads on into the next expert's rows:
what that gives is not stored. The stack is taken in either orientation: [E, N, K], or [E, K, N] row by row.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .gemm_tables import Tile
from .gemm_tile import tile_of_program
from .grouped_tile import expert_start, store_rows
from .launch import is_aligned
from .lora_expand import triton_dtype
from .lora_linear_tma import descriptor
from .multi_tile import piece_of


@triton.jit(do_not_specialize=["P"])
def _grouped_gemm_tma_kernel(
    x_desc, w_desc,  # [T, K], [E, N, K] or [E, K, N]: descriptors
    s_ptr, b_ptr, bias_ptr, tiles_ptr, out_ptr,  # [T, R] [E, N, R] [E, N] [3, P] -> [T, N]
    P, N, K, R, stride_sm, stride_sr, stride_be, stride_bn, stride_br, stride_bias_e, stride_bias_n,
    stride_om, stride_on,
    DTYPE: tl.constexpr, WEIGHT_IS_KN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid_m, pid_n = tile_of_program(tl.program_id(0), P * BLOCK_M, N, BLOCK_M, BLOCK_N, GROUP_M)
    slot, first, length = piece_of(tiles_ptr, P, pid_m)
    if length > 0:
        expert = tl.maximum(slot, 0)
        offs_m = tl.arange(0, BLOCK_M)
        rows = first.to(tl.int64) + tl.minimum(offs_m, length - 1)
        offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        column = (pid_n * BLOCK_N).to(tl.int32)  # descriptors count in int32
        acc = expert_start(
            s_ptr, b_ptr, bias_ptr, slot, expert.to(tl.int64), rows, offs_n % N, R, stride_sm, stride_sr,
            stride_be, stride_bn, stride_br, stride_bias_e, stride_bias_n, DTYPE, BLOCK_M, BLOCK_N, BLOCK_R, PRECISION,
        )  # fmt: skip
        if WEIGHT_IS_KN:  # as in lora_linear_tma.py
            acc = tl.where((offs_m < length)[:, None], acc, 0.0)
        for k in range(0, tl.where(slot >= 0, K, 0), BLOCK_K):
            x = x_desc.load([first, k])  # [BLOCK_M, BLOCK_K]
            if WEIGHT_IS_KN:
                w = w_desc.load([expert, k, column]).reshape(BLOCK_K, BLOCK_N)
            else:
                w = w_desc.load([expert, column, k]).reshape(BLOCK_N, BLOCK_K).T
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
        store_rows(out_ptr, acc, rows, offs_m, length, offs_n, N, stride_om, stride_on)


def takes_descriptors(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether x, and the matrices of the stack or their transposes, have rows that a descriptor can describe."""
    one = weight[0]
    apart = weight.stride(0) * weight.element_size() % 16 == 0 and weight.stride(0) >= one.numel()
    return is_aligned(x) and apart and (is_aligned(one) or is_aligned(one.t()))


def tma_operands(x: torch.Tensor, weight: torch.Tensor, tile: Tile) -> tuple[dict[str, Any], dict[str, Any]]:
    """The kernel's arguments and constants for x [T, K] and weight [E, N, K]."""
    weight_is_kn = not is_aligned(weight[0])
    stored, block = (weight, [1, tile.block_n, tile.block_k])
    if weight_is_kn:
        stored, block = weight.transpose(1, 2), [1, tile.block_k, tile.block_n]
    described = TensorDescriptor(stored, list(stored.shape), list(stored.stride()), block)
    arguments = {"x_desc": descriptor(x, tile.block_m, tile.block_k), "w_desc": described}
    return arguments, {"DTYPE": triton_dtype(x.dtype), "WEIGHT_IS_KN": weight_is_kn}
