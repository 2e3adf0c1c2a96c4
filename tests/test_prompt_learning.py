"""Virtual tokens of a language model, held against Hugging Face PEFT's: outputs, gradients, training, generation."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

import peftkern
from prompt_data import METHODS, PREFIXES, TOKENS, bert, causal, gradients, padded_mask, prompted, quiet
from tiny_models import copied, ids, tiny_llama

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


def pair(method: str, model: Any = tiny_llama, task: str = "CAUSAL_LM", **fields: Any) -> tuple[Any, Any]:
    return prompted(peftkern, method, model, task, **fields), prompted(peft, method, model, task, **fields)


def trainable(model: Any) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("method", METHODS)
def test_names_and_counts_are_those_of_peft(method):
    """Would catch: another name or start of a parameter, another count, a base model that is trained along."""
    ours, theirs = pair(method)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert trainable(ours) == trainable(theirs) and all(name.startswith("prompt_encoder.") for name in trainable(ours))
    for (name, mine), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert mine.dtype == other.dtype and torch.equal(mine, other), name
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    assert ours.active_peft_config.is_prompt_learning and ours.active_adapters == theirs.active_adapters == ["default"]
    assert torch.equal(ours.prompt_tokens["default"], theirs.prompt_tokens["default"])
    assert torch.equal(ours.get_prompt_embedding_to_save("default"), theirs.get_prompt_embedding_to_save("default"))
    assert type(ours).__name__ == "PeftModelForCausalLM" and isinstance(ours, peftkern.PeftModelForCausalLM)
    assert isinstance(ours, peft.PeftModelForCausalLM) and ours.get_base_model() is ours.base_model
    assert ours.word_embeddings is ours.base_model.get_input_embeddings() and ours.peft_type == theirs.peft_type
    assert ours.modules_to_save is None and ours.has_active_enabled_adapter


@pytest.mark.parametrize("method", METHODS)
def test_forward_and_gradients_are_those_of_peft(method):
    """Would catch: a mask, a label or a position that does not count virtual tokens; prompts that get no gradient."""
    ours, theirs = pair(method)
    embeds = ours.word_embeddings(ids()).detach()
    for kwargs in (
        {"input_ids": ids(), "labels": ids()},
        {"input_ids": ids(), "attention_mask": padded_mask(), "labels": ids(), "output_hidden_states": True},
        {"input_ids": ids(), "attention_mask": padded_mask("left"), "labels": ids()},
        {"inputs_embeds": embeds, "attention_mask": padded_mask(), "labels": ids(), "return_dict": False},
    ):
        found = []
        for model in (ours, theirs):
            model.zero_grad()
            output = model(**kwargs)
            output[0].backward()
            found.append((output[0], output[1], gradients(model)))
        torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-5, atol=1e-5)
        assert found[0][2].keys() == found[1][2].keys() == trainable(theirs)
        for name, other in found[1][2].items():
            torch.testing.assert_close(found[0][2][name], other, rtol=1e-5, atol=1e-7, msg=name)
    with torch.no_grad():
        assert not torch.allclose(ours(ids()).logits[:, -12:], tiny_llama()(ids()).logits, atol=1e-3), "no effect"


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_positions_are_those_of_the_text(method):
    """Would catch: positions that are ignored, or given to virtual tokens too. Counted from 0 they change nothing; a
    row padded on the left that says its positions gives its tokens what they give alone."""
    model = prompted(peftkern, method)
    plain = model(ids()).logits
    counted = model(ids(), position_ids=torch.arange(12).expand(2, -1)).logits
    torch.testing.assert_close(counted, plain, rtol=1e-5, atol=1e-5)
    mask = padded_mask("left")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    alone = model(ids()[1:, 4:]).logits[:, -8:]
    together = model(ids(), attention_mask=mask, position_ids=positions).logits[1:, -8:]
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model(ids(), attention_mask=mask).logits[1:, -8:], alone, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_training_curve_is_that_of_peft(method):
    """Would catch: a gradient or a mode (dropout, frozen parts) that differs once the optimizer has moved."""
    curves = []
    for library in (peftkern, peft):
        model = prompted(library, method).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03)
        curves.append([])
        for step in range(6):
            loss = model(input_ids=ids(seed=step % 2) % 8 + 1, labels=ids(seed=step % 2) % 8 + 1).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curves[-1].append(loss.item())
    assert curves[0] == pytest.approx(curves[1], abs=1e-4) and curves[0][-1] < curves[0][0] - 0.02, curves


@pytest.mark.parametrize("method", METHODS)
def test_generate_is_that_of_peft(method):
    """Would catch: virtual tokens that are put in at each step, at none, once for all beams, or lost with the cache."""
    ours, theirs = pair(method)
    mask = torch.ones(2, 12, dtype=torch.long)
    for kwargs in (
        {"max_new_tokens": 6},
        {"max_new_tokens": 4, "num_beams": 3},
        {"max_length": 16, "num_return_sequences": 2, "do_sample": True, "temperature": 0.7},
        {"max_new_tokens": 3, "output_logits": True, "return_dict_in_generate": True},
    ):
        found = []
        for model in (ours, theirs):
            torch.manual_seed(1)
            arguments = {"do_sample": False} | kwargs
            found.append(quiet(model.generate, input_ids=ids(), attention_mask=mask, **arguments))
        if "output_logits" in kwargs:
            for mine, other in zip(found[0].logits, found[1].logits, strict=True):
                torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
            found = [output.sequences for output in found]
        assert torch.equal(*found), kwargs
    arguments = {"attention_mask": mask, "max_new_tokens": 3, "do_sample": False, "use_cache": False}
    assert torch.equal(ours.generate(ids(), **arguments), found[0])  # PEFT's prefix fails without a cache
    assert "prepare_inputs_for_generation" not in vars(ours.base_model), "the base model was patched"
    assert not torch.equal(found[0], tiny_llama().generate(ids(), attention_mask=mask, max_new_tokens=3))


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_rows_padded_on_the_left_generate_as_they_do_alone(method):
    """Would catch: positions that count padding between the virtual tokens and the text, as PEFT's of vectors do."""
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    gaps = []
    for library in (peftkern, peft):
        model = prompted(library, method)
        mask = padded_mask("left")
        together = quiet(model.generate, input_ids=ids() * mask, attention_mask=mask, **options)
        alone = quiet(model.generate, input_ids=ids()[1:, 4:], attention_mask=mask[1:, 4:], **options)
        steps = zip(together.logits, alone.logits, strict=True)
        gaps.append(max(float((mine[1] - other[0]).abs().max()) for mine, other in steps))
    assert gaps[0] < 1e-5, gaps
    assert (gaps[1] > 1e-3) == (method == "prompt"), gaps


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_a_cache_with_tokens_has_the_virtual_ones_already(method):
    """Would catch: a loop that decodes by itself and is given the virtual tokens anew at each call."""
    model = prompted(peftkern, method)
    whole = model(ids(), attention_mask=padded_mask("left")).logits[:, -12:]
    first = model(ids()[:, :7], attention_mask=padded_mask("left")[:, :7], use_cache=True)
    cache = first.past_key_values
    rest = model(ids()[:, 7:], attention_mask=padded_mask("left"), past_key_values=cache).logits
    torch.testing.assert_close(torch.cat([first.logits[:, -7:], rest], 1), whole, rtol=1e-4, atol=1e-5)
    assert cache.get_seq_length() == TOKENS + 12


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("name", ["gpt2", "multi-query", "falcon", "sliding", "gemma3", "wide heads", "bloom"])
def test_other_architectures(method, name):
    """Would catch: names of sizes, shared keys, windows, scaled embeddings or biases of positions that differ."""
    ours = prompted(peftkern, method, lambda: causal(name))
    want = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    if (method, name) == ("prefix", "falcon"):  # PEFT's prefix does not fit the one head of its keys
        with torch.no_grad():
            whole, part = ours(ids()).logits, ours(ids()[:, :7], use_cache=True)
            rest = ours(ids()[:, 7:], past_key_values=part.past_key_values).logits
        torch.testing.assert_close(rest, whole[:, 7:], rtol=1e-4, atol=1e-5)
        assert ours.peft_config["default"].num_attention_heads == 1
        return
    theirs = prompted(peft, method, lambda: causal(name))
    assert torch.equal(quiet(ours.generate, ids(), **want), quiet(theirs.generate, input_ids=ids(), **want))
    loss = [quiet(m, input_ids=ids(), attention_mask=padded_mask(), labels=ids()).loss for m in (ours, theirs)]
    torch.testing.assert_close(*loss, rtol=1e-6, atol=1e-6)


def test_words_narrower_than_the_model():
    """Would catch: virtual tokens as wide as the hidden states, which PEFT makes and cannot put beside the words."""
    model = prompted(peftkern, "prompt", lambda: causal("narrow words"))
    assert model.peft_config["default"].token_dim == 16
    model(ids(), labels=ids()).loss.backward()
    assert gradients(model)["prompt_encoder.default.embedding.weight"].abs().sum() > 0


@pytest.mark.parametrize("method", METHODS)
def test_get_prompt(method):
    """Would catch: vectors or keys in another order, shape or dtype, or rows that are not the same."""
    ours, theirs = pair(method, lambda: tiny_llama(num_key_value_heads=1).bfloat16())
    mine, other = ours.get_prompt(3), quiet(theirs.get_prompt, 3)
    if method in PREFIXES:
        assert type(mine) is type(other) is transformers.DynamicCache
        mine = torch.stack([side for layer in mine.layers for side in (layer.keys, layer.values)])
        other = torch.stack([side for layer in other.layers for side in (layer.keys, layer.values)])
        assert mine.shape == (4, 3, 1, TOKENS, 16) and mine.dtype == torch.bfloat16
    assert mine.dtype == other.dtype and torch.equal(mine, other)


def test_a_prefix_of_zeros():
    """Would catch: init_weights that is left out: keys of zeros take attention, but values of zeros give nothing."""
    for method in PREFIXES:
        ours, theirs = pair(method, init_weights="zero")
        assert ours.get_prompt(1).layers[1].values.count_nonzero() == 0
        torch.testing.assert_close(ours(ids()).logits, theirs(input_ids=ids()).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["prompt", "mlp", "prefix"])
def test_bases_of_16_bits(method, dtype):
    """Would catch: virtual tokens in 16 bits, which would not learn, or ones that do not fit the base's dtype."""
    ours, theirs = pair(method, lambda: tiny_llama().to(dtype))
    losses = [model(input_ids=ids(), labels=ids()).loss for model in (ours, theirs)]
    assert torch.equal(*losses) and all(p.dtype == torch.float32 for p in ours.prompt_encoder.parameters())
    losses[0].backward()
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in gradients(ours).values())


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_a_quantized_base(method):
    """Would catch: a 4-bit base that prompts get no gradient through, or that is not left as it was."""
    base = peftkern.quantize_model(tiny_llama(intermediate_size=128), {"load_in_4bit": True}, progress=False)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    found = []
    for library in (peftkern, peft):
        model = prompted(library, method, lambda: base)
        model(input_ids=ids(), labels=ids()).loss.backward()
        found.append((gradients(model), model.get_nb_trainable_parameters()))
    assert found[0][0].keys() == trainable(model) and found[0][1] == found[1][1]
    for name, value in found[1][0].items():
        torch.testing.assert_close(found[0][0][name], value, rtol=1e-5, atol=1e-7)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


@pytest.mark.parametrize("method", ["prompt", "mlp"])
def test_gradient_checkpointing(method):
    """Would catch: regions that are computed again without the virtual tokens, or no gradient through them."""
    found = []
    for on in (False, True):
        model = prompted(peftkern, method).train()
        if on:
            model.gradient_checkpointing_enable()
        model(ids(), labels=ids()).loss.backward()
        found.append(gradients(model))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-5, atol=1e-7)


def test_several_adapters():
    """Would catch: a new adapter that becomes active, a frozen one that learns, a deleted one that lives on."""
    ours, theirs = pair("prompt")
    for model, library in ((ours, peftkern), (theirs, peft)):
        torch.manual_seed(5)
        model.add_adapter("second", library.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    for name in ("default", "second", "default"):
        for model in (ours, theirs):
            model.set_adapter(name)
        torch.testing.assert_close(ours(ids()).logits, theirs(input_ids=ids()).logits, rtol=1e-5, atol=1e-5)
        assert ours.active_adapters == theirs.active_adapters == [name]
        assert trainable(ours) == {f"prompt_encoder.{name}.embedding.weight"}
    ours.set_adapter("second", inference_mode=True)
    assert trainable(ours) == set()
    with pytest.warns(UserWarning, match="'second' was deleted; 'default' is active now"):
        ours.delete_adapter("second")
    quiet(theirs.delete_adapter, "default")
    assert list(ours.peft_config) == list(ours.prompt_encoder) == list(ours.prompt_tokens) == ["default"]
    assert trainable(ours) == {"prompt_encoder.default.embedding.weight"}
    ours.delete_adapter("default")
    with torch.no_grad():
        assert torch.equal(ours(ids()).logits, tiny_llama()(ids()).logits)
    with pytest.raises(ValueError, match="no adapter is active"):
        ours.get_prompt(1)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_a_disabled_adapter_leaves_the_base_model(method):
    """Would catch: virtual tokens, or a trained head, within the block; or none after it."""
    model = prompted(peftkern, method, modules_to_save=["lm_head"])
    model.base_model.lm_head.modules_to_save["default"].weight.data.mul_(1.5)
    before = model(ids()).logits
    arguments = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    with torch.no_grad(), model.disable_adapter():
        with model.disable_adapter():
            assert not model.has_active_enabled_adapter
        assert torch.equal(model(ids()).logits, tiny_llama()(ids()).logits)
        assert torch.equal(model.generate(ids(), **arguments), tiny_llama().generate(ids(), **arguments))
    assert torch.equal(model(ids()).logits, before) and model.has_active_enabled_adapter
    assert "base_model.lm_head.modules_to_save.default.weight" in trainable(model)


def test_word_embeddings_that_are_trained_are_used():
    """Would catch: the text looked up in the frozen original, as PEFT does with modules_to_save=["embed_tokens"]."""
    model = prompted(peftkern, "prompt", modules_to_save=["embed_tokens"])
    model(ids(), labels=ids()).loss.backward()
    found = gradients(model)
    assert found["base_model.model.embed_tokens.modules_to_save.default.weight"].abs().sum() > 0


@pytest.mark.parametrize("how", ["copy", "pickle"])
def test_copies(how):
    """Would catch: a class that cannot be found again, or a copy that shares its prompt with the original."""
    model = prompted(peftkern, "prompt")
    made = copied(model, how)
    assert type(made) is type(model) and torch.equal(made(ids()).logits, model(ids()).logits)
    made.prompt_encoder["default"].embedding.weight.data.zero_()
    assert not torch.equal(made(ids()).logits, model(ids()).logits)
    assert pickle.loads(pickle.dumps(model.peft_config["default"])) == copy.deepcopy(model.peft_config["default"])


def test_refusals_of_a_call():
    """Would catch: an argument that is dropped, or an error of torch's from deep inside of the model."""
    vectors, prefix = prompted(peftkern, "prompt"), prompted(peftkern, "prefix")
    cache = vectors(ids(), use_cache=True).past_key_values
    flat = torch.ones(2, 1, 12, 12)
    cases: list[tuple[Any, type[Exception], str]] = [
        (lambda m: m(ids(), adapter_names=["default"] * 2), NotImplementedError, "adapter_names: not for prompt learn"),
        (lambda m: m.generate(ids(), adapter_names=["default"] * 2), NotImplementedError, "adapter_names: not for pro"),
        (lambda m: m(), ValueError, "expects one of them, got neither"),
        (lambda m: m(ids(), inputs_embeds=torch.zeros(2, 12, 64)), ValueError, "expects one of them, got both"),
        (lambda m: m(ids(), attention_mask=flat), ValueError, r"attention_mask: .* \[2, 1, 12, 12\]"),
        (lambda m: m(ids(), attention_mask=torch.ones(1, 12)), ValueError, r"attention_mask: .* got shape \[1, 12\]"),
        (lambda m: m(ids(), position_ids=[0]), ValueError, "position_ids: .* got list"),
        (lambda m: m(ids(), task_ids=torch.zeros(2)), NotImplementedError, "task_ids: multitask"),
        (lambda m: m.generate(ids(), cache_implementation="static"), NotImplementedError, "cache_implementation: "),
        (lambda m: m.generate(ids(), prompt_lookup_num_tokens=2), NotImplementedError, "prompt_lookup_num_tokens: "),
        (lambda m: m.generate(ids(), past_key_values=cache), ValueError, "past_key_values: with prompt learning"),
        (lambda m: m.set_requires_grad("default"), TypeError, "set_requires_grad: not for prompt learning"),
        (lambda m: m.get_layer_status(), TypeError, "expected adapters in layers, got those of"),
        (lambda m: peftkern.get_model_status(m), TypeError, "expected adapters in layers, got those of"),
        (lambda m: m.merge_and_unload(), AttributeError, "merge_and_unload: prompt learning changes no weights"),
        (lambda m: m.set_adapter("other"), ValueError, "no adapter 'other'"),
    ]
    with pytest.raises(ValueError, match="labels: prompt learning expects a tensor .* got a list"):
        vectors(ids(), labels=[1, 2])  # a prefix leaves labels to the model
    for call, kind, words in cases:
        for model in (vectors, prefix):
            with pytest.raises(kind, match=words):
                quiet(call, model)
    assert not hasattr(prefix, "merge_adapter")


def test_a_prefix_refuses_what_drops_its_cache():
    """Would catch: a prefix that is silently left out by checkpointed layers, or by a model that takes no cache."""
    checkpointed = tiny_llama()
    checkpointed.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing: not with prefix tuning"):
        prompted(peftkern, "prefix", lambda: checkpointed)
    assert all(p.requires_grad for p in checkpointed.parameters()), "the model was changed"
    later = prompted(peftkern, "prefix").train()
    later.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing: not with prefix tuning"):
        later(ids(), labels=ids())
    deaf = prompted(peftkern, "prefix", lambda: bert("BertModel"), "FEATURE_EXTRACTION")
    forward = deaf.base_model.forward
    deaf.base_model.forward = lambda past_key_values=None, **kwargs: forward(**kwargs | {"attention_mask": None})
    with pytest.raises(ValueError, match="BertModel put no keys into past_key_values"):
        deaf(ids(), attention_mask=padded_mask())
