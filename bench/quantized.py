"""4-bit weights: the dequantization, and the linear layer over them, peftkern beside bitsandbytes and PEFT on it.

    python -m bench.quantized [--full] [--smoke] [--minutes 10] [--tokens M ...] [--out DIR]

Dequantization (NF4, double-quantized, to bfloat16) is timed beside a copy that moves the same bytes. The linear layer,
K = N = 4096 (`--full`: gate and up of an 8B Llama too), rank 16, at 1 to 8192 tokens: peftkern as planned and held to
each of its paths, so that the plan's crossover can be read; all of it over the dense frozen layer's time. Everything is
checked before it is timed: the dequantization to the bit, the layers against float64 on the dequantized weight. What a
peftkern layer holds at its peak beyond the same layer over a dense weight is recorded, and must be one dense weight at
most, and on a fused path no more than the partial sums that its launches name: more is a fault, as a wrong result is.

The result goes to bench/results/<device>/quantized.json, or to DIR. On a CPU the sizes are small, and a machine that is
busy is not measured unless DIR says where to.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench import environment, limits, measure, records
from bench.adapters import Rival
from bench.cases import PASSES, Problem
from bench.check import relative_error, tolerance
from bench.progress import Keep, Progress
from bench.run import TARGET_SECONDS, Bench, interpret_kernels, print_rows, save
from bench.workload import LinearWorkload
from peftkern import reference
from peftkern.backend import current_backend, device_info
from peftkern.ops import dequantize_4bit, quantize_4bit
from peftkern.weights import Weight4bit

TOKENS = (1, 16, 128, 512, 2048, 8192)
SHAPES = (("q,o", 4096, 4096), ("gate,up", 4096, 14336))  # name, K, N
DEQUANTIZED = ((4096, 4096), (14336, 4096))  # N, K
RANK = 16
GROUP = "4-bit"
FUSED = ("fused_4bit", "decode_4bit")
# Layers without an adapter, whose limit has none either.
WITHOUT_ADAPTER = ("frozen", "peftkern frozen", "bitsandbytes", "bitsandbytes dequantize + matmul")
ALLOCATOR = 1 << 20  # bytes by which two peaks differ because sizes are rounded up


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.quantized", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--full", action="store_true", help="gate and up of an 8B Llama too")
    parser.add_argument("--smoke", action="store_true", help="tiny problems: does the program run? (CPU too)")
    parser.add_argument("--minutes", type=float, default=10.0, help="stop before the next problem after so long")
    parser.add_argument("--tokens", nargs="+", type=int, metavar="M", help=f"default: {' '.join(map(str, TOKENS))}")
    parser.add_argument("--seconds", type=float, default=TARGET_SECONDS, help="GPU time for each function, about")
    parser.add_argument("--no-launches", action="store_true", help="count no launches: the profiler takes most time")
    parser.add_argument("--quick", action="store_true", help="once each: fills the compilers' caches, measures nothing")
    parser.add_argument("--out", type=Path, help="folder of the result (default: bench/results/<device>)")
    return parser.parse_args(argv)


def problems(options: argparse.Namespace, on_gpu: bool) -> list[Problem]:
    """What is measured: on a CPU little of it, with --smoke next to nothing."""
    if options.smoke:
        # float16: Triton's interpreter multiplies no bfloat16.
        dtype = torch.bfloat16 if on_gpu else torch.float16
        return [Problem(f"tiny M{M}", M, 128, 96, 4, 0.0, dtype) for M in options.tokens or (3, 40)]
    shapes: Sequence[tuple[str, int, int]] = SHAPES if options.full else SHAPES[:1]
    tokens: Sequence[int] = TOKENS
    if not on_gpu:
        shapes, tokens = (("small", 1024, 1024),), TOKENS[:4]
    return [
        Problem(f"{name} M{M}", M, K, N, RANK, 0.0, torch.bfloat16)
        for name, K, N in shapes
        for M in options.tokens or tokens
    ]


class QuantizedWorkload(LinearWorkload):
    """A problem whose weight is what its 4-bit form dequantizes to, so that dense and 4-bit layers compute the same."""

    def __init__(self, problem: Problem, device: torch.device) -> None:
        super().__init__(problem, device)
        self.weight = quantize_4bit(self.linear.weight)
        # By the formula, not by the kernels that are measured.
        self.linear.weight.copy_(reference.dequantize_4bit(self.weight, problem.dtype))


class QuantizedBench(Bench):
    """A run over 4-bit weights: rows hold what the weight takes, and what a layer holds beyond it."""

    weight: Weight4bit

    def measure_quantized(self, problem: Problem) -> None:
        """All implementations in turn on one problem."""
        from bench.quantized_rivals import other_rivals, peftkern_rivals

        work = QuantizedWorkload(problem, self.device)
        self.weight = work.weight
        done, dtype = len(self.rows), problem.dtype
        rivals = [*peftkern_rivals(work.weight, dtype), *other_rivals(work.weight, dtype)]
        self.measure(problem, GROUP, rivals, work)
        dense_bytes = problem.N * problem.K * dtype.itemsize
        for row in self.rows[done:]:
            row |= {"weight_bytes": work.weight.nbytes, "saved_weight_bytes": dense_bytes - work.weight.nbytes}
            row |= {"extra_bytes": None, "allowed_bytes": None}
        for passes in PASSES:
            self._compare_peaks([row for row in self.rows[done:] if row["passes"] == passes], problem)

    def _compare_peaks(self, rows: list[dict[str, Any]], problem: Problem) -> None:
        dense = next(row for row in rows if row["implementation"] == "peftkern dense")["peak_bytes"]
        for row in rows:
            if row["peak_bytes"] is None or dense is None:
                continue
            row["extra_bytes"] = row["peak_bytes"] - dense
            if row["path"] is not None and row["implementation"] not in ("peftkern dense", "peftkern fp32 adapters"):
                row["allowed_bytes"] = allowed_bytes(problem, row["path"], device_info(self.device).arch)

    def path(self, problem: Problem, rival: Rival, work: Any) -> str | None:
        """The path of a layer over the 4-bit weight; None for others."""
        if rival.name in ("peftkern", "peftkern fp32 adapters"):
            from peftkern.ops.lora_linear_quantized import plan_for

            return plan_for(work.x, work.weight, problem.R, current_backend()).path
        return rival.path or None

    def limit(self, problem: Problem, passes: str, name: str) -> float | None:
        """As for a dense weight, but that 4 bits are read; the dense layers' rows keep their own."""
        size = None if name in ("frozen", "peftkern dense") else self.weight.nbytes
        return limits.limit_microseconds(problem, passes, self.ceilings, name not in WITHOUT_ADAPTER, size)


def allowed_bytes(problem: Problem, path: str, arch: int) -> int:
    """What a layer on `path` may hold beyond one over a dense weight: one dense weight, or partial sums if fused."""
    if path not in FUSED:
        return problem.N * problem.K * problem.dtype.itemsize + ALLOCATOR
    from bench.static_cases_4bit import LoraLinear4bit

    case = LoraLinear4bit(problem.M, problem.K, problem.N, problem.R, dtype=problem.dtype, path=path)
    launches = case.launches(arch)
    tensors = {id(t): t for call in launches for t in call.args.values() if isinstance(t, torch.Tensor)}
    return ALLOCATOR + sum(t.nbytes for t in tensors.values() if t.dim() == 3)


def memory_faults(rows: list[dict[str, Any]]) -> list[str]:
    """Rows whose layer held more than it may, in words."""
    return [
        f"{row['implementation']} in {row['problem']}, {row['passes']}: {row['extra_bytes']} bytes beyond the layer "
        f"over a dense weight, at most {row['allowed_bytes']} are right on {row['path']}"
        for row in rows
        if row["extra_bytes"] is not None and row["allowed_bytes"] is not None
        if row["extra_bytes"] > row["allowed_bytes"]
    ]


# -- dequantization -----------------------------------------------------------------------------------------------


def measure_dequantization(N: int, K: int, dtype: torch.dtype, device: torch.device, quick: bool) -> dict[str, Any]:
    """One shape: peftkern, bitsandbytes, and a copy that reads and writes as many bytes as they together."""
    from bench.quantized_rivals import bitsandbytes, bitsandbytes_parameter

    generator = torch.Generator(device).manual_seed(0)
    weight = quantize_4bit(torch.randn(N, K, generator=generator, device=device).mul_(K**-0.5).to(dtype))
    truth = reference.dequantize_4bit(weight, dtype)
    moved = weight.nbytes + truth.nbytes
    source = torch.randint(-128, 127, (moved // 2,), dtype=torch.int8, device=device)
    target, out = torch.empty_like(source), torch.empty_like(truth)
    calls: dict[str, Any] = {"copy": lambda: target.copy_(source), "peftkern": lambda: dequantize_4bit(weight, out=out)}
    status: dict[str, tuple[str, str]] = {"copy": ("ok", ""), "peftkern": ("ok", "")}
    calls["peftkern"]()
    if not torch.equal(out, truth):
        status["peftkern"] = ("wrong", f"{int((out != truth).sum())} of {N * K} elements differ from the formula")
    module, why_not = bitsandbytes()
    if why_not:
        status["bitsandbytes"] = ("not run", why_not)
    else:
        parameter: Any = bitsandbytes_parameter(weight)
        arguments = (parameter.data, parameter.quant_state)
        # Its CPU backend writes into nothing that the caller owns.
        into = {"out": torch.empty_like(truth)} if device.type == "cuda" else {}
        calls["bitsandbytes"] = lambda: module.functional.dequantize_4bit(*arguments, **into)
        error = relative_error(calls["bitsandbytes"](), truth.double())
        right = error <= tolerance(dtype, 1)
        status["bitsandbytes"] = ("ok", "") if right else ("wrong", f"relative error {error:.2e}")
    calls = {name: call for name, call in calls.items() if status[name][0] == "ok"}
    reps, rounds = (1, 1) if quick else (20, 5)
    on_gpu = device.type == "cuda"
    times = (measure.gpu_microseconds if on_gpu else measure.wall_microseconds)(calls, device, reps=reps, rounds=rounds)
    rows = {}
    for name, (state, reason) in status.items():
        row: dict[str, Any] = {"status": state, "reason": reason, "us": None, "GB_per_s": None, "share_of_copy": None}
        if name in times:
            median = times[name].median
            row |= {"us": times[name].as_dict(), "GB_per_s": moved / median / 1e3}
            row |= {"share_of_copy": times["copy"].median / median, "launches": measure.launches(calls[name], device)}
        rows[name] = row
    size = {"N": N, "K": K, "dtype": str(dtype).removeprefix("torch."), "nested": weight.nested}
    return {**size, "clock": "gpu" if on_gpu else "wall", "bytes": moved, "implementations": rows}


def print_dequantization(found: dict[str, Any]) -> None:
    """One line an implementation."""
    print(f"dequantization of {found['N']} x {found['K']} to {found['dtype']}", flush=True)
    for name, row in found["implementations"].items():
        if row["status"] != "ok":
            print(f"  {name:24s} {row['status']}: {row['reason']}")
            continue
        shares = f"{row['GB_per_s']:8.1f} GB/s  {row['share_of_copy']:.0%} of a copy"
        print(f"  {name:24s} {row['us']['median']:10.1f} us  {shares}")


def run(options: argparse.Namespace, device: torch.device, keep: Keep) -> dict[str, Any]:
    """Measure, within the time allowed, and return the result; `keep` writes it after every problem."""
    on_gpu = device.type == "cuda"
    quick = options.smoke or options.quick
    chosen = problems(options, on_gpu)
    described = environment.describe(device)
    sizes = {"n": 256, "copied": 1 << 20} if options.smoke else {} if on_gpu else {"n": 1024, "copied": 1 << 26}
    ceilings = limits.measure_ceilings(device, {p.dtype for p in chosen}, **sizes)
    shapes = [(96, 128)] if options.smoke else DEQUANTIZED if on_gpu else [(1024, 1024)]
    bench = QuantizedBench(device, ceilings, quick=quick, seconds=options.seconds, launches=not options.no_launches)
    result = {"schema": records.SCHEMA, "kind": "quantized", "environment": described, "ceilings": asdict(ceilings)}
    dequantized: list[dict[str, Any]] = []
    result |= {"dequantization": dequantized, "rows": bench.rows}
    progress = Progress(result, keep, options.minutes)
    for N, K in shapes:
        dequantized.append(measure_dequantization(N, K, chosen[0].dtype, device, quick))
        print_dequantization(dequantized[-1])
    for problem in progress.each([({"group": GROUP, "problem": problem.key}, problem) for problem in chosen]):
        done = len(bench.rows)
        print(problem.key, flush=True)
        bench.measure_quantized(problem)
        print_rows(bench.rows[done:])
    return progress.done()


def faults_of(result: dict[str, Any]) -> list[str]:
    """What makes the program fail: peftkern wrong, raising, or holding more than it may."""
    found = [
        f"{row['status']}: {row['implementation']} in {row['problem']}, {row['passes']}: {row['reason']}"
        for row in result["rows"]
        if row["implementation"].startswith("peftkern") and row["status"] in ("wrong", "failed")
    ]
    for shape in result["dequantization"]:
        row = shape["implementations"]["peftkern"]
        if row["status"] != "ok":
            found.append(f"{row['status']}: dequantization of {shape['N']} x {shape['K']}: {row['reason']}")
    return found + memory_faults(result["rows"])


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(sys.argv[1:] if argv is None else argv)
    has_gpu = torch.cuda.is_available()
    if records.has_no_place(options):
        return 2
    if options.out is None and not has_gpu and not environment.is_quiet():
        load = os.getloadavg()[0]
        print(f"this CPU is busy (load {load:.1f}): --out DIR says where a result goes all the same", file=sys.stderr)
        return 2
    if options.smoke and not has_gpu:
        interpret_kernels("bench.quantized")
    device = torch.device("cuda", torch.cuda.current_device()) if has_gpu else torch.device("cpu")
    path = (options.out or environment.results_folder(device)) / "quantized.json"
    result = run(options, device, lambda result: save(result, path.parent, path.name))
    print(f"{len(result['rows'])} rows, {len(result['missing'])} problems missing, {result['seconds']} s: {path}")
    faults = faults_of(result)
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
