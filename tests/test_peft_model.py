"""`PeftModel`'s interface, held against Hugging Face PEFT's on the same small models."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import subprocess
import sys
import textwrap
import warnings
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import peftkern
from peftkern import LoraConfig, PeftConfig, PeftModel, get_peft_model
from tiny_models import fingerprint, ids, mlp, randomize, tiny_llama

peft = pytest.importorskip("peft")

TASKS = {
    "CAUSAL_LM": "LlamaForCausalLM",
    "SEQ_CLS": "LlamaForSequenceClassification",
    "TOKEN_CLS": "LlamaForTokenClassification",
    "QUESTION_ANS": "LlamaForQuestionAnswering",
    "FEATURE_EXTRACTION": "LlamaModel",
}


def pair(model: Any = tiny_llama, **fields: Any) -> tuple[Any, Any]:
    """The same adapted model made by peftkern and by PEFT, with the same random adapter."""
    made = []
    for library in (peftkern, peft):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = library.get_peft_model(model(), library.LoraConfig(**({"target_modules": ["q_proj"]} | fields)))
        randomize(adapted)
        made.append(adapted.eval())
    return made[0], made[1]


def logits(model: nn.Module, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids(), **kwargs)[0]


def trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_names_and_numbers_are_those_of_peft(capsys):
    """Would catch: another parameter name, another count, another wording of the line."""
    ours, theirs = pair(task_type="CAUSAL_LM", modules_to_save=["lm_head"])
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert set(ours.state_dict()) == set(theirs.state_dict()) and trainable(ours) == trainable(theirs)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    ours.print_trainable_parameters()
    line = capsys.readouterr().out
    theirs.print_trainable_parameters()
    assert line == capsys.readouterr().out != ""
    assert ours.modules_to_save == theirs.modules_to_save == {"lm_head"}
    assert ours.active_adapter == theirs.active_adapter == "default"
    assert ours.active_adapters == theirs.active_adapters == ["default"]
    assert ours.peft_type == theirs.peft_type and ours.base_model_torch_dtype == theirs.base_model_torch_dtype
    assert ours.has_active_enabled_adapter and ours.active_peft_config is ours.peft_config["default"]
    assert ours.config is ours.get_base_model().config and ours.device == theirs.device


@pytest.mark.parametrize("task", TASKS)
def test_task_classes(task):
    """Would catch: a head that is not trained, or an argument that does not reach the base model."""
    ours, theirs = pair(lambda: tiny_llama(cls=TASKS[task]), task_type=task)
    assert type(ours).__name__ == type(theirs).__name__ and isinstance(ours, getattr(peftkern, type(ours).__name__))
    assert trainable(ours) == trainable(theirs)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    for kwargs in ({}, {"attention_mask": mask}, {"output_hidden_states": True}, {"return_dict": False}):
        with torch.no_grad():
            mine, other = ours(ids(), **kwargs), theirs(ids(), **kwargs)
        assert type(mine) is type(other) and len(mine) == len(other)
        torch.testing.assert_close(mine[0], other[0], rtol=1e-5, atol=1e-5)


def test_seq2seq_class():
    """Would catch: decoder arguments that do not reach an encoder-decoder model."""
    from transformers import T5Config, T5ForConditionalGeneration

    def t5() -> nn.Module:
        torch.manual_seed(0)
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "vocab_size": 64}
        return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()

    ours, theirs = pair(t5, task_type="SEQ_2_SEQ_LM", target_modules=["q", "v"])
    for kwargs in ({"labels": ids(length=5) % 64}, {"decoder_input_ids": ids(length=4) % 64}):
        with torch.no_grad():
            mine, other = ours(input_ids=ids() % 64, **kwargs), theirs(input_ids=ids() % 64, **kwargs)
        torch.testing.assert_close(mine[0], other[0], rtol=1e-5, atol=1e-5)
    tokens = ours.generate(input_ids=ids() % 64, max_new_tokens=4, do_sample=False)
    assert torch.equal(tokens, theirs.generate(input_ids=ids() % 64, max_new_tokens=4, do_sample=False))


@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
def test_generate(task):
    """Would catch: generation that leaves the adapter out, or ignores a generation_config set on the wrapper."""
    ours, theirs = pair(task_type=task, target_modules="all-linear")
    arguments = {"input_ids": ids(), "max_new_tokens": 6, "do_sample": False}
    tokens = ours.generate(**arguments)
    assert torch.equal(tokens, theirs.generate(**arguments))
    assert not torch.equal(tokens, tiny_llama().generate(**arguments))
    config = copy.deepcopy(ours.generation_config)
    config.max_new_tokens = 2
    ours.generation_config = config
    assert ours.generate(input_ids=ids(), do_sample=False).shape[1] == 14


def test_switching_adapters():
    """Would catch: a new adapter that becomes active, frozen and trainable mixed up, a deleted one that lives on."""
    ours, theirs = pair()
    for model, library in ((ours, peftkern), (theirs, peft)):
        model.add_adapter("second", library.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        randomize(model, seed=7)
    assert ours.active_adapter == "default" and trainable(ours) == trainable(theirs)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)
    for model in (ours, theirs):
        model.set_adapter("second")
    assert trainable(ours) == trainable(theirs) and ours.active_adapters == ["second"]
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)
    for model in (ours, theirs):
        model.set_requires_grad("default")
    assert trainable(ours) == trainable(theirs)
    for model in (ours, theirs):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.delete_adapter("second")
    assert ours.active_adapter == theirs.active_adapter == "default" and set(ours.peft_config) == {"default"}
    assert set(ours.state_dict()) == set(theirs.state_dict())
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)


def test_disabling_is_nested_and_ends_after_an_error():
    """Would catch: adapters that stay off after an exception, or come on again inside an outer context."""
    model, _ = pair()
    base, on = logits(tiny_llama()), logits(model)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), base)
        with model.disable_adapter():
            torch.testing.assert_close(logits(model), base)
        torch.testing.assert_close(logits(model), base)
        assert not model.has_active_enabled_adapter
    torch.testing.assert_close(logits(model), on)
    with pytest.raises(KeyError), model.disable_adapter():
        raise KeyError
    torch.testing.assert_close(logits(model), on)
    assert model.has_active_enabled_adapter and trainable(model)


def test_merging_and_unloading():
    """Would catch: forwarding to the tuner that goes nowhere; a merged model that differs from the adapted one."""
    model, theirs = pair(target_modules="all-linear")
    want = logits(model)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-4)
    merged, other = copy.deepcopy(model).merge_and_unload(), theirs.merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(other), rtol=1e-5, atol=1e-5)
    assert type(merged) is type(tiny_llama()) and set(merged.state_dict()) == set(tiny_llama().state_dict())
    torch.testing.assert_close(logits(model.unload()), logits(tiny_llama()))


def test_wrong_arguments_are_refused_and_change_nothing():
    """Would catch: a failed call that leaves half an adapter behind."""
    model = get_peft_model(mlp(), LoraConfig(target_modules=["up"]))
    before = fingerprint(model)
    calls = [
        (lambda: model.add_adapter("default", LoraConfig(target_modules=["up"])), "default.*exists"),
        (lambda: model.add_adapter("a.b", LoraConfig(target_modules=["up"])), "a.b"),
        (lambda: model.add_adapter("x", LoraConfig(target_modules=["nowhere"])), "nowhere"),
        (lambda: model.set_adapter("x"), "'x'"),
        (lambda: model.delete_adapter("x"), "'x'"),
        (lambda: model.save_pretrained("/nowhere", safe_serialization=False), "safetensors"),
        (lambda: model.save_pretrained("/nowhere", selected_adapters=["x"]), "'x'"),
    ]
    for call, text in calls:
        with pytest.raises(ValueError, match=text):
            call()
        assert fingerprint(model) == before and set(model.peft_config) == {"default"}
    for call in (model.set_adapter, model.delete_adapter):
        with pytest.raises(TypeError, match="adapter_name: expected the name of one adapter, got list"):
            call(["default"])
        assert fingerprint(model) == before
    base = mlp()
    untouched = fingerprint(base)
    wrong = [(LoraConfig(target_modules=["nowhere"]), ValueError), ("x", TypeError), (PeftConfig(), ValueError)]
    for config, error in wrong:
        with pytest.raises(error):
            get_peft_model(base, config)
        assert fingerprint(base) == untouched
    with pytest.raises(NotImplementedError, match="mixed"):
        get_peft_model(base, LoraConfig(target_modules=["up"]), mixed=True)
    with pytest.raises(TypeError, match="colour"):
        PeftModel.from_pretrained(base, "/nowhere", config=LoraConfig(), colour="red")


@pytest.mark.parametrize("method", [LoraConfig, peftkern.IA3Config])
def test_a_failed_load_leaves_merged_adapters_merged(tmp_path, method):
    """Would catch: a layer that calls its adapter merged while its weight is without it, and subtracts it again."""
    sides = {"feedforward_modules": []} if method is peftkern.IA3Config else {}
    for name, targets in (("good", ["up"]), ("other", ["up", "down"])):
        model = get_peft_model(mlp(), method(target_modules=targets, **sides))
        randomize(model, ("lora_", "ia3_"))
        model.save_pretrained(tmp_path / name)
    file = tmp_path / "other" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith(("down.lora_B.weight", "down.ia3_l")))
    save_file(tensors | {key: tensors[key][1:].clone()}, file)  # seen when the adapter is in the model already
    model = PeftModel.from_pretrained(mlp(), tmp_path / "good")
    x = torch.arange(8)
    want, weight = model(x), mlp().up.weight
    assert not torch.allclose(want, mlp()(x), atol=1e-4)
    model.merge_adapter()
    with pytest.raises(peftkern.AdapterFileError, match="shape"), pytest.warns(UserWarning, match="unmerged"):
        model.load_adapter(tmp_path / "other", "second")
    layer = model.base_model.model.up
    assert layer.merged_adapters == ["default"] and set(model.peft_config) == {"default"}
    torch.testing.assert_close(model(x), want)
    model.unmerge_adapter()
    torch.testing.assert_close(layer.weight, weight)
    torch.testing.assert_close(model(x), want)


def test_a_configuration_of_pefts_is_told_how_to_become_ours():
    """Would catch: "expected a PeftConfig, got LoraConfig", which does not say that there are two of that name."""
    model = get_peft_model(mlp(), LoraConfig(target_modules=["up"]))
    theirs = peft.LoraConfig(r=3, target_modules=["down"])
    words = r"got peft.tuners.lora.config.LoraConfig: make one of it by peftkern.LoraConfig\(\*\*config.to_dict\(\)\)"
    for call in (
        lambda: get_peft_model(mlp(), theirs),
        lambda: peftkern.inject_adapter_in_model(theirs, mlp()),
        lambda: model.add_adapter("other", theirs),
        lambda: PeftModel.from_pretrained(mlp(), "/nowhere", config=theirs),
    ):
        with pytest.raises(TypeError, match=words):
            call()
    unbuilt = peft.LoHaConfig(target_modules=["down"])
    with pytest.raises(
        TypeError,
        match=r"LoHaConfig, a method that is not built here \(those that are: ADALORA, IA3, LORA, PREFIX_TUNING, ",
    ):
        get_peft_model(mlp(), unbuilt)
    model.add_adapter("other", peftkern.LoraConfig(**theirs.to_dict()))
    assert model.base_model.model.down.r == {"other": 3}
    ia3 = peft.IA3Config(target_modules=["down"], feedforward_modules=["down"])
    assert get_peft_model(mlp(), peftkern.IA3Config(**ia3.to_dict())).base_model.model.down.is_feedforward


def test_warnings_of_get_peft_model():
    """PEFT warns of a second wrapping, of another base model's name and revision, and of a confusing adapter name."""
    base = mlp()
    with pytest.warns(UserWarning, match="base_model_name_or_path was 'other'"):
        get_peft_model(base, LoraConfig(target_modules=["up"], base_model_name_or_path="other"))
    with pytest.warns(UserWarning, match="adapters already"):
        get_peft_model(base, LoraConfig(target_modules=["down"]), adapter_name="second")
    with pytest.warns(UserWarning, match="revision was 'a' and is 'b'"):
        config = LoraConfig(target_modules=["up"], revision="a")
        get_peft_model(mlp(), config, revision="b")
    assert config.revision == "b"
    with pytest.warns(UserWarning, match="'lora' is contained in the prefix"):
        get_peft_model(mlp(), LoraConfig(target_modules=["up"]), adapter_name="lora")


def test_adapting_twice_is_refused_where_the_files_would_load_nowhere(tmp_path):
    """Would catch: an adapter under names with base_model.model twice, or one that has lost a half of its layers."""
    base = tiny_llama()
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
    before = fingerprint(model)
    for name in ("default", "second"):
        config = LoraConfig(target_modules=["v_proj"], base_model_name_or_path="other")
        with pytest.raises(ValueError, match=r"PeftModel with the adapters \['default'\]: call its add_adapter"):
            get_peft_model(model, config, name)
    with pytest.raises(ValueError, match="adapter_name: an adapter 'default' exists already"):
        get_peft_model(base, config)
    assert fingerprint(model) == before and config.base_model_name_or_path == "other"
    with pytest.warns(UserWarning, match="adapters already"):
        again = get_peft_model(base, LoraConfig(target_modules=["v_proj"]), "second")
    randomize(again)
    again.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "second")
    torch.testing.assert_close(logits(loaded), logits(again))
    get_peft_model(again.unload(), LoraConfig(target_modules=["q_proj"]))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    """Would catch: no gradient at all, because the checkpointed blocks' input requires none."""
    grads = {}
    for library in (peftkern, peft):
        base = tiny_llama()
        base.gradient_checkpointing_enable({"use_reentrant": reentrant})
        base.train()
        model = library.get_peft_model(base, library.LoraConfig(target_modules=["q_proj", "down_proj"]))
        randomize(model)
        model(input_ids=ids(), labels=ids()).loss.backward()
        grads[library] = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert grads[peftkern].keys() == grads[peft].keys()
    for name, grad in grads[peft].items():
        torch.testing.assert_close(grads[peftkern][name], grad, rtol=1e-4, atol=1e-6)


def test_compiles_to_one_graph():
    """Would catch: a graph break in the wrapper's forward."""
    model, _ = pair(lambda: tiny_llama(num_hidden_layers=1), task_type="CAUSAL_LM", target_modules=["q_proj"])
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(input_ids=ids()).logits, logits(model), rtol=1e-5, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = peftkern.get_peft_model_state_dict(compiled, unwrap_compiled=True)
    assert set(state) == set(peftkern.get_peft_model_state_dict(model))


# --- being a peft.PeftModel ------------------------------------------------------------------------------------------


def test_is_a_peft_model_of_both_libraries():
    """Would catch: Trainer, accelerate and TRL not knowing the model for what it is."""
    model, _ = pair(task_type="CAUSAL_LM")
    assert isinstance(model, peft.PeftModelForCausalLM) and isinstance(model, peftkern.PeftModelForCausalLM)
    assert type(model) is type(pair(task_type="CAUSAL_LM")[0])
    assert type(model).__name__ == "PeftModelForCausalLM" and type(model).__module__.startswith("peftkern")
    assert model._hf_peft_config_loaded

    class Mine(peftkern.PeftModel):
        def extra(self) -> int:
            return 3

    mine = Mine(mlp(), LoraConfig(target_modules=["up"]))
    assert mine.extra() == 3 and isinstance(mine, Mine) and isinstance(mine, peft.PeftModel)
    assert not isinstance(mine, peft.PeftModelForCausalLM)


def test_pefts_own_functions_work_on_our_models():
    """Would catch: accelerate saving an empty FSDP checkpoint, because PEFT's functions see no adapters."""
    ours, theirs = pair(task_type="CAUSAL_LM", modules_to_save=["lm_head"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want, state = peft.get_peft_model_state_dict(theirs), peft.get_peft_model_state_dict(ours)
    assert set(state) == set(want) == set(peftkern.get_peft_model_state_dict(ours))
    peft.set_peft_model_state_dict(ours, {k: v + 1 for k, v in want.items()})
    again = peftkern.get_peft_model_state_dict(ours)
    assert all(torch.equal(again[k], want[k] + 1) for k in want)
    status, expected = peft.get_model_status(ours), theirs.get_model_status()
    assert dataclasses.replace(status, peft_types=expected.peft_types) == expected
    assert peft.get_layer_status(ours) == theirs.get_layer_status()


@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(make):
    """Would catch: a class that cannot be found by name."""
    model, _ = pair(task_type="CAUSAL_LM")
    again = make(model)
    assert type(again) is type(model) and again.base_model is not model.base_model
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)


def test_a_broken_peft_is_warned_about(monkeypatch):
    """Would catch: a broken installation of peft that breaks a model which does not need it."""

    class Broken:
        def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
            if name == "peft":
                raise ImportError("cannot import name 'x' from 'transformers'", name="transformers")

    monkeypatch.delitem(sys.modules, "peft")
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.warns(UserWarning, match="peft is installed but cannot be imported"):
        model = get_peft_model(mlp(), LoraConfig(target_modules=["up"]))
    assert type(model) is PeftModel


PLAIN_LOOP = """
    import sys

    class Recorder:  # what is looked for but not installed
        asked = []
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in ("peft", "transformers", "accelerate", "huggingface_hub"):
                self.asked.append(name)
                raise ModuleNotFoundError(name)

    sys.meta_path.insert(0, Recorder())
    import torch, peftkern
    base = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 4))
    model = peftkern.get_peft_model(base, peftkern.LoraConfig(target_modules=["0"]))
    model(torch.randn(2, 4)).sum().backward()
    model.save_pretrained(sys.argv[1])
    again = peftkern.PeftModel.from_pretrained(model.unload(), sys.argv[1])
    assert type(again) is peftkern.PeftModel
    assert not Recorder.asked, Recorder.asked

    sys.modules["transformers"] = type(sys)("transformers")  # transformers is loaded, peft is not installed
    plain = peftkern.get_peft_model(again.unload(), peftkern.LoraConfig(target_modules=["1"]))
    assert type(plain) is peftkern.PeftModel and Recorder.asked == ["peft"], Recorder.asked
"""


def test_nothing_heavy_is_imported_and_peft_is_not_needed(tmp_path):
    """Would catch: an import of peft or transformers for a plain loop; failing where neither is installed."""
    command = [sys.executable, "-c", textwrap.dedent(PLAIN_LOOP), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
