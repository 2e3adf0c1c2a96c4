"""A few tokens through a small Llama on the CPU, forward and in training: peftkern's time beside PEFT's.

    python -m bench.cpu_tokens [--pairs 21] [--threads 2] [--smoke] [--out DIR]

One row of 1, 16 or 128 tokens, where what surrounds the products counts: LoRA of rank 16 on all linear layers, and IA3
on the k, v and down projections, one adapter, a model of fp32 or of bf16 with fp32 adapters (both libraries' default).
Weights and adapters are equal; logits and gradients are compared before anything is timed. A turn
is several forwards, or forwards and backwards, in a row, as a loop runs them; turns go in pairs, one of each library,
the first of a pair taking turns, and after each pair one of the model without adapters. The figure is the median of
the pairs' ratios. Each case runs in a fresh process. The result goes to bench/results/cpu-<processor>/tokens.json.
"""

from __future__ import annotations

import copy
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from bench import records
from bench.check import WrongResultError, relative_error, tolerance
from bench.cpu_program import begun, caller, cpu_parser, folder_of, in_turns, ratio_fields
from bench.models import Size, adapt, adapters_of, learn_from_embeddings, llama
from bench.run import save

IA3_TARGETS = ["k_proj", "v_proj", "down_proj"]


@dataclass(frozen=True, slots=True)
class Case:
    """A method, a model's dtype, a row of tokens, and whether backward follows."""

    method: str
    dtype: torch.dtype
    tokens: int
    training: bool

    @property
    def key(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"{self.method}, {name}, {self.tokens} tokens, {'training' if self.training else 'inference'}"

    @property
    def in_a_row(self) -> int:
        """Passes of a turn."""
        return max(2, 8 // self.tokens)


CASES = [
    Case(method, dtype, tokens, training)
    for method in ("LoRA", "IA3")
    for dtype in (torch.float32, torch.bfloat16)
    for tokens in (1, 16, 128)
    for training in (False, True)
]


def adapted(library: Any, base: nn.Module, method: str) -> nn.Module:
    """`base` under an adapter that is no identity, equal whichever library it is."""
    if method == "LoRA":
        return adapt(library, base, 0.0, fp32_adapters=True)
    config = library.IA3Config(target_modules=IA3_TARGETS, feedforward_modules=["down_proj"], task_type="CAUSAL_LM")
    model: nn.Module = library.get_peft_model(copy.deepcopy(base), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, vector in adapters_of(model):
            vector.copy_(0.75 + 0.5 * torch.rand(vector.shape, generator=generator))
    return model.train()


def passes(case: Case, size: Size) -> dict[str, Callable[[], Any]]:
    """What is timed, by name.

    Raises:
        WrongResultError: logits, or gradients, differ from PEFT's by more than many layers' bounds.
    """
    import peft

    import peftkern

    base = llama(size, case.dtype)
    ids = torch.randint(size.vocabulary, (1, case.tokens), generator=torch.Generator().manual_seed(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models = {name: adapted(lib, base, case.method) for name, lib in (("peftkern", peftkern), ("peft", peft))}
    results = []
    for model in models.values():
        logits = model(input_ids=ids).logits
        logits.float().square().mean().backward()
        # All gradients as one: of a single token q and k get none but what is left of rounding.
        grads = [p.grad.double().flatten() for _, p in adapters_of(model) if p.grad is not None]
        results.append([logits.detach(), torch.cat(grads)])
    for got, want in zip(*results, strict=True):
        error = relative_error(got, want.double())
        allowed = 8 * tolerance(case.dtype, 1024)
        if not error <= allowed:
            raise WrongResultError(f"{case.key}: differs from PEFT's by {error:.2e}, allowed {allowed:.2e}")
    base.requires_grad_(False)
    if case.training:
        learn_from_embeddings(base)
        return {name: _trained(model, ids) for name, model in (models | {"frozen": base}).items()}
    return {name: _asked(model.eval(), ids) for name, model in (models | {"frozen": base}).items()}


def _trained(model: nn.Module, ids: torch.Tensor) -> Callable[[], Any]:
    def run() -> None:
        model.zero_grad()
        model(input_ids=ids).logits.float().square().mean().backward()

    return run


def _asked(model: nn.Module, ids: torch.Tensor) -> Callable[[], Any]:
    def run() -> None:
        with torch.inference_mode():
            model(input_ids=ids)

    return run


def measure_case(size: Size, case: Case, pairs: int, threads: int) -> dict[str, Any]:
    """The row of one case: milliseconds of a pass, and peftkern's over PEFT's pair by pair."""
    torch.set_num_threads(threads)
    timed = passes(case, size)
    taken = in_turns(timed, pairs, case.in_a_row)
    return {
        "case": case.key,
        "method": case.method,
        "dtype": str(case.dtype).removeprefix("torch."),
        "tokens": case.tokens,
        "training": case.training,
        "in_a_row": case.in_a_row,
        **{f"{name}_ms": 1e3 * statistics.median(seconds) for name, seconds in taken.items()},
        **ratio_fields("ratio", taken["peftkern"], taken["peft"]),
        "frozen_ratio": statistics.median(a / b for a, b in zip(taken["frozen"], taken["peft"], strict=True)),
        "pairs": pairs,
    }


def print_row(row: dict[str, Any]) -> None:
    """The figures of a case."""
    times = f"{row['peftkern_ms']:.2f} ms against {row['peft_ms']:.2f} ms"
    spread = f"{row['ratio_p10']:.2f}-{row['ratio_p90']:.2f}"
    print(f"{row['case']:42s} {row['ratio']:.3f} of PEFT's ({spread}); {times}; frozen {row['frozen_ratio']:.3f}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = cpu_parser(__doc__, pairs=21, what="turns for each case")
    options = parser.parse_args(sys.argv[1:] if argv is None else argv)
    if records.has_no_place(options):
        return 2
    size, cases, pairs = Size(), CASES, options.pairs
    if options.smoke:
        size = Size(hidden=64, intermediate=96, layers=1, heads=2, vocabulary=128)
        cases, pairs = [CASES[1], CASES[-2]], 2
    result = begun("tokens", asdict(size) | {"batch": 1, "tokens": None}, options.threads)
    for case in cases:
        row = caller(options.smoke)(measure_case, size, case, pairs, options.threads)
        result["rows"].append(row)
        print_row(row)
    print(save(result, folder_of(options), "tokens.json"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
