"""Adapters travel both ways between peftkern and Hugging Face PEFT: same files, same names, same outputs."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import peftkern
from peftkern import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peftkern.utils.adapter_error import AdapterFileError
from tiny_models import ids, mlp, randomize, tiny_llama

peft = pytest.importorskip("peft")

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Biased(nn.Module):
    """Layers with biases, a tied pair and a head, to be saved under every option."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(32, 12)
        self.lin0 = nn.Linear(12, 20)
        self.lin1 = nn.Linear(20, 12)
        self.score = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.score(self.lin1(torch.tanh(self.lin0(self.emb(x)))))


def biased() -> Biased:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Biased().eval()


LLAMA = "llama"
# name -> (model, the configuration's fields)
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "defaults": (LLAMA, {}),
    "causal": (LLAMA, {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}),
    "all-linear": (LLAMA, {"target_modules": "all-linear", "r": 3}),
    "regex": (LLAMA, {"target_modules": r".*\.1\.mlp\.(up|down)_proj"}),
    "rank_pattern": (LLAMA, {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"0.self_attn.q_proj": 5}}),
    "alpha_pattern": (LLAMA, {"target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"v_proj": 3}}),
    "rslora": (LLAMA, {"target_modules": ["o_proj"], "use_rslora": True}),
    "exclude": (LLAMA, {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["0.self_attn.q_proj"]}),
    "layers": (LLAMA, {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    "lora_bias": (biased, {"target_modules": ["lin0", "lin1"], "lora_bias": True}),
    "bias all": (biased, {"target_modules": ["lin0"], "bias": "all"}),
    "bias lora_only": (biased, {"target_modules": ["lin1"], "bias": "lora_only"}),
    "modules_to_save": (biased, {"target_modules": ["lin0"], "modules_to_save": ["score"]}),
    "llama head saved": (LLAMA, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "embedding": (biased, {"target_modules": ["emb", "lin0"]}),
    "embed_tokens": (LLAMA, {"target_modules": ["embed_tokens", "q_proj"]}),
    "embed and head": (LLAMA, {"target_modules": ["embed_tokens", "lm_head"]}),
}


def base_of(case: str) -> nn.Module:
    made = CASES[case][0]
    return tiny_llama() if made is LLAMA else made()


def output(model: nn.Module, length: int = 12) -> torch.Tensor:
    tokens = ids(length=length) % 32
    with torch.no_grad():
        out = model(tokens)
    return out if isinstance(out, torch.Tensor) else out.logits


def adapted(case: str, library: Any) -> nn.Module:
    """The base model with a random adapter made by `library`, the same for both."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = library.get_peft_model(base_of(case), library.LoraConfig(**{"r": 4, **CASES[case][1]}))
    randomize(model, tuple(name for name, p in model.named_parameters() if p.requires_grad))
    return model.eval()


def save(model: Any, folder: Path, **kwargs: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, **kwargs)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_files_are_those_of_peft(tmp_path, case):
    """Would catch: a parameter name, a configuration field or a saved tensor that differs from PEFT's."""
    ours = save(adapted(case, peftkern), tmp_path / "ours")
    theirs = save(adapted(case, peft), tmp_path / "theirs")
    mine, other = load_file(ours / WEIGHTS), load_file(theirs / WEIGHTS)
    assert set(mine) == set(other)
    for name, tensor in other.items():
        assert mine[name].dtype == tensor.dtype and torch.equal(mine[name], tensor), name
    text, expected = (ours / CONFIG).read_text(), (theirs / CONFIG).read_text()
    if isinstance(json.loads(expected)["target_modules"], list):
        # PEFT writes a set in the order of the hash seed; ours is sorted. Everything else is equal to the byte.
        content = json.loads(expected)
        content["target_modules"] = sorted(content["target_modules"])
        for field in ("exclude_modules",):
            content[field] = sorted(content[field]) if content[field] else content[field]
        expected = json.dumps(content, indent=2, sort_keys=True)
    assert text == expected
    assert {f.name for f in ours.iterdir()} == {f.name for f in theirs.iterdir()} == {CONFIG, WEIGHTS, "README.md"}


@pytest.mark.parametrize("case", CASES)
def test_saved_by_peftkern_loads_in_peft(tmp_path, case):
    """Would catch: an adapter that only peftkern can read, or that means something else in PEFT."""
    model = adapted(case, peftkern)
    expected = output(model)
    folder = save(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT warns of missing keys
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, about PEFT's own code
        loaded = peft.PeftModel.from_pretrained(base_of(case), folder)
    torch.testing.assert_close(output(loaded), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, output(base_of(case)), atol=1e-3), "the adapter does nothing"


@pytest.mark.parametrize("case", CASES)
def test_saved_by_peft_loads_in_peftkern(tmp_path, case):
    """Would catch: a name of PEFT's that is not understood, or a warning about a good file."""
    model = adapted(case, peft)
    expected = output(model)
    folder = save(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, about PEFT's own code
        loaded = PeftModel.from_pretrained(base_of(case), folder)
        same = peft.PeftModel.from_pretrained(base_of(case), folder)
    torch.testing.assert_close(output(loaded), expected, rtol=1e-5, atol=1e-5)
    trained = [{name for name, p in m.named_parameters() if p.requires_grad} for m in (loaded, same)]
    assert trained[0] == trained[1] and not loaded.training


@pytest.mark.parametrize("case", ["causal", "rank_pattern", "modules_to_save", "bias all", "embedding"])
def test_state_dict_functions_round_trip_under_another_name(case):
    """Would catch: the adapter's name left in, or not put back into, a key."""
    source = adapted(case, peftkern)
    state = get_peft_model_state_dict(source)
    target = get_peft_model(base_of(case), LoraConfig(**{"r": 4, **CASES[case][1]}), adapter_name="other")
    result = set_peft_model_state_dict(target, state, adapter_name="other")
    assert result.missing_keys == [] and result.unexpected_keys == []
    torch.testing.assert_close(output(target.eval()), output(source), rtol=0, atol=0)
    again = get_peft_model_state_dict(target, adapter_name="other")
    assert set(again) == set(state) and all(torch.equal(again[k], state[k]) for k in state)


@pytest.mark.parametrize(
    "value, words",
    [
        (None, "got NoneType"),
        ([1.0], "got list"),
        (torch.zeros(4, 16, device="meta"), "on the meta device"),
        (torch.zeros(4, 16).to_sparse(), "sparse"),
        (torch.nested.nested_tensor([torch.zeros(4, 16)]), "nested"),
    ],
    ids=["None", "list", "meta", "sparse", "nested"],
)
def test_values_that_are_no_tensors_are_refused_before_any_is_written(value, words):
    """Would catch: an AttributeError that names nothing, or a failure in the middle, with half of an adapter loaded."""
    model = get_peft_model(mlp(), LoraConfig(r=4, target_modules=["up", "down"]))
    state = {key: torch.ones_like(t) for key, t in get_peft_model_state_dict(model).items()}
    last = [key for key in state if "lora_A" in key][-1]
    before = {key: t.clone() for key, t in model.state_dict().items()}
    with pytest.raises(AdapterFileError, match=words) as error:
        set_peft_model_state_dict(model, state | {last: value})
    assert error.value.key == last and all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    for wrong in (None, [1], list(state.items()), state | {3: value}):
        with pytest.raises(TypeError, match="state_dict: expected a dict of names to tensors"):
            set_peft_model_state_dict(model, wrong)


def test_several_adapters_in_subfolders(tmp_path):
    """Would catch: adapters saved over each other, or PEFT's subfolders not found again."""
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["v_proj"]))
    model.add_adapter("default_2", LoraConfig(r=8, target_modules=["q_proj", "o_proj"]))
    randomize(model)
    expected = {}
    for name in ("default", "second", "default_2"):
        model.set_adapter(name)
        expected[name] = output(model.eval())
    save(model, tmp_path)
    assert (tmp_path / WEIGHTS).exists() and not (tmp_path / "default").exists()
    for library in (peftkern, peft):
        loaded = library.PeftModel.from_pretrained(tiny_llama(), tmp_path)
        for name in ("second", "default_2"):
            loaded.load_adapter(tmp_path / name, name)
        assert list(loaded.active_adapters) == ["default"]
        for name, want in expected.items():
            loaded.set_adapter(name)
            torch.testing.assert_close(output(loaded), want, rtol=1e-5, atol=1e-5)
    by_subfolder = PeftModel.from_pretrained(tiny_llama(), tmp_path, subfolder="second")
    torch.testing.assert_close(output(by_subfolder), expected["second"], rtol=1e-5, atol=1e-5)


def test_selected_adapters(tmp_path):
    """Would catch: all adapters written, or an unknown name passed over in silence."""
    model = get_peft_model(mlp(), LoraConfig(r=4, target_modules=["up"]))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["up"]))
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    assert not (tmp_path / CONFIG).exists() and (tmp_path / "second" / CONFIG).exists()
    with pytest.raises(ValueError, match="selected_adapters.*third"):
        model.save_pretrained(tmp_path, selected_adapters=["third"])


def test_several_modules_to_save_keep_apart(tmp_path):
    """Would catch: one adapter's head saved or loaded in place of another's."""
    model = get_peft_model(biased(), LoraConfig(target_modules=["lin0"], modules_to_save=["score"]))
    model.add_adapter("second", LoraConfig(target_modules=["lin0"], modules_to_save=["score"]))
    randomize(model)
    save(model, tmp_path)
    heads = [load_file(tmp_path / sub / WEIGHTS)["base_model.model.score.weight"] for sub in ("", "second")]
    copies = model.base_model.model.score.modules_to_save
    assert torch.equal(heads[0], copies["default"].weight) and torch.equal(heads[1], copies["second"].weight)
    loaded = PeftModel.from_pretrained(biased(), tmp_path / "second")
    model.set_adapter("second")
    torch.testing.assert_close(output(loaded), output(model.eval()))


def test_resized_vocabulary_is_saved(tmp_path):
    """Would catch: new tokens' embeddings lost; PEFT saves both embeddings when the vocabulary grew."""
    base = tmp_path / "base"
    tiny_llama().save_pretrained(base)
    from transformers import AutoModelForCausalLM

    files = {}
    for library in (peftkern, peft):
        model = AutoModelForCausalLM.from_pretrained(base)
        torch.manual_seed(0)
        model.resize_token_embeddings(136)
        model = library.get_peft_model(model, library.LoraConfig(target_modules=["q_proj"]))
        randomize(model)
        with pytest.warns(UserWarning, match="save_embedding_layers"):
            model.save_pretrained(tmp_path / library.__name__)
        files[library] = load_file(tmp_path / library.__name__ / WEIGHTS)
    assert set(files[peftkern]) == set(files[peft])
    assert "base_model.model.lm_head.weight" in files[peftkern]
    grown = AutoModelForCausalLM.from_pretrained(base)
    grown.resize_token_embeddings(136)
    loaded = PeftModel.from_pretrained(grown, tmp_path / "peftkern")
    want = files[peftkern]["base_model.model.model.embed_tokens.weight"]
    assert torch.equal(loaded.get_input_embeddings().weight, want)


@pytest.mark.parametrize(
    "fields", [{"modules_to_save": ["embed_tokens", "lm_head"]}, {"target_modules": ["model.embed_tokens"]}]
)
def test_adapted_embeddings_are_saved_along_under_the_files_names(tmp_path, fields):
    """Would catch: an adapter's own tensor saved under its name in the model, so that the file cannot be loaded."""
    model = get_peft_model(tiny_llama(), LoraConfig(**({"target_modules": ["q_proj"]} | fields)), adapter_name="first")
    randomize(model)
    folder = save(model.eval(), tmp_path, save_embedding_layers=True) / "first"
    names = set(load_file(folder / WEIGHTS))
    assert {name for name in names if "first" in name or "original_module" in name} == set()
    assert "base_model.model.lm_head.weight" in names
    for library in (peftkern, peft):
        loaded = library.PeftModel.from_pretrained(tiny_llama(), folder, adapter_name="second")
        torch.testing.assert_close(output(loaded), output(model), rtol=1e-5, atol=1e-5)


def test_another_adapters_copy_is_not_the_embedding_of_the_base(tmp_path):
    """Would catch: the base's embedding saved under a name of this model, because another adapter has a copy of it."""
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"]))
    model.add_adapter("second", LoraConfig(target_modules=["v_proj"]))
    randomize(model)
    folder = save(model, tmp_path, save_embedding_layers=True)
    want = tiny_llama().get_input_embeddings().weight
    assert torch.equal(load_file(folder / "second" / WEIGHTS)["base_model.model.model.embed_tokens.weight"], want)
    copies = model.get_input_embeddings().modules_to_save
    assert torch.equal(load_file(folder / WEIGHTS)["base_model.model.model.embed_tokens.weight"], copies.default.weight)
    changed = get_peft_model_state_dict(model, adapter_name="second", save_embedding_layers=True)
    changed["base_model.model.model.embed_tokens.weight"] = torch.ones_like(want)
    set_peft_model_state_dict(model, changed, "second")
    assert (model.get_input_embeddings().original_module.weight == 1).all()


def test_embeddings_of_another_size_are_refused(tmp_path):
    """Would catch: a resized model's adapter on a base that was not resized."""
    model = get_peft_model(tiny_llama(vocab_size=136), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    with pytest.raises(ValueError, match="(embed_tokens|lm_head).weight.*136.*128"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)
    with pytest.warns(UserWarning, match="ignore_mismatched_sizes"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path, ignore_mismatched_sizes=True)


def test_sequence_classifier_keeps_its_head(tmp_path):
    """Would catch: a head that is frozen, or not saved."""
    fields = {"target_modules": ["q_proj"], "task_type": "SEQ_CLS", "r": 4}
    cls = "LlamaForSequenceClassification"
    made = {}
    for library in (peftkern, peft):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = library.get_peft_model(tiny_llama(cls=cls), library.LoraConfig(**fields))
        randomize(model)
        made[library] = model.eval()
        save(model, tmp_path / library.__name__)
    assert load_file(tmp_path / "peftkern" / WEIGHTS).keys() == load_file(tmp_path / "peft" / WEIGHTS).keys()
    assert (tmp_path / "peftkern" / CONFIG).read_text() == (tmp_path / "peft" / CONFIG).read_text()
    score = made[peftkern].base_model.model.score.modules_to_save["default"].weight
    assert score.requires_grad
    want = output(made[peft])
    for library in (peftkern, peft):
        for source in ("peftkern", "peft"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                loaded = library.PeftModel.from_pretrained(tiny_llama(cls=cls), tmp_path / source)
            assert type(loaded).__name__ == "PeftModelForSequenceClassification"
            torch.testing.assert_close(output(loaded), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["LoraConfig", "IA3Config"])
def test_low_cpu_mem_usage_leaves_frozen_what_is_frozen(tmp_path, method):
    """Would catch: an adapter that was loaded for inference and trains, because its parameters were made anew."""
    fields = {"target_modules": ["emb", "lin0"]} if method == "LoraConfig" else {"target_modules": ["lin0"]}
    fields |= {} if method == "LoraConfig" else {"feedforward_modules": []}
    save(get_peft_model(biased(), getattr(peftkern, method)(**fields)), tmp_path)
    loaded = PeftModel.from_pretrained(biased(), tmp_path, low_cpu_mem_usage=True)
    loaded.load_adapter(tmp_path, "second", low_cpu_mem_usage=True)
    assert [name for name, p in loaded.named_parameters() if p.requires_grad] == []
    loaded.load_adapter(tmp_path, "third", low_cpu_mem_usage=True, is_trainable=True)
    assert {name.split(".")[-1] for name, p in loaded.named_parameters() if p.requires_grad} <= {"third", "weight"}
    assert any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_low_cpu_mem_usage_gives_the_same(tmp_path, low_cpu_mem_usage):
    """Would catch: parameters left on the meta device, also those of an adapter that was made there."""
    model = adapted("causal", peftkern)
    save(model, tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=True)
    assert not any(p.is_meta for p in loaded.parameters())
    assert sum(p.requires_grad for p in loaded.parameters()) == 4
    torch.testing.assert_close(output(loaded.eval()), output(model))
    result = loaded.load_adapter(tmp_path, "second", low_cpu_mem_usage=low_cpu_mem_usage)
    assert result.missing_keys == [] and not any(p.is_meta for p in loaded.parameters())
    held = dict(loaded.named_parameters())
    if low_cpu_mem_usage:
        loaded = get_peft_model(tiny_llama(), copy.deepcopy(model.peft_config["default"]), low_cpu_mem_usage=True)
    loaded.load_adapter(tmp_path, "default", low_cpu_mem_usage=True)
    assert low_cpu_mem_usage or all(p is held[name] for name, p in loaded.named_parameters())
    torch.testing.assert_close(output(loaded), output(model))


@pytest.mark.parametrize("autocast", [True, False])
def test_dtype_of_a_loaded_adapter(tmp_path, autocast):
    """Would catch: a bfloat16 model that trains bfloat16 adapters, or fp32 ones that nobody asked for; and that
    low_cpu_mem_usage changes dtypes, rounds fp32 values on their way, or unties embeddings that are in the file."""
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"])
    model = get_peft_model(tiny_llama().bfloat16(), config, autocast_adapter_dtype=autocast)
    dtype = torch.float32 if autocast else torch.bfloat16
    weight = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert model.get_parameter(weight).dtype == dtype
    model.base_model.model.model.norm.modules_to_save.default.float()  # as of a base model in float32
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    base = tiny_llama(tie_word_embeddings=True).bfloat16()
    loaded = PeftModel.from_pretrained(base, tmp_path, autocast_adapter_dtype=autocast)
    assert loaded.get_parameter(weight).dtype == dtype
    for method in ("from_pretrained", "load_adapter"):
        base = tiny_llama(tie_word_embeddings=True).bfloat16()
        options = {"autocast_adapter_dtype": autocast, "low_cpu_mem_usage": True}
        if method == "from_pretrained":
            low, name = PeftModel.from_pretrained(base, tmp_path, **options), "default"
        else:
            low, name = get_peft_model(base, LoraConfig(target_modules=["v_proj"])), "second"
            low.load_adapter(tmp_path, name, **options)
        states = [peftkern.get_peft_model_state_dict(m, adapter_name=n) for m, n in ((loaded, "default"), (low, name))]
        assert list(states[0]) == list(states[1])
        torch.testing.assert_close(*states, rtol=0, atol=0)
        assert base.lm_head.weight is base.model.embed_tokens.weight


def test_arguments_of_a_base_model_are_taken_with_a_warning(tmp_path):
    """Would catch: code for PEFT that fails over torch_dtype or device_map, which say nothing of an adapter."""
    save(adapted("defaults", peftkern), tmp_path)
    arguments = {"torch_dtype": torch.float16, "device_map": "auto", "offload_folder": str(tmp_path)}
    loaded = []
    for library in (peftkern, peft):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loaded.append(library.PeftModel.from_pretrained(tiny_llama(), tmp_path, **arguments))
        told = [w for w in caught if "no effect here" in str(w.message)]
        assert [w.filename for w in told] == [__file__] * (library is peftkern)
    torch.testing.assert_close(loaded[0](ids()).logits, loaded[1](ids()).logits)
    with pytest.warns(UserWarning, match="device_map, torch_dtype: no effect"):
        loaded[0].load_adapter(tmp_path, "two", torch_dtype=torch.float16, device_map="auto")
    with pytest.raises(TypeError, match="unknown arguments: torch_dtpye"):
        loaded[0].load_adapter(tmp_path, "three", torch_dtpye=torch.float16)


def test_key_mapping(tmp_path):
    """Would catch: adapters of a renamed architecture that no longer load."""
    model = get_peft_model(mlp(), LoraConfig(target_modules=["up"]))
    randomize(model)
    save(model, tmp_path)
    renamed = mlp()
    renamed.inner = nn.Module()
    renamed.inner.top = renamed._modules.pop("up")
    mapping = {"^up": "inner.top"}
    config = LoraConfig(target_modules=["inner.top"])
    loaded = PeftModel.from_pretrained(renamed, tmp_path, key_mapping=mapping, config=config)
    want = model.base_model.model.up.lora_B["default"].weight
    assert torch.equal(loaded.base_model.model.inner.top.lora_B["default"].weight, want)


def test_injected_adapters_without_a_wrapper():
    """Would catch: names with the wrapper's prefix where there is no wrapper (diffusers' way of using PEFT)."""
    model = peftkern.inject_adapter_in_model(LoraConfig(target_modules=["up"]), mlp())
    randomize(model)
    state = get_peft_model_state_dict(model)
    assert set(state) == {"up.lora_A.weight", "up.lora_B.weight"}
    wrapped = {f"base_model.model.{k}": v + 1 for k, v in state.items()}
    set_peft_model_state_dict(model, wrapped)
    assert torch.equal(model.up.lora_A["default"].weight, wrapped["base_model.model.up.lora_A.weight"])


def test_an_adapter_on_the_hub(tmp_path, monkeypatch):
    """Would catch: the wrong file or argument asked of the Hub's client, or its error passed on without a name."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    model = adapted("modules_to_save", peftkern)
    folder = save(model, tmp_path)
    asked = []

    def download(repo_id: str, filename: str, **kwargs: Any) -> str:
        asked.append((repo_id, filename, kwargs))
        if not (folder / filename).exists():
            raise EntryNotFoundError("404") if kwargs["token"] == "t" else LocalEntryNotFoundError("offline")
        return str(folder / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    loaded = PeftModel.from_pretrained(biased(), "me/mine", revision="v1", token="t", subfolder=None)
    torch.testing.assert_close(output(loaded), output(model))
    assert {name for _, name, _ in asked} == {CONFIG, WEIGHTS}
    assert all(r == "me/mine" and k == {"revision": "v1", "token": "t", "subfolder": None} for r, _, k in asked)
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    torch.testing.assert_close(output(PeftModel.from_pretrained(biased(), "me/mine", token="t")), output(model))
    (folder / "adapter_model.bin").unlink()
    for token, reason in (("t", "404"), ("u", "offline")):
        with pytest.raises(ValueError, match=f"me/mine.*adapter_model.safetensors.*{reason}"):
            PeftModel.from_pretrained(biased(), "me/mine", token=token)


def test_model_card(tmp_path):
    """Would catch: a card that the Hub cannot read, or that overwrites what the user wrote."""
    from huggingface_hub import ModelCard

    base = tmp_path / "base"
    tiny_llama().save_pretrained(base)
    from transformers import AutoModelForCausalLM

    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(tmp_path / "a")
    card = ModelCard.load(tmp_path / "a" / "README.md")
    assert card.data.library_name == "peft" and card.data.base_model == str(base)
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.tags == sorted(["lora", "transformers", f"base_model:adapter:{base}"])
    assert f"- peftkern {peftkern.__version__}" in card.text
    head = "license: mit\ntags:\n- mine\n- 'lora'\npipeline_tag: other\nco2_eq_emissions:\n  emissions: 1\n"
    written = f"---\n{head}---\nMy words.\n"
    (tmp_path / "a" / "README.md").write_text(written)
    for _ in range(2):  # saving twice changes nothing
        model.save_pretrained(tmp_path / "a")
        card = ModelCard.load(tmp_path / "a" / "README.md")
        assert card.data.license == "mit" and card.data.pipeline_tag == "other" and "My words." in card.text
        assert card.data.tags == sorted(["mine", "lora", "transformers", f"base_model:adapter:{base}"])
        assert card.text.count("### Framework versions") == 1 and card.data.co2_eq_emissions == {"emissions": 1}


def test_auto_classes(tmp_path):
    """Would catch: base model and adapter loaded from one name going wrong; a class imported because a file says so."""
    base = tmp_path / "base"
    tiny_llama().save_pretrained(base)
    from transformers import AutoModelForCausalLM

    for task in ("CAUSAL_LM", None):
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj"], task_type=task)
        )
        randomize(model)
        folder = save(model, tmp_path / str(task))
        auto = peftkern.AutoPeftModelForCausalLM if task else peftkern.AutoPeftModel
        loaded = auto.from_pretrained(folder)
        torch.testing.assert_close(output(loaded), output(model.eval()))
        assert type(loaded).__name__ == ("PeftModelForCausalLM" if task else "PeftModel")
    with pytest.raises(ValueError, match="AutoPeftModelForCausalLM"):
        peftkern.AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "CAUSAL_LM")
    content = json.loads((tmp_path / "None" / CONFIG).read_text())
    content["auto_mapping"] = {"parent_library": "os", "base_model_class": "system"}
    (tmp_path / "None" / CONFIG).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="'os'.*import_allowlist"):
        peftkern.AutoPeftModel.from_pretrained(tmp_path / "None")


def test_a_base_that_transformers_adapted_already_is_told_of(tmp_path):
    """Would catch the blame on a sound file, without a remedy, where transformers had put the adapter in by itself."""
    transformers = pytest.importorskip("transformers")
    base = tmp_path / "base"
    tiny_llama().save_pretrained(base)
    model = get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    folder = save(model, tmp_path / "adapter")
    adapted = transformers.AutoModelForCausalLM.from_pretrained(folder)
    want = output(adapted)
    with pytest.raises(ValueError, match="^model: it has an adapter 'default' that is not peftkern's.*by its own name"):
        PeftModel.from_pretrained(adapted, folder)
    assert torch.equal(output(adapted), want)


@pytest.mark.parametrize("tied", [False, True])
def test_models_whose_embeddings_raise(tmp_path, tied):
    """Would catch models of images, speech or two towers that cannot be saved, loaded or merged: transformers gives
    them `get_input_embeddings` all the same, and it raises NotImplementedError."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    vision = sizes | dict(image_size=8, patch_size=4)
    config = transformers.CLIPConfig(text_config=sizes | dict(vocab_size=32), vision_config=vision, projection_dim=8)
    config.tie_word_embeddings = tied
    base = transformers.CLIPForImageClassification(config).eval()
    with pytest.raises(NotImplementedError):
        base.get_input_embeddings()
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], r=2))
    randomize(model)
    pixels = torch.randn(2, 3, 8, 8)
    want = model(pixel_values=pixels).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path)
    assert torch.equal(loaded(pixel_values=pixels).logits, want)
    torch.testing.assert_close(loaded.merge_and_unload()(pixel_values=pixels).logits, want)
