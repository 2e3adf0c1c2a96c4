"""`out[t] = x[t] W_e^T + b_e + s[t] B_e^T`, e the expert of row t: all experts' GEMMs in one launch.

Rows come sorted by expert. A program takes one tile of a `Grouping`, rows of one expert, so that no row is moved and no
size is read on the host; the low-rank part is in the accumulator, so that out is written once and W + B A of an expert
never exists. The same kernel gives `dX = dY W_e + dS A_e` with weight := W.transpose(1, 2), b := A.transpose(1, 2).
Rows of no expert are written as zeros. On plain pointers, which take any strides; where operands are aligned, newer
architectures load them through descriptors (grouped_gemm_tma.py).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .gemm_tables import rank_block
from .gemm_tile import accumulate_base, tile_of_program
from .grouped_gemm_tma import _grouped_gemm_tma_kernel, takes_descriptors, tma_operands
from .grouped_tables import Tile, grouped_tile
from .grouped_tile import expert_start, store_rows
from .launch import Call, cdiv, compile_options, nbytes, strides
from .multi_tile import piece_of
from .reduction_tables import vectorizes


@triton.jit(do_not_specialize=["P"])
def _grouped_gemm_kernel(
    x_ptr, w_ptr, s_ptr, b_ptr, bias_ptr, tiles_ptr, out_ptr,  # [T, K] [E, N, K] [T, R] [E, N, R] [E, N] [3, P]
    P, N, K, R,
    stride_xm, stride_xk, stride_we, stride_wn, stride_wk, stride_sm, stride_sr, stride_be, stride_bn, stride_br,
    stride_bias_e, stride_bias_n, stride_om, stride_on,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid_m, pid_n = tile_of_program(tl.program_id(0), P * BLOCK_M, N, BLOCK_M, BLOCK_N, GROUP_M)
    slot, first, length = piece_of(tiles_ptr, P, pid_m)
    if length > 0:
        expert = tl.maximum(slot, 0).to(tl.int64)
        offs_m = tl.arange(0, BLOCK_M)
        # Rows past the expert's last are that one again: their products are never stored, and loads stay unpredicated.
        rows = first.to(tl.int64) + tl.minimum(offs_m, length - 1)
        offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        columns = offs_n % N
        acc = expert_start(
            s_ptr, b_ptr, bias_ptr, slot, expert, rows, columns, R, stride_sm, stride_sr, stride_be, stride_bn,
            stride_br, stride_bias_e, stride_bias_n, x_ptr.dtype.element_ty, BLOCK_M, BLOCK_N, BLOCK_R, PRECISION,
        )  # fmt: skip
        # Of rows without an expert nothing is added up: zeros are stored.
        acc = accumulate_base(
            acc, x_ptr, w_ptr + expert * stride_we, rows, columns, 0, tl.where(slot >= 0, K, 0), stride_xm, stride_xk,
            stride_wn, stride_wk, BLOCK_K, EVEN_K, PRECISION,
        )  # fmt: skip
        store_rows(out_ptr, acc, rows, offs_m, length, offs_n, N, stride_om, stride_on)


def stack_vectorizes(stack: torch.Tensor) -> bool:
    """Whether each matrix of a stack [E, rows, columns], or its transpose, is one whose rows `vectorizes`.

    Matrices that lie on each other, as those of an expanded one, are not: no descriptor takes them.
    """
    one = stack[0]
    apart = stack.stride(0) % 16 == 0 and stack.stride(0) >= one.numel()
    return apart and (vectorizes(one) or vectorizes(one.t()))


def gemm_tile(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, arch: int) -> Tile:
    """The tile that these operands take: its height is what a `Grouping` is made for."""
    aligned = vectorizes(x) and stack_vectorizes(weight) and vectorizes(out)
    return grouped_tile(arch=arch, dtype=x.dtype, T=x.shape[0], E=weight.shape[0], aligned=aligned)


def grouped_gemm_calls(
    x: torch.Tensor,
    weight: torch.Tensor,
    s: torch.Tensor | None,
    b: torch.Tensor | None,
    tiles: torch.Tensor,
    out: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    arch: int,
    precision: str = "ieee",
    tile: Tile,
) -> list[Call]:
    """Launches that write `out[t] = x[t] W_e^T + b_e + s[t] B_e^T`, and 0 for rows of no expert.

    Args:
        x: [T, K], rows sorted by expert. weight: [E, N, K], of x's dtype: fp32, fp16 or bf16. Any strides, fast where
            one is 1 and the others are multiples of 16.
        s: [T, R], S or dS with the scaling in it; None for no low-rank part. b: [E, N, R], any strides; fp32 masters
            are cast to x's dtype in registers.
        tiles: of a `Grouping` for the tile's rows.
        out: [T, N], any strides; every row is written.
        bias: [E, N]. arch: see `gemm_tables`. precision: `input_precision` of fp32 dots. tile: `gemm_tile`'s.

    Raises:
        ValueError: shapes that do not agree.
    """
    (T, N), (E, _, K) = out.shape, weight.shape
    if x.shape != (T, K) or weight.shape[1] != N:
        shapes = [list(t.shape) for t in (x, weight, out)]
        raise ValueError(f"x, weight, out: expected [T, K], [E, N, K] and [T, N], got {shapes}")
    if (s is None) != (b is None) or (s is not None and b is not None and b.shape != (E, N, s.shape[1])):
        given = [None if t is None else list(t.shape) for t in (s, b)]
        raise ValueError(f"s, b: expected [T, R] and [{E}, {N}, R], or neither, got {given}")
    if T == 0:
        return []
    P, R = tiles.shape[1], 0 if s is None else s.shape[1]
    wide_factor = b is not None and b.dtype.itemsize > x.dtype.itemsize
    present = min(E, T)
    kernel: Any = _grouped_gemm_kernel
    operands: dict[str, Any] = {"x_ptr": x, "w_ptr": weight, **strides(x, "xm", "xk")}
    operands |= strides(weight, "we", "wn", "wk")
    kinds: dict[str, Any] = {"EVEN_K": K % tile.block_k == 0}
    if tile.tma and takes_descriptors(x, weight):
        kernel = _grouped_gemm_tma_kernel
        operands, kinds = tma_operands(x, weight, tile)
    return [
        Call(
            name="base + expand of experts",
            kernel=kernel,
            grid=(P * cdiv(N, tile.block_n), 1, 1),
            args={
                **operands,
                "s_ptr": s,
                "b_ptr": b,
                "bias_ptr": bias,
                "tiles_ptr": tiles,
                "out_ptr": out,
                "P": P,
                "N": N,
                "K": K,
                "R": R,
                **strides(s, "sm", "sr"),
                **strides(b, "be", "bn", "br"),
                **strides(bias, "bias_e", "bias_n"),
                **strides(out, "om", "on"),
            },
            constants={
                "BLOCK_M": tile.block_m,
                "BLOCK_N": tile.block_n,
                "BLOCK_K": tile.block_k,
                "BLOCK_R": min(tile.block_r, rank_block(max(R, 1), x.dtype, narrow=wide_factor)),
                "GROUP_M": tile.group_m,
                **kinds,
                "PRECISION": precision,
            },
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            options=compile_options(arch),
            bytes=nbytes(x, s, out) + sum(nbytes(t) * present // E for t in (weight, b, bias) if t is not None),
            flops=2 * T * N * (K + R),
        )
    ]
