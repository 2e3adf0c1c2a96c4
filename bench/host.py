"""What a call costs the host: Python, dispatch and launching, without the GPU's time.

    python -m bench.host [--seconds 1.0] [--smoke] [--out DIR]

Where products are small, or the host is slow, a step takes as long as its launches take to be made. Each row is a layer
as users have it, forward alone and with backward: the microseconds that the host takes for a call, and how many
launches it makes. On a GPU launches are queued and not waited for; without one they go to a GPU that does nothing
(null_device.py), so that a change of the host's side is seen anywhere. There, what the driver takes for a launch is
missing: compare such figures with each other only. The clock is the process's own, least of many rounds. The result
goes to bench/results/<device>/host.json.

The last case is what a QLoRA step does in each decoder layer of an 8B Llama, but for norms and attention: its seven
projections, with fp32 adapters under autocast, in a checkpointed region that is computed again in backward.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bench import environment, null_device, records
from bench.decoder import set_linear
from bench.run import save

HIDDEN, RANK = 4096, 16
ROUND = 40  # calls between two looks at the clock: fewer launches than a GPU's queue holds
IA3 = "an IA3 layer (output scaled)"
PROJECTIONS = (4096, 1024, 1024)  # q, k and v of an 8B Llama
DECODER = "the seven of a decoder layer, checkpointed"


@dataclass(frozen=True, slots=True)
class Case:
    """A layer, q, k and v together, or a decoder layer's projections, over 16 or 4 bits, at M tokens."""

    name: str
    M: int
    bits: int
    outs: tuple[int, ...] = (HIDDEN,)
    dropout: float = 0.0
    hidden: int = HIDDEN

    @property
    def key(self) -> str:
        return f"{self.name}, {self.bits} bits, {self.M} tokens{', dropout' if self.dropout else ''}"


CASES = [
    *(Case("a layer", M, bits) for bits in (16, 4) for M in (1, 512, 2048)),
    Case("a layer", 2048, 16, dropout=0.1),
    *(Case(IA3, 2048, bits) for bits in (16, 4)),
    *(Case("q, k and v", M, bits, PROJECTIONS) for M in (1, 2048) for bits in (16, 4)),
    Case(DECODER, 2048, 4),
]
SMOKE = [Case("a layer", 1, 16), Case(DECODER, 64, 4, hidden=256)]


class Attention(torch.autograd.Function):
    """Stands for attention: takes q, k and v, keeps them, computes nothing."""

    @staticmethod
    def forward(ctx: Any, q, k, v):
        ctx.save_for_backward(q, k, v)
        return torch.empty_like(q)

    @staticmethod
    def backward(ctx: Any, _):
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors)


class Mlp(nn.Module):
    """A Llama's MLP."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Projections(nn.Module):
    """The linear layers of a Llama's decoder layer, called as it calls them."""

    def __init__(self, hidden: int, kv: int, intermediate: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.k_proj = nn.Linear(hidden, kv, bias=False)
        self.v_proj = nn.Linear(hidden, kv, bias=False)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)
        self.mlp = Mlp(hidden, intermediate)

    def forward(self, x):
        return self.mlp(self.o_proj(Attention.apply(self.q_proj(x), self.k_proj(x), self.v_proj(x))))


def decoder_layer(case: Case) -> nn.Module:
    """One of the shapes of an 8B Llama's, with fp32 adapters, on the CPU."""
    from peftkern import fuse_mlps
    from peftkern.nn import LoraLinear, share_input

    with torch.device("meta"):
        made: Any = Projections(case.hidden, case.hidden // 4, 7 * case.hidden // 2).to(torch.bfloat16)
    options: dict[str, Any] = {"adapter_dtype": torch.float32, "quantization": {16: None, 4: "nf4"}[case.bits]}
    for name, linear in list(made.named_modules()):
        if isinstance(linear, nn.Linear):
            # Zeros: nobody reads them, and quantizing random numbers would take longer than all else here.
            dense = linear.to_empty(device="cpu").requires_grad_(False)
            nn.init.zeros_(dense.weight)
            set_linear(made, name, LoraLinear.from_linear(dense, r=RANK, lora_alpha=RANK, **options))
    share_input(made.q_proj, made.k_proj, made.v_proj)
    share_input(made.mlp.gate_proj, made.mlp.up_proj)
    fuse_mlps(made)
    return made


def layers_of(case: Case) -> list[nn.Module]:
    """The case's layers, on the CPU, with bf16 adapters; fp32 ones in a decoder layer, which is one module here."""
    from peftkern.nn import IA3Linear, LoraLinear

    if case.name == DECODER:
        return [decoder_layer(case)]
    quantization = {16: None, 4: "nf4"}[case.bits]
    made: list[nn.Module] = []
    for out in case.outs:
        linear = nn.Linear(HIDDEN, out, bias=False, dtype=torch.bfloat16)
        options: dict[str, Any] = {"adapter_dtype": torch.bfloat16, "quantization": quantization}
        if case.name == IA3:
            made.append(IA3Linear.from_linear(linear, **options))
        else:
            options |= {"r": RANK, "lora_alpha": RANK, "lora_dropout": case.dropout}
            made.append(LoraLinear.from_linear(linear, **options))
    return made


def runners(case: Case, layers: list[nn.Module], device: torch.device) -> dict[str, Callable[[], Any]]:
    """Forward without gradients, and forward + backward."""
    if case.name == DECODER:
        return _checkpointed(case, layers[0], device)
    if len(layers) > 1:
        from peftkern.tuners.lora.shared_input import share_input

        share_input(*layers)
    x = torch.empty(case.M, HIDDEN, dtype=torch.bfloat16, device=device).requires_grad_()
    dys = [torch.empty(case.M, out, dtype=torch.bfloat16, device=device) for out in case.outs]
    learned = [x, *(p for layer in layers for p in layer.parameters() if p.requires_grad)]

    def forward() -> None:
        with torch.no_grad():
            for layer in layers:
                layer(x)

    def both() -> None:
        torch.autograd.backward([layer(x) for layer in layers], dys)
        for p in learned:
            p.grad = None

    return {"forward": forward, "forward+backward": both}


def _checkpointed(case: Case, layer: nn.Module, device: torch.device) -> dict[str, Callable[[], Any]]:
    """Forward, and forward + the same again + backward."""
    x = torch.empty(1, case.M, case.hidden, dtype=torch.bfloat16, device=device).requires_grad_()
    dy = torch.empty_like(x)
    learned = [x, *(p for p in layer.parameters() if p.requires_grad)]

    def forward() -> torch.Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            return checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False)

    def both() -> None:
        forward().backward(dy)
        for p in learned:
            p.grad = None

    return {"forward": forward, "forward+backward": both}


def host_us(run: Callable[[], Any], seconds: float, wait: Callable[[], Any]) -> float:
    """Least microseconds of the host's time for a call."""
    for _ in range(5):
        run()
    best, deadline = float("inf"), time.monotonic() + seconds
    while time.monotonic() < deadline:
        wait()
        start = time.process_time()
        for _ in range(ROUND):
            run()
        best = min(best, (time.process_time() - start) / ROUND)
    return 1e6 * best


def launches_of(run: Callable[[], Any]) -> int:
    """Steps that one call replays; a list of launches that is built anew at every call would be none of them."""
    from peftkern_kernels import replay

    counted, original = [], replay.replay

    def counting(recording: Any, *rest: Any) -> None:
        counted.append(len(recording.steps))
        original(recording, *rest)

    replay.replay = counting
    try:
        run()
    finally:
        replay.replay = original
    return sum(counted)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="for each figure")
    parser.add_argument("--cases", nargs="+", metavar="WORDS", help="only those whose names hold one of these")
    parser.add_argument("--smoke", action="store_true", help="two cases, briefly: does the program run?")
    parser.add_argument("--out", type=Path, help="folder of the result (default: bench/results/<device>)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(sys.argv[1:] if argv is None else argv)
    if records.has_no_place(options):
        return 2
    has_gpu = torch.cuda.is_available()
    torch.set_num_threads(1)
    folder = options.out or environment.results_folder(torch.device("cuda" if has_gpu else "cpu"))
    described = environment.describe(torch.device("cuda" if has_gpu else "cpu"))
    cases = SMOKE if options.smoke else [c for c in CASES if any(w in c.key for w in options.cases or [""])]
    made = [layers_of(case) for case in cases]
    device = torch.device("cuda", torch.cuda.current_device()) if has_gpu else null_device.CUDA
    if has_gpu:
        made = [[layer.to(device) for layer in layers] for layers in made]
    else:
        null_device.install()
    result: dict[str, Any] = {
        "schema": records.SCHEMA,
        "kind": "host",
        "environment": described,
        "launched_on": "the GPU" if has_gpu else null_device.NAME,
        "rows": [],
        "missing": [],
    }
    for case, layers in zip(cases, made, strict=True):
        for passes, run in runners(case, layers, device).items():
            taken = host_us(run, 0.05 if options.smoke else options.seconds, torch.cuda.synchronize if has_gpu else int)
            row = {"case": case.key, "passes": passes, "host_us": taken, "launches": launches_of(run)}
            result["rows"].append(row)
            print(f"{case.key:62s} {passes:17s} {taken:7.1f} us, {row['launches']:2d} launches", flush=True)
    print(save(result, folder, "host.json"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
