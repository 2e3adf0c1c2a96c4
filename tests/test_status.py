"""`get_layer_status` and `get_model_status`, held against Hugging Face PEFT's on the same models."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import pytest
from torch import nn

import peftkern
from peftkern.nn import LoraLinear
from tiny_models import mlp, tiny_llama

peft = pytest.importorskip("peft")

LORA = {"target_modules": ["up", "emb"]}
IA3 = {"target_modules": ["up", "down"], "feedforward_modules": ["down"]}


def pair(method: str, *configs: dict[str, Any], model: Any = mlp) -> list[Any]:
    """The same model with adapters a, b, ... made by peftkern and by PEFT."""
    made = []
    for library in (peftkern, peft):
        make = getattr(library, f"{method}Config")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = library.get_peft_model(model(), make(**configs[0]), adapter_name="a")
            for name, config in zip("bc", configs[1:], strict=False):
                adapted.add_adapter(name, make(**config))
        made.append(adapted)
    return made


def assert_same_status(ours: Any, theirs: Any) -> None:
    """The functions and the methods say of ours what PEFT's say of theirs."""
    want = [dataclasses.asdict(status) for status in peft.get_layer_status(theirs)]
    got = [dataclasses.asdict(status) for status in peftkern.get_layer_status(ours)]
    for status in got:  # PEFT does not say of what method such a layer is
        status["module_type"] = status["module_type"].removeprefix("ia3.")
    assert got == want
    assert dataclasses.asdict(peftkern.get_model_status(ours)) == dataclasses.asdict(peft.get_model_status(theirs))
    if hasattr(ours, "get_layer_status"):
        assert ours.get_layer_status() == peftkern.get_layer_status(ours)
        assert ours.get_model_status() == peftkern.get_model_status(ours)


@pytest.mark.parametrize("method, config", [("Lora", LORA), ("IA3", IA3)])
def test_status_is_that_of_peft(method, config):
    """Catches a field that means something else than PEFT's: several adapters, one whole module, merged, disabled."""
    whole = config | {"modules_to_save": ["head"]}
    fewer = config | {"target_modules": ["up"]} | ({"feedforward_modules": []} if method == "IA3" else {})
    pair_of = pair(method, whole, fewer)
    assert_same_status(*pair_of)
    for made in pair_of:
        made.set_adapter("b")
    assert_same_status(*pair_of)
    for made in pair_of:
        made.base_model.disable_adapter_layers()
    assert_same_status(*pair_of)
    assert pair_of[0].get_model_status().enabled is False
    for made in pair_of:
        made.base_model.enable_adapter_layers()
        made.merge_adapter(["b"])
    assert_same_status(*pair_of)
    assert pair_of[0].get_model_status().merged_adapters == ["b"]


def test_what_layers_do_not_agree_on_is_irregular():
    """Catches a status that speaks for one layer only."""
    pair_of = pair("Lora", LORA, LORA)
    for made in pair_of:
        made.base_model.model.up.merge()
        made.base_model.model.emb.enable_adapters(False)
        made.base_model.model.up.lora_A["b"].weight.requires_grad = True
    assert_same_status(*pair_of)
    status = pair_of[0].get_model_status()
    assert status.enabled == status.merged_adapters == status.requires_grad["b"] == "irregular"
    for made in pair_of:
        made.base_model.model.emb.set_adapter("b")
    assert_same_status(*pair_of)
    assert pair_of[0].get_model_status().active_adapters == "irregular"


def test_status_of_transformers_models_and_of_injected_adapters():
    """Catches another class name, and adapters that are seen in a `PeftModel` only."""
    assert_same_status(*pair("Lora", {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}, model=tiny_llama))
    for model in (mlp, tiny_llama):
        targets = ["up"] if model is mlp else ["q_proj"]
        ours, theirs = (
            library.inject_adapter_in_model(library.LoraConfig(target_modules=targets), model(), "x")
            for library in (peftkern, peft)
        )
        assert_same_status(ours, theirs)


def test_status_of_quantized_layers():
    """Catches a quantized base that is reported as dense, and a dense one that merging left as quantized."""
    model = peftkern.quantize_model(tiny_llama(), {"load_in_4bit": True})
    made = peftkern.get_peft_model(model, peftkern.LoraConfig(target_modules=["q_proj", "lm_head"]))
    assert made.get_model_status().quantization_backend == "irregular"
    kinds = {status.name.rpartition(".")[2]: status.quantization_backend for status in made.get_layer_status()}
    assert kinds == {"q_proj": "bnb 4bit", "lm_head": None}
    made.merge_adapter()
    assert made.get_model_status().quantization_backend is None


def test_layers_by_themselves_and_wrong_arguments():
    """Catches layers of `peftkern.nn` counted among the adapters of a model around them, or not at all."""
    model = mlp()
    model.up = LoraLinear.from_linear(model.up)
    assert [status.name for status in peftkern.get_layer_status(model)] == ["up"]
    with pytest.warns(UserWarning, match="part of the base"):
        made = peftkern.get_peft_model(model, peftkern.LoraConfig(target_modules=["down"]), adapter_name="x")
    assert [status.name for status in made.get_layer_status()] == ["model.down"]
    assert made.get_model_status().available_adapters == ["x"]
    with pytest.raises(ValueError, match="found none in this Linear"):
        peftkern.get_model_status(nn.Linear(1, 1))
    with pytest.raises(TypeError, match=r"torch.nn.Module, got str"):
        peftkern.get_layer_status("model")
