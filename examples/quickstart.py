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
import time
import warnings
from pathlib import Path

import torch
from _language import (
    ByteTokens,
    TokenizerTokens,
    bits_per_byte,
    continuation,
    cosine_schedule,
    evaluating,
    next_token_loss,
    random_batch,
    tokens_of,
)
from _progress import progress
from _text import python_sources
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
    plot(result, args.output)
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


def train(model: torch.nn.Module, ids: torch.Tensor, args: argparse.Namespace) -> tuple[list[float], float]:
    """An ordinary training loop. Returns every step's loss, and tokens a second (the first step, a warm-up, aside)."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr, weight_decay=0.0)
    schedule = cosine_schedule(optimizer, args.steps, warmup=min(20, args.steps // 10 + 1))
    generator = torch.Generator().manual_seed(args.seed)
    if ids.is_cuda:
        torch.cuda.reset_peak_memory_stats(ids.device)
    losses: list[torch.Tensor] = []  # on the device: reading each would make the host wait for the step
    start = time.perf_counter()
    model.train()
    bar = progress(args.steps, "train")
    for step in bar:
        loss = next_token_loss(model, random_batch(ids, args.batch, args.seq + 1, generator))
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if step % 10 == 0:
            bar.set_postfix_str(f"loss {loss.item():.3f}")
        if step == 0:
            start = time.perf_counter()
    read = torch.stack(losses).tolist()
    seconds = time.perf_counter() - start
    return read, (args.steps - 1) * args.batch * args.seq / seconds


def compare(model: torch.nn.Module, ids: torch.Tensor, args: argparse.Namespace) -> dict[str, dict]:
    """The trained model's outputs against the adapter loaded again and against the merged model.

    Two outputs agree if the root mean square of their difference is within 8 roundings of the dtype, relative to the
    outputs' own: a float32 model of many layers collects that much from another order of additions. The adapter's own
    effect is listed beside, so that an adapter that loads as nothing cannot pass for agreement.
    """
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
    bound = 8 * torch.finfo(getattr(torch, args.dtype)).eps
    checks = {}
    for name, got in others.items():
        relative = ((got - expected).square().mean() / expected.square().mean()).sqrt().item()
        checks[name] = {
            "max_abs_diff": (got - expected).abs().max().item(),
            "relative_rms_diff": relative,
            "bound": bound,
            "adapter_effect": effect,
            "ok": relative <= bound,
        }
    return checks


@torch.no_grad()
def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """fp64 on the CPU, [batch, seq, vocabulary]."""
    with evaluating(model):
        return model(input_ids=ids).logits.double().cpu()


def sample(model: torch.nn.Module, tokens: ByteTokens | TokenizerTokens, args: argparse.Namespace) -> str:
    return continuation(model, tokens, PROMPT, length=200, seed=args.seed)


def peak_memory(device: str) -> float:
    """Megabytes: what the GPU's allocator held at most, or on a CPU what the whole process did."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6  # bytes on macOS, KiB elsewhere


def device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device}, {torch.get_num_threads()} threads"


def report(result: dict, sample_before: str, sample_after: str) -> None:
    for title, text in (("before", sample_before), ("after", sample_after)):
        print(f"\n--- a sample {title}")
        print("\n".join(f"  | {line}" for line in text.splitlines()[:10]))
    print("\n--- the adapter, saved and loaded again")
    for name, check in result["checks"].items():
        verdict = "equal" if check["ok"] else "DIFFERENT"
        print(
            f"  {name:<21} {verdict}: logits differ by at most {check['max_abs_diff']:.1e} "
            f"(the adapter moves them by up to {check['adapter_effect']:.1f})"
        )
    print("\n--- result")
    print(f"  held-out bits per byte  {result['bits_per_byte_before']:.3f} -> {result['bits_per_byte_after']:.3f}")
    print(f"  tokens a second         {result['tokens_a_second']:,.0f}  ({result['device']}, {result['dtype']})")
    print(f"  peak memory             {result['peak_megabytes']:,.0f} MB")


def plot(result: dict, output: Path) -> None:
    """Draw the loss curve to `output/loss.png`, where matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        print("  loss curve              not drawn: matplotlib is not installed")
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    losses = result["losses"]
    means = [sum(losses[max(0, i - 19) : i + 1]) / len(losses[max(0, i - 19) : i + 1]) for i in range(len(losses))]
    axes.plot(losses, color="tab:blue", alpha=0.3, linewidth=0.8, label="each step")
    axes.plot(means, color="tab:blue", label="mean of 20 steps")
    axes.legend()
    axes.set_xlabel("step")
    axes.set_ylabel("training loss (nats a token)")
    axes.set_title(
        f"LoRA r {result['r']}: held-out bits per byte "
        f"{result['bits_per_byte_before']:.2f} -> {result['bits_per_byte_after']:.2f}"
    )
    figure.tight_layout()
    figure.savefig(output / "loss.png", dpi=120)
    plt.close(figure)
    print(f"  loss curve              {output / 'loss.png'}")


if __name__ == "__main__":
    sys.exit(main())
