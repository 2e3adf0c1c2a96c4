"""`AdaLoraConfig` beside real PEFT's: fields, defaults, files, and what is refused or warned of."""

from __future__ import annotations

import dataclasses
import json
import warnings

import pytest

import peftkern
from peftkern import AdaLoraConfig, LoraConfig, PeftConfig, PeftType

peft = pytest.importorskip("peft")

CASES = {
    "least": {"total_step": 10},
    "schedule": {"total_step": 100, "tinit": 10, "tfinal": 20, "deltaT": 5, "init_r": 16, "target_r": 4},
    "numbers": {"total_step": 9, "beta1": 0.5, "beta2": 0.9, "orth_reg_weight": 0.0, "lora_alpha": 32},
    "targets": {"total_step": 9, "target_modules": ["b", "a"], "exclude_modules": ["c"], "modules_to_save": ["head"]},
    "layers": {"total_step": 9, "target_modules": ["a"], "layers_to_transform": [0, 2], "layers_pattern": "h"},
    "pattern": {"total_step": 9, "rank_pattern": {"a.lora_E": [True, False]}, "bias": "lora_only"},
    "task": {"total_step": 9, "task_type": "CAUSAL_LM", "inference_mode": True, "lora_dropout": 0.1},
}


def test_fields_and_defaults_are_those_of_peft():
    """Catches a field that is missing, comes at another place, or starts from another value."""
    ours, theirs = AdaLoraConfig(total_step=5), peft.AdaLoraConfig(total_step=5)
    assert [f.name for f in dataclasses.fields(ours)] == [f.name for f in dataclasses.fields(theirs)]
    mine, other = ours.to_dict(), theirs.to_dict()
    assert mine.pop("peft_version") and other.pop("peft_version")
    assert mine == other and len(mine) == 49
    assert isinstance(ours, LoraConfig)


@pytest.mark.parametrize("name", CASES)
def test_files_are_those_of_peft_and_are_read_by_both(name, tmp_path):
    """Catches a file of other keys or values, and a value that does not come back."""
    ours, theirs = AdaLoraConfig(**CASES[name]), peft.AdaLoraConfig(**CASES[name])
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(str(tmp_path / "theirs"))
    mine, other = (json.loads((tmp_path / f / "adapter_config.json").read_text()) for f in ("ours", "theirs"))
    assert mine.pop("peft_version") and other.pop("peft_version")
    for key in ("target_modules", "exclude_modules"):
        other[key] = sorted(other[key]) if isinstance(other[key], list) else other[key]
    assert mine == other
    read = PeftConfig.from_pretrained(tmp_path / "theirs")
    assert type(read) is AdaLoraConfig and dataclasses.replace(read, peft_version=ours.peft_version) == ours
    again = peft.PeftConfig.from_pretrained(str(tmp_path / "ours"))
    assert dataclasses.replace(again, peft_version=theirs.peft_version) == theirs


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({}, ValueError, "total_step"),
        ({"total_step": 0}, ValueError, "total_step"),
        ({"total_step": 2.5}, TypeError, "total_step"),
        ({"total_step": 10, "tinit": 5, "tfinal": 5}, ValueError, "total_step must be more than tinit"),
        ({"total_step": 10, "orth_reg_weight": -0.1}, ValueError, "orth_reg_weight"),
        ({"total_step": 10, "orth_reg_weight": float("nan")}, ValueError, "orth_reg_weight"),
        ({"total_step": 10, "init_r": 0}, ValueError, "init_r"),
        ({"total_step": 10, "target_r": True}, TypeError, "target_r"),
        ({"total_step": 10, "tinit": -1}, ValueError, "tinit"),
        ({"total_step": 10, "deltaT": 0}, ValueError, "deltaT"),
        ({"total_step": 10, "beta1": 1.0}, ValueError, "beta1"),
        ({"total_step": 10, "beta2": "x"}, TypeError, "beta2"),
        ({"total_step": 10, "use_dora": True}, ValueError, "use_dora"),
        ({"total_step": 10, "rank_pattern": {"a.lora_E": [1, 0]}}, TypeError, "list of bool"),
        ({"total_step": 10, "rank_pattern": {"a": 4}}, TypeError, "list of bool"),
        ({"total_step": 10, "lora_dropout": 1.0}, ValueError, "lora_dropout"),
        ({"total_step": 10, "target_modules": "a", "layers_to_transform": 1}, ValueError, "layers_to_transform"),
        ({"total_step": 10, "target_parameters": ["a.w"]}, NotImplementedError, "target_parameters"),
        ({"total_step": 10, "init_lora_weights": "pissa"}, ValueError, "init_lora_weights"),
        ({"total_step": 10, "use_qalora": True}, NotImplementedError, "use_qalora"),
    ],
)
def test_wrong_and_unbuilt_values_are_refused_by_name(arguments, error, message):
    """Catches a value that is ignored, or fails deep inside, as beta1 = 1 and deltaT = 0 do in PEFT."""
    with pytest.raises(error, match=message):
        AdaLoraConfig(**arguments)
    with pytest.raises(ValueError, match="LoftQ"):
        AdaLoraConfig(total_step=5, init_lora_weights="loftq", loftq_config={"loftq_bits": 4})


@pytest.mark.parametrize(
    "arguments", [{"r": 4}, {"use_rslora": True}, {"lora_bias": True}, {"alpha_pattern": {"a": 3}}]
)
def test_what_decides_nothing_is_warned_of(arguments):
    """Catches a setting of LoRA that is ignored without a word; PEFT warns of r alone."""
    with pytest.warns(UserWarning, match=f"{next(iter(arguments))}=.* has no effect"):
        AdaLoraConfig(total_step=5, **arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AdaLoraConfig(total_step=5, r=8)


def test_it_is_part_of_the_face():
    """Catches a method that is built but cannot be reached by its public names, and other default targets."""
    assert peftkern.AdaLoraConfig is AdaLoraConfig
    assert type(peftkern.mapping.get_peft_config({"peft_type": "ADALORA", "total_step": 5})) is AdaLoraConfig
    assert peftkern.mapping.PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.ADALORA] == "lora_"
    name = "TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING"
    assert getattr(peftkern.utils, name) == getattr(peft.utils, name) == getattr(peftkern.utils.other, name)
