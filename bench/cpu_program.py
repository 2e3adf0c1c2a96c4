"""What programs that time a step on the CPU beside PEFT share: processes of their own, a command line, a result."""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from bench import environment, records
from bench.models import RANK


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function` returns in a new process, or the error that it raises there."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def caller(smoke: bool) -> Callable[..., Any]:
    """How a program calls what it times: in a new process; in this one if it shall only be seen to run."""
    return (lambda function, *arguments: function(*arguments)) if smoke else in_fresh_process


def cpu_parser(doc: str | None, *, pairs: int, what: str) -> argparse.ArgumentParser:
    """The command line of such a program.

    Args:
        doc: its docstring, of which the first line is shown.
        pairs: how many, unless one says.
        what: that pairs are of.
    """
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=pairs, help=f"pairs of {what}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="a tiny model: does the program run?")
    parser.add_argument("--out", type=Path, help="folder of the result (default: bench/results/cpu-<processor>)")
    return parser


def steps_parser(doc: str | None, *, pairs: int, seconds: float, processes: int, of: str) -> argparse.ArgumentParser:
    """The same where pairs of steps are shared by processes; `of` is what a figure is of, a mode or a case."""
    parser = cpu_parser(doc, pairs=pairs, what=f"steps for each {of}")
    parser.add_argument("--seconds", type=float, default=seconds, help=f"most seconds of steps for each {of}")
    parser.add_argument("--processes", type=int, default=processes, help=f"processes that share the pairs of a {of}")
    return parser


def begun(kind: str, size: dict[str, Any], threads: int, **more: Any) -> dict[str, Any]:
    """The head of a result, in a process that has as many threads as those that measure."""
    torch.set_num_threads(threads)  # which the environment records
    return {
        "schema": records.SCHEMA,
        "kind": kind,
        "environment": environment.describe(torch.device("cpu")),
        "size": size,
        "rank": RANK,
        **more,
        "rows": [],
        "missing": [],
    }


def in_turns(timed: Mapping[str, Callable[[], Any]], pairs: int, in_a_row: int = 1) -> dict[str, list[float]]:
    """Seconds of each of "peftkern", "peft" and "frozen", pair by pair, after three warm-up calls of each.

    The first two take turns in being the first of a pair. A figure is the mean of `in_a_row` calls.
    """
    for function in timed.values():
        for _ in range(3):
            function()
    taken: dict[str, list[float]] = {name: [] for name in timed}
    for i in range(pairs):
        for name in [*(("peftkern", "peft") if i % 2 == 0 else ("peft", "peftkern")), "frozen"]:
            start = time.perf_counter()
            for _ in range(in_a_row):
                timed[name]()
            taken[name].append((time.perf_counter() - start) / in_a_row)
    return taken


def ratio_fields(name: str, above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """The median of the pairs' ratios, and where a tenth of them ends and begins, as fields of a row."""
    ratios = sorted(a / b for a, b in zip(above, below, strict=True))
    last = len(ratios) - 1
    return {
        name: statistics.median(ratios),
        f"{name}_p10": ratios[round(0.1 * last)],
        f"{name}_p90": ratios[round(0.9 * last)],
    }


def folder_of(options: Any) -> Path:
    """Where the result goes."""
    chosen: Path | None = options.out
    return environment.results_folder(torch.device("cpu")) if chosen is None else chosen
