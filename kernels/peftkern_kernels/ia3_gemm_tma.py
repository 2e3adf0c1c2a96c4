"""The GEMM with IA3 in its epilogue, both operands loaded through tensor descriptors, for sm_90 and later.

As ia3_gemm.py, whose epilogue it shares: the copy engine (TMA) moves whole tiles of A and W into shared memory. The
weight is taken in either orientation: [N, K] row by row (forward), or [K, N] row by row (dX, where the kernel's weight
is W.t()).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .gemm_tables import Tile
from .gemm_tile import tile_of_program
from .ia3_gemm import ia3_epilogue
from .launch import Call, cdiv
from .lora_linear_tma import descriptor, weight_descriptor


@triton.jit(do_not_specialize=["M"])
def _ia3_gemm_tma_kernel(
    a_desc, w_desc,  # [M, K], [N, K] or [K, N]: descriptors
    l_ptr, bias_ptr, x_ptr, out_ptr, z_ptr, planes_ptr,
    M, N, K, stride_l, stride_bias, stride_xm, stride_xn, stride_om, stride_on, stride_zm, stride_zn,
    WEIGHT_IS_KN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid_m, pid_n = tile_of_program(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    row, column = (pid_m * BLOCK_M).to(tl.int32), (pid_n * BLOCK_N).to(tl.int32)  # descriptors count in int32
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        a = a_desc.load([row, k])  # [BLOCK_M, BLOCK_K]
        if WEIGHT_IS_KN:
            w = w_desc.load([k, column])  # [BLOCK_K, BLOCK_N]
        else:
            w = w_desc.load([column, k]).T
        acc = tl.dot(a, w, acc, input_precision=PRECISION)
    ia3_epilogue(
        acc, l_ptr, bias_ptr, x_ptr, out_ptr, z_ptr, planes_ptr, pid_m, pid_n, M, N,
        stride_l, stride_bias, stride_xm, stride_xn, stride_om, stride_on, stride_zm, stride_zn,
        BLOCK_M, BLOCK_N, PARTS,
    )  # fmt: skip


def tma_calls(
    a: torch.Tensor, weight: torch.Tensor, epilogue: dict[str, Any], *, precision: str, tile: Tile
) -> list[Call]:
    """The launch on descriptors, for a given tile; arguments as in `ia3_gemm.ia3_gemm_calls`.

    a must have 16-byte aligned rows, and weight or weight.t() too (`launch.is_aligned`); the others need not.
    """
    (M, K), N = a.shape, weight.shape[0]
    w_desc, weight_is_kn = weight_descriptor(weight, tile)
    return [
        Call(
            name="GEMM + scale",
            kernel=_ia3_gemm_tma_kernel,
            grid=(cdiv(M, tile.block_m) * cdiv(N, tile.block_n), 1, 1),
            args={
                **epilogue,
                "a_desc": descriptor(a, tile.block_m, tile.block_k),
                "w_desc": w_desc,
                "M": M,
                "N": N,
                "K": K,
            },
            constants={
                "WEIGHT_IS_KN": weight_is_kn,
                "BLOCK_M": tile.block_m,
                "BLOCK_N": tile.block_n,
                "BLOCK_K": tile.block_k,
                "GROUP_M": tile.group_m,
                "PARTS": 2 if tile.block_n >= 256 else 1,
                "PRECISION": precision,
            },
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    ]
