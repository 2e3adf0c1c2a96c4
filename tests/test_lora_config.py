"""`LoraConfig` beside real PEFT's: the same fields, defaults and JSON; what is not built or not allowed is refused."""

from __future__ import annotations

import copy
import dataclasses
import json
import operator
import pickle
import subprocess
import sys
import warnings

import pytest

import peftkern
from peftkern.config import PEFT_FORMAT_VERSION, PeftConfig
from peftkern.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, get_peft_config
from peftkern.tuners import lora
from peftkern.tuners.lora import LoraConfig
from peftkern.utils import CONFIG_NAME, PeftType, TaskType
from peftkern.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

peft = pytest.importorskip("peft")

SUBCONFIGS = ["ArrowConfig", "BdLoraConfig", "CordaConfig", "EvaConfig", "KasaConfig", "LoftQConfig", "LoraGAConfig"]
SUBCONFIGS += ["LoraRuntimeConfig", "MontecloraConfig", "VeloraConfig"]


def fields_of(cls: type) -> list[tuple[str, str, bool]]:
    """Name, default and whether the constructor takes it, of each field of a dataclass, in order."""
    rows = []
    for f in dataclasses.fields(cls):
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        rows.append((f.name, repr(default), f.init))
    return rows


def as_saved(config) -> str:
    """The text that PEFT writes for a config, its sets in sorted order."""
    content = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    return json.dumps(content, indent=2, sort_keys=True)


def test_fields_are_those_of_peft():
    """Catches a field that is missing, renamed, in another place, or has another default."""
    assert fields_of(LoraConfig) == fields_of(peft.LoraConfig)
    assert len(LoraConfig().to_dict()) == 41


@pytest.mark.parametrize("name", SUBCONFIGS)
def test_nested_configs_are_those_of_peft(name):
    """Catches a nested config whose fields drifted from PEFT's."""
    assert fields_of(getattr(lora, name)) == fields_of(getattr(peft.tuners.lora.config, name))


def test_default_targets_are_those_of_peft():
    """Catches an architecture that is missing or has other default targets, and lists shared between entries."""
    theirs = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    assert theirs == TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    lists = [id(v) for v in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.values()]
    assert len(set(lists)) == len(lists)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {
            "r": 16,
            "lora_alpha": 32.5,
            "lora_dropout": 0.05,
            "target_modules": ["v_proj", "q_proj"],
            "bias": "lora_only",
        },
        {"target_modules": r".*\.(q|v)_proj", "exclude_modules": ["b", "a"], "task_type": "CAUSAL_LM"},
        {"rank_pattern": {"^model.a": 4}, "alpha_pattern": {"a.b": 2}, "modules_to_save": ["z", "score"]},
        {"layers_to_transform": [1, 2], "layers_pattern": "h", "target_modules": ["x"], "use_rslora": True},
        {"init_lora_weights": "gaussian", "inference_mode": True, "base_model_name_or_path": "a/b", "revision": "main"},
        {"auto_mapping": {"base_model_class": "M", "parent_library": "m"}, "lora_bias": True, "fan_in_fan_out": True},
    ],
)
def test_json_is_that_of_peft(arguments):
    """Catches a key, value or order that would make adapter_config.json differ from PEFT's."""
    ours = LoraConfig(**arguments)
    text = json.dumps(ours.to_json_dict(), indent=2, sort_keys=True)
    assert text == as_saved(peft.LoraConfig(**arguments))
    assert LoraConfig.from_dict(json.loads(text)) == ours
    assert peft.LoraConfig(**json.loads(text)).to_dict() == peft.LoraConfig(**arguments).to_dict()


def test_saved_file_goes_both_ways(tmp_path):
    """Catches a file that PEFT reads as something else, and the other way round."""
    arguments = {"r": 4, "target_modules": ["q", "v"], "task_type": TaskType.SEQ_2_SEQ_LM, "lora_dropout": 0.1}
    LoraConfig(**arguments).save_pretrained(tmp_path / "ours")
    theirs = peft.LoraConfig(**arguments)
    theirs.save_pretrained(tmp_path / "theirs")
    assert (tmp_path / "ours" / CONFIG_NAME).read_text() == as_saved(theirs)
    assert peft.PeftConfig.from_pretrained(str(tmp_path / "ours")) == theirs
    read = PeftConfig.from_pretrained(tmp_path / "theirs")
    assert type(read) is LoraConfig and read == LoraConfig(**arguments)
    assert read.target_modules == {"q", "v"} and read.peft_type is PeftType.LORA
    # As in PEFT a member however it was given; the task stays the string that it was.
    assert LoraConfig(peft_type="LORA").peft_type is PeftType.LORA


def test_runtime_config_is_not_saved_and_auto_mapping_can_be_given(tmp_path):
    """Catches runtime choices in a file, and a save that changes the config in memory."""
    config = LoraConfig()
    config.save_pretrained(tmp_path, auto_mapping_dict={"base_model_class": "M"})
    content = json.loads((tmp_path / CONFIG_NAME).read_text())
    assert "runtime_config" not in content and content["auto_mapping"] == {"base_model_class": "M"}
    assert config.auto_mapping is None and config.peft_version == PEFT_FORMAT_VERSION


def test_save_refuses_a_file(tmp_path):
    """Catches writing over something that is not a folder."""
    (tmp_path / "x").write_text("")
    with pytest.raises(ValueError, match="save_directory"):
        LoraConfig().save_pretrained(tmp_path / "x")


def test_unknown_keys_are_named_and_dropped():
    """Catches a key from a newer release that disappears without a word."""
    with pytest.warns(UserWarning, match=r"\['brand_new', 'other'\]"):
        config = LoraConfig.from_dict({"peft_type": "LORA", "r": 4, "other": 1, "brand_new": 2})
    assert config == LoraConfig(r=4)


@pytest.mark.parametrize(
    "content", [{}, {"peft_type": None}, {"peft_type": "NOPE"}, {"peft_type": 3}, {"peft_type": []}]
)
def test_missing_or_unknown_method_names_the_known_ones(content):
    """Catches PEFT's bare KeyError for a file without a usable peft_type."""
    for build in (PeftConfig.from_dict, get_peft_config):
        with pytest.raises(ValueError, match="peft_type.*LORA"):
            build(content)


def test_missing_method_in_a_file_is_refused_even_by_the_class(tmp_path):
    """Catches a damaged file that passes because the caller named the class."""
    (tmp_path / CONFIG_NAME).write_text(json.dumps({"r": 4}))
    with pytest.raises(ValueError, match="peft_type"):
        LoraConfig.from_pretrained(tmp_path)


def test_method_of_the_class_cannot_be_another():
    """Catches PEFT's silent overwriting of a contradicting peft_type."""
    with pytest.raises(ValueError, match="peft_type"):
        LoraConfig(peft_type="IA3")
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA] is LoraConfig


def test_from_pretrained_refuses_fields():
    """Catches an override that would silently do nothing."""
    with pytest.raises(TypeError, match="'r'"):
        LoraConfig.from_pretrained("somewhere", r=4)


NON_DEFAULT = {
    "megatron_config": {"a": 1},
    "megatron_core": "x",
    "velora_config": {"num_groups": 2},
    "alora_invocation_tokens": [1],
    "use_qalora": True,
    "qalora_group_size": 8,
    "monteclora_config": lora.MontecloraConfig(),
    "layer_replication": [(0, 1)],
    "runtime_config": lora.LoraRuntimeConfig(ephemeral_gpu_offload=True),
    "use_bdlora": lora.BdLoraConfig(),
    "arrow_config": lora.ArrowConfig(),
    "kasa_config": lora.KasaConfig(),
}
BUILT = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out"),
    *("bias", "use_rslora", "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern"),
    *("rank_pattern", "alpha_pattern", "lora_bias", "loftq_config", "target_parameters", "use_dora"),
    *("eva_config", "corda_config", "lora_ga_config"),
    *("trainable_token_indices", "ensure_weight_tying"),
}


def test_every_field_is_built_or_refused():
    """Catches a field that is neither followed nor refused."""
    assert {f.name for f in dataclasses.fields(peft.LoraConfig)} == BUILT | set(NON_DEFAULT)
    assert not BUILT & set(NON_DEFAULT)


@pytest.mark.parametrize("name", NON_DEFAULT)
def test_what_is_not_built_is_refused_by_name(name):
    """Catches a request that is ignored."""
    with pytest.raises(NotImplementedError, match=rf"LoraConfig\.{name}="):
        LoraConfig(**{name: NON_DEFAULT[name]})


@pytest.mark.parametrize(
    "name, value, error",
    [
        ("r", 0, ValueError),
        ("r", 2.0, TypeError),
        ("r", True, TypeError),
        ("lora_alpha", "8", TypeError),
        ("lora_alpha", float("nan"), ValueError),
        ("lora_dropout", 1.0, ValueError),
        ("lora_dropout", -0.1, ValueError),
        ("lora_dropout", None, TypeError),
        ("bias", "some", ValueError),
        ("fan_in_fan_out", 1, TypeError),
        ("use_rslora", "yes", TypeError),
        ("inference_mode", 0, TypeError),
        ("target_modules", [1], TypeError),
        ("target_modules", [""], ValueError),
        ("target_modules", 3, TypeError),
        ("target_modules", "*.q", ValueError),
        ("exclude_modules", "(", ValueError),
        ("modules_to_save", "head", TypeError),
        ("rank_pattern", {"a": 0}, ValueError),
        ("rank_pattern", {"(": 1}, ValueError),
        ("rank_pattern", [("a", 1)], TypeError),
        ("alpha_pattern", {"a": None}, TypeError),
        ("layers_to_transform", "1", TypeError),
        ("layers_to_transform", [1.0], TypeError),
        ("layers_pattern", "h", ValueError),
        ("init_lora_weights", "normal", ValueError),
        ("init_lora_weights", None, TypeError),
        ("task_type", "CHAT", ValueError),
        ("auto_mapping", "x", TypeError),
        ("revision", 1, TypeError),
    ],
)
def test_bad_values_are_refused_by_name(name, value, error):
    """Catches a bad value that gets as far as the model, or an error that does not say which field."""
    with pytest.raises(error, match=name):
        LoraConfig(**{name: value})


def test_values_that_contradict_each_other_are_refused():
    """Catches layer indices beside a regular expression, a bias beside an initialization without one, and DoRA
    beside what PEFT refuses with it."""
    with pytest.raises(ValueError, match="layers_to_transform"):
        LoraConfig(target_modules="q", layers_to_transform=1)
    with pytest.raises(ValueError, match="lora_bias"):
        LoraConfig(lora_bias=True, init_lora_weights="gaussian")
    for name, value in (("lora_bias", True), ("megatron_config", {"a": 1})):
        for config in (LoraConfig, peft.LoraConfig):
            with pytest.raises(ValueError, match="DoRA" if config is peft.LoraConfig else f"use_dora=True .*{name}="):
                config(use_dora=True, **{name: value})


def test_values_changed_later_are_checked_when_an_adapter_is_made():
    """Catches a config that was changed after it was checked."""
    config = LoraConfig(target_modules=["q"])
    config.use_qalora = True
    with pytest.raises(NotImplementedError, match="use_qalora"):
        config.check()


def test_a_misspelt_field_is_told_what_is_near():
    """Catches a bare "unexpected keyword argument" for one of forty fields; copies that no longer can be made."""
    with pytest.raises(TypeError, match=r"LoraConfig has no field 'lora_aplha'; near names: lora_alpha"):
        LoraConfig(lora_aplha=3)
    with pytest.raises(TypeError, match=r"IA3Config has no field 'zzz'; its fields: auto_mapping, .*task_type"):
        peftkern.IA3Config(zzz=3)
    config = LoraConfig("CAUSAL_LM", r=4, target_modules=["q"])
    for again in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), dataclasses.replace(config)):
        assert again == config and again.r == 4


def test_older_files_with_nulls_are_read():
    """Catches refusing a file because a dict is null in it."""
    content = LoraConfig(r=4).to_json_dict() | {"rank_pattern": None, "alpha_pattern": None, "loftq_config": None}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert LoraConfig.from_dict(content) == LoraConfig(r=4)


def test_public_names():
    """Catches a name that PEFT's users import and do not find."""
    assert peftkern.LoraConfig is LoraConfig and peftkern.PeftType is PeftType
    assert PeftType.LORA == peft.PeftType.LORA and TaskType.CAUSAL_LM == peft.TaskType.CAUSAL_LM
    assert [t.value for t in TaskType] == [t.value for t in peft.TaskType]
    for name in (
        *("ArrowConfig", "BdLoraConfig", "EvaConfig", "KasaConfig", "LoraGAConfig", "MontecloraConfig", "VeloraConfig"),
        *("PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING", "MODEL_TYPE_TO_PEFT_MODEL_MAPPING"),
        *("get_peft_config", "AutoPeftModelForCausalLM", "get_eva_state_dict", "initialize_lora_eva_weights"),
    ):
        assert hasattr(peft, name) and hasattr(peftkern, name) and name in dir(peftkern), name


def test_submodules_are_there_after_importing_the_package():
    """Catches `peftkern.tuners.lora.LoraLayer` working only in a process that has imported it before."""
    names = [
        # In this order nothing is imported by what stands before it.
        *("config.PeftConfigMixin", "utils.other.transpose", "utils.prepare_model_for_kbit_training"),
        *("utils.get_peft_model_state_dict", "tuners.lora.layer.Linear", "tuners.lora.LoraLayer"),
        *("mapping.get_peft_config", "peft_model.PeftModel", "mapping_func.get_peft_model", "auto.AutoPeftModel"),
    ]
    assert all(operator.attrgetter(name)(peft) for name in names)
    ask = f"import operator, peftkern\nfor name in {names}: assert operator.attrgetter(name)(peftkern), name"
    made = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
