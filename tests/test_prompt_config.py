"""Configurations of the prompt methods, what virtual tokens start from, and what is refused before anything changes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import peftkern
from peftkern import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
from prompt_data import METHODS, bert, causal, config, prompted, quiet
from tiny_models import VOCAB, fingerprint, ids, mlp, tiny_llama

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

CLASSES = ("PromptTuningConfig", "PromptEncoderConfig", "PrefixTuningConfig")


def plain(made: Any) -> dict[str, Any]:
    return json.loads(json.dumps(made.to_dict()))


@pytest.mark.parametrize("name", CLASSES)
def test_fields_are_those_of_peft(name):
    """Would catch: another field, default or method; a configuration that does not come back from its dict."""
    mine, theirs = getattr(peftkern, name)(), getattr(peft, name)()
    assert plain(mine) == plain(theirs) and mine.is_prompt_learning and not mine.is_adaption_prompt
    assert issubclass(type(mine), peftkern.PromptLearningConfig) and not peftkern.LoraConfig().is_prompt_learning
    full = getattr(peftkern, name)(num_virtual_tokens=3, token_dim=8, modules_to_save=["x"], inference_mode=True)
    assert peftkern.PeftConfig.from_dict(full.to_dict()) == full
    again = peftkern.get_peft_config(plain(getattr(peft, name)(num_virtual_tokens=3, task_type="CAUSAL_LM")))
    assert type(again).__name__ == name and again.num_virtual_tokens == 3
    assert peftkern.PEFT_TYPE_TO_CONFIG_MAPPING[again.peft_type] is type(again)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", [tiny_llama, lambda: causal("gpt2"), lambda: causal("wide heads")])
def test_sizes_are_those_of_peft(model, method):
    """Would catch: a size that is read from another field of the model's configuration."""
    found = [plain(prompted(library, method, model).peft_config["default"]) for library in (peftkern, peft)]
    assert found[0] == found[1] and None not in (found[0]["token_dim"], found[0]["num_layers"])


def test_sizes_that_are_given():
    """Would catch: a size of the user's that is dropped, or a wrong one that fails deep inside of the model."""
    given = {"token_dim": 64, "num_layers": 2, "num_attention_heads": 4}  # PEFT's examples give all of them
    for method in METHODS:
        prompted(peftkern, method, **given)(ids())
    for model, method, fields, words in (
        (tiny_llama, "prompt", {"token_dim": 63}, "token_dim must be 64, the width of word embeddings, got 63"),
        (tiny_llama, "prefix", {"num_layers": 1}, "num_layers must be 2, the model's, got 1"),
        (lambda: causal("gpt2"), "prefix", {"token_dim": 16}, "must be 32 and 4, the model's, got 16 and 4"),
        (
            lambda: causal("gpt2"),
            "prefix",
            {"token_dim": 32, "num_attention_heads": 3},
            r"a multiple of num_att.* \(3\)",
        ),
        (tiny_llama, "prompt", {"num_virtual_tokens": None}, "num_virtual_tokens must be a positive int, got None"),
    ):
        base = model()
        before = fingerprint(base)
        with pytest.raises(ValueError, match=words):
            prompted(peftkern, method, lambda base=base: base, **fields)
        assert fingerprint(base) == before


def test_layers_that_a_prefix_does_not_fit():
    """Would catch: a prefix that is put into some layers only, or fails in the middle of a forward."""
    for fields, words in (
        ({"layer_types": ["full_attention", "linear_attention"]}, r"the kinds \['linear_attention'\]"),
        ({"num_kv_shared_layers": 1}, "KV sharing"),
        ({"kv_lora_rank": 8}, "latent attention"),
        ({"global_head_dim": 32}, "layers that differ|layers differ"),
    ):
        base = tiny_llama()
        for name, value in fields.items():
            setattr(base.config, name, value)
        with pytest.raises(NotImplementedError, match=words):
            prompted(peftkern, "prefix", lambda base=base: base)
        assert all(p.requires_grad for p in base.parameters())


WRONG: list[tuple[type, dict[str, Any], type[Exception], str]] = [
    (PromptTuningConfig, {"num_virtual_tokens": 0}, ValueError, "num_virtual_tokens must be positive, got 0"),
    (PromptTuningConfig, {"num_virtual_tokens": True}, TypeError, "num_virtual_tokens must be a positive int or None"),
    (PromptTuningConfig, {"num_virtual_tokens": 2.0}, TypeError, "num_virtual_tokens must be a positive int or None"),
    (PromptTuningConfig, {"num_layers": -1}, ValueError, "num_layers must be positive, got -1"),
    (PromptTuningConfig, {"token_dim": "64"}, TypeError, "token_dim must be a positive int or None, got '64'"),
    (PromptTuningConfig, {"num_transformer_submodules": 3}, ValueError, "num_transformer_submodules must be 1, 2 or"),
    (PromptTuningConfig, {"modules_to_save": "score"}, TypeError, "modules_to_save must be a list of str"),
    (
        PromptTuningConfig,
        {"prompt_tuning_init": "random"},
        ValueError,
        "prompt_tuning_init must be one of TEXT, SAMPLE",
    ),
    (PromptTuningConfig, {"prompt_tuning_init": "TEXT"}, ValueError, "tokenizer_name_or_path must be given"),
    (
        PromptTuningConfig,
        {"prompt_tuning_init": "TEXT", "tokenizer_name_or_path": "x"},
        ValueError,
        "prompt_tuning_init_text must be given for prompt_tuning_init TEXT, got None",
    ),
    (PromptTuningConfig, {"tokenizer_kwargs": {"use_fast": True}}, ValueError, "tokenizer_kwargs must be None unless"),
    (PromptTuningConfig, {"tokenizer_kwargs": [1]}, TypeError, "tokenizer_kwargs must be a dict or None"),
    (
        PromptEncoderConfig,
        {"encoder_reparameterization_type": "GRU"},
        ValueError,
        "must be one of MLP, LSTM, got 'GRU'",
    ),
    (PromptEncoderConfig, {"encoder_hidden_size": 0}, ValueError, "encoder_hidden_size must be positive, got 0"),
    (PromptEncoderConfig, {"encoder_num_layers": None}, TypeError, "encoder_num_layers must be a positive int, got"),
    (PromptEncoderConfig, {"encoder_dropout": 1.5}, ValueError, r"encoder_dropout must be in \[0, 1\], got 1.5"),
    (PromptEncoderConfig, {"encoder_dropout": float("nan")}, ValueError, "encoder_dropout must be in"),
    (PrefixTuningConfig, {"init_weights": "one"}, ValueError, "init_weights must be None or 'zero', got 'one'"),
    (PrefixTuningConfig, {"prefix_projection": 1}, TypeError, "prefix_projection must be True or False, got 1"),
    (PrefixTuningConfig, {"encoder_hidden_size": "8"}, TypeError, "encoder_hidden_size must be a positive int or None"),
    (PrefixTuningConfig, {"peft_type": "LORA"}, ValueError, "peft_type of PrefixTuningConfig must be 'PREFIX_TUNING'"),
    (PrefixTuningConfig, {"virtual_tokens": 3}, TypeError, "no field 'virtual_tokens'; near names: num_virtual_tokens"),
]


@pytest.mark.parametrize("cls, fields, kind, words", WRONG)
def test_wrong_values_are_refused_by_name(cls, fields, kind, words):
    """Would catch: a value that is taken without a word, as PEFT takes an init that it does not know for RANDOM."""
    with pytest.raises(kind, match=words):
        cls(**fields)


def test_a_value_set_later_is_checked_too():
    """Would catch: a configuration that was changed after it was made."""
    made = config(peftkern, "mlp")
    made.encoder_dropout = 2
    with pytest.raises(ValueError, match="encoder_dropout must be in"):
        peftkern.get_peft_model(tiny_llama(), made)


def test_layers_of_an_mlp():
    """Would catch: encoder_num_layers that is dropped silently where it has no effect."""
    with pytest.warns(UserWarning, match="encoder_num_layers=3 has no effect on an MLP"):
        peftkern.get_peft_model(tiny_llama(), config(peftkern, "mlp", encoder_num_layers=3))


# --- what vectors start from -----------------------------------------------------------------------------------------


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A tokenizer on disk that knows the words w0, w1, ... by their numbers; anything else is 99."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    raw = Tokenizer(models.WordLevel({f"w{i}": i for i in range(200)} | {"<unk>": 99}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")
    made.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def text(tokenizer: Path, words: str, **fields: Any) -> dict[str, Any]:
    start = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": words}
    return start | {"tokenizer_name_or_path": str(tokenizer)} | fields


@pytest.mark.parametrize("words", ["w7 w8", "w1 w2 w3 w4 w5 w6 w7"])
def test_a_text_to_start_from(tokenizer, words):
    """Would catch: a text that is not repeated or cut to the tokens, or looked up elsewhere than in the model."""
    fields = text(tokenizer, words, tokenizer_kwargs={"use_fast": True})
    ours, theirs = (prompted(library, "prompt", **fields) for library in (peftkern, peft))
    started = ours.prompt_encoder["default"].embedding.weight
    assert torch.equal(started, theirs.prompt_encoder["default"].embedding.weight)
    named = [int(word[1:]) for word in (words.split() * 5)[:5]]
    assert torch.equal(started, ours.word_embeddings.weight[named]) and started.requires_grad
    assert started.data_ptr() != ours.word_embeddings.weight.data_ptr()
    assert ours.active_peft_config.tokenizer_kwargs == {"use_fast": True}


def test_words_are_looked_up_as_the_model_does():
    """Would catch: rows of the table where the model scales what it looks up, which PEFT gets right too."""
    ours, theirs = (prompted(library, "vocabulary", lambda: causal("gemma3")) for library in (peftkern, peft))
    started = ours.prompt_encoder["default"].embedding.weight
    assert torch.equal(started, theirs.prompt_encoder["default"].embedding.weight)
    assert not any(torch.equal(started[0], row) for row in ours.word_embeddings.weight)


def test_a_text_that_cannot_be_started_from(tokenizer):
    """Would catch: code of a stranger's tokenizer, no tokens at all, or tokens that the model does not have."""
    base = tiny_llama()
    before = fingerprint(base)
    for fields, words in (
        (text(tokenizer, "w1", tokenizer_kwargs={"trust_remote_code": True}), "must not have trust_remote_code"),
        (text(tokenizer, "   "), "expected a text with tokens in it"),
        (text(tokenizer, "w1 w150"), f"its token 150 is not among the model's {VOCAB}"),
    ):
        with pytest.raises(ValueError, match=words):
            quiet(prompted, peftkern, "prompt", lambda: base, **fields)
        assert fingerprint(base) == before


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["prompt", "mlp", "prefix"])
def test_models_that_are_refused(method):
    """Would catch: virtual tokens beside layers of LoRA, inside of a bare model, or under a name that a dict has."""
    made = config(peftkern, method)
    lora = peftkern.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted = peftkern.inject_adapter_in_model(lora, tiny_llama(), "other")
    with pytest.raises(ValueError, match="it carries adapters in its layers already"):
        quiet(peftkern.get_peft_model, adapted, made)
    with pytest.raises(ValueError, match="inject_adapter_in_model cannot inject .*use get_peft_model"):
        peftkern.inject_adapter_in_model(made, tiny_llama())
    with pytest.raises(NotImplementedError, match="mixed"):
        peftkern.get_peft_model(tiny_llama(), made, mixed=True)
    base = tiny_llama()
    before = fingerprint(base)
    with pytest.raises(ValueError, match="adapter_name must be .* got 'keys'"):
        peftkern.get_peft_model(base, made, adapter_name="keys")
    assert fingerprint(base) == before
    model = prompted(peftkern, method)
    for other in (lora, config(peftkern, "prompt" if method != "prompt" else "prefix")):
        with pytest.raises(ValueError, match="peft_config: the model has"):
            model.add_adapter("other", other)
    with pytest.raises(ValueError, match="expected a base model, got a PeftModelForCausalLM"):
        peftkern.get_peft_model(model, lora)
    assert list(model.prompt_encoder) == ["default"]


def test_models_without_sizes():
    """Would catch: a model without a configuration that fails with an AttributeError."""
    with pytest.raises(ValueError, match="token_dim must be given: the model's configuration has none of hidden_size"):
        peftkern.get_peft_model(mlp(), config(peftkern, "prompt"))
    with pytest.raises(ValueError, match="num_layers must be given"):
        peftkern.get_peft_model(mlp(), config(peftkern, "prefix"))
    made = peftkern.get_peft_model(mlp(), config(peftkern, "prompt", token_dim=16))
    with pytest.raises(ValueError, match="input_ids: the model does not say where it looks them up"):
        made(ids())


def test_classes_of_ones_own():
    """Would catch: a subclass of a task's class whose methods are silently those of another class."""

    class Mine(peftkern.PeftModelForCausalLM):
        pass

    with pytest.raises(TypeError, match="Mine: for prompt learning derive it from peftkern.prompt_models.PeftModelFor"):
        Mine(tiny_llama(), config(peftkern, "prompt"))
    from peftkern.prompt_models import PeftModelForCausalLM

    class Prompted(PeftModelForCausalLM):
        pass

    made = Prompted(tiny_llama(), config(peftkern, "prompt", task=None))
    assert isinstance(made, Prompted) and made(ids()).logits.shape[1] == 17
    direct = peftkern.PeftModelForSequenceClassification(bert(), config(peftkern, "prompt", task="SEQ_CLS"))
    assert direct._is_prompt_learning and dataclasses.is_dataclass(direct.active_peft_config)


def test_a_prefix_goes_where_the_layers_are():
    """Would catch: keys of layers on several devices that all stay on the first; offloaded layers compute on it."""
    from peftkern.integrations.prompts import _devices_of_layers

    base = tiny_llama()
    assert _devices_of_layers(base) == {}
    base.hf_device_map = {"model.embed_tokens": "cpu", "model.layers.0": 0, "model.layers.1": "disk"}
    base.model.layers[1].to("meta")
    assert _devices_of_layers(base) == {0: torch.device("cpu"), 1: 0}


def test_a_postprocessing_function_makes_the_cache(monkeypatch):
    """Would catch: PEFT's table of functions for models with caches of their own that nobody looks into."""
    from peftkern.utils import TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING as TABLE

    model = prompted(peftkern, "prefix")
    monkeypatch.setitem(TABLE, "llama", lambda layers: [layer.shape for layer in layers])
    assert model.get_prompt(3) == [(2, 3, 2, 5, 16)] * 2
