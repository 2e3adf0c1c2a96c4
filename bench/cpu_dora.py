"""A training step with DoRA on the CPU: peftkern's beside PEFT's, and beside peftkern's own with plain LoRA.

    python -m bench.cpu_dora [--pairs 15] [--seconds 60] [--processes 3] [--threads 2] [--smoke] [--out DIR]

The model, the batch, the modes and the way of measuring are those of `bench.cpu_step`, with `use_dora=True` in both
libraries and magnitudes that are not the norms; loss and gradients, magnitudes' included, are compared before anything
is timed. What DoRA costs over LoRA is measured likewise, in pairs of steps of peftkern's. The result goes to
bench/results/cpu-<processor>/dora.json.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from bench import records
from bench.cpu_program import begun, caller, folder_of, steps_parser
from bench.cpu_step import (
    MODES,
    SMOKE,
    Mode,
    Times,
    Trainee,
    Untrained,
    measure_mode,
    pair_times,
    shares,
)
from bench.models import Size, adapt, llama
from bench.run import save


def modes() -> list[Mode]:
    """The modes of `bench.cpu_step` with DoRA, those in float32 first."""
    return [replace(mode, use_dora=True) for mode in sorted(MODES, key=lambda mode: mode.dtype != torch.float32)]


def over_lora(size: Size, mode: Mode, pairs: int, seconds: float, threads: int) -> dict[str, float]:
    """A step of peftkern's with DoRA over one with LoRA: the median of pairs, and the two times in milliseconds."""
    import peftkern

    torch.set_num_threads(threads)
    base = llama(size, mode.dtype)
    dora, lora = (
        Trainee(adapt(peftkern, base, mode.dropout, mode.masters, use_dora), size, mode) for use_dora in (True, False)
    )
    taken: Times = pair_times(dora, lora, Untrained(base, size, mode), pairs, seconds, min(pairs, 3))
    ratios = [a / b for a, b in zip(taken["peftkern"], taken["peft"], strict=True)]
    return {
        "dora_ms": 1e3 * statistics.median(taken["peftkern"]),
        "lora_ms": 1e3 * statistics.median(taken["peft"]),
        "ratio": statistics.median(ratios),
    }


def print_row(row: dict[str, Any]) -> None:
    """The figures of a mode."""
    spread = f"{row['ratio_p10']:.2f}-{row['ratio_p90']:.2f}"
    times = f"{row['peftkern_ms']:.1f} ms against {row['peft_ms']:.1f} ms, {row['pairs']} pairs"
    print(f"{row['mode']:52s} {row['ratio']:.3f} of PEFT's ({spread}); {times}; frozen {row['frozen_ratio']:.3f}")
    saved = f"{row['saved_ratio']:.3f} of PEFT's by the step, {row['saved_in_layers_ratio']:.3f} by adapted layers"
    print(f"{'':6s}saved for backward: {saved}; time over LoRA's: {row['over_lora']['ratio']:.3f}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = steps_parser(__doc__, pairs=15, seconds=60.0, processes=3, of="mode")
    options = parser.parse_args(sys.argv[1:] if argv is None else argv)
    if records.has_no_place(options):
        return 2
    size = SMOKE if options.smoke else Size()
    pairs, processes = (2, 1) if options.smoke else (options.pairs, options.processes)
    result = begun("dora_step", asdict(size), options.threads, processes=processes)
    split, call = shares(pairs, options.seconds, processes), caller(options.smoke)
    for mode in modes()[:: 5 if options.smoke else 1]:
        row = measure_mode(call, size, mode, split, options.threads)
        del row["targets"]  # which are plain LoRA's
        row["over_lora"] = call(over_lora, size, mode, pairs, options.seconds / 2, options.threads)
        result["rows"].append(row)
        print_row(row)
    print(save(result, folder_of(options), "dora.json"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
