"""Putting adapters on a model, loading, switching, saving and merging them: peftkern's time beside PEFT's.

    python -m bench.cpu_adapters [--pairs 5] [--threads 2] [--smoke] [--out DIR]

What a program waits for around its forwards. The model is a Llama of 32 layers as large models have them, but narrow
(hidden 64), so that what is timed is the work for each of its 224 adapted layers and not copying: LoRA on all linear
layers. A round goes through the operations below on fresh models, first with one library and then with the other, which
take turns in being the first; the figure is the median of the rounds' ratios. The last loads eight adapters into one
model, peftkern's by `AdapterBank.from_pretrained`. Before, both libraries have loaded the same file, and their logits
are compared. The result goes to bench/results/cpu-<processor>/adapters.json.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench import records
from bench.check import WrongResultError, relative_error, tolerance
from bench.cpu_program import begun, caller, cpu_parser, folder_of, ratio_fields
from bench.models import Size, batch, llama
from bench.run import save

SIZE = Size(hidden=64, intermediate=96, layers=32, heads=4, vocabulary=512, batch=2, tokens=8)
MANY = 8
Timed = Callable[[str, Callable[[], Any]], Any]


def config(library: Any, rank: int) -> Any:
    return library.LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)


def logits(model: Any, size: Size) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=batch(size)).logits


def walk(library: Any, size: Size, folder: Path, timed: Timed) -> None:
    """Each operation once, by `timed(name, operation)`, which returns what the operation does."""
    base, other = llama(size, torch.float32), llama(size, torch.float32)
    model = timed("get_peft_model", lambda: library.get_peft_model(base, config(library, 8)))
    timed("add_adapter", lambda: model.add_adapter("second", config(library, 4)))
    timed("load_adapter", lambda: model.load_adapter(folder, "third"))
    timed("set_adapter", lambda: model.set_adapter("second"))
    timed("save_pretrained", lambda: model.save_pretrained(folder.parent / f"by {library.__name__}"))
    timed("get_peft_model_state_dict", lambda: library.get_peft_model_state_dict(model))
    names, weights = ["default", "second"], [0.5, 0.5]
    timed("add_weighted_adapter", lambda: model.add_weighted_adapter(names, weights, "mean", combination_type="cat"))
    timed("delete_adapter", lambda: model.delete_adapter("mean"))

    def disable() -> None:
        with model.disable_adapter():
            pass

    timed("disable_adapter", disable)
    timed("merge_adapter", model.merge_adapter)
    timed("unmerge_adapter", model.unmerge_adapter)
    timed("merge_and_unload", model.merge_and_unload)
    timed("from_pretrained", lambda: library.PeftModel.from_pretrained(other, folder))
    served = llama(size, torch.float32)
    names = [f"a{i}" for i in range(MANY)]

    def load_many() -> None:
        if hasattr(library, "AdapterBank"):
            library.AdapterBank.from_pretrained(served, dict.fromkeys(names, folder), progress=False)
            return
        model = library.PeftModel.from_pretrained(served, folder, adapter_name=names[0])
        for name in names[1:]:
            model.load_adapter(folder, name)

    timed(f"{MANY} adapters", load_many)


def check(size: Size, folder: Path) -> None:
    """Save an adapter to `folder`, load it by both libraries and compare.

    Raises:
        WrongResultError: the logits differ by more than many layers' bounds.
    """
    import peft

    import peftkern

    made = peftkern.get_peft_model(llama(size, torch.float32), config(peftkern, 8))
    made.save_pretrained(folder)
    want = logits(made.eval(), size)
    for library in (peftkern, peft):
        loaded = library.PeftModel.from_pretrained(llama(size, torch.float32), folder)
        error = relative_error(logits(loaded, size), want.double())
        if not error <= 8 * tolerance(torch.float32, 1024):
            raise WrongResultError(f"an adapter loaded by {library.__name__} differs by {error:.2e}")


def measure(size: Size, rounds: int, threads: int) -> list[dict[str, Any]]:
    """A row for each operation: milliseconds by either library, and the ratio round by round."""
    import peft

    import peftkern

    torch.set_num_threads(threads)
    taken: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(scratch) / "adapter"
        check(size, folder)
        libraries = [("peftkern", peftkern), ("peft", peft)]
        for i in range(rounds + 1):  # the first is a warm-up
            for name, library in libraries if i % 2 else reversed(libraries):

                def timed(operation: str, run: Callable[[], Any], name: str = name, count: bool = i > 0) -> Any:
                    start = time.perf_counter()
                    found = run()
                    seconds = time.perf_counter() - start
                    if count:
                        taken.setdefault(operation, {"peftkern": [], "peft": []})[name].append(seconds)
                    return found

                walk(library, size, folder, timed)
    return [
        {
            "operation": operation,
            **{f"{name}_ms": 1e3 * statistics.median(seconds) for name, seconds in each.items()},
            **ratio_fields("ratio", each["peftkern"], each["peft"]),
            "rounds": rounds,
        }
        for operation, each in taken.items()
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = cpu_parser(__doc__, pairs=5, what="rounds")
    options = parser.parse_args(sys.argv[1:] if argv is None else argv)
    if records.has_no_place(options):
        return 2
    size, rounds = SIZE, options.pairs
    if options.smoke:
        size, rounds = Size(hidden=64, intermediate=96, layers=1, heads=2, vocabulary=128, batch=1, tokens=4), 1
    result = begun("adapters", asdict(size), options.threads)
    result["rows"] = caller(options.smoke)(measure, size, rounds, options.threads)
    for row in result["rows"]:
        times = f"{row['peftkern_ms']:.0f} ms against {row['peft_ms']:.0f} ms"
        spread = f"{row['ratio_p10']:.2f}-{row['ratio_p90']:.2f}"
        print(f"{row['operation']:28s} {row['ratio']:.2f} of PEFT's ({spread}); {times}")
    print(save(result, folder_of(options), "adapters.json"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
