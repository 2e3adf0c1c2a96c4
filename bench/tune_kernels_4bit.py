"""The kernels over a 4-bit weight whose launch parameters can be tuned; as tune_kernels.py, for `--weights 4bit`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import torch

from bench.cases import Problem
from bench.static_cases_4bit import weight_on_meta
from bench.tune_kernels import SCALING, SPLITS, Operands, Tunable, fits, held
from bench.tune_kernels import Tile as AnyTile
from peftkern import reference
from peftkern.ops import quantize_4bit
from peftkern.ops._weight_calls import packed
from peftkern_kernels import dequantize_4bit as dequantize_kernel
from peftkern_kernels import lora_decode_4bit as decode_kernel
from peftkern_kernels.gemm_tables import Tile
from peftkern_kernels.gemm_tables_4bit import choose_tile_4bit, choose_transposed_tile_4bit, fused_4bit_fits, unit_of
from peftkern_kernels.launch import Call, is_aligned
from peftkern_kernels.lora_decode import MAX_ROWS
from peftkern_kernels.lora_linear_4bit import base_4bit_plus_expand_calls, base_4bit_transposed_plus_expand_calls
from peftkern_kernels.tables_4bit import DequantizeLaunch, choose_decode_4bit, choose_dequantize

BLOCKSIZE = 64
FUSED_TOKENS = 2048  # beyond which nobody decodes inside the product


class Operands4bit(Operands):
    """As for a dense weight; `weight` is what the 4-bit one dequantizes to."""

    def __init__(self, p: Problem, device: torch.device) -> None:
        super().__init__(p, device)
        if device.type == "meta":
            self.packed = packed(weight_on_meta(p.N, p.K, dtype=p.dtype))
            return
        weight = quantize_4bit(self.weight)
        self.packed = packed(weight)
        self.weight = reference.dequantize_4bit(weight, p.dtype)  # not by the kernel that is tuned


def _dequantize(o: Operands4bit, arch: int) -> Tunable:
    p = o.problem
    out, table = torch.empty_like(o.weight), choose_dequantize(arch, p.dtype)

    def build(launch: DequantizeLaunch, splits: int | None) -> list[Call]:
        with held(dequantize_kernel, "choose_dequantize", launch):
            return dequantize_kernel.dequantize_4bit_calls(o.packed, out, arch=arch)

    grid = product((256, 512, 1024, 2048), (2, 4, 8))
    found = [DequantizeLaunch(words, warps) for words, warps in grid if words >= 32 * warps]
    candidates: list[Any] = list(dict.fromkeys([table, *found]))
    return Tunable("dequantize", p, table, candidates, build, (), [out], lambda: [o.weight.double()])


def _decode(o: Operands4bit, arch: int) -> Tunable:
    p = o.problem
    out, s = torch.empty(p.M, p.N, dtype=p.dtype, device=o.x.device), torch.empty_like(o.s)
    table = choose_decode_4bit(arch, p.dtype, M=p.M, N=p.N, K=p.K, R=p.R, aligned=is_aligned(o.x))

    def build(tile: Tile, splits: int | None) -> list[Call]:
        tile = tile if splits is None else replace(tile, split_k=splits)
        with held(decode_kernel, "choose_decode_4bit", tile):
            return decode_kernel.decode_4bit_calls(o.x, o.packed, o.a, o.b, SCALING, out, s, arch=arch)

    def truth() -> list[torch.Tensor]:
        low_rank = SCALING * o.x.double() @ o.a.double().T
        return [o.x.double() @ o.weight.double().T + low_rank @ o.b.double().T, low_rank]

    grid = product((32, 64, 128), (64, 128, 256), (4, 8), (2, 3, 4))
    found = [replace(table, block_n=n, block_k=k, num_warps=w, num_stages=s) for n, k, w, s in grid]
    # Not less than two rows of 32 bytes for each warp: below that decoding is the moves around it.
    found = [t for t in found if t.block_n * t.block_k >= 1024 * t.num_warps and _fits(arch, t, t.block_n, p)]
    candidates: list[AnyTile] = list(dict.fromkeys([table, *found]))
    return Tunable("4-bit decode", p, table, candidates, build, SPLITS[:5], [out, s], truth)


def _fits(arch: int, tile: Tile, rows: int, p: Problem) -> bool:
    """Whether a tile's shared memory fits: stages of codes and of the other operand, and decoded values once.

    `rows`: of W in the tile's step, where `block_k` counts its columns.
    """
    size = p.dtype.itemsize
    staged = rows * tile.block_k // 2 + tile.block_m * tile.block_k * size
    return fits(arch, staged * tile.num_stages + rows * tile.block_k * size)


def _forward(o: Operands4bit, arch: int) -> Tunable:
    p = o.problem
    out, unit = torch.empty(p.M, p.N, dtype=p.dtype, device=o.x.device), unit_of(p.K, BLOCKSIZE)
    table = choose_tile_4bit(arch, p.M, p.N, p.K, unit=unit, aligned=is_aligned(o.x))

    def build(tile: Tile, splits: int | None) -> list[Call]:
        tile = tile if splits is None else replace(tile, split_k=splits)
        return base_4bit_plus_expand_calls(o.x, o.packed, o.s, o.b, out, arch=arch, tile=tile)

    def truth() -> list[torch.Tensor]:
        return [o.x.double() @ o.weight.double().T + o.s.double() @ o.b.double().T]

    grid = product(_rows(p.M), (64, 128, 256), (64, 128), (4, 8), (2, 3, 4))
    found = [
        replace(table, block_m=m, block_n=n, block_k=k, num_warps=w, num_stages=s)
        for m, n, k, w, s in grid
        if p.K % k == 0 and 512 <= m * n // w <= 4096
    ]
    candidates: list[AnyTile] = list(dict.fromkeys([table, *(t for t in found if _fits(arch, t, t.block_n, p))]))
    return Tunable("4-bit base + expand", p, table, candidates, build, _splits(p), [out], truth)


def _transposed(o: Operands4bit, arch: int) -> Tunable:
    p = o.problem
    out = torch.empty(p.M, p.K, dtype=p.dtype, device=o.x.device)
    table = choose_transposed_tile_4bit(arch, p.M, p.N, p.K, aligned=is_aligned(o.dy), dropout=o.dropout is not None)

    def build(tile: Tile, splits: int | None) -> list[Call]:
        tile = tile if splits is None else replace(tile, split_k=splits)
        options: dict[str, Any] = {"dropout": o.dropout, "arch": arch, "tile": tile}
        return base_4bit_transposed_plus_expand_calls(o.dy, o.packed, o.ds, o.a, out, **options)

    def truth() -> list[torch.Tensor]:
        return [o.dy.double() @ o.weight.double() + (o.ds.double() @ o.a.double()) * o.keep()]

    grid = product(_rows(p.M), (128, 256), (16, 32, 64), (4, 8), (2, 3, 4))
    found = [
        replace(table, block_m=m, block_n=n, block_k=k, num_warps=w, num_stages=s)
        for m, n, k, w, s in grid
        if 512 <= m * n // w <= 4096
    ]
    # Here block_k counts rows of W and block_n its columns.
    right = [t for t in found if _fits(arch, replace(t, block_k=t.block_n), t.block_k, p)]
    candidates: list[AnyTile] = list(dict.fromkeys([table, *right]))
    return Tunable("4-bit base^T + expand", p, table, candidates, build, _splits(p), [out], truth)


def _rows(M: int) -> tuple[int, ...]:
    return (16, 32, 64) if M <= 32 else (32, 64, 128) if M <= 128 else (64, 128)


def _splits(p: Problem) -> tuple[int, ...]:
    return SPLITS[:5] if p.M <= 512 else ()


def tunables_4bit(p: Problem, device: torch.device, arch: int) -> Iterator[Tunable]:
    """Every kernel over the 4-bit weight that a step of this problem may launch, on operands made once."""
    operands = Operands4bit(p, device)
    makers: list[Callable[[Operands4bit, int], Tunable]] = []
    if p.M == 1 and not p.dropout:
        makers.append(_dequantize)  # once a shape
    if p.M <= MAX_ROWS and not p.dropout:
        makers.append(_decode)
    if p.M <= FUSED_TOKENS and not fused_4bit_fits(p.N, p.K, BLOCKSIZE, p.dtype):
        # The forward's product never drops, and few rows have a kernel of their own.
        makers += [_transposed] if p.dropout or p.M <= MAX_ROWS else [_forward, _transposed]
    for make in makers:
        yield make(operands, arch)
