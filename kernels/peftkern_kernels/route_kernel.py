"""The routing of a batch (routing.py) in one launch, for decoding and other batches of up to a few thousand rows.

Stable and without atomics on what is kept: a row's place is the number of rows with a smaller slot, and of earlier
rows with the same. Each program counts that for its own rows, by comparing them with all; the first program counts the
rows of each slot instead and writes the tables. So no program waits for another, and one launch is enough.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import Call, cdiv, nbytes
from .reduction_tables import next_power_of_2
from .routing import Routing, block_rows, check_ids, chunk_rows

MAX_ROWS = 4096


@triton.jit
def _keys(ids_ptr, offs, M, slots):
    """Slot of the rows `offs`, `slots` for those of none, and one more past the end."""
    ids = tl.load(ids_ptr + offs, mask=offs < M, other=0)
    key = tl.where((ids >= 0) & (ids < slots), ids, slots).to(tl.int32)
    return tl.where(offs < M, key, slots + 1)


@triton.jit
def _clear(table_ptr, used, capacity, COLUMNS: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr):
    """Entries from `used` on: -1, zeros, and LAST in the last row."""
    for start in range(0, capacity, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        mask = (entry >= used) & (entry < capacity)
        for row in tl.static_range(COLUMNS):
            value = -1 if row == 0 else (LAST if row == COLUMNS - 1 else 0)
            tl.store(table_ptr + row * capacity + entry, tl.full((BLOCK,), value, tl.int32), mask=mask)


@triton.jit
def _cut(
    table_ptr, plane, slot, starts, counts, capacity,
    ROWS: tl.constexpr, PLANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the pieces of at most ROWS rows of each slot; `plane` [BLOCK] is the first plane of each, or -1."""
    number = (counts + ROWS - 1) // ROWS
    first = tl.cumsum(number, 0) - number
    for j in range(0, tl.max(number, 0)):
        mask = j < number
        tl.store(table_ptr + first + j, slot, mask=mask)
        tl.store(table_ptr + capacity + first + j, starts + j * ROWS, mask=mask)
        tl.store(table_ptr + 2 * capacity + first + j, tl.minimum(counts - j * ROWS, ROWS), mask=mask)
        if PLANES:
            tl.store(table_ptr + 3 * capacity + first + j, tl.where(plane >= 0, plane + j, -1), mask=mask)
    _clear(table_ptr, tl.sum(number, 0), capacity, 4 if PLANES else 3, -1 if PLANES else 0, BLOCK)


@triton.jit
def _write_tables(
    ids_ptr, seg_start_ptr, blocks_ptr, chunks_ptr, sums_ptr, M, slots, B, C, D,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    slot = tl.arange(0, BLOCK_S)
    counts = tl.zeros((BLOCK_S,), tl.int32)
    for start in range(0, M, BLOCK_J):
        counts += tl.histogram(_keys(ids_ptr, start + tl.arange(0, BLOCK_J), M, slots), BLOCK_S)
    counts = tl.where(slot <= slots, counts, 0)  # the key past them is the tile's rest
    starts = tl.cumsum(counts, 0) - counts
    tl.store(seg_start_ptr + slot, starts, mask=slot <= slots)
    nothing = tl.full((BLOCK_S,), -1, tl.int32)
    _cut(blocks_ptr, nothing, tl.where(slot < slots, slot, -1), starts, counts, B, ROWS, False, BLOCK_S)
    counts = tl.where(slot < slots, counts, 0)
    several = (counts > CHUNK).to(tl.int32)
    planes = tl.where(counts > CHUNK, (counts + CHUNK - 1) // CHUNK, 0)
    first_plane = tl.cumsum(planes, 0) - planes
    plane = tl.where(counts > CHUNK, first_plane, nothing)
    _cut(chunks_ptr, plane, slot, starts, counts, C, CHUNK, True, BLOCK_S)
    entry = tl.cumsum(several, 0) - several
    tl.store(sums_ptr + entry, slot, mask=counts > CHUNK)
    tl.store(sums_ptr + D + entry, first_plane, mask=counts > CHUNK)
    tl.store(sums_ptr + 2 * D + entry, planes, mask=counts > CHUNK)
    _clear(sums_ptr, tl.sum(several, 0), D, 3, 0, BLOCK_S)


@triton.jit(do_not_specialize=["M", "B", "C", "D"])
def _route_kernel(
    ids_ptr, own_ptr, perm_ptr, row_in_adapter_ptr, seg_start_ptr, blocks_ptr, chunks_ptr, sums_ptr,
    M, slots, B, C, D,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    if tl.program_id(0) == 0:
        _write_tables(
            ids_ptr, seg_start_ptr, blocks_ptr, chunks_ptr, sums_ptr, M, slots, B, C, D, ROWS, CHUNK, BLOCK_J, BLOCK_S
        )
    else:
        offs_i = (tl.program_id(0) - 1) * BLOCK_I + tl.arange(0, BLOCK_I)
        key = _keys(ids_ptr, offs_i, M, slots)
        smaller = tl.zeros((BLOCK_I,), tl.int32)
        earlier = tl.zeros((BLOCK_I,), tl.int32)
        for start in range(0, M, BLOCK_J):
            offs_j = start + tl.arange(0, BLOCK_J)
            other = _keys(ids_ptr, offs_j, M, slots)
            smaller += tl.sum((other[None, :] < key[:, None]).to(tl.int32), 1)
            is_earlier = (other[None, :] == key[:, None]) & (offs_j[None, :] < offs_i[:, None])
            earlier += tl.sum(is_earlier.to(tl.int32), 1)
        mask = offs_i < M
        tl.store(own_ptr + offs_i, tl.where(key < slots, key, -1), mask=mask)
        tl.store(perm_ptr + smaller + earlier, offs_i, mask=mask)
        tl.store(row_in_adapter_ptr + offs_i, earlier, mask=mask)


def route_calls(ids: torch.Tensor, routing: Routing) -> list[Call]:
    """The launch that fills an `empty_routing`, as `build_routing` would.

    Args:
        ids: int32 or int64 [M], contiguous, at most MAX_ROWS. routing: its tables are written.

    Raises:
        ValueError: ids that are not so, or tables of another size.
    """
    check_ids(ids)
    (M,), slots = ids.shape, routing.slots
    if M > MAX_ROWS or M != routing.M or not ids.is_contiguous():
        raise ValueError(f"ids: expected {routing.M} contiguous, at most {MAX_ROWS}, got {M} of stride {ids.stride(0)}")
    block_i, block_j = 16, min(256, max(16, next_power_of_2(max(M, 1))))
    return [
        Call(
            name="route",
            kernel=_route_kernel,
            grid=(1 + cdiv(M, block_i), 1, 1),
            args={
                "ids_ptr": ids,
                "own_ptr": routing.ids,
                "perm_ptr": routing.perm,
                "row_in_adapter_ptr": routing.row_in_adapter,
                "seg_start_ptr": routing.seg_start,
                "blocks_ptr": routing.blocks,
                "chunks_ptr": routing.chunks,
                "sums_ptr": routing.sums,
                "M": M,
                "slots": slots,
                "B": routing.blocks.shape[1],
                "C": routing.chunks.shape[1],
                "D": routing.sums.shape[1],
            },
            constants={
                "ROWS": block_rows(M),
                "CHUNK": chunk_rows(M),
                "BLOCK_I": block_i,
                "BLOCK_J": block_j,
                "BLOCK_S": next_power_of_2(slots + 2),
            },
            num_warps=8 if slots > 510 else 4,
            num_stages=1,
            bytes=nbytes(ids, *routing.tensors),
        )
    ]
