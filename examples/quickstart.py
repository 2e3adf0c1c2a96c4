"""peftkern in one sitting: adapt a language model to other text with LoRA, save the adapter, load it again, compare.

    python examples/quickstart.py                                                     # two CPU cores, about a minute
    python examples/quickstart.py --model Qwen/Qwen3-0.6B --device cuda --dtype bfloat16

The default base is the byte-level Llama in examples/base, which was trained on English (examples/make_base.py). It is
adapted to the sources of Python's standard library and measured on source files that it never saw. The exit code is 1
if an adapter that was saved and loaded again, by peftkern or by Hugging Face PEFT, or merged into the base, gives
other outputs than the model that was trained.
"""

import argparse
import importlib.util
import json
import sys
import warnings
from pathlib import Path

import torch
from _language import (
    ByteTokens,
    TokenizerTokens,
    bits_per_byte,
    continuation,
    tokens_of,
)
from _text import python_sources
from _training import agreement, device_name, logits, peak_memory, plot_loss, report_checks, report_sample, train
from transformers import AutoModelForCausalLM

import peftkern

BASE = Path(__file__).parent / "base"
PROMPT = "class Reader:\n    def "


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    torch.manual_seed(args.seed)
    model = load_base(args)
    tokens = tokens_of(args.model, model.config.vocab_size)
    train_text, held_out_text = python_sources()
    train_ids, held_out_ids = (tokens.encode(text).to(args.device) for text in (train_text, held_out_text))

    def held_out_bits(model: torch.nn.Module) -> float:
        return bits_per_byte(model, held_out_ids, len(held_out_text), args.seq, args.batch, args.windows)

    print(f"base: {args.model} on {args.device}, {args.dtype}")
    print(f"text: {len(train_text):,} bytes of Python to learn, {len(held_out_text):,} held out")
    bits_before = held_out_bits(model)
    sample_before = sample(model, tokens, args)

    model = peftkern.get_peft_model(
        model,
        peftkern.LoraConfig(
            task_type="CAUSAL_LM",
            target_modules="all-linear",
            r=args.r,
            lora_alpha=2 * args.r,
            lora_dropout=args.dropout,
        ),
    )
    model.print_trainable_parameters()
    explanation = peftkern.explain(model, tokens=args.batch * args.seq)
    print(f"paths: {explanation.summary()}")
    losses, tokens_a_second = train(model, train_ids, args)
    peak_megabytes = peak_memory(args.device)
    bits_after = held_out_bits(model)
    sample_after = sample(model, tokens, args)

    model.save_pretrained(args.output / "adapter")
    checks = compare(model, held_out_ids[: args.seq][None], args)

    trainable, total = model.get_nb_trainable_parameters()
    result = {
        "model": str(args.model),
        "device": device_name(args.device),
        "dtype": args.dtype,
        "steps": args.steps,
        "seq": args.seq,
        "batch": args.batch,
        "r": args.r,
        "bits_per_byte_before": bits_before,
        "bits_per_byte_after": bits_after,
        "tokens_a_second": tokens_a_second,
        "peak_megabytes": peak_megabytes,
        "trainable_parameters": trainable,
        "all_parameters": total,
        "paths": dict(explanation.paths),
        "checks": checks,
        "losses": losses,
    }
    report(result, sample_before, sample_after)
    title = f"LoRA r {args.r}: held-out bits per byte {bits_before:.2f} -> {bits_after:.2f}"
    plot_loss(losses, title, args.output)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if all(check["ok"] for check in checks.values()) else 1


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(BASE), help="a causal language model: a folder or a Hub id")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seq", type=int, default=256, help="tokens in a sequence")
    parser.add_argument("--batch", type=int, default=8, help="sequences in a step")
    parser.add_argument("--r", type=int, default=16, help="rank of the adapters")
    parser.add_argument("--dropout", type=float, default=0.0, help="dropout of the adapters' input")
    parser.add_argument("--lr", type=float, help="highest learning rate (default: 5e-3 for the small base, else 2e-4)")
    parser.add_argument("--windows", type=int, default=256, help="held-out windows to score")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/quickstart"), help="for the adapter and the plot")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    args = parser.parse_args(argv)
    if args.lr is None:
        args.lr = 5e-3 if args.model == str(BASE) else 2e-4
    return args


def load_base(args: argparse.Namespace) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).to(args.device)


def compare(model: torch.nn.Module, ids: torch.Tensor, args: argparse.Namespace) -> dict[str, dict]:
    """`agreement` of the trained model with the adapter loaded again and with the merged model."""
    adapter = args.output / "adapter"
    expected = logits(model, ids)
    with model.disable_adapter():
        effect = (logits(model, ids) - expected).abs().max().item()
    reloaded = peftkern.PeftModel.from_pretrained(load_base(args), adapter)
    others = {"reloaded by peftkern": logits(reloaded, ids)}
    others["merged"] = logits(reloaded.merge_and_unload(), ids)
    if importlib.util.find_spec("peft"):
        import peft

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 reads a name that transformers 5 deprecates
            others["reloaded by PEFT"] = logits(peft.PeftModel.from_pretrained(load_base(args), adapter), ids)
    return {name: agreement(got, expected, effect, args.dtype) for name, got in others.items()}


def sample(model: torch.nn.Module, tokens: ByteTokens | TokenizerTokens, args: argparse.Namespace) -> str:
    return continuation(model, tokens, PROMPT, length=200, seed=args.seed)


def report(result: dict, sample_before: str, sample_after: str) -> None:
    report_sample("before", sample_before)
    report_sample("after", sample_after)
    report_checks(result["checks"])
    print("\n--- result")
    print(f"  held-out bits per byte  {result['bits_per_byte_before']:.3f} -> {result['bits_per_byte_after']:.3f}")
    print(f"  tokens a second         {result['tokens_a_second']:,.0f}  ({result['device']}, {result['dtype']})")
    print(f"  peak memory             {result['peak_megabytes']:,.0f} MB")


if __name__ == "__main__":
    sys.exit(main())
