"""Many adapters in one batch: peftkern beside vLLM, SGLang, PEFT and PyTorch's grouped products.

    python -m bench.many [--full] [--smoke] [--quick] [--minutes 10] [--parts decode prefill train] [--tokens M ...]
    python -m bench.many --tune [--ranks R ...] [--quick] [--share I/N]   # launch parameters of the decode pair

Decode: the low-rank pair alone (shrink and expand into y, without the base product), 1 to 64 tokens, recorded in a
CUDA graph and replayed from a cold cache; the routing by itself and together with the pair; and a graph of one tiny
kernel, the least that any of these times can be. Prefill and train: the whole layer, beside the same with one adapter
and the frozen one. Everything is checked against float64 before it is timed, and the pair once more afterwards.

The result goes to bench/results/<device>/many.json, or to DIR, and to $OUT where that is set, after every batch;
peftkern is timed before others' kernels run, for these can take the device with them. bench/README.md says
where the servers' kernels come from; without them their rows say "not run".
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bench import environment, limits, measure, records
from bench.check import WrongResultError
from bench.many_cases import (
    ADAPTERS,
    DECODE_TOKENS,
    HEADLINE,
    PREFILL_TOKENS,
    SHAPES,
    Batch,
    Case,
    Pool,
    decode_cases,
    layer_cases,
    smoke_cases,
)  # fmt: skip
from bench.progress import Keep, Progress
from bench.run import interpret_kernels, save

if TYPE_CHECKING:  # they import triton, which must be told of the interpreter first
    from bench.many_layers import Layer
    from bench.many_rivals import Made

PARTS = ("decode", "prefill", "train")
Call = Callable[[], Any]


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.many", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--full", action="store_true", help="more shapes than 4096 x 4096")
    parser.add_argument("--smoke", action="store_true", help="tiny batches: does the program run? (CPU too)")
    parser.add_argument("--quick", action="store_true", help="once each: fills the compilers' caches, measures nothing")
    parser.add_argument("--minutes", type=float, default=10.0, help="stop before the next batch after so long")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--tokens", nargs="+", type=int, metavar="M", help="only batches of so many tokens")
    parser.add_argument("--tune", action="store_true", help="try launch parameters of the decode pair instead")
    parser.add_argument("--ranks", nargs="+", type=int, metavar="R", help="of --tune: of the adapters in turn (16)")
    parser.add_argument(
        "--share", default="0/1", metavar="I/N", help="of --tune --quick: every N-th candidate from I on"
    )
    parser.add_argument("--out", type=Path, help="folder of the result (default: bench/results/<device>)")
    return parser.parse_args(argv)


def cases_of(options: argparse.Namespace, dtype: torch.dtype) -> list[Case]:
    """What is measured, the decode pairs first."""
    if options.smoke:
        cases = smoke_cases(options.parts, dtype)
    else:
        shapes = SHAPES if options.full else [HEADLINE]
        cases = decode_cases(shapes, DECODE_TOKENS, dtype) if "decode" in options.parts else []
        for part in options.parts:
            if part != "decode":
                cases += layer_cases(part, shapes, PREFILL_TOKENS, ADAPTERS, dtype)
    return [case for case in cases if options.tokens is None or case.M in options.tokens]


def row_of(case: Case, passes: str, name: str, version: str | None) -> dict[str, Any]:
    """A row with nothing measured yet."""
    row: dict[str, Any] = dict.fromkeys(records.MANY_FIELDS)
    return row | {
        "problem": case.key,
        "passes": passes,
        "group": case.part,
        "implementation": name,
        "version": version,
        "status": "not run",
        "reason": "not reached",
        "M": case.M,
        "K": case.K,
        "N": case.N,
        "ids": case.ids,
        "slots": case.slots,
        "ranks": list(case.ranks),
        "dtype": str(case.dtype).removeprefix("torch."),
        "errors": {},
    }


class DeviceLostError(RuntimeError):
    """An implementation left the device in a state in which nothing more can be measured."""


@dataclass(frozen=True)
class Timed:
    """What is ready to be timed.

    Attributes:
        row: takes what is found. call: is timed. clock: "graph", "gpu" or "wall".
        check: raises WrongResultError where the call has ceased to give what it gave before it was timed.
    """

    row: dict[str, Any]
    call: Call
    clock: str
    check: Call | None = None


class ManyBench:
    """One run: measures case after case into `rows`. Once the device is lost, `lost` says to whom."""

    def __init__(self, device: torch.device, ceilings: limits.Ceilings, quick: bool, smoke: bool) -> None:
        from bench.many_rivals import servers

        self.device, self.ceilings, self.quick, self.smoke = device, ceilings, quick, smoke
        self.rows: list[dict[str, Any]] = []
        self.servers = servers()
        self.pool: tuple[tuple[Any, ...], Pool] | None = None
        self.lost = ""

    def batch(self, case: Case) -> Batch:
        """The operands of a case; adapters of one size are made once."""
        key = (case.K, case.N, case.slots, case.ranks)
        if self.pool is None or self.pool[0] != key:
            self.pool = None  # the last one's memory goes before the next one is made
            self.pool = key, Pool(case, self.device)
        return Batch(case, self.pool[1], self.device)

    def measure(self, case: Case) -> None:
        """Check and time peftkern on a case, then check everyone else, and time all that are right in turn.

        What peftkern's rows hold is there before a kernel of another project runs, and stays if that one's takes the
        device away.
        """
        done = len(self.rows)
        try:
            if case.part == "decode":
                self._decode(case)
            else:
                self._layer(case)
        except DeviceLostError as error:
            self.lost = str(error)
        for row in self.rows[done:]:
            if row["status"] == "ok" and row["us"] is None:
                row |= {"status": "not run", "reason": f"not timed: {self.lost}"}

    def _failed(self, row: dict[str, Any], what: str) -> None:
        """Put it down; DeviceLostError where the device went with it."""
        row |= {"status": "failed", "reason": what, "us": None, "share_of_limit": None, "overhead": None}
        if not measure.is_usable(self.device):
            raise DeviceLostError(
                f"{row['implementation']} ({row['problem']}, {row['passes']}) took the device: {what}"
            )

    def _attempt(self, row: dict[str, Any], make: Callable[[], Any]) -> Any:
        """What `make` returns, or None with the reason in the row. Whatever another project raises is its result."""
        try:
            made = make()
            measure.synchronize(self.device)
        except WrongResultError as error:
            row |= {"status": "wrong", "reason": str(error)}
        except Exception as error:
            traceback.print_exc(limit=-3)
            self._failed(row, measure.describe_error(error))
        else:
            return made
        return None

    def _checked(self, row: dict[str, Any], make: Callable[[], tuple[Call, dict[str, float]]]) -> Call | None:
        """A call that is ready to be timed, and right: its row says so. None with the reason where it is not."""
        made = self._attempt(row, make)
        if made is None:
            return None
        call, errors = made
        row |= {"status": "ok", "reason": "", "errors": {name: float(f"{e:.3g}") for name, e in errors.items()}}
        return call

    def _time(self, timed: list[Timed], reps: int, rounds: int) -> None:
        """Fill in the times of rows by their clocks; a row whose call fails or has become wrong says so instead."""
        for clocks, times in ((("graph", "gpu"), measure.gpu_microseconds), (("wall",), measure.wall_microseconds)):
            chosen = {str(i): t for i, t in enumerate(timed) if t.clock in clocks and t.row["status"] == "ok"}
            once, found = self.quick or self.smoke, None
            while chosen and found is None:
                calls = {index: t.call for index, t in chosen.items()}
                try:
                    found = times(calls, self.device, reps=1 if once else reps, rounds=1 if once else rounds)
                except measure.TimingError as error:
                    self._failed(chosen.pop(error.name).row, f"while it was timed: {error.what}")
            for index, micros in (found or {}).items():
                self._fill(chosen[index], micros)

    def _fill(self, timed: Timed, micros: measure.Micros) -> None:
        row = timed.row
        row |= {"clock": timed.clock, "us": micros.as_dict()}
        if row["limit_us"] is not None:
            row["share_of_limit"] = row["limit_us"] / micros.median
        try:
            if timed.check is not None:
                timed.check()
            wanted = not self.quick and (row["ids"] == "distinct" or row["slots"] == max(ADAPTERS))
            if wanted and row["launches"] is None:
                # The profiler takes longer than the timing, and other ids launch the same.
                row["launches"] = measure.launches(timed.call, self.device)
        except WrongResultError as error:
            row |= {"status": "wrong", "reason": f"after it was timed: {error}", "us": None, "share_of_limit": None}
        except Exception as error:
            self._failed(row, f"after it was timed: {measure.describe_error(error)}")

    # -- the low-rank pair of a decode step -----------------------------------------------------------------------

    def _pair_limit(self, batch: Batch) -> tuple[int, float]:
        rate = self.ceilings.flops_per_second[str(batch.case.dtype).removeprefix("torch.")]
        seconds = max(batch.pair_bytes / self.ceilings.bytes_per_second, batch.pair_flops / rate)
        return batch.pair_bytes, 1e6 * seconds

    def _decode(self, case: Case) -> None:
        from bench.many_decode import implementations

        batch, y = self.batch(case), torch.empty(case.M, case.N, dtype=case.dtype, device=self.device)
        timed: list[Timed] = []
        for name, version, make, why_not in implementations(self.servers):
            self.rows.append(row_of(case, "pair", name, version))
            made = None
            if make is None:
                self.rows[-1]["reason"] = why_not
            else:
                made = self._attempt(self.rows[-1], functools.partial(make, batch, y))
            if made is not None:
                self.rows.pop()  # for one of each kind of pass
                timed += self._ready(batch, y, made, name, version)
            if name == "peftkern":
                timed += self._tiny_kernel(case)
                self._time(timed, reps=20, rounds=5)
                alone = len(timed)
        if len(timed) > alone:
            self._time(timed, reps=20, rounds=5)

    def _ready(self, batch: Batch, y: torch.Tensor, made: Made, name: str, version: str | None) -> list[Timed]:
        """The passes of one implementation that are right."""
        on_gpu, timed = self.device.type == "cuda", []
        for passes, call in (("pair", made.pair), ("routing", made.routing), ("pair + routing", made.both)):
            if call is None:
                continue
            row = row_of(batch.case, passes, name, version)
            self.rows.append(row)
            graph, writes = on_gpu and (passes == "pair" or made.graph), passes != "routing"
            ready = self._checked(row, self._making(batch, y, call, writes, graph))
            if ready is None:
                continue
            if writes:
                row["bytes"], row["limit_us"] = self._pair_limit(batch)
            check = functools.partial(self._result, batch, y, ready) if writes else None
            timed.append(Timed(row, ready, "graph" if graph else "wall", check))
        return timed

    def _tiny_kernel(self, case: Case) -> list[Timed]:
        if self.device.type != "cuda":
            return []
        one, row = torch.zeros(1, device=self.device), row_of(case, "one tiny kernel", "torch", torch.__version__)
        self.rows.append(row)
        ready = self._checked(row, lambda: (measure.captured(lambda: one.fill_(0.0), self.device), {}))
        return [] if ready is None else [Timed(row, ready, "graph")]

    def _result(self, batch: Batch, y: torch.Tensor, call: Call) -> dict[str, float]:
        """The errors of what the call, and not another one, leaves in y."""
        y.copy_(batch.y0)
        call()
        measure.synchronize(self.device)
        return batch.check({"y": y})

    def _making(
        self, batch: Batch, y: torch.Tensor, call: Call, writes: bool, graph: bool
    ) -> Callable[[], tuple[Call, dict[str, float]]]:
        """Makes the call, recorded if it can be, and the errors of its result."""

        def make() -> tuple[Call, dict[str, float]]:
            ready = measure.captured(call, self.device) if graph else call
            if writes:
                return ready, self._result(batch, y, ready)
            ready()
            return ready, {}

        return make

    # -- a whole layer --------------------------------------------------------------------------------------------

    def _layer(self, case: Case) -> None:
        from bench.many_layers import layers

        batch = self.batch(case)
        timed: list[Timed] = []
        for _, group in itertools.groupby(layers(), lambda layer: layer.name.startswith(("frozen", "peftkern"))):
            ready = [self._layer_ready(batch, layer) for layer in group]
            if any(ready):
                timed += [one for one in ready if one is not None]
                self._time_layers(case, timed)

    def _layer_ready(self, batch: Batch, layer: Layer) -> Timed | None:
        case, on_gpu = batch.case, self.device.type == "cuda"
        passes = "forward" if case.part == "prefill" else "forward + backward"
        row = row_of(case, passes, layer.name, layer.version)
        self.rows.append(row)
        if case.part == "train" and not layer.train:
            row["reason"] = "has no training of several adapters at once"
            return None
        if layer.version is None:
            row["reason"] = "not installed"
            return None

        def make() -> tuple[Call, dict[str, float]]:
            call, results = layer.make(batch)
            with torch.set_grad_enabled(case.part == "train"):
                call()
                return call, batch.check(results()) if results else {}

        ready = self._checked(row, make)
        return None if ready is None else Timed(row, ready, "gpu" if on_gpu else "wall")

    def _time_layers(self, case: Case, timed: list[Timed]) -> None:
        with torch.set_grad_enabled(case.part == "train"):
            self._time(timed, reps=6, rounds=3)
        frozen = timed[0].row["us"]
        for one in timed:
            if one.row["us"] is not None:
                one.row["overhead"] = records.overhead(one.row["us"]["median"], frozen["median"])


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """One line an implementation, as it is measured."""
    for row in rows:
        start = f"  {row['passes']:18s} {row['implementation']:22s}"
        if row["status"] != "ok":
            print(f"{start} {row['status']}: {row['reason']}")
            continue
        us, more = row["us"], ""
        if row["share_of_limit"] is not None:
            more = f"  {row['share_of_limit']:.0%} of limit"
        if row["overhead"] is not None:
            more = f"  {row['overhead']:+.1%}"
        spread = f"{us['median']:10.2f} us  ({us['p10']:.2f}-{us['p90']:.2f}, {row['clock']})"
        launches = "" if row["launches"] is None else f"  {row['launches']} launches"
        print(f"{start} {spread}{more}{launches}", flush=True)


def run(options: argparse.Namespace, device: torch.device, keep: Keep) -> dict[str, Any]:
    """Measure, within the time allowed, and return the result; `keep` writes it after every batch."""
    on_gpu = device.type == "cuda"
    # float16: Triton's interpreter multiplies no bfloat16.
    dtype = torch.bfloat16 if on_gpu else torch.float16
    described = environment.describe(device)
    sizes = {"n": 256, "copied": 1 << 20} if options.smoke or options.quick else {}
    ceilings = limits.measure_ceilings(device, {dtype}, **sizes)
    print(f"{described['device']}: copy {ceilings.bytes_per_second / 1e9:.0f} GB/s", flush=True)
    bench = ManyBench(device, ceilings, options.quick, options.smoke)
    result = {"schema": records.SCHEMA, "kind": "many", "environment": described, "ceilings": asdict(ceilings)}
    progress = Progress(result | {"rows": bench.rows}, keep, options.minutes)
    cases = [({"group": case.part, "problem": case.key}, case) for case in cases_of(options, dtype)]
    for case in progress.each(cases):
        begun, done = time.monotonic(), len(bench.rows)
        bench.measure(case)
        print(f"{case.key}  ({time.monotonic() - begun:.1f} s)", flush=True)
        print_rows(bench.rows[done:])
        if bench.lost:
            print(bench.lost, file=sys.stderr)
            progress.stop(bench.lost)
    return progress.done()


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(sys.argv[1:] if argv is None else argv)
    has_gpu = torch.cuda.is_available()
    if not has_gpu and not options.smoke:
        print("this needs a GPU; --smoke --out DIR does not", file=sys.stderr)
        return 2
    if records.has_no_place(options):
        return 2
    if not has_gpu:
        interpret_kernels("bench.many")
    device = torch.device("cuda", torch.cuda.current_device()) if has_gpu else torch.device("cpu")
    folder = options.out or environment.results_folder(device)
    if options.tune:
        from bench.many_decode import tune

        return tune(options, device, folder)
    path = folder / "many.json"
    result = run(options, device, lambda result: save(result, path.parent, path.name))
    print(f"{len(result['rows'])} rows, {len(result['missing'])} batches missing, {result['seconds']} s: {path}")
    faults = [
        row
        for row in result["rows"]
        if row["implementation"].startswith("peftkern") and row["status"] in ("wrong", "failed")
    ]
    for row in faults:
        print(f"{row['status']}: {row['implementation']} in {row['problem']}: {row['reason']}", file=sys.stderr)
    return 1 if faults or any("took the device" in left["reason"] for left in result["missing"]) else 0


if __name__ == "__main__":
    sys.exit(main())
