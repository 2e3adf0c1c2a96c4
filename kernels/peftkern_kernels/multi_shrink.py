"""The shrink of a mixed batch: each row down to the rank of its own adapter, scaled.

    out[m, :rank] = scaling[s] * (keep * x[m] / (1 - p)) A_s^T        s = ids[m]; zeros past the rank, and where s = -1

Forward this is S, from x and the pool of A; backward it is dS, from dY and the pool of B, whose adapters are [N, rank]
blocks. A program takes one block of the routing, rows of one adapter, gathered by `perm` in its loads and scattered by
it in its stores: x and out stay in the batch's order. Where there are few blocks the contraction is split, as in
lora_shrink.py. Up to four projections of one x share a launch (projections.py); one layer is a group of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from .adapters import Adapters
from .dropout import Dropout, drop_tile
from .launch import Call, cdiv, compile_options, nbytes, scratch, strides
from .multi_group import check_group, table_pointers
from .multi_tables import multi_shrink_tile, pools_vectorize
from .multi_tile import adapter_of, dropout_arguments, piece_of, slot_key, table_arguments
from .projections import block_of_projection, blocks_of, columns, numbered, of_projection
from .reduce import PlaneSum, reduce_calls
from .reduction_tables import Tile, best_splits, vectorizes
from .routing import Routing, block_rows


@triton.jit
def rows_times_factor(
    x_ptr, factor_ptr, rows, mask_m, mask_rows, offs_r, rank, c_start, c_stop,
    stride_xm, stride_xc, stride_fr, stride_fc, seed, threshold,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, EVEN_C: tl.constexpr,
    DROPOUT: tl.constexpr, NUM_STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """fp32 [BLOCK_M, BLOCK_R] = (keep * x)[rows, c_start:c_stop] factor[offs_r, c_start:c_stop]^T.

    `mask_rows` [BLOCK_M] are the rows that the dropout mask is drawn for.
    """
    offs_c = tl.arange(0, BLOCK_C).to(tl.int64)
    mask_r = (offs_r < rank)[None, :]
    x_ptrs = x_ptr + rows[:, None] * stride_xm + (c_start + offs_c)[None, :] * stride_xc
    f_ptrs = factor_ptr + offs_r[None, :] * stride_fr + (c_start + offs_c)[:, None] * stride_fc
    step_x = tl.cast(stride_xc, tl.int64) * BLOCK_C
    step_f = tl.cast(stride_fc, tl.int64) * BLOCK_C
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for c in tl.range(c_start, c_stop, BLOCK_C, num_stages=NUM_STAGES):
        if EVEN_C:
            x = tl.load(x_ptrs, mask=mask_m[:, None], other=0.0)  # [BLOCK_M, BLOCK_C]
            factor = tl.load(f_ptrs, mask=mask_r, other=0.0)  # [BLOCK_C, BLOCK_R]
        else:
            mask_c = c + offs_c < c_stop
            x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_c[None, :], other=0.0)
            factor = tl.load(f_ptrs, mask=mask_r & mask_c[:, None], other=0.0)
        if DROPOUT:
            x = drop_tile(x, seed, mask_rows, tl.cast(c, tl.int64), threshold, DROPOUT, BLOCK_M, BLOCK_C)
        acc = tl.dot(x, factor.to(x.dtype), acc, input_precision=PRECISION)
        x_ptrs += step_x
        f_ptrs += step_f
    return acc


@triton.jit(do_not_specialize=["B", "threshold"])
def _multi_shrink_kernel(
    x_ptr, perm_ptr, blocks_ptr, seg_start_ptr, seed_ptr,
    pool_ptr, pool1_ptr, pool2_ptr, pool3_ptr, out_ptr, out1_ptr, out2_ptr, out3_ptr,
    row_offset_ptr, row_offset1_ptr, row_offset2_ptr, row_offset3_ptr, rank_ptr, rank1_ptr, rank2_ptr, rank3_ptr,
    scaling_ptr, scaling1_ptr, scaling2_ptr, scaling3_ptr, max_rank, max_rank1, max_rank2, max_rank3,
    B, C, stride_xm, stride_xc, stride_pool, stride_os, stride_om, stride_or,
    c_chunk, threshold, keep_scale,
    PARTS: tl.constexpr, POOL_IS_B: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    EVEN_C: tl.constexpr, DROPOUT: tl.constexpr, NUM_STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Blocks of the ranks, of all projections, are neighbours in launch order, so that only the first of them reads x
    # from device memory.
    blocks_r = blocks_of(max_rank, max_rank1, max_rank2, max_rank3, BLOCK_R)
    part = tl.program_id(0) // blocks_r
    which, block_r = block_of_projection(
        tl.program_id(0) % blocks_r, max_rank, max_rank1, max_rank2, max_rank3, BLOCK_R
    )
    own_pool = of_projection(which, pool_ptr, pool1_ptr, pool2_ptr, pool3_ptr)
    slot, first, length = piece_of(blocks_ptr, B, part // PARTS)
    skipped = part % PARTS * BLOCK_M
    length -= skipped
    if length > 0:
        row_offset, rank = adapter_of(
            slot, of_projection(which, row_offset_ptr, row_offset1_ptr, row_offset2_ptr, row_offset3_ptr),
            of_projection(which, rank_ptr, rank1_ptr, rank2_ptr, rank3_ptr),
        )  # fmt: skip
        offs_m = first + skipped + tl.arange(0, BLOCK_M)
        mask_m = tl.arange(0, BLOCK_M) < length
        rows = tl.load(perm_ptr + offs_m, mask=mask_m, other=0).to(tl.int64)
        offs_r = block_r * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
        split = tl.program_id(1).to(tl.int64)
        c_start = tl.program_id(1) * c_chunk
        # Nothing to add up past the adapter's rank: zeros are stored.
        c_stop = tl.where(block_r * BLOCK_R < rank, tl.minimum(c_start + c_chunk, C), c_start)
        mask_rows, seed = offs_m, slot
        own_scaling = of_projection(which, scaling_ptr, scaling1_ptr, scaling2_ptr, scaling3_ptr)
        scale = tl.load(own_scaling + tl.maximum(slot, 0)) * keep_scale
        if DROPOUT:
            mask_rows = offs_m - tl.load(seg_start_ptr + tl.maximum(slot, 0))
            seed = slot_key(seed_ptr, slot)
        if POOL_IS_B:
            factor_ptr = own_pool + row_offset * C
            if rank % 8 == 0:  # a stride that the compiler knows to be a multiple of 8: loads of 16 bytes
                even_rank = rank // 8 * 8
                acc = rows_times_factor(
                    x_ptr, factor_ptr, rows, mask_m, mask_rows, offs_r, even_rank, c_start, c_stop,
                    stride_xm, stride_xc, 1, even_rank, seed, threshold,
                    BLOCK_M, BLOCK_C, BLOCK_R, EVEN_C, DROPOUT, NUM_STAGES, PRECISION,
                )  # fmt: skip
            else:
                acc = rows_times_factor(
                    x_ptr, factor_ptr, rows, mask_m, mask_rows, offs_r, rank, c_start, c_stop,
                    stride_xm, stride_xc, 1, rank, seed, threshold,
                    BLOCK_M, BLOCK_C, BLOCK_R, EVEN_C, DROPOUT, 1, PRECISION,
                )  # fmt: skip
        else:
            acc = rows_times_factor(
                x_ptr, own_pool + row_offset * stride_pool, rows, mask_m, mask_rows, offs_r, rank, c_start, c_stop,
                stride_xm, stride_xc, stride_pool, 1, seed, threshold,
                BLOCK_M, BLOCK_C, BLOCK_R, EVEN_C, DROPOUT, NUM_STAGES, PRECISION,
            )  # fmt: skip
        acc = tl.where((offs_r < rank)[None, :], acc * scale, 0.0)  # an empty slot's scaling may be anything
        own_out = of_projection(which, out_ptr, out1_ptr, out2_ptr, out3_ptr)
        own_max = of_projection(which, max_rank, max_rank1, max_rank2, max_rank3)
        out_ptrs = own_out + split * stride_os + rows[:, None] * stride_om + offs_r[None, :] * stride_or
        mask = mask_m[:, None] & (offs_r < own_max)[None, :]
        tl.store(out_ptrs, acc.to(own_out.dtype.element_ty), mask=mask)


def multi_shrink_calls(
    x: torch.Tensor,
    adapters: Adapters,
    routing: Routing,
    out: torch.Tensor,
    *,
    pool: str = "a",
    dropout: Dropout | None = None,
    arch: int,
    precision: str = "ieee",
    tile: Tile | None = None,
    splits: int | None = None,
) -> list[Call]:
    """Launches of `out[m] = scaling * (keep * x[m] / (1 - p)) A_s^T`, or of `out[m] = scaling * x[m] B_s`.

    Args:
        x: [M, K] (of pool "b": dY [M, N]) fp32, fp16 or bf16, any strides.
        adapters: of x's dtype or fp32 (rounded to x's dtype in registers). routing: of the batch.
        out: [M, max_rank] any float dtype, any strides; written, zeros past each row's rank.
        pool: "a" for S, "b" for dS.
        dropout: mask over x: row m is that of `slot_seed` and `row_in_adapter[m]`. None for no dropout.
        arch, precision, tile, splits: as in `lora_shrink.shrink_calls`.

    Raises:
        ValueError: shapes that do not agree.
    """
    options: dict[str, Any] = {"pool": pool, "dropout": dropout, "arch": arch, "precision": precision}
    return group_shrink_calls(x, [adapters], routing, out, tile=tile, splits=splits, **options)


def group_shrink_calls(
    x: torch.Tensor,
    group: Sequence[Adapters],
    routing: Routing,
    out: torch.Tensor,
    *,
    pool: str = "a",
    dropout: Dropout | None = None,
    arch: int,
    precision: str = "ieee",
    tile: Tile | None = None,
    splits: int | None = None,
) -> list[Call]:
    """The same for up to four projections of x, whose S lie side by side: out is [M, sum of max_rank].

    Raises:
        ValueError: shapes that do not agree, more than four projections, or several of pool "b", where each has a dY.
    """
    check_group(group, routing, x=x, out=out)
    (M, C), ranks, adapters = x.shape, [a.max_rank for a in group], group[0]
    R, width = max(ranks), sum(ranks)
    if pool != "a" and len(group) > 1:
        raise ValueError(f"pool: expected 'a' for several projections, got {pool!r}")
    if (adapters.K if pool == "a" else adapters.N) != C or out.shape[1] != width:
        raise ValueError(
            f"x, out: {tuple(x.shape)} and {tuple(out.shape)} do not fit pool {pool} of {adapters.K} x {width}"
        )
    if out.numel() == 0:
        return []
    if tile is None:
        aligned = vectorizes(x) and all(map(pools_vectorize, group))
        sizes: dict[str, Any] = {"M": M, "R": R, "projections": len(group)}
        tile = multi_shrink_tile(arch=arch, dtype=x.dtype, **sizes, aligned=aligned, dropout=dropout is not None)
    parts, steps = block_rows(M) // tile.block_m, cdiv(C, tile.block_c)
    blocks_r = sum(cdiv(rank, tile.block_r) for rank in ranks)
    if splits is None:
        blocks = cdiv(M, tile.block_m) * blocks_r
        options = {"arch": arch, "operand_bytes": nbytes(x), "plane_bytes": 4 * M * width}
        splits = best_splits(blocks=blocks, steps=steps, **options)
    c_chunk = cdiv(steps, splits) * tile.block_c
    splits = cdiv(C, c_chunk)
    target = out if splits == 1 else scratch(splits, M, width, dtype=torch.float32, device=x.device)
    sources = [a.pool_a if pool == "a" else a.pool_b for a in group]
    call = Call(
        name="shrink of many adapters",
        kernel=_multi_shrink_kernel,
        grid=(routing.blocks.shape[1] * parts * blocks_r, splits, 1),
        args={
            **table_arguments(adapters, routing),
            **table_pointers(group),
            **dropout_arguments(dropout),
            "x_ptr": x,
            **numbered("pool{}_ptr", sources),
            **numbered("out{}_ptr", columns(target, ranks)),
            **numbered("scaling{}_ptr", [a.scaling for a in group]),
            **numbered("max_rank{}", ranks),
            "C": C,
            **strides(x, "xm", "xc"),
            "stride_pool": adapters.pool_a.stride(0) if pool == "a" else 0,
            "stride_os": M * width if splits > 1 else 0,
            "stride_om": target.stride(-2),
            "stride_or": target.stride(-1),
            "c_chunk": c_chunk,
        },
        constants={
            "PARTS": parts,
            "POOL_IS_B": pool == "b",
            "BLOCK_M": tile.block_m,
            "BLOCK_C": tile.block_c,
            "BLOCK_R": tile.block_r,
            "EVEN_C": C % tile.block_c == 0,
            "DROPOUT": 0 if dropout is None else dropout.kind,
            "NUM_STAGES": tile.num_stages,
            "PRECISION": precision,
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        options=compile_options(arch),
        bytes=nbytes(x, target) + min(routing.slots, M) * width * C * sources[0].element_size(),
        flops=2 * M * C * width,
    )
    if splits == 1:
        return [call]
    return [call, *reduce_calls([PlaneSum(target, out)], name="shrink of many adapters: sum over K", arch=arch)]
