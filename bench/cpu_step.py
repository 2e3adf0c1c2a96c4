"""A training step on the CPU: peftkern's beside PEFT's, with what both save for backward and what one call costs.

    python -m bench.cpu_step [--pairs 21] [--seconds 100] [--processes 3] [--threads 2] [--smoke] [--out DIR]

The model is a Llama of four layers (hidden 512, intermediate 1376, 8 heads, vocabulary 4096) on 4 x 128 tokens, with
LoRA of rank 16 on all linear layers; the step is forward + loss + backward + AdamW on the adapters. A bfloat16 base has
adapters in fp32, as both libraries make them, with autocast or (a loop that asks for nothing) without, or in bfloat16.
Both libraries have the same weights, adapters and data; loss and gradients are compared before anything is timed. Steps
run in pairs, one of each library, the first of a pair taking turns; the figure is the median of the pairs' ratios.
After each pair the same model takes a step without adapters or optimizer, gradients flowing to the embeddings' output:
what it takes of PEFT's time is the least that any adapter code could reach. Each mode runs in fresh processes, since
what the allocator has served before changes a step by up to a quarter, and its pairs are split between several. Where
the processor has no bfloat16 matrix instructions a step takes PEFT many seconds, so a mode stops at `--seconds` with at
least three pairs; and there bfloat16 is measured twice, as it runs and with peftkern held to torch's own bfloat16
products, which shows what fusing alone is worth. Two modes once more with gradient checkpointing, where peftkern does
not make the last product of a decoder layer a second time. The result goes to bench/results/cpu-<processor>/step.json.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from bench import measure, records
from bench.check import WrongResultError, tolerance
from bench.cpu_program import begun, caller, folder_of, ratio_fields, steps_parser
from bench.models import ALPHA, RANK, Size, adapt, adapted_layers, adapters_of, batch, learn_from_embeddings, llama
from bench.run import save
from peftkern.backend import device_info
from peftkern.ops.plan import Plan

SMOKE = Size(hidden=64, intermediate=96, layers=1, heads=2, vocabulary=128, batch=2, tokens=16)


@dataclass(frozen=True, slots=True)
class Mode:
    """How a model is trained: base dtype, whether under autocast, dropout.

    `masters`: whether adapters are fp32, which is PEFT's default whatever the base is. `path` holds peftkern to one
    path of its plan, None lets the plan choose; `use_dora` is for `bench.cpu_dora`; `checkpointed` computes each
    decoder layer again in backward.
    """

    dtype: torch.dtype
    autocast: bool
    dropout: float
    masters: bool = False
    path: str | None = None
    use_dora: bool = False
    checkpointed: bool = False

    @property
    def key(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        adapters = "fp32 adapters" if self.masters else f"{name} adapters"
        adapters += ", autocast" * self.autocast
        held = ", torch's products" if self.path == "torch" else ""
        held += ", checkpointed" * self.checkpointed
        return f"{'DoRA, ' * self.use_dora}{name}, {adapters}, dropout {self.dropout:g}{held}"

    def targets(self) -> dict[str, float]:
        """The acceptance figures of this mode: most that peftkern's may be of PEFT's."""
        if self.checkpointed:
            return {}
        if self.dropout:
            return {"time": 0.95, "saved": 0.65}
        return {"time": 0.92, "saved": 1.0} if self.dtype == torch.float32 else {"time": 0.80, "saved": 0.65}


UNDER_AUTOCAST = Mode(torch.bfloat16, True, 0.0, masters=True)
FP32 = Mode(torch.float32, False, 0.0)
MODES = [
    replace(mode, dropout=dropout)
    for dropout in (0.0, 0.1)
    for mode in (UNDER_AUTOCAST, replace(UNDER_AUTOCAST, autocast=False), Mode(torch.bfloat16, False, 0.0), FP32)
]


def modes() -> list[Mode]:
    """The eight modes, two of them with checkpointing, and bfloat16 without dropout on torch's own products where the
    plan avoids those."""
    scalar = torch.bfloat16 in device_info(torch.device("cpu")).scalar_matmul
    held = [replace(mode, path="torch") for mode in MODES if mode.dtype == torch.bfloat16 and not mode.dropout]
    # The slow ones last: whoever stops the run has the rest.
    quick_first = sorted(MODES, key=lambda mode: mode.dtype != torch.float32)
    checkpointed = [replace(mode, checkpointed=True) for mode in (FP32, UNDER_AUTOCAST)]
    return [*quick_first, *checkpointed, *(held if scalar else [])]


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
        self.model, self.mode, self.ids = model, mode, batch(size)
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


class Untrained(Trainee):
    """The base model by itself, all of it frozen: forward, and backward as far as the embeddings' output."""

    def __init__(self, base: nn.Module, size: Size, mode: Mode) -> None:
        model: Any = copy.deepcopy(base).requires_grad_(False).train()
        learn_from_embeddings(model)
        self.model, self.mode, self.ids = model, mode, batch(size)

    def step(self) -> None:
        self.loss().backward()


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


Times = dict[str, list[float]]  # "peftkern", "peft", "frozen" -> seconds of each step, pair by pair


def pair_times(ours: Trainee, theirs: Trainee, frozen: Trainee, pairs: int, seconds: float, least: int) -> Times:
    """Steps of the two libraries in pairs, whose first takes turns, and one of the frozen model after each.

    Stops after `pairs` pairs, or after `least` if the pairs have taken `seconds`.
    """
    taken: Times = {"peftkern": [], "peft": [], "frozen": []}
    for trainee in (ours, theirs, frozen):
        trainee.step()
    for i in range(pairs):
        if i >= least and sum(taken["peftkern"]) + sum(taken["peft"]) > seconds:
            break
        order = [("peftkern", ours), ("peft", theirs)]
        for name, trainee in [*(order if i % 2 == 0 else reversed(order)), ("frozen", frozen)]:
            start = time.perf_counter()
            trainee.step()
            taken[name].append(time.perf_counter() - start)
    return taken


@dataclass(frozen=True, slots=True)
class Share:
    """One process's share of a mode: its pairs, and whether it is the one that also compares results and memory."""

    pairs: int
    seconds: float
    least: int
    check: bool


def shares(pairs: int, seconds: float, processes: int) -> list[Share]:
    """`pairs` and `seconds` split between the processes; at least three pairs together, however long."""
    counts = [len(range(i, pairs, processes)) for i in range(min(processes, pairs))]
    least = -(-3 // len(counts))
    return [Share(count, seconds / len(counts), least, check=i == 0) for i, count in enumerate(counts)]


def measure_share(size: Size, mode: Mode, share: Share, threads: int) -> tuple[Times, dict[str, Any]]:
    """The times of one process, and what it found before timing if it checks."""
    import peft

    import peftkern

    torch.set_num_threads(threads)
    with held_to(mode.path):
        base: Any = llama(size, mode.dtype)
        if mode.checkpointed:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        ours, theirs = (
            Trainee(adapt(library, base, mode.dropout, mode.masters, mode.use_dora), size, mode)
            for library in (peftkern, peft)
        )
        found: dict[str, Any] = {}
        if share.check:
            exact = Trainee(adapt(peft, base, 0.0, False, mode.use_dora).float(), size, FP32)
            errors = check_pair(ours, theirs, exact)
            check_dropout(ours)
            check_dropout(theirs)
            kept = {} if mode.checkpointed else saved_fields(saved(ours), saved(theirs))
            found = kept | {"errors": errors}
            del exact
        frozen = Untrained(base, size, mode)
        return pair_times(ours, theirs, frozen, share.pairs, share.seconds, share.least), found


def saved_fields(ours: tuple[int, int], theirs: tuple[int, int]) -> dict[str, Any]:
    """What `saved` says of both, as fields of a row."""
    return {
        "saved_bytes": {"peftkern": ours[0], "peft": theirs[0]},
        "saved_ratio": ours[0] / theirs[0],
        "saved_in_layers": {"peftkern": ours[1], "peft": theirs[1]},
        "saved_in_layers_ratio": ours[1] / theirs[1],
    }


def row_of(mode: Mode, times: list[Times], found: dict[str, Any]) -> dict[str, Any]:
    """The row of a mode from the times of its processes, pooled."""
    pooled = {name: [second for share in times for second in share[name]] for name in times[0]}
    return {
        "mode": mode.key,
        "dtype": str(mode.dtype).removeprefix("torch."),
        "autocast": mode.autocast,
        "masters": mode.masters,
        "dropout": mode.dropout,
        "path": mode.path,
        "checkpointed": mode.checkpointed,
        **{f"{name}_ms": 1e3 * statistics.median(seconds) for name, seconds in pooled.items()},
        **ratio_fields("ratio", pooled["peftkern"], pooled["peft"]),
        "pairs": len(pooled["peft"]),
        "ratio_by_process": [
            statistics.median(a / b for a, b in zip(t["peftkern"], t["peft"], strict=True)) for t in times
        ],
        "frozen_ratio": statistics.median(a / b for a, b in zip(pooled["frozen"], pooled["peft"], strict=True)),
        **found,
        "targets": mode.targets(),
    }


def measure_mode(call: Callable[..., Any], size: Size, mode: Mode, split: list[Share], threads: int) -> dict[str, Any]:
    """Everything about one mode, each share by `call` (of `caller`), one after the other."""
    parts = [call(measure_share, size, mode, share, threads) for share in split]
    return row_of(mode, [times for times, _ in parts], parts[0][1])


def call_overhead(
    shape: tuple[int, ...], dtype: torch.dtype, adapter_dtype: torch.dtype, rounds: int, reps: int
) -> dict[str, Any]:
    """Forward + backward of one call at x of one row and this shape, 64 x 64, rank 16: microseconds, and what the
    adapter adds."""
    import peft

    from peftkern.nn import LoraLinear

    linear = nn.Linear(64, 64, dtype=dtype).requires_grad_(False)
    ours = LoraLinear.from_linear(linear, r=RANK, lora_alpha=ALPHA, adapter_dtype=adapter_dtype)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["linear"])
    theirs: Any = peft.inject_adapter_in_model(config, nn.ModuleDict({"linear": linear}))["linear"]
    theirs.lora_A.to(adapter_dtype)
    theirs.lora_B.to(adapter_dtype)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    dy = torch.randn(shape, dtype=dtype)
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

    weight, A, B = linear.weight, ours.lora_A["default"].weight, ours.lora_B["default"].weight

    def composed() -> Any:
        # The same products with nothing around them but torch's own autograd: what Python over torch can hope for.
        rows = x if x.dim() == 2 else x.view(-1, 64)
        s = nn.functional.linear(rows, A.to(dtype))
        y = torch.addmm(nn.functional.linear(rows, weight, linear.bias), s, B.to(dtype).t(), alpha=ALPHA / RANK)
        return torch.autograd.grad(y if x.dim() == 2 else y.view(shape), [x, A, B], dy)

    functions = {"frozen": call(linear), "peftkern": call(ours), "peft": call(theirs), "composed": composed}
    micros = measure.wall_microseconds(functions, torch.device("cpu"), reps=reps, rounds=rounds)
    frozen_us = micros["frozen"].median
    return {
        "shape": list(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "adapter_dtype": str(adapter_dtype).removeprefix("torch."),
        "microseconds": {name: m.as_dict() for name, m in micros.items()},
        "ratio": (micros["peftkern"].median - frozen_us) / (micros["peft"].median - frozen_us),
        "composed_ratio": (micros["composed"].median - frozen_us) / (micros["peft"].median - frozen_us),
        "targets": {"overhead": 0.5},
    }


def measure_calls(rounds: int, reps: int, threads: int) -> list[dict[str, Any]]:
    """`call_overhead` for each pair of dtypes, of x as a matrix and as models have it."""
    torch.set_num_threads(threads)
    f32, bf16 = torch.float32, torch.bfloat16
    pairs = ((f32, f32), (bf16, bf16), (bf16, f32))
    return [call_overhead(shape, *dtypes, rounds, reps) for shape in ((1, 64), (1, 1, 64)) for dtypes in pairs]


def verdict(value: float, target: float) -> str:
    """PASS, or how far short."""
    return "PASS" if value <= target else f"short by {value - target:.3f}"


def print_table(result: dict[str, Any]) -> None:
    """The figures beside their targets."""
    print(f"\n{'training step, peftkern over PEFT':52s} {'ratio':>7s} {'p10-p90':>13s} {'target':>7s}")
    for row in result["rows"]:
        spread = f"{row['ratio_p10']:.2f}-{row['ratio_p90']:.2f}"
        target = row["targets"].get("time")
        told = "" if target is None else f" {target:7.2f}  {verdict(row['ratio'], target)}"
        print(f"{row['mode']:52s} {row['ratio']:7.3f} {spread:>13s}{told}")
        each = ", ".join(f"{ratio:.3f}" for ratio in row["ratio_by_process"])
        times = f"{row['peftkern_ms']:.1f} ms against {row['peft_ms']:.1f} ms, {row['pairs']} pairs"
        print(f"{'':6s}{times}; by process {each}; frozen {row['frozen_ms']:.1f} ms, {row['frozen_ratio']:.3f}")
    heading = f"{'saved for backward, peftkern over PEFT':52s} {'step':>7s} {'layers':>7s} {'target':>7s}"
    print(f"\n{heading}  (MB of the step, of the layers)")
    for row in (row for row in result["rows"] if "saved_bytes" in row):
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
        name = f"{row['dtype']}, {row['adapter_dtype']} adapters, x {row['shape']} (microseconds)"
        target = row["targets"]["overhead"]
        print(
            f"{name:52s} {us['frozen']:7.1f} {us['peftkern']:7.1f} {us['peft']:7.1f}  "
            f"{row['ratio']:.3f} (target {target:.2f}) {verdict(row['ratio'], target)}; "
            f"the products alone, by torch's autograd: {us['composed']:.1f}, {row['composed_ratio']:.3f}"
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = steps_parser(__doc__, pairs=21, seconds=100.0, processes=3, of="mode")
    options = parser.parse_args(sys.argv[1:] if argv is None else argv)
    if records.has_no_place(options):
        return 2
    size = SMOKE if options.smoke else Size()
    pairs, processes, rounds, reps = (2, 1, 2, 3) if options.smoke else (options.pairs, options.processes, 21, 200)
    result = begun("step", asdict(size), options.threads, processes=processes)
    split, call = shares(pairs, options.seconds, processes), caller(options.smoke)
    smoke = [*MODES[:2], replace(MODES[-1], checkpointed=True)]
    for mode in smoke if options.smoke else modes():
        print(mode.key, flush=True)
        result["rows"].append(measure_mode(call, size, mode, split, options.threads))
    result["calls"] = call(measure_calls, rounds, reps, options.threads)
    print_table(result)
    print(save(result, folder_of(options), "step.json"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
