"""A training step of a mixture of experts on the CPU, LoRA on its stacked experts: peftkern's beside PEFT's.

    python -m bench.cpu_experts [--pairs 15] [--seconds 60] [--processes 2] [--threads 2] [--smoke] [--out DIR]

The model is a Qwen3-MoE of four layers (hidden 512, 32 experts of 192, four of them for each token) on 4 x 128 tokens,
with LoRA of rank 16 on attention and, by `target_parameters`, on gate_up_proj and down_proj of all experts. As in
`bench.cpu_step`: loss and gradients are compared with PEFT's first, steps run in pairs whose first takes turns, and the
same model without adapters takes a step after each pair. PEFT runs the experts by one of transformers' functions, so
each dtype is measured beside two of them: "grouped_mm", transformers' default, and "eager", a loop over the experts.
The result goes to bench/results/cpu-<processor>/experts.json.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from bench import records
from bench.cpu_program import begun, caller, folder_of, steps_parser
from bench.cpu_step import (
    Mode,
    Share,
    Times,
    Trainee,
    Untrained,
    check_pair,
    pair_times,
    row_of,
    saved,
    saved_fields,
    shares,
)
from bench.models import ALPHA, RANK, adapters_of
from bench.run import save

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]


@dataclass(frozen=True, slots=True)
class Size:
    """A mixture's sizes and the batch that it is trained on."""

    hidden: int = 512
    intermediate: int = 192
    experts: int = 32
    choices: int = 4
    layers: int = 4
    heads: int = 8
    vocabulary: int = 4096
    batch: int = 4
    tokens: int = 128


SMOKE = Size(64, 32, experts=4, choices=2, layers=1, heads=2, vocabulary=128, batch=2, tokens=16)


@dataclass(frozen=True, slots=True)
class Case:
    """A mode, and transformers' function by which PEFT runs the experts."""

    mode: Mode
    function: str

    @property
    def key(self) -> str:
        return f"{self.mode.key}, experts by {self.function}"


CASES = [
    Case(Mode(dtype, False, 0.0), function)
    for dtype in (torch.float32, torch.bfloat16)
    for function in ("grouped_mm", "eager")
]


def mixture(size: Size, dtype: torch.dtype, function: str) -> nn.Module:
    """A randomly initialised Qwen3-MoE in `dtype`."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=size.hidden,
        moe_intermediate_size=size.intermediate,
        num_experts=size.experts,
        num_experts_per_tok=size.choices,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        head_dim=size.hidden // size.heads,
        vocab_size=size.vocabulary,
        use_cache=False,
    )
    model = Qwen3MoeForCausalLM(config)
    model.config._experts_implementation = function
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 2:  # which transformers leaves as they come
            parameter.data.normal_(std=0.02, generator=generator)
    return model.to(dtype)


def adapt(library: Any, base: nn.Module) -> nn.Module:
    """LoRA on a copy of `base` by `library` (peft or peftkern), equal values whichever it is, in the base's dtype."""
    config = library.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, target_parameters=PARAMETERS, task_type="CAUSAL_LM"
    )
    model = library.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in adapters_of(model):
            random = torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter.shape[1])
            parameter.copy_((0.1 * random).to(parameter.dtype))
    return model.train()


def measure_share(size: Any, case: Case, share: Share, threads: int) -> tuple[Times, dict[str, Any]]:
    """The times of one process, and what it found before timing if it checks."""
    import peft

    import peftkern

    torch.set_num_threads(threads)
    base = mixture(size, case.mode.dtype, case.function)
    ours, theirs = (Trainee(adapt(library, base), size, case.mode) for library in (peftkern, peft))
    found: dict[str, Any] = {}
    if share.check:
        paths = {row.path for row in peftkern.explain(ours.model, size.batch * size.tokens).rows}
        exact = Trainee(adapt(peft, base).float(), size, Mode(torch.float32, False, 0.0))
        errors = check_pair(ours, theirs, exact)
        del exact
        found = saved_fields(saved(ours), saved(theirs)) | {"errors": errors, "paths": sorted(paths)}
    frozen = Untrained(base, size, case.mode)
    return pair_times(ours, theirs, frozen, share.pairs, share.seconds, share.least), found


def measure(call: Callable[..., Any], size: Size, case: Case, split: list[Share], threads: int) -> dict[str, Any]:
    """The row of a case, each share by `call` (of `caller`)."""
    parts = [call(measure_share, size, case, share, threads) for share in split]
    row = row_of(case.mode, [times for times, _ in parts], parts[0][1])
    return row | {"mode": case.key, "experts": case.function, "targets": {}}


def print_row(row: dict[str, Any]) -> None:
    """The figures of a case."""
    spread = f"{row['ratio_p10']:.2f}-{row['ratio_p90']:.2f}"
    print(f"{row['mode']:66s} {row['ratio']:6.3f} of PEFT's time ({spread}), frozen {row['frozen_ratio']:.3f}")
    whole = row["saved_bytes"]
    print(
        f"{'':6s}{row['peftkern_ms']:.1f} ms against {row['peft_ms']:.1f} ms, {row['pairs']} pairs; saved for backward "
        f"{whole['peftkern'] / 1e6:.1f} MB against {whole['peft'] / 1e6:.1f} MB, {row['saved_ratio']:.3f}",
        flush=True,
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = steps_parser(__doc__, pairs=15, seconds=60.0, processes=2, of="case")
    options = parser.parse_args(sys.argv[1:] if argv is None else argv)
    if records.has_no_place(options):
        return 2
    size = SMOKE if options.smoke else Size()
    split = shares(2, 1.0, 1) if options.smoke else shares(options.pairs, options.seconds, options.processes)
    result = begun("experts", asdict(size), options.threads, processes=len(split))
    for case in CASES[:2] if options.smoke else CASES:
        row = measure(caller(options.smoke), size, case, split, options.threads)
        result["rows"].append(row)
        print_row(row)
    print(save(result, folder_of(options), "experts.json"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
