"""A whole QLoRA training step of an 8B Llama: tokens a second and peak memory, peftkern beside PEFT on bitsandbytes.

    python -m bench.qlora_step [--vram 16 24] [--seq 2048 ...] [--rivals] [--steps 5] [--smoke] [--quick] [--out DIR]

The model has Llama 3 8B's shapes and random 4-bit weights (bench/qlora_model.py): speed and memory only. LoRA of rank
16 on all linear layers with fp32 adapters under bfloat16 autocast, gradient checkpointing, embeddings and lm_head in
bfloat16, chunked loss (`peftkern.use_chunked_loss`), 8-bit AdamW from bitsandbytes where it imports, else torch's;
forward + loss + backward + optimizer step. Each implementation runs in a process of its own:

- *peftkern*;
- *peft, same settings*: PEFT over bitsandbytes' layers, all else the same, the chunked loss too;
- *peft, its own settings*: with PEFT's `prepare_model_for_kbit_training`, which widens embeddings and lm_head to
  float32, and transformers' loss over all logits.

Loss and the gradients' norm of the first step are compared before anything is timed: with PEFT's they must agree within
2 % and 5 %. They are those of the model's first two layers: through 32 layers of random weights the gradients fade
until their norm is mostly rounding (0.03, 0.08 and 0.18 where two layers give 2.98, 2.99 and 2.86). `--vram 16 24` runs
everything again with the allocator capped at what a card of so many GiB leaves beside the CUDA context: labelled as
this device under a cap, for its speed is not that card's. The result goes to
bench/results/<device>/qlora.json, or to DIR; `--smoke` runs a tiny model, on a CPU too; `--quick` two layers
of the real one, so that a run after it compiles nothing.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import itertools
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench import environment, records
from bench.measure import Micros, synchronize
from bench.qlora_model import TINY, Shape, make_model, set_adapters
from bench.run import save

RANK, ALPHA = 16, 32
IMPLEMENTATIONS = ("peftkern", "peft, same settings", "peft, its own settings")
LOSS_AGREES, GRADIENT_AGREES = 0.02, 0.05
CHECKED_LAYERS = 2
WARMUP = 2


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.qlora_step", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vram", nargs="+", type=float, default=[], metavar="GB", help="run under these caps too")
    parser.add_argument("--seq", nargs="+", type=int, default=[2048], metavar="TOKENS", help="of the one sequence")
    parser.add_argument("--rivals", action="store_true", help="PEFT on bitsandbytes too")
    parser.add_argument("--steps", type=int, default=5, help="that are timed")
    parser.add_argument("--smoke", action="store_true", help="a tiny model: does the program run? (CPU too)")
    parser.add_argument("--quick", action="store_true", help="two layers, a step: fills the compilers' caches")
    parser.add_argument("--out", type=Path, help="folder of the result (default: bench/results/<device>)")
    parser.add_argument("--one", metavar="JSON", help=argparse.SUPPRESS)  # what a process of its own is told
    return parser.parse_args(argv)


# -- one implementation, in this process --------------------------------------------------------------------------


def build(implementation: str, shape: Shape, device: torch.device) -> nn.Module:
    """The adapted model, ready to be trained."""
    import peftkern

    ours = implementation == "peftkern"
    model: Any = make_model(shape, device, torch.bfloat16, "peftkern" if ours else "bitsandbytes")
    library: Any = peftkern if ours else importlib.import_module("peft")
    if implementation == "peft, its own settings":
        model = library.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        peftkern.use_chunked_loss(model)
    config = library.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    return library.get_peft_model(model, config).train()


def optimizer_of(parameters: list[nn.Parameter], device: torch.device) -> tuple[torch.optim.Optimizer, str]:
    """AdamW in 8 bits where bitsandbytes has it for the device, else torch's; with its name."""
    from bench.quantized_rivals import bitsandbytes

    module, why_not = bitsandbytes()
    if device.type == "cuda" and not why_not:
        return module.optim.AdamW8bit(parameters, lr=1e-4), "bitsandbytes AdamW8bit"
    return torch.optim.AdamW(parameters, lr=1e-4), "torch AdamW"


def measure_one(told: dict[str, Any]) -> dict[str, Any]:
    """Build, check and time what `told` says; out of memory is a result, not an error."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    if told["cap_bytes"] is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, told["cap_bytes"] / total), device)
    try:
        return _measure(told, device)
    except torch.OutOfMemoryError as error:
        return {"status": "out of memory", "reason": str(error).splitlines()[0][:300]}


def loss_and_gradients(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The loss of a forward and backward pass under bfloat16 autocast, detached."""
    with torch.autocast(ids.device.type, dtype=torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach()


def checked(told: dict[str, Any], ids: torch.Tensor) -> tuple[float, float]:
    """Loss and gradients' norm of the first layers' model, which is gone again when this returns."""
    shape = Shape(**told["shape"])
    model = build(told["implementation"], replace(shape, layers=min(CHECKED_LAYERS, shape.layers)), ids.device)
    parameters = set_adapters(model)
    loss = loss_and_gradients(model, ids).item()
    return loss, math.sqrt(sum(p.grad.float().square().sum().item() for p in parameters if p.grad is not None))


def _measure(told: dict[str, Any], device: torch.device) -> dict[str, Any]:
    on_gpu, shape = device.type == "cuda", Shape(**told["shape"])
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(shape.vocabulary, (1, told["seq"]), generator=generator).to(device)
    first, norm = checked(told, ids)
    gc.collect()
    model = build(told["implementation"], shape, device)
    parameters = set_adapters(model)
    optimizer, optimizer_name = optimizer_of(parameters, device)
    gc.collect()
    at_rest = torch.cuda.memory_allocated(device) if on_gpu else None

    def step() -> None:
        loss_and_gradients(model, ids)
        optimizer.step()
        optimizer.zero_grad()

    seconds, peak, reserved = _timed(step, told["steps"], device)
    taken = Micros.of([1e6 * s for s in seconds])
    return {
        "status": "ok",
        "reason": "",
        "loss": first,
        "gradient_norm": norm,
        "trained": sum(p.numel() for p in parameters),
        "optimizer": optimizer_name,
        "step_us": taken.as_dict(),
        "tokens_per_second": told["seq"] / (taken.median * 1e-6),
        "at_rest_bytes": at_rest,
        "peak_bytes": peak,
        "reserved_bytes": reserved,
    }


def _timed(step: Callable[[], None], steps: int, device: torch.device) -> tuple[list[float], int | None, int | None]:
    """(seconds of each step, peak bytes allocated, peak bytes reserved; None on a CPU)."""
    on_gpu = device.type == "cuda"
    for _ in range(WARMUP):
        step()
    synchronize(device)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    if not on_gpu:
        return seconds, None, None
    return seconds, torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)


# -- all of them --------------------------------------------------------------------------------------------------

MEASURED = (
    "loss",
    "gradient_norm",
    "trained",
    "optimizer",
    "step_us",
    "tokens_per_second",
    "at_rest_bytes",
    "peak_bytes",
    "reserved_bytes",
    "estimated_bytes",
)


def started(told: dict[str, Any]) -> subprocess.Popen[str]:
    """A process for `measure_one` that imports, which takes longer than the steps, and waits for a word to begin."""
    command = [sys.executable, "-m", "bench.qlora_step", "--one", json.dumps(told)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, text=True, stdin=pipe, stdout=pipe, stderr=pipe)


def wait_for_a_word(told: dict[str, Any]) -> int:
    """The other end of `started`: imports what touches no GPU, waits, measures, prints; 1 where nobody is left to."""
    importlib.import_module("transformers.models.llama.modeling_llama")
    if not sys.stdin.readline():
        return 1
    print(json.dumps(measure_one(told)))
    return 0


def in_own_process(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What a process measures, with an empty GPU to itself from now on; a crash is a result with its last words."""
    out, err = process.communicate("begin\n")
    if process.returncode:
        words = (err.strip() or out.strip() or f"exit status {process.returncode}").splitlines()[-1]
        return {"status": "failed", "reason": words[:300]}
    return json.loads(out.splitlines()[-1])


def label(device: str, cap: float | None) -> str:
    """Which machine a row stands for."""
    return device if cap is None else f"{device} under a cap of {cap:g} GB"


def cap_bytes(cap: float | None) -> int | None:
    """What a card of `cap` GiB leaves to torch's allocator."""
    if cap is None:
        return None
    from peftkern.estimate import CONTEXT

    return int(cap * 2**30) - CONTEXT


@functools.cache
def estimated_bytes(shape: Shape, seq: int, optimizer: str) -> int:
    """What `peftkern.estimate` says that torch's allocator will hold at the peak: all but the CUDA context."""
    from peftkern.estimate import CONTEXT, estimate_memory

    optim = "adamw8bit" if "8bit" in optimizer else "adamw"
    return estimate_memory(shape.config(), r=RANK, seq=seq, optim=optim).total - CONTEXT


def disagreement(row: dict[str, Any], ours: dict[str, Any]) -> str:
    """How a peer's first loss or gradients differ from peftkern's by more than rounding, or ""."""
    for field, most in (("loss", LOSS_AGREES), ("gradient_norm", GRADIENT_AGREES)):
        apart = abs(row[field] / ours[field] - 1)
        if not apart <= most:
            both = f"{field} {row[field]:.5g}, peftkern's {ours[field]:.5g}"
            return f"{both}: {apart:.1%} apart, at most {most:.0%} is right"
    return ""


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All rows: sequence by sequence, without a cap and under each."""
    from bench.quantized_rivals import bitsandbytes

    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if has_gpu else torch.device("cpu")
    described = environment.describe(device)
    shape = TINY if options.smoke else Shape(layers=2) if options.quick else Shape()
    steps = 1 if options.quick else options.steps
    names = IMPLEMENTATIONS if options.rivals else IMPLEMENTATIONS[:1]
    sequences = [min(s, 32) for s in options.seq] if options.smoke else options.seq
    missing = bitsandbytes()[1]
    todo: list[tuple[dict[str, Any], float | None, Any]] = []  # with the process that waits to do it
    for seq, cap, name in itertools.product(sequences, (None, *options.vram), names):
        told = {"implementation": name, "shape": asdict(shape), "seq": seq, "steps": steps}
        told["cap_bytes"] = cap_bytes(cap)
        todo.append((told, cap, started(told) if has_gpu and not why_not_run(name, missing) else None))
    rows: list[dict[str, Any]] = []
    ours: dict[str, Any] | None = None
    for told, cap, process in todo:
        name, seq = told["implementation"], told["seq"]
        row = {"implementation": name, "label": label(described["device"], cap), "seq": seq, "batch": 1}
        row |= {"cap_gb": cap, "cap_bytes": told["cap_bytes"], **dict.fromkeys(MEASURED)}
        why_not = why_not_run(name, missing)
        if why_not:
            row |= {"status": "not run", "reason": why_not}
        else:
            row |= in_own_process(process) if has_gpu else measure_one(told)
        if name == "peftkern":
            ours = row if row["status"] == "ok" else None
            if ours is not None and has_gpu:  # beside a peak that was measured
                row["estimated_bytes"] = estimated_bytes(shape, seq, row["optimizer"])
        elif row["status"] == "ok" and ours is not None:
            row["reason"] = disagreement(row, ours)
            row["status"] = "wrong" if row["reason"] else "ok"
        rows.append(row)
        print(line_of(row), flush=True)
    described["clocks_after"] = environment.clocks()
    return {
        "schema": records.SCHEMA,
        "kind": "qlora",
        "environment": described,
        "shape": asdict(shape),
        "rank": RANK,
        "rows": rows,
        "missing": [],
    }


def why_not_run(implementation: str, bitsandbytes_missing: str) -> str:
    """Why an implementation cannot run here, or ""."""
    if implementation == "peftkern":
        return ""
    return bitsandbytes_missing or ("" if environment.version_of("peft") else "peft is not installed")


def line_of(row: dict[str, Any]) -> str:
    """A row in words."""
    start = f"{row['label']}, {row['seq']} tokens, {row['implementation']}:"
    if row["status"] != "ok":
        return f"{start} {row['status']}: {row['reason']}"
    memory = "" if row["peak_bytes"] is None else f", peak {row['peak_bytes'] / 1e9:.2f} GB"
    return f"{start} {row['tokens_per_second']:.0f} tokens/s{memory} ({row['optimizer']})"


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(sys.argv[1:] if argv is None else argv)
    if options.one:
        return wait_for_a_word(json.loads(options.one))
    has_gpu = torch.cuda.is_available()
    if not has_gpu and (options.vram or not options.smoke):
        print("no GPU here: a CPU runs --smoke alone, without --vram", file=sys.stderr)
        return 2
    if records.has_no_place(options):
        return 2
    result = run(options)
    device = torch.device("cuda" if has_gpu else "cpu")
    path = save(result, options.out or environment.results_folder(device), "qlora.json")
    print(f"{len(result['rows'])} rows: {path}")
    bad = [r for r in result["rows"] if r["status"] in ("wrong", "failed")]
    return 1 if any(r["implementation"] == "peftkern" or r["status"] == "wrong" for r in bad) else 0


if __name__ == "__main__":
    sys.exit(main())
