"""The tables of a batch whose rows come sorted by expert, made on the device in one launch from the experts' ends.

The kernels over many adapters take a `Routing`; of rows that are sorted already its permutation is the identity, and
its blocks and chunks are each expert's rows, cut. Beside it come the tiles that grouped_gemm.py walks, and the tables
that say where each expert's adapter lies in pools of rank rows. Each program works out its own entries of every table
from all experts' counts, so that no program waits for another.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .launch import Call, cdiv, compile_options, nbytes, scratch
from .reduction_tables import next_power_of_2
from .routing import Routing, block_rows, chunk_rows, pieces

ROWS_OF_PROGRAM = 1024


@dataclass(frozen=True, slots=True)
class Grouping:
    """Tables of T rows sorted by expert, all int32 but `scaling`, on one device.

    Attributes:
        tiles: [3, P] expert, first row, number of rows (at most a tile's). Tiles of rows without an expert have expert
            -1 and come after the experts'; unused entries have no rows.
        routing: what the kernels over many adapters take, an expert for a slot; None where there are no adapters. Its
            `ids` and `row_in_adapter`, which only dropout and batches in another order need, are not filled.
        row_offset, rank: [E] first pool row and rank of each expert's adapter. scaling: float32 [E].
    """

    tiles: torch.Tensor
    routing: Routing | None = None
    row_offset: torch.Tensor | None = None
    rank: torch.Tensor | None = None
    scaling: torch.Tensor | None = None


def empty_grouping(T: int, E: int, block_m: int, device: torch.device, *, adapters: bool) -> Grouping:
    """Tables of the right shapes in scratch memory, nothing in them."""

    def table(*shape: int) -> torch.Tensor:
        return scratch(*shape, dtype=torch.int32, device=device)

    tiles = table(3, pieces(T, E + 1, block_m))
    if not adapters:
        return Grouping(tiles)
    perm, rows, chunk = table(T), block_rows(T), chunk_rows(T)
    routing = Routing(
        ids=perm,
        perm=perm,
        row_in_adapter=perm,
        seg_start=table(E + 1),
        blocks=table(3, pieces(T, E + 1, rows)),
        chunks=table(4, pieces(T, E, chunk)),
        sums=table(3, T // (chunk + 1)),
    )
    return Grouping(tiles, routing, table(E), table(E), scratch(E, dtype=torch.float32, device=device))


@triton.jit
def _bounds(offsets_ptr, segment, E, T):
    """(first row, rows) of segments: an expert each, E for the rows of none, nothing past that.

    Ends that make no sense, which nobody waits to check, give tables that still point at rows.
    """
    start = tl.load(offsets_ptr + segment - 1, mask=(segment > 0) & (segment <= E), other=0)
    stop = tl.load(offsets_ptr + segment, mask=segment < E, other=T)
    start = tl.minimum(tl.maximum(start, 0), T)
    stop = tl.minimum(tl.maximum(stop, start), T)
    return start, tl.where(segment <= E, stop - start, 0)


@triton.jit
def _write_pieces(
    table_ptr, planes, entry, capacity, offsets_ptr, segment, counts, E, T, ROWS: tl.constexpr, PLANES: tl.constexpr
):  # fmt: skip
    """Entries `entry` [BLOCK_I] of a table of pieces of at most ROWS rows of the segments with `counts` [BLOCK_S].

    `planes` [BLOCK_S] are the fp32 planes that a segment needs, for a table that says them (PLANES).
    """
    number = (counts + ROWS - 1) // ROWS
    ends = tl.cumsum(number, 0)
    before = ends[None, :] <= entry[:, None]  # [BLOCK_I, BLOCK_S]: segments all of whose pieces come earlier
    owner = tl.sum(before.to(tl.int32), 1)
    piece = entry - tl.sum(tl.where(before, number[None, :], 0), 1)
    start, rows = _bounds(offsets_ptr, owner, E, T)
    used = entry < tl.sum(number, 0)
    mask = entry < capacity
    tl.store(table_ptr + entry, tl.where(used & (owner < E), owner, -1), mask=mask)
    tl.store(table_ptr + capacity + entry, tl.where(used, start + piece * ROWS, 0), mask=mask)
    tl.store(table_ptr + 2 * capacity + entry, tl.where(used, tl.minimum(rows - piece * ROWS, ROWS), 0), mask=mask)
    if PLANES:
        plane = tl.sum(tl.where(before, planes[None, :], 0), 1) + piece
        tl.store(table_ptr + 3 * capacity + entry, tl.where(used & (rows > ROWS), plane, -1), mask=mask)


@triton.jit
def _write_sums(table_ptr, planes, entry, capacity):
    """Entries of the table of segments that need planes: segment, first plane, planes."""
    ends = tl.cumsum((planes > 0).to(tl.int32), 0)
    before = ends[None, :] <= entry[:, None]
    owner = tl.sum(before.to(tl.int32), 1)
    first = tl.sum(tl.where(before, planes[None, :], 0), 1)
    own = tl.sum(tl.where(ends[None, :] == entry[:, None] + 1, planes[None, :], 0), 1)
    used = entry < tl.sum((planes > 0).to(tl.int32), 0)
    mask = entry < capacity
    tl.store(table_ptr + entry, tl.where(used, owner, -1), mask=mask)
    tl.store(table_ptr + capacity + entry, tl.where(used, first, 0), mask=mask)
    tl.store(table_ptr + 2 * capacity + entry, tl.where(used, own, 0), mask=mask)


@triton.jit(do_not_specialize=["T", "P", "B", "C", "D"])
def _grouped_route_kernel(
    offsets_ptr, tiles_ptr, perm_ptr, seg_start_ptr, blocks_ptr, chunks_ptr, sums_ptr,
    row_offset_ptr, rank_ptr, scaling_ptr,
    T, E, P, B, C, D, R, scaling,
    BLOCK_M: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, ADAPTERS: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    entry = pid * BLOCK_I + tl.arange(0, BLOCK_I)
    segment = tl.arange(0, BLOCK_S)
    starts, counts = _bounds(offsets_ptr, segment, E, T)
    nothing = tl.zeros((BLOCK_S,), tl.int32)
    _write_pieces(tiles_ptr, nothing, entry, P, offsets_ptr, segment, counts, E, T, BLOCK_M, False)
    if ADAPTERS:
        _write_pieces(blocks_ptr, nothing, entry, B, offsets_ptr, segment, counts, E, T, ROWS, False)
        known = tl.where(segment < E, counts, 0)
        planes = tl.where(known > CHUNK, (known + CHUNK - 1) // CHUNK, 0)
        _write_pieces(chunks_ptr, planes, entry, C, offsets_ptr, segment, known, E, T, CHUNK, True)
        _write_sums(sums_ptr, planes, entry, D)
        offs_t = pid * BLOCK_T + tl.arange(0, BLOCK_T)
        tl.store(perm_ptr + offs_t, offs_t, mask=offs_t < T)
        if pid == 0:
            tl.store(seg_start_ptr + segment, starts, mask=segment <= E)
            tl.store(row_offset_ptr + segment, segment * R, mask=segment < E)
            tl.store(rank_ptr + segment, nothing + R, mask=segment < E)
            tl.store(scaling_ptr + segment, nothing.to(tl.float32) + scaling, mask=segment < E)


def grouped_route_calls(
    offsets: torch.Tensor, grouping: Grouping, T: int, block_m: int, *, R: int = 0, scaling: float = 0.0, arch: int
) -> list[Call]:
    """The launch that fills an `empty_grouping` of T rows for tiles of `block_m` rows.

    Args:
        offsets: int32 [E], contiguous: the end of each expert's rows. What is past T counts as T.
        R, scaling: of the adapters, if the grouping has room for them. arch: see `gemm_tables`.

    Raises:
        ValueError: offsets that are not so.
    """
    if offsets.dim() != 1 or offsets.dtype != torch.int32 or not offsets.is_contiguous():
        raise ValueError(f"offsets: expected contiguous int32 [E], got {offsets.dtype} {list(offsets.shape)}")
    (E,), routing = offsets.shape, grouping.routing
    block_s = max(16, next_power_of_2(E + 1))
    block_i = min(64, max(1, 8192 // block_s))
    tables = [] if routing is None else [routing.blocks, routing.chunks, routing.sums]
    sizes = [t.shape[1] for t in (grouping.tiles, *tables)]
    rows = 0 if routing is None else cdiv(T, ROWS_OF_PROGRAM)
    B, C, D = sizes[1:] or (0, 0, 0)
    written = () if routing is None else (routing.perm, routing.seg_start, *tables)
    return [
        Call(
            name="route of experts",
            kernel=_grouped_route_kernel,
            grid=(max(1, rows, *(cdiv(size, block_i) for size in sizes)), 1, 1),
            args={
                "offsets_ptr": offsets,
                "tiles_ptr": grouping.tiles,
                "perm_ptr": None if routing is None else routing.perm,
                "seg_start_ptr": None if routing is None else routing.seg_start,
                "blocks_ptr": None if routing is None else routing.blocks,
                "chunks_ptr": None if routing is None else routing.chunks,
                "sums_ptr": None if routing is None else routing.sums,
                "row_offset_ptr": grouping.row_offset,
                "rank_ptr": grouping.rank,
                "scaling_ptr": grouping.scaling,
                "T": T,
                "E": E,
                "P": sizes[0],
                "B": B,
                "C": C,
                "D": D,
                "R": R,
                "scaling": float(scaling),
            },
            constants={
                "BLOCK_M": block_m,
                "ROWS": block_rows(T),
                "CHUNK": chunk_rows(T),
                "ADAPTERS": routing is not None,
                "BLOCK_I": block_i,
                "BLOCK_S": block_s,
                "BLOCK_T": ROWS_OF_PROGRAM,
            },
            num_warps=4,
            num_stages=1,
            options=compile_options(arch),
            bytes=nbytes(offsets, grouping.tiles, grouping.row_offset, grouping.rank, grouping.scaling, *written),
        )
    ]
