"""peftkern in your own training loop: no configs, no transformers, five lines.

    python examples/custom_loop.py                    # a minute and a half on one core

A plain network of `nn.Linear` layers learns to predict the next byte of English from the 16 bytes before it, and is
then fine-tuned on Python source. The five lines marked `# LoRA 1` to `# LoRA 5` make that fine-tuning LoRA, the one
marked `# LoRA:` saves what was learned in PEFT's files and loads it into a fresh network; without them the same file
fine-tunes every weight. The exit code is 1 if the fresh network gives other outputs.
"""

import argparse
import copy
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from _language import ByteTokens, cosine_schedule, evaluating, random_batch
from _progress import progress
from _text import english, python_sources
from torch import nn

from peftkern.nn import LoraLinear, load_adapter, save_adapter  # LoRA 1: the layer, and what keeps it

CONTEXT = 16  # bytes that the network sees
BATCH = 512


def network(width: int) -> nn.Sequential:
    """bytes [M, CONTEXT] -> logits of the next byte [M, 256]."""
    return nn.Sequential(
        nn.Embedding(256, 32),
        nn.Flatten(),
        nn.Linear(CONTEXT * 32, width),
        nn.GELU(),
        nn.Linear(width, width),
        nn.GELU(),
        nn.Linear(width, 256),
    )


def adapt(model: nn.Sequential) -> nn.Sequential:
    """An adapter in each linear layer."""
    model.requires_grad_(False)  # LoRA 2: the base stays as it is
    for i, layer in enumerate(model):  # LoRA 3
        if isinstance(layer, nn.Linear):  # LoRA 4
            model[i] = LoraLinear.from_linear(layer, r=16, lora_alpha=32)  # LoRA 5: its place in the network
    return model


def fit(model: nn.Sequential, ids: torch.Tensor, steps: int, lr: float, desc: str) -> float:
    """The training loop, as for any model. Returns bytes a second."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.01)
    schedule = cosine_schedule(optimizer, steps, warmup=steps // 20 + 1)
    generator = torch.Generator().manual_seed(0)
    start = time.perf_counter()
    bar = progress(steps, desc)
    for step in bar:
        crops = random_batch(ids, BATCH, CONTEXT + 1, generator)
        loss = F.cross_entropy(model(crops[:, :-1]), crops[:, -1])
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            bar.set_postfix_str(f"loss {loss.item():.3f}")
    return steps * BATCH / (time.perf_counter() - start)


@torch.no_grad()
def bits_per_byte(model: nn.Sequential, ids: torch.Tensor) -> float:
    """Over 32,768 bytes, evenly spaced in `ids`."""
    crops = ids.unfold(0, CONTEXT + 1, 1)
    crops = crops[:: max(1, len(crops) // 32768)]
    with evaluating(model):
        return F.cross_entropy(model(crops[:, :-1]), crops[:, -1]).item() / math.log(2)


@torch.no_grad()
def save_and_load(model: nn.Sequential, pretrained: nn.Sequential, ids: torch.Tensor, folder: Path) -> None:
    """Save the adapters alone, load them into `pretrained`, which has yet to learn, and compare outputs."""
    save_adapter(model, folder)
    fresh = adapt(pretrained)
    load_adapter(fresh, folder)
    crops = ids.unfold(0, CONTEXT, CONTEXT)[:BATCH]
    with evaluating(model), evaluating(fresh):
        if not torch.equal(fresh(crops), model(crops)):
            raise SystemExit(f"the adapters in {folder}, loaded again, give other outputs")
    print(f"adapters saved in {folder} in PEFT's format; a fresh network with them gives equal outputs")


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600, help="of each of the two trainings")
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--output", type=Path, default=Path("outputs/custom_loop"), help="for the adapter")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    encode = ByteTokens().encode
    english_ids = encode(english()[0])
    python_ids, held_out_ids = map(encode, python_sources())

    model = network(args.width)
    fit(model, english_ids, args.steps, lr=2e-3, desc="pretrain on English")
    before = bits_per_byte(model, held_out_ids)

    pretrained = copy.deepcopy(model)
    adapt(model)

    speed = fit(model, python_ids, args.steps, lr=2e-3, desc="adapt to Python")
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    result = {
        "bits_per_byte_before": before,
        "bits_per_byte_after": bits_per_byte(model, held_out_ids),
        "trainable_parameters": trainable,
        "all_parameters": sum(p.numel() for p in model.parameters()),
        "bytes_a_second": speed,
    }
    print(f"trained {trainable:,} of {result['all_parameters']:,} parameters at {speed:,.0f} bytes a second")
    print(f"held-out bits per byte of Python: {before:.3f} -> {result['bits_per_byte_after']:.3f}")
    save_and_load(model, pretrained, held_out_ids, args.output)  # LoRA: its files
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    main()
