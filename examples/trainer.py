"""peftkern under transformers' Trainer: train, stop at a checkpoint, resume, and end where an unbroken run ends.

    python examples/trainer.py                        # about a minute on one core

Needs `pip install 'peftkern[peft]'`: Trainer knows adapter models by peft's type, and saves the whole of any other.
"""

import argparse
import importlib.util
import json
from pathlib import Path

import torch
from _language import ByteTokens, bits_per_byte
from _text import python_sources
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import peftkern

BASE = Path(__file__).parent / "base"
SEQ = 256


def adapted_base() -> torch.nn.Module:
    """The shipped base, LoRA on every linear layer. The seed makes every call's adapters start alike."""
    torch.manual_seed(0)
    config = peftkern.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=8, lora_alpha=16)
    return peftkern.get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), config)


def trainer_for(model: torch.nn.Module, dataset: list[dict], folder: Path, steps: int) -> Trainer:
    """A Trainer for `steps` steps that saves a checkpoint half way."""
    settings = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=steps // 2,
        per_device_train_batch_size=8,
        learning_rate=5e-3,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 10,
        logging_steps=10,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        seed=0,
    )
    return Trainer(model=model, args=settings, train_dataset=dataset)


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--output", type=Path, default=Path("outputs/trainer"))
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    args = parser.parse_args(argv)
    if importlib.util.find_spec("peft") is None:
        raise SystemExit("Trainer saves an adapter alone only where peft is installed: pip install 'peftkern[peft]'")

    train_text, held_out_text = python_sources()
    held_out_text = held_out_text[:65536]
    held_out_ids = ByteTokens().encode(held_out_text)
    sequences = ByteTokens().encode(train_text).unfold(0, SEQ, SEQ)  # [sequences, SEQ]
    dataset = [{"input_ids": ids, "labels": ids} for ids in sequences]

    model = adapted_base()
    model.print_trainable_parameters()
    before = bits_per_byte(model, held_out_ids.to(model.device), len(held_out_text), SEQ)
    trainer_for(model, dataset, args.output, args.steps).train()
    after = bits_per_byte(model, held_out_ids.to(model.device), len(held_out_text), SEQ)

    # As after a crash: a fresh model, and the checkpoint of the half-way step.
    checkpoint = args.output / f"checkpoint-{args.steps // 2}"
    resumed = adapted_base()
    trainer_for(resumed, dataset, args.output, args.steps).train(resume_from_checkpoint=str(checkpoint))

    expected = dict(model.named_parameters())
    difference = max((p - expected[name]).abs().max().item() for name, p in resumed.named_parameters())
    result = {
        "bits_per_byte_before": before,
        "bits_per_byte_after": after,
        "checkpoint_files": sorted(file.name for file in checkpoint.iterdir()),
        "largest_difference_after_resuming": difference,
    }
    print(f"held-out bits per byte: {before:.3f} -> {after:.3f}")
    print(f"{checkpoint} holds {', '.join(result['checkpoint_files'])}")
    print(f"resumed from it, the weights end within {difference:.1e} of the unbroken run's")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    main()
