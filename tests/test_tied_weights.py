"""`ensure_weight_tying` for modules that are trained whole, against PEFT."""

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

LISTS = [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"], ["model.embed_tokens"], ["lm_head", "norm"]]


def config(lib: Any, whole: list[str], **options: Any) -> Any:
    return lib.LoraConfig(
        **{"r": 2, "target_modules": ["q_proj"], "modules_to_save": list(whole), "ensure_weight_tying": True} | options
    )


def base() -> nn.Module:
    return tiny_models.tiny_llama(tie_word_embeddings=True).train()


def made(lib: Any, whole: list[str], **options: Any) -> Any:
    model = lib.get_peft_model(base(), config(lib, whole, **options))
    tiny_models.randomize(model)
    return model


def copies(model: Any, name: str = "default") -> list[torch.Tensor]:
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return [end.modules_to_save[name].weight for end in ends]


@pytest.mark.parametrize("whole", LISTS, ids=str)
def test_everything_is_as_in_peft(tmp_path, whole):
    """Catches a head whose copy is not that of the embedding, and names, numbers or files that are not PEFT's."""
    models = [made(peft, whole), made(peftkern, whole)]
    x, grads = tiny_models.ids(), []
    for model in models:
        assert copies(model)[0] is copies(model)[1]
        model(input_ids=x, labels=x).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert list(grads[0]) == list(grads[1])
    for name in grads[0]:
        torch.testing.assert_close(grads[1][name], grads[0][name], rtol=1e-4, atol=1e-6, msg=name)
    assert list(models[0].state_dict()) == list(models[1].state_dict())
    assert models[0].get_nb_trainable_parameters() == models[1].get_nb_trainable_parameters()
    lists = [model.peft_config["default"].modules_to_save for model in models]
    assert lists[0] == lists[1]
    expected = models[0](x).logits
    torch.testing.assert_close(models[1](x).logits, expected)
    files = []
    for lib, model in zip((peft, peftkern), models, strict=True):
        folder = tmp_path / lib.__name__
        model.save_pretrained(folder)
        files.append(load_file(folder / "adapter_model.safetensors"))
        assert json.loads((folder / "adapter_config.json").read_text())["ensure_weight_tying"]
        for reader in (peft, peftkern):
            again = reader.PeftModel.from_pretrained(base(), folder, is_trainable=True)
            torch.testing.assert_close(again(x).logits, expected)
            assert copies(again)[0] is copies(again)[1]
    assert files[0].keys() == files[1].keys()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        merged = models[1].merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight and merged.config.tie_word_embeddings
    torch.testing.assert_close(merged(x).logits, expected, rtol=1e-4, atol=1e-5)


def test_several_adapters():
    """Catches copies of one adapter that are tied to those of another, and one that did not ask for it."""
    model = made(peftkern, ["embed_tokens"])
    model.add_adapter("tied", config(peftkern, ["lm_head"]))
    model.add_adapter("apart", config(peftkern, ["embed_tokens", "lm_head"], ensure_weight_tying=False))
    assert copies(model, "tied")[0] is copies(model, "tied")[1] is not copies(model)[0]
    assert copies(model, "apart")[0] is not copies(model, "apart")[1]
    model.set_adapter("tied")
    assert copies(model, "tied")[0].requires_grad and not copies(model)[0].requires_grad
    base_weight = model.get_input_embeddings().original_module.weight
    assert base_weight is model.get_output_embeddings().original_module.weight and not base_weight.requires_grad


def test_training_keeps_them_tied():
    """Catches an optimizer that moves the one and not the other."""
    model = made(peftkern, ["embed_tokens"])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = copies(model)[0].detach().clone()
    model(input_ids=tiny_models.ids(), labels=tiny_models.ids()).loss.backward()
    optimizer.step()
    ends = copies(tiny_models.copied(model, "deepcopy"))
    assert ends[0] is ends[1] and torch.equal(ends[0], copies(model)[0]) and not torch.equal(ends[0], before)


@pytest.mark.parametrize("targets", [["embed_tokens", "q_proj"], ["lm_head"], ".*embed_tokens"], ids=str)
def test_adapters_of_tied_modules_are_refused(targets):
    """Catches PEFT's tied adapters, which share memory but not gradients, and are merged twice into one weight."""
    model = base()
    before = tiny_models.fingerprint(model)
    with pytest.raises(NotImplementedError, match="ensure_weight_tying=True.*target_modules.*(embed_tokens|lm_head)"):
        peftkern.get_peft_model(model, config(peftkern, [], target_modules=targets))
    assert tiny_models.fingerprint(model) == before


def test_a_model_that_is_not_tied():
    """Catches a request that is ignored without a word, and copies that are tied where the model's ends are not."""
    with pytest.warns(UserWarning, match="ensure_weight_tying=True.*not tied"):
        model = peftkern.get_peft_model(tiny_models.tiny_llama(), config(peftkern, ["embed_tokens", "lm_head"]))
    assert copies(model)[0] is not copies(model)[1]
    assert model.peft_config["default"].modules_to_save == ["embed_tokens", "lm_head"]


def test_rows_beside_a_tied_copy_are_refused():
    """Catches trained rows of an embedding that is trained whole because its head is."""
    model = base()
    before = tiny_models.fingerprint(model)
    with pytest.raises(ValueError, match="trainable_token_indices.*'model.embed_tokens'.*modules_to_save"):
        peftkern.get_peft_model(model, config(peftkern, ["lm_head"], trainable_token_indices=[1]))
    assert tiny_models.fingerprint(model) == before
