"""IA3: forward and backward of `ia3_linear` beside the frozen layer, PEFT's arithmetic eager and compiled, and PEFT.

    python -m bench.ia3 [--smoke] [--minutes 8] [--out DIR] [--no-compiled]

The layers that IA3 adapts in an 8B Llama: k and v (4096 -> 1024, output scaled) and down (14336 -> 4096, input scaled),
bfloat16 with an fp32 vector, at 512, 2048 and 8192 tokens. Each implementation is checked against float64 first and
then timed in turn with the others; `time / frozen` is what the table shows. Results go to
bench/results/<device>/ia3.json (or DIR), and to $OUT where that is set, after every problem. Exits with 1 where
peftkern was wrong. `--smoke` runs tiny sizes, on a CPU too, in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from bench import check, environment, measure, records
from bench.progress import Progress
from bench.run import interpret_kernels, save
from peftkern import reference, use_backend
from peftkern.ops import ia3_linear
from peftkern.ops.ia3_linear import _IA3Linear, plan_for

Function = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
TARGET_SECONDS = 0.2  # of GPU time for each function that is timed, about
# Time over the frozen layer's that is aimed for, on an H200.
TARGETS = {"k, v": 1.08, "down": 1.06}


@dataclass(frozen=True, slots=True)
class Case:
    """A layer [N, K] at M tokens; `feedforward` if its input is scaled."""

    name: str
    M: int
    K: int
    N: int
    feedforward: bool

    @property
    def key(self) -> str:
        """As in the results."""
        return f"{self.name} M{self.M} K{self.K} N{self.N}"


def cases(smoke: bool) -> list[Case]:
    """The grid, or a tiny one."""
    if smoke:
        return [Case("k, v", 40, 64, 32, False), Case("down", 40, 96, 64, True)]
    layers = (("k, v", 4096, 1024, False), ("down", 14336, 4096, True))
    return [Case(name, M, K, N, feedforward) for name, K, N, feedforward in layers for M in (8192, 2048, 512)]


def as_peft(feedforward: bool) -> Function:
    """The operations that PEFT 0.21.2's layer runs, by hand: the promotion to the vector's fp32 and back among them."""

    def function(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        if feedforward:
            return linear((x.to(scale.dtype) * scale).to(x.dtype), weight)
        y = linear(x, weight)
        return (y * scale).to(y.dtype)

    return function


def forced(feedforward: bool, path: str) -> Function:
    """`ia3_linear` on one path, whatever the plan would choose."""

    def function(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        rest = (weight, feedforward, path, feedforward, not feedforward)
        return _IA3Linear.apply(x, weight, scale, None, None, rest)

    return function


def real_peft(case: Case) -> Function | None:
    """PEFT's own layer, or None where it is not installed."""
    if environment.version_of("peft") is None:
        return None
    import peft

    targets = ["linear"]
    config = peft.IA3Config(target_modules=targets, feedforward_modules=targets if case.feedforward else [])
    held: dict[int, Any] = {}

    def function(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        layer = held.get(id(weight))
        if layer is None:
            made = nn.Linear(case.K, case.N, bias=False, device="meta")
            made.weight = nn.Parameter(weight, requires_grad=False)
            layer = peft.inject_adapter_in_model(config, nn.ModuleDict({"linear": made}))["linear"]
            layer.ia3_l["default"] = nn.Parameter(scale.detach().reshape(layer.ia3_l["default"].shape))
            held[id(weight)] = layer
        # The vector itself takes the parameter's place, so that gradients of `scale` can be asked for.
        layer.ia3_l._parameters["default"] = scale.view(layer.ia3_l["default"].shape)
        return layer(x)

    return function


def implementations(case: Case, on_gpu: bool, compiled: bool) -> dict[str, Function]:
    """What is measured, by name; "frozen" is the layer without IA3."""

    def frozen(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return linear(x, weight)

    def ours(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return ia3_linear(x, weight, scale, is_feedforward=case.feedforward)

    found: dict[str, Function] = {"frozen": frozen, "peftkern": ours}
    if on_gpu or environment.version_of("triton"):
        found |= {f"peftkern: {path}": forced(case.feedforward, path) for path in ("cublas", "triton")}
    found["eager, as PEFT"] = as_peft(case.feedforward)
    theirs = real_peft(case)
    if theirs is not None:
        found["peft"] = theirs
    if compiled:
        torch._dynamo.reset()
        found["compiled, as PEFT"] = torch.compile(as_peft(case.feedforward), dynamic=False)
        found["peftkern compiled"] = torch.compile(ours, dynamic=False)
    return found


class Work:
    """The operands of a case, of unit scale, and the truth in float64."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        # In Triton's interpreter products of bfloat16 are wrong, see CONTRIBUTING.md.
        self.dtype = dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, deviation: float = 1.0) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=device).mul_(deviation).to(dtype)

        self.x = normal(case.M, case.K).requires_grad_()
        self.weight = normal(case.N, case.K, deviation=case.K**-0.5)
        self.scale = (1 + 0.1 * normal(case.K if case.feedforward else case.N)).float()
        self.scale[::7] = 0.0
        self.scale.requires_grad_()
        self.dy = normal(case.M, case.N)
        x, scale = (t.detach().double().requires_grad_() for t in (self.x, self.scale))
        y = reference.ia3_linear(x, self.weight.double(), scale, is_feedforward=case.feedforward)
        self.truth = {"y": y.detach()}
        self.truth["dx"], self.truth["dl"] = torch.autograd.grad(y, (x, scale), self.dy.double())

    def step(self, function: Function, learns: bool = True) -> tuple[torch.Tensor, ...]:
        """y, dx and, if there is one, dl."""
        y = function(self.x, self.weight, self.scale)
        return (y, *torch.autograd.grad(y, (self.x, self.scale) if learns else (self.x,), self.dy))

    def check(self, function: Function) -> dict[str, float]:
        """Relative errors; raises `WrongResultError` outside the bound of a few roundings."""
        errors = {}
        for (name, truth), got in zip(self.truth.items(), self.step(function), strict=True):
            errors[name] = check.relative_error(got.detach(), truth)
            bound = check.tolerance(self.dtype, self.case.K + self.case.M)
            if not errors[name] <= bound:
                raise check.WrongResultError(f"{name}: error {errors[name]:.3g}, more than {bound:.3g}")
        return errors


def measure_case(case: Case, device: torch.device, *, quick: bool, compiled: bool) -> list[dict[str, Any]]:
    """Check and time every implementation of a case; one row each."""
    work = Work(case, device)
    on_gpu = device.type == "cuda"
    rows: dict[str, dict[str, Any]] = {}
    functions: dict[str, Callable[[], Any]] = {}
    for name, function in implementations(case, on_gpu, compiled).items():
        row = rows[name] = {
            "problem": case.key,
            "implementation": name,
            "status": "ok",
            "reason": "",
            "errors": {},
            "path": None,
            "gpu_us": None,
            "wall_us": None,
            "ratio": None,
        }
        learns = name != "frozen"
        try:
            if learns:
                row["errors"] = {k: float(f"{e:.3g}") for k, e in work.check(function).items()}
            functions[name] = lambda f=function, a=learns: work.step(f, a)
            functions[name]()
            measure.synchronize(device)
        except check.WrongResultError as error:
            row |= {"status": "wrong", "reason": str(error)}
            functions.pop(name, None)
        except Exception as error:  # whatever another project's code raises is its result, with its reason
            traceback.print_exc(limit=-3)
            row |= {"status": "failed", "reason": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
            functions.pop(name, None)
    rows["peftkern"]["path"] = plan_for(work.x, work.weight, case.feedforward, "auto").path
    del work.truth
    once = measure.wall_microseconds({"frozen": functions["frozen"]}, device, reps=3, rounds=1)["frozen"].median
    rounds = 1 if quick else 5
    reps = 1 if quick else int(min(60, max(6, TARGET_SECONDS * 1e6 / once / rounds)))
    gpu = measure.gpu_microseconds(functions, device, reps=reps, rounds=rounds) if on_gpu else {}
    wall = measure.wall_microseconds(functions, device, reps=reps, rounds=rounds)
    times = gpu or wall
    for name in functions:
        row = rows[name]
        row["gpu_us"] = gpu[name].as_dict() if on_gpu else None
        row["wall_us"] = wall[name].as_dict()
        row["ratio"] = round(times[name].median / times["frozen"].median, 4)
    return list(rows.values())


def print_rows(case: Case, rows: list[dict[str, Any]]) -> None:
    """The ratio table of a case."""
    print(f"{case.key} (forward + backward; aimed for: {TARGETS[case.name]:.2f} of the frozen layer's time)")
    for row in rows:
        if row["status"] != "ok":
            print(f"  {row['implementation']:22s} {row['status']}: {row['reason']}")
            continue
        time_us = (row["gpu_us"] or row["wall_us"])["median"]
        path = f"  path {row['path']}" if row["path"] else ""
        print(
            f"  {row['implementation']:22s} {time_us:10.1f} us  {row['ratio']:6.3f}  "
            f"wall {row['wall_us']['median']:10.1f} us{path}",
            flush=True,
        )


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.ia3", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny problems: does the program run? (CPU too)")
    parser.add_argument("--minutes", type=float, default=8.0, help="stop before the next problem after so long")
    parser.add_argument("--out", type=Path, help="folder of the result (default: bench/results/<device>)")
    parser.add_argument("--no-compiled", action="store_true", help="leave torch.compile out")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(sys.argv[1:] if argv is None else argv)
    has_gpu = torch.cuda.is_available()
    if not has_gpu and not options.smoke:
        print("no GPU here: --smoke runs tiny problems on the CPU", file=sys.stderr)
        return 2
    if options.smoke and options.out is None:
        print("--smoke: nothing worth keeping is measured, so --out says where the result goes", file=sys.stderr)
        return 2
    if not has_gpu:
        interpret_kernels("bench.ia3")
    device = torch.device("cuda", torch.cuda.current_device()) if has_gpu else torch.device("cpu")
    rows: list[dict[str, Any]] = []
    path = (options.out or environment.results_folder(device)) / "ia3.json"
    result = {"schema": records.SCHEMA, "kind": "ia3", "environment": environment.describe(device), "rows": rows}
    progress = Progress(result, lambda result: save(result, path.parent, path.name), options.minutes)
    compiled = has_gpu and not options.no_compiled
    with use_backend("auto"):
        for case in progress.each([({"problem": case.key}, case) for case in cases(options.smoke)]):
            found = measure_case(case, device, quick=options.smoke, compiled=compiled)
            print_rows(case, found)
            rows += found
    result = progress.done()
    print(f"{len(rows)} rows, {len(result['missing'])} problems missing, {result['seconds']} s: {path}")
    faults = [r for r in rows if r["implementation"].startswith("peftkern") and r["status"] != "ok"]
    for row in faults:
        print(f"{row['status']}: {row['implementation']} in {row['problem']}: {row['reason']}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
