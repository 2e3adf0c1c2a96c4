"""Train the small model that the other examples adapt: a byte-level Llama, on English, from nothing.

    python examples/make_base.py                      # what made examples/base; minutes on two cores

The text is `pydoc_data.topics`, Python's own language reference, so nothing is downloaded. The result is a checkpoint
that transformers loads: config.json, generation_config.json and model.safetensors (fp32, under 3 MB), beside what was
measured (training.json) and a model card.
"""

import argparse
import bz2
import hashlib
import json
import lzma
import platform
import shlex
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from _language import ByteTokens, bits_per_byte, cosine_schedule, next_token_loss, random_batch
from _progress import progress
from _text import HELD_OUT_TOPICS, english
from transformers import LlamaConfig, LlamaForCausalLM

SEQ = 256

CARD = """---
license: other
license_name: psf-2.0
library_name: transformers
pipeline_tag: text-generation
language: en
---

# A byte-level Llama that knows Python's manual

The base model of peftkern's examples: small enough to ship ({megabytes:.1f} MB), real enough that adapting it means
something. {parameters:,} parameters, {layers} layers, hidden size {hidden}. Its tokens are bytes (id = byte), so there
is no tokenizer.

- **Text**: `pydoc_data.topics` of CPython {python}, the part of the Python language reference that `help()` shows:
  {train_bytes:,} bytes after repeated paragraphs are dropped. Copyright (c) 2001 Python Software Foundation; licensed
  under the PSF License Agreement, version 2 (https://docs.python.org/3/license.html).
- **Command**: `{command}`: {steps} steps of {batch} x {seq} bytes, AdamW, cosine schedule, seed {seed};
  {core_minutes:.0f} core-minutes of CPU on {threads} threads, with torch {torch}, transformers {transformers}.
- **Held out**: the topics {topics}
  ({held_out_bytes:,} bytes); none of their paragraphs is in the training text.

Bits per byte on the held-out text (for the compressors: what it adds to the training text's compressed size):

| this model | {names} |
|---|{rules}|
| **{held_out_bits_per_byte:.3f}** | {values} |

It is an example to run, not a model to rely on.
"""


def main(argv: list[str] | None = None) -> dict:
    args = arguments(argv)
    torch.manual_seed(args.seed)
    train_text, held_out_text = english()
    tokens = ByteTokens()
    train_ids, held_out_ids = tokens.encode(train_text), tokens.encode(held_out_text)

    model = LlamaForCausalLM(architecture())
    start = time.process_time()
    train(model, train_ids, args)
    core_minutes = (time.process_time() - start) / 60

    record = {
        "command": shlex.join(["python", "examples/make_base.py", *(sys.argv[1:] if argv is None else argv)]),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": args.steps,
        "batch": args.batch,
        "seq": SEQ,
        "seed": args.seed,
        "core_minutes": round(core_minutes, 1),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "train_bytes": len(train_text),
        "held_out_bytes": len(held_out_text),
        "held_out_sha256": hashlib.sha256(held_out_text).hexdigest(),  # another Python may word its manual otherwise
        "held_out_topics": list(HELD_OUT_TOPICS),
        "train_bits_per_byte": bits_per_byte(model, train_ids[: len(held_out_ids)], len(held_out_text), SEQ),
        "held_out_bits_per_byte": bits_per_byte(model, held_out_ids, len(held_out_text), SEQ),
        "compressors_bits_per_byte": yardsticks(train_text, held_out_text),
    }
    save(model, record, args.output)
    print(f"held-out bits per byte: {record['held_out_bits_per_byte']:.4f}", end="  (")
    print(", ".join(f"{name} {bits:.2f}" for name, bits in record["compressors_bits_per_byte"].items()), end=")\n")
    print(f"saved {args.output}")
    return record


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "base", help="folder to write")
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--batch", type=int, default=8, help="sequences in a step")
    parser.add_argument("--lr", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def architecture() -> LlamaConfig:
    """About 0.64M parameters, 2.5 MB in fp32; the output layer is the embedding."""
    return LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def train(model: LlamaForCausalLM, ids: torch.Tensor, args: argparse.Namespace) -> None:
    """AdamW on random crops of `ids`; weight decay on matrices only."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.99))
    schedule = cosine_schedule(optimizer, args.steps, warmup=min(100, args.steps // 10 + 1))
    generator = torch.Generator().manual_seed(args.seed)
    bar = progress(args.steps, "train")
    for step in bar:
        loss = next_token_loss(model, random_batch(ids, args.batch, SEQ + 1, generator))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            bar.set_postfix_str(f"loss {loss.item():.3f}")


def yardsticks(train_text: bytes, held_out_text: bytes) -> dict[str, float]:
    """Bits per byte that the held-out text adds to the training text's size under general compressors."""
    compressors: dict[str, Callable[[bytes], bytes]] = {
        "gzip -9": lambda text: zlib.compress(text, 9),
        "bzip2 -9": lambda text: bz2.compress(text, 9),
        "xz -9e": lambda text: lzma.compress(text, preset=9 | lzma.PRESET_EXTREME),
    }
    return {
        name: (len(compress(train_text + held_out_text)) - len(compress(train_text))) * 8 / len(held_out_text)
        for name, compress in compressors.items()
    }


def save(model: LlamaForCausalLM, record: dict, output: Path) -> None:
    """Write the checkpoint, the record and the card into `output`."""
    model.save_pretrained(output)
    (output / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    compressors = record["compressors_bits_per_byte"]
    card = CARD.format(
        **record,
        megabytes=(output / "model.safetensors").stat().st_size / 1e6,
        layers=model.config.num_hidden_layers,
        hidden=model.config.hidden_size,
        topics=", ".join(f'"{name}"' for name in record["held_out_topics"]),
        names=" | ".join(compressors),
        rules="|".join("---" for _ in compressors),
        values=" | ".join(f"{bits:.3f}" for bits in compressors.values()),
    )
    (output / "README.md").write_text(card)


if __name__ == "__main__":
    main()
