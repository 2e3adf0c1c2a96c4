"""Launch parameters of the kernels over many adapters, as pure functions. All predicted: none is timed yet.

They follow those of one adapter (reduction_tables.py), on blocks whose rows the routing has fixed: a tile has at most
`block_rows(M)` rows and divides it.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from .adapters import Adapters
from .reduction_tables import Tile, rank_block, shrink_tile, weight_gradient_tile
from .routing import block_rows


def pools_vectorize(adapters: Adapters) -> bool:
    """Whether the rows of A, and the blocks of B where ranks are multiples of 8, start at multiples of 16 elements."""
    return adapters.K % 16 == 0 and adapters.N % 16 == 0 and adapters.pool_a.stride(0) % 16 == 0


def multi_shrink_tile(*, arch: int, dtype: torch.dtype, M: int, R: int, aligned: bool, dropout: bool) -> Tile:
    """Tile of the grouped shrink: a block's rows by BLOCK_C of the contraction by BLOCK_R of the rank."""
    tile = shrink_tile(arch=arch, dtype=dtype, M=min(M, 64), R=R, aligned=aligned, dropout=dropout)
    most = 64 if tile.block_m == min(64, 16 if M <= 16 else 32 if M <= 32 else 64) else tile.block_m
    return replace(tile, block_m=min(block_rows(M), most))


def multi_expand_tile(*, arch: int, dtype: torch.dtype, M: int, R: int) -> Tile:
    """Tile of the grouped expand: a block's rows by BLOCK_C columns of the output."""
    wide = dtype.itemsize == 4
    rows = min(block_rows(M), 32 if wide or arch == 0 else 64)
    return Tile(rows, 64 if wide or arch == 0 else 128, rank_block(R, 16 if wide else 64), 4, 1)


def multi_weight_gradient_tile(*, arch: int, dtype: torch.dtype, M: int, R: int, aligned: bool, dropout: bool) -> Tile:
    """Tile of the grouped weight gradient: BLOCK_C columns of x or dY, walking down a chunk's rows by BLOCK_M."""
    return weight_gradient_tile(arch=arch, dtype=dtype, M=min(M, 64), R=R, aligned=aligned, dropout=dropout)
