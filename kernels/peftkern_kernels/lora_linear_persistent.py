"""The frozen GEMM with the low-rank part in its accumulator, by persistent programs: one for each multiprocessor.

`out = x W^T + bias + S B^T`, as in lora_linear_tma.py. There a program does one tile and ends, so that each tile begins
with an empty pipeline and ends with a store that nothing hides. Here a program walks its tiles in a single loop over
all their steps of K: while one tile is finished, its expand added and stored, the loads of the next one are under way.

For ranks up to 64, and without dropout: the mask falls on the low-rank part alone, which would need an accumulator
beside the tile's.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from .gemm_tables import MULTIPROCESSORS, Tile, rank_block
from .gemm_tile import tile_of_program
from .launch import Call, cdiv, nbytes, strides
from .lora_expand import triton_dtype
from .lora_linear_tma import descriptor, weight_descriptor
from .reduction_tables import vectorizes

MOST_RANK = 64


@triton.jit
def scale_columns(u, c_ptr, bias_ptr, column, N, stride_bias, COLUMNS: tl.constexpr):
    """c * u + bias of a tile whose columns begin at `column`."""
    columns = (tl.cast(column, tl.int64) + tl.arange(0, COLUMNS)) % N
    u = u * tl.load(c_ptr + columns)[None, :]
    if bias_ptr is not None:
        u += tl.load(bias_ptr + columns * stride_bias).to(tl.float32)[None, :]
    return u


@triton.jit
def finish_tile(
    acc, s_ptr, b_ptr, bias_ptr, out_desc, row, column, M, N, R, stride_sm, stride_sr, stride_bn, stride_br,
    stride_bias, DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr, c_ptr=None, scaled_desc=None,
):  # fmt: skip
    """Add expand and bias to the sums of the tile at (row, column), and store it.

    With c_ptr [N] the bias waits for DoRA: the tile u without it goes to out_desc, where there is one, and c * u + bias
    to scaled_desc.
    """
    rows = (tl.cast(row, tl.int64) + tl.arange(0, BLOCK_M)) % M
    columns = (tl.cast(column, tl.int64) + tl.arange(0, BLOCK_N)) % N
    offs_r = tl.arange(0, BLOCK_R).to(tl.int64)
    mask_r = offs_r < R
    s_ptrs = s_ptr + rows[:, None] * stride_sm + offs_r[None, :] * stride_sr
    b_ptrs = b_ptr + columns[None, :] * stride_bn + offs_r[:, None] * stride_br
    s = tl.load(s_ptrs, mask=mask_r[None, :], other=0.0).to(DTYPE)  # [BLOCK_M, BLOCK_R]
    b = tl.load(b_ptrs, mask=mask_r[:, None], other=0.0).to(DTYPE)  # [BLOCK_R, BLOCK_N]
    acc = tl.dot(s, b, acc, input_precision=PRECISION)
    if bias_ptr is not None and c_ptr is None:
        acc += tl.load(bias_ptr + columns * stride_bias).to(tl.float32)[None, :]
    # In two halves, which need half the shared memory: room for a third stage of loads.
    halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
    left, right = tl.split(halves)
    if out_desc is not None:
        out_desc.store([row, column], left.to(DTYPE))
        out_desc.store([row, column + BLOCK_N // 2], right.to(DTYPE))
    if c_ptr is not None:
        left = scale_columns(left, c_ptr, bias_ptr, column, N, stride_bias, BLOCK_N // 2)
        scaled_desc.store([row, column], left.to(DTYPE))
        right = scale_columns(right, c_ptr, bias_ptr, column + BLOCK_N // 2, N, stride_bias, BLOCK_N // 2)
        scaled_desc.store([row, column + BLOCK_N // 2], right.to(DTYPE))


@triton.jit(do_not_specialize=["M"])
def _lora_linear_persistent_kernel(
    x_desc, w_desc, out_desc, scaled_desc,  # [M, K], [N, K] or [K, N], [M, N], [M, N]: descriptors
    s_ptr, b_ptr, bias_ptr, c_ptr,  # [M, R] [N, R] [N] [N]
    M, N, K, R, stride_sm, stride_sr, stride_bn, stride_br, stride_bias,
    DTYPE: tl.constexpr, WEIGHT_IS_KN: tl.constexpr, PROGRAMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
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
        x = x_desc.load([row, step * BLOCK_K])  # [BLOCK_M, BLOCK_K]
        if WEIGHT_IS_KN:
            w = w_desc.load([step * BLOCK_K, column])  # [BLOCK_K, BLOCK_N]
        else:
            w = w_desc.load([column, step * BLOCK_K]).T
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        if step == steps - 1:
            finish_tile(
                acc, s_ptr, b_ptr, bias_ptr, out_desc, row, column, M, N, R, stride_sm, stride_sr, stride_bn, stride_br,
                stride_bias, DTYPE, BLOCK_M, BLOCK_N, BLOCK_R, PRECISION, c_ptr, scaled_desc,
            )  # fmt: skip
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)


@functools.cache
def multiprocessors(device: torch.device, arch: int) -> int:
    """Those of a GPU: with more programs than run at once, a second, almost empty wave would double the time.

    Where there is no GPU, those of the architecture's usual part (of sm_90 132; some cards have 78 or 114).
    """
    if device.type != "cuda":
        return MULTIPROCESSORS.get(arch, 64)
    return torch.cuda.get_device_properties(device).multi_processor_count


def stays_with(x: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether a factor [N, R] beside x is thin enough: more would spill. (Two products, one after the other, would not,
    but with a second one the assembler has every matrix instruction of the main loop wait for the one before.)"""
    most = MOST_RANK if vectorizes(b) or vectorizes(b.t()) else 16
    if bias is not None and b.dtype.itemsize > x.dtype.itemsize:
        most = min(most, MOST_RANK // 2)
    return b.shape[1] <= most


def persistent_calls(
    x: torch.Tensor,
    weight: torch.Tensor,
    s: torch.Tensor,
    b: torch.Tensor,
    out: torch.Tensor | None,
    *,
    bias: torch.Tensor | None,
    precision: str,
    tile: Tile,
    arch: int,
    c: torch.Tensor | None = None,
    scaled: torch.Tensor | None = None,
) -> list[Call]:
    """The launch of persistent programs, for a given tile; arguments as in `lora_linear.base_plus_expand_calls`,
    without dropout. With c [N] contiguous fp32, `out` (which may then be None) is without the bias and
    `scaled = c * out + bias`.

    x, weight or weight.t(), out and scaled must have 16-byte aligned rows (`launch.is_aligned`), and the last two x's
    dtype.
    """
    M, (N, R), K = x.shape[0], b.shape, x.shape[1]
    w_desc, weight_is_kn = weight_descriptor(weight, tile)
    tiles = cdiv(M, tile.block_m) * cdiv(N, tile.block_n)
    processors = multiprocessors(x.device, arch)
    block_r = rank_block(b.shape[1], x.dtype)
    return [
        Call(
            name="base + expand",
            kernel=_lora_linear_persistent_kernel,
            grid=(min(tiles, processors), 1, 1),
            args={
                "s_ptr": s,
                "b_ptr": b,
                "bias_ptr": bias,
                "c_ptr": c,
                "x_desc": descriptor(x, tile.block_m, tile.block_k),
                "w_desc": w_desc,
                "out_desc": None if out is None else descriptor(out, tile.block_m, tile.block_n // 2),
                "scaled_desc": None if scaled is None else descriptor(scaled, tile.block_m, tile.block_n // 2),
                "M": M,
                "N": N,
                "K": K,
                "R": R,
                **strides(s, "sm", "sr"),
                **strides(b, "bn", "br"),
                **strides(bias, "bias"),
            },
            constants={
                "DTYPE": triton_dtype(x.dtype),
                "WEIGHT_IS_KN": weight_is_kn,
                "PROGRAMS": processors,  # whatever M is, or each new length would be compiled anew
                "BLOCK_M": tile.block_m,
                "BLOCK_N": tile.block_n,
                "BLOCK_K": tile.block_k,
                "BLOCK_R": block_r,
                "GROUP_M": tile.group_m,
                "PRECISION": precision,
            },
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            bytes=nbytes(x, weight, s, b, bias, c, out, scaled),
            flops=2 * M * N * (K + R),
        )
    ]
