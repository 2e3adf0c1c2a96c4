"""`peftkern.helpers` and the small functions of `peftkern.utils`, held against Hugging Face PEFT's."""

from __future__ import annotations

import inspect
import json

import pytest
import torch

import peftkern
from peftkern import helpers
from peftkern.utils import other
from tiny_models import ids, mlp, randomize, tiny_llama

peft = pytest.importorskip("peft")


def adapted(**config) -> peftkern.PeftModel:
    made = peftkern.get_peft_model(mlp(), peftkern.LoraConfig(**({"target_modules": ["up", "emb"]} | config)))
    randomize(made)
    return made


def test_check_if_peft_model(tmp_path):
    """Catches a folder without an adapter that is taken for one, and the other way."""
    assert not helpers.check_if_peft_model(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert not helpers.check_if_peft_model(tmp_path)
    for content in ({"peft_type": "LORA"}, {"peft_type": "PROMPT_TUNING"}):
        (tmp_path / "adapter_config.json").write_text(json.dumps(content))
        assert helpers.check_if_peft_model(tmp_path) and helpers.check_if_peft_model(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("torn {")
    assert not helpers.check_if_peft_model(tmp_path)
    assert not helpers.check_if_peft_model(tmp_path / "nowhere at all")


def test_rescaled_adapters_come_back():
    """Catches a scaling that is not applied, is lost after an error, or is applied to what is merged already."""
    made = adapted()
    y = made(ids())
    with made.disable_adapter():
        base = made(ids())
    with helpers.rescale_adapter_scale(made, 0):
        assert torch.equal(made(ids()), base)
    with pytest.raises(RuntimeError, match="inside"), helpers.rescale_adapter_scale(made, 0.5):
        assert {s for m in (made.model.up, made.model.emb) for s in m.scaling.values()} == {0.5}
        raise RuntimeError("inside")
    assert torch.equal(made(ids()), y)
    for wrong, error in (("1", TypeError), (True, TypeError)):
        with pytest.raises(error, match="multiplier"), helpers.rescale_adapter_scale(made, wrong):
            pass
    made.merge_adapter()
    with pytest.raises(ValueError, match="merged into"), helpers.rescale_adapter_scale(made, 0.5):
        pass
    with pytest.raises(ValueError, match="LoRA layers"), helpers.rescale_adapter_scale(torch.nn.Linear(1, 1), 0.5):
        pass


def test_signatures_are_those_of_the_base():
    """Catches another model whose signature changes too (PEFT's describes the class), and a forward that breaks."""
    made, bystander = (
        peftkern.get_peft_model(tiny_llama(seed=i), peftkern.LoraConfig(target_modules=["q_proj"])) for i in range(2)
    )
    y = made(ids()).logits
    helpers.update_signature(made)
    base = type(made.get_base_model())
    assert list(inspect.signature(made.forward).parameters) == list(inspect.signature(base.forward).parameters)[1:]
    assert made.generate.__doc__ == base.generate.__doc__
    assert set(inspect.signature(bystander.forward).parameters) == {"args", "kwargs"}
    assert torch.equal(made(ids()).logits, y)
    named = peftkern.get_peft_model(tiny_llama(), peftkern.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    helpers.update_signature(named, "forward")
    assert "forward" not in named.__dict__, "a class with named arguments says them already"
    with pytest.raises(ValueError, match="method: expected forward"):
        helpers.update_signature(made, "both")
    helpers.update_signature(adapted())  # a base without generate


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cast_mixed_precision_params(dtype):
    """Catches an adapter that trains in 16 bits, a base left wide, and bytes of a quantized weight that are cast."""
    theirs = peft.get_peft_model(mlp().to(torch.float64), peft.LoraConfig(target_modules=["up"]))
    ours = peftkern.get_peft_model(mlp().to(torch.float64), peftkern.LoraConfig(target_modules=["up"]))
    peftkern.cast_mixed_precision_params(ours, dtype)
    peft.cast_mixed_precision_params(theirs, dtype)
    assert {n: p.dtype for n, p in ours.named_parameters()} == {n: p.dtype for n, p in theirs.named_parameters()}
    model = peftkern.quantize_model(tiny_llama(), {"load_in_4bit": True})
    weight = model.model.layers[0].self_attn.q_proj.weight
    before = weight.clone()
    other.cast_mixed_precision_params(model.requires_grad_(False), dtype)
    assert model.lm_head.weight.dtype == dtype and torch.equal(weight, before) and weight.dtype == before.dtype
    for wrong in (torch.float32, "float16"):
        with pytest.raises(ValueError, match=r"torch.float16 or torch.bfloat16"):
            peftkern.cast_mixed_precision_params(ours, wrong)


def test_fsdp_auto_wrap_policy(monkeypatch):
    """Catches a policy that wraps other modules than PEFT's, and a class name that nothing answers to."""

    def wrapped(policy, model) -> list[str]:
        named = model.named_modules()
        return [name for name, m in named if policy(module=m, recurse=False, nonwrapped_numel=0)]

    ours, theirs = (
        library.get_peft_model(tiny_llama(), library.LoraConfig(target_modules=["q_proj"]))
        for library in (peftkern, peft)
    )
    monkeypatch.delenv("FSDP_TRANSFORMER_CLS_TO_WRAP", raising=False)
    names = wrapped(other.fsdp_auto_wrap_policy(ours), ours)
    assert names == wrapped(peft.utils.other.fsdp_auto_wrap_policy(theirs), theirs) and len(names) == 2 + 2 * 2
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaMLP,")
    names = wrapped(other.fsdp_auto_wrap_policy(ours), ours)
    assert [name for name in names if "lora" not in name] == [f"base_model.model.model.layers.{i}.mlp" for i in (0, 1)]
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaMLP,Nothing")
    with pytest.raises(TypeError, match="FSDP_TRANSFORMER_CLS_TO_WRAP: no module of the model is a Nothing"):
        other.fsdp_auto_wrap_policy(ours)


def test_names_are_where_peft_has_them():
    """Catches a name that PEFT's users import and do not find."""
    assert peftkern.utils.infer_device() == peft.utils.infer_device() == other.infer_device()
    assert other.prepare_model_for_kbit_training is peftkern.prepare_model_for_kbit_training
    assert peftkern.utils.cast_mixed_precision_params is peftkern.cast_mixed_precision_params
    for kind in ("LORA_TARGET", "IA3_TARGET", "IA3_FEEDFORWARD"):
        table = f"TRANSFORMERS_MODELS_TO_{kind}_MODULES_MAPPING"
        held = [getattr(module, table) for module in (other, peftkern.utils, peftkern.utils.constants)]
        assert held[0] is held[1] is held[2] and hasattr(peft.utils.other, table)
    for name in ("PeftError", "PeftWarning", "NoMatchingPeftModuleError"):
        assert getattr(peftkern, name) is getattr(peftkern.utils, name)
        assert [c.__name__ for c in getattr(peftkern, name).__mro__] == [
            c.__name__ for c in getattr(peft, name).__mro__
        ]
    assert peftkern.helpers is helpers and peftkern.peft_model.get_layer_status is peftkern.get_layer_status
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = other.no_such_name


def test_casting_of_inputs_can_be_left_to_hooks():
    """Catches an input that is rounded to the dtype in which an adapter lies before a hook has widened it."""

    def outputs(library, inside):
        config = library.LoraConfig(target_modules=["up"])
        model = library.get_peft_model(mlp(), config).eval()
        randomize(model)
        model.half()

        def widen(module, _):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.float()

        def narrow(module, _, __):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.half()

        for module in model.modules():
            if list(module.parameters(recurse=False)):
                module.register_forward_pre_hook(widen)
                module.register_forward_hook(narrow)
        with torch.no_grad(), library.helpers.disable_input_dtype_casting(model, active=inside):
            return model(ids())

    for library in (peftkern, peft):
        with pytest.raises(RuntimeError, match="dtype"):
            outputs(library, False)
    got = outputs(peftkern, True)
    assert got.dtype is torch.float32
    torch.testing.assert_close(got, outputs(peft, True), rtol=0, atol=0)
    model = adapted()
    with helpers.disable_input_dtype_casting(model):
        assert not model.base_model.model.up.cast_input_dtype_enabled
    assert model.base_model.model.up.cast_input_dtype_enabled


def test_from_json_file(tmp_path):
    """Catches a configuration whose file cannot be read by itself, and `runtime_config` taken from a file."""
    peftkern.LoraConfig(r=3, target_modules=["up"]).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    assert peftkern.LoraConfig.from_json_file(file) == peft.LoraConfig.from_json_file(file)
    file.write_text(json.dumps({"r": 3, "runtime_config": {"ephemeral_gpu_offload": True}}))
    with pytest.warns(UserWarning, match="runtime_config"):
        assert peftkern.PeftConfig.from_json_file(str(file)) == {"r": 3}
    for text in ("[1]", "{", ""):
        file.write_text(text)
        with pytest.raises(peftkern.AdapterFileError, match=r"adapter_config.json"):
            peftkern.PeftConfig.from_json_file(file)
