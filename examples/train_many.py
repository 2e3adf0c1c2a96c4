"""Four adapters on four texts, trained together in one loop over one frozen base, and each alone for comparison.

    python examples/train_many.py                    # two minutes on one core

Each row of a batch belongs to one text and goes through that text's adapter; the base runs once for all of them. Each
adapter gets the gradients that its own rows give it, so its curve of held-out bits per byte is that of a run by
itself, which the second half of the program makes. The exit code is 1 if the curves differ.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from _language import ByteTokens, bits_per_byte, cosine_schedule, random_batch
from _progress import progress
from _text import package_sources
from transformers import AutoModelForCausalLM

import peftkern

BASE = Path(__file__).parent / "base"
TEXTS = ("asyncio", "email", "encodings", "unittest")  # packages of the standard library, of four kinds
# Products of several rows are added in another order than those of one text alone; training carries that on.
TOLERANCE = 0.01  # bits a byte


class WithAdapter(torch.nn.Module):
    """The bank's model with one adapter for every row, as `bits_per_byte` calls it."""

    def __init__(self, bank: peftkern.AdapterBank, name: str):
        super().__init__()
        self.model, self._bank, self._name = bank.model, bank, name

    def forward(self, input_ids: torch.Tensor):
        with self._bank.batch([self._name] * len(input_ids)):
            return self.model(input_ids=input_ids)


def train(
    bank: peftkern.AdapterBank,
    names: list[str],
    texts: dict[str, tuple[torch.Tensor, torch.Tensor]],
    args: argparse.Namespace,
    desc: str,
) -> tuple[dict[str, list[float]], float]:
    """Train these adapters in one loop: each one's held-out bits per byte along the way, and the seconds of the steps.

    Every adapter sees the same crops of its text whichever others are trained beside it.
    """
    parameters = [p for name in names for p in bank.parameters(name)]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)
    schedule = cosine_schedule(optimizer, args.steps, warmup=min(20, args.steps // 10 + 1))
    generators = {name: torch.Generator().manual_seed(args.seed) for name in names}
    rows = [name for name in names for _ in range(args.rows)]  # whose each row of the batch is
    curves: dict[str, list[float]] = {name: [] for name in names}
    seconds = 0.0
    bar = progress(args.steps, desc)
    for step in bar:
        start = time.perf_counter()
        crops = [random_batch(texts[name][0], args.rows, args.seq, generators[name]) for name in names]
        ids = torch.cat(crops)
        with bank.batch(rows):
            logits = bank.model(input_ids=ids).logits
        losses = peftkern.per_adapter_loss(logits, ids, rows)
        sum(losses.values()).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seconds += time.perf_counter() - start
        if step % 10 == 0:
            bar.set_postfix_str(" ".join(f"{loss.item():.2f}" for loss in losses.values()))
        if (step + 1) % max(1, args.steps // args.points) == 0:
            for name in names:
                curves[name].append(held_out_bits(bank, name, texts[name][1], args))
    return curves, seconds


def held_out_bits(bank: peftkern.AdapterBank, name: str, ids: torch.Tensor, args: argparse.Namespace) -> float:
    return bits_per_byte(WithAdapter(bank, name), ids, len(ids), args.seq, windows=args.windows)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    torch.manual_seed(args.seed)
    encode = ByteTokens().encode
    texts = {name: tuple(map(encode, package_sources(name))) for name in TEXTS}
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    bank = peftkern.AdapterBank(base, slots=len(TEXTS), max_rank=args.r, target_modules="all-linear")
    for name in TEXTS:
        bank.add(name)
    print(f"paths: {peftkern.explain(bank.model, len(TEXTS) * args.rows * args.seq, mixed=True).summary()}")
    before = {name: held_out_bits(bank, name, texts[name][1], args) for name in TEXTS}
    start = {name: {key: t.clone() for key, t in bank.state_dict(name).items()} for name in TEXTS}

    together, seconds_together = train(bank, list(TEXTS), texts, args, "together")
    for name in TEXTS:
        bank.save(name, args.output / name)
        bank.load_state_dict(name, start[name])
    apart: dict[str, list[float]] = {}
    seconds_apart = 0.0
    for name in TEXTS:
        curve, seconds = train(bank, [name], texts, args, f"{name} alone")
        apart |= curve
        seconds_apart += seconds

    difference = max(abs(a - b) for name in TEXTS for a, b in zip(together[name], apart[name], strict=True))
    result = {
        "before": before,
        "together": together,
        "apart": apart,
        "seconds_together": seconds_together,
        "seconds_apart": seconds_apart,
        "largest_difference": difference,
        "ok": difference <= TOLERANCE,
    }
    report(result, args)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if result["ok"] else 1


def report(result: dict, args: argparse.Namespace) -> None:
    print("\n--- held-out bits per byte: before, then along the way (together / alone)")
    for name in TEXTS:
        pairs = zip(result["together"][name], result["apart"][name], strict=True)
        curve = "  ".join(f"{together:.3f}/{alone:.3f}" for together, alone in pairs)
        print(f"  {name:<10} {result['before'][name]:.3f}   {curve}")
    verdict = "equal" if result["ok"] else "DIFFERENT"
    print(f"  {verdict}: they differ by at most {result['largest_difference']:.4f} (allowed {TOLERANCE})")
    print("\n--- result")
    ratio = result["seconds_apart"] / result["seconds_together"]
    print(f"  four adapters together  {result['seconds_together']:.1f} s")
    print(f"  four runs alone         {result['seconds_apart']:.1f} s, {ratio:.2f} times as long")
    print(f"  adapters saved          {args.output}/NAME, in PEFT's format")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="of each run")
    parser.add_argument("--seq", type=int, default=128, help="tokens in a row")
    parser.add_argument("--rows", type=int, default=2, help="rows of each text in a step")
    parser.add_argument("--r", type=int, default=16, help="rank of the adapters")
    parser.add_argument("--lr", type=float, default=5e-3, help="highest learning rate")
    parser.add_argument("--points", type=int, default=4, help="points of a curve")
    parser.add_argument("--windows", type=int, default=64, help="held-out windows to score at each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/train_many"), help="for the adapters")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
