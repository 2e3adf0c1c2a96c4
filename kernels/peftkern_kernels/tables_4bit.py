"""Launch parameters of the kernels that read a 4-bit weight, by architecture; rows are literals, as in gemm_tables.py.

SOURCE says where they come from: "predicted" means chosen from registers, spills, shared memory and instructions an
element of the compiled kernel, not from timing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .gemm_tables import MULTIPROCESSORS, Tile, split_of_k
from .launch import cdiv

SOURCE = "predicted"


@dataclass(frozen=True, slots=True)
class DequantizeLaunch:
    """How the dequantization is cut up: words of a program (four bytes for 16-bit results, two for fp32), and warps."""

    block_words: int
    num_warps: int


def choose_dequantize(arch: int, dtype: torch.dtype) -> DequantizeLaunch:
    """Launch parameters of `dequantize_4bit`. Four words a thread: one 16-byte load, four 16-byte stores."""
    if arch == 0:
        return DequantizeLaunch(128, 4)
    if arch == 90 and dtype.itemsize == 2:  # bench/results/nvidia-h200/tune-4bit.json
        return DequantizeLaunch(1024, 8)
    return DequantizeLaunch(1024 if dtype.itemsize == 4 else 512, 4)


def choose_decode_4bit(arch: int, dtype: torch.dtype, *, M: int, N: int, K: int, R: int, aligned: bool) -> Tile:
    """The tile of a decode step: `block_n` rows of a 4-bit weight against 16 tokens, K split so that the GPU is full.

    `aligned`: rows of x and of the weight's words start on 16-byte boundaries.
    """
    if arch == 0:
        tile = Tile(16, 64, 64, 4, 1)
    elif dtype.itemsize != 2:
        tile = Tile(16, 32, 32, 4, 2)
    elif not aligned:
        tile = Tile(16, 64, 64, 4, 2)
    elif arch >= 900:
        tile = Tile(16, 64, 128, 4, 2)
    else:
        tile = Tile(16, 64, 128, 4, 3)
    # A program's loads are a quarter of a dense weight's, so twice as many programs share a multiprocessor; but not for
    # more than four tokens, where each further plane of y would cost more than that gains.
    programs = (4 if M <= 4 else 2) * MULTIPROCESSORS.get(arch, 64)
    tiles = cdiv(N, tile.block_n) + cdiv(R, tile.block_n)
    return replace(tile, split_k=split_of_k(tiles, K, tile.block_k, programs, steps=4))
