"""The shrink of a mixed batch: each row down to the rank of its own adapter, scaled.

    out[m, :rank] = scaling[s] * (keep * x[m] / (1 - p)) A_s^T        s = ids[m]; zeros past the rank, and where s = -1

Forward this is S, from x and the pool of A; backward it is dS, from dY and the pool of B, whose adapters are [N, rank]
blocks. A program takes one block of the routing, rows of one adapter, gathered by `perm` in its loads and scattered by
it in its stores: x and out stay in the batch's order. Where there are few blocks the contraction is split, as in
lora_shrink.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .adapters import Adapters
from .dropout import Dropout, keep_tile
from .launch import Call, cdiv, compile_options, nbytes, scratch, strides
from .multi_tables import multi_shrink_tile, pools_vectorize
from .multi_tile import adapter_of, check_rows, dropout_arguments, piece_of, slot_key, table_arguments
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
            x = tl.where(keep_tile(seed, mask_rows, tl.cast(c, tl.int64), threshold, BLOCK_M, BLOCK_C), x, 0.0)
        acc = tl.dot(x, factor.to(x.dtype), acc, input_precision=PRECISION)
        x_ptrs += step_x
        f_ptrs += step_f
    return acc


@triton.jit(do_not_specialize=["B", "threshold"])
def _multi_shrink_kernel(
    x_ptr, pool_ptr, out_ptr, perm_ptr, blocks_ptr, seg_start_ptr, row_offset_ptr, rank_ptr, scaling_ptr, seed_ptr,
    B, C, max_rank, stride_xm, stride_xc, stride_pool, stride_os, stride_om, stride_or,
    c_chunk, threshold, keep_scale,
    PARTS: tl.constexpr, POOL_IS_B: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    EVEN_C: tl.constexpr, DROPOUT: tl.constexpr, NUM_STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Blocks of the rank are neighbours in launch order, so that only the first of them reads x from device memory.
    blocks_r = tl.cdiv(max_rank, BLOCK_R)
    part = tl.program_id(0) // blocks_r
    slot, first, length = piece_of(blocks_ptr, B, part // PARTS)
    skipped = part % PARTS * BLOCK_M
    length -= skipped
    if length > 0:
        row_offset, rank = adapter_of(slot, row_offset_ptr, rank_ptr)
        offs_m = first + skipped + tl.arange(0, BLOCK_M)
        mask_m = tl.arange(0, BLOCK_M) < length
        rows = tl.load(perm_ptr + offs_m, mask=mask_m, other=0).to(tl.int64)
        offs_r = tl.program_id(0) % blocks_r * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
        split = tl.program_id(1).to(tl.int64)
        c_start = tl.program_id(1) * c_chunk
        # Nothing to add up past the adapter's rank: zeros are stored.
        c_stop = tl.where(tl.program_id(0) % blocks_r * BLOCK_R < rank, tl.minimum(c_start + c_chunk, C), c_start)
        mask_rows, seed = offs_m, slot
        scale = tl.load(scaling_ptr + tl.maximum(slot, 0)) * keep_scale
        if DROPOUT:
            mask_rows = offs_m - tl.load(seg_start_ptr + tl.maximum(slot, 0))
            seed = slot_key(seed_ptr, slot)
        if POOL_IS_B:
            factor_ptr = pool_ptr + row_offset * C
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
                x_ptr, pool_ptr + row_offset * stride_pool, rows, mask_m, mask_rows, offs_r, rank, c_start, c_stop,
                stride_xm, stride_xc, stride_pool, 1, seed, threshold,
                BLOCK_M, BLOCK_C, BLOCK_R, EVEN_C, DROPOUT, NUM_STAGES, PRECISION,
            )  # fmt: skip
        acc = tl.where((offs_r < rank)[None, :], acc * scale, 0.0)  # an empty slot's scaling may be anything
        out_ptrs = out_ptr + split * stride_os + rows[:, None] * stride_om + offs_r[None, :] * stride_or
        mask = mask_m[:, None] & (offs_r < max_rank)[None, :]
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


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
    check_rows(adapters, routing, x=x, out=out)
    (M, C), R = x.shape, adapters.max_rank
    if (adapters.K if pool == "a" else adapters.N) != C or out.shape[1] != R:
        raise ValueError(
            f"x, out: {tuple(x.shape)} and {tuple(out.shape)} do not fit pool {pool} of {adapters.K} x {R}"
        )
    if out.numel() == 0:
        return []
    if tile is None:
        aligned = vectorizes(x) and pools_vectorize(adapters)
        tile = multi_shrink_tile(arch=arch, dtype=x.dtype, M=M, R=R, aligned=aligned, dropout=dropout is not None)
    parts, blocks_r, steps = block_rows(M) // tile.block_m, cdiv(R, tile.block_r), cdiv(C, tile.block_c)
    if splits is None:
        blocks = cdiv(M, tile.block_m) * blocks_r
        options = {"arch": arch, "operand_bytes": nbytes(x), "plane_bytes": 4 * M * R}
        splits = best_splits(blocks=blocks, steps=steps, **options)
    c_chunk = cdiv(steps, splits) * tile.block_c
    splits = cdiv(C, c_chunk)
    target = out if splits == 1 else scratch(splits, M, R, dtype=torch.float32, device=x.device)
    source = adapters.pool_a if pool == "a" else adapters.pool_b
    call = Call(
        name="shrink of many adapters",
        kernel=_multi_shrink_kernel,
        grid=(routing.blocks.shape[1] * parts * blocks_r, splits, 1),
        args={
            **table_arguments(adapters, routing),
            **dropout_arguments(dropout),
            "x_ptr": x,
            "pool_ptr": source,
            "out_ptr": target,
            "scaling_ptr": adapters.scaling,
            "C": C,
            "max_rank": R,
            **strides(x, "xm", "xc"),
            "stride_pool": adapters.pool_a.stride(0) if pool == "a" else 0,
            "stride_os": M * R if splits > 1 else 0,
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
            "DROPOUT": dropout is not None,
            "NUM_STAGES": tile.num_stages,
            "PRECISION": precision,
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        options=compile_options(arch),
        bytes=nbytes(x, target) + min(routing.slots, M) * R * C * source.element_size(),
        flops=2 * M * C * R,
    )
    if splits == 1:
        return [call]
    return [call, *reduce_calls([PlaneSum(target, out)], name="shrink of many adapters: sum over K")]
