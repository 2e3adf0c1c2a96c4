"""How the plain path of `multi_lora_linear` cuts a batch: a few batched products in place of one for each adapter.

A group is P equal pieces of a batch, each of L rows that want one adapter, all of one rank r: one batched product
[P, L, K] x [P, K, r] serves them all. The adapters are read where they lie in the pool if they lie evenly, else copied
together; rows are used where they lie if they do so one after another, else gathered: each group's, or all at
once by `in_order`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from peftkern.adapter_pool import Layout

# From so many rows of an adapter in a row on, copying an adapter costs less than gathering the rows.
LONG = 16


@dataclass(slots=True)
class Group:
    """P pieces of L rows each, and where their adapters lie.

    Attributes:
        slots: the slot of each piece; a slot can have several.
        rank: r, the same for all.
        length: L.
        rows: the P * L rows, piece by piece: a slice, or int64 indices.
        first, step: adapter p begins at pool row first + p * step; a step of 0 means that `offsets` tells.
        offsets: int64 [P], or None.
    """

    slots: tuple[int, ...]
    rank: int
    length: int
    rows: slice | torch.Tensor
    first: int
    step: int
    offsets: torch.Tensor | None

    def factors_a(self, pool_a: torch.Tensor) -> torch.Tensor:
        """lora_A of each piece: [P, r, K], a view if it can be one."""
        K = pool_a.shape[1]
        return self._blocks(pool_a, (self.rank, K), K)

    def factors_b(self, pool_b: torch.Tensor, N: int) -> torch.Tensor:
        """lora_B of each piece: [P, N, r], likewise."""
        return self._blocks(pool_b, (N, self.rank), N)

    def _blocks(self, pool: torch.Tensor, shape: tuple[int, int], row: int) -> torch.Tensor:
        P, origin, width = len(self.slots), pool.storage_offset(), shape[1]
        if self.offsets is None:
            size, stride = (P, *shape), (self.step * row, width, 1)
            return pool.as_strided(size, stride, origin + self.first * row)
        # Every place where a block could begin, of which those that do are copied.
        places = (pool.numel() - shape[0] * width) // row + 1
        return pool.as_strided((places, *shape), (row, width, 1), origin).index_select(0, self.offsets)


class InOrder(NamedTuple):
    """Groups of a batch's rows, which may have been put into the groups' order.

    Attributes:
        order: int64 [M], the row that comes in each place; None where rows stay where they are.
        back: int64 [M], the place of each row; None likewise.
        groups: those of the rows in this order.
    """

    order: torch.Tensor | None
    back: torch.Tensor | None
    groups: list[Group]


def in_order(groups: list[Group], M: int) -> InOrder:
    """M rows in the order of their groups, each of which is a slice of them.

    As they are where that is so already, and where rows are in no group: a product's last bits depend on the place of
    a row, and those of a row that wants the base alone are to be the frozen layer's.
    """
    gathered = [group.rows for group in groups if isinstance(group.rows, torch.Tensor)]
    if not gathered or sum(len(group.slots) * group.length for group in groups) < M:
        return InOrder(None, None, groups)
    places = torch.arange(M, device=gathered[0].device)
    order = torch.cat([places[group.rows] for group in groups])
    ends = itertools.accumulate(len(group.slots) * group.length for group in groups)
    moved = [replace(g, rows=slice(end - len(g.slots) * g.length, end)) for g, end in zip(groups, ends, strict=True)]
    return InOrder(order, order.argsort(), moved)


def make_groups(ids: Sequence[int], each: int, layout: Layout, device: torch.device) -> list[Group]:
    """The groups of a batch whose row i has `each` rows of x, all of which want the adapter in slot ids[i].

    Rows of no slot, or of an empty one, are in no group.
    """
    places = layout.places
    known = [i if 0 <= i < len(places) and places[i][1] else -1 for i in ids]
    if each == 0:
        return []
    pieces = _long_pieces(known, layout) if each >= LONG else _short_pieces(known, each, layout)
    return [_group(slots, rows, each, layout, device) for slots, rows in pieces]


Pieces = list[tuple[list[int], list[int]]]  # slots of the pieces, and the batch's rows, piece by piece


def _long_pieces(known: list[int], layout: Layout) -> Pieces:
    """Stretches of the batch, each of one rank: nothing of x is gathered, an adapter may be copied twice."""
    pieces: Pieces = []
    numbered = list(enumerate(known))
    for rank, stretch in itertools.groupby(numbered, lambda row: layout.places[row[1]][1] if row[1] >= 0 else 0):
        if rank == 0:
            continue
        members = list(stretch)
        blocks = [(slot, [i for i, _ in block]) for slot, block in itertools.groupby(members, lambda row: row[1])]
        if len({len(rows) for _, rows in blocks}) > 1:
            blocks = [(slot, [i]) for i, slot in members]
        pieces.append(([slot for slot, _ in blocks], [i for _, rows in blocks for i in rows]))
    return pieces


def _short_pieces(known: list[int], each: int, layout: Layout) -> Pieces:
    """All rows of an adapter as one piece; those of one rank and length together."""
    rows_of: dict[int, list[int]] = {}
    for i, slot in enumerate(known):
        if slot >= 0:
            rows_of.setdefault(slot, []).append(i)
    alike: dict[tuple[int, int], list[int]] = {}
    for slot, rows in rows_of.items():
        alike.setdefault((layout.places[slot][1], len(rows)), []).append(slot)
    pieces: Pieces = []
    for (rank, count), slots in alike.items():
        if count * each < rank:  # rows are lighter than adapters: those in the pool's order can be a view
            slots = sorted(slots)
        pieces.append((slots, [i for slot in slots for i in rows_of[slot]]))
    return pieces


def _group(slots: list[int], rows: list[int], each: int, layout: Layout, device: torch.device) -> Group:
    where: slice | torch.Tensor
    if rows == list(range(rows[0], rows[0] + len(rows))):
        where = slice(rows[0] * each, (rows[-1] + 1) * each)
    else:
        where = torch.tensor(rows, dtype=torch.int64, device="cpu")
        if each > 1:
            where = (where[:, None] * each + torch.arange(each, device="cpu")).flatten()
        where = where.to(device)
    firsts = [layout.places[slot][0] for slot in slots]
    rank = layout.places[slots[0]][1]
    steps = {b - a for a, b in itertools.pairwise(firsts)} or {rank}
    even = len(steps) == 1 and min(steps) >= rank
    offsets = None if even else torch.tensor(firsts, dtype=torch.int64, device=device)
    return Group(
        tuple(slots), rank, len(rows) * each // len(slots), where, firsts[0], steps.pop() if even else 0, offsets
    )
