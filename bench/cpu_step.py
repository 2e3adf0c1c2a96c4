"""A training step on the CPU: peftkern's beside PEFT's, with what both save for backward and what one call costs.

    python -m bench.cpu_step [--pairs 21] [--seconds 100] [--threads 2] [--smoke] [--out DIR]

The model is a Llama of four layers (hidden 512, intermediate 1376, 8 heads, vocabulary 4096) on 4 x 128 tokens, with
LoRA of rank 16 on all linear layers; the step is forward + loss + backward + AdamW on the adapters. Both libraries
have the same weights, adapters and data; loss and gradients are compared before anything is timed. Steps run in
pairs, one of each library, the first of a pair taking turns; the figure is the median of the pairs' ratios. Where the
processor has no bfloat16 matrix instructions a step takes PEFT many seconds, so a mode stops at `--seconds` with at
least three pairs; and there bfloat16 is measured twice, as it runs and with peftkern held to torch's own bfloat16
products, which shows what fusing alone is worth. The result goes to bench/results/cpu-<processor>/step.json.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench import environment, measure, records
from bench.check import WrongResultError, tolerance
from bench.models import ALPHA, RANK, Size, adapt, adapted_layers, adapters_of, llama
from bench.run import save
from peftkern.backend import device_info
from peftkern.ops.plan import Plan

SMOKE = Size(hidden=64, intermediate=96, layers=1, heads=2, vocabulary=128, batch=2, tokens=16)


@dataclass(frozen=True, slots=True)
class Mode:
    """How a model is trained: base dtype, whether adapters are fp32 under autocast, dropout.

    `path` holds peftkern to one path of its plan, None lets the plan choose.
    """

    dtype: torch.dtype
    autocast: bool
    dropout: float
    path: str | None = None

    @property
    def key(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        adapters = "fp32 adapters, autocast" if self.autocast else f"{name} adapters"
        held = ", torch's products" if self.path == "torch" else ""
        return f"{name}, {adapters}, dropout {self.dropout:g}{held}"

    def targets(self) -> dict[str, float]:
        """The acceptance figures of this mode: most that peftkern's may be of PEFT's."""
        if self.dropout:
            return {"time": 0.95, "saved": 0.65}
        return {"time": 0.92, "saved": 1.0} if self.dtype == torch.float32 else {"time": 0.80, "saved": 0.65}


MODES = [
    Mode(dtype, autocast, dropout)
    for dropout in (0.0, 0.1)
    for dtype, autocast in ((torch.bfloat16, True), (torch.bfloat16, False), (torch.float32, False))
]


def modes() -> list[Mode]:
    """The six modes, and bfloat16 without dropout once more on torch's own products where the plan avoids those."""
    scalar = torch.bfloat16 in device_info(torch.device("cpu")).scalar_matmul
    held = [replace(mode, path="torch") for mode in MODES if mode.dtype == torch.bfloat16 and not mode.dropout]
    # The slow ones last: whoever stops the run has the rest.
    quick_first = sorted(MODES, key=lambda mode: mode.dtype != torch.float32)
    return [*quick_first, *(held if scalar else [])]


@contextlib.contextmanager
def held_to(path: str | None) -> Iterator[None]:
    """Within the block `lora_linear` takes `path`, whatever its plan says; None changes nothing."""
    # The package exports the function under its module's name.
    module: Any = importlib.import_module("peftkern.ops.lora_linear")
    choose = module.plan_for
    if path is not None:
        module.plan_for = lambda *_: Plan(path, "held to it by a benchmark")
    try:
        yield
    finally:
        module.plan_for = choose


class Trainee:
    """A model, its optimizer and one batch."""

    def __init__(self, model: nn.Module, size: Size, mode: Mode) -> None:
        self.model, self.mode = model, mode
        generator = torch.Generator().manual_seed(2)
        self.ids = torch.randint(size.vocabulary, (size.batch, size.tokens), generator=generator)
        self.parameters = [p for _, p in adapters_of(model)]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4)

    def loss(self) -> torch.Tensor:
        """The language-model loss of the batch."""
        context: Any = contextlib.nullcontext()
        if self.mode.autocast:
            context = torch.autocast("cpu", dtype=self.mode.dtype)
        with context:
            return self.model(input_ids=self.ids, labels=self.ids).loss

    def step(self) -> None:
        """One training step."""
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def gradients(self) -> list[torch.Tensor]:
        return list(torch.autograd.grad(self.loss(), self.parameters))


def check_pair(ours: Trainee, theirs: Trainee, exact: Trainee) -> dict[str, float]:
    """Compare loss and gradients, without dropout, with PEFT's in fp32 on the same values.

    Returns:
        Errors of the loss (absolute) and of all gradients together (relative, root mean square), peftkern's and PEFT's.

    Raises:
        WrongResultError: peftkern's error is more than 1.5 times PEFT's, and more than one layer's bound.
    """
    for trainee in (ours, theirs, exact):
        trainee.model.eval()
    if [p.shape for p in ours.parameters] != [p.shape for p in theirs.parameters]:
        raise WrongResultError("the two models train different parameters")
    losses = [t.loss().item() for t in (ours, theirs, exact)]
    flat = [torch.cat([g.double().flatten() for g in t.gradients()]) for t in (ours, theirs, exact)]
    errors = {}
    for i, name in enumerate(("peftkern", "peft")):
        errors[f"loss, {name}"] = abs(losses[i] - losses[2])
        errors[f"gradients, {name}"] = ((flat[i] - flat[2]).norm() / flat[2].norm()).item()
    bound = tolerance(ours.mode.dtype, 1024)
    for name, scale in (("loss", abs(losses[2])), ("gradients", 1.0)):
        got, allowed = errors[f"{name}, peftkern"], max(1.5 * errors[f"{name}, peft"], bound * scale)
        if not got <= allowed:
            raise WrongResultError(f"{ours.mode.key}: error of the {name} {got:.2e}, allowed {allowed:.2e}")
    for trainee in (ours, theirs, exact):
        trainee.model.train()
    return errors


def check_dropout(trainee: Trainee) -> None:
    """Raise WrongResultError unless two passes differ where dropout is on, and agree where it is off."""
    first, second = trainee.loss().item(), trainee.loss().item()
    if (first != second) != bool(trainee.mode.dropout):
        raise WrongResultError(f"{trainee.mode.key}: losses of two passes are {first} and {second}")


def saved(trainee: Trainee) -> tuple[int, int]:
    """(bytes saved for backward by the whole step, those saved inside adapted layers).

    Distinct storages, parameters, buffers and the batch excluded. What a layer saves counts inside it even where
    something outside saves the same storage (its input, say); the whole counts it once.
    """
    excluded = [*trainee.model.parameters(), *trainee.model.buffers(), trainee.ids]
    with measure.SavedBytes(excluded) as whole:
        loss = trainee.loss()
    inside = measure.SavedBytes(excluded)
    inside.counting = False

    def enter(*_: Any) -> None:
        inside.counting = True

    def leave(*_: Any) -> None:
        inside.counting = False

    handles: list[Any] = []
    for layer in adapted_layers(trainee.model):
        handles += [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]
    with inside:
        loss = trainee.loss()
    for handle in handles:
        handle.remove()
    del loss
    return whole.total, inside.total


def pair_times(ours: Trainee, theirs: Trainee, pairs: int, seconds: float) -> tuple[list[float], list[float]]:
    """Seconds of each step, pair by pair; the first of a pair takes turns. At least three pairs, however long."""
    taken: tuple[list[float], list[float]] = ([], [])
    for trainee in (ours, theirs):
        trainee.step()
    for i in range(pairs):
        if i >= 3 and sum(taken[0]) + sum(taken[1]) > seconds:
            break
        order = ((0, ours), (1, theirs)) if i % 2 == 0 else ((1, theirs), (0, ours))
        for which, trainee in order:
            start = time.perf_counter()
            trainee.step()
            taken[which].append(time.perf_counter() - start)
    return taken


def measure_mode(size: Size, mode: Mode, pairs: int, seconds: float) -> dict[str, Any]:
    """Everything about one mode."""
    with held_to(mode.path):
        return _measure_mode(size, mode, pairs, seconds)


def _measure_mode(size: Size, mode: Mode, pairs: int, seconds: float) -> dict[str, Any]:
    import peft

    import peftkern

    base = llama(size, mode.dtype)
    ours = Trainee(adapt(peftkern, base, mode.dropout, mode.autocast), size, mode)
    theirs = Trainee(adapt(peft, base, mode.dropout, mode.autocast), size, mode)
    exact = Trainee(adapt(peft, base, 0.0, False).float(), size, Mode(torch.float32, False, 0.0))
    errors = check_pair(ours, theirs, exact)
    del exact
    check_dropout(ours)
    check_dropout(theirs)
    saved_ours, saved_theirs = saved(ours), saved(theirs)
    taken = pair_times(ours, theirs, pairs, seconds)
    ratios = sorted(a / b for a, b in zip(*taken, strict=True))
    last = len(ratios) - 1
    return {
        "mode": mode.key,
        "dtype": str(mode.dtype).removeprefix("torch."),
        "autocast": mode.autocast,
        "dropout": mode.dropout,
        "path": mode.path,
        "peftkern_ms": 1e3 * statistics.median(taken[0]),
        "peft_ms": 1e3 * statistics.median(taken[1]),
        "ratio": statistics.median(ratios),
        "ratio_p10": ratios[round(0.1 * last)],
        "ratio_p90": ratios[round(0.9 * last)],
        "pairs": len(ratios),
        "saved_bytes": {"peftkern": saved_ours[0], "peft": saved_theirs[0]},
        "saved_ratio": saved_ours[0] / saved_theirs[0],
        "saved_in_layers": {"peftkern": saved_ours[1], "peft": saved_theirs[1]},
        "saved_in_layers_ratio": saved_ours[1] / saved_theirs[1],
        "errors": errors,
        "targets": mode.targets(),
    }


def call_overhead(dtype: torch.dtype, adapter_dtype: torch.dtype, rounds: int, reps: int) -> dict[str, Any]:
    """Forward + backward of one call at x [1, 64], 64 x 64, rank 16: microseconds, and what the adapter adds."""
    import peft

    from peftkern.nn import LoraLinear

    linear = nn.Linear(64, 64, dtype=dtype).requires_grad_(False)
    ours = LoraLinear.from_linear(linear, r=RANK, lora_alpha=ALPHA, adapter_dtype=adapter_dtype)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["linear"])
    theirs: Any = peft.inject_adapter_in_model(config, nn.ModuleDict({"linear": linear}))["linear"]
    theirs.lora_A.to(adapter_dtype)
    theirs.lora_B.to(adapter_dtype)
    x = torch.randn(1, 64, dtype=dtype, requires_grad=True)
    dy = torch.randn(1, 64, dtype=dtype)
    results = []
    with torch.no_grad():
        for layer in (ours, theirs):
            generator = torch.Generator().manual_seed(3)
            for container in (layer.lora_A, layer.lora_B):
                weight = container["default"].weight
                weight.copy_(0.1 * torch.randn(weight.shape, generator=generator).to(dtype))
    for layer in (ours, theirs):
        y = layer(x)
        results.append([y, *torch.autograd.grad(y, [x, *(p for p in layer.parameters() if p.requires_grad)], dy)])
    for got, expected in zip(*results, strict=True):
        error = ((got - expected).double().norm() / expected.double().norm()).item()
        if not error <= 2 * tolerance(dtype, 64):
            raise WrongResultError(f"a call at 1 x 64 x 64 in {dtype}: differs from PEFT's by {error:.2e}")

    def call(layer: nn.Module) -> Callable[[], Any]:
        inputs = [x, *(p for p in layer.parameters() if p.requires_grad)]
        return lambda: torch.autograd.grad(layer(x), inputs, dy)

    functions = {"frozen": call(linear), "peftkern": call(ours), "peft": call(theirs)}
    micros = measure.wall_microseconds(functions, torch.device("cpu"), reps=reps, rounds=rounds)
    frozen_us = micros["frozen"].median
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "adapter_dtype": str(adapter_dtype).removeprefix("torch."),
        "microseconds": {name: m.as_dict() for name, m in micros.items()},
        "ratio": (micros["peftkern"].median - frozen_us) / (micros["peft"].median - frozen_us),
        "targets": {"overhead": 0.5},
    }


def verdict(value: float, target: float) -> str:
    """PASS, or how far short."""
    return "PASS" if value <= target else f"short by {value - target:.3f}"


def print_table(result: dict[str, Any]) -> None:
    """The figures beside their targets."""
    print(f"\n{'training step, peftkern over PEFT':52s} {'ratio':>7s} {'p10-p90':>13s} {'target':>7s}")
    for row in result["rows"]:
        spread = f"{row['ratio_p10']:.2f}-{row['ratio_p90']:.2f}"
        target = row["targets"]["time"]
        print(f"{row['mode']:52s} {row['ratio']:7.3f} {spread:>13s} {target:7.2f}  {verdict(row['ratio'], target)}")
        print(f"{'':6s}{row['peftkern_ms']:.1f} ms against {row['peft_ms']:.1f} ms, {row['pairs']} pairs")
    heading = f"{'saved for backward, peftkern over PEFT':52s} {'step':>7s} {'layers':>7s} {'target':>7s}"
    print(f"\n{heading}  (MB of the step, of the layers)")
    for row in result["rows"]:
        target, whole, inside = row["targets"]["saved"], row["saved_bytes"], row["saved_in_layers"]
        sizes = ", ".join(f"{s['peftkern'] / 1e6:.1f} / {s['peft'] / 1e6:.1f}" for s in (whole, inside))
        print(
            f"{row['mode']:52s} {row['saved_ratio']:7.3f} {row['saved_in_layers_ratio']:7.3f} {target:7.2f}  "
            f"{verdict(row['saved_ratio'], target)} / {verdict(row['saved_in_layers_ratio'], target)}  ({sizes})"
        )
    heading = f"{'a call at 1 x 64 x 64, forward + backward':52s} {'frozen':>7s} {'ours':>7s} {'PEFT':>7s}"
    print(f"\n{heading}  overhead over PEFT's")
    for row in result["calls"]:
        us = {name: m["median"] for name, m in row["microseconds"].items()}
        name = f"{row['dtype']}, {row['adapter_dtype']} adapters (microseconds)"
        target = row["targets"]["overhead"]
        print(
            f"{name:52s} {us['frozen']:7.1f} {us['peftkern']:7.1f} {us['peft']:7.1f}  "
            f"{row['ratio']:.3f} (target {target:.2f}) {verdict(row['ratio'], target)}"
        )


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=21, help="pairs of steps for each mode")
    parser.add_argument("--seconds", type=float, default=100.0, help="most seconds of steps for each mode")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="a tiny model: does the program run?")
    parser.add_argument("--out", type=Path, help="folder of the result (default: bench/results/cpu-<processor>)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(sys.argv[1:] if argv is None else argv)
    if options.smoke and options.out is None:
        print("--smoke: nothing worth keeping is measured, so --out says where the result goes", file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    device = torch.device("cpu")
    size = SMOKE if options.smoke else Size()
    pairs, rounds, reps = (2, 2, 3) if options.smoke else (options.pairs, 21, 200)
    result: dict[str, Any] = {
        "schema": records.SCHEMA,
        "kind": "step",
        "environment": environment.describe(device),
        "size": asdict(size),
        "rank": RANK,
        "rows": [],
        "calls": [],
        "missing": [],
    }
    for mode in [MODES[0], MODES[-1]] if options.smoke else modes():
        print(mode.key, flush=True)
        result["rows"].append(measure_mode(size, mode, pairs, options.seconds))
    f32, bf16 = torch.float32, torch.bfloat16
    for dtype, adapters in ((f32, f32), (bf16, bf16), (bf16, f32)):
        result["calls"].append(call_overhead(dtype, adapters, rounds, reps))
    print_table(result)
    folder = options.out or environment.results_folder(device)
    print(save(result, folder, "step.json"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
