"""Files of virtual tokens travel both ways between peftkern and PEFT; Trainer saves them and goes on from them."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import peftkern
from peftkern import AdapterFileError, PeftModel
from prompt_data import COMPUTED, METHODS, TOKENS, bart, bert, config, prompted, quiet, t5
from test_trainer import losses, trainer
from tiny_models import fingerprint, ids, randomize, tiny_llama

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEYS = {"PromptTuningConfig": 17, "PromptEncoderConfig": 17, "PrefixTuningConfig": 16}


def classifier() -> nn.Module:
    return tiny_llama(cls="LlamaForSequenceClassification")


# name -> (method, model, task): every method, and tasks with heads or with two parts
CASES: dict[str, tuple[str, Any, str]] = {name: (name, tiny_llama, "CAUSAL_LM") for name in METHODS}
CASES |= {"classifier": ("prompt", classifier, "SEQ_CLS"), "tagger": ("prefix", bert, "SEQ_CLS")}
CASES |= {"t5": ("prompt", t5, "SEQ_2_SEQ_LM"), "bart": ("prefix", bart, "SEQ_2_SEQ_LM")}


def adapted(case: str, library: Any, **fields: Any) -> Any:
    """A model with random virtual tokens and heads, the same for both libraries."""
    method, model, task = CASES[case]
    made = prompted(library, method, model, task, **fields)
    randomize(made, ("prompt_encoder", "modules_to_save"))
    return made


def output(model: Any) -> torch.Tensor:
    kwargs = {"decoder_input_ids": ids(length=4)} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return quiet(model, input_ids=ids(), **kwargs).logits


def saved(folder: Path, case: str = "prompt", library: Any = peftkern, **fields: Any) -> Path:
    quiet(adapted(case, library, **fields).save_pretrained, folder)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_files_are_those_of_peft(tmp_path, case):
    """Would catch: another key, dtype, value or configuration field than PEFT's."""
    ours, theirs = saved(tmp_path / "ours", case), saved(tmp_path / "theirs", case, peft)
    mine, other = load_file(ours / WEIGHTS), load_file(theirs / WEIGHTS)
    assert set(mine) == set(other) and "prompt_embeddings" in mine
    for name, value in other.items():
        assert mine[name].dtype == value.dtype and torch.equal(mine[name], value), name
    content, expected = (json.loads((folder / CONFIG).read_text()) for folder in (ours, theirs))
    if expected["modules_to_save"]:  # PEFT appends the heads each time that it meets the configuration
        expected["modules_to_save"] = list(dict.fromkeys(expected["modules_to_save"]))
    else:
        assert (ours / CONFIG).read_bytes() == (theirs / CONFIG).read_bytes()
    assert content == expected and len(content) == KEYS[METHODS[CASES[case][0]][0]]


@pytest.mark.parametrize("case", CASES)
def test_files_load_both_ways(tmp_path, case):
    """Would catch: a file that means something else in the other library, or is warned about."""
    method, model, _ = CASES[case]
    for folder, maker, reader in ((tmp_path / "a", peftkern, peft), (tmp_path / "b", peft, peftkern)):
        made = adapted(case, maker)
        quiet(made.save_pretrained, folder)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            read = reader.PeftModel.from_pretrained(model(), folder)
        torch.testing.assert_close(output(read), output(made), rtol=1e-5, atol=1e-5)
        assert type(read).__name__ == type(made).__name__ and not read.training
    with read.disable_adapter():
        assert torch.equal(output(read), output(model()))
    assert not any(p.requires_grad for p in read.parameters()), "PEFT leaves what was read for inference trainable"
    assert [name for name, _ in read.prompt_encoder.named_parameters()] == ["default.embedding.weight"]
    quiet(read.save_pretrained, tmp_path / "again")
    first, again = load_file(tmp_path / "b" / WEIGHTS), load_file(tmp_path / "again" / WEIGHTS)
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)


def test_several_adapters_are_saved_and_loaded(tmp_path):
    """Would catch: an adapter in the folder of another, or a loaded one that becomes active."""
    model = adapted("prompt", peftkern)
    first = output(model)
    model.add_adapter("second", config(peftkern, "prompt", num_virtual_tokens=3))
    randomize(model, ("second",), seed=7)
    model.set_adapter("second")
    second = output(model)
    quiet(model.save_pretrained, tmp_path)
    assert load_file(tmp_path / "second" / WEIGHTS)["prompt_embeddings"].shape == (3, 64)
    for library in (peftkern, peft):
        read = library.PeftModel.from_pretrained(tiny_llama(), tmp_path)
        read.load_adapter(tmp_path / "second", "other")
        torch.testing.assert_close(output(read), first, rtol=1e-5, atol=1e-5)
        read.set_adapter("other")
        torch.testing.assert_close(output(read), second, rtol=1e-5, atol=1e-5)


def test_auto_classes(tmp_path):
    """Would catch: a base model that is not found, or an adapter that another class is made for."""
    tiny_llama().save_pretrained(tmp_path / "base")
    base = type(tiny_llama()).from_pretrained(tmp_path / "base")
    model = prompted(peftkern, "mlp", lambda: base)
    quiet(model.save_pretrained, tmp_path / "adapter")
    for cls in (peftkern.AutoPeftModelForCausalLM, peft.AutoPeftModelForCausalLM):
        read = cls.from_pretrained(tmp_path / "adapter")
        torch.testing.assert_close(output(read), output(model), rtol=1e-5, atol=1e-5)
    assert peftkern.PeftConfig.from_pretrained(tmp_path / "adapter").token_dim == 64


@pytest.mark.parametrize("case", ["prompt", "classifier", "prefix"])
def test_state_dicts_round_trip(case):
    """Would catch: values that are not put back; functions of PEFT's that do not understand the model."""
    made = adapted(case, peftkern)
    state = {name: value.clone() for name, value in peftkern.get_peft_model_state_dict(made).items()}
    theirs = peft.get_peft_model_state_dict(made)
    assert state.keys() == theirs.keys() and all(torch.equal(state[name], theirs[name]) for name in state)
    for setter in (peftkern.set_peft_model_state_dict, peft.set_peft_model_state_dict):
        other = prompted(peftkern, *CASES[case])
        quiet(setter, other, state)
        torch.testing.assert_close(output(other), output(made), rtol=1e-5, atol=1e-5)
    base = peftkern.get_base_model_state_dict(made)
    assert base.keys() == CASES[case][1]().state_dict().keys()


def test_dropout_of_an_encoder_is_not_saved(tmp_path):
    """Would catch: a checkpoint of an LSTM in training whose tokens are dropped at random, as PEFT saves them."""
    made = adapted("lstm", peftkern, encoder_dropout=0.5)
    wanted = made.get_prompt_embedding_to_save("default")
    made.train()
    quiet(made.save_pretrained, tmp_path)
    assert torch.equal(load_file(tmp_path / WEIGHTS)["prompt_embeddings"], wanted) and made.training
    assert made.prompt_encoder["default"].lstm_head.training


def damage(folder: Path, how: str) -> None:
    """Spoil a good adapter of prompt tuning."""
    tensors = load_file(folder / WEIGHTS)
    content = json.loads((folder / CONFIG).read_text())
    value = tensors.pop("prompt_embeddings")
    spoilt = {
        "missing": {},
        "rows": {"prompt_embeddings": value[:2].clone()},
        "columns": {"prompt_embeddings": value[:, :8].clone()},
        "flat": {"prompt_embeddings": value.flatten()},
        "integers": {"prompt_embeddings": value.long()},
        "empty": {"prompt_embeddings": value[:0].clone()},
        "no head": None,
    }
    fields = {"many": {"num_virtual_tokens": 10**12}, "wide": {"token_dim": 63}, "zero": {"num_virtual_tokens": 0}}
    fields |= {"word": {"num_layers": "two"}, "unsized": {"num_virtual_tokens": None}}
    if how == "cut":
        (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9])
    elif how == "no head":
        save_file({"prompt_embeddings": value}, folder / WEIGHTS)
    elif how in spoilt:
        save_file({"x": torch.zeros(1)} | tensors | (spoilt[how] or {}), folder / WEIGHTS)
    else:
        (folder / CONFIG).write_text(json.dumps(content | fields[how]))


DAMAGE = {
    "cut": "adapter_model.safetensors",
    "missing": "expected the tensor prompt_embeddings",
    "rows": r"its shape is \[2, 64\], adapter_config.json says \[5, 64\]",
    "columns": r"its shape is \[5, 8\], adapter_config.json says \[5, 64\]",
    "flat": r"expected a matrix, got shape \[320\]",
    "empty": r"expected a matrix, got shape \[0, 64\]",
    "integers": "expected floating point, got torch.int64",
    "many": r"adapter_config.json says \[1000000000000, 64\]",
    "wide": r"adapter_config.json says \[5, 63\]",
    "zero": "num_virtual_tokens must be positive, got 0",
    "word": "num_layers must be a positive int or None, got 'two'",
    "unsized": "num_virtual_tokens must be a positive int, got None",
    "no head": "the tensor is missing",
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damage_is_refused_before_anything_changes(tmp_path, how):
    """Would catch: a base model that is frozen, or has lost or won a module, after a file was refused."""
    case, model = ("classifier", classifier()) if how == "no head" else ("prompt", tiny_llama())
    saved(tmp_path / "good", case)
    shutil.copytree(tmp_path / "good", tmp_path / "bad")
    damage(tmp_path / "bad", how)
    before = fingerprint(model)
    with pytest.raises(AdapterFileError, match=DAMAGE[how]) as caught:
        quiet(PeftModel.from_pretrained, model, tmp_path / "bad")
    assert str(tmp_path / "bad") in str(caught.value) and fingerprint(model) == before
    good = quiet(PeftModel.from_pretrained, model, tmp_path / "good")
    before = fingerprint(good)
    with pytest.raises(AdapterFileError, match=DAMAGE[how]):
        quiet(good.load_adapter, tmp_path / "bad", "another")
    assert fingerprint(good) == before and list(good.prompt_encoder) == list(good.peft_config) == ["default"]


def test_files_of_another_kind_or_model_are_refused(tmp_path):
    """Would catch: a prompt put on LoRA's model, or the other way; one of another width; one to train as a new one."""
    folder = saved(tmp_path / "prompt")
    model = quiet(PeftModel.from_pretrained, tiny_llama(), folder)
    lora = peftkern.get_peft_model(tiny_llama(), peftkern.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    lora.save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match=r"the model has .*PROMPT_TUNING adapters, got .*LORA"):
        model.load_adapter(tmp_path / "lora", "other")
    with pytest.raises(ValueError, match=r"the model has .*LORA adapters, got .*PROMPT_TUNING"):
        lora.load_adapter(folder, "other")
    with pytest.raises(AdapterFileError, match="token_dim must be 32, the width of word embeddings, got 64"):
        PeftModel.from_pretrained(tiny_llama(hidden_size=32), folder)
    for call in (
        lambda: PeftModel.from_pretrained(tiny_llama(), folder, is_trainable=True),
        lambda: model.load_adapter(folder, "other", is_trainable=True),
    ):
        with pytest.raises(ValueError, match="is_trainable: prompt learning adapters are read for inference"):
            call()
    again = prompted(peftkern, "prompt")
    again.load_adapter(folder, "default", is_trainable=True)  # the way that the message names
    assert torch.equal(output(again), output(model)) and any(p.requires_grad for p in again.parameters())


@pytest.mark.parametrize("method", COMPUTED)
def test_an_encoder_cannot_be_read_from_a_file(tmp_path, method):
    """Would catch: tokens that came out of an encoder put in before it, where PEFT goes on from something else."""
    made = adapted(method, peftkern)
    quiet(made.save_pretrained, tmp_path)
    fresh = prompted(peftkern, method)
    before = fingerprint(fresh)
    with pytest.raises(ValueError, match="not in the file, so training cannot go on from it"):
        fresh.load_adapter(tmp_path, "default", is_trainable=True)
    with pytest.raises(ValueError, match="not in the file, so training cannot go on from it"):
        peftkern.set_peft_model_state_dict(fresh, load_file(tmp_path / WEIGHTS))
    assert fingerprint(fresh) == before
    fresh.load_adapter(tmp_path, "default")  # as Trainer does with the best checkpoint
    torch.testing.assert_close(output(fresh), output(made), rtol=1e-5, atol=1e-5)
    assert fresh.active_peft_config.inference_mode and not any(p.requires_grad for p in fresh.parameters())


# --- Trainer ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_trainer_saves_adapter_files_and_resumes(tmp_path, method):
    """Would catch: whole models in checkpoints, or a run that goes on from random tokens."""
    curves = []
    for library in (peftkern, peft):
        whole = trainer(prompted(library, method), tmp_path, steps=4, learning_rate=0.05)
        quiet(whole.train)
        curves.append(losses(whole))
    assert curves[0] == pytest.approx(curves[1], abs=1e-4)
    saving = dict(save_strategy="steps", save_steps=2)
    first = trainer(prompted(peftkern, method), tmp_path, steps=4, learning_rate=0.05, **saving)
    quiet(first.train)
    checkpoint = tmp_path / "checkpoint-2"
    names = {file.name for file in checkpoint.iterdir()}
    assert {CONFIG, WEIGHTS, "README.md"} <= names and not {"model.safetensors", "pytorch_model.bin"} & names
    assert list(load_file(checkpoint / WEIGHTS)) == ["prompt_embeddings"]
    again = trainer(prompted(peftkern, method), tmp_path, steps=4, learning_rate=0.05)
    quiet(again.train, resume_from_checkpoint=str(checkpoint))
    assert losses(again)[-2:] == pytest.approx(losses(first)[-2:], abs=1e-5)
    mine, other = (made.model.get_prompt_embedding_to_save("default") for made in (again, first))
    torch.testing.assert_close(mine, other, rtol=0, atol=1e-6)


def test_trainer_and_an_encoder(tmp_path):
    """Would catch: a best model that computes something else once loaded; a resumed run that began anew."""
    arguments = dict(save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2)
    arguments |= dict(load_best_model_at_end=True)
    made = trainer(prompted(peftkern, "mlp"), tmp_path, steps=4, **arguments)
    quiet(made.train)
    best = quiet(PeftModel.from_pretrained, tiny_llama(), made.state.best_model_checkpoint)
    torch.testing.assert_close(output(made.model.eval()), output(best), rtol=1e-5, atol=1e-5)
    again = trainer(prompted(peftkern, "mlp"), tmp_path, steps=4)
    with pytest.raises(ValueError, match="training cannot go on from it"):
        quiet(again.train, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_trainer_checkpoints_vectors_and_not_a_prefix(tmp_path):
    """Would catch: a Trainer with gradient checkpointing that trains without the prefix."""
    curves = []
    for on in (False, True):
        made = trainer(prompted(peftkern, "prompt"), tmp_path, steps=2, gradient_checkpointing=on)
        quiet(made.train)
        curves.append(losses(made))
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)
    with pytest.raises(ValueError, match="gradient checkpointing: not with prefix tuning"):
        quiet(trainer(prompted(peftkern, "prefix"), tmp_path, steps=2, gradient_checkpointing=True).train)


def test_the_number_of_virtual_tokens_is_in_the_file(tmp_path):
    """Would catch: a configuration whose sizes are not those that the adapter was made with."""
    content = json.loads((saved(tmp_path) / CONFIG).read_text())
    sizes = {name: content[name] for name in ("num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads")}
    assert sizes == {"num_virtual_tokens": TOKENS, "token_dim": 64, "num_layers": 2, "num_attention_heads": 4}
    assert content["num_transformer_submodules"] == 1 and content["inference_mode"] is True
