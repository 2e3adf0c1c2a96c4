"""transformers' Trainer takes a peftkern model for what it is: trains it like PEFT's, saves adapter files, resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import peftkern
from tiny_models import VOCAB, ids, randomize, tiny_llama

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


class Tokens(torch.utils.data.Dataset):
    """Rows of random tokens with something to learn: only eight of the vocabulary's tokens occur."""

    def __init__(self, rows: int = 64, length: int = 16) -> None:
        self.rows = ids(rows, length, seed=5) % 8 + 1

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def trainer(model: Any, folder: Path, steps: int = 30, **kwargs: Any) -> Any:
    arguments = dict(per_device_train_batch_size=4, max_steps=steps, learning_rate=3e-3, logging_steps=1, seed=0)
    arguments |= dict(report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, lr_scheduler_type="linear")
    args = transformers.TrainingArguments(str(folder), **(arguments | kwargs))
    return transformers.Trainer(model=model, args=args, train_dataset=Tokens(), eval_dataset=Tokens(8))


def losses(made: Any) -> list[float]:
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def adapted(library: Any, **fields: Any) -> Any:
    config = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | fields
    model = library.get_peft_model(tiny_llama(), library.LoraConfig(**config))
    randomize(model, ("lora_A",))
    return model


@pytest.mark.parametrize("use_dora", [False, True])
def test_training_curve_equals_that_of_peft(tmp_path, use_dora):
    """Would catch: a gradient, a scaling or an optimizer group that differs (fp32, no dropout, 30 steps, 2e-3)."""
    curves, ends = [], []
    for library in (peftkern, peft):
        model = adapted(library, use_dora=use_dora)
        made = trainer(model, tmp_path)
        made.train()
        curves.append(losses(made))
        ends.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
    assert len(curves[0]) == len(curves[1]) == 30
    assert curves[1][0] - curves[1][-1] > 0.3, "nothing was learned, so the curves say little"
    assert max(abs(a - b) for a, b in zip(*curves, strict=True)) < 2e-3, curves
    for name, value in ends[1].items():
        torch.testing.assert_close(ends[0][name], value, rtol=0, atol=2e-3)


def test_checkpoints_are_adapter_files_and_training_resumes(tmp_path):
    """Would catch: whole models in checkpoints; a resumed run that starts from random adapters again."""
    whole = trainer(adapted(peftkern), tmp_path / "whole", steps=12)
    whole.train()
    first = trainer(adapted(peftkern), tmp_path / "run", steps=12, save_strategy="steps", save_steps=6)
    first.train()
    checkpoint = tmp_path / "run" / "checkpoint-6"
    names = {f.name for f in checkpoint.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "optimizer.pt"} <= names
    assert not {"model.safetensors", "pytorch_model.bin"} & names
    again = trainer(adapted(peftkern), tmp_path / "run", steps=12)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert again.state.global_step == 12
    assert losses(again)[-6:] == pytest.approx(losses(whole)[-6:], abs=1e-5)
    for mine, other in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-6)
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), checkpoint)
    with torch.no_grad():
        assert torch.isfinite(loaded(input_ids=ids()).logits).all()


def test_a_checkpoint_of_several_adapters_resumes(tmp_path):
    """Would catch: adapters in subfolders of a checkpoint that are not found, or another one active afterwards."""

    def two() -> Any:
        model = adapted(peftkern)
        model.add_adapter("second", peftkern.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        randomize(model, ("lora_A",))
        model.set_adapter("second")
        return model

    first = trainer(two(), tmp_path, steps=6, save_strategy="steps", save_steps=3)
    first.train()
    assert (tmp_path / "checkpoint-3" / "second" / "adapter_model.safetensors").exists()
    again = trainer(two(), tmp_path, steps=6)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again.model.active_adapters == ["second"]
    assert losses(again)[-3:] == pytest.approx(losses(first)[-3:], abs=1e-5)


def test_best_model_is_loaded_at_the_end(tmp_path):
    """Would catch: load_adapter over an adapter that is there already."""
    arguments = dict(save_strategy="steps", save_steps=2, load_best_model_at_end=True)
    arguments |= dict(eval_strategy="steps", eval_steps=2)
    made = trainer(adapted(peftkern), tmp_path, steps=4, **arguments)
    made.train()
    best = peftkern.PeftModel.from_pretrained(tiny_llama(), made.state.best_model_checkpoint)
    with torch.no_grad():
        want = best(input_ids=ids()).logits
        torch.testing.assert_close(made.model.eval()(input_ids=ids()).logits, want)


def test_gradient_checkpointing_in_trainer(tmp_path):
    """Would catch: no gradients, or other numbers, when Trainer switches checkpointing on after the wrapping."""
    curves = []
    for on in (False, True):
        made = trainer(adapted(peftkern), tmp_path, steps=4, gradient_checkpointing=on)
        made.train()
        curves.append(losses(made))
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)


def test_a_quantized_base_is_accepted(tmp_path):
    """Would catch: Trainer's refusal of a quantized model without adapters that it knows of."""
    from transformers.trainer_utils import validate_quantization_for_training

    model = adapted(peftkern)
    base = model.get_base_model()
    base.is_quantized = True
    base.hf_quantizer = type("Quantizer", (), {"is_trainable": True, "is_qat_trainable": False})()
    validate_quantization_for_training(model)
    with pytest.raises(ValueError, match="purely quantized"):
        validate_quantization_for_training(base)


def test_trl_sft_trainer_takes_the_model(tmp_path):
    """Would catch: a check in TRL that a peftkern model does not pass."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(VOCAB - 3)} | {"<pad>": VOCAB - 3, "<eos>": VOCAB - 2, "<unk>": VOCAB - 1}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    data = datasets.Dataset.from_dict({"text": ["w1 w2 w3 w4 w5"] * 8})
    options = {"max_steps": 3, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True, "bf16": False}
    args = trl.SFTConfig(str(tmp_path), **options)
    made = trl.SFTTrainer(model=adapted(peftkern), args=args, train_dataset=data, processing_class=tokenizer)
    before = {n: p.detach().clone() for n, p in made.model.named_parameters() if p.requires_grad}
    made.train()
    assert any(not torch.equal(p, before[n]) for n, p in made.model.named_parameters() if n in before)
    made.save_model(str(tmp_path / "end"))
    content = json.loads((tmp_path / "end" / "adapter_config.json").read_text())
    assert content["peft_type"] == "LORA" and not (tmp_path / "end" / "model.safetensors").exists()
