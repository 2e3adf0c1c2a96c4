"""Launch parameters of the kernels over many adapters, as pure functions: predicted, but for Hopper's decode tiles.

They follow those of one adapter (reduction_tables.py), on blocks whose rows the routing has fixed: a tile has at most
`block_rows(M)` rows and divides it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .adapters import Adapters
from .gemm_tables import MULTIPROCESSORS
from .launch import cdiv
from .reduction_tables import Tile, rank_block, shrink_tile, weight_gradient_tile
from .routing import block_rows

MANY_TOKENS = 1 << 30


def pools_vectorize(adapters: Adapters) -> bool:
    """Whether the rows of A, and the blocks of B where ranks are multiples of 8, start at multiples of 16 elements."""
    return adapters.K % 16 == 0 and adapters.N % 16 == 0 and adapters.pool_a.stride(0) % 16 == 0


def multi_shrink_tile(
    *, arch: int, dtype: torch.dtype, M: int, R: int, aligned: bool, dropout: bool, projections: int = 1
) -> Tile:
    """Tile of the grouped shrink: a block's rows by BLOCK_C of the contraction by BLOCK_R of the rank.

    `projections`: of x, that share the launch; in fp32 their pointers are registers too many beside 64 ranks.
    """
    tile = shrink_tile(arch=arch, dtype=dtype, M=min(M, 64), R=R, aligned=aligned, dropout=dropout)
    most = 64 if tile.block_m == min(64, 16 if M <= 16 else 32 if M <= 32 else 64) else tile.block_m
    # B's ranks of no known multiple, and RDNA's fewer registers, leave less room than one adapter's.
    crowded = not aligned or arch == 1100 or (projections > 1 and dtype.itemsize == 4)
    block_r = min(tile.block_r, 32) if crowded else tile.block_r
    block_c = 64 if arch == 90 and block_r == 64 and dtype.itemsize == 2 else tile.block_c
    return replace(tile, block_m=min(block_rows(M), most), block_c=block_c, block_r=block_r)


def multi_expand_tile(*, arch: int, dtype: torch.dtype, M: int, R: int, aligned: bool) -> Tile:
    """Tile of the grouped expand: a block's rows by BLOCK_C columns of the output."""
    wide = dtype.itemsize == 4
    rows = min(block_rows(M), 32 if wide or arch == 0 else 64)
    crowded = not aligned or arch == 1100
    columns = 64 if wide or arch == 0 or crowded else 128
    return Tile(rows, columns, rank_block(R, 16 if wide else 32 if crowded else 64), 4, 1)


def multi_weight_gradient_tile(*, arch: int, dtype: torch.dtype, M: int, R: int, aligned: bool, dropout: bool) -> Tile:
    """Tile of the grouped weight gradient: BLOCK_C columns of x or dY, walking down a chunk's rows by BLOCK_M."""
    tile = weight_gradient_tile(arch=arch, dtype=dtype, M=min(M, 64), R=R, aligned=aligned, dropout=dropout)
    # Beside the row numbers 128 ranks are too many for the registers of eight warps.
    return replace(tile, block_c=64) if arch in (80, 86, 89) and tile.block_r == 128 else tile


@dataclass(frozen=True, slots=True)
class DecodeTile:
    """How the two launches of a mixed decode step are cut up.

    Attributes:
        block_k, split_k, num_stages: the shrink's step along K, programs along K, and steps that are loaded ahead.
        block_r: ranks of a program of the first launch. shrink_warps: its warps.
        block_n, expand_warps: columns and warps of a program of the second.
        overlap: whether the second launch starts while the first runs, its loads of B under way (sm_90 and later).
        expand_r: ranks that a program of the second takes at a time; 0: block_r.
        rows: of a program of either, a power of two up to 16; matrix instructions take 8 or more.
        early_base: whether the second loads what it adds to before it waits for the first; registers are held for it.
    """

    block_k: int
    split_k: int
    num_stages: int
    block_r: int
    shrink_warps: int
    block_n: int
    expand_warps: int
    overlap: bool = False
    expand_r: int = 0
    rows: int = 16
    early_base: bool = False


# Hopper's decode tiles of aligned 16-bit adapters, by the most tokens (times projections): measured at 1, 16 and 64
# tokens of rank 16, bench/results/nvidia-h200/tune-many.json, with 16 rows of a program and no early base. Both of
# these are predicted: with 16 rows the last tile spilled.
_HOPPER_DECODE: dict[int, DecodeTile] = {
    4: DecodeTile(128, 32, 3, 16, 2, 64, 4, overlap=True, rows=8, early_base=True),
    32: DecodeTile(128, 16, 3, 16, 2, 256, 4, overlap=True, rows=8, early_base=True),
    MANY_TOKENS: DecodeTile(128, 8, 3, 16, 2, 256, 1, overlap=True, rows=8, early_base=True),
}


def _hopper_decode_tile(M: int, K: int, R: int, projections: int) -> DecodeTile:
    """The nearest row of the table, its split of K such that 256 to 1024 programs share the device.

    Above rank 16 predicted. The first launch's programs stay those of 16 ranks: one of 64 takes the shared memory of
    four, and where ranks are mixed makes all wait for the widest adapters. The second's take more ranks of fewer
    columns, 64 registers of B a thread, so that few rounds of loads follow each other.
    """
    tokens = M * projections
    tile = next(tile for most, tile in _HOPPER_DECODE.items() if tokens <= most)
    blocks = tokens * cdiv(R, tile.block_r)
    split = 1 << (min(32, max(1, K // tile.block_k)).bit_length() - 1)
    while (blocks * split > 256 and split > 8) or (blocks * split > 1024 and split > 1):
        split //= 2
    few = tile.expand_warps == 1
    # Several projections' pointers, or planes whose rows are read number by number, leave registers for half as much.
    crowded = few and (projections > 1 or R % 16 != 0)
    expand_r = rank_block(R, 16 if crowded else 32 if few else 64)
    block_n = min(tile.block_n, (2048 if crowded else 4096) * tile.expand_warps // expand_r)
    return replace(tile, split_k=split, expand_r=expand_r, block_n=block_n)


def multi_decode_tile(
    *,
    arch: int,
    dtype: torch.dtype,
    M: int,
    N: int,
    K: int,
    R: int,
    aligned: bool,
    masters: bool = False,
    projections: int = 1,
) -> DecodeTile:
    """The tile of a decode step over as many adapters as there are rows.

    The shrink has a warp for 16 ranks, so that each reads its own rows of A once, by asynchronous copies of which
    `num_stages - 1` are under way; K is split until each multiprocessor has four programs. The expand's programs read
    8 KB of B each (rank 16), all at once. `masters`: the adapters are fp32, and dtype, x's, is not. `projections`: of
    x, that share the launches, and so fill the device with fewer parts of K; R is then the largest of their ranks.
    """
    if arch == 90 and dtype.itemsize == 2 and aligned and not masters:
        return _hopper_decode_tile(M, K, R, projections)
    if arch == 0:
        return DecodeTile(32, min(4, cdiv(K, 32)), 1, rank_block(R, 32), 4, 64, 4)
    half = dtype.itemsize == 2
    block_r = rank_block(R, (32 if masters else 64) if half else 16)
    block_k, stages = (128, 4) if aligned and half else (64, 3) if aligned else (64, 2)
    if arch >= 900:
        block_k, stages = 64, 2
    programs = 4 * MULTIPROCESSORS.get(arch, 64)
    split, blocks = 1, projections * M * cdiv(R, block_r)
    while split < 16 and blocks * split * 2 <= 1.1 * programs and K // (2 * split) >= 2 * block_k:
        split *= 2
    block_n = max(64, min(256, 4096 // block_r if half else 1024 // block_r))
    warps = 4 if not half or arch >= 900 else block_r // 16  # fp32's operands are in registers, tensor cores' are not
    return DecodeTile(block_k, split, stages, block_r, warps, block_n, 4 if aligned else 8)
