"""Tries launch parameters for each kernel on this GPU, and prints rows for the tables.

    python -m bench.tune [--weights 4bit|ia3] [--minutes 10] [--kernels shrink ...] [--problems S1 ...] [--out DIR]
    python -m bench.tune --dry-run [--arch 90]      # lists the candidates; needs no GPU
    python -m bench.tune --compile-only --jobs 16   # fills Triton's cache by so many processes, before a timed run
    python -m bench.tune --smoke --out DIR          # two candidates on tiny sizes; in the interpreter without a GPU

Each candidate is checked against float64 before it is timed: tiles first, then numbers of splits with the best tile.
The result, bench/results/<device>/tune.json (tune-4bit.json, tune-ia3.json), holds every candidate. The rows that are
printed name it; they go into kernels/peftkern_kernels/gemm_tables.py and reduction_tables.py (gemm_tables_4bit.py and
tables_4bit.py; ia3_tables.py) by hand, for those are keyed by buckets, not by shapes.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bench import environment, measure, records
from bench.cases import HEADLINE_SHAPES, LLAMA_8B, Problem
from bench.check import relative_error, tolerance
from bench.run import interpret_kernels, save

if TYPE_CHECKING:
    from bench.tune_kernels import Tile, Tunable


def problems(dtype: torch.dtype) -> list[Problem]:
    """What the tables' buckets stand for: many tokens first."""
    shapes = [*HEADLINE_SHAPES, *((f"8B {n} M{M}", M, K, N) for M in (1, 16, 128, 2048) for n, K, N in LLAMA_8B)]
    return [Problem(n, M, K, N, R, p, dtype) for n, M, K, N in shapes for R in (16, 64) for p in (0.0, 0.1)]


def problems_4bit(dtype: torch.dtype) -> list[Problem]:
    """What the tables' buckets over a 4-bit weight stand for."""
    tokens, kinds = (1, 16, 32, 64, 128, 512, 1024), ((0.0, 16), (0.0, 64), (0.1, 16))
    return [Problem(f"8B {n} M{M}", M, K, N, R, p, dtype) for M in tokens for n, K, N in LLAMA_8B for p, R in kinds]


def problems_ia3(dtype: torch.dtype) -> list[Problem]:
    """What IA3 adapts in an 8B Llama."""
    layers = ((n, K, N) for n, K, N in LLAMA_8B if n in ("k,v", "down"))
    return [Problem(f"{n} M{M}", M, K, N, 1, 0.0, dtype) for n, K, N in layers for M in (8192, 2048, 512)]


def smoke_problems(dtype: torch.dtype, weights: str) -> list[Problem]:
    """Tiny ones."""
    if weights == "ia3":
        return [Problem(f"{name} tiny", 40, 48, 64, 1, 0.0, dtype) for name in ("k,v", "down")]
    if weights == "4bit":
        return [Problem(f"tiny M{M}", M, 128, 64, 8, p, dtype) for M, p in ((1, 0.0), (20, 0.1))]
    return [Problem("tiny", 40, 48, 64, 8, p, dtype) for p in (0.0, 0.1)]


def all_tunables(weights: str, p: Problem, device: torch.device, arch: int) -> Iterator[Tunable]:
    """The kernels of a problem over dense or 4-bit weights, or of IA3."""
    if weights == "4bit":
        from bench.tune_kernels_4bit import tunables_4bit as made
    elif weights == "ia3":
        from bench.tune_kernels_ia3 import tunables_ia3 as made
    else:
        from bench.tune_kernels import tunables as made
    yield from made(p, device, arch)


def try_one(tunable: Tunable, truth: list[torch.Tensor], tile: Tile, splits: int | None) -> str:
    """Run a candidate once and compare it with float64; "" if it is right, else why not."""
    for out in tunable.outputs:
        out.fill_(float("nan"))
    try:
        for call in tunable.build(tile, splits):
            call.run()
        measure.synchronize(tunable.outputs[0].device)
    except Exception as error:  # too much shared memory, or a compiler's failure: a candidate that cannot be had
        return f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]
    p = tunable.problem
    worst = max(relative_error(out, exact) for out, exact in zip(tunable.outputs, truth, strict=True))
    bound = tolerance(p.dtype, max(p.M, p.K, p.N))
    return "" if worst <= bound else f"wrong: relative error {worst:.2e} (bound {bound:.2e})"


def time_them(
    tunable: Tunable,
    truth: list[torch.Tensor],
    tried: list[dict[str, Any]],
    tiles: list[tuple[Tile, int | None]],
    quick: bool,
) -> None:
    """Check every candidate, then time those that are right in turn; fills in `tried`."""
    calls = {}
    for tile, splits in tiles:
        row = {"tile": asdict(tile), "splits": splits, "reason": try_one(tunable, truth, tile, splits), "us": None}
        if not row["reason"]:
            launches = tunable.build(tile, splits)
            calls[str(len(tried))] = lambda launches=launches: [call.run() for call in launches]
        tried.append(row)
    if not calls:
        return
    device = tunable.outputs[0].device
    times = measure.gpu_microseconds if device.type == "cuda" else measure.wall_microseconds
    reps, rounds = (1, 1) if quick else (8, 3)
    for index, micros in times(calls, device, reps=reps, rounds=rounds).items():
        tried[int(index)]["us"] = micros.as_dict()


def tune(tunable: Tunable, quick: bool) -> dict[str, Any]:
    """A row of the result: every candidate, the best, and what the table gives now."""
    p = tunable.problem
    tried: list[dict[str, Any]] = []
    truth = tunable.truth()
    chosen = tunable.candidates[:2] if quick else tunable.candidates
    time_them(tunable, truth, tried, [(tile, None) for tile in chosen], quick)

    def best_of(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
        right = [row for row in rows if row["us"] is not None]
        return min(right, key=lambda row: row["us"]["median"]) if right else None

    best = best_of(tried)
    if best is not None and tunable.splits:
        tile = next(t for t in chosen if asdict(t) == best["tile"])
        splits = tunable.splits[:2] if quick else tunable.splits
        time_them(tunable, truth, tried, [(tile, n) for n in splits], quick)
        best = best_of(tried)
    return {
        "kernel": tunable.kernel,
        "problem": p.key,
        "M": p.M,
        "K": p.K,
        "N": p.N,
        "R": p.R,
        "dtype": str(p.dtype).removeprefix("torch."),
        "dropout": p.dropout,
        "type": type(tunable.table).__name__,
        "table": tried[0],
        "best": best,
        "candidates": tried,
    }


def compile_all(options: argparse.Namespace, argv: Sequence[str], chosen: list[Problem]) -> int:
    """Launch every candidate once, shared out among `--jobs` processes: compilers are slow, and use one core each."""
    if options.share is None:
        command = [sys.executable, "-m", "bench.tune", *argv, "--share"]
        jobs = [subprocess.Popen([*command, str(i)]) for i in range(options.jobs)]
        return max([job.wait() for job in jobs])
    from peftkern.backend import device_info

    device, turn = torch.device("cuda", torch.cuda.current_device()), 0
    for p in chosen:
        for tunable in all_tunables(options.weights, p, device, device_info(device).arch):
            if options.kernels and tunable.kernel not in options.kernels:
                continue
            for tile in tunable.candidates:
                turn += 1
                if turn % options.jobs == options.share:
                    with contextlib.suppress(Exception):  # one that cannot be had says so in the timed run
                        for call in tunable.build(tile, None):
                            call.run()
    return 0


def row_text(row: dict[str, Any], source: str) -> str:
    """A best candidate as a line for a table, with what it gained."""
    best, table = row["best"], row["table"]
    if best is None:
        return f"# {row['kernel']}, {row['problem']}: nothing ran: {table['reason']}"
    arguments = ", ".join(f"{k}={v!r}" for k, v in best["tile"].items() if k != "source")
    splits = "" if best["splits"] is None else f", splits {best['splits']}"
    us, was = best["us"]["median"], "the table's does not run"
    if table["us"]:
        was = f"the table's {table['us']['median']:.1f} us"
    return f"{row['type']}({arguments}),  # {row['kernel']}, {row['problem']}{splits}: {us:.1f} us, {was}; {source}"


def dry_run(weights: str, arch: int, dtype: torch.dtype, chosen: list[Problem], kernels: list[str] | None) -> int:
    """List every candidate, having built its launches on the meta device."""
    total = 0
    for p in chosen:
        for tunable in all_tunables(weights, p, torch.device("meta"), arch):
            if kernels and tunable.kernel not in kernels:
                continue
            print(
                f"{tunable.kernel}, {p.key}: {len(tunable.candidates)} tiles, splits {tunable.splits or 'of the table'}"
            )
            for tile in tunable.candidates:
                grids = " + ".join(str(call.grid) for call in tunable.build(tile, None))
                print(f"    {'table ' if tile == tunable.table else ''}{tile}: grid {grids}")
                total += 1
    print(f"{total} candidates for architecture {arch}, {dtype}")
    return 0


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="stop before the next kernel after so long")
    parser.add_argument("--weights", choices=("dense", "4bit", "ia3"), default="dense", help="whose kernels")
    parser.add_argument("--kernels", nargs="+", metavar="NAME", help="only these, such as shrink or 'dY pass'")
    parser.add_argument(
        "--problems", nargs="+", metavar="NAME", help="only these shapes or keys: S1, 'S1 r16 bfloat16'"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--dry-run", action="store_true", help="list the candidates")
    parser.add_argument("--compile-only", action="store_true", help="launch each candidate once and time none")
    parser.add_argument("--jobs", type=int, default=8, help="processes of --compile-only")
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)
    parser.add_argument(
        "--arch", type=int, default=90, help="architecture of a dry run: 80, 86, 89, 90, 100, 120, 942, 1100"
    )
    parser.add_argument("--smoke", action="store_true", help="two candidates on tiny sizes: does the program run?")
    parser.add_argument("--out", type=Path, help="folder of the result (default: bench/results/<device>)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(sys.argv[1:] if argv is None else argv)
    has_gpu = torch.cuda.is_available()
    dtype = getattr(torch, options.dtype)
    if options.smoke and not has_gpu:
        # The interpreter gets bfloat16 wrong; fused 4-bit kernels take 16 bits only.
        dtype = torch.float16 if options.weights == "4bit" else torch.float32
    grid = {"dense": problems, "4bit": problems_4bit, "ia3": problems_ia3}[options.weights]
    chosen = smoke_problems(dtype, options.weights) if options.smoke else grid(dtype)
    if options.problems:
        chosen = [p for p in chosen if p.name in options.problems or p.key in options.problems]
    if options.dry_run:
        return dry_run(options.weights, options.arch, dtype, chosen, options.kernels)
    if not (has_gpu or options.smoke) or (options.smoke and options.out is None):
        print("tuning needs a GPU; --dry-run and --smoke --out DIR do not", file=sys.stderr)
        return 2
    if options.compile_only:
        return compile_all(options, sys.argv[1:] if argv is None else argv, chosen)
    if not has_gpu:
        interpret_kernels("bench.tune")
    from peftkern.backend import device_info

    name = "tune.json" if options.weights == "dense" else f"tune-{options.weights}.json"
    started = time.monotonic()
    device = torch.device("cuda", torch.cuda.current_device()) if has_gpu else torch.device("cpu")
    folder = options.out or environment.results_folder(device)
    rows, missing = [], []
    for p in chosen:
        for tunable in all_tunables(options.weights, p, device, device_info(device).arch):
            if options.kernels and tunable.kernel not in options.kernels:
                continue
            if time.monotonic() - started > 60 * options.minutes:
                missing.append(
                    {"kernel": tunable.kernel, "problem": p.key, "reason": f"{options.minutes:g} minutes were used up"}
                )
                continue
            rows.append(tune(tunable, quick=options.smoke))
            print(row_text(rows[-1], f"{folder.name}/{name}"), flush=True)
    result = {
        "schema": records.SCHEMA,
        "kind": "tune",
        "environment": environment.describe(device),
        "rows": rows,
        "missing": missing,
    }
    print(f"{len(rows)} kernels tuned, {len(missing)} missing: {save(result, folder, name)}")
    return 0 if all(row["best"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
