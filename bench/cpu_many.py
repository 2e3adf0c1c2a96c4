"""A batch whose eight rows want eight adapters, on the CPU: peftkern's forward beside PEFT's `adapter_names` loop.

    python -m bench.cpu_many [--hidden 512] [--pairs 41] [--threads 2] [--smoke] [--out DIR]

The model is a Llama of four layers with eight LoRA adapters of rank 16 on all linear layers; the batch is eight
rows of 1 token (decoding) and of 256 (a prompt), each row with an adapter of its own, in an order that is not the
adapters'. Both libraries have the same weights and adapters; logits are compared before anything is timed. Forwards
run in pairs, one of each library, the first of a pair taking turns, and after each pair the same rows through the
model without adapters; the figure is the median of the pairs' ratios. Each has weights of its own, so that in such
pairs all of a model comes from memory, the host's objects too; a decoding loop runs one model, token after token, and
its case has turns of 16 forwards, beside the case with turns of one; and once more with the rows' adapters in another
order at each forward, as where requests follow one another. Training one batch of all eight is timed too, beside the
eight steps (forward and backward) that PEFT needs for it, whose loop does not train. Each case runs in a fresh process.
The result goes to bench/results/cpu-<processor>/mixed.json.
"""

from __future__ import annotations

import copy
import itertools
import math
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
from bench.models import ALPHA, RANK, Size, learn_from_embeddings, llama
from bench.run import save

ADAPTERS = 8
# The rows' adapters: each once, in no order.
ORDER = (3, 0, 6, 1, 7, 4, 2, 5)
NAMES = [f"adapter{i}" for i in range(ADAPTERS)]


@dataclass(frozen=True, slots=True)
class Case:
    """Rows of `tokens` tokens in a dtype, through forward alone or in a training step, so many times in a row."""

    tokens: int
    dtype: torch.dtype
    training: bool = False
    in_a_row: int = 1
    new_names: bool = False  # whether the rows' adapters change from forward to forward

    @property
    def key(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        what = "training" if self.training else "inference" if self.in_a_row == 1 else f"{self.in_a_row} in a row"
        what += ", other names each time" * self.new_names
        return f"{name}, {ADAPTERS} rows of {self.tokens} tokens, {what}"

    def targets(self) -> dict[str, float]:
        """The acceptance figures: least that PEFT's time may be of peftkern's."""
        return {"speedup": 2.5 if self.tokens == 1 else 1.0}


CASES = [
    Case(tokens, dtype, training, *more)
    for training in (False, True)
    for dtype in (torch.float32, torch.bfloat16)
    for tokens, *more in ((1,), (256,), *(() if training else ((1, 16), (1, 16, True))))
]


def adapt(library: Any, base: nn.Module) -> nn.Module:
    """Eight LoRA adapters of rank 16 on all linear layers of a copy of `base`, equal whichever library it is."""
    options = {"r": RANK, "lora_alpha": ALPHA, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = library.LoraConfig(**options)
        model = library.get_peft_model(copy.deepcopy(base), first, NAMES[0], autocast_adapter_dtype=False)
        for name in NAMES[1:]:
            model.add_adapter(name, library.LoraConfig(**options), autocast_adapter_dtype=False)
    dtype, generator = next(base.parameters()).dtype, torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, p in sorted((name, p) for name, p in model.named_parameters() if "lora_" in name):
            p.copy_((0.1 * torch.randn(p.shape, generator=generator) / math.sqrt(p.shape[1])).to(dtype))
            p.requires_grad_()
    return model.eval()


def batch(size: Size, tokens: int) -> torch.Tensor:
    """Token ids [8, tokens]."""
    return torch.randint(size.vocabulary, (ADAPTERS, tokens), generator=torch.Generator().manual_seed(2))


def loss_of(model: nn.Module, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    """A loss whose gradient for each row is that of the row alone."""
    logits: torch.Tensor = model(input_ids=ids, **options).logits
    return logits.float().square().mean(dim=(1, 2)).sum()


def runners(case: Case, size: Size) -> tuple[dict[str, Callable[[], Any]], dict[str, float]]:
    """What is timed, by name, and the errors found before that.

    Raises:
        WrongResultError: logits, or a gradient, differ from PEFT's by more than two layers' bounds.
    """
    import peft

    import peftkern

    base = llama(size, case.dtype).eval()
    ids, names = batch(size, case.tokens), [NAMES[i] for i in ORDER]
    ours, theirs = adapt(peftkern, base), adapt(peft, base)
    with torch.no_grad():
        got, want = (model(input_ids=ids, adapter_names=names).logits.double() for model in (ours, theirs))
    errors = {"logits": _error(got, want, case, "logits")}
    if not case.training:

        def inference(model: nn.Module, mixed: bool = True) -> Callable[[], Any]:
            batches = [names[i:] + names[:i] for i in range(ADAPTERS if case.new_names else 1)]
            following = itertools.cycle([{"adapter_names": each} for each in batches] if mixed else [{}])

            def run() -> None:
                with torch.inference_mode():
                    model(input_ids=ids, **next(following))

            return run

        return {"peftkern": inference(ours), "peft": inference(theirs), "frozen": inference(base, mixed=False)}, errors

    def together() -> None:
        ours.zero_grad()
        loss_of(ours, ids, adapter_names=names).backward()

    def one_by_one() -> None:
        theirs.zero_grad()
        for i, name in enumerate(names):
            theirs.set_adapter(name)  # type: ignore[operator]
            loss_of(theirs, ids[i : i + 1]).backward()

    frozen = copy.deepcopy(base).requires_grad_(False)
    learn_from_embeddings(frozen)
    together()
    one_by_one()
    flat = [
        torch.cat([p.grad.double().flatten() for name, p in sorted(model.named_parameters()) if p.grad is not None])
        for model in (ours, theirs)
    ]
    errors["gradients"] = _error(*flat, case, "gradients")
    timed = {"peftkern": together, "peft": one_by_one, "frozen": lambda: loss_of(frozen, ids).backward()}
    return timed, errors


def _error(got: torch.Tensor, want: torch.Tensor, case: Case, what: str) -> float:
    """Relative error in the root mean square.

    Two models of many rounded layers are compared, so many layers' bounds are allowed, in 16 bits of errors that grow.
    """
    error = relative_error(got, want)
    allowed = 8 * tolerance(case.dtype, 1024)
    if not error <= allowed:
        raise WrongResultError(f"{case.key}: {what} differ from PEFT's by {error:.2e}, allowed {allowed:.2e}")
    return error


def measure_case(size: Size, case: Case, pairs: int, threads: int) -> dict[str, Any]:
    """The row of one case: times in milliseconds, and PEFT's over peftkern's pair by pair."""
    torch.set_num_threads(threads)
    timed, errors = runners(case, size)
    taken = in_turns(timed, pairs, case.in_a_row)
    return {
        "case": case.key,
        "dtype": str(case.dtype).removeprefix("torch."),
        "tokens": case.tokens,
        "training": case.training,
        "in_a_row": case.in_a_row,
        "new_names": case.new_names,
        **{f"{name}_ms": 1e3 * statistics.median(seconds) for name, seconds in taken.items()},
        **ratio_fields("speedup", taken["peft"], taken["peftkern"]),
        "over_frozen": statistics.median(a / b for a, b in zip(taken["peftkern"], taken["frozen"], strict=True)),
        "pairs": pairs,
        "errors": errors,
        "targets": case.targets(),
    }


def print_row(row: dict[str, Any]) -> None:
    """The figures of a case beside its target."""
    target = row["targets"]["speedup"]
    verdict = "PASS" if row["speedup"] >= target else f"short by {target - row['speedup']:.2f}"
    times = f"{row['peftkern_ms']:.2f} ms against {row['peft_ms']:.2f} ms, frozen {row['frozen_ms']:.2f} ms"
    spread = f"{row['speedup_p10']:.2f}-{row['speedup_p90']:.2f}"
    print(f"{row['case']:50s} {row['speedup']:6.2f} x ({spread}), target {target:.1f} {verdict}; {times}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = cpu_parser(__doc__, pairs=41, what="forwards for each case (a third in training)")
    parser.add_argument("--hidden", type=int, default=512)
    options = parser.parse_args(sys.argv[1:] if argv is None else argv)
    if records.has_no_place(options):
        return 2
    hidden = options.hidden
    size = Size(hidden=hidden, intermediate=hidden * 43 // 16, heads=hidden // 64)
    if options.smoke:
        size = Size(hidden=64, intermediate=96, layers=1, heads=2, vocabulary=128)
    batch_size = asdict(size) | {"batch": ADAPTERS, "tokens": None}
    result = begun("mixed", batch_size, options.threads, adapters=ADAPTERS)
    for case in [Case(2, torch.float32), Case(2, torch.float32, True)] if options.smoke else CASES:
        pairs = 2 if options.smoke else options.pairs // 3 if case.training else options.pairs
        row = caller(options.smoke)(measure_case, size, case, pairs, options.threads)
        result["rows"].append(row)
        print_row(row)
    name = "mixed.json" if hidden == 512 else f"mixed_{hidden}.json"
    print(save(result, folder_of(options), name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
