"""Launch parameters of the fused GEMMs over a 4-bit weight, and which weights they take, by architecture.

As gemm_tables.py: pure functions, rows are literals, and SOURCE says where they come from. "predicted" means chosen
from registers, spills, shared memory and instructions of the compiled kernels, not from timing: no spill in any
variant, two programs of four warps (or one of eight) on a multiprocessor, fewest instructions for a decoded element.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from .gemm_tables import MULTIPROCESSORS, Tile, _family, split_of_k
from .launch import cdiv

SOURCE = "predicted"

# family -> tile of `x deq(W)^T` by rows: up to 32 ("tiny"), up to 64, more. block_k counts elements of W.
_FORWARD: dict[str, tuple[Tile, Tile, Tile]] = {
    "interpreter": (Tile(32, 32, 64, 4, 1),) * 3,
    "hopper": (Tile(64, 128, 64, 4, 4), Tile(64, 128, 64, 4, 4), Tile(128, 128, 64, 8, 3)),
    "blackwell": (Tile(64, 128, 64, 4, 4), Tile(64, 128, 64, 4, 4), Tile(128, 128, 64, 8, 3)),
    "ampere": (Tile(32, 128, 64, 4, 3), Tile(64, 64, 64, 4, 3), Tile(128, 128, 64, 8, 3)),
    "consumer": (Tile(32, 128, 64, 4, 3), Tile(64, 64, 64, 4, 3), Tile(64, 64, 64, 4, 3)),
    "cdna": (Tile(32, 64, 64, 4, 2), Tile(64, 64, 64, 4, 2), Tile(128, 64, 64, 4, 2)),
    "rdna": (Tile(32, 64, 64, 4, 2), Tile(64, 64, 64, 4, 2), Tile(64, 64, 64, 4, 2)),
}
# The same for `dy deq(W)`: block_n counts columns of the result (256: 128 bytes of a row of W), block_k rows of W.
_TRANSPOSED: dict[str, tuple[Tile, Tile, Tile]] = {
    "interpreter": (Tile(32, 128, 32, 4, 1),) * 3,
    "hopper": (Tile(64, 256, 32, 8, 4), Tile(64, 256, 32, 8, 4), Tile(128, 256, 32, 8, 4)),
    "blackwell": (Tile(64, 256, 32, 8, 4), Tile(64, 256, 32, 8, 4), Tile(128, 256, 32, 8, 4)),
    # 128 sums a thread in registers: half the ranks a step, as in gemm_tables.py.
    "ampere": (Tile(32, 256, 32, 4, 3), *(Tile(64, 256, 16, 4, 4, block_r=32),) * 2),
    "consumer": (Tile(32, 256, 32, 4, 3), Tile(64, 256, 32, 8, 3), Tile(64, 256, 32, 8, 3)),
    "cdna": (Tile(32, 256, 16, 4, 2), Tile(64, 256, 32, 4, 2), Tile(64, 256, 32, 4, 2)),
    "rdna": (Tile(32, 256, 16, 4, 2), *(Tile(64, 128, 32, 4, 2, block_r=32),) * 2),
}
# With a dropout mask beside the accumulators when the expand is in the same launch: half the result in registers.
_TRANSPOSED_DROPOUT: dict[str, Tile] = {
    "interpreter": Tile(32, 128, 32, 4, 1),
    "hopper": Tile(64, 256, 32, 8, 4),
    "blackwell": Tile(64, 256, 32, 8, 4),
    "ampere": Tile(64, 128, 32, 4, 3),
    "consumer": Tile(64, 128, 32, 4, 3),
    "cdna": Tile(64, 128, 32, 4, 2),
    "rdna": Tile(64, 128, 32, 4, 2),
}
# Where x's or dy's rows are not aligned, its loads are single elements through registers.
_UNALIGNED_FORWARD = Tile(64, 64, 64, 4, 2)
_UNALIGNED_FORWARD_RDNA = Tile(32, 64, 64, 4, 2)
_UNALIGNED_TRANSPOSED = Tile(64, 128, 32, 4, 2)


def fused_4bit_fits(N: int, K: int, blocksize: int, dtype: torch.dtype) -> str:
    """Empty, or why the fused kernels cannot take a 4-bit weight [N, K] beside activations of `dtype`."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"the fused 4-bit kernels take float16 and bfloat16, which matrix instructions multiply, got {dtype}"
    if K % 32 or blocksize % 32:
        return f"the fused 4-bit kernels take K and blocksize in multiples of 32, got K {K} and blocksize {blocksize}"
    if N * K >= 2**36:
        return f"the fused 4-bit kernels take fewer than 2^36 elements, got {N} * {K}"
    return ""


def unit_of(K: int, blocksize: int) -> int:
    """64 or 32 elements: what divides both K and the blocksize, so that no unit of K straddles two blocks."""
    return 64 if K % 64 == 0 and blocksize % 64 == 0 else 32


def _by_rows(rows: tuple[Tile, Tile, Tile], M: int) -> Tile:
    return rows[0 if M <= 32 else 1 if M <= 64 else 2]


def _programs(arch: int, tile: Tile) -> int:
    """Programs that put eight warps on each multiprocessor."""
    return MULTIPROCESSORS.get(arch, 64) * 8 // tile.num_warps


def _filling(tile: Tile, arch: int, M: int, columns: int, contraction: int) -> Tile:
    """The tile with the contraction split so that few tiles still fill the device."""
    tiles = cdiv(M, tile.block_m) * cdiv(columns, tile.block_n)
    return replace(tile, split_k=split_of_k(tiles, contraction, tile.block_k, _programs(arch, tile)))


def choose_tile_4bit(arch: int, M: int, N: int, K: int, *, unit: int, aligned: bool) -> Tile:
    """The tile of `out[M, N] = x[M, K] deq(W)^T`; `block_k` divides K and is a multiple of `unit`.

    Args:
        arch: 80, 86, 89, 90, 100, 120; 942, 1100; 0 for the interpreter.
        M, N, K: sizes. unit: `unit_of(K, blocksize)`.
        aligned: every row of x starts on a 16-byte boundary and its elements are contiguous.
    """
    family = _family(arch)
    unaligned = _UNALIGNED_FORWARD_RDNA if family == "rdna" else _UNALIGNED_FORWARD
    tile = _by_rows(_FORWARD[family], M) if aligned or arch == 0 else unaligned
    tile = replace(tile, block_k=tile.block_k if K % tile.block_k == 0 else unit)
    return _filling(tile, arch, M, N, K)


def choose_transposed_tile_4bit(arch: int, M: int, N: int, K: int, *, aligned: bool, dropout: bool) -> Tile:
    """The tile of `out[M, K] = dy[M, N] deq(W)`; `block_n` is a multiple of 64. Arguments as above, of dy.

    dropout: whether the expand has a mask.
    """
    family = _family(arch)
    rows = _TRANSPOSED[family] if aligned or arch == 0 else (_UNALIGNED_TRANSPOSED,) * 3
    tile = _by_rows(rows, M)
    if cdiv(M, tile.block_m) * cdiv(K, tile.block_n) < 0.75 * _programs(arch, tile):
        tile = _by_rows(rows, min(M, 64))  # half the planes, and fp32 planes of a 128 x 256 tile spill
    tile = _filling(tile, arch, M, K, N)
    if dropout and aligned and tile.split_k == 1:
        return _filling(_TRANSPOSED_DROPOUT[family], arch, M, K, N)
    return tile
