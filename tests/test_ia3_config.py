"""`IA3Config` beside real PEFT's: the same fields, defaults and JSON; what is not allowed is refused."""

from __future__ import annotations

import dataclasses
import json

import pytest

import peftkern
from peftkern import IA3Config
from peftkern.config import PeftConfig
from peftkern.utils.constants import (
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
)
from peftkern.utils.peft_types import PeftType

peft = pytest.importorskip("peft")


def fields_of(cls: type) -> list[tuple[str, object, bool]]:
    """Name, default and whether the constructor takes it, of each field of a dataclass, in order."""
    return [(f.name, f.default, f.init) for f in dataclasses.fields(cls)]


def as_saved(config) -> str:
    """The text that PEFT writes for a config, its sets in sorted order."""
    content = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    return json.dumps(content, indent=2, sort_keys=True)


def test_fields_are_those_of_peft():
    """Catches a field that is missing, renamed, in another place, or has another default."""
    assert fields_of(IA3Config) == fields_of(peft.IA3Config)
    assert len(IA3Config().to_dict()) == 13 and IA3Config().peft_type == PeftType.IA3


def test_default_modules_are_those_of_peft():
    """Catches an architecture that is missing or has other defaults."""
    theirs = peft.utils
    assert theirs.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING == TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
    feedforward = theirs.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
    assert feedforward == TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"target_modules": ["v", "k", "wo"], "feedforward_modules": ["wo"], "task_type": "SEQ_2_SEQ_LM"},
        {"target_modules": r".*\.(k|v)_proj", "feedforward_modules": "x", "exclude_modules": ["b", "a"]},
        {"target_modules": "all-linear", "modules_to_save": ["z", "score"], "init_ia3_weights": False},
        {"fan_in_fan_out": True, "inference_mode": True, "base_model_name_or_path": "a/b", "revision": "main"},
        {"target_modules": ["a"], "feedforward_modules": [], "exclude_modules": ".*b"},
    ],
)
def test_json_is_that_of_peft(arguments, tmp_path):
    """Catches a key, value or order that would make adapter_config.json differ from PEFT's, and a file that either
    reads as something else."""
    ours, theirs = IA3Config(**arguments), peft.IA3Config(**arguments)
    text = json.dumps(ours.to_json_dict(), indent=2, sort_keys=True)
    assert text == as_saved(theirs)
    assert IA3Config.from_dict(json.loads(text)) == ours
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    assert peft.PeftConfig.from_pretrained(str(tmp_path / "ours")) == theirs
    read = PeftConfig.from_pretrained(tmp_path / "theirs")
    assert type(read) is IA3Config and read == ours


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"target_modules": 5}, TypeError, "target_modules"),
        ({"target_modules": ["a", ""]}, ValueError, "target_modules"),
        ({"target_modules": "("}, ValueError, "target_modules must be a regular expression"),
        ({"feedforward_modules": [3]}, TypeError, "feedforward_modules"),
        ({"feedforward_modules": "("}, ValueError, "feedforward_modules"),
        ({"target_modules": ["a"], "feedforward_modules": ["b"]}, ValueError, "feedforward_modules must be among"),
        ({"fan_in_fan_out": 1}, TypeError, "fan_in_fan_out"),
        ({"init_ia3_weights": "yes"}, TypeError, "init_ia3_weights"),
        ({"modules_to_save": "score"}, TypeError, "modules_to_save"),
        ({"peft_type": "LORA"}, ValueError, "peft_type"),
        ({"task_type": "COOKING"}, ValueError, "task_type"),
    ],
)
def test_wrong_values_are_refused_by_name(arguments, error, message):
    """Catches a value that is ignored, or fails deep inside."""
    with pytest.raises(error, match=message):
        IA3Config(**arguments)


def test_it_is_part_of_the_face():
    """Catches a method that is built but cannot be reached by its public names."""
    assert peftkern.IA3Config is IA3Config
    assert type(peftkern.mapping.get_peft_config({"peft_type": "IA3"})) is IA3Config
    assert peftkern.mapping.PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.IA3] == "ia3_"
