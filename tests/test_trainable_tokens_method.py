"""Training rows of embeddings as a method by itself (`TrainableTokensConfig`), against PEFT."""

from __future__ import annotations

import json
import warnings
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import peftkern
import tiny_models
from peftkern.tuners.trainable_tokens import TrainableTokensLayer
from test_trainable_tokens import gradients, ids

TARGETS = [None, ["embed_tokens"], ["lm_head"], "model.embed_tokens"]


def made(lib: Any, targets: Any = None, tied: bool = True, **options: Any) -> Any:
    """A tiny Llama with random trained rows, equal for equal arguments."""
    config = lib.TrainableTokensConfig(token_indices=[3, 1, 7], target_modules=targets, **options)
    model = lib.get_peft_model(tiny_models.tiny_llama(tie_word_embeddings=tied).train(), config)
    tiny_models.randomize(model, ("tokens_delta",))
    return model


def add(lib: Any, model: Any, name: str, indices: list[int]) -> None:
    model.add_adapter(name, lib.TrainableTokensConfig(token_indices=indices))
    rows = model.get_input_embeddings().trainable_tokens_delta[name]
    rows.data.copy_(torch.randn(rows.shape, generator=torch.Generator().manual_seed(len(name))))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_everything_is_as_in_peft(tmp_path, targets, tied):
    """Catches an embedding that is not found, a head that is not tied, and names in models and files."""
    theirs, ours = made(peft, targets, tied), made(peftkern, targets, tied)
    expected = theirs(ids()).logits
    torch.testing.assert_close(ours(ids()).logits, expected, rtol=1e-6, atol=1e-6)
    a, b = gradients(theirs), gradients(ours)
    assert list(a) == list(b) and len(a) == 1
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=1e-5, atol=1e-6, msg=name)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [(n, p.requires_grad) for n, p in ours.named_parameters()] == [
        (n, p.requires_grad) for n, p in theirs.named_parameters()
    ]
    assert [vars(s) for s in ours.get_layer_status()] == [vars(s) for s in theirs.get_layer_status()]
    assert vars(ours.get_model_status()) == vars(theirs.get_model_status())
    for lib, model in ((peft, theirs), (peftkern, ours)):
        folder = tmp_path / lib.__name__
        model.save_pretrained(folder)
        for reader in (peft, peftkern):
            base = tiny_models.tiny_llama(tie_word_embeddings=tied)
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message=".*(missing|unexpected|unknown).*")
                again = reader.PeftModel.from_pretrained(base, folder)
            torch.testing.assert_close(again(ids()).logits, expected, rtol=1e-6, atol=1e-6)
    files = [load_file(tmp_path / lib.__name__ / "adapter_model.safetensors") for lib in (peft, peftkern)]
    assert files[0].keys() == files[1].keys()
    saved = [json.loads((tmp_path / lib.__name__ / "adapter_config.json").read_text()) for lib in (peft, peftkern)]
    for settings in saved:
        settings.pop("auto_mapping")
    assert saved[0] == saved[1]
    for whole in (True, False):
        states = [peft.get_peft_model_state_dict(theirs, save_embedding_layers=whole)]
        states += [peftkern.get_peft_model_state_dict(ours, save_embedding_layers=whole)]
        assert states[0].keys() == states[1].keys()


def test_a_tied_head_that_is_named_too():
    """Catches two layers around one head (PEFT's), or rows of its own beside those of the embedding."""
    model = made(peftkern, ["embed_tokens", "lm_head"])
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert head.tied_adapter is embedding and type(head.base_layer) is nn.Linear
    torch.testing.assert_close(model(ids()).logits, made(peft)(ids()).logits, rtol=1e-6, atol=1e-6)


def test_several_adapters():
    """Catches rows of an adapter that is not active. (With a tied head PEFT fails at a second adapter.)"""
    models = [made(peft, tied=False), made(peftkern, tied=False)]
    for lib, model in zip((peft, peftkern), models, strict=True):
        add(lib, model, "two", [1, 5])
        add(lib, model, "apart", [2])

    def same() -> None:
        torch.testing.assert_close(models[1](ids()).logits, models[0](ids()).logits, rtol=1e-6, atol=1e-6)

    same()
    for model in models:
        model.set_adapter("two")
    same()
    with models[0].disable_adapter(), models[1].disable_adapter():
        same()
    for model in models:
        model.base_model.set_adapter(["apart", "two"])
    same()
    with pytest.raises(ValueError, match=r"token indices.*'default' and 'two': both have rows for \[1\]"):
        models[1].base_model.set_adapter(["default", "two"])
    for model in models:
        model.merge_adapter()
    same()
    for model in models:
        model.unmerge_adapter()
        model.delete_adapter("apart")
    same()


def test_merging_with_a_tied_head():
    """Catches a tied layer that is merged twice, or with a warning of that, and one that is no longer tied."""
    model = made(peftkern)
    add(peftkern, model, "two", [1, 5])
    model.set_adapter("two")
    logits, weight = model(ids()).logits, model.get_input_embeddings().base_layer.weight
    clean = weight.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.merge_adapter()
        assert not torch.equal(weight, clean)
        torch.testing.assert_close(model(ids()).logits, logits, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        assert torch.equal(weight, clean)
        whole = model.merge_and_unload()
    torch.testing.assert_close(whole(ids()).logits, logits, rtol=1e-4, atol=1e-5)
    assert whole.lm_head.weight is whole.model.embed_tokens.weight and type(whole.lm_head) is nn.Linear


def test_mixed_batches():
    """Catches rows of the batch that take another one's rows (PEFT cannot do it here)."""
    model = made(peftkern).eval()
    add(peftkern, model, "two", [1, 5])
    x = torch.tensor([[1, 5, 3, 7]] * 3)
    mixed = model(x, adapter_names=["default", "__base__", "two"]).logits
    for row, name in ((0, "default"), (2, "two")):
        model.set_adapter(name)
        torch.testing.assert_close(mixed[row], model(x[:1]).logits[0], rtol=1e-5, atol=1e-6)
    with model.disable_adapter():
        torch.testing.assert_close(mixed[1], model(x[:1]).logits[0], rtol=1e-5, atol=1e-6)


def test_random_rows():
    """Catches `init_weights` that is ignored."""
    for lib in (peft, peftkern):
        torch.manual_seed(0)
        config = lib.TrainableTokensConfig(token_indices=[3, 1], init_weights=False)
        model = lib.get_peft_model(tiny_models.tiny_llama(), config)
        rows = model.get_input_embeddings().trainable_tokens_delta["default"]
        assert rows.std() > 0.5 and rows.requires_grad


WRONG = [
    ({"token_indices": []}, ValueError, "token_indices.*at least one"),
    ({"token_indices": [1, 1]}, ValueError, "token_indices.*once"),
    ({"token_indices": {"a": [1]}}, TypeError, "token_indices"),
    ({"token_indices": [-2]}, ValueError, "token_indices.*-2"),
    ({"token_indices": [1], "target_modules": 3}, TypeError, "target_modules"),
    ({"token_indices": [1], "target_modules": "("}, ValueError, "target_modules"),
    ({"token_indices": [1], "init_weights": 1}, TypeError, "init_weights"),
]


@pytest.mark.parametrize("options, error, match", WRONG, ids=[str(options) for options, _, _ in WRONG])
def test_wrong_values_are_refused_by_name(options, error, match):
    """Catches a value that gets as far as the model."""
    with pytest.raises(error, match=match):
        peftkern.TrainableTokensConfig(**options)


CANNOT = [
    ({"token_indices": [128]}, ValueError, r"token_indices.*\[0, 128\).*\[128\]"),
    ({"token_indices": [1], "target_modules": ["norm"]}, TypeError, "token_indices.*LlamaRMSNorm"),
    ({"token_indices": [1], "target_modules": ["nowhere"]}, ValueError, "nowhere"),
]


@pytest.mark.parametrize("options, error, match", CANNOT, ids=[str(options) for options, _, _ in CANNOT])
def test_what_a_model_cannot_take_leaves_it_as_it_was(options, error, match):
    """Catches a model that is half adapted."""
    base = tiny_models.tiny_llama(tie_word_embeddings=True)
    before = tiny_models.fingerprint(base)
    with pytest.raises(error, match=match):
        peftkern.get_peft_model(base, peftkern.TrainableTokensConfig(**options))
    assert tiny_models.fingerprint(base) == before
    assert not any(isinstance(module, TrainableTokensLayer) for module in base.modules())
