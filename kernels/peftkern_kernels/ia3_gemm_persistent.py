"""The GEMM with IA3 in its epilogue by persistent programs, one for each multiprocessor, for sm_90.

As ia3_gemm.py, with the loop of lora_linear_persistent.py: a program walks the steps of all its tiles in one loop, so
that the first loads of a tile are under way while the one before it is scaled and stored. A whole tile of x beside the
sums would not fit into the registers, nor would its copy beside four stages into shared memory: an epilogue goes by
halves of the columns, or by quarters where there is x. A quarter of x is loaded while the one before it is multiplied.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .gemm_tables import Tile
from .gemm_tile import halves, tile_of_program
from .launch import Call, cdiv
from .lora_expand import triton_dtype
from .lora_linear_persistent import multiprocessors
from .lora_linear_tma import descriptor, weight_descriptor
from .overlap import begin, overlap_options, overlaps


@triton.jit
def _vector(pointer, column, N, stride, COLUMNS: tl.constexpr):
    """A vector's elements that belong to the columns from `column` on, in fp32; past N some others."""
    columns = (tl.cast(column, tl.int64) + tl.arange(0, COLUMNS)) % N
    return tl.load(pointer + columns * stride).to(tl.float32)


@triton.jit
def _store_half(acc, scale, bias, out_desc, z_desc, row, column, DTYPE: tl.constexpr):
    """z = acc + bias and z * scale at (row, column): whichever is there."""
    if bias is not None:
        acc += bias[None, :]
    if z_desc is not None:
        z_desc.store([row, column], acc.to(DTYPE))
    if out_desc is not None:
        out_desc.store([row, column], (acc * scale[None, :]).to(DTYPE))


@triton.jit
def _store_tile(
    acc, l_ptr, bias_ptr, out_desc, z_desc, row, column, N, stride_l, stride_bias, DTYPE: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    """The epilogue without x, by halves."""
    left_bias = None
    right_bias = None
    if bias_ptr is not None:
        left_bias = _vector(bias_ptr, column, N, stride_bias, HALF)
        right_bias = _vector(bias_ptr, column + HALF, N, stride_bias, HALF)
    left_scale = _vector(l_ptr, column, N, stride_l, HALF)
    right_scale = _vector(l_ptr, column + HALF, N, stride_l, HALF)
    left, right = halves(acc)
    _store_half(left, left_scale, left_bias, out_desc, z_desc, row, column, DTYPE)
    _store_half(right, right_scale, right_bias, out_desc, z_desc, row, column + HALF, DTYPE)


@triton.jit
def _quarter(x_ptr, row, column, M, N, stride, BLOCK_M: tl.constexpr, COLUMNS: tl.constexpr):
    """Pointers to a quarter of a tile, and which of them lie inside the matrix."""
    rows = tl.cast(row, tl.int64) + tl.arange(0, BLOCK_M)
    columns = tl.cast(column, tl.int64) + tl.arange(0, COLUMNS)
    mask = (rows < M)[:, None] & (columns < N)[None, :]
    return x_ptr + rows[:, None] * stride + columns[None, :], mask  # [BLOCK_M, COLUMNS]


@triton.jit
def _sum_quarter(
    z, x, l_ptr, bias_ptr, planes_ptr, out_ptr, z_ptr, row, column, M, N, stride_l, stride_bias, stride_om, stride_zm,
    BLOCK_M: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The sums over rows of z * x, as the row tile's part of its plane; z * scale and z, whichever is there."""
    scale = _vector(l_ptr, column, N, stride_l, COLUMNS)
    if bias_ptr is not None:
        z += _vector(bias_ptr, column, N, stride_bias, COLUMNS)[None, :]
    columns = tl.cast(column, tl.int64) + tl.arange(0, COLUMNS)
    # Rows past M are zero in both factors, unless the weight or the bias is infinite.
    inside = (row + tl.arange(0, BLOCK_M) < M)[:, None]
    sums = tl.sum(tl.where(inside, z * x.to(tl.float32), 0.0), 0)
    tl.store(planes_ptr + tl.cast(row // BLOCK_M, tl.int64) * N + columns, sums, mask=columns < N)
    if z_ptr is not None:
        z_ptrs, mask = _quarter(z_ptr, row, column, M, N, stride_zm, BLOCK_M, COLUMNS)
        tl.store(z_ptrs, z.to(z_ptr.dtype.element_ty), mask=mask)
    if out_ptr is not None:
        out_ptrs, mask = _quarter(out_ptr, row, column, M, N, stride_om, BLOCK_M, COLUMNS)
        tl.store(out_ptrs, (z * scale[None, :]).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sum_tile(
    acc, l_ptr, bias_ptr, x_ptr, planes_ptr, out_ptr, z_ptr, row, column, M, N, stride_l, stride_bias, stride_xm,
    stride_om, stride_zm, BLOCK_M: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """The epilogue with x, by quarters: the next one's x is always under way, the first two's while acc is cut up."""
    x_ptrs, mask = _quarter(x_ptr, row, column, M, N, stride_xm, BLOCK_M, PART)
    x = tl.load(x_ptrs, mask=mask, other=0.0)
    x_ptrs, mask = _quarter(x_ptr, row, column + PART, M, N, stride_xm, BLOCK_M, PART)
    ahead = tl.load(x_ptrs, mask=mask, other=0.0)
    left, right = halves(acc)
    quarters = halves(left) + halves(right)
    for i in tl.static_range(4):
        _sum_quarter(
            quarters[i], x, l_ptr, bias_ptr, planes_ptr, out_ptr, z_ptr, row, column + i * PART, M, N,
            stride_l, stride_bias, stride_om, stride_zm, BLOCK_M, PART,
        )  # fmt: skip
        x = ahead
        if i < 2:
            x_ptrs, mask = _quarter(x_ptr, row, column + (i + 2) * PART, M, N, stride_xm, BLOCK_M, PART)
            ahead = tl.load(x_ptrs, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["M"])
def _ia3_gemm_persistent_kernel(
    a_desc, w_desc, out_desc, z_desc,  # [M, K], [N, K] or [K, N] -> [M, N] [M, N]: descriptors
    l_ptr, bias_ptr, x_ptr, planes_ptr, out_ptr, z_ptr,  # [N] [N] [M, N] -> [row tiles, 1, N] [M, N] [M, N]
    M, N, K, stride_l, stride_bias, stride_xm, stride_om, stride_zm,
    DTYPE: tl.constexpr, WEIGHT_IS_KN: tl.constexpr, PROGRAMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    begin(OVERLAP, LET_NEXT=False)
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    steps = tl.cdiv(K, BLOCK_K)
    tile = tl.program_id(0) - PROGRAMS
    step = -1
    row = 0
    column = 0
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(0, tl.cdiv(tiles - tl.program_id(0), PROGRAMS) * steps):
        # Apart from the rest of a tile's work, so that loads of later steps, and of the next tile, are issued early.
        step = tl.where(step == steps - 1, 0, step + 1)
        if step == 0:
            tile += PROGRAMS
            pid_m, pid_n = tile_of_program(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
            row, column = (pid_m * BLOCK_M).to(tl.int32), (pid_n * BLOCK_N).to(tl.int32)  # descriptors count in int32
        a = a_desc.load([row, step * BLOCK_K])  # [BLOCK_M, BLOCK_K]
        if WEIGHT_IS_KN:
            w = w_desc.load([step * BLOCK_K, column])  # [BLOCK_K, BLOCK_N]
        else:
            w = w_desc.load([column, step * BLOCK_K]).T
        acc = tl.dot(a, w, acc, input_precision=PRECISION)
        if step == steps - 1:
            if x_ptr is not None:
                _sum_tile(
                    acc, l_ptr, bias_ptr, x_ptr, planes_ptr, out_ptr, z_ptr, row, column, M, N, stride_l, stride_bias,
                    stride_xm, stride_om, stride_zm, BLOCK_M, BLOCK_N // 4,
                )  # fmt: skip
            else:
                _store_tile(
                    acc, l_ptr, bias_ptr, out_desc, z_desc, row, column, N, stride_l, stride_bias, DTYPE, BLOCK_N // 2
                )
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)


UNIT_STRIDES = ("stride_xn", "stride_on", "stride_zn")


def persistent_calls(
    a: torch.Tensor, weight: torch.Tensor, epilogue: dict[str, Any], *, precision: str, tile: Tile, arch: int
) -> list[Call]:
    """The launch of persistent programs, for a given tile; arguments as in `ia3_gemm.ia3_gemm_calls`.

    a, weight or weight.t(), x, out and z must have 16-byte aligned rows (`launch.is_aligned`); out and z a's dtype.
    """
    (M, K), N = a.shape, weight.shape[0]
    w_desc, weight_is_kn = weight_descriptor(weight, tile)
    stored = {"out": epilogue["out_ptr"], "z": epilogue["z_ptr"]}
    if epilogue["x_ptr"] is None:  # whole halves through shared memory, by the copy engine
        part = tile.block_n // 2
        descriptors = {f"{n}_desc": None if t is None else descriptor(t, tile.block_m, part) for n, t in stored.items()}
        where = {**descriptors, "out_ptr": None, "z_ptr": None}
    else:
        where = {"out_desc": None, "z_desc": None}
    processors = multiprocessors(a.device, arch)
    return [
        Call(
            name="GEMM + scale",
            kernel=_ia3_gemm_persistent_kernel,
            grid=(min(cdiv(M, tile.block_m) * cdiv(N, tile.block_n), processors), 1, 1),
            args={
                **{name: value for name, value in epilogue.items() if name not in UNIT_STRIDES},
                **where,
                "a_desc": descriptor(a, tile.block_m, tile.block_k),
                "w_desc": w_desc,
                "M": M,
                "N": N,
                "K": K,
            },
            constants={
                "DTYPE": triton_dtype(a.dtype),
                "WEIGHT_IS_KN": weight_is_kn,
                "PROGRAMS": processors,  # whatever M is, or each new length would be compiled anew
                "BLOCK_M": tile.block_m,
                "BLOCK_N": tile.block_n,
                "BLOCK_K": tile.block_k,
                "GROUP_M": tile.group_m,
                "PRECISION": precision,
                "OVERLAP": overlaps(arch),
            },
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            options=overlap_options(arch),
        )
    ]
