"""The kernels whose launch parameters can be tuned: operands, candidates, launches and what is right.

Each `Tunable` is one kernel on one problem. Candidates are a small grid around what the tables predict; those that
would need more shared memory than the architecture has are left out before anything is compiled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from bench.cases import Problem
from peftkern import reference
from peftkern_kernels import lora_decode as decode_kernel
from peftkern_kernels.dropout import Dropout
from peftkern_kernels.gemm_tables import SHARED_MEMORY, choose_decode_tile
from peftkern_kernels.gemm_tables import Tile as GemmTile
from peftkern_kernels.ia3_tables import ElementTile
from peftkern_kernels.launch import Call
from peftkern_kernels.lora_dy_pass import ONE_PASS_RANK, dy_pass_calls
from peftkern_kernels.lora_linear import pointer_calls, tile_of
from peftkern_kernels.lora_linear_persistent import persistent_calls
from peftkern_kernels.lora_linear_split import split_calls
from peftkern_kernels.lora_linear_tma import tma_calls
from peftkern_kernels.lora_shrink import shrink_calls
from peftkern_kernels.reduction_tables import Tile as ReductionTile
from peftkern_kernels.reduction_tables import (
    by_elements,
    dy_pass_tile,
    rank_block,
    shrink_tile,
    vectorizes,
    weight_gradient_tile,
)
from peftkern_kernels.tables_4bit import DequantizeLaunch
from peftkern_kernels.weight_gradient import weight_gradient_calls

SCALING = 2.0
SPLITS = (1, 2, 4, 8, 16, 32)
Tile = GemmTile | ReductionTile | DequantizeLaunch | ElementTile


@dataclass
class Tunable:
    """One kernel on one problem.

    Attributes:
        kernel, problem: names.
        table: the tile that the table gives now, the first candidate.
        candidates: tiles to try.
        build: launches for a tile and a number of splits (None: the library's own choice).
        splits: numbers of splits to try with the best tile.
        outputs: what the launches write. truth: the same in float64.
    """

    kernel: str
    problem: Problem
    table: Tile
    candidates: list[Tile]
    build: Callable[[Any, int | None], list[Call]]
    splits: tuple[int, ...]
    outputs: list[torch.Tensor]
    truth: Callable[[], list[torch.Tensor]]


class Operands:
    """Random operands of a problem on `device`, "meta" for a dry run."""

    def __init__(self, p: Problem, device: torch.device) -> None:
        self.problem = p

        def normal(rows: int, columns: int, scale: float) -> torch.Tensor:
            return (torch.randn(rows, columns, device=device) * scale).to(p.dtype)

        self.x, self.dy = normal(p.M, p.K, 1.0), normal(p.M, p.N, 1.0)
        self.weight = normal(p.N, p.K, p.K**-0.5)
        self.a, self.b = normal(p.R, p.K, p.K**-0.5), normal(p.N, p.R, p.R**-0.5)
        self.s, self.ds = normal(p.M, p.R, 1.0), normal(p.M, p.R, 1.0)
        seed = torch.full((1,), 1234, dtype=torch.int64, device=device)
        self.dropout = Dropout(seed, p.dropout) if p.dropout else None
        self.seed = seed

    def dropped(self) -> torch.Tensor:
        """keep * x / (1 - p) in float64."""
        return self.x.double() * self.keep()

    def keep(self) -> torch.Tensor:
        """keep / (1 - p) in float64, ones without dropout; [M, K]."""
        p = self.problem
        if not p.dropout:
            return torch.ones(p.M, p.K, dtype=torch.float64, device=self.x.device)
        return reference.dropout_mask(self.seed, p.M, p.K, p.dropout).double() / (1 - p.dropout)


@contextlib.contextmanager
def held(module: Any, choose: str, chosen: Any) -> Iterator[None]:
    """Within the block `module` is given `chosen` by its table: these launchers take no tile of their own."""
    table = getattr(module, choose)
    setattr(module, choose, lambda *_, **__: chosen)
    try:
        yield
    finally:
        setattr(module, choose, table)


def fits(arch: int, shared: int) -> bool:
    """Whether a program of the architecture may use so many bytes of shared memory."""
    return shared <= SHARED_MEMORY.get(arch, 65536)


def gemm_candidates(arch: int, p: Problem, table: GemmTile) -> list[GemmTile]:
    """Tiles of the GEMM, through descriptors where the table's tile is."""
    size = p.dtype.itemsize
    rows = (16, 32) if p.M <= 32 else (64, 128) if p.M <= 512 else (128, 256)
    grid = product(rows, (128, 256), (32, 64), (4, 8), (3, 4), (4, 8, 16))
    found = [table]
    for block_m, block_n, block_k, warps, stages, group in grid:
        tile = replace(
            table, block_m=block_m, block_n=block_n, block_k=block_k, num_warps=warps, num_stages=stages, group_m=group
        )
        work = block_m * block_n // warps
        if (
            fits(arch, (block_m + block_n) * block_k * size * stages)
            and 1024 <= work <= 4096
            and (table.persistent or (group > 4 and (group == 8 or stages == 4)))
        ):
            found.append(tile)
    return list(dict.fromkeys(found))


def reduction_candidates(arch: int, p: Problem, table: ReductionTile) -> list[ReductionTile]:
    """Tiles of a reduction kernel."""
    size = p.dtype.itemsize
    rows = (32, 64) if p.M > 32 else (16, 32)
    found = [table]
    for block_m, block_c, warps, stages in product(rows, (64, 128, 256), (4, 8), (2, 4)):
        block_r = rank_block(p.R, 128)
        if fits(arch, (block_m * block_c + block_c * block_r) * size * stages) and block_m * block_c <= 128 * 128:
            found.append(ReductionTile(block_m, block_c, block_r, warps, stages))
    return list(dict.fromkeys(found))


def _gemm(name: str, o: Operands, arch: int, backward: bool) -> Tunable:
    p = o.problem
    x, weight, s, b = (o.dy, o.weight.t(), o.ds, o.a.t()) if backward else (o.x, o.weight, o.s, o.b)
    dropout = o.dropout if backward else None
    out = torch.empty(p.M, weight.shape[0], dtype=p.dtype, device=x.device)
    table = tile_of(x, weight, s, b, out, dropout, arch)

    def build(tile: GemmTile, splits: int | None) -> list[Call]:
        tile = tile if splits is None else replace(tile, split_k=splits)
        options: dict[str, Any] = {"bias": None, "dropout": dropout, "precision": "ieee", "tile": tile}
        if tile.persistent:
            return persistent_calls(x, weight, s, b, out, arch=arch, **options)
        builder = split_calls if tile.split_k > 1 else tma_calls if tile.tma else pointer_calls
        return builder(x, weight, s, b, out, **options)

    def truth() -> list[torch.Tensor]:
        low_rank = s.double() @ b.double().T
        return [x.double() @ weight.double().T + (low_rank * o.keep() if backward else low_rank)]

    candidates: list[Tile] = [*gemm_candidates(arch, p, table)]
    return Tunable(name, p, table, candidates, build, SPLITS[:5] if p.M <= 512 else (), [out], truth)


def _shrink(o: Operands, arch: int) -> Tunable:
    p = o.problem
    out = torch.empty(p.M, p.R, dtype=p.dtype, device=o.x.device)
    kind = {"aligned": vectorizes(o.x), "dropout": o.dropout is not None, "scattered": by_elements(o.a)}
    table = shrink_tile(arch=arch, dtype=p.dtype, M=p.M, R=p.R, **kind)

    def build(tile: ReductionTile, splits: int | None) -> list[Call]:
        return shrink_calls(o.x, o.a, out, scaling=SCALING, dropout=o.dropout, arch=arch, tile=tile, splits=splits)

    candidates: list[Tile] = [*reduction_candidates(arch, p, table)]
    return Tunable(
        "shrink", p, table, candidates, build, SPLITS, [out], lambda: [SCALING * o.dropped() @ o.a.double().T]
    )


def _dy_pass(o: Operands, arch: int) -> Tunable:
    p = o.problem
    ds, db = torch.empty_like(o.s), torch.empty_like(o.b)
    scattered = by_elements(o.b, o.s)
    table = dy_pass_tile(arch=arch, dtype=p.dtype, M=p.M, R=p.R, aligned=vectorizes(o.dy), scattered=scattered)

    def build(tile: ReductionTile, splits: int | None) -> list[Call]:
        return dy_pass_calls(o.dy, o.b, o.s, ds, db, scaling=SCALING, arch=arch, tile=tile, shares=splits)

    def truth() -> list[torch.Tensor]:
        dy = o.dy.double()
        return [SCALING * dy @ o.b.double(), dy.T @ o.s.double()]

    candidates: list[Tile] = [*reduction_candidates(arch, p, table)]
    return Tunable("dY pass", p, table, candidates, build, SPLITS, [ds, db], truth)


def _weight_gradient(o: Operands, arch: int) -> Tunable:
    """dA alone where one pass over dY gives dB (small ranks), else both."""
    p = o.problem
    both = p.R > ONE_PASS_RANK
    da, db = torch.empty_like(o.a), torch.empty_like(o.b) if both else None
    s, dy = (o.s, o.dy) if both else (None, None)
    kind = {"aligned": vectorizes(o.x), "dropout": o.dropout is not None, "scattered": by_elements(o.ds)}
    table = weight_gradient_tile(arch=arch, dtype=p.dtype, M=p.M, R=p.R, **kind)

    def build(tile: ReductionTile, splits: int | None) -> list[Call]:
        return weight_gradient_calls(o.ds, o.x, s, dy, da, db, dropout=o.dropout, arch=arch, tile=tile, splits=splits)

    def truth() -> list[torch.Tensor]:
        found = [o.ds.double().T @ o.dropped()]
        return [*found, o.dy.double().T @ o.s.double()] if both else found

    outputs = [da] if db is None else [da, db]

    candidates: list[Tile] = [*reduction_candidates(arch, p, table)]
    return Tunable("weight gradient", p, table, candidates, build, SPLITS, outputs, truth)


def _decode(o: Operands, arch: int) -> Tunable:
    p = o.problem
    out, s = torch.empty(p.M, p.N, dtype=p.dtype, device=o.x.device), torch.empty_like(o.s)
    table = choose_decode_tile(arch, p.dtype, N=p.N, K=p.K, R=p.R, aligned=vectorizes(o.x))

    def build(tile: GemmTile, splits: int | None) -> list[Call]:
        tile = tile if splits is None else replace(tile, split_k=splits)
        with held(decode_kernel, "choose_decode_tile", tile):
            return decode_kernel.decode_calls(o.x, o.weight, o.a, o.b, SCALING, out, s, arch=arch)

    def truth() -> list[torch.Tensor]:
        exact = SCALING * o.x.double() @ o.a.double().T
        return [o.x.double() @ o.weight.double().T + exact @ o.b.double().T, exact]

    candidates: list[Tile] = [table]
    for block_n, block_k, warps, stages in product((32, 64, 128), (64, 128, 256), (4, 8), (2, 4, 6)):
        if fits(arch, (block_n + 16) * block_k * p.dtype.itemsize * stages):
            found = replace(table, block_n=block_n, block_k=block_k, num_warps=warps, num_stages=stages)
            candidates.append(found)
    return Tunable("decode", p, table, list(dict.fromkeys(candidates)), build, SPLITS[:5], [out, s], truth)


def tunables(p: Problem, device: torch.device, arch: int) -> Iterator[Tunable]:
    """Every kernel that a step of this problem launches, on operands made once."""
    operands = Operands(p, device)
    if p.M <= decode_kernel.MAX_ROWS:
        yield _decode(operands, arch)
        return
    yield _shrink(operands, arch)
    if not p.dropout:  # the forward's GEMM never drops
        yield _gemm("base + expand, forward", operands, arch, backward=False)
    yield _gemm("base + expand, dX", operands, arch, backward=True)
    if p.R <= ONE_PASS_RANK and not p.dropout:
        yield _dy_pass(operands, arch)
    yield _weight_gradient(operands, arch)
