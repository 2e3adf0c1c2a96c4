"""How rows of S [M, R], and of dS, lie in memory on the kernels' paths.

A persistent GEMM takes S as the last steps of its contraction, through a tensor descriptor, and that wants rows at
multiples of 16 bytes: 8 ranks in 16 bits. So where there are such GEMMs, rows of any other number of ranks lie as far
apart as the next multiple; elsewhere S is contiguous. Between two rows there is then memory that is nobody's: it is not
written, and no kernel reads it, since all of them mask by R and a descriptor gives zeros past its last column.

Of several projections side by side each begins at such a multiple too. The columns between them are part of S, and
written, with products of one of the rows of A again, but are no projection's.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from peftkern.backend import device_info
from peftkern_kernels.gemm_tables import has_persistent_tiles
from peftkern_kernels.launch import cdiv, scratch

Columns = tuple[slice, ...]
ROW_BYTES = 16  # what a descriptor's rows have to be multiples of


def row_of_s(R: int, dtype: torch.dtype, path: str, arch: int) -> int:
    """Elements from one row of S [M, R] to the next."""
    unit = ROW_BYTES // dtype.itemsize
    if R % unit == 0 or not _is_on_gemms(path) or not has_persistent_tiles(arch, dtype):
        return R
    return cdiv(R, unit) * unit


def _is_on_gemms(path: str) -> bool:
    """Whether products of a path, also of one that begins with "dequantize:" or is several projections', are GEMMs of
    ours over dense W."""
    return any(each.rpartition(":")[2] == "triton" for each in path.split(","))


def new_s(x: torch.Tensor, M: int, R: int, path: str, arch: int) -> torch.Tensor:
    """S [M, R] in x's dtype, uninitialised."""
    row = row_of_s(R, x.dtype, path, arch)
    return x.new_empty(M, R) if row == R else x.new_empty_strided((M, R), (row, 1))


def scratch_s(x: torch.Tensor, M: int, R: int, path: str, arch: int) -> torch.Tensor:
    """As `new_s` for what lives between launches only."""
    row = row_of_s(R, x.dtype, path, arch)
    whole = scratch(M, row, dtype=x.dtype, device=x.device)
    return whole if row == R else whole[:, :R]


def fake_s(x: torch.Tensor, M: int, R: int, path: str) -> torch.Tensor:
    """S as an operator's fake returns it: with the strides of the real one."""
    return new_s(x, M, R, path, _arch([R], x.dtype, x.device, path))


def s_columns(ranks: Sequence[int], x: torch.Tensor, path: str) -> Columns:
    """The columns of S that are each projection's; of dS, and of A of all projections, they are `rank_columns`."""
    return columns_of_s(ranks, x.dtype, path, _arch(ranks, x.dtype, x.device, path))


@functools.lru_cache(maxsize=1024)
def remembered_columns(ranks: tuple[int, ...], dtype: torch.dtype, device: torch.device, path: str) -> Columns:
    """`s_columns` of ranks that are no symbols, which each call asks for."""
    return columns_of_s(ranks, dtype, path, _arch(ranks, dtype, device, path))


def columns_of_s(ranks: Sequence[int], dtype: torch.dtype, path: str, arch: int) -> Columns:
    """`s_columns` for an architecture."""
    found: list[slice] = []
    start = 0
    for R in ranks:
        found.append(slice(start, start + R))
        start += row_of_s(R, dtype, path, arch)
    return tuple(found)


def _arch(ranks: Sequence[int], dtype: torch.dtype, device: torch.device, path: str) -> int:
    """The architecture of a device, which is asked only if it matters: a traced graph may be looked at elsewhere."""
    matters = _is_on_gemms(path) and any(R * dtype.itemsize % ROW_BYTES for R in ranks)
    return device_info(device).arch if matters else 0


def whole_blocks(columns: Columns) -> Columns:
    """`columns` of S, each up to where the next one begins."""
    starts = [part.start for part in columns[1:]]
    return tuple(slice(part.start, stop) for part, stop in zip(columns, [*starts, columns[-1].stop], strict=True))


def joined_parts(lora_As: Sequence[torch.Tensor], columns: Columns) -> list[torch.Tensor]:
    """What A of all projections [R, K] is put together from: a row for each column of S.

    What stands for a column that is nobody's is a row that is there: so nothing is filled, and it takes no launch
    beyond the one that copies.
    """
    parts: list[torch.Tensor] = []
    for lora_A, block in zip(lora_As, whole_blocks(columns), strict=True):
        rows = block.stop - block.start
        while rows > 0:
            parts.append(lora_A if lora_A.shape[0] <= rows else lora_A[:rows])
            rows -= lora_A.shape[0]
    return parts
