"""A training step of the methods beside plain LoRA on the CPU: peftkern's beside PEFT's.

    python -m bench.cpu_methods [--pairs 15] [--threads 2] [--smoke] [--out DIR]

AdaLoRA (the step ends with `update_and_allocate`), rows of tokens that train beside LoRA (32 of 32,000, with a head
that is tied to the embedding and with one of its own), prompt tuning and prefix tuning (20 virtual tokens), on a Llama
of hidden size 512. A step is forward + loss + backward + AdamW. Both libraries have the same weights and the same
trained parameters; loss and gradients are compared before anything is timed. Steps run in pairs, one of each library,
the first of a pair taking turns, and after each the base model by itself, forward, and backward to the embeddings'
output; the figure is the median of the pairs' ratios. Each case runs in a fresh process. The result goes to
bench/results/cpu-<processor>/methods.json.
"""

from __future__ import annotations

import copy
import statistics
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from bench import records
from bench.check import WrongResultError, tolerance
from bench.cpu_program import begun, caller, cpu_parser, folder_of, in_turns, ratio_fields
from bench.models import ALPHA, RANK, Size, adapters_of, batch, learn_from_embeddings, llama
from bench.run import save

SIZE = Size()
OF_TOKENS = Size(layers=2, vocabulary=32_000)
SMOKE = Size(hidden=64, intermediate=96, layers=1, heads=2, vocabulary=128, batch=2, tokens=16)
VIRTUAL_TOKENS = 20
TRAINED_ROWS = 32
# More than any run has: AdaLoRA cuts ranks throughout, as in the middle of a training.
STEPS = 10_000


@dataclass(frozen=True, slots=True)
class Case:
    """A method on a model in a dtype."""

    method: str
    dtype: torch.dtype = torch.float32
    tied: bool = False

    @property
    def key(self) -> str:
        head = ", tied head" if self.tied else ", own head" if self.method == "tokens" else ""
        return f"{self.method}, {str(self.dtype).removeprefix('torch.')}{head}"

    @property
    def size(self) -> Size:
        return OF_TOKENS if self.method == "tokens" else SIZE


CASES = [
    Case("AdaLoRA"),
    Case("AdaLoRA", torch.bfloat16),
    Case("tokens", tied=True),
    Case("tokens"),
    Case("tokens", torch.bfloat16, tied=True),
    Case("prompt tuning"),
    Case("prefix tuning"),
]


def config(library: Any, method: str) -> Any:
    """The method's configuration."""
    common: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    lora = {"target_modules": "all-linear", "lora_alpha": ALPHA} | common
    if method == "AdaLoRA":
        return library.AdaLoraConfig(init_r=RANK, target_r=RANK // 2, total_step=STEPS, **lora)
    if method == "tokens":
        return library.LoraConfig(r=RANK, trainable_token_indices=list(range(TRAINED_ROWS)), **lora)
    made = {"prompt tuning": "PromptTuningConfig", "prefix tuning": "PrefixTuningConfig"}[method]
    return getattr(library, made)(num_virtual_tokens=VIRTUAL_TOKENS, **common)


class Trainee:
    """A copy of `base` with the method on it by a library (peft or peftkern), its optimizer and one batch."""

    def __init__(self, library: Any, base: nn.Module, size: Size, case: Case) -> None:
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model: Any = library.get_peft_model(copy.deepcopy(base), config(library, case.method)).train()
        self.model, self.ids = model, batch(size)
        # PEFT thaws AdaLoRA's count of ranks when it widens 16 bits; it has no gradient.
        self.parameters = [p for name, p in adapters_of(model) if ".ranknum." not in name]
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in self.parameters:
                p.copy_(0.05 * torch.randn(p.shape, generator=generator))
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4)
        self.steps = 0
        self.cuts_ranks = case.method == "AdaLoRA"

    def loss(self) -> torch.Tensor:
        return self.model(input_ids=self.ids, labels=self.ids).loss

    def step(self) -> None:
        """One training step."""
        self.loss().backward()
        self.optimizer.step()
        if self.cuts_ranks:
            self.steps += 1
            self.model.base_model.update_and_allocate(self.steps)
        self.optimizer.zero_grad()


def check(ours: Trainee, theirs: Trainee, dtype: torch.dtype) -> dict[str, float]:
    """The errors of loss and gradients beside PEFT's.

    Raises:
        WrongResultError: one is more than many layers' bounds.
    """
    if [p.shape for p in ours.parameters] != [p.shape for p in theirs.parameters]:
        raise WrongResultError("the two models train different parameters")
    losses = [trainee.loss() for trainee in (ours, theirs)]
    flat = [
        torch.cat([g.double().flatten() for g in torch.autograd.grad(loss, trainee.parameters)])
        for loss, trainee in zip(losses, (ours, theirs), strict=True)
    ]
    errors = {
        "loss": (losses[0] - losses[1]).abs().item() / losses[1].abs().item(),
        "gradients": ((flat[0] - flat[1]).norm() / flat[1].norm()).item(),
    }
    for name, error in errors.items():
        if not error <= 8 * tolerance(dtype, 1024):
            raise WrongResultError(f"the {name} differ from PEFT's by {error:.2e}")
    return errors


def measure(size: Size, case: Case, pairs: int, threads: int) -> dict[str, Any]:
    """The row of one case."""
    import peft

    import peftkern

    torch.set_num_threads(threads)
    base: Any = llama(size, case.dtype)
    base.config.use_cache = case.method == "prefix tuning"
    if case.tied:
        base.config.tie_word_embeddings = True
        base.tie_weights()
        if base.lm_head.weight is not base.model.embed_tokens.weight:
            raise WrongResultError("the head is not tied to the embedding")
    ours, theirs = (Trainee(library, base, size, case) for library in (peftkern, peft))
    errors = check(ours, theirs, case.dtype)
    frozen: Any = base.requires_grad_(False).train()
    learn_from_embeddings(frozen)
    ids = batch(size)
    steps = {
        "peftkern": ours.step,
        "peft": theirs.step,
        "frozen": lambda: frozen(input_ids=ids, labels=ids).loss.backward(),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        taken = in_turns(steps, pairs)
    return {
        "case": case.key,
        "method": case.method,
        "dtype": str(case.dtype).removeprefix("torch."),
        "tied": case.tied,
        **{f"{name}_ms": 1e3 * statistics.median(seconds) for name, seconds in taken.items()},
        **ratio_fields("ratio", taken["peftkern"], taken["peft"]),
        "frozen_ratio": statistics.median(a / b for a, b in zip(taken["frozen"], taken["peft"], strict=True)),
        "pairs": pairs,
        "errors": errors,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = cpu_parser(__doc__, pairs=15, what="steps for each case")
    options = parser.parse_args(sys.argv[1:] if argv is None else argv)
    if records.has_no_place(options):
        return 2
    result = begun("methods", asdict(SMOKE if options.smoke else SIZE), options.threads, of_tokens=asdict(OF_TOKENS))
    for case in CASES:
        size = SMOKE if options.smoke else case.size
        pairs = 1 if options.smoke else options.pairs
        row = caller(options.smoke)(measure, size, case, pairs, options.threads)
        result["rows"].append(row)
        times = f"{row['peftkern_ms']:.1f} ms against {row['peft_ms']:.1f} ms"
        spread = f"{row['ratio_p10']:.2f}-{row['ratio_p90']:.2f}"
        print(f"{row['case']:32s} {row['ratio']:.2f} of PEFT's ({spread}; frozen {row['frozen_ratio']:.2f}); {times}")
    print(save(result, folder_of(options), "methods.json"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
