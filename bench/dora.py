"""DoRA: forward and backward of `dora_linear` beside the frozen layer, `lora_linear`, and PEFT's arithmetic and layer.

    python -m bench.dora [--smoke] [--minutes 8] [--out DIR] [--no-compiled]
        [--problems NAME ...] [--seconds 0.2] [--quick]

The q (4096 -> 4096) and down (14336 -> 4096) projections of an 8B Llama, rank 16, bfloat16 with fp32 adapters and
magnitudes, at 512, 2048 and 8192 tokens, and q with dropout. Each implementation is checked against float64 first and
then timed in turn with the others; `time / frozen` is what the table shows. Results go to
bench/results/<device>/dora.json (or DIR), and to $OUT where that is set, after every problem. Exits with 1 where
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
from torch.nn.functional import dropout, linear

from bench import check, environment
from bench.problems import Row, parser, run_problems, time_in_turn, try_implementation
from peftkern import reference
from peftkern.ops import dora_linear, lora_linear
from peftkern.ops._lora_linear_torch import keep_mask
from peftkern.ops.dora_linear import _DoraLinear, plan_for

Function = Callable[..., torch.Tensor]  # of x, weight, lora_A, lora_B, magnitude
SCALING = 2.0
DROPOUT = 0.1


@dataclass(frozen=True, slots=True)
class Case:
    """A layer [N, K] with an adapter of rank R at M tokens, with dropout or without."""

    name: str
    M: int
    K: int
    N: int
    R: int = 16
    dropout: bool = False

    @property
    def p(self) -> float:
        """The chance of dropping."""
        return DROPOUT if self.dropout else 0.0

    @property
    def key(self) -> str:
        """As in the results."""
        return f"{self.name} M{self.M} K{self.K} N{self.N} r{self.R}{' dropout' if self.dropout else ''}"


def cases(smoke: bool) -> list[Case]:
    """The grid, or a tiny one."""
    if smoke:
        return [Case("q", 40, 64, 32, 4), Case("q", 40, 64, 32, 4, True)]
    layers = (("q", 4096, 4096, False), ("down", 14336, 4096, False), ("q", 4096, 4096, True))
    return [Case(name, M, K, N, dropout=drops) for M in (8192, 2048, 512) for name, K, N, drops in layers]


def as_peft(case: Case) -> Function:
    """The operations that PEFT 0.21.2's layer runs, by hand: an identity matrix through the adapter for its B A, V of
    [N, K] for the norm, and x widened to the adapter's fp32."""

    def function(
        x: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, magnitude: torch.Tensor
    ) -> torch.Tensor:
        base = linear(x, weight)
        wide = x.to(a.dtype)
        dropped = dropout(wide, case.p) if case.p else wide
        eye = torch.eye(a.shape[1], device=a.device, dtype=wide.dtype)
        delta = linear(linear(eye, a), b).T.detach()
        norm = torch.linalg.norm(weight.to(wide.dtype) + SCALING * delta, dim=1).detach()
        c = (magnitude / norm).view(1, -1)
        again = linear(dropped, weight.to(dropped.dtype)) if case.p else base
        added = (c - 1) * again + c * linear(linear(dropped, a), b) * SCALING
        return (base + added).to(x.dtype)

    return function


def forced(case: Case, path: str) -> Function:
    """`dora_linear` on one path, whatever the plan would choose."""

    def function(x: torch.Tensor, weight: torch.Tensor, *adapter: torch.Tensor) -> torch.Tensor:
        seed = torch.zeros(1, dtype=torch.int64, device=x.device) if case.p else None
        return _DoraLinear.apply(x, weight, *adapter, None, seed, None, (weight, SCALING, case.p, path, True))

    return function


def real_peft(case: Case) -> Function | None:
    """PEFT's own layer, or None where it is not installed."""
    if environment.version_of("peft") is None:
        return None
    import peft

    alpha = SCALING * case.R
    config = peft.LoraConfig(r=case.R, lora_alpha=alpha, lora_dropout=case.p, use_dora=True, target_modules=["linear"])
    held: dict[int, Any] = {}

    def function(x: torch.Tensor, weight: torch.Tensor, *adapter: torch.Tensor) -> torch.Tensor:
        layer = held.get(id(weight))
        if layer is None:
            made = nn.Linear(case.K, case.N, bias=False, device=weight.device, dtype=weight.dtype)
            made.weight = nn.Parameter(weight, requires_grad=False)
            layer = peft.inject_adapter_in_model(config, nn.ModuleDict({"linear": made}))["linear"]
            held[id(weight)] = layer
        parts = (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)
        for part, t in zip(parts, adapter, strict=True):
            # The tensors themselves take the parameters' places, so that their gradients can be asked for.
            part["default"]._parameters["weight"] = t
        return layer(x)

    return function


def implementations(case: Case, on_gpu: bool, compiled: bool) -> dict[str, Function]:
    """What is measured, by name; "frozen" is the layer without an adapter, "lora" `lora_linear` of the same rank."""

    def frozen(x: torch.Tensor, weight: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return linear(x, weight)

    def lora(x: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, _: Any) -> torch.Tensor:
        return lora_linear(x, weight, a, b, SCALING, dropout_p=case.p)

    def ours(x: torch.Tensor, weight: torch.Tensor, *adapter: torch.Tensor) -> torch.Tensor:
        seed = torch.zeros(1, dtype=torch.int64, device=x.device) if case.p else None
        return dora_linear(x, weight, *adapter, SCALING, dropout_p=case.p, seed=seed)

    found: dict[str, Function] = {"frozen": frozen, "lora": lora, "peftkern": ours}
    if on_gpu or environment.version_of("triton"):
        found |= {f"peftkern: {path}": forced(case, path) for path in ("cublas", "triton")}
    found["eager, as PEFT"] = as_peft(case)
    theirs = real_peft(case)
    if theirs is not None:
        found["peft"] = theirs
    if compiled:
        torch._dynamo.reset()
        found["compiled, as PEFT"] = torch.compile(as_peft(case), dynamic=False)
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
            return torch.randn(*shape, generator=generator, device=device).mul_(deviation)

        self.x = normal(case.M, case.K).to(dtype).requires_grad_()
        self.weight = normal(case.N, case.K, deviation=case.K**-0.5).to(dtype)
        a, b = normal(case.R, case.K, deviation=case.K**-0.5), normal(case.N, case.R, deviation=0.1)
        magnitude = 1 + 0.1 * normal(case.N)
        self.adapter = tuple(t.requires_grad_() for t in (a, b, magnitude))
        self.dy = normal(case.M, case.N).to(dtype)
        self.keeps: dict[str, Any] = {"": None}
        if case.p:
            seed = torch.zeros(1, dtype=torch.int64, device=device)
            sizes = (case.M, case.K, case.p)
            self.keeps = {"kernels": reference.dropout_mask(seed, *sizes), "plain": keep_mask(seed, *sizes)}

    def truth(self, drawn: str) -> dict[str, torch.Tensor]:
        """y and its gradients in float64, of the mask that kernels or the plain path draw."""
        x, *adapter = (t.detach().double().requires_grad_() for t in (self.x, *self.adapter))
        keep = self.keeps[drawn]
        y = reference.dora_linear(x, self.weight.double(), *adapter, SCALING, None, keep, self.case.p)
        grads = torch.autograd.grad(y, (x, *adapter), self.dy.double())
        return {"y": y.detach(), **dict(zip(("dx", "da", "db", "dm"), grads, strict=True))}

    def step(self, function: Function, name: str = "peftkern") -> tuple[torch.Tensor, ...]:
        """y and the gradients of what `name` has: the frozen layer x alone, LoRA no magnitude."""
        count = {"frozen": 1, "lora": 3}.get(name, 4)
        y = function(self.x, self.weight, *self.adapter)
        return (y, *torch.autograd.grad(y, (self.x, *self.adapter)[:count], self.dy))

    def check(self, function: Function, drawn: str) -> dict[str, float]:
        """Relative errors; raises `WrongResultError` outside the bound of a few roundings."""
        errors = {}
        for (name, truth), got in zip(self.truth(drawn).items(), self.step(function), strict=True):
            errors[name] = check.relative_error(got.detach(), truth)
            bound = check.tolerance(self.dtype, self.case.K + self.case.M)
            if not errors[name] <= bound:
                raise check.WrongResultError(f"{name}: error {errors[name]:.3g}, more than {bound:.3g}")
        return errors


def mask_of(name: str, case: Case, path: str) -> str | None:
    """Whose mask an implementation draws: "" for none, None for one that cannot be told, as torch's own."""
    if name in ("frozen", "lora"):
        return None
    if not case.p:
        return ""
    if not name.startswith("peftkern"):
        return None
    return "plain" if name in ("peftkern", "peftkern compiled") and path == "torch" else "kernels"


def measure_case(
    case: Case, device: torch.device, *, quick: bool, compiled: bool, seconds: float
) -> list[dict[str, Any]]:
    """Check and time every implementation of a case; one row each."""
    work = Work(case, device)
    on_gpu = device.type == "cuda"
    path = plan_for(work.x, work.weight, case.R, "auto").path
    rows: dict[str, dict[str, Any]] = {}
    functions: dict[str, Callable[[], Any]] = {}
    for name, function in implementations(case, on_gpu, compiled).items():
        row = rows[name] = {
            "problem": case.key,
            "implementation": name,
            "status": "ok",
            "reason": "",
            "errors": {},
            "path": path if name == "peftkern" else None,
            "gpu_us": None,
            "wall_us": None,
            "ratio": None,
        }
        drawn = mask_of(name, case, path)
        run = partial(work.step, function, name)
        errors = dict if drawn is None else partial(work.check, function, drawn)
        if try_implementation(row, errors, device, run):
            functions[name] = run
    work.keeps.clear()
    how: dict[str, Any] = {"once": 0 if quick else 3, "rounds": 5, "reps": (6, 60), "seconds": seconds}
    medians = time_in_turn(rows, functions, "frozen", device, **how)
    for name, median in medians.items():
        rows[name]["ratio"] = round(median / medians["frozen"], 4)
    return list(rows.values())


def print_rows(case: Case, rows: list[dict[str, Any]]) -> None:
    """The ratio table of a case."""
    print(f"{case.key} (forward + backward)")
    for row in rows:
        if row["status"] != "ok":
            print(f"  {row['implementation']:22s} {row['status']}: {row['reason']}")
            continue
        time_us = (row["gpu_us"] or row["wall_us"])["median"]
        path = f"  path {row['path']}" if row["path"] else ""
        unchecked = "" if row["errors"] or row["implementation"] in ("frozen", "lora") else "  unchecked: its own mask"
        print(
            f"  {row['implementation']:22s} {time_us:10.1f} us  {row['ratio']:6.3f}  "
            f"wall {row['wall_us']['median']:10.1f} us{path}{unchecked}",
            flush=True,
        )


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    made = parser("bench.dora", __doc__)
    made.add_argument("--no-compiled", action="store_true", help="leave torch.compile out")
    return made.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(sys.argv[1:] if argv is None else argv)

    def prepare(device: torch.device) -> Callable[[Case], list[Row]]:
        compiled = device.type == "cuda" and not options.no_compiled
        quick = options.smoke or options.quick
        return lambda case: measure_case(case, device, quick=quick, compiled=compiled, seconds=options.seconds)

    return run_problems("dora", options, cases(options.smoke), prepare, print_rows)


if __name__ == "__main__":
    sys.exit(main())
