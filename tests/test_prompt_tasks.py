"""Virtual tokens for other tasks than language models', held against PEFT's on each; PEFT's faults are named here."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import peftkern
from prompt_data import PREFIXES, TOKENS, bart, bert, gradients, padded_mask, prompted, quiet, t5
from tiny_models import ids, tiny_llama

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

KINDS = ("prompt", "mlp", "prefix", "projected")
FULL = torch.ones(2, 12, dtype=torch.long)
TYPES = torch.cat([torch.zeros(2, 6), torch.ones(2, 6)], 1).long()
TARGETS = ids(length=7, seed=3)

# name -> (model, task, arguments that PEFT can take too)
TASKS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "bert texts": (bert, "SEQ_CLS", {"token_type_ids": TYPES, "labels": torch.tensor([0, 2])}),
    "llama texts": (
        lambda: tiny_llama(cls="LlamaForSequenceClassification"),
        "SEQ_CLS",
        {"attention_mask": FULL, "labels": torch.tensor([0, 1])},
    ),
    "bert tokens": (lambda: bert("BertForTokenClassification"), "TOKEN_CLS", {"token_type_ids": TYPES}),
    "llama tokens": (lambda: tiny_llama(cls="LlamaForTokenClassification"), "TOKEN_CLS", {}),
    "bert answers": (lambda: bert("BertForQuestionAnswering", 2), "QUESTION_ANS", {}),
    "llama answers": (lambda: tiny_llama(cls="LlamaForQuestionAnswering"), "QUESTION_ANS", {}),
    "bert features": (lambda: bert("BertModel"), "FEATURE_EXTRACTION", {"output_hidden_states": True}),
    "llama features": (lambda: tiny_llama(cls="LlamaModel"), "FEATURE_EXTRACTION", {"return_dict": False}),
    "t5": (t5, "SEQ_2_SEQ_LM", {"labels": TARGETS}),
    "bart": (bart, "SEQ_2_SEQ_LM", {"labels": TARGETS, "decoder_attention_mask": torch.ones_like(TARGETS)}),
}


def tensors(output: Any) -> list[torch.Tensor]:
    values = output.values() if hasattr(output, "values") else output
    return [value for value in values if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("method", KINDS)
@pytest.mark.parametrize("name", TASKS)
def test_forward_and_gradients_are_those_of_peft(name, method):
    """Would catch: an argument that does not count virtual tokens, a head that is not trained or not saved."""
    model, task, kwargs = TASKS[name]
    found = []
    for library in (peftkern, peft):
        made = prompted(library, method, model, task)
        output = tensors(quiet(made, input_ids=ids(), **({"attention_mask": padded_mask()} | kwargs)))
        output[0].sum().backward()
        trained = {n for n, p in made.named_parameters() if p.requires_grad}
        found.append((type(made).__name__, output, gradients(made), trained))
    assert found[0][0] == found[1][0] and found[0][3] == found[1][3] and len(found[0][1]) == len(found[1][1])
    for mine, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    assert found[0][2].keys() == found[1][2].keys() and any("prompt_encoder" in key for key in found[0][2])
    for key, other in found[1][2].items():
        # A batch's rows are added up in another order: an error relative to the largest sum.
        torch.testing.assert_close(found[0][2][key], other, rtol=0, atol=1e-5 * float(other.abs().max()), msg=key)


@pytest.mark.parametrize("method", KINDS)
@pytest.mark.parametrize("model", [t5, bart])
def test_generation_of_pairs_is_that_of_peft(model, method):
    """Would catch: vectors that the encoder does not see, a prefix lost at a later step or shared by beams."""
    ours, theirs = (prompted(library, method, model, "SEQ_2_SEQ_LM") for library in (peftkern, peft))
    for options in ({"do_sample": False}, {"num_beams": 3}):
        kwargs = {"attention_mask": padded_mask(), "max_new_tokens": 6} | options
        tokens = quiet(ours.generate, ids(), **kwargs)
        assert torch.equal(tokens, quiet(theirs.generate, input_ids=ids(), **kwargs))
    if method == "prompt":
        assert ours.get_prompt(2).shape == (2, 2 * TOKENS, 32), "PEFT's files hold a prompt for the decoder, unused"


def test_a_decoder_of_other_depth_than_its_encoder():
    """Would catch: a prefix made for as many layers as the encoder has, which leaves some of the decoder's without."""
    model = prompted(peftkern, "prefix", lambda: t5(3), "SEQ_2_SEQ_LM", num_transformer_submodules=1)
    assert model.peft_config["default"].num_layers == 3
    cache = model.get_prompt(2)
    assert [cache.self_attention_cache.get_seq_length(layer) for layer in range(3)] == [TOKENS] * 3
    model(ids(), labels=TARGETS).loss.backward()
    by_layer = gradients(model)["prompt_encoder.default.embedding.weight"].view(TOKENS, 3, 2, -1)
    assert (by_layer.abs().sum((0, 2, 3)) > 0).all()
    two = prompted(peftkern, "prefix", t5, "SEQ_2_SEQ_LM")
    two(ids(), labels=TARGETS).loss.backward()
    used = gradients(two)["prompt_encoder.default.embedding.weight"].view(TOKENS, 2, 2, -1).abs().sum((0, 2, 3)) > 0
    assert used.tolist() == [True, False], "PEFT's layout: layer i takes the keys of layer 2 i"


@pytest.mark.parametrize("model", [lambda: bert("BertForTokenClassification"), TASKS["llama tokens"][0]])
def test_labels_of_tokens_stay_with_their_tokens(model):
    """Would catch: labels that are not lengthened: PEFT's token classification fails with vectors and labels."""
    made = prompted(peftkern, "prompt", model, "TOKEN_CLS")
    labels = ids(seed=4) % 2
    output = made(ids(), attention_mask=padded_mask(), labels=labels)
    expected = torch.nn.functional.cross_entropy(output.logits[:, TOKENS:].flatten(0, 1), labels.flatten())
    torch.testing.assert_close(output.loss, expected)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_answers_are_places_in_the_text(method):
    """Would catch: places that are not moved behind the vectors, where PEFT marks the token `TOKENS` places before."""
    made = prompted(peftkern, method, lambda: bert("BertForQuestionAnswering", 2), "QUESTION_ANS")
    start, end = torch.tensor([0, 7]), torch.tensor([3, 11])
    output = made(ids(), token_type_ids=TYPES, start_positions=start, end_positions=end)
    logits = output.start_logits[:, -12:], output.end_logits[:, -12:]
    every = output.start_logits.logsumexp(1), output.end_logits.logsumexp(1)
    rows = torch.arange(2)
    losses = [
        (total - side[rows, place]).mean() for side, place, total in zip(logits, (start, end), every, strict=True)
    ]
    torch.testing.assert_close(output.loss, sum(losses) / 2)
    without = made(ids(), start_positions=start, end_positions=end)
    assert not torch.allclose(without.start_logits, output.start_logits), "token_type_ids were dropped, as in PEFT"


def test_token_types_that_a_task_has_not():
    """Would catch: a warning that is missing where an argument is left out, as PEFT does for these tasks."""
    made = prompted(peftkern, "prompt", lambda: bert("BertModel"), "FEATURE_EXTRACTION")
    with pytest.warns(UserWarning, match="token_type_ids: left out"):
        output = made(ids(), token_type_ids=TYPES)
    assert torch.equal(output.last_hidden_state, made(ids()).last_hidden_state)


def test_heads_are_named_once():
    """Would catch: PEFT's modules_to_save, which grow by the task's heads with each adapter that is made or read."""
    made = prompted(peftkern, "prompt", bert, "SEQ_CLS")
    assert made.peft_config["default"].modules_to_save == ["classifier", "score"]
    made.add_adapter("other", peftkern.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2))
    made.set_adapter("other")
    trained = {name for name, p in made.named_parameters() if p.requires_grad}
    assert trained == {"prompt_encoder.other.embedding.weight"} | {
        f"base_model.classifier.modules_to_save.other.{name}" for name in ("weight", "bias")
    }


@pytest.mark.parametrize("method", ["prompt", *PREFIXES])
def test_refusals(method):
    """Would catch: an encoder's output that is taken for one with virtual tokens; a task that has no meaning here."""
    made = prompted(peftkern, method, t5, "SEQ_2_SEQ_LM")
    if method == "prompt":
        with pytest.raises(ValueError, match="encoder_outputs: prompt learning expects the encoder's input"):
            made(encoder_outputs=(torch.zeros(2, 3, 32),), labels=TARGETS)
    cases: list[tuple[Any, str | None, dict[str, Any], str]] = [
        (tiny_llama, None, {}, "task_type must be one of"),
        (tiny_llama, "CAUSAL_LM", {"num_transformer_submodules": 2}, "num_transformer_submodules must be 1 for task"),
        (tiny_llama, "SEQ_2_SEQ_LM", {}, "task_type must not be SEQ_2_SEQ_LM for a model that is no encoder-decoder"),
    ]
    if method in PREFIXES:
        cases.append((t5, "SEQ_CLS", {}, "task_type must be SEQ_2_SEQ_LM for prefix tuning of an encoder-decoder"))
        cases.append((distilbert, "SEQ_CLS", {}, "DistilBertForSequenceClassification takes no past_key_values"))
    for model, task, fields, words in cases:
        with pytest.raises(ValueError, match=words):
            prompted(peftkern, method, model, task, **fields)


def distilbert() -> torch.nn.Module:
    """A model whose attention has no cache."""
    import transformers

    sizes = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}
    return transformers.DistilBertForSequenceClassification(transformers.DistilBertConfig(**sizes, vocab_size=128))
