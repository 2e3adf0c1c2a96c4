"""Decoding: `y = x W^T + bias + scaling * (keep * x / (1 - p)) A^T B^T` for at most 16 rows, in two launches.

With so few rows the time is that of reading W once. The first launch splits K and gives A's rows programs of their own
beside W's, so that x W^T and x A^T are one pass of fp32 planes; the second adds the planes in a fixed order, scales and
rounds S (kept for the caller), and adds S B^T and the bias. W's rows are the dot's M, tokens its N: a tile of 64 rows
of W and 16 tokens fits Hopper's matrix instruction and wastes nothing on padding.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .dropout import Dropout, keep_tile
from .gemm_tables import choose_decode_tile, rank_block
from .launch import Call, cdiv, compile_options, nbytes, scratch, strides
from .lora_expand import triton_dtype
from .multi_tile import MixedFactor, shrink_part
from .reduction_tables import vectorizes

MAX_ROWS = 16


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


@triton.jit(do_not_specialize=["M", "threshold", "B"])
def _decode_planes_kernel(
    x_ptr, w_ptr, a_ptr, seed_ptr, y_planes_ptr, s_planes_ptr,  # ... -> [SPLIT, M, N] [SPLIT, M, R]
    M, N, K, R, k_part, stride_xm, stride_xk, stride_wn, stride_wk, stride_ar, stride_ak, threshold,
    perm_ptr, blocks_ptr, row_offset_ptr, rank_ptr, B,  # None and 0 for one adapter
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, EVEN_K: tl.constexpr,
    NUM_STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    if blocks_ptr is not None:  # many adapters: a program for each block of rows and BLOCK_R of the ranks
        programs_r = B * tl.cdiv(R, BLOCK_R)
    else:
        programs_r = tl.cdiv(R, BLOCK_N)  # A's come first: a straggler at the end would be all of the last wave
    k_start = tl.program_id(1) * k_part
    k_stop = tl.minimum(k_start + k_part, K)
    offs_m = tl.arange(0, BLOCK_M).to(tl.int64)
    # The two loops' buffers do not overlap in shared memory, so A's few programs do without a pipeline.
    if tl.program_id(0) < programs_r:
        if blocks_ptr is not None:
            blocks_r = tl.cdiv(R, BLOCK_R)
            shrink_part(
                x_ptr, a_ptr, s_planes_ptr, perm_ptr, blocks_ptr, row_offset_ptr, rank_ptr, B,
                tl.program_id(0) // blocks_r, tl.program_id(0) % blocks_r * BLOCK_R, tl.program_id(1), k_start, k_stop,
                M, R, stride_xm, stride_xk, stride_ar, BLOCK_M, BLOCK_R, BLOCK_K, EVEN_K, 1, PRECISION,
            )  # fmt: skip
        else:
            offs_r = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
            acc = rows_times_tokens(
                a_ptr, x_ptr, seed_ptr, offs_r % R, offs_m, M, k_start, k_stop, stride_ar, stride_ak, stride_xm,
                stride_xk, threshold, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, 1, PRECISION,
            )  # fmt: skip
            s_ptrs = s_planes_ptr + (tl.program_id(1) * M + offs_m)[None, :] * R + offs_r[:, None]
            tl.store(s_ptrs, acc, mask=(offs_m < M)[None, :] & (offs_r < R)[:, None])
    else:
        offs_n = (tl.program_id(0) - programs_r).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = rows_times_tokens(
            w_ptr, x_ptr, None, offs_n % N, offs_m, M, k_start, k_stop, stride_wn, stride_wk, stride_xm, stride_xk,
            threshold, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, NUM_STAGES, PRECISION,
        )  # fmt: skip
        y_ptrs = y_planes_ptr + (tl.program_id(1) * M + offs_m)[None, :] * N + offs_n[:, None]
        tl.store(y_ptrs, acc, mask=(offs_m < M)[None, :] & (offs_n < N)[:, None])


@triton.jit(do_not_specialize=["M", "factor"])
def _decode_finish_kernel(
    y_planes_ptr, s_planes_ptr, b_ptr, bias_ptr, out_ptr, s_out_ptr,  # ... [N, R] [N] -> [M, N] [M, R]
    M, N, R, factor, stride_bn, stride_br, stride_bias, stride_om, stride_on, stride_sm, stride_sr,
    DTYPE: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    offs_m = tl.arange(0, BLOCK_M).to(tl.int64)
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = (offs_m < M)[None, :]
    mask = (offs_n < N)[:, None] & mask_m
    base = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for plane in tl.static_range(SPLIT):
        base += tl.load(y_planes_ptr + (plane * M + offs_m)[None, :] * N + offs_n[:, None], mask=mask, other=0.0)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for r in tl.range(0, R, BLOCK_R, num_stages=1):
        offs_r = r + tl.arange(0, BLOCK_R).to(tl.int64)
        mask_s = (offs_r < R)[:, None] & mask_m
        s = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
        for plane in tl.static_range(SPLIT):
            s += tl.load(s_planes_ptr + (plane * M + offs_m)[None, :] * R + offs_r[:, None], mask=mask_s, other=0.0)
        s = (s * factor).to(s_out_ptr.dtype.element_ty)  # scaled in fp32, then rounded once
        if tl.program_id(0) == 0:
            tl.store(s_out_ptr + offs_m[None, :] * stride_sm + offs_r[:, None] * stride_sr, s, mask=mask_s)
        b_ptrs = b_ptr + (offs_n % N)[:, None] * stride_bn + offs_r[None, :] * stride_br
        b = tl.load(b_ptrs, mask=(offs_r < R)[None, :], other=0.0)  # [BLOCK_N, BLOCK_R]
        acc = tl.dot(b.to(DTYPE), s.to(DTYPE), acc, input_precision=PRECISION)
    acc += base
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + (offs_n % N) * stride_bias).to(tl.float32)[:, None]
    out_ptrs = out_ptr + offs_m[None, :] * stride_om + offs_n[:, None] * stride_on
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


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
    if x.shape[0] == 0:
        return []
    y_planes, s_planes, planes = planes_call(x, weight, a, dropout=dropout, arch=arch, precision=precision)
    factor = float(scaling) * (1.0 if dropout is None else dropout.keep_scale)
    return [planes, finish_call(y_planes, s_planes, b, bias, factor, out, s_out, arch, precision)]


def factor_arguments(a: torch.Tensor | MixedFactor) -> dict[str, object]:
    """A's run-time arguments, by name, of a launch that makes planes: one adapter's, or those of a pool by blocks."""
    if isinstance(a, MixedFactor):
        tables = a.routing
        return {
            "a_ptr": a.tensor,
            "stride_ar": a.tensor.stride(0),
            "stride_ak": 1,
            "perm_ptr": tables.perm,
            "blocks_ptr": tables.blocks,
            "row_offset_ptr": a.adapters.row_offset,
            "rank_ptr": a.adapters.rank,
            "B": tables.blocks.shape[1],
        }
    absent = dict.fromkeys(("perm_ptr", "blocks_ptr", "row_offset_ptr", "rank_ptr"))
    return {"a_ptr": a, **strides(a, "ar", "ak"), **absent, "B": 0}


def factor_programs(a: torch.Tensor | MixedFactor, R: int, block_n: int, block_r: int) -> int:
    """How many of the programs along the grid's first axis are A's."""
    return a.routing.blocks.shape[1] * cdiv(R, block_r) if isinstance(a, MixedFactor) else cdiv(R, block_n)


def planes_call(
    x: torch.Tensor,
    weight: torch.Tensor,
    a: torch.Tensor | MixedFactor,
    *,
    dropout: Dropout | None,
    arch: int,
    precision: str,
) -> tuple[torch.Tensor, torch.Tensor, Call]:
    """The first launch, and what it fills: fp32 planes [split, M, N] of x W^T and [split, M, R] of x A^T.

    With a pool's `MixedFactor` (of pool "a") each row has its own A; columns past its rank are not written.
    """
    (M, K), N = x.shape, weight.shape[0]
    R = a.shape[1] if isinstance(a, MixedFactor) else a.shape[0]
    if M > MAX_ROWS:
        raise ValueError(f"x: expected at most {MAX_ROWS} rows on the decode path, got {M}")
    aligned = vectorizes(x) and (vectorizes(weight) or vectorizes(weight.t()))
    tile = choose_decode_tile(arch, x.dtype, N=N, K=K, R=R, aligned=aligned)
    k_part = cdiv(cdiv(K, tile.block_k), tile.split_k) * tile.block_k
    split = cdiv(K, k_part)
    y_planes = scratch(split, M, N, dtype=torch.float32, device=x.device)
    s_planes = scratch(split, M, R, dtype=torch.float32, device=x.device)
    block_r = rank_block(R, x.dtype)
    # With a mask or single elements' addresses the assembler of two spills a few scalars to stay below its own limit.
    fits = (aligned and dropout is None) or arch not in (80, 120)
    planes = Call(
        name="decode: planes",
        kernel=_decode_planes_kernel,
        grid=(factor_programs(a, R, tile.block_n, block_r) + cdiv(N, tile.block_n), split, 1),
        args={
            "x_ptr": x,
            "w_ptr": weight,
            **factor_arguments(a),
            "seed_ptr": None if dropout is None else dropout.seed,
            "y_planes_ptr": y_planes,
            "s_planes_ptr": s_planes,
            "M": M,
            "N": N,
            "K": K,
            "R": R,
            "k_part": k_part,
            **strides(x, "xm", "xk"),
            **strides(weight, "wn", "wk"),
            "threshold": 0 if dropout is None else dropout.threshold,
        },
        constants={
            "BLOCK_M": MAX_ROWS,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": tile.block_k,
            "BLOCK_R": block_r if isinstance(a, MixedFactor) else 0,
            "EVEN_K": K % tile.block_k == 0,
            "NUM_STAGES": tile.num_stages,
            "PRECISION": precision,
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        options={} if fits else compile_options(arch),
        bytes=nbytes(x, weight, a, y_planes, s_planes),
        flops=2 * M * (N + R) * K,
    )
    return y_planes, s_planes, planes


def finish_call(
    y_planes: torch.Tensor,
    s_planes: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    factor: float,
    out: torch.Tensor,
    s_out: torch.Tensor,
    arch: int,
    precision: str,
) -> Call:
    """The second launch: planes [split, M, N] and [split, M, R] -> out and s_out."""
    split, M, N = y_planes.shape
    R, block_n = s_planes.shape[2], 64
    return Call(
        name="decode: sum of planes + expand",
        kernel=_decode_finish_kernel,
        grid=(cdiv(N, block_n), 1, 1),
        args={
            "y_planes_ptr": y_planes,
            "s_planes_ptr": s_planes,
            "b_ptr": b,
            "bias_ptr": bias,
            "out_ptr": out,
            "s_out_ptr": s_out,
            "M": M,
            "N": N,
            "R": R,
            "factor": factor,
            **strides(b, "bn", "br"),
            **strides(bias, "bias"),
            **strides(out, "om", "on"),
            **strides(s_out, "sm", "sr"),
        },
        constants={
            "DTYPE": triton_dtype(out.dtype),
            "SPLIT": split,
            "BLOCK_M": MAX_ROWS,
            "BLOCK_N": block_n,
            "BLOCK_R": rank_block(R, out.dtype),
            "PRECISION": precision,
        },
        num_warps=4,
        num_stages=1,
        options=compile_options(arch),
        bytes=nbytes(y_planes, s_planes, b, bias, out, s_out),
        flops=2 * M * N * R + split * M * (N + R),
    )
