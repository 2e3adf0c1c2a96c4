"""IA3: forward and backward of `ia3_linear` beside the frozen layer, PEFT's arithmetic eager and compiled, and PEFT.

    python -m bench.ia3 [--smoke] [--minutes 8] [--out DIR] [--no-compiled]
        [--problems NAME ...] [--seconds 0.2] [--quick]

The layers that IA3 adapts in an 8B Llama: k and v (4096 -> 1024, output scaled) and down (14336 -> 4096, input scaled),
bfloat16 with an fp32 vector, at 512, 2048 and 8192 tokens. Each implementation is checked against float64 first and
then timed in turn with the others; `time / frozen` is what the table shows. Results go to
bench/results/<device>/ia3.json (or DIR), and to $OUT where that is set, after every problem. Exits with 1 where
peftkern was wrong. `--smoke` runs tiny sizes, on a CPU too, in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from bench import check, environment
from bench.problems import Row, parser, run_problems, time_in_turn, try_implementation
from peftkern import reference
from peftkern.ops import ia3_linear
from peftkern.ops.ia3_linear import _IA3Linear, plan_for

Function = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
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
        return _IA3Linear.apply(x, weight, scale, None, None, rest, None)

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


def measure_case(
    case: Case, device: torch.device, *, quick: bool, compiled: bool, seconds: float
) -> list[dict[str, Any]]:
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
        run = partial(work.step, function, learns)
        if try_implementation(row, partial(work.check, function) if learns else dict, device, run):
            functions[name] = run
    rows["peftkern"]["path"] = plan_for(work.x, work.weight, case.feedforward, "auto").path
    del work.truth
    how: dict[str, Any] = {"once": 0 if quick else 3, "rounds": 5, "reps": (6, 60), "seconds": seconds}
    medians = time_in_turn(rows, functions, "frozen", device, **how)
    for name, median in medians.items():
        rows[name]["ratio"] = round(median / medians["frozen"], 4)
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
    made = parser("bench.ia3", __doc__)
    made.add_argument("--no-compiled", action="store_true", help="leave torch.compile out")
    return made.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(sys.argv[1:] if argv is None else argv)

    def prepare(device: torch.device) -> Callable[[Case], list[Row]]:
        compiled = device.type == "cuda" and not options.no_compiled
        quick = options.smoke or options.quick
        return lambda case: measure_case(case, device, quick=quick, compiled=compiled, seconds=options.seconds)

    return run_problems("ia3", options, cases(options.smoke), prepare, print_rows)


if __name__ == "__main__":
    sys.exit(main())
