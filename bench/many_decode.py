"""The implementations of the decode pair, and a search for its launch parameters."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from bench import environment, measure, records
from bench.check import WrongResultError
from bench.many_cases import HEADLINE, LEAST_SLOTS, RANK, SMOKE_SHAPE, Batch, Case, Pool
from bench.many_rivals import Made, Server
from bench.run import save
from peftkern import __version__ as peftkern_version
from peftkern.backend import device_info
from peftkern.ops._multi_lora_linear_triton import multi_calls
from peftkern.ops._route_triton import route
from peftkern_kernels.launch import run_all
from peftkern_kernels.multi_decode_finish import BLOCK_ROWS
from peftkern_kernels.multi_tables import DecodeTile, multi_decode_tile
from peftkern_kernels.reduction_tables import rank_block
from peftkern_kernels.route_kernel import route_calls
from peftkern_kernels.routing import empty_routing

TUNED_TOKENS = (1, 16, 64)
Make = Callable[[Batch, torch.Tensor], Made]


def _peftkern(batch: Batch, y: torch.Tensor) -> Made:
    """Our launches; the routing's tables are filled in place, as one launch does for all layers of a model."""
    arch = device_info(batch.device).arch
    routing = route(batch.ids, batch.case.slots)
    pair = multi_calls(batch.x, batch.pool.adapters, routing, y, arch=arch)
    tables = empty_routing(batch.case.M, batch.case.slots, batch.device)
    routes = route_calls(batch.ids, tables)
    both = [*routes, *multi_calls(batch.x, batch.pool.adapters, tables, y, arch=arch)]
    return Made(lambda: run_all(pair), lambda: run_all(routes), lambda: run_all(both))


def implementations(servers: list[Server]) -> Iterator[tuple[str, str | None, Make | None, str]]:
    """(name, version, how it is put on a batch, why it cannot be)."""
    yield "peftkern", peftkern_version, _peftkern, ""
    for server in servers:
        yield server.name, server.version, server.make, server.why_not


# -- launch parameters --------------------------------------------------------------------------------------------


SECOND_LAUNCH = ("block_n", "expand_warps", "expand_r", "overlap", "early_base")  # a tile's fields that it reads
MOST_REGISTERS = 128  # of B's tile, a thread


def candidates(table: DecodeTile, K: int, R: int) -> tuple[list[DecodeTile], list[DecodeTile]]:
    """Tiles that differ from the table's in the first launch, and such that do in the second; R: the largest rank."""
    widest = rank_block(R, 64)
    shrink = [
        replace(table, block_k=k, num_stages=stages, split_k=split, shrink_warps=warps, block_r=ranks)
        for k, stages in ((64, 4), (128, 2), (128, 3), (128, 4), (256, 2), (256, 3))
        for split in (1, 2, 4, 8, 16, 32)
        for warps in (1, 2, 4)
        for ranks in sorted({table.block_r, 16, min(32, widest)})
        if split * k <= K
    ]
    expand = [
        replace(table, block_n=n, expand_warps=warps, expand_r=ranks, overlap=overlap, early_base=early)
        for n, warps in itertools.product((32, 64, 128, 256, 512), (1, 2, 4, 8))
        for ranks in sorted({16, min(32, widest), widest})
        for overlap, early in ((False, False), (True, False), (True, True))
        if n * ranks <= 64 * warps * MOST_REGISTERS
    ]
    if table.rows != BLOCK_ROWS:  # in both launches
        expand.append(replace(table, rows=BLOCK_ROWS))
    return shrink, expand


def _try(batch: Batch, y: torch.Tensor, tile: DecodeTile, arch: int) -> tuple[Callable[[], Any] | None, str]:
    """A right candidate, recorded; or why it is not."""
    try:
        routing = route(batch.ids, batch.case.slots)
        calls = multi_calls(batch.x, batch.pool.adapters, routing, y, arch=arch, decode=True, tile=tile)
        y.copy_(batch.y0)
        run_all(calls)
        batch.check({"y": y})
        if batch.device.type != "cuda":
            return lambda: run_all(calls), ""
        return measure.captured(lambda: run_all(calls), batch.device), ""
    except WrongResultError as error:
        return None, f"wrong: {error}"
    except Exception as error:  # too much shared memory, or a compiler's failure: a candidate that cannot be had
        if not measure.is_usable(batch.device):
            raise measure.TimingError(str(tile), error) from error  # nor can any other from here on
        return None, f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]


def _time_all(
    batch: Batch, y: torch.Tensor, tiles: list[DecodeTile], arch: int, quick: bool, tried: list[dict[str, Any]]
) -> None:
    """Check and time every tile, and append what was found to `tried`."""
    ready, rows = {}, []
    for tile in dict.fromkeys(tiles):
        call, why_not = _try(batch, y, tile, arch)
        rows.append({"tile": asdict(tile), "reason": why_not, "us": None})
        if call is not None:
            ready[str(len(rows) - 1)] = call
    if ready and not quick:
        times = measure.gpu_microseconds if batch.device.type == "cuda" else measure.wall_microseconds
        for index, micros in times(ready, batch.device, reps=8, rounds=3).items():
            rows[int(index)]["us"] = micros.as_dict()
    tried += rows


def best_of(tried: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The fastest that was timed."""
    right = [row for row in tried if row["us"] is not None]
    return min(right, key=lambda row: row["us"]["median"]) if right else None


def tune(options: argparse.Namespace, device: torch.device, folder: Path) -> int:
    """Try tiles at 1, 16 and 64 tokens of distinct adapters of `--ranks`, print the best, and write tune-many.json.

    The first launch's tiles are tried with the table's second launch, the second's with the table's first, then the
    best three of either together. `--quick --share I/N` only compiles every N-th.
    """
    on_gpu, arch = device.type == "cuda", device_info(device).arch
    share, shares = (int(part) for part in options.share.split("/"))
    K, N = SMOKE_SHAPE if options.smoke else HEADLINE
    ranks = tuple(options.ranks or (RANK,))
    dtype = torch.bfloat16 if on_gpu else torch.float16
    rows: list[dict[str, Any]] = []
    for M in options.tokens or ((3,) if options.smoke else TUNED_TOKENS):
        case = Case("decode", M, K, N, max(LEAST_SLOTS, M), "distinct", ranks, dtype)
        batch = Batch(case, Pool(case, device), device)
        y = torch.empty(M, N, dtype=dtype, device=device)
        table = multi_decode_tile(arch=arch, dtype=dtype, M=M, N=N, K=K, R=max(ranks), aligned=True)
        lists = candidates(table, K, max(ranks))
        if options.smoke:
            lists = (lists[0][:2], lists[1][:1])
        if options.quick:
            _time_all(batch, y, [*lists[0], *lists[1]][share::shares], arch, True, [])
            continue
        tried: list[list[dict[str, Any]]] = [[], [], []]
        _time_all(batch, y, [table], arch, False, tried[2])
        for kind, tiles in enumerate(lists):
            _time_all(batch, y, tiles, arch, False, tried[kind])
        firsts, seconds = (
            sorted((row for row in found if row["us"]), key=lambda row: row["us"]["median"])[:3] for found in tried[:2]
        )
        mixed = [
            DecodeTile(**{**first["tile"], **{name: second["tile"][name] for name in SECOND_LAUNCH}})
            for first, second in itertools.product(firsts, seconds)
        ]
        _time_all(batch, y, mixed, arch, False, tried[2])
        everything = [*tried[2], *tried[0], *tried[1]]
        best = best_of(everything)
        rows.append({"kernel": "many decode", "problem": case.key, "table": tried[2][0], "best": best})
        rows[-1] |= {"type": "DecodeTile", "candidates": everything}
        print(f"{case.key}: {len(everything)} tiles; the table's {tried[2][0]}", flush=True)
        for row in sorted((r for r in everything if r["us"]), key=lambda r: r["us"]["median"])[:8]:
            print(f"  {row['us']['median']:8.2f} us  {row['tile']}", flush=True)
    if options.quick:
        return 0
    result = {"schema": records.SCHEMA, "kind": "tune", "environment": environment.describe(device)}
    print(save(result | {"rows": rows, "missing": []}, folder, "tune-many.json"))
    return 0 if all(row["best"] for row in rows) else 1
