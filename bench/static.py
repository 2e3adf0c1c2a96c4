"""The static GPU check: compile every launch of the library for every architecture, without a GPU, and judge the code.

    python -m bench.static [--quick] [--arch 80 90 gfx942] [--dtype bf16] [--kernel decode]
                           [--triton DIR] [--jobs N] [--json [FILE]] [--list]

Launches come from the library itself over a grid of real shapes (static_cases.py), are compiled as they would be at a
launch (static_compile.py) and judged (static_judge.py). It exits with 1, after naming each failure, on
- a spill, or stack;
- more shared memory than the architecture has;
- a 16-bit matrix product without its architecture's instruction: HMMA on sm_80, 86, 89, 120; HGMMA on sm_90 and UTC*MMA
  on sm_100 where the tile has 64 rows and four warps, else HMMA; v_mfma on gfx942, v_wmma on gfx1100;
- a pipelined main loop that loads synchronously though sizes are aligned (not asked on AMD, where every load to
  registers is asynchronous already);
- over a 4-bit weight, in the loop that decodes: more than 12 instructions an element beside the matrix instruction on
  sm_89 and sm_90 (column "decode"; kept in the records as a figure everywhere), or codes that are loaded synchronously;
- a grid larger than a launch allows, or a kernel that does not compile.

Another Triton is put in front with `--triton DIR` after `pip install --target DIR --no-deps triton==3.6.0`. Compiled
kernels stay in Triton's own cache (TRITON_CACHE_DIR), so that a second run only reads them.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

from bench import static_report
from bench.static_judge import ARCHITECTURES, Record, judge

if TYPE_CHECKING:
    from bench.static_compile import Compilation

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def child_environment(environment: Mapping[str, str], triton: str | None) -> dict[str, str]:
    """The environment that the check must run in: no interpreter, this checkout and the wanted Triton found first."""
    wanted = {name: value for name, value in environment.items() if name != "TRITON_INTERPRET"}
    first = [*([str(Path(triton).resolve())] if triton else []), str(ROOT), str(ROOT / "kernels")]
    rest = [path for path in wanted.get("PYTHONPATH", "").split(os.pathsep) if path and path not in first]
    wanted["PYTHONPATH"] = os.pathsep.join([*first, *rest])
    return wanted


def architecture(name: str) -> int:
    """90, "sm_90" or "gfx942" as an architecture number."""
    known = {a.name: number for number, a in ARCHITECTURES.items()} | {str(number): number for number in ARCHITECTURES}
    if name not in known:
        names = ", ".join(a.name for a in ARCHITECTURES.values())
        raise argparse.ArgumentTypeError(f"expected one of {names}, got {name!r}")
    return known[name]


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.static", description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", nargs="+", type=architecture, default=list(ARCHITECTURES), help="default: all")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES), help="default: all")
    parser.add_argument(
        "--kernel", nargs="+", metavar="TEXT", default=[""], help="only kernels with one of these in their name"
    )
    parser.add_argument("--quick", action="store_true", help="a handful of cases")
    parser.add_argument("--triton", metavar="DIR", help="a folder with another Triton, put first on the path")
    parser.add_argument("--json", metavar="FILE", nargs="?", const="", help="write the records; default below results/")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile")
    parser.add_argument("--list", action="store_true", help="show what would be compiled, and stop")
    arguments = parser.parse_args(argv)
    if arguments.triton and not (Path(arguments.triton) / "triton" / "__init__.py").is_file():
        parser.error(f"--triton: expected a folder that holds the package triton, got {arguments.triton!r}")
    if arguments.jobs < 1:
        parser.error(f"--jobs: expected at least 1, got {arguments.jobs}")
    return arguments


def compile_all(work: Sequence[Compilation], jobs: int) -> Iterator[Record]:
    """Compile in `jobs` processes, in any order. A compiler that takes its process down is a fault of its kernel only.

    The processes are forked, and so see `work` without its being sent. When one dies, all that was under way is lost:
    the rest is then done by one process at a time, where the first one unfinished is to blame.
    """
    pending = list(range(len(work)))
    while pending:
        pool = ProcessPoolExecutor(jobs, mp_context=get_context("fork"), initializer=_keep, initargs=(work,))
        lost = []
        try:
            futures = {pool.submit(_compile_one, index): index for index in pending}
            for future in as_completed(futures):
                try:
                    yield future.result()
                except BrokenProcessPool:
                    lost.append(futures[future])
        finally:
            pool.shutdown(cancel_futures=True)  # an interrupt ends the check after the kernel under way
        pending = sorted(lost)
        if pending and jobs == 1:
            record = work[pending.pop(0)].record
            record.error = "the compiler ended its process"
            record.faults = judge(record)
            yield record
        jobs = 1


_WORK: list[Compilation] = []


def _keep(work: Sequence[Compilation]) -> None:
    _WORK[:] = work


def _compile_one(index: int) -> Record:
    from bench.static_compile import compile_and_judge

    return compile_and_judge(_WORK[index])


def run(arguments: argparse.Namespace) -> int:
    """Do what the command line says, in an environment that is right; the exit status."""
    # Here and not above: Triton reads TRITON_INTERPRET when it is imported, and --triton must already stand in front.
    import torch
    import triton

    from bench.static_cases import all_cases, quick_cases
    from bench.static_compile import compilations

    dtypes = {DTYPES[name] for name in arguments.dtype}
    cases = quick_cases() if arguments.quick else all_cases()
    cases = [case for case in cases if str(case.dtype).removeprefix("torch.") in dtypes]
    work = [c for c in compilations(cases, arguments.arch) if any(text in c.record.kernel for text in arguments.kernel)]
    print(f"triton {triton.__version__}: {len(cases)} cases, {len(work)} distinct compilations", file=sys.stderr)
    if not work:
        print("nothing to compile for these options", file=sys.stderr)
        return 1
    if arguments.list:
        records = [compilation.record for compilation in work]
        print(static_report.table(static_report.HEADER, [static_report.row(record) for record in records]))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an interrupt: the processes that compile must end too
    records = list(static_report.progress(compile_all(work, arguments.jobs), len(work)))
    records.sort(key=lambda record: (record.arch, record.kernel, record.cases))
    print(static_report.table(static_report.HEADER, [static_report.row(record) for record in records]))
    print(f"\n{static_report.summary(records)}")
    if arguments.json is not None:
        path = Path(arguments.json) if arguments.json else static_report.RESULTS / f"{triton.__version__}.json"
        conditions = {"triton": triton.__version__, "torch": torch.__version__, "cases": len(cases)}
        static_report.write_json(path, records, conditions | {"quick": arguments.quick})
        print(f"written to {path}", file=sys.stderr)
    failed = static_report.failures(records)
    if failed:
        print(f"\n{failed}")
    return 1 if failed else 0


def main(argv: Sequence[str]) -> int:
    """Start again in the right environment if this one is not, then run."""
    arguments = parse_arguments(argv)
    environment = child_environment(os.environ, arguments.triton)
    if environment != dict(os.environ):
        os.execve(sys.executable, [sys.executable, "-m", "bench.static", *argv], environment)
    return run(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
