"""Gradients of both pools of a mixed batch: one launch and, where a slot has many rows, one sum of planes.

    dA_s[rank, K] = sum over the rows m of slot s of dS[m] (keep * x[m] / (1 - p))
    dB_s[N, rank] = sum over the rows m of slot s of dY[m] S[m]

A program takes one chunk of the routing, rows of one slot, and BLOCK_C columns of x or of dY, gathered by `perm`. Most
slots have one chunk, whose sum is the gradient; the others' chunks go to fp32 planes that a second launch adds in
order. Nothing is written for slots without rows: the pools' gradients start as zeros.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .adapters import Adapters
from .dropout import Dropout, drop_tile
from .launch import Call, cdiv, compile_options, light_options, nbytes, scratch, strides
from .multi_tables import multi_weight_gradient_tile
from .multi_tile import adapter_of, check_rows, dropout_arguments, piece_of, slot_key
from .reduction_tables import Tile, next_power_of_2, vectorizes
from .routing import Routing, plane_count


@triton.jit
def _gathered_columns_times_thin(
    wide_ptr, thin_ptr, perm_ptr, offs_c, mask_c, offs_r, max_rank, first, length, segment, seed,
    stride_wm, stride_wc, stride_tm, stride_tr, threshold,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, EVEN_C: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """fp32 [BLOCK_C, BLOCK_R] = sum over the chunk's rows m of (keep * wide)[m, offs_c] thin[m, offs_r].

    thin is loaded past the adapter's own rank, whose multiples the compiler does not know: what that gives is not kept.
    """
    mask_r = offs_r < max_rank
    acc = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    row_ptrs = perm_ptr + first + tl.arange(0, BLOCK_M)
    # Row numbers are loaded a step ahead: the tiles' copies, which need them, then start as early as any.
    next_rows = tl.load(row_ptrs, mask=tl.arange(0, BLOCK_M) < length, other=0)
    for m in range(0, length, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < length
        rows = next_rows.to(tl.int64)
        next_rows = tl.load(row_ptrs + m + BLOCK_M, mask=offs_m + BLOCK_M < length, other=0)
        # Loaded transposed: the product's first operand, for which tensor cores read shared memory either way round.
        wide_ptrs = wide_ptr + rows[None, :] * stride_wm + offs_c[:, None] * stride_wc
        thin_ptrs = thin_ptr + rows[:, None] * stride_tm + offs_r[None, :] * stride_tr
        if EVEN_C:
            wide = tl.load(wide_ptrs, mask=mask_m[None, :], other=0.0)  # [BLOCK_C, BLOCK_M]
        else:
            wide = tl.load(wide_ptrs, mask=mask_m[None, :] & mask_c[:, None], other=0.0)
        thin = tl.load(thin_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0)  # [BLOCK_M, BLOCK_R]
        if DROPOUT:
            column = tl.min(offs_c, 0)
            mask_rows = first + offs_m - segment
            wide = drop_tile(tl.trans(wide), seed, mask_rows, column, threshold, DROPOUT, BLOCK_M, BLOCK_C).T
        acc = tl.dot(wide, thin.to(wide.dtype), acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["blocks_k", "C", "threshold"])
def _multi_weight_gradient_kernel(
    ds_ptr, x_ptr, da_ptr, da_planes_ptr, s_ptr, dy_ptr, db_ptr, db_planes_ptr,
    perm_ptr, chunks_ptr, seg_start_ptr, row_offset_ptr, rank_ptr, seed_ptr,
    C, K, N, max_rank, stride_dsm, stride_dsr, stride_xm, stride_xk, stride_sm, stride_sr, stride_dym, stride_dyn,
    blocks_k, threshold, keep_scale,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr,
    HAS_DA: tl.constexpr, HAS_DB: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks_r = tl.cdiv(max_rank, BLOCK_R)
    block_c = tl.program_id(0) // blocks_r
    r_start = tl.program_id(0) % blocks_r * BLOCK_R  # neighbours share their columns
    slot, first, length = piece_of(chunks_ptr, C, tl.program_id(1))
    row_offset, rank = adapter_of(slot, row_offset_ptr, rank_ptr)
    if (length > 0) & (r_start < rank):
        plane = tl.load(chunks_ptr + 3 * C + tl.program_id(1)).to(tl.int64)
        offs_r = r_start + tl.arange(0, BLOCK_R).to(tl.int64)
        mask_r = offs_r < rank
        if HAS_DA:  # noqa: SIM102 - a test of its own, static: an absent half's null pointers must not be compiled
            if block_c < blocks_k:
                offs_c = block_c.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
                mask_c = offs_c < K
                segment, seed = first, slot
                if DROPOUT:
                    segment = tl.load(seg_start_ptr + slot)
                    seed = slot_key(seed_ptr, slot)
                acc = _gathered_columns_times_thin(
                    x_ptr, ds_ptr, perm_ptr, offs_c, mask_c, offs_r, max_rank, first, length, segment, seed,
                    stride_xm, stride_xk, stride_dsm, stride_dsr, threshold,
                    BLOCK_M, BLOCK_C, BLOCK_R, EVEN_K, DROPOUT, PRECISION,
                )  # fmt: skip
                acc *= keep_scale
                mask = mask_c[:, None] & mask_r[None, :]
                if plane < 0:
                    out_ptrs = da_ptr + (row_offset + offs_r)[None, :] * K + offs_c[:, None]
                    tl.store(out_ptrs, acc.to(da_ptr.dtype.element_ty), mask=mask)
                else:  # planes [max_rank, K]
                    tl.store(da_planes_ptr + (plane * max_rank + offs_r)[None, :] * K + offs_c[:, None], acc, mask=mask)
        if HAS_DB:  # noqa: SIM102
            if block_c >= blocks_k:
                offs_c = (block_c - blocks_k).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
                mask_c = offs_c < N
                acc = _gathered_columns_times_thin(
                    dy_ptr, s_ptr, perm_ptr, offs_c, mask_c, offs_r, max_rank, first, length, first, slot,
                    stride_dym, stride_dyn, stride_sm, stride_sr, 0,
                    BLOCK_M, BLOCK_C, BLOCK_R, EVEN_N, 0, PRECISION,
                )  # fmt: skip
                mask = mask_c[:, None] & mask_r[None, :]
                if plane < 0:
                    out_ptrs = db_ptr + row_offset * N + offs_c[:, None] * rank + offs_r[None, :]
                    tl.store(out_ptrs, acc.to(db_ptr.dtype.element_ty), mask=mask)
                else:  # planes [N, max_rank]
                    plane_ptrs = db_planes_ptr + (plane * N + offs_c)[:, None] * max_rank + offs_r[None, :]
                    tl.store(plane_ptrs, acc, mask=mask)


@triton.jit
def _sum_of_planes(planes_ptr, first, number, stride_p, offset, mask, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr):
    """fp32 [BLOCK_C, BLOCK_R] at `offset` of the planes from `first` on, added in order."""
    total = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    plane_ptrs = planes_ptr + first.to(tl.int64) * stride_p + offset
    for _ in range(0, number):
        total += tl.load(plane_ptrs, mask=mask, other=0.0)
        plane_ptrs += stride_p
    return total


@triton.jit(do_not_specialize=["D", "blocks_k"])
def _multi_sum_kernel(
    da_planes_ptr, da_ptr, db_planes_ptr, db_ptr, sums_ptr, row_offset_ptr, rank_ptr, D, K, N, max_rank, blocks_k,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, HAS_DA: tl.constexpr, HAS_DB: tl.constexpr,
):  # fmt: skip
    blocks_r = tl.cdiv(max_rank, BLOCK_R)
    block_c = tl.program_id(0) // blocks_r
    r_start = tl.program_id(0) % blocks_r * BLOCK_R
    slot, first, number = piece_of(sums_ptr, D, tl.program_id(1))
    row_offset, rank = adapter_of(slot, row_offset_ptr, rank_ptr)
    if (number > 0) & (r_start < rank):
        offs_r = r_start + tl.arange(0, BLOCK_R).to(tl.int64)
        mask_r = (offs_r < rank)[None, :]
        if HAS_DA:  # noqa: SIM102
            if block_c < blocks_k:
                offs_c = block_c.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
                mask = (offs_c < K)[:, None] & mask_r
                offset = offs_r[None, :] * K + offs_c[:, None]
                stride_p = tl.cast(max_rank, tl.int64) * K
                total = _sum_of_planes(da_planes_ptr, first, number, stride_p, offset, mask, BLOCK_C, BLOCK_R)
                tl.store(da_ptr + row_offset * K + offset, total.to(da_ptr.dtype.element_ty), mask=mask)
        if HAS_DB:  # noqa: SIM102
            if block_c >= blocks_k:
                offs_c = (block_c - blocks_k).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
                mask = (offs_c < N)[:, None] & mask_r
                offset = offs_c[:, None] * max_rank + offs_r[None, :]
                stride_p = tl.cast(max_rank, tl.int64) * N
                total = _sum_of_planes(db_planes_ptr, first, number, stride_p, offset, mask, BLOCK_C, BLOCK_R)
                out_ptrs = db_ptr + row_offset * N + offs_c[:, None] * rank + offs_r[None, :]
                tl.store(out_ptrs, total.to(db_ptr.dtype.element_ty), mask=mask)


def _check(
    adapters: Adapters, routing: Routing, halves: dict[str, tuple[torch.Tensor | None, ...]]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The (wide, thin) pairs of the halves that are asked for; ValueError where they do not fit together."""
    pairs = []
    for text, (thin, wide, out) in halves.items():
        if len({t is None for t in (thin, wide, out)}) != 1:
            raise ValueError(f"{text}: expected all three or none")
        if thin is None or wide is None or out is None:
            continue
        check_rows(adapters, routing, **dict(zip(text.split(", ")[:2], (thin, wide), strict=True)))
        columns = adapters.K if text.endswith("a_out") else adapters.N
        pool = adapters.pool_a if text.endswith("a_out") else adapters.pool_b
        if thin.shape[1] != adapters.max_rank or wide.shape[1] != columns or out.shape != pool.shape:
            shapes = [list(t.shape) for t in (thin, wide, out)]
            raise ValueError(
                f"{text}: expected widths {adapters.max_rank}, {columns} and the pool's shape, got {shapes}"
            )
        if not out.is_contiguous():
            raise ValueError(f"{text}: expected a contiguous gradient, got strides {out.stride()}")
        pairs.append((wide, thin))
    return pairs


def multi_weight_gradient_calls(
    ds: torch.Tensor | None,
    x: torch.Tensor | None,
    s: torch.Tensor | None,
    dy: torch.Tensor | None,
    da_out: torch.Tensor | None,
    db_out: torch.Tensor | None,
    adapters: Adapters,
    routing: Routing,
    *,
    dropout: Dropout | None = None,
    arch: int,
    precision: str = "ieee",
    tile: Tile | None = None,
) -> list[Call]:
    """Launches that write each present adapter's part of `da_out` and `db_out`; either half may be absent (None).

    Args:
        ds, s: [M, max_rank]; s carries the scaling, and so does ds. Rounded to x's dtype in registers if wider.
        x: [M, K]. dy: [M, N]. fp32, fp16 or bf16, any strides.
        da_out: [rank_rows, K], db_out: [rank_rows * N], contiguous: gradients of the pools. Rows of adapters that no
            row of the batch asks for, and of none, are left as they are.
        dropout: the mask that the forward drew over x.
        arch, precision, tile: as in `weight_gradient.weight_gradient_calls`.

    Raises:
        ValueError: half of a half given, or shapes that do not agree.
    """
    pairs = _check(adapters, routing, {"ds, x, da_out": (ds, x, da_out), "s, dy, db_out": (s, dy, db_out)})
    M, R, K, N = routing.M, adapters.max_rank, adapters.K, adapters.N
    if not pairs or M == 0:
        return []
    has_da, has_db = da_out is not None, db_out is not None
    if tile is None:
        aligned = all(vectorizes(wide) for wide, _ in pairs)
        options = {"aligned": aligned, "dropout": dropout is not None and has_da}
        tile = multi_weight_gradient_tile(arch=arch, dtype=pairs[0][0].dtype, M=M, R=R, **options)
    planes = plane_count(M)
    device = pairs[0][0].device
    da_planes = scratch(planes, R, K, dtype=torch.float32, device=device) if has_da and planes else None
    db_planes = scratch(planes, N, R, dtype=torch.float32, device=device) if has_db and planes else None
    blocks_k = cdiv(K, tile.block_c) if has_da else 0
    blocks_n = cdiv(N, tile.block_c) if has_db else 0
    shared: dict[str, Any] = {"row_offset_ptr": adapters.row_offset, "rank_ptr": adapters.rank, "K": K, "N": N}
    # Where no slot can have several chunks no plane exists; the outputs stand in, and are not written as planes.
    shared |= {"max_rank": R, "da_ptr": da_out, "db_ptr": db_out}
    shared |= {"da_planes_ptr": da_planes if planes else da_out, "db_planes_ptr": db_planes if planes else db_out}
    halves = {"HAS_DA": has_da, "HAS_DB": has_db}
    first = Call(
        name="weight gradient of many adapters",
        kernel=_multi_weight_gradient_kernel,
        grid=((blocks_k + blocks_n) * cdiv(R, tile.block_r), routing.chunks.shape[1], 1),
        args={
            **shared,
            **dropout_arguments(dropout if has_da else None),
            "ds_ptr": ds,
            "x_ptr": x,
            "s_ptr": s,
            "dy_ptr": dy,
            "perm_ptr": routing.perm,
            "chunks_ptr": routing.chunks,
            "seg_start_ptr": routing.seg_start,
            "C": routing.chunks.shape[1],
            **strides(ds, "dsm", "dsr"),
            **strides(x, "xm", "xk"),
            **strides(s, "sm", "sr"),
            **strides(dy, "dym", "dyn"),
            "blocks_k": blocks_k,
        },
        constants={
            "BLOCK_M": tile.block_m,
            "BLOCK_C": tile.block_c,
            "BLOCK_R": tile.block_r,
            "EVEN_K": K % tile.block_c == 0,
            "EVEN_N": N % tile.block_c == 0,
            **halves,
            "DROPOUT": dropout.kind if dropout is not None and has_da else 0,
            "PRECISION": precision,
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        options=compile_options(arch),
        bytes=nbytes(ds, x, s, dy) + (nbytes(da_planes, db_planes) if planes else nbytes(da_out, db_out)),
        flops=2 * M * R * ((K if has_da else 0) + (N if has_db else 0)),
    )
    if not planes:
        return [first]
    return [first, _sum_call(shared, routing, halves, arch)]


def _sum_call(shared: dict[str, Any], routing: Routing, halves: dict[str, bool], arch: int) -> Call:
    """The second launch, over the slots of several chunks."""
    K, N, R = shared["K"], shared["N"], shared["max_rank"]
    block_r = min(64, next_power_of_2(R))
    block_c = max(16, 1024 // block_r)
    blocks_k = cdiv(K, block_c) if halves["HAS_DA"] else 0
    blocks_n = cdiv(N, block_c) if halves["HAS_DB"] else 0
    return Call(
        name="weight gradient of many adapters: sum over chunks",
        kernel=_multi_sum_kernel,
        grid=((blocks_k + blocks_n) * cdiv(R, block_r), routing.sums.shape[1], 1),
        args={**shared, "sums_ptr": routing.sums, "D": routing.sums.shape[1], "blocks_k": blocks_k},
        constants={"BLOCK_C": block_c, "BLOCK_R": block_r, **halves},
        num_warps=4,
        num_stages=1,
        options=light_options(arch),
        bytes=nbytes(shared["da_planes_ptr"], shared["db_planes_ptr"], shared["da_ptr"], shared["db_ptr"]),
    )
