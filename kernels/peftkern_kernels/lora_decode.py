"""Decoding: `y = x W^T + bias + scaling * (keep * x / (1 - p)) A^T B^T` for at most 16 rows, in two launches.

With so few rows the time is that of reading W once. The first launch splits K and gives A's rows programs of their own
beside W's, so that x W^T and x A^T are one pass of fp32 planes; the second (lora_decode_finish.py) adds the planes in a
fixed order, scales and rounds S (kept for the caller), and adds S B^T and the bias. W's rows are the dot's M, tokens
its N: a tile of 64 rows of W and 16 tokens fits Hopper's matrix instruction and wastes nothing on padding. Up to four
projections of one x (q, k and v; gate and up) share both launches (projections.py); one is a group of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from .dropout import Dropout, keep_tile
from .gemm_tables import Tile, choose_decode_tile
from .launch import Call, cdiv, compile_options, nbytes, strides
from .lora_decode_finish import MAX_ROWS, Planes, Projection, check_group, finish_call
from .projections import block_of_projection, blocks_of, numbered, of_projection
from .reduction_tables import vectorizes

__all__ = ["MAX_ROWS", "decode_calls", "group_decode_calls"]


@triton.jit
def rows_times_tokens(
    w_ptr, x_ptr, seed_ptr, rows, offs_m, M, k_start, k_stop, stride_wn, stride_wk, stride_xm, stride_xk, threshold,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    NUM_STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """fp32 [BLOCK_N, BLOCK_M] = w[rows, k_start:k_stop] (keep * x)[offs_m, k_start:k_stop]^T."""
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    w_ptrs = w_ptr + rows[:, None] * stride_wn + (k_start + offs_k)[None, :] * stride_wk
    x_ptrs = x_ptr + (offs_m % M)[:, None] * stride_xm + (k_start + offs_k)[None, :] * stride_xk
    w_step = tl.cast(stride_wk, tl.int64) * BLOCK_K
    x_step = tl.cast(stride_xk, tl.int64) * BLOCK_K
    for k in tl.range(k_start, k_stop, BLOCK_K, num_stages=NUM_STAGES):
        if EVEN_K:
            w = tl.load(w_ptrs)  # [BLOCK_N, BLOCK_K]
            x = tl.load(x_ptrs)  # [BLOCK_M, BLOCK_K]
        else:
            mask = (offs_k < k_stop - k)[None, :]
            w = tl.load(w_ptrs, mask=mask, other=0.0)
            x = tl.load(x_ptrs, mask=mask, other=0.0)
        if seed_ptr is not None:
            keep = keep_tile(tl.load(seed_ptr), offs_m, tl.cast(k, tl.int64), threshold, BLOCK_M, BLOCK_K)
            x = tl.where(keep, x, 0.0)
        acc = tl.dot(w.to(x.dtype), x.T, acc, input_precision=PRECISION)
        w_ptrs += w_step
        x_ptrs += x_step
    return acc


@triton.jit
def low_rank_program(
    x_ptr, index, a_ptr, a1_ptr, a2_ptr, a3_ptr, seed_ptr, s_planes_ptr, s_planes1_ptr, s_planes2_ptr, s_planes3_ptr,
    R, R1, R2, R3, offs_m, M, k_start, k_stop, stride_xm, stride_xk, stride_ar, stride_ak, threshold,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A's program `index` of the first launch: up to BLOCK_N ranks of one projection, a part of K."""
    which, block_r = block_of_projection(index, R, R1, R2, R3, BLOCK_N)
    own_R = of_projection(which, R, R1, R2, R3)
    offs_r = block_r.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    # The two loops' buffers do not overlap in shared memory, so A's few programs do without a pipeline.
    acc = rows_times_tokens(
        of_projection(which, a_ptr, a1_ptr, a2_ptr, a3_ptr), x_ptr, seed_ptr, offs_r % own_R, offs_m, M, k_start,
        k_stop, stride_ar, stride_ak, stride_xm, stride_xk, threshold, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, 1, PRECISION,
    )  # fmt: skip
    s_ptrs = of_projection(which, s_planes_ptr, s_planes1_ptr, s_planes2_ptr, s_planes3_ptr)
    s_ptrs += (tl.program_id(1) * M + offs_m)[None, :] * own_R + offs_r[:, None]
    tl.store(s_ptrs, acc, mask=(offs_m < M)[None, :] & (offs_r < own_R)[:, None])


@triton.jit(do_not_specialize=["M", "threshold"])
def _decode_planes_kernel(
    x_ptr, w_ptr, w1_ptr, w2_ptr, w3_ptr, a_ptr, a1_ptr, a2_ptr, a3_ptr, seed_ptr,
    y_planes_ptr, y_planes1_ptr, y_planes2_ptr, y_planes3_ptr,  # each [SPLIT, M, N]
    s_planes_ptr, s_planes1_ptr, s_planes2_ptr, s_planes3_ptr,  # each [SPLIT, M, R]
    M, N, N1, N2, N3, K, R, R1, R2, R3, k_part,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_ar, stride_ak, threshold,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    NUM_STAGES: tl.constexpr, OVERLAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    programs_r = blocks_of(R, R1, R2, R3, BLOCK_N)  # A's come first: a straggler would be all of the last wave
    k_start = tl.program_id(1) * k_part
    k_stop = tl.minimum(k_start + k_part, K)
    offs_m = tl.arange(0, BLOCK_M).to(tl.int64)
    if tl.program_id(0) < programs_r:
        low_rank_program(
            x_ptr, tl.program_id(0), a_ptr, a1_ptr, a2_ptr, a3_ptr, seed_ptr, s_planes_ptr, s_planes1_ptr,
            s_planes2_ptr, s_planes3_ptr, R, R1, R2, R3, offs_m, M, k_start, k_stop, stride_xm, stride_xk, stride_ar,
            stride_ak, threshold, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION,
        )  # fmt: skip
    else:
        which, block_n = block_of_projection(tl.program_id(0) - programs_r, N, N1, N2, N3, BLOCK_N)
        own_N = of_projection(which, N, N1, N2, N3)
        offs_n = block_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = rows_times_tokens(
            of_projection(which, w_ptr, w1_ptr, w2_ptr, w3_ptr), x_ptr, None, offs_n % own_N, offs_m, M, k_start,
            k_stop, stride_wn, stride_wk, stride_xm, stride_xk, threshold, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K,
            NUM_STAGES, PRECISION,
        )  # fmt: skip
        y_ptrs = of_projection(which, y_planes_ptr, y_planes1_ptr, y_planes2_ptr, y_planes3_ptr)
        y_ptrs += (tl.program_id(1) * M + offs_m)[None, :] * own_N + offs_n[:, None]
        tl.store(y_ptrs, acc, mask=(offs_m < M)[None, :] & (offs_n < own_N)[:, None])


def decode_calls(
    x: torch.Tensor,
    weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    out: torch.Tensor,
    s_out: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    dropout: Dropout | None = None,
    arch: int,
    precision: str = "ieee",
) -> list[Call]:
    """Launches that write `s_out[M, R] = scaling * (keep * x / (1 - p)) a^T` and `out = x weight^T + bias + s_out b^T`.

    Args:
        x: [M, K] with M at most 16. weight: [N, K], x's dtype. a: [R, K], b: [N, R]: that dtype or fp32 masters.
        scaling: applied in fp32 before S is rounded.
        out: [M, N] and s_out: [M, R], written; any strides.
        bias: [N]. dropout: mask by (row, column) of x, on the low-rank part alone. arch: see `gemm_tables`.
        precision: `input_precision` of fp32 dots.

    Raises:
        ValueError: more than 16 rows.
    """
    group = [Projection(a, b, scaling, out, s_out, bias)]
    return group_decode_calls(x, [weight], group, dropout=dropout, arch=arch, precision=precision)


def group_decode_calls(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    group: Sequence[Projection],
    *,
    dropout: Dropout | None = None,
    arch: int,
    precision: str = "ieee",
    tile: Tile | None = None,
) -> list[Call]:
    """The same two launches for up to four projections of x, each with what is its own.

    Out features, ranks and scalings may differ; dropout is one mask for all.

    Args:
        x: [M, K] with M at most 16. weights: [N, K] of each, with one stride order; x's dtype.
        group: their tensors of a name have one dtype and one stride order; all have a bias or none.
        dropout, arch, precision: as in `decode_calls`. tile: overrides the table.

    Raises:
        ValueError: more than 16 rows or four projections, or kinds that do not agree.
    """
    check_group(x, weights, group)
    if x.shape[0] == 0:
        return []
    planes, call = _planes_call(x, weights, [each.a for each in group], dropout, arch, precision, tile)
    overlap = call.constants["OVERLAP"]
    return [call, finish_call(planes, group, dropout, x.dtype, arch, precision, overlap=overlap)]


def shrink_arguments(
    x: torch.Tensor, As: Sequence[torch.Tensor], planes: Planes, dropout: Dropout | None
) -> dict[str, Any]:
    """The run-time arguments, by name, of the first launch but for W's own."""
    return {
        "x_ptr": x,
        **numbered("a{}_ptr", As),
        "seed_ptr": None if dropout is None else dropout.seed,
        **numbered("y_planes{}_ptr", planes.y),
        **numbered("s_planes{}_ptr", planes.s),
        **numbered("N{}", [y.shape[2] for y in planes.y]),
        **numbered("R{}", [a.shape[0] for a in As]),
        "M": x.shape[0],
        "K": x.shape[1],
        **strides(x, "xm", "xk"),
        **strides(As[0], "ar", "ak"),
        "threshold": 0 if dropout is None else dropout.threshold,
    }


def _planes_call(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    As: Sequence[torch.Tensor],
    dropout: Dropout | None,
    arch: int,
    precision: str,
    tile: Tile | None,
) -> tuple[Planes, Call]:
    """The first launch, and what it fills."""
    (M, K), sizes, ranks = x.shape, [w.shape[0] for w in weights], [a.shape[0] for a in As]
    aligned = vectorizes(x) and all(vectorizes(w) or vectorizes(w.t()) for w in weights)
    if tile is None:
        tile = choose_decode_tile(arch, x.dtype, N=sum(sizes), K=K, R=sum(ranks), aligned=aligned)
    k_part = cdiv(cdiv(K, tile.block_k), tile.split_k) * tile.block_k
    split = cdiv(K, k_part)
    planes = Planes.empty(split, x, sizes, ranks)
    # With a mask, with single elements' addresses and, on sm_120, with a group, the assembler of these spills a few
    # scalars to stay below its own limit.
    fits = arch not in (80, 86, 89, 120) or (aligned and dropout is None and (len(weights) == 1 or arch != 120))
    call = Call(
        name="decode: planes",
        kernel=_decode_planes_kernel,
        grid=(sum(cdiv(size, tile.block_n) for size in (*ranks, *sizes)), split, 1),
        args={
            **shrink_arguments(x, As, planes, dropout),
            **numbered("w{}_ptr", weights),
            "k_part": k_part,
            **strides(weights[0], "wn", "wk"),
        },
        constants={
            "BLOCK_M": MAX_ROWS,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": tile.block_k,
            "EVEN_K": K % tile.block_k == 0,
            "NUM_STAGES": tile.num_stages,
            "OVERLAP": tile.overlap,
            "PRECISION": precision,
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        bytes=nbytes(x, *weights, *As, *planes.y, *planes.s),
        flops=2 * M * sum((*sizes, *ranks)) * K,
        options={} if fits else compile_options(arch),
    )
    return planes, call
