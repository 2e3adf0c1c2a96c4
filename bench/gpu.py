"""Everything that a GPU can tell in a few minutes: the GPU tests, then each benchmark's headline.

    python -m bench.gpu [--minutes 12] [--parts tests run quantized many train ia3 experts dora] [--out DIR] [--dry-run]

Kernels compile for seconds each, on one core, so before anything is timed many processes run every benchmark once
(`--quick`) to fill the compilers' caches, the tests beside them. Then the benchmarks follow one another, alone on the
machine, each within its share of the minutes; one that runs over is stopped, and what it has written stays. Logs and
results go to DIR (default: bench/results/<device>, logs beside them), and a line for each part says how it ended.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import environment
from bench.cases import headline
from bench.quantized import TOKENS

WARM_UP_SHARE = 0.3  # of the minutes, at most
FASTER = ["--no-launches", "--seconds", "0.1"]


@dataclass(frozen=True, slots=True)
class Part:
    """A benchmark: its share of the time after warming up, its command, and the commands that warm it up."""

    name: str
    share: float
    command: list[str]
    warm_up: list[list[str]]


def parts() -> list[Part]:
    """What is run, in order of importance: what the minutes do not reach is the end of the list."""
    keys = [problem.key for problem in headline()]
    return [
        Part(
            "run",
            0.3,
            ["bench.run", "--groups", "peftkern", *FASTER],
            [["bench.run", "--groups", "peftkern", "--quick", "--problems", key] for key in keys],
        ),
        Part(
            "quantized",
            0.2,
            ["bench.quantized", *FASTER, "--tokens", *map(str, (1, 128, 512, 2048, 8192, 16))],
            [["bench.quantized", "--quick", "--tokens", str(M)] for M in TOKENS],
        ),
        Part(
            "many",
            0.15,
            ["bench.many", "--parts", "decode"],
            [["bench.many", "--quick", "--parts", "decode", "--tokens", str(M)] for M in (1, 4, 16, 64)],
        ),
        Part(
            "train",
            0.1,
            ["bench.many", "--parts", "train", "prefill"],
            [["bench.many", "--quick", "--parts", "train", "prefill", "--tokens", str(M)] for M in (512, 2048, 8192)],
        ),
        _of_layers("ia3", 0.1, ["k, v", "down"], "--no-compiled"),
        _of_layers("experts", 0.075, ["Qwen3-30B-A3B", "Mixtral 8x7B"]),
        _of_layers("dora", 0.075, ["q", "down"], "--no-compiled"),
    ]


def _of_layers(name: str, share: float, problems: list[str], *options: str) -> Part:
    """A benchmark of `bench/problems.py`, warmed up by a process for each layer or model."""
    command = [f"bench.{name}", *options]
    warm_up = [[*command, "--quick", "--problems", problem] for problem in problems]
    return Part(name, share, [*command, "--seconds", "0.1"], warm_up)


def tests_command() -> list[str]:
    """The GPU tests, by several processes where pytest-xdist is there."""
    spread = ["-n", str(max(2, (os.cpu_count() or 4) // 2))] if importlib.util.find_spec("xdist") else []
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *spread, "tests"]


def module(command: list[str], *more: str) -> list[str]:
    """A benchmark's command line."""
    return [sys.executable, "-m", *command, *more]


def warm_up(chosen: list[Part], tests: bool, seconds: float, folder: Path) -> None:
    """Fill the caches by many processes at once, the tests beside them; all end after so many seconds."""
    deadline, started = time.monotonic() + seconds, []
    quiet = {name: value for name, value in os.environ.items() if name != "OUT"}
    if tests:
        with (folder / "tests.log").open("w") as log:
            process = subprocess.Popen(tests_command(), stdout=log, stderr=subprocess.STDOUT, cwd=environment.ROOT)
            started.append(("tests", process))
    for part in chosen:
        for i, command in enumerate(part.warm_up):
            out = str(folder / "warm-up" / f"{part.name}-{i}")
            silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": environment.ROOT, "env": quiet}
            started.append((part.name, subprocess.Popen(module(command, "--out", out), **silent)))  # type: ignore[call-overload]
    for name, process in started:
        try:
            code = process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            code = -9
        if name == "tests":
            lines = (folder / "tests.log").read_text().splitlines() or ["no output"]
            print(f"tests: {lines[-1]}" if code >= 0 else "tests: stopped at their time limit", flush=True)


def run_part(part: Part, seconds: float, folder: Path) -> int:
    """Run one benchmark with a time limit; its output goes to a log beside its result."""
    command = module(part.command, "--minutes", f"{0.85 * seconds / 60:.2f}", "--out", str(folder / part.name))
    variables = dict(os.environ)
    if variables.get("OUT"):  # a folder each: two parts are the same program, and write a file of the same name
        variables["OUT"] = str(Path(variables["OUT"]) / part.name)
    started = time.monotonic()
    with (folder / f"{part.name}.log").open("w") as log:
        try:
            code = subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, timeout=seconds, cwd=environment.ROOT, env=variables
            ).returncode
            ended = f"exit status {code}"
        except subprocess.TimeoutExpired:
            code, ended = 124, "stopped at its time limit"
    print(f"{part.name}: {ended}, {time.monotonic() - started:.0f} s", flush=True)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    known = parts()
    names = ["tests", *(part.name for part in known)]
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=12.0, help="for all of it (default 12)")
    parser.add_argument("--parts", nargs="+", choices=names, default=names, metavar="PART", help=", ".join(names))
    parser.add_argument("--out", type=Path, help="folder of results and logs (default: bench/results/<device>)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    options = parser.parse_args(argv)
    chosen = [part for part in known if part.name in options.parts]
    seconds = 60 * options.minutes
    if options.dry_run:
        for part in chosen:
            for command in part.warm_up:
                print("warm up:", *command)
        for part in chosen:
            print(f"{part.share:.0%}:", *part.command)
        return 0
    if not torch.cuda.is_available():
        print("this needs a GPU; --dry-run does not", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    folder = options.out or environment.results_folder(device)
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    warm_up(chosen, "tests" in options.parts, WARM_UP_SHARE * seconds, folder)
    left = seconds - (time.monotonic() - started)
    print(f"warm after {time.monotonic() - started:.0f} s", flush=True)
    whole = sum(part.share for part in chosen) or 1.0
    return max([run_part(part, left * part.share / whole, folder) for part in chosen], default=0)


if __name__ == "__main__":
    sys.exit(main())
