"""Decoding with many adapters: `y[m] = base[m] + bias + scaling[s] * x[m] A_s^T B_s^T` for at most 64 rows.

With a token or two for each adapter the time is that of reading the adapters once, 262 kB each at K = N = 4096 and rank
16. Two launches: the first splits K and leaves fp32 planes of x A^T; the second adds them in a fixed order, scales and
rounds S, multiplies it with B and adds what the base gave. A program has rows of one adapter (a block of the routing),
so that tokens that share one share its loads; the adapter's rank is the dot's M, tokens its N, and one token wastes
nothing but idle lanes of the matrix instruction. Work follows each adapter's own rank. Up to four projections of one x,
each with a pool of its own, share the two launches (projections.py); one layer is a group of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from .adapters import Adapters
from .launch import Call, cdiv, compile_options, nbytes, scratch, strides
from .multi_decode_finish import check_projections, expand_planes_call, programs_a_block, tables
from .multi_group import Projection
from .multi_tables import DecodeTile, multi_decode_tile, pools_vectorize
from .multi_tile import shrink_part
from .projections import block_of_projection, blocks_of, columns, numbered, of_projection, sum_of
from .reduction_tables import vectorizes
from .routing import Routing

MAX_ROWS = 64


@triton.jit(do_not_specialize=["B", "M"])
def _multi_decode_shrink_kernel(
    x_ptr, perm_ptr, blocks_ptr,
    pool_ptr, pool1_ptr, pool2_ptr, pool3_ptr, planes_ptr, planes1_ptr, planes2_ptr, planes3_ptr,
    row_offset_ptr, row_offset1_ptr, row_offset2_ptr, row_offset3_ptr, rank_ptr, rank1_ptr, rank2_ptr, rank3_ptr,
    max_rank, max_rank1, max_rank2, max_rank3,
    B, M, K, k_part, stride_xm, stride_xk, stride_pool,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    NUM_STAGES: tl.constexpr, OVERLAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    blocks_r = blocks_of(max_rank, max_rank1, max_rank2, max_rank3, BLOCK_R)
    split = tl.program_id(0) // blocks_r
    which, block_r = block_of_projection(
        tl.program_id(0) % blocks_r, max_rank, max_rank1, max_rank2, max_rank3, BLOCK_R
    )
    k_start = split * k_part
    shrink_part(
        x_ptr, of_projection(which, pool_ptr, pool1_ptr, pool2_ptr, pool3_ptr),
        of_projection(which, planes_ptr, planes1_ptr, planes2_ptr, planes3_ptr), perm_ptr, blocks_ptr,
        of_projection(which, row_offset_ptr, row_offset1_ptr, row_offset2_ptr, row_offset3_ptr),
        of_projection(which, rank_ptr, rank1_ptr, rank2_ptr, rank3_ptr), B, tl.program_id(1), tl.program_id(2),
        block_r * BLOCK_R, split, k_start, tl.minimum(k_start + k_part, K), M,
        sum_of(max_rank, max_rank1, max_rank2, max_rank3),
        stride_xm, stride_xk, stride_pool, BLOCK_M, BLOCK_R, BLOCK_K, EVEN_K, NUM_STAGES, PRECISION,
    )  # fmt: skip


def multi_decode_calls(
    x: torch.Tensor,
    adapters: Adapters,
    routing: Routing,
    out: torch.Tensor,
    *,
    base: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    s_out: torch.Tensor | None = None,
    arch: int,
    precision: str = "ieee",
    tile: DecodeTile | None = None,
) -> list[Call]:
    """The two launches that write `out[m] = base[m] + bias + scaling[s] * x[m] A_s^T B_s^T`, s = ids[m].

    Args:
        x: [M, K], M at most 64; fp32, fp16 or bf16, any strides.
        adapters: of x's dtype or fp32 (rounded to x's dtype in registers). routing: of the batch.
        out: [M, N] any float dtype, any strides; every row is written.
        base, bias, s_out: see `multi_group.Projection`.
        arch: see `gemm_tables`. precision: `input_precision` of fp32 dots. tile: overrides the table.

    Raises:
        ValueError: more than 64 rows, or shapes that do not agree.
    """
    group = [Projection(adapters, out, base, bias, s_out)]
    return group_decode_calls(x, group, routing, arch=arch, precision=precision, tile=tile)


def group_decode_calls(
    x: torch.Tensor,
    group: Sequence[Projection],
    routing: Routing,
    *,
    arch: int,
    precision: str = "ieee",
    tile: DecodeTile | None = None,
) -> list[Call]:
    """The same two launches for up to four projections of x, each with what is its own.

    Args:
        group: their outs in one dtype with one column stride, and so bases, biases and s_outs, which all or none have;
            a base is `out` itself for all or for none.

    Raises:
        ValueError: more than 64 rows or four projections, or shapes and kinds that do not agree.
    """
    check_projections(x, group, routing)
    (M, K), ranks = x.shape, [each.adapters.max_rank for each in group]
    if M > MAX_ROWS:
        raise ValueError(f"x: expected at most {MAX_ROWS} rows on the decode path, got {M}")
    if M == 0:
        return []
    R, held = max(ranks), [each.adapters for each in group]
    first = held[0]
    if tile is None:
        aligned = vectorizes(x) and all(map(pools_vectorize, held))
        options: dict[str, Any] = {"masters": first.pool_a.dtype != x.dtype, "projections": len(group)}
        tile = multi_decode_tile(arch=arch, dtype=x.dtype, M=M, N=first.N, K=K, R=R, aligned=aligned, **options)
    k_part = cdiv(cdiv(K, tile.block_k), tile.split_k) * tile.block_k
    split = cdiv(K, k_part)
    planes = scratch(split, M, sum(ranks), dtype=torch.float32, device=x.device)
    used = min(routing.slots, M)
    shrink = Call(
        name="decode with many adapters: shrink",
        kernel=_multi_decode_shrink_kernel,
        grid=(
            split * sum(cdiv(rank, tile.block_r) for rank in ranks),
            routing.blocks.shape[1],
            programs_a_block(M, tile),
        ),
        args={
            "x_ptr": x,
            **tables(held, routing),
            **numbered("pool{}_ptr", [a.pool_a for a in held]),
            **numbered("planes{}_ptr", columns(planes, ranks)),
            **numbered("max_rank{}", ranks),
            "M": M,
            "K": K,
            "k_part": k_part,
            **strides(x, "xm", "xk"),
            "stride_pool": first.pool_a.stride(0),
        },
        constants={
            "BLOCK_M": tile.rows,
            "BLOCK_R": tile.block_r,
            "BLOCK_K": tile.block_k,
            "EVEN_K": K % tile.block_k == 0,
            "NUM_STAGES": tile.num_stages,
            "OVERLAP": tile.overlap,
            "PRECISION": precision,
        },
        num_warps=tile.shrink_warps,
        num_stages=tile.num_stages,
        options=compile_options(arch),
        bytes=nbytes(x, planes) + used * sum(ranks) * K * first.pool_a.element_size(),
        flops=2 * M * K * sum(ranks),
    )
    return [shrink, expand_planes_call(planes, group, routing, arch, precision, tile, x.dtype)]
