"""What the benchmarks of one kind of layer share (ia3.py, dora.py, experts.py): trying an implementation, timing those
that were right in turn, and the program around a grid of problems."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import check, environment, measure, records
from bench.progress import Progress
from bench.run import interpret_kernels, save
from peftkern import use_backend

Row = dict[str, Any]
TARGET_SECONDS = 0.2  # of GPU time for each function that is timed, about


def try_implementation(
    row: Row, errors: Callable[[], dict[str, float]], device: torch.device, run: Callable[[], Any] | None = None
) -> bool:
    """Note an implementation's errors in `row`, and run what is timed once if `errors` does not; if something is wrong
    or raised, note that.

    Returns:
        Whether it is to be timed.
    """
    try:
        row["errors"] = {name: float(f"{error:.3g}") for name, error in errors().items()}
        if run is not None:
            run()
        measure.synchronize(device)
        return True
    except check.WrongResultError as error:
        row |= {"status": "wrong", "reason": str(error)}
    except Exception as error:  # whatever another project's code raises is its result, with its reason
        traceback.print_exc(limit=-3)
        row |= {"status": "failed", "reason": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
    return False


def time_in_turn(
    rows: dict[str, Row],
    functions: dict[str, Callable[[], Any]],
    base: str,
    device: torch.device,
    *,
    once: int,
    rounds: int,
    reps: tuple[int, int],
    seconds: float = TARGET_SECONDS,
) -> dict[str, float]:
    """Time functions in turn, note `gpu_us` and `wall_us` in their rows, and return the median of each in microseconds.

    Args:
        rows: those of the functions, by name.
        functions: what to time.
        base: the one that tells how often each is run.
        device: where.
        once: runs of the base to tell that; 0 for a single run of each.
        rounds: of all of them.
        reps: least and most runs of each in a round.
        seconds: of GPU time for each, about.
    """
    repeated = 1
    if once:
        took = measure.wall_microseconds({base: functions[base]}, device, reps=once, rounds=1)[base].median
        repeated = int(min(reps[1], max(reps[0], seconds * 1e6 / took / rounds)))
    else:
        rounds = 1
    on_gpu = device.type == "cuda"
    gpu = measure.gpu_microseconds(functions, device, reps=repeated, rounds=rounds) if on_gpu else {}
    wall = measure.wall_microseconds(functions, device, reps=repeated, rounds=rounds)
    for name in functions:
        rows[name]["gpu_us"] = gpu[name].as_dict() if on_gpu else None
        rows[name]["wall_us"] = wall[name].as_dict()
    return {name: found.median for name, found in (gpu or wall).items()}


def parser(program: str, about: str | None) -> argparse.ArgumentParser:
    """The command line of `python -m program`, whose docstring is `about`."""
    made = argparse.ArgumentParser(prog=f"python -m {program}", description=(about or "").splitlines()[0])
    made.add_argument("--smoke", action="store_true", help="tiny problems: does the program run? (CPU too)")
    made.add_argument("--minutes", type=float, default=8.0, help="stop before the next problem after so long")
    made.add_argument("--problems", nargs="+", metavar="NAME", help="only these layers or models, or keys of results")
    made.add_argument("--seconds", type=float, default=TARGET_SECONDS, help="GPU time for each function, about")
    made.add_argument("--quick", action="store_true", help="once each: fills the compilers' caches, measures nothing")
    made.add_argument("--out", type=Path, help="folder of the result (default: bench/results/<device>)")
    return made


def run_problems(
    kind: str,
    options: argparse.Namespace,
    cases: Sequence[Any],
    prepare: Callable[[torch.device], Callable[[Any], list[Row]]],
    show: Callable[[Any, list[Row]], None],
    backend_on_cpu: str = "auto",
) -> int:
    """Measure a grid of problems, save the rows after each, and return the exit status: 1 where peftkern was wrong.

    Args:
        kind: of the result, which names its file and the program.
        options: of `parser`.
        cases: the problems, each with a `name` and a `key`.
        prepare: makes, once for a device, what measures a case.
        show: prints a case's rows.
        backend_on_cpu: the backend where there is no GPU.
    """
    has_gpu = torch.cuda.is_available()
    if not has_gpu and not options.smoke:
        print("no GPU here: --smoke runs tiny problems on the CPU", file=sys.stderr)
        return 2
    if records.has_no_place(options):
        return 2
    if not has_gpu:
        interpret_kernels(f"bench.{kind}")
    device = torch.device("cuda", torch.cuda.current_device()) if has_gpu else torch.device("cpu")
    if options.problems:
        cases = [case for case in cases if case.name in options.problems or case.key in options.problems]
    rows: list[Row] = []
    path = (options.out or environment.results_folder(device)) / f"{kind}.json"
    result = {"schema": records.SCHEMA, "kind": kind, "environment": environment.describe(device), "rows": rows}
    measured = prepare(device)
    progress = Progress(result, lambda result: save(result, path.parent, path.name), options.minutes)
    with use_backend("auto" if has_gpu else backend_on_cpu):
        for case in progress.each([({"problem": case.key}, case) for case in cases]):
            found = measured(case)
            show(case, found)
            rows += found
    result = progress.done()
    print(f"{len(rows)} rows, {len(result['missing'])} problems missing, {result['seconds']} s: {path}")
    faults = [r for r in rows if r["implementation"].startswith("peftkern") and r["status"] != "ok"]
    for row in faults:
        print(f"{row['status']}: {row['implementation']} in {row['problem']}: {row['reason']}", file=sys.stderr)
    return 1 if faults else 0
