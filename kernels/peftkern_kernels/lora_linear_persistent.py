"""The frozen GEMM with the low-rank part in its accumulator, by persistent programs: one for each multiprocessor.

    out = x W^T + bias + s b^T = [x | s] [W | b]^T + bias

so s and b are the last steps of the contraction: their tiles come through descriptors of their own, but by the same
loop, and as early as any other's. Where the rank is no multiple of BLOCK_K, the copy engine fills the rest with zeros.

In lora_linear_tma.py a program does one tile and ends, so that each tile begins with an empty pipeline and ends with a
store that nothing hides. Here a program walks its tiles in a single loop over all their steps: while one tile is
finished and stored, the loads of the next one are under way.

Dropout masks the low-rank part alone, which then cannot be further steps: it is what the sums of a tile begin with,
made while the tile's first loads are under way. With more than 16 ranks that takes more shared memory than there is.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from .dropout import Dropout, drop_by_words, mask_words
from .gemm_tables import MULTIPROCESSORS, Tile
from .gemm_tile import halves, tile_of_program
from .launch import Call, cdiv, nbytes, strides
from .lora_expand import triton_dtype
from .lora_factor import as_weight
from .lora_linear_tma import descriptor, weight_descriptor
from .overlap import begin, overlap_options, overlaps, wait_late

MOST_MASKED_RANK = 16


@triton.jit
def _scale_columns(u, c_ptr, bias_ptr, column, N, stride_bias, COLUMNS: tl.constexpr):
    """c * u + bias of a tile whose columns begin at `column`."""
    columns = (tl.cast(column, tl.int64) + tl.arange(0, COLUMNS)) % N
    u = u * tl.load(c_ptr + columns)[None, :]
    if bias_ptr is not None:
        u += tl.load(bias_ptr + columns * stride_bias).to(tl.float32)[None, :]
    return u


@triton.jit
def _store_tile(
    acc, bias_ptr, c_ptr, out_desc, scaled_desc, row, column, N, stride_bias,
    DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add the bias to the sums of the tile at (row, column), and store it.

    With c_ptr [N] the bias waits for DoRA: the tile u without it goes to out_desc, where there is one, and c * u + bias
    to scaled_desc.
    """
    if bias_ptr is not None and c_ptr is None:
        columns = (tl.cast(column, tl.int64) + tl.arange(0, BLOCK_N)) % N
        acc += tl.load(bias_ptr + columns * stride_bias).to(tl.float32)[None, :]
    # In two halves, which need half the shared memory: room for a third stage of loads.
    left, right = halves(acc)
    if out_desc is not None:
        out_desc.store([row, column], left.to(DTYPE))
        out_desc.store([row, column + BLOCK_N // 2], right.to(DTYPE))
    if c_ptr is not None:
        left = _scale_columns(left, c_ptr, bias_ptr, column, N, stride_bias, BLOCK_N // 2)
        scaled_desc.store([row, column], left.to(DTYPE))
        right = _scale_columns(right, c_ptr, bias_ptr, column + BLOCK_N // 2, N, stride_bias, BLOCK_N // 2)
        scaled_desc.store([row, column + BLOCK_N // 2], right.to(DTYPE))


@triton.jit
def _masked_start(
    s_ptr, b_ptr, seed_ptr, tile, M, N, R, stride_sm, stride_sr, stride_bn, stride_br, threshold, keep_scale,
    DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What the sums of a tile begin with where dropout masks the low-rank part: keep * keep_scale * (s b^T)."""
    pid_m, pid_n = tile_of_program(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    column = pid_n * BLOCK_N
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    rows, columns = offs_m % M, (column + tl.arange(0, BLOCK_N)) % N
    offs_r = tl.arange(0, BLOCK_R).to(tl.int64)
    mask_r = offs_r < R
    seed = tl.load(seed_ptr)
    s_ptrs = s_ptr + rows[:, None] * stride_sm + offs_r[None, :] * stride_sr
    b_ptrs = b_ptr + columns[None, :] * stride_bn + offs_r[:, None] * stride_br
    s = tl.load(s_ptrs, mask=mask_r[None, :], other=0.0).to(DTYPE)  # [BLOCK_M, BLOCK_R]
    b = tl.load(b_ptrs, mask=mask_r[:, None], other=0.0).to(DTYPE)  # [BLOCK_R, BLOCK_N]
    product = tl.dot(s, b, input_precision=PRECISION) * keep_scale
    # In two halves, whose words pass through half the shared memory.
    HALF: tl.constexpr = BLOCK_N // 2
    left, right = halves(product)
    left = drop_by_words(left, mask_words(seed, offs_m, column, BLOCK_M, HALF), threshold, BLOCK_M, HALF)
    right = drop_by_words(right, mask_words(seed, offs_m, column + HALF, BLOCK_M, HALF), threshold, BLOCK_M, HALF)
    return tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), (BLOCK_M, BLOCK_N))


@triton.jit(do_not_specialize=["M", "R", "threshold", "wait_step"])
def _lora_linear_persistent_kernel(
    x_desc, w_desc, s_desc, b_desc,  # [M, K], [N, K] or [K, N], [M, R], [N, R] or [R, N]: descriptors
    out_desc, scaled_desc, bias_ptr, c_ptr,  # [M, N], [M, N]: descriptors; [N] [N]
    s_ptr, b_ptr, seed_ptr,  # [M, R] [N, R] [1] with dropout, in place of their descriptors; else None
    M, N, K, R, stride_bias, stride_sm, stride_sr, stride_bn, stride_br, threshold, keep_scale, wait_step,
    DTYPE: tl.constexpr, WEIGHT_IS_KN: tl.constexpr, PROGRAMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    if wait_step is None:
        begin(OVERLAP, LET_NEXT=False)
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    base_steps = tl.cdiv(K, BLOCK_K)
    steps = base_steps
    if seed_ptr is None:
        steps += tl.cdiv(R, BLOCK_K)
    tile = tl.program_id(0) - PROGRAMS
    step = -1
    row = 0
    column = 0
    if seed_ptr is None:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    else:
        acc = _masked_start(
            s_ptr, b_ptr, seed_ptr, tl.program_id(0), M, N, R, stride_sm, stride_sr, stride_bn, stride_br, threshold,
            keep_scale, DTYPE, BLOCK_M, BLOCK_N, BLOCK_R, GROUP_M, PRECISION,
        )  # fmt: skip
    for turn in range(0, tl.cdiv(tiles - tl.program_id(0), PROGRAMS) * steps):
        if wait_step is not None:  # noqa: SIM102 - a static test of its own
            if turn == wait_step:
                wait_late(OVERLAP)
        # Apart from the rest of a tile's work, so that loads of later steps, and of the next tile, are issued early.
        step = tl.where(step == steps - 1, 0, step + 1)
        if step == 0:
            tile += PROGRAMS
            pid_m, pid_n = tile_of_program(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
            row, column = (pid_m * BLOCK_M).to(tl.int32), (pid_n * BLOCK_N).to(tl.int32)  # descriptors count in int32
        left_desc = x_desc
        right_desc = w_desc
        k = step * BLOCK_K
        if seed_ptr is None:  # noqa: SIM102 - a static test of its own
            # Only the descriptors are chosen here: loads inside a branch would not be issued ahead.
            if step >= base_steps:
                left_desc = s_desc
                right_desc = b_desc
                k = (step - base_steps) * BLOCK_K
        left = left_desc.load([row, k])  # [BLOCK_M, BLOCK_K]
        if WEIGHT_IS_KN:
            right = right_desc.load([k, column])  # [BLOCK_K, BLOCK_N]
        else:
            right = right_desc.load([column, k]).T
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
        if step == steps - 1:
            _store_tile(
                acc, bias_ptr, c_ptr, out_desc, scaled_desc, row, column, N, stride_bias, DTYPE, BLOCK_M, BLOCK_N
            )
            if seed_ptr is None:
                acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            else:
                following = tl.minimum(tile + PROGRAMS, tiles - 1)
                acc = _masked_start(
                    s_ptr, b_ptr, seed_ptr, following, M, N, R, stride_sm, stride_sr, stride_bn, stride_br,
                    threshold, keep_scale, DTYPE, BLOCK_M, BLOCK_N, BLOCK_R, GROUP_M, PRECISION,
                )  # fmt: skip


@functools.cache
def multiprocessors(device: torch.device, arch: int) -> int:
    """Those of a GPU: with more programs than run at once, a second, almost empty wave would double the time.

    Where there is no GPU, those of the architecture's usual part (of sm_90 132; some cards have 78 or 114).
    """
    if device.type != "cuda":
        return MULTIPROCESSORS.get(arch, 64)
    return torch.cuda.get_device_properties(device).multi_processor_count


def late_step(base_steps: int, num_stages: int) -> int | None:
    """At the end of which step of its first tile a program waits that waits late; None if that cannot be.

    A step's loads are issued num_stages - 1 steps ahead, before that step's end. So at the end of step `base_steps -
    num_stages` x's and W's last loads are under way, and the next to be issued is S's; one step is kept to spare.
    """
    step = base_steps - num_stages - 1
    return step if step >= 0 else None


def persistent_calls(
    x: torch.Tensor,
    weight: torch.Tensor,
    s: torch.Tensor,
    b: torch.Tensor,
    out: torch.Tensor | None,
    *,
    bias: torch.Tensor | None,
    dropout: Dropout | None = None,
    precision: str,
    tile: Tile,
    arch: int,
    c: torch.Tensor | None = None,
    scaled: torch.Tensor | None = None,
    late: bool = False,
) -> list[Call]:
    """The launch of persistent programs, for a given tile; arguments as in `lora_linear.base_plus_expand_calls`, with
    dropout for up to `MOST_MASKED_RANK` ranks. With c [N] contiguous fp32, `out` (which may then be None) is without
    the bias and `scaled = c * out + bias`. Before it, a small one that casts or turns `b` if the GEMM cannot read it as
    it is.

    late: programs wait for the launches before when their first tile's base is done, as overlap.py says. What stands
    before it in the list must write neither x nor the weight, and begin with a launch that waits first
    (`shrink_calls(beside=True)`). With dropout tiles begin with S, and programs wait before all else.

    x, weight or weight.t(), s, out and scaled must have 16-byte aligned rows (`launch.is_aligned`), and all but weight
    x's dtype.
    """
    M, (N, R), K = x.shape[0], b.shape, x.shape[1]
    w_desc, weight_is_kn = weight_descriptor(weight, tile)
    thin, casts = (b, []) if dropout is not None else as_weight(b, x.dtype, across=weight_is_kn, arch=arch)
    thin_block = (tile.block_k, tile.block_n) if weight_is_kn else (tile.block_n, tile.block_k)
    low_rank: dict[str, Any] = {"s_desc": None, "b_desc": None, "s_ptr": s, "b_ptr": b}
    if dropout is None:
        low_rank = {"s_desc": descriptor(s, tile.block_m, tile.block_k), "s_ptr": None, "b_ptr": None}
        low_rank["b_desc"] = descriptor(thin.t() if weight_is_kn else thin, *thin_block)
    tiles = cdiv(M, tile.block_m) * cdiv(N, tile.block_n)
    processors = multiprocessors(x.device, arch)
    wait_step = late_step(cdiv(K, tile.block_k), tile.num_stages) if late and dropout is None else None
    return [
        *casts,
        Call(
            name="base + expand",
            kernel=_lora_linear_persistent_kernel,
            grid=(min(tiles, processors), 1, 1),
            args={
                "bias_ptr": bias,
                "c_ptr": c,
                "x_desc": descriptor(x, tile.block_m, tile.block_k),
                "w_desc": w_desc,
                **low_rank,
                "seed_ptr": None if dropout is None else dropout.seed,
                "out_desc": None if out is None else descriptor(out, tile.block_m, tile.block_n // 2),
                "scaled_desc": None if scaled is None else descriptor(scaled, tile.block_m, tile.block_n // 2),
                "M": M,
                "N": N,
                "K": K,
                "R": R,
                **strides(bias, "bias"),
                **strides(None if dropout is None else s, "sm", "sr"),
                **strides(None if dropout is None else b, "bn", "br"),
                "threshold": 0 if dropout is None else dropout.threshold,
                "keep_scale": 1.0 if dropout is None else dropout.keep_scale,
                "wait_step": wait_step,
            },
            constants={
                "DTYPE": triton_dtype(x.dtype),
                "WEIGHT_IS_KN": weight_is_kn,
                "PROGRAMS": processors,  # whatever M is, or each new length would be compiled anew
                "BLOCK_M": tile.block_m,
                "BLOCK_N": tile.block_n,
                "BLOCK_K": tile.block_k,
                "BLOCK_R": MOST_MASKED_RANK,
                "GROUP_M": tile.group_m,
                "PRECISION": precision,
                "OVERLAP": overlaps(arch),
            },
            num_warps=tile.num_warps,
            num_stages=tile.num_stages if dropout is None else min(3, tile.num_stages),  # beside the mask's words
            options=overlap_options(arch),
            bytes=nbytes(x, weight, s, thin, bias, c, out, scaled),
            flops=2 * M * N * (K + R),
        ),
    ]
