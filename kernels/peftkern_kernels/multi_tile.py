"""Device functions that the kernels over many adapters share: whose rows a program has, and where their factors lie."""

from __future__ import annotations

from dataclasses import dataclass

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


@triton.jit
def _add_one_adapter(
    acc, s_ptr, b_ptr, rows, columns, own, rank, max_rank, stride_sm, stride_sr, stride_bn, stride_br,
    DTYPE: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    for r in tl.range(0, rank, BLOCK_R, num_stages=1):
        offs_r = r + tl.arange(0, BLOCK_R).to(tl.int64)
        s_ptrs = s_ptr + rows[:, None] * stride_sm + offs_r[None, :] * stride_sr
        b_ptrs = b_ptr + columns[None, :] * stride_bn + offs_r[:, None] * stride_br
        s = tl.load(s_ptrs, mask=own[:, None] & (offs_r < max_rank)[None, :], other=0.0)  # [BLOCK_M, BLOCK_R]
        b = tl.load(b_ptrs, mask=(offs_r < rank)[:, None], other=0.0)  # [BLOCK_R, BLOCK_N]
        acc = tl.dot(s.to(DTYPE), b.to(DTYPE), acc, input_precision=PRECISION)
    return acc


@triton.jit
def many_adapters_product(
    s_ptr, pool_ptr, ids_ptr, row_offset_ptr, rank_ptr, rows, columns, max_rank, stride_sm, stride_sr, stride_pool,
    POOL: tl.constexpr, DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """fp32 [BLOCK_M, BLOCK_N] = s[rows] times each row's own B_s[columns]^T (pool "b") or A_s[:, columns] ("a").

    The tile's rows are in the batch's order, so the program walks the distinct slots among them, from the least, with
    the other rows masked: one turn where a tile is of one adapter, as in training it mostly is. `stride_pool` is what a
    pool row takes.
    """
    NO_SLOT: tl.constexpr = 2147483647
    ids = tl.load(ids_ptr + rows)
    slot = tl.min(tl.where(ids >= 0, ids, NO_SLOT), 0)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    while slot < NO_SLOT:
        row_offset, rank = adapter_of(slot, row_offset_ptr, rank_ptr)
        factor_ptr = pool_ptr + row_offset * stride_pool
        own = ids == slot
        if POOL == "a":
            acc = _add_one_adapter(
                acc, s_ptr, factor_ptr, rows, columns, own, rank, max_rank, stride_sm, stride_sr, 1, stride_pool,
                DTYPE, BLOCK_R, PRECISION,
            )  # fmt: skip
        elif rank % 8 == 0:  # a stride that the compiler knows to be a multiple of 8: loads of 16 bytes
            even_rank = rank // 8 * 8
            acc = _add_one_adapter(
                acc, s_ptr, factor_ptr, rows, columns, own, even_rank, max_rank, stride_sm, stride_sr, even_rank, 1,
                DTYPE, BLOCK_R, PRECISION,
            )  # fmt: skip
        else:
            acc = _add_one_adapter(
                acc, s_ptr, factor_ptr, rows, columns, own, rank, max_rank, stride_sm, stride_sr, rank, 1,
                DTYPE, BLOCK_R, PRECISION,
            )  # fmt: skip
        slot = tl.min(tl.where(ids > slot, ids, NO_SLOT), 0)
    return acc


@triton.jit
def shrink_part(
    x_ptr, pool_ptr, planes_ptr, perm_ptr, blocks_ptr, row_offset_ptr, rank_ptr, B, block, part, r_start, split,
    k_start, k_stop, M, max_rank, stride_xm, stride_xk, stride_pool,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    NUM_STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """planes[split, row, r] = x[row, k_start:k_stop] A[r, k_start:k_stop] for one block's rows and BLOCK_R ranks.

    `part`: which BLOCK_M of the block's rows.
    """
    slot, first, length = piece_of(blocks_ptr, B, block)
    first, length = first + part * BLOCK_M, length - part * BLOCK_M
    row_offset, rank = adapter_of(slot, row_offset_ptr, rank_ptr)
    if (length > 0) & (r_start < rank):
        offs_m = tl.arange(0, BLOCK_M)
        mask_m = offs_m < length
        rows = tl.load(perm_ptr + first + offs_m, mask=mask_m, other=0).to(tl.int64)
        offs_r = r_start + tl.arange(0, BLOCK_R).to(tl.int64)
        mask_r = offs_r < rank
        offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
        a_ptrs = pool_ptr + (row_offset + offs_r)[:, None] * stride_pool + (k_start + offs_k)[None, :]
        x_ptrs = x_ptr + rows[:, None] * stride_xm + (k_start + offs_k)[None, :] * stride_xk
        x_step = tl.cast(stride_xk, tl.int64) * BLOCK_K
        acc = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
        for k in tl.range(k_start, k_stop, BLOCK_K, num_stages=NUM_STAGES):
            if EVEN_K:
                a = tl.load(a_ptrs, mask=mask_r[:, None], other=0.0)  # [BLOCK_R, BLOCK_K]
                x = tl.load(x_ptrs, mask=mask_m[:, None], other=0.0)  # [BLOCK_M, BLOCK_K]
            else:
                mask_k = (offs_k < k_stop - k)[None, :]
                a = tl.load(a_ptrs, mask=mask_r[:, None] & mask_k, other=0.0)
                x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k, other=0.0)
            acc = tl.dot(a.to(x.dtype), x.T, acc, input_precision=PRECISION)
            a_ptrs += BLOCK_K
            x_ptrs += x_step
        plane_ptrs = planes_ptr + (split.to(tl.int64) * M + rows)[None, :] * max_rank + offs_r[:, None]
        tl.store(plane_ptrs, acc, mask=mask_m[None, :] & mask_r[:, None])


@dataclass(frozen=True, slots=True)
class MixedFactor:
    """What stands where a kernel with an expand takes one adapter's second factor: each row's own, out of a pool.

    Attributes:
        adapters, routing: of the layer and the batch.
        pool: "b" for y, "a" for dX.
    """

    adapters: Adapters
    routing: Routing
    pool: str

    @property
    def tensor(self) -> torch.Tensor:
        """The pool."""
        return self.adapters.pool_b if self.pool == "b" else self.adapters.pool_a

    @property
    def shape(self) -> tuple[int, int]:
        """(columns of the output, the largest rank), as of the factor [N, R] of one adapter."""
        return (self.adapters.N if self.pool == "b" else self.adapters.K), self.adapters.max_rank

    @property
    def dtype(self) -> torch.dtype:
        """Of the pool."""
        return self.tensor.dtype

    def numel(self) -> int:
        """Elements that a batch can ask for."""
        return min(self.adapters.slots, self.routing.M) * self.shape[0] * self.shape[1]

    def element_size(self) -> int:
        """Bytes of an element."""
        return self.tensor.element_size()


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
