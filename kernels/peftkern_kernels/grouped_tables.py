"""Tiles of the grouped GEMM (grouped_gemm.py) as a pure function. All predicted: none is timed yet.

They follow gemm_tables.py, but for two things: rows of a tile belong to one expert, so its height follows the rows that
an expert has on average; and K is never split, for a stack of experts has tiles enough to fill a device.
"""

from __future__ import annotations

import torch

from .gemm_tables import Tile as Tile
from .gemm_tables import _family

SOURCE = "predicted"

# (family) -> tile by rows of an expert: "large" above 64, "small" up to 64, "tiny" up to 16. 16-bit, aligned. Hopper's
# and Blackwell's matrix instructions take 64 rows or more.
_TILES: dict[str, dict[str, Tile]] = {
    "hopper": {
        "large": Tile(128, 256, 64, 8, 3, tma=True),
        "small": Tile(64, 128, 64, 4, 4, tma=True),
        "tiny": Tile(64, 128, 64, 4, 4, tma=True),
    },
    "blackwell": {
        "large": Tile(128, 256, 64, 8, 3, tma=True),
        "small": Tile(64, 128, 64, 4, 4, tma=True),
        "tiny": Tile(64, 128, 64, 4, 4, tma=True),
    },
    "ampere": {"large": Tile(128, 128, 32, 8, 4), "small": Tile(64, 128, 64, 4, 4), "tiny": Tile(16, 128, 64, 4, 4)},
    "consumer": {"large": Tile(128, 128, 32, 8, 4), "small": Tile(64, 64, 32, 4, 4), "tiny": Tile(16, 64, 64, 4, 4)},
    "cdna": {"large": Tile(128, 128, 64, 4, 2), "small": Tile(64, 64, 64, 4, 2), "tiny": Tile(16, 64, 64, 4, 2)},
    "rdna": {"large": Tile(128, 64, 32, 8, 2), "small": Tile(64, 64, 32, 4, 2), "tiny": Tile(16, 64, 64, 4, 2)},
}
_UNALIGNED = {"large": Tile(64, 64, 32, 4, 2), "small": Tile(64, 64, 32, 4, 2), "tiny": Tile(16, 64, 32, 4, 2)}
_FP32 = {"large": Tile(64, 32, 32, 4, 2), "small": Tile(64, 32, 32, 4, 2), "tiny": Tile(16, 64, 32, 4, 2)}
_INTERPRETER = {"large": Tile(64, 64, 64, 4, 1), "small": Tile(32, 64, 64, 4, 1), "tiny": Tile(16, 64, 64, 4, 1)}


def grouped_tile(*, arch: int, dtype: torch.dtype, T: int, E: int, aligned: bool) -> Tile:
    """The tile of `out[t] = x[t] W_e^T + s[t] B_e^T`.

    Args:
        arch: 80, 86, 89, 90, 100, 120; 942, 1100; 0 for the interpreter.
        dtype: of x and weight.
        T, E: rows of all experts, and experts.
        aligned: rows of both operands and of the output start at multiples of 16 elements.
    """
    size = "tiny" if T <= 16 * E else "small" if T <= 64 * E else "large"
    if arch == 0:
        return _INTERPRETER[size]
    if dtype.itemsize != 2:
        return _FP32[size]
    family = _family(arch)
    if not aligned:
        return _UNALIGNED["small" if family in ("hopper", "blackwell") else size]
    return _TILES[family][size]
