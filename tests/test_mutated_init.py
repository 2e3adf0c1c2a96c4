"""Adapters of PiSSA and OLoRA saved as ones for the unchanged base: PEFT's files, its checks, and ours."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from initial_values_data import output, stepped
from loftq_data import LOFTQ
from peftkern import IA3Config, LoraConfig, PeftModel, get_peft_model
from peftkern.utils.quantized_modules import Linear4bit
from peftkern.utils.save_and_load import get_peft_model_state_dict
from tiny_models import mlp

peft = pytest.importorskip("peft")

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TARGETS = {"target_modules": ["up", "down"], "r": 4, "lora_alpha": 12}


def trained(folder, init="pissa", **options):
    """A trained model whose adapter was saved in `folder` before."""
    model = get_peft_model(mlp(), LoraConfig(**(TARGETS | {"init_lora_weights": init} | options)))
    model.save_pretrained(folder)
    return stepped(model)


PATTERNS = {"rank_pattern": {"up": 6}, "alpha_pattern": {"down": 5}}


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, PATTERNS])
@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_3"])
def test_converted_files_are_those_of_peft(tmp_path, init, options):
    """Would catch the initial factors added, joined along the other side, a scaling that became another one, and an
    initialization that would take the residual once more."""
    torch.manual_seed(2)
    ours = trained(tmp_path / "start", init, **options)
    options = TARGETS | {"init_lora_weights": init} | options
    theirs = peft.get_peft_model(mlp(), peft.LoraConfig(**options))
    # The same numbers in both: signs of singular vectors are free.
    theirs.base_model.model.load_state_dict(ours.base_model.model.state_dict())
    ours.save_pretrained(tmp_path / "ours", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    before = (tmp_path / "start" / CONFIG).read_bytes()
    theirs.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    assert (tmp_path / "start" / CONFIG).read_bytes() != before, "PEFT no longer writes there: see mutated_init.py"
    mine, other = (load_file(tmp_path / name / TENSORS) for name in ("ours", "theirs"))
    assert mine.keys() == other.keys() == load_file(tmp_path / "start" / TENSORS).keys()
    assert all(torch.equal(mine[name], other[name]) for name in mine)
    configs = [json.loads((tmp_path / name / CONFIG).read_text()) for name in ("ours", "theirs")]
    configs[1]["target_modules"].sort()  # PEFT writes a set in whatever order it has
    assert configs[0] == configs[1] and configs[0]["init_lora_weights"] is True and configs[0]["r"] == 8
    for library in (PeftModel, peft.PeftModel):
        again = library.from_pretrained(mlp(), tmp_path / "ours")
        assert torch.equal(again.base_model.model.up.weight, mlp().up.weight)
        torch.testing.assert_close(output(again), output(ours), rtol=0, atol=1e-5 * output(ours).abs().max().item())
    assert (output(ours) - output(mlp())).abs().max() > 0.05, "training was too short to tell"


def test_what_is_no_factor_stays(tmp_path):
    """Would catch PEFT's losses: an embedding's adapter, a module trained whole, DoRA's magnitudes."""
    options = {"target_modules": ["up", "emb"], "modules_to_save": ["head"], "use_dora": True}
    model = trained(tmp_path / "start", "olora", **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*save_embedding_layers.*")
        model.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    names = load_file(tmp_path / "end" / TENSORS)
    assert names["base_model.model.emb.lora_embedding_A"].shape == (8, 128)
    assert "base_model.model.head.weight" in names and "base_model.model.up.lora_magnitude_vector" in names
    again = PeftModel.from_pretrained(mlp(), tmp_path / "end")
    torch.testing.assert_close(output(again), output(model), rtol=0, atol=1e-5 * output(model).abs().max().item())


def test_the_residual_is_not_written_along(tmp_path):
    """Would catch a base weight of an adapted layer in the file, over which the converted adapter is not meant."""
    model = trained(tmp_path / "start")
    options = {"save_embedding_layers": False, "path_initial_model_for_weight_conversion": str(tmp_path / "start")}
    state = get_peft_model_state_dict(model) | {"base_model.model.up.base_layer.weight": torch.zeros(24, 16)}
    converted = model.base_model.subtract_mutated_init(state, "default")
    assert converted.keys() == get_peft_model_state_dict(model).keys()
    model.save_pretrained(tmp_path / "end", **options)
    assert load_file(tmp_path / "end" / TENSORS).keys() == converted.keys()


@pytest.mark.parametrize("gathered", [False, True])
def test_subtract_mutated_init_takes_an_adapter_of_the_model(tmp_path, gathered):
    """Would catch another result than PEFT's method has, where the initial adapter is in the model already."""
    model = trained(tmp_path / "start")
    config = json.loads((tmp_path / "start" / CONFIG).read_text()) | {"init_lora_weights": True}
    (tmp_path / "start" / CONFIG).write_text(json.dumps(config))
    model.load_adapter(tmp_path / "start", "pissa_start")
    state = get_peft_model_state_dict(model)
    kwargs = {"state_dict": model.state_dict() if gathered else None}
    converted = model.base_model.subtract_mutated_init(state, "pissa_start", kwargs)
    start = load_file(tmp_path / "start" / TENSORS)
    for name, value in converted.items():
        is_a = "lora_A" in name
        want = torch.cat([state[name], start[name] if is_a else -start[name]], dim=0 if is_a else 1)
        assert torch.equal(value, want)
    with pytest.raises(ValueError, match="no adapter is named"):
        model.base_model.subtract_mutated_init(state, "nobody")


def test_a_quantized_residual_is_told_of():
    """Would catch PEFT's warning left out: the residual's rounding is in no adapter."""
    model = mlp()
    model.up = Linear4bit.from_linear(model.up)
    model = get_peft_model(model, LoraConfig(target_modules=["up"], init_lora_weights="olora"))
    with pytest.warns(UserWarning, match="1 base weights are quantized"):
        model.base_model.subtract_mutated_init(get_peft_model_state_dict(model), "default")


def convert(model, tmp_path, start="start"):
    model.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=str(tmp_path / start))


@pytest.mark.parametrize("pattern", [{"rank_pattern": {"up": 3}}, {"alpha_pattern": {"up": 3}}])
def test_rslora_with_patterns_is_refused(tmp_path, pattern):
    """Would catch scalings that lora_alpha alone cannot keep; PEFT refuses them too."""
    with pytest.warns(UserWarning, match="cannot convert such an adapter"):
        model = trained(tmp_path / "start", use_rslora=True, **pattern)
    with pytest.raises(ValueError, match=f"does not go with use_rslora=True and {next(iter(pattern))}="):
        convert(model, tmp_path)
    assert not (tmp_path / "end").exists()


def test_another_start_is_refused(tmp_path):
    """Would catch factors of another adapter subtracted, and a file half written: the second adapter is the bad one."""
    model = trained(tmp_path / "start")
    for name, options in (("r", {"r": 2}), ("lora_alpha", {"lora_alpha": 3}), ("use_rslora", {"use_rslora": True})):
        get_peft_model(mlp(), LoraConfig(**(TARGETS | options))).save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=f"the initial adapter must have {name}="):
            convert(model, tmp_path, name)
    get_peft_model(mlp(), LoraConfig(**(TARGETS | {"target_modules": ["up"]}))).save_pretrained(tmp_path / "fewer")
    with pytest.raises(
        ValueError, match=r"down\.lora_A\.weight: the initial adapter must have .*\[4, 24\].*got nothing"
    ):
        convert(model, tmp_path, "fewer")
    start = load_file(tmp_path / "start" / TENSORS)
    narrow = {n: t[:, :-1].contiguous() if n.endswith("up.lora_A.weight") else t for n, t in start.items()}
    save_file(narrow, tmp_path / "start" / TENSORS)
    with pytest.raises(ValueError, match=r"\[4, 16\].*got one of shape \[4, 15\]"):
        convert(model, tmp_path)
    save_file(start, tmp_path / "start" / TENSORS)
    model.add_adapter("other", LoraConfig(target_modules=["head"]))
    with pytest.raises(ValueError, match="must have r=8"):
        convert(model, tmp_path)
    with pytest.raises(ValueError, match="nowhere"):
        convert(model, tmp_path, "nowhere")
    get_peft_model(mlp(), IA3Config(target_modules=["up"], feedforward_modules=[])).save_pretrained(tmp_path / "ia3")
    with pytest.raises(ValueError, match="expected a LoRA to convert with, got .*IA3"):
        convert(model, tmp_path, "ia3")
    assert not (tmp_path / "end").exists()


def test_what_cannot_be_converted_is_named(tmp_path):
    """Would catch a method without factors, stacked factors joined as if they were a matrix, and a quantized base
    passed off as the original one."""
    model = trained(tmp_path / "start")
    other = get_peft_model(mlp(), IA3Config(target_modules=["up"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="path_initial_model_for_weight_conversion goes with LoRA, got .*IA3"):
        convert(other, tmp_path)
    other = get_peft_model(mlp(), LoraConfig(target_modules=[], target_parameters=["up.weight"], r=4, lora_alpha=12))
    with pytest.raises(ValueError, match=r"does not go with target_parameters=\['up.weight'\]"):
        convert(other, tmp_path)
    other = get_peft_model(mlp(), LoraConfig(target_modules=["up", "down"], r=8, **LOFTQ))
    other.save_pretrained(tmp_path / "loftq")
    with pytest.warns(UserWarning, match="takes back what PiSSA, .* change, got init_lora_weights='loftq'"):
        convert(other, tmp_path, "loftq")
    model.peft_config["default"].init_lora_weights = True  # as PEFT's documentation has it
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(model, tmp_path)
