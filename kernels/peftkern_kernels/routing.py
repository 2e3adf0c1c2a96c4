"""Which rows of a batch want which adapter, sorted and cut into blocks: made on the device, once for all layers.

Rows are sorted by slot, stably, those of no adapter last. A grouped kernel's program takes one block: at most
`block_rows(M)` sorted rows of one slot; a weight gradient's takes one chunk, the same with more rows. Tables have the
size that the capacity could need, so that no size depends on what is in them, and nothing waits for the device.

`build_routing` is plain PyTorch for any device and any M. Up to `route_kernel.MAX_ROWS` rows a GPU does the same in one
launch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Added to a dropout seed once for each slot, modulo 2^64: the golden ratio's odd 64-bit fraction, as a signed number.
SLOT_SEED_STEP = 0x9E3779B97F4A7C15 - 2**64


@dataclass(frozen=True, slots=True)
class Routing:
    """Tables of a batch of M rows over `slots` adapters, all int32 on one device.

    Attributes:
        ids: [M] slot of each row; -1 where it wants the base alone, or named a slot that does not exist.
        perm: [M] rows sorted by slot, in batch order within a slot, those of -1 last.
        row_in_adapter: [M] position of a row among the rows of its slot: the dropout mask's row.
        seg_start: [slots + 1] where a slot's rows start in `perm`; the last entry is where those of -1 do.
        blocks: [3, B] slot, first position in `perm`, number of rows. Blocks of -1 have slot -1 and come after the
            slots'; unused entries have slot -1 and no rows.
        chunks: [4, C] slot, first, number of rows, fp32 plane that takes its sum. Only slots have chunks. The plane is
            -1 where one chunk is all of its slot's rows: its sum is the result. Unused entries: -1, 0, 0, -1.
        sums: [3, D] slots of several chunks: slot, first plane, number of planes. Unused entries: -1, 0, 0.
    """

    ids: torch.Tensor
    perm: torch.Tensor
    row_in_adapter: torch.Tensor
    seg_start: torch.Tensor
    blocks: torch.Tensor
    chunks: torch.Tensor
    sums: torch.Tensor

    @property
    def M(self) -> int:
        """Rows of the batch."""
        return self.ids.shape[0]

    @property
    def slots(self) -> int:
        """Slots that the batch was routed for."""
        return self.seg_start.shape[0] - 1

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The tables in the order of the attributes: `Routing(*routing.tensors)` is the same routing."""
        return (
            self.ids, self.perm, self.row_in_adapter, self.seg_start, self.blocks, self.chunks, self.sums
        )  # fmt: skip


def block_rows(M: int) -> int:
    """Rows of a block, of a batch of M: matrix instructions' least where batches are small, else a full tile."""
    return 16 if M <= 256 else 32 if M <= 1024 else 64


def chunk_rows(M: int) -> int:
    """Rows that one program of a weight gradient sums up; a multiple of 64."""
    return 256 if M <= 1024 else 512 if M <= 4096 else 1024


def pieces(M: int, segments: int, rows: int) -> int:
    """The most pieces of at most `rows` rows that M rows in at most `segments` segments can be cut into."""
    most = min(segments, M)
    return (M - most) // rows + most


def plane_count(M: int) -> int:
    """The most chunks of slots that have several: fp32 planes that a weight gradient needs."""
    rows = chunk_rows(M)
    return pieces(M, M // (rows + 1), rows) if rows < M else 0


def empty_routing(M: int, slots: int, device: torch.device | str) -> Routing:
    """A routing with tables of the right shapes and nothing in them."""
    rows, chunk = block_rows(M), chunk_rows(M)
    shapes: tuple[tuple[int, ...], ...] = (
        (M,), (M,), (M,), (slots + 1,), (3, pieces(M, slots + 1, rows)), (4, pieces(M, slots, chunk)),
        (3, M // (chunk + 1)),
    )  # fmt: skip
    return Routing(*(torch.empty(shape, dtype=torch.int32, device=device) for shape in shapes))


def slot_seed(seed: torch.Tensor, slot: int) -> torch.Tensor:
    """The dropout seed of one slot's rows: `seed + slot * SLOT_SEED_STEP` modulo 2^64.

    The mask of a row is `dropout_mask(slot_seed(seed, slot), row_in_adapter, k)`: that of the slot's rows run alone.
    """
    return seed + torch.full_like(seed, slot) * SLOT_SEED_STEP


def build_routing(ids: torch.Tensor, slots: int) -> Routing:
    """The routing of a batch, in plain PyTorch without waiting for the device.

    Args:
        ids: int32 or int64 [M], a slot for each row; anything outside [0, slots) wants the base alone.
        slots: adapters that there is room for.

    Raises:
        ValueError: ids that are not one-dimensional int32 or int64, or no slot at all.
    """
    check_ids(ids)
    if slots < 1:
        raise ValueError(f"slots: expected at least 1, got {slots}")
    M, device = ids.shape[0], ids.device
    known = (ids >= 0) & (ids < slots)
    own = torch.where(known, ids, -1).int()
    key, perm = torch.sort(torch.where(known, ids, slots).int(), stable=True)
    seg_start = torch.searchsorted(key, torch.arange(slots + 1, dtype=torch.int32, device=device)).int()
    position = torch.arange(M, dtype=torch.int32, device=device) - seg_start[key]
    row_in_adapter = torch.empty_like(own).scatter_(0, perm, position)
    counts = torch.diff(seg_start, append=torch.full((1,), M, dtype=torch.int32, device=device))  # [slots + 1]
    rows, chunk = block_rows(M), chunk_rows(M)
    blocks, _, _ = _cut(counts, seg_start, rows, pieces(M, slots + 1, rows))
    blocks[0] = torch.where(blocks[0] < slots, blocks[0], -1)
    chunks, owner, within = _cut(counts[:-1], seg_start[:-1], chunk, pieces(M, slots, chunk))
    planes, sums = _planes(counts[:-1], chunk, M // (chunk + 1))
    plane = planes[owner] + within
    plane = torch.where((chunks[0] >= 0) & (planes[owner] >= 0), plane, -1)
    return Routing(
        own, perm.int(), row_in_adapter, seg_start, blocks.int(), torch.cat([chunks, plane[None]]).int(), sums.int()
    )


def check_ids(ids: torch.Tensor) -> None:
    """ValueError where ids are not int32 or int64 [M]."""
    if ids.dim() != 1 or ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"ids: expected int32 or int64 [M], got {ids.dtype} {list(ids.shape)}")


def _cut(
    counts: torch.Tensor, starts: torch.Tensor, rows: int, capacity: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[3, capacity] (segment or -1, first, length) of pieces of segments; a segment each, and its how-manieth it is."""
    number = (counts + rows - 1) // rows
    ends = torch.cumsum(number, 0)
    piece = torch.arange(capacity, device=counts.device)
    segment = torch.searchsorted(ends, piece, right=True)
    used = segment < counts.shape[0]
    owner = torch.where(used, segment, 0)
    within = piece - (ends - number)[owner]
    first = starts[owner] + within * rows
    length = torch.clamp(counts[owner] - within * rows, max=rows)
    table = torch.stack([torch.where(used, owner, -1), torch.where(used, first, 0), torch.where(used, length, 0)])
    return table, owner, within


def _planes(counts: torch.Tensor, rows: int, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
    """First plane of each segment, -1 where it needs none; [3, capacity] (segment, first plane, planes) of the rest."""
    several = counts > rows
    number = torch.where(several, (counts + rows - 1) // rows, 0)
    first = torch.cumsum(number, 0) - number
    segment = torch.searchsorted(torch.cumsum(several, 0), torch.arange(capacity, device=counts.device), right=True)
    used = segment < counts.shape[0]
    owner = torch.where(used, segment, 0)
    table = [torch.where(used, owner, -1), torch.where(used, first[owner], 0), torch.where(used, number[owner], 0)]
    return torch.where(several, first, -1), torch.stack(table)
