"""`peftkern.functional` and the base model's state dict, held against Hugging Face PEFT's on the same small models."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import peftkern
from peftkern import functional
from tiny_models import ids, mlp, randomize, tiny_llama

peft = pytest.importorskip("peft")
theirs_functional = pytest.importorskip("peft.functional")


def injected(library: Any, *names: str, **fields: Any) -> nn.Module:
    """An `Mlp` with adapters injected, each with random values of its own; the last one is active."""
    model = mlp()
    options = {"target_modules": ["up", "down"], "modules_to_save": None} | fields
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            library.inject_adapter_in_model(library.LoraConfig(**options), model, name)
    randomize(model)
    return model


def state(model: nn.Module) -> dict[str, Any]:
    """What the functions change: active adapters, what learns, what is there, and the output."""
    with torch.no_grad():
        y = model(ids())
    return {
        "active": {n: list(m.active_adapters) for n, m in model.named_modules() if hasattr(m, "active_adapters")},
        "learns": {n for n, p in model.named_parameters() if p.requires_grad},
        "names": set(model.state_dict()),
        "y": y,
    }


def same(ours: nn.Module, theirs: nn.Module) -> None:
    got, want = state(ours), state(theirs)
    torch.testing.assert_close(got.pop("y"), want.pop("y"))
    assert got == want


def test_functions_do_what_pefts_do():
    """Would catch adapters in a plain module that cannot be switched, frozen or deleted, or not as in PEFT."""
    ours, theirs = (injected(library, "one", "two", "three") for library in (peftkern, peft))
    for library, model in ((functional, ours), (theirs_functional, theirs)):
        library.set_adapter(model, "two")
    same(ours, theirs)
    for library, model in ((functional, ours), (theirs_functional, theirs)):
        library.set_adapter(model, ["one", "three"], inference_mode=True)
    same(ours, theirs)
    for library, model in ((functional, ours), (theirs_functional, theirs)):
        library.set_requires_grad(model, ["two", "three"], True)
    same(ours, theirs)
    left = [
        library.delete_adapter(model, adapter_name="three", prefix="lora_")
        for library, model in ((functional, ours), (theirs_functional, theirs))
    ]
    assert left == [["one"], ["one"]]
    same(ours, theirs)
    got = functional.get_peft_model_state_dict(ours, adapter_name="two")
    want = theirs_functional.get_peft_model_state_dict(theirs, adapter_name="two")
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in got)


def test_deleting_the_active_adapter_leaves_one_choice_for_all_layers():
    """Would catch layers that differ in what is active once the active adapter is gone, and wrappers that keep it."""
    model = injected(peftkern, "a", "b", modules_to_save=["head"])
    functional.set_adapter(model, "b")
    with pytest.warns(UserWarning, match="'b' was deleted; 'a' is active now"):
        assert functional.delete_adapter(model, "b") == ["a"]
    found = state(model)
    assert set(map(tuple, found["active"].values())) == {("a",)} and not any(".b." in name for name in found["names"])
    assert functional.delete_adapter(model, "a") is None
    torch.testing.assert_close(model(ids()), mlp()(ids()), rtol=0, atol=0)


def test_wrong_names_and_merged_adapters_are_refused():
    """Would catch a slip in a name that leaves the model without any adapter, as it does in PEFT."""
    model = injected(peftkern, "one", "two")
    before = state(model)
    calls = (functional.set_adapter, functional.set_requires_grad, functional.delete_adapter)
    for call in calls:
        with pytest.raises(ValueError, match=r"no adapter is named \['tow'\]; there are: \['one', 'two'\]"):
            call(model, "tow")
    model.up.merge(adapter_names=["one"])
    with pytest.raises(ValueError, match="'one' is merged"):
        functional.delete_adapter(model, "one")
    model.up.unmerge()
    after = state(model)
    torch.testing.assert_close(after.pop("y"), before.pop("y"))
    assert after == before
    with pytest.warns(UserWarning, match="unmerged before others are set active"):
        model.up.merge(adapter_names=["two"])
        functional.set_adapter(model, "one")
    assert not model.up.merged


def test_widened_adapters():
    """Would catch an adapter of a 16-bit model that is not widened, or one that is although nobody asked."""
    model = peftkern.inject_adapter_in_model(peftkern.LoraConfig(target_modules=["up"]), mlp().bfloat16())
    functional.cast_adapter_dtype(model, "default", autocast_adapter_dtype=False)
    assert model.up.lora_A["default"].weight.dtype is torch.bfloat16
    functional.cast_adapter_dtype(model, "default")
    assert model.up.lora_A["default"].weight.dtype is torch.float32 and model.down.weight.dtype is torch.bfloat16


@pytest.mark.parametrize("make", [tiny_llama, mlp])
@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_state_dict_of_the_base(make, method):
    """Would catch a tensor of the base that goes by its wrapped name, is missing, or is an adapter's."""
    head = "lm_head" if make is tiny_llama else "head"
    up, emb = ("up_proj", "embed_tokens") if make is tiny_llama else ("up", "emb")

    def config(library: Any) -> Any:
        if method == "ia3":
            return library.IA3Config(target_modules=[up], feedforward_modules=[up], modules_to_save=[head])
        return library.LoraConfig(target_modules=[up, emb], modules_to_save=[head])

    ours, theirs = (library.get_peft_model(make(), config(library)) for library in (peftkern, peft))
    got, want, base = peftkern.get_base_model_state_dict(ours), peft.get_base_model_state_dict(theirs), make()
    assert got.keys() == want.keys() == base.state_dict().keys()
    assert all(torch.equal(tensor, base.state_dict()[name]) for name, tensor in got.items())
    other = make(seed=1)

    def adapter() -> dict[str, torch.Tensor]:
        return peftkern.get_peft_model_state_dict(ours, save_embedding_layers=False)

    before = {name: tensor.clone() for name, tensor in adapter().items()}
    result = peftkern.set_base_model_state_dict(ours, other.state_dict())
    assert not result.missing_keys and not result.unexpected_keys
    now = peftkern.get_base_model_state_dict(ours)
    assert all(torch.equal(tensor, now[name]) for name, tensor in other.state_dict().items())
    assert all(torch.equal(tensor, adapter()[name]) for name, tensor in before.items())
    with ours.disable_adapter(), torch.no_grad():
        y, want_y = ours(ids()), other(ids())
    torch.testing.assert_close(y if make is mlp else y[0], want_y if make is mlp else want_y[0], rtol=0, atol=0)


def test_state_dict_of_a_quantized_base():
    """Would catch the parts of a packed weight, which are no modules, taken for an adapter's or named wrongly."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BitsAndBytesConfig(load_in_4bit=True)
    base = peftkern.quantize_model(tiny_llama(), config, progress=False)
    names = set(base.state_dict())
    model = peftkern.get_peft_model(base, peftkern.LoraConfig(target_modules="all-linear"))
    assert set(peftkern.get_base_model_state_dict(model)) == names and any("absmax" in name for name in names)


def test_a_state_dict_that_is_not_the_bases_is_refused():
    """Would catch half a state dict loaded without a word."""
    model = peftkern.get_peft_model(mlp(), peftkern.LoraConfig(target_modules=["up"]))
    held = mlp(seed=1).state_dict()
    before = {name: t.clone() for name, t in peftkern.get_base_model_state_dict(model).items()}
    renamed = {name.replace("down", "dwon"): tensor for name, tensor in held.items()}
    with pytest.raises(RuntimeError, match=r"missing: 'down.weight', 'down.bias'; unexpected: 'dwon.weight'"):
        peftkern.set_base_model_state_dict(model, renamed)
    with pytest.raises(TypeError, match="state_dict: expected a dict of names to tensors, got list"):
        peftkern.set_base_model_state_dict(model, list(held))
    now = peftkern.get_base_model_state_dict(model)
    assert all(torch.equal(tensor, now[name]) for name, tensor in before.items())
    result = peftkern.set_base_model_state_dict(model, renamed, strict=False)
    assert result.missing_keys == ["down.weight", "down.bias"] and result.unexpected_keys == [
        "dwon.weight",
        "dwon.bias",
    ]
    assert torch.equal(peftkern.get_base_model_state_dict(model)["up.weight"], held["up.weight"])
