"""The headline: `lora_linear` and a decoder layer, peftkern beside its peers, on the device at hand.

    python -m bench.run [--full] [--smoke] [--minutes 10] [--groups peftkern compiled others] [--out DIR]

Each implementation is checked first and then timed in turn with the others of its group and the frozen layer. Results
go to bench/results/<device>/headline.json (or DIR), and to $OUT where that is set, after every problem. When the
minutes are used up it stops before the next problem, and the file says what is missing. Exits with 1 where peftkern was
wrong or failed. Without a GPU it runs bench/test_lora_linear_cpu.py in its place.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench import check, environment, limits, measure, records
from bench.adapters import Rival
from bench.cases import PASSES, Problem, full, headline, smoke
from bench.decoder import DecoderWorkload
from bench.progress import Keep, Progress
from bench.rivals import everyone, frozen
from bench.workload import LinearWorkload, Subject

GROUPS = ("peftkern", "compiled", "others")
TARGET_SECONDS = 0.2  # of GPU time for each function that is timed, about


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--full", action="store_true", help="the whole grid, not only the headline")
    parser.add_argument("--smoke", action="store_true", help="tiny problems: does the program run? (CPU too)")
    parser.add_argument("--minutes", type=float, default=10.0, help="stop before the next problem after so long")
    parser.add_argument(
        "--groups", nargs="+", choices=GROUPS, default=list(GROUPS), metavar="GROUP", help=", ".join(GROUPS)
    )
    parser.add_argument(
        "--problems", nargs="+", metavar="NAME", help="only these shapes or keys: S1, 'S1 r16 bfloat16'"
    )
    parser.add_argument("--seconds", type=float, default=TARGET_SECONDS, help="GPU time for each function, about")
    parser.add_argument("--no-launches", action="store_true", help="count no launches: the profiler takes most time")
    parser.add_argument("--quick", action="store_true", help="once each: fills the compilers' caches, measures nothing")
    parser.add_argument("--out", type=Path, help="folder of the result (default: bench/results/<device>)")
    parser.add_argument("--name", default="headline", help="name of the result file, without .json")
    return parser.parse_args(argv)


def empty_row(problem: Problem, passes: str, group: str, rival: Rival) -> dict[str, Any]:
    """A row with nothing measured yet."""
    row: dict[str, Any] = dict.fromkeys(records.ROW_FIELDS)
    return row | {
        "problem": problem.key,
        "passes": passes,
        "group": group,
        "implementation": rival.name,
        "version": rival.version,
        "status": "not run",
        "reason": "not reached",
        "M": problem.M,
        "K": problem.K,
        "N": problem.N,
        "R": problem.R,
        "dtype": str(problem.dtype).removeprefix("torch."),
        "dropout": float(problem.dropout),
        "errors": {},
    }


def path_taken(problem: Problem, rival: Rival, work: LinearWorkload | DecoderWorkload) -> str | None:
    """The path that peftkern takes: the forced one, or the plan's; None for others."""
    if not rival.name.startswith("peftkern"):
        return None
    if rival.path:
        return rival.path
    if isinstance(work, DecoderWorkload):
        return "planned for each layer"
    from peftkern.backend import current_backend
    from peftkern.ops.lora_linear import plan_for

    return plan_for(work.x, work.linear.weight, problem.R, current_backend()).path


class Bench:
    """One run: measures problem after problem into `rows`."""

    def __init__(
        self,
        device: torch.device,
        ceilings: limits.Ceilings,
        *,
        quick: bool = False,
        seconds: float = TARGET_SECONDS,
        launches: bool = True,
    ) -> None:
        self.device, self.ceilings, self.quick = device, ceilings, quick
        self.seconds, self.launches = seconds, launches and not quick
        self.rows: list[dict[str, Any]] = []

    def measure(
        self, problem: Problem, group: str, rivals: list[Rival], work: LinearWorkload | DecoderWorkload | None = None
    ) -> None:
        """Check each rival, then time all that are right, forward and forward + backward; on `work` if it is made."""
        if work is None:
            work = (DecoderWorkload if problem.decoder else LinearWorkload)(problem, self.device)
        truth = check.truth_of(work) if isinstance(work, LinearWorkload) else None
        rows: dict[str, dict[str, dict[str, Any]]] = {}
        subjects: dict[str, Subject] = {}
        for rival in [frozen(), *rivals]:
            found = rows[rival.name] = {passes: empty_row(problem, passes, group, rival) for passes in PASSES}
            status, reason, errors = self._ready(problem, rival, work, truth, subjects)
            for row in found.values():
                row |= {"status": status, "reason": reason, "errors": errors}
                row["path"] = self.path(problem, rival, work)
        del truth
        for passes in PASSES:
            chosen = {name: rows[name][passes] for name in subjects}
            self._time(problem, passes, subjects, chosen)
            self.rows += [found[passes] for found in rows.values()]

    def path(self, problem: Problem, rival: Rival, work: Any) -> str | None:
        """See `path_taken`."""
        return path_taken(problem, rival, work)

    def limit(self, problem: Problem, passes: str, name: str) -> float | None:
        """The physical limit of a rival in microseconds."""
        return limits.limit_microseconds(problem, passes, self.ceilings, adapter=name != "frozen")

    def _ready(
        self, problem: Problem, rival: Rival, work: Any, truth: check.Truth | None, subjects: dict[str, Subject]
    ) -> tuple[str, str, dict[str, float]]:
        """(status, reason, errors); a rival that is right is added to `subjects`."""
        why_not = rival.why_not(problem, self.device)
        if why_not:
            return "not run", why_not, {}
        try:
            subject = work.subject(rival)
            if truth is None:
                errors = work.check(rival, subject)
            else:
                errors = check.check(work, truth, subject)
            measure.synchronize(self.device)
        except check.WrongResultError as error:
            return "wrong", str(error), {}
        except Exception as error:  # whatever another project's code raises is its result, with its reason
            traceback.print_exc(limit=-3)
            return "failed", f"{type(error).__name__}: {error}".strip().splitlines()[0][:300], {}
        subjects[rival.name] = subject
        return "ok", "", {name: float(f"{e:.3g}") for name, e in errors.items()}

    def _time(
        self, problem: Problem, passes: str, subjects: dict[str, Subject], rows: dict[str, dict[str, Any]]
    ) -> None:
        """Fill in everything measured about `passes`."""
        calls = {name: s.forward if passes == "forward" else s.forward_backward for name, s in subjects.items()}
        for name, call in calls.items():
            # Memory first: it is the one thing that the others' buffers could blur.
            subject, row = subjects[name], rows[name]
            row["peak_bytes"] = measure.peak_bytes(call, self.device)
            row["saved_bytes"] = measure.saved_bytes(subject.forward, subject.parameters())
            row["launches"] = measure.launches(call, self.device) if self.launches else None
        once = measure.wall_microseconds({"frozen": calls["frozen"]}, self.device, reps=3, rounds=1)["frozen"].median
        on_gpu = self.device.type == "cuda"
        rounds = 1 if self.quick else 5
        reps = 1 if self.quick else int(min(60, max(4, self.seconds * 1e6 / once / rounds)))
        gpu = measure.gpu_microseconds(calls, self.device, reps=reps, rounds=rounds) if on_gpu else {}
        wall = measure.wall_microseconds(calls, self.device, reps=reps, rounds=rounds)
        for name, row in rows.items():
            times, base = (gpu, gpu["frozen"]) if on_gpu else (wall, wall["frozen"])
            median = times[name].median
            row["gpu_us"] = gpu[name].as_dict() if on_gpu else None
            row["wall_us"] = wall[name].as_dict()
            row["overhead"] = records.overhead(median, base.median)
            limit = self.limit(problem, passes, name)
            row["limit_us"] = limit
            row["share_of_limit"] = None if limit is None else limit / median


def print_rows(rows: list[dict[str, Any]]) -> None:
    """One line an implementation, as it is measured."""
    for row in rows:
        start = f"  {row['passes']:17s} {row['implementation']:24s}"
        if row["status"] != "ok":
            print(f"{start} {row['status']}: {row['reason']}")
            continue
        time_us = (row["gpu_us"] or row["wall_us"])["median"]
        share = "" if row["share_of_limit"] is None else f"  {row['share_of_limit']:.0%} of limit"
        print(f"{start} {time_us:10.1f} us  {row['overhead']:+8.1%}  wall {row['wall_us']['median']:10.1f} us{share}")


def run(options: argparse.Namespace, device: torch.device, keep: Keep) -> dict[str, Any]:
    """Measure, within the time allowed, and return the result; `keep` writes it after every problem."""
    problems = smoke(device) if options.smoke else full() if options.full else headline()
    if options.problems:
        problems = [p for p in problems if p.name in options.problems or p.key in options.problems]
    described = environment.describe(device)
    sizes = {"n": 256, "copied": 1 << 20} if options.smoke else {}
    ceilings = limits.measure_ceilings(device, {p.dtype for p in problems}, **sizes)
    rates = ", ".join(f"{name} {rate / 1e12:.1f} TFLOP/s" for name, rate in ceilings.flops_per_second.items())
    print(f"{described['device']}: {rates}, copy {ceilings.bytes_per_second / 1e9:.0f} GB/s", flush=True)
    bench = Bench(
        device,
        ceilings,
        quick=options.smoke or options.quick,
        seconds=options.seconds,
        launches=not options.no_launches,
    )
    result = {"schema": records.SCHEMA, "kind": "headline", "environment": described, "ceilings": asdict(ceilings)}
    progress = Progress(result | {"rows": bench.rows}, keep, options.minutes)
    # By group and not by problem: what time does not reach is then the peers that compile longest, not whole shapes.
    todo = [
        ({"group": group, "problem": problem.key}, (group, problem, rivals))
        for group, rivals in everyone(tuple(options.groups)).items()
        for problem in problems
    ]
    for group, problem, rivals in progress.each(todo):
        done = len(bench.rows)
        print(f"{group}: {problem.key}", flush=True)
        bench.measure(problem, group, rivals)
        print_rows(bench.rows[done:])
    return progress.done()


def interpret_kernels(program: str = "bench.run") -> None:
    """Let kernels run in Triton's interpreter. Triton must be told before it is imported, so this may start afresh."""
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return
    os.environ["TRITON_INTERPRET"] = "1"
    if "triton" in sys.modules:
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, "-m", program, *sys.argv[1:]])


def measure_cpu() -> int:
    """What `make bench` does without a GPU: pytest-benchmark over `lora_linear` on the CPU."""
    print(
        "No GPU here, so the CPU is measured; `python -m bench.cpu_step` times whole training steps on it.", flush=True
    )
    command = [sys.executable, "-m", "pytest", "-q", "--benchmark-columns=median,iqr,rounds", "--benchmark-sort=name"]
    return subprocess.run([*command, str(environment.ROOT / "bench" / "test_lora_linear_cpu.py")]).returncode


def save(result: dict[str, Any], folder: Path, name: str) -> Path:
    """Write the result to `folder`, and to $OUT where that is set."""
    path = records.write(result, folder / name)
    if os.environ.get("OUT"):
        records.write(result, Path(os.environ["OUT"]) / name)
    return path


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(sys.argv[1:] if argv is None else argv)
    has_gpu = torch.cuda.is_available()
    if not has_gpu and not options.smoke:
        return measure_cpu()
    if not has_gpu:
        interpret_kernels()
    device = torch.device("cuda", torch.cuda.current_device()) if has_gpu else torch.device("cpu")
    if records.has_no_place(options):
        return 2
    path = (options.out or environment.results_folder(device)) / f"{options.name}.json"
    result = run(options, device, lambda result: save(result, path.parent, path.name))
    print(f"{len(result['rows'])} rows, {len(result['missing'])} problems missing, {result['seconds']} s: {path}")
    faults = [
        r for r in result["rows"] if r["implementation"].startswith("peftkern") and r["status"] in ("wrong", "failed")
    ]
    for row in faults:
        print(
            f"{row['status']}: {row['implementation']} in {row['problem']}, {row['passes']}: {row['reason']}",
            file=sys.stderr,
        )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
