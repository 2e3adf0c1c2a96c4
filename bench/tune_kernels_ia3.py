"""IA3's kernels whose launch parameters can be tuned; as tune_kernels.py, for `--weights ia3`.

A problem named "down ..." is feed-forward: its GEMM is dX with dl's sums; any other's stores z and y.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import torch

from bench.cases import Problem
from bench.tune_kernels import Tile as AnyTile
from bench.tune_kernels import Tunable, fits, held
from peftkern_kernels import ia3_scale, ia3_scale_sum
from peftkern_kernels.gemm_tables import Tile
from peftkern_kernels.ia3_gemm import ia3_gemm_calls
from peftkern_kernels.ia3_tables import ElementTile, gemm_tile, scale_sum_tile, scale_tile
from peftkern_kernels.launch import Call

SPLITS = (8, 16, 32, 64, 128)


class OperandsIA3:
    """Random operands of a problem on `device`, "meta" for a dry run; C columns are scaled."""

    def __init__(self, p: Problem, device: torch.device) -> None:
        self.problem, self.feedforward = p, p.name.startswith("down")

        def normal(rows: int, columns: int, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(rows, columns, device=device) * scale).to(p.dtype)

        self.x, self.dy, self.weight = normal(p.M, p.K), normal(p.M, p.N), normal(p.N, p.K, p.K**-0.5)
        C = p.K if self.feedforward else p.N
        self.a, self.b = normal(p.M, C), normal(p.M, C)
        self.scale = 1 + 0.1 * torch.randn(C, device=device)


def _gemm(o: OperandsIA3, arch: int) -> Tunable:
    p = o.problem
    left, right = (o.dy, o.weight.t()) if o.feedforward else (o.x, o.weight)
    out, (N, K) = torch.empty_like(o.a), right.shape
    z = None if o.feedforward else torch.empty_like(out)
    sums = torch.empty_like(o.scale) if o.feedforward else None
    sizes: dict[str, Any] = {"M": p.M, "N": N, "K": K, "weight_is_kn": o.feedforward}
    table = gemm_tile(arch=arch, dtype=p.dtype, **sizes, aligned=N % 16 == 0 and K % 16 == 0)

    def build(tile: Tile, splits: int | None) -> list[Call]:
        x = o.x if o.feedforward else None
        return ia3_gemm_calls(left, right, o.scale, out, z=z, x=x, sums=sums, arch=arch, tile=tile)

    def truth() -> list[torch.Tensor]:
        product_ = left.double() @ right.double().T
        scaled = product_ * o.scale.double()
        return [scaled, (product_ * o.x.double()).sum(0) if o.feedforward else product_]

    size = p.dtype.itemsize
    rows = (64, 128) if p.M <= 512 else (128, 256)
    grid = product(rows, (128, 256), (64, 128), (4, 8), (3, 4), (4, 8, 16))
    found = [
        replace(table, block_m=m, block_n=n, block_k=k, num_warps=w, num_stages=s, group_m=g)
        for m, n, k, w, s, g in grid
        # 128 fp32 sums a thread; the other orders of tiles for the largest only.
        if fits(arch, (m + n) * k * size * s) and 1024 <= m * n // w <= 4096 and (g == 8 or m * n >= 128 * 256)
    ]
    if table.persistent:  # beside those whose programs end with their tile
        found += [replace(tile, persistent=False) for tile in (table, *found)]
    candidates: list[AnyTile] = list(dict.fromkeys([table, *found]))
    outputs = [out, *(t for t in (z, sums) if t is not None)]
    return Tunable("GEMM + scale", p, table, candidates, build, (), outputs, truth)


def _element_tiles(table: ElementTile, rows: tuple[int, ...]) -> list[Any]:
    grid = product(rows, (64, 128, 256, 512), (4, 8))
    found = [ElementTile(m, c, w) for m, c, w in grid if 8 <= m * c // (32 * w) <= 32]
    return list(dict.fromkeys([table, *found]))


def _scale(o: OperandsIA3, arch: int) -> Tunable:
    out, table = torch.empty_like(o.a), scale_tile(arch=arch, dtype=o.problem.dtype)

    def build(tile: ElementTile, splits: int | None) -> list[Call]:
        with held(ia3_scale, "scale_tile", tile):
            return ia3_scale.scale_calls(o.a, o.scale, out, arch=arch)

    def truth() -> list[torch.Tensor]:
        return [o.a.double() * o.scale.double()]

    return Tunable("scale", o.problem, table, _element_tiles(table, (4, 8, 16, 32)), build, (), [out], truth)


def _scale_sum(o: OperandsIA3, arch: int) -> Tunable:
    out, sums = torch.empty_like(o.a), torch.empty_like(o.scale)
    table = scale_sum_tile(arch=arch, dtype=o.problem.dtype, aligned=True)
    choose = ia3_scale_sum.scale_sum_splits

    def build(tile: ElementTile, splits: int | None) -> list[Call]:
        def cut(**sizes: Any) -> int:
            return choose(**sizes) if splits is None else splits

        with held(ia3_scale_sum, "scale_sum_tile", tile):
            ia3_scale_sum.scale_sum_splits = cut
            try:
                return ia3_scale_sum.scale_sum_calls(o.a, o.b, o.scale, out, sums, arch=arch)
            finally:
                ia3_scale_sum.scale_sum_splits = choose

    def truth() -> list[torch.Tensor]:
        return [o.a.double() * o.scale.double(), (o.a.double() * o.b.double()).sum(0)]

    candidates = _element_tiles(table, (8, 16, 32, 64))
    return Tunable("scale and sum", o.problem, table, candidates, build, SPLITS, [out, sums], truth)


def tunables_ia3(p: Problem, device: torch.device, arch: int) -> Iterator[Tunable]:
    """Every kernel of IA3 that a step of this problem may launch, on operands made once."""
    operands = OperandsIA3(p, device)
    for make in (_gemm, _scale, _scale_sum):
        yield make(operands, arch)
