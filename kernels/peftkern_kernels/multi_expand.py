"""The expand of a mixed batch: each row from the rank of its own adapter to the output's columns.

    out[m] = s[m] B_i^T + bias                       i = ids[m]; the bias alone where i = -1
    out[m] = keep / (1 - p) * (ds[m] A_i)            backward: the low-rank part of dX

or the same added to what `out` holds. S carries the scaling. A program takes one block of the routing, rows of one
adapter, and BLOCK_N columns; rows are gathered and scattered by `perm`, so that S and out stay in the batch's order.
In backward several projections of one x can be added up in the accumulator, under their common mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from .adapters import Adapters
from .dropout import Dropout, drop_by_words, mask_words
from .launch import Call, cdiv, compile_options, nbytes, strides
from .lora_expand import low_rank_product, triton_dtype
from .multi_group import check_group, table_pointers
from .multi_tables import multi_expand_tile, pools_vectorize
from .multi_tile import adapter_of, check_rows, dropout_arguments, piece_of, slot_key, table_arguments
from .projections import numbered
from .reduction_tables import Tile, vectorizes
from .routing import Routing, block_rows


@triton.jit
def _more_of_pool_a(
    acc, s_ptr, pool_ptr, row_offset_ptr, rank_ptr, slot, rows, columns, max_rank, stride_sm, stride_sr, stride_pool,
    DTYPE: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + s[rows] A_s[:, columns] of one more projection, if there is one."""
    if s_ptr is not None:
        row_offset, rank = adapter_of(slot, row_offset_ptr, rank_ptr)
        a_ptr = pool_ptr + row_offset * stride_pool
        for r in tl.range(0, rank, BLOCK_R, num_stages=1):
            offs_r = r + tl.arange(0, BLOCK_R).to(tl.int64)
            s_ptrs = s_ptr + rows[:, None] * stride_sm + offs_r[None, :] * stride_sr
            a_ptrs = a_ptr + columns[None, :] + offs_r[:, None] * stride_pool
            s = tl.load(s_ptrs, mask=(offs_r < max_rank)[None, :], other=0.0).to(DTYPE)  # [BLOCK_M, BLOCK_R]
            a = tl.load(a_ptrs, mask=(offs_r < rank)[:, None], other=0.0).to(DTYPE)  # [BLOCK_R, BLOCK_N]
            acc = tl.dot(s, a, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["B", "threshold"])
def _multi_expand_kernel(
    bias_ptr, out_ptr, perm_ptr, blocks_ptr, seg_start_ptr, seed_ptr,
    s_ptr, s1_ptr, s2_ptr, s3_ptr, pool_ptr, pool1_ptr, pool2_ptr, pool3_ptr,
    row_offset_ptr, row_offset1_ptr, row_offset2_ptr, row_offset3_ptr, rank_ptr, rank1_ptr, rank2_ptr, rank3_ptr,
    max_rank, max_rank1, max_rank2, max_rank3,
    B, N, stride_sm, stride_sr, stride_pool, stride_bias, stride_om, stride_on, threshold, keep_scale,
    PARTS: tl.constexpr, POOL_IS_B: tl.constexpr, ACCUMULATE: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Columns run fastest, so that neighbouring programs share S's rows and write neighbouring memory.
    programs_n = tl.cdiv(N, BLOCK_N)
    part = tl.program_id(0) // programs_n
    slot, first, length = piece_of(blocks_ptr, B, part // PARTS)
    skipped = part % PARTS * BLOCK_M
    length -= skipped
    if length > 0:
        row_offset, rank = adapter_of(slot, row_offset_ptr, rank_ptr)
        offs_m = first + skipped + tl.arange(0, BLOCK_M)
        mask_m = tl.arange(0, BLOCK_M) < length
        rows = tl.load(perm_ptr + offs_m, mask=mask_m, other=0).to(tl.int64)
        column = (tl.program_id(0) % programs_n).to(tl.int64) * BLOCK_N
        offs_n = column + tl.arange(0, BLOCK_N)
        columns = offs_n % N
        if seed_ptr is not None:  # drawn while the accumulator does not yet hold registers
            mask_rows = offs_m - tl.load(seg_start_ptr + tl.maximum(slot, 0))
            words = mask_words(slot_key(seed_ptr, slot), mask_rows, column, BLOCK_M, BLOCK_N)
        if POOL_IS_B:
            b_ptr = pool_ptr + row_offset * N
            if rank % 8 == 0:  # a stride that the compiler knows to be a multiple of 8: loads of 16 bytes
                even_rank = rank // 8 * 8
                acc = low_rank_product(
                    s_ptr, b_ptr, rows, columns, even_rank, max_rank, stride_sm, stride_sr, even_rank, 1,
                    DTYPE, BLOCK_M, BLOCK_N, BLOCK_R, PRECISION,
                )  # fmt: skip
            else:
                acc = low_rank_product(
                    s_ptr, b_ptr, rows, columns, rank, max_rank, stride_sm, stride_sr, rank, 1,
                    DTYPE, BLOCK_M, BLOCK_N, BLOCK_R, PRECISION,
                )  # fmt: skip
        else:
            acc = low_rank_product(
                s_ptr, pool_ptr + row_offset * stride_pool, rows, columns, rank, max_rank, stride_sm, stride_sr,
                1, stride_pool,
                DTYPE, BLOCK_M, BLOCK_N, BLOCK_R, PRECISION,
            )  # fmt: skip
            acc = _more_of_pool_a(
                acc, s1_ptr, pool1_ptr, row_offset1_ptr, rank1_ptr, slot, rows, columns, max_rank1, stride_sm,
                stride_sr, stride_pool, DTYPE, BLOCK_R, PRECISION,
            )  # fmt: skip
            acc = _more_of_pool_a(
                acc, s2_ptr, pool2_ptr, row_offset2_ptr, rank2_ptr, slot, rows, columns, max_rank2, stride_sm,
                stride_sr, stride_pool, DTYPE, BLOCK_R, PRECISION,
            )  # fmt: skip
            acc = _more_of_pool_a(
                acc, s3_ptr, pool3_ptr, row_offset3_ptr, rank3_ptr, slot, rows, columns, max_rank3, stride_sm,
                stride_sr, stride_pool, DTYPE, BLOCK_R, PRECISION,
            )  # fmt: skip
        if seed_ptr is not None:
            acc = drop_by_words(acc * keep_scale, words, threshold, BLOCK_M, BLOCK_N)
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + columns * stride_bias).to(tl.float32)[None, :]
        out_ptrs = out_ptr + rows[:, None] * stride_om + offs_n[None, :] * stride_on
        mask = mask_m[:, None] & (offs_n < N)[None, :]
        if ACCUMULATE:
            acc += tl.load(out_ptrs, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


def multi_expand_calls(
    s: torch.Tensor,
    adapters: Adapters,
    routing: Routing,
    out: torch.Tensor,
    *,
    pool: str = "b",
    accumulate: bool = False,
    bias: torch.Tensor | None = None,
    dropout: Dropout | None = None,
    arch: int,
    precision: str = "ieee",
    tile: Tile | None = None,
) -> list[Call]:
    """Launches that write `out[m] = s[m] B_i^T + bias`, or `out[m] = keep / (1 - p) * (s[m] A_i)`.

    Args:
        s: [M, max_rank], S or dS with the scaling in it, finite past each row's rank; any strides.
        adapters: fp32 masters are cast to `out`'s dtype in registers. routing: of the batch.
        out: [M, N] (of pool "a": [M, K]) any strides; every row is written.
        pool: "b" for y, "a" for dX. accumulate: add to what `out` holds, rounding once.
        bias: [N]. dropout: the forward's mask over x, whose shape is dX's.
        arch, precision: as in `lora_expand.expand_calls`. tile: overrides the table (tuning and tests).

    Raises:
        ValueError: shapes that do not agree.
    """
    options: dict[str, Any] = {"bias": bias, "dropout": dropout, "arch": arch, "precision": precision}
    return group_expand_calls([s], [adapters], routing, out, pool=pool, accumulate=accumulate, tile=tile, **options)


def group_expand_calls(
    parts_s: Sequence[torch.Tensor],
    group: Sequence[Adapters],
    routing: Routing,
    out: torch.Tensor,
    *,
    pool: str = "a",
    accumulate: bool = False,
    bias: torch.Tensor | None = None,
    dropout: Dropout | None = None,
    arch: int,
    precision: str = "ieee",
    tile: Tile | None = None,
) -> list[Call]:
    """What dX has of up to four projections of x, their sum: `out[m] = keep / (1 - p) * (s[m] A_i + ...)`.

    Args:
        parts_s: dS of each, of one dtype and one set of strides. group: their adapters.

    Raises:
        ValueError: shapes or kinds that do not agree, more than four projections, or several of pool "b".
    """
    check_group(group, routing, out=out)
    (M, N), ranks, adapters, s = out.shape, [a.max_rank for a in group], group[0], parts_s[0]
    if pool != "a" and len(group) > 1:
        raise ValueError(f"pool: expected 'a' for several projections, got {pool!r}")
    for each, part in zip(group, parts_s, strict=True):
        check_rows(each, routing, s=part)
        if (each.N if pool == "b" else each.K) != N or part.shape[1] != each.max_rank:
            raise ValueError(
                f"s, out: {tuple(part.shape)} and {tuple(out.shape)} do not fit pool {pool} of "
                f"{each.max_rank} x {each.N}"
            )
    if len({(part.dtype, part.stride()) for part in parts_s}) > 1:
        raise ValueError("s: expected one dtype and one set of strides")
    if M == 0:
        return []
    if tile is None:
        aligned = vectorizes(out) and all(map(pools_vectorize, group))
        tile = multi_expand_tile(arch=arch, dtype=out.dtype, M=M, R=max(ranks), aligned=aligned)
    parts = block_rows(M) // tile.block_m
    sources = [a.pool_b if pool == "b" else a.pool_a for a in group]
    moved = nbytes(*parts_s, bias, out) + min(routing.slots, M) * sum(ranks) * N * sources[0].element_size()
    return [
        Call(
            name="expand of many adapters",
            kernel=_multi_expand_kernel,
            grid=(routing.blocks.shape[1] * parts * cdiv(N, tile.block_c), 1, 1),
            args={
                **table_arguments(adapters, routing),
                **table_pointers(group),
                **dropout_arguments(dropout),
                **numbered("s{}_ptr", parts_s),
                **numbered("pool{}_ptr", sources),
                **numbered("max_rank{}", ranks),
                "bias_ptr": bias,
                "out_ptr": out,
                "N": N,
                **strides(s, "sm", "sr"),
                "stride_pool": 0 if pool == "b" else adapters.pool_a.stride(0),
                **strides(bias, "bias"),
                **strides(out, "om", "on"),
            },
            constants={
                "PARTS": parts,
                "POOL_IS_B": pool == "b",
                "ACCUMULATE": accumulate,
                "DTYPE": triton_dtype(out.dtype),
                "BLOCK_M": tile.block_m,
                "BLOCK_N": tile.block_c,
                "BLOCK_R": tile.block_r,
                "PRECISION": precision,
            },
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            options=compile_options(arch),
            bytes=moved + (nbytes(out) if accumulate else 0),
            flops=2 * M * N * sum(ranks),
        )
    ]
