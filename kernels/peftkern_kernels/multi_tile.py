"""Device functions that the kernels over many adapters share: whose rows a program has, and where their factors lie."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .adapters import Adapters
from .dropout import Dropout
from .routing import SLOT_SEED_STEP, Routing

_SEED_STEP = tl.constexpr(SLOT_SEED_STEP)


@triton.jit
def piece_of(table_ptr, capacity, index):
    """(slot or -1, first position in `perm`, rows) of one entry of a routing's blocks or chunks."""
    entry_ptr = table_ptr + index
    return tl.load(entry_ptr), tl.load(entry_ptr + capacity), tl.load(entry_ptr + 2 * capacity)


@triton.jit
def adapter_of(slot, row_offset_ptr, rank_ptr):
    """(first pool row as int64, rank) of a slot; rank 0 where the slot is -1."""
    at = tl.maximum(slot, 0)
    rank = tl.where(slot >= 0, tl.load(rank_ptr + at), 0)
    return tl.load(row_offset_ptr + at).to(tl.int64), rank


@triton.jit
def slot_key(seed_ptr, slot):
    """`routing.slot_seed` of one slot, or of a tile of them."""
    return tl.load(seed_ptr) + slot.to(tl.int64) * _SEED_STEP


def table_arguments(adapters: Adapters, routing: Routing) -> dict[str, object]:
    """The run-time arguments, by name, with which a kernel walks a routing's blocks."""
    return {
        "perm_ptr": routing.perm,
        "blocks_ptr": routing.blocks,
        "seg_start_ptr": routing.seg_start,
        "row_offset_ptr": adapters.row_offset,
        "rank_ptr": adapters.rank,
        "B": routing.blocks.shape[1],
    }


def dropout_arguments(dropout: Dropout | None) -> dict[str, object]:
    """Seed, threshold and scale of a mask, by name."""
    return {
        "seed_ptr": None if dropout is None else dropout.seed,
        "threshold": 0 if dropout is None else dropout.threshold,
        "keep_scale": 1.0 if dropout is None else dropout.keep_scale,
    }


def check_rows(adapters: Adapters, routing: Routing, **tensors: torch.Tensor) -> None:
    """ValueError where a tensor has not the routing's rows, or the adapters are not of its slots."""
    for name, t in tensors.items():
        if t.dim() != 2 or t.shape[0] != routing.M:
            raise ValueError(f"{name}: expected [{routing.M}, ...] as the routing has, got {list(t.shape)}")
    if routing.slots != adapters.slots:
        raise ValueError(f"routing: expected {adapters.slots} slots as the adapters have, got {routing.slots}")
