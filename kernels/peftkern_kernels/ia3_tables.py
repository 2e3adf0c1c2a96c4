"""Launch parameters of IA3's kernels, as pure functions of architecture, dtype and sizes. See reduction_tables.py.

The GEMM with an epilogue takes its tile from gemm_tables.py, but where rows are unaligned.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import gemm_tables
from .launch import cdiv
from .reduction_tables import DEVICES, OTHER_DEVICE


@dataclass(frozen=True, slots=True)
class ElementTile:
    """A program's rows by columns of an elementwise kernel, 16 bytes a thread and load."""

    block_m: int
    block_c: int
    num_warps: int
    source: str = "predicted"


def scale_tile(*, arch: int, dtype: torch.dtype) -> ElementTile:
    """Tile of `out = a * l`: bound by memory, so enough loads in flight and whole 512-byte lines of a row."""
    if arch == 0:
        return ElementTile(16, 64, 4)
    return ElementTile(8, 256 if dtype.itemsize == 2 else 128, 4)


def scale_sum_tile(*, arch: int, dtype: torch.dtype, aligned: bool) -> ElementTile:
    """Tile of `out = a * l` with the column sums of a * b: 32 rows at a time, summed in registers on the way down."""
    if arch == 0:
        return ElementTile(16, 64, 4)
    if not aligned:  # a mask and an address for each element: fewer of them
        return ElementTile(8, 128, 4)
    return ElementTile(32 if dtype.itemsize == 2 else 16, 128, 4)


def scale_sum_splits(*, blocks: int, steps: int, arch: int) -> int:
    """Into how many parts the rows are cut where `blocks` programs exist without: eight programs a multiprocessor, each
    with at least two of its `steps`, and no more planes than a second launch adds up in passing."""
    processors, _ = DEVICES.get(arch, OTHER_DEVICE)
    return max(1, min(cdiv(8 * processors, blocks), cdiv(steps, 2), 256))


def gemm_tile(
    *,
    arch: int,
    dtype: torch.dtype,
    M: int,
    N: int,
    K: int,
    aligned: bool,
    weight_is_kn: bool = False,
    persistent: bool = True,
) -> gemm_tables.Tile:
    """The tile of `out = (a w^T) * l`, never with K split: an epilogue needs the whole sum.

    `aligned` is said of every operand of the epilogue too: a 128 x 256 tile of x or z that goes by elements has more
    addresses than there are registers. `weight_is_kn` and `persistent` as for `gemm_tables.choose_tile`.
    """
    if not aligned and arch:
        return gemm_tables.Tile(64, 32, 32, 4, 2)
    options = {"weight_is_kn": weight_is_kn, "persistent": persistent, "epilogue": True}
    return gemm_tables.choose_tile(arch, dtype, M=M, N=N, K=K, aligned=aligned, **options)
