"""The adapter's two files: every damage is refused by name before the base model is touched; saving is atomic."""

from __future__ import annotations

import json
import os
import struct
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from peftkern import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peftkern.utils.adapter_error import AdapterFileError
from peftkern.utils.adapter_files import (
    read_config,
    read_weights,
)
from tiny_models import fingerprint, ids, mlp

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
A_UP = "base_model.model.up.lora_A.weight"
B_UP = "base_model.model.up.lora_B.weight"


def header_file(path: Path, header: object, data: bytes = b"") -> None:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def entry(shape: list, dtype: object = "F32", begin: int = 0, end: int | None = None) -> dict:
    size = 4
    for item in shape:
        size *= item
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + size if end is None else end]}


def edit_config(folder: Path, **fields: object) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def drop_config(folder: Path, name: str) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != name}))


def as_bin(folder: Path, change) -> None:
    """The adapter as the `.bin` file of older releases, with `change` applied to the A of `up`."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(tensors | {A_UP: change(tensors[A_UP])}, folder / "adapter_model.bin")


def deflated_bin(folder: Path) -> None:
    """The adapter as a compressed `.bin` file, a megabyte of zeros in it."""
    as_bin(folder, lambda a: torch.zeros(2**18))
    path = folder / "adapter_model.bin"
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, value in content.items():
            archive.writestr(name, value)


def edit_weights(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def put(name: str, content: bytes | str):
    """Replace the file `name`."""
    return lambda d: (d / name).write_bytes(content.encode() if isinstance(content, str) else content)


def resize(by: int, start: int | None = None):
    """Cut or lengthen the weight file by some bytes."""
    return lambda d: os.truncate(d / WEIGHTS, by + ((d / WEIGHTS).stat().st_size if start is None else start))


def a_up(change):
    """Replace the tensor `A_UP`."""
    return lambda d: edit_weights(d, lambda t: t.update({A_UP: change(t[A_UP])}))


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", "nothing")


def _rename(old: str, new: str):
    return lambda d: edit_weights(d, lambda t: t.__setitem__(new, t.pop(old)))


# name -> (what is done to the folder, the words that the error must contain)
CONFIG_DAMAGE = {
    "missing": (lambda d: (d / CONFIG).unlink(), [CONFIG]),
    "empty": (put(CONFIG, b""), [CONFIG, "empty"]),
    "cut": (lambda d: (d / CONFIG).write_text((d / CONFIG).read_text()[:100]), [CONFIG, "JSON"]),
    "not JSON": (put(CONFIG, b"PK\x03\x04\x00\x01"), [CONFIG, "JSON"]),
    "not UTF-8": (lambda d: (d / CONFIG).write_bytes(b'{"r": "\xff"}'), [CONFIG, "UTF-8"]),
    "a list": (put(CONFIG, "[1, 2]"), [CONFIG, "object", "list"]),
    "a number": (put(CONFIG, "8"), [CONFIG, "object", "int"]),
    "deep": (put(CONFIG, "[" * 500_000), [CONFIG, "deep"]),
    "deep object": (put(CONFIG, '{"a":' * 200_000 + "1" + "}" * 200_000), [CONFIG, "deep"]),
    "huge number": (put(CONFIG, '{"r": ' + "9" * 10_000 + "}"), [CONFIG]),
    "twice": (put(CONFIG, '{"r": 4, "r": 8}'), [CONFIG, "'r'", "twice"]),
    "NaN": (put(CONFIG, '{"lora_alpha": NaN}'), [CONFIG, "NaN"]),
    "a folder": (lambda d: ((d / CONFIG).unlink(), (d / CONFIG).mkdir()), [CONFIG, "regular file"]),
    "no peft_type": (lambda d: drop_config(d, "peft_type"), [CONFIG, "peft_type"]),
    "unknown peft_type": (lambda d: edit_config(d, peft_type="MAGIC"), [CONFIG, "peft_type", "MAGIC"]),
    "peft_type number": (lambda d: edit_config(d, peft_type=3), [CONFIG, "peft_type"]),
    "unknown task_type": (lambda d: edit_config(d, task_type="COOKING"), [CONFIG, "task_type", "COOKING"]),
    "r string": (lambda d: edit_config(d, r="8"), [CONFIG, "r ", "'8'"]),
    "r negative": (lambda d: edit_config(d, r=-1), [CONFIG, "r ", "-1"]),
    "r zero": (lambda d: edit_config(d, r=0), [CONFIG, "r ", "0"]),
    "r float": (lambda d: edit_config(d, r=4.5), [CONFIG, "r ", "4.5"]),
    "r bool": (lambda d: edit_config(d, r=True), [CONFIG, "r ", "True"]),
    "r list": (lambda d: edit_config(d, r=[4]), [CONFIG, "r "]),
    "alpha string": (lambda d: edit_config(d, lora_alpha="16"), [CONFIG, "lora_alpha"]),
    "alpha too large": (put(CONFIG, '{"peft_type": "LORA", "r": 4, "lora_alpha": 1e999}'), [CONFIG, "lora_alpha"]),
    "alpha past a float": (lambda d: edit_config(d, lora_alpha=10**400), [CONFIG, "lora_alpha", "finite"]),
    "pattern past a float": (lambda d: edit_config(d, alpha_pattern={"up": 10**400}), [CONFIG, "alpha_pattern"]),
    "targets repeated": (lambda d: edit_config(d, target_modules="a{99999999999}"), [CONFIG, "target_modules"]),
    "saved repeated": (lambda d: edit_config(d, modules_to_save=["a{99999999999}"]), [CONFIG, "modules_to_save"]),
    "saved deep": (lambda d: edit_config(d, modules_to_save=["(" * 3000 + ")" * 3000]), [CONFIG, "modules_to_save"]),
    "layers_pattern": (
        lambda d: edit_config(d, layers_to_transform=[0], layers_pattern=["("]),
        [CONFIG, "layers_pattern", "unterminated"],
    ),
    "r too large": (lambda d: edit_config(d, r=10**12), ["lora_A", "rank", str(10**12)]),
    "dropout 2": (lambda d: edit_config(d, lora_dropout=2.0), [CONFIG, "lora_dropout"]),
    "targets number": (lambda d: edit_config(d, target_modules=5), [CONFIG, "target_modules"]),
    "targets numbers": (lambda d: edit_config(d, target_modules=[5]), [CONFIG, "target_modules"]),
    "targets object": (lambda d: edit_config(d, target_modules={"up": 1}), [CONFIG, "target_modules"]),
    "bias": (lambda d: edit_config(d, bias="some"), [CONFIG, "bias"]),
    "rank_pattern list": (lambda d: edit_config(d, rank_pattern=[1]), [CONFIG, "rank_pattern"]),
    "rank_pattern string": (lambda d: edit_config(d, rank_pattern={"up": "4"}), [CONFIG, "rank_pattern"]),
    "modules_to_save": (lambda d: edit_config(d, modules_to_save=7), [CONFIG, "modules_to_save"]),
    "inference_mode": (lambda d: edit_config(d, inference_mode="yes"), [CONFIG, "inference_mode"]),
}

WEIGHT_DAMAGE = {
    "missing": (lambda d: (d / WEIGHTS).unlink(), [WEIGHTS, "found"]),
    "empty": (put(WEIGHTS, b""), [WEIGHTS, "empty"]),
    "five bytes": (put(WEIGHTS, b"\x01\x02\x03\x04\x05"), [WEIGHTS, "cut or not"]),
    "cut in the header": (resize(60, 0), [WEIGHTS, "cut"]),
    "cut in the data": (resize(-7), [WEIGHTS, "lora_", "cut"]),
    "too long": (resize(1), [WEIGHTS, "bytes"]),
    "zip": (lambda d: _zip(d / WEIGHTS), [WEIGHTS, "zip"]),
    "pickle": (put(WEIGHTS, b"\x80\x04" + b"a" * 30), [WEIGHTS, "pickle"]),
    "git-lfs": (put(WEIGHTS, "version https://git-lfs.github.com/spec/v1\n"), [WEIGHTS, "git-lfs"]),
    "HTML": (put(WEIGHTS, "<!DOCTYPE html><html></html>"), [WEIGHTS, "HTML"]),
    "JSON": (put(WEIGHTS, '{"weights": [1, 2, 3]}'), [WEIGHTS, "JSON"]),
    "huge header": (put(WEIGHTS, struct.pack("<Q", 2**62) + b"{}"), [WEIGHTS, "header", str(2**62)]),
    "deep header": (lambda d: header_file(d / WEIGHTS, b"[" * 300_000), [WEIGHTS, "deep"]),
    "header a list": (lambda d: header_file(d / WEIGHTS, [1]), [WEIGHTS, "object"]),
    "entry a number": (lambda d: header_file(d / WEIGHTS, {A_UP: 1}), [WEIGHTS, A_UP]),
    "unknown dtype": (lambda d: header_file(d / WEIGHTS, {A_UP: entry([1], "F31")}, b"1234"), [WEIGHTS, A_UP, "F31"]),
    "dtype a list": (lambda d: header_file(d / WEIGHTS, {A_UP: entry([1], [1])}, b"1234"), [WEIGHTS, A_UP, "dtype"]),
    "negative shape": (lambda d: header_file(d / WEIGHTS, {A_UP: entry([-1])}, b"1234"), [WEIGHTS, A_UP, "shape"]),
    "huge shape": (lambda d: header_file(d / WEIGHTS, {A_UP: entry([2**40, 2**40], end=4)}, b"1234"), [WEIGHTS, A_UP]),
    "65 dimensions": (lambda d: header_file(d / WEIGHTS, {A_UP: entry([1] * 65)}, b"1234"), [WEIGHTS, A_UP, "65"]),
    "empty and huge": (
        lambda d: header_file(d / WEIGHTS, {A_UP: entry([2**63, 0], end=0)}),
        [WEIGHTS, A_UP, "shape", str(2**63)],
    ),
    "offsets beyond": (lambda d: header_file(d / WEIGHTS, {A_UP: entry([1000])}, b"1234"), [WEIGHTS, A_UP, "4000"]),
    "overlap": (lambda d: header_file(d / WEIGHTS, {"a": entry([1]), "b": entry([1])}, b"1234"), [WEIGHTS, "'b'"]),
    "hole": (lambda d: header_file(d / WEIGHTS, {"a": entry([1], begin=4)}, b"12345678"), [WEIGHTS, "'a'"]),
    "no tensors": (lambda d: header_file(d / WEIGHTS, {}), [WEIGHTS, "no tensors"]),
    "a folder": (lambda d: ((d / WEIGHTS).unlink(), (d / WEIGHTS).mkdir()), [WEIGHTS, "regular file"]),
    "a pipe": (lambda d: ((d / WEIGHTS).unlink(), os.mkfifo(d / WEIGHTS)), [WEIGHTS, "regular file"]),
    "an index only": (
        lambda d: (
            (d / WEIGHTS).unlink(),
            (d / f"{WEIGHTS}.index.json").write_text('{"weight_map": {"x": "../../etc/passwd"}}'),
        ),
        [WEIGHTS, "index.json"],
    ),
    "hostile bin": (
        lambda d: ((d / WEIGHTS).unlink(), torch.save({"x": Path("/etc/passwd")}, d / "adapter_model.bin")),
        ["adapter_model.bin", "weights_only"],
    ),
    "bin of a list": (
        lambda d: ((d / WEIGHTS).unlink(), torch.save([torch.zeros(1)], d / "adapter_model.bin")),
        ["adapter_model.bin", "dict"],
    ),
    "sparse bin": (lambda d: as_bin(d, lambda a: a.to_sparse()), ["adapter_model.bin", A_UP, "sparse"]),
    "bin without values": (lambda d: as_bin(d, lambda a: a.to("meta")), ["adapter_model.bin", A_UP, "meta"]),
    "bin of more elements than values": (
        lambda d: as_bin(d, lambda a: torch.zeros(1, 1).expand(4, 2**40)),
        ["adapter_model.bin", A_UP, str(2**40), "more elements"],
    ),
    "nested bin": (
        lambda d: as_bin(d, lambda a: torch.nested.nested_tensor([a])),
        ["adapter_model.bin", A_UP, "nested"],
    ),
    "bin that unpacks": (lambda d: deflated_bin(d), ["adapter_model.bin", "unpack"]),
    "rank of an absent layer": (
        lambda d: edit_config(d, target_modules=["up", "down", "head"], rank_pattern={"head": 10**13}),
        [WEIGHTS, CONFIG, str(10**13), "larger than 4096"],
    ),
    "wrong shape": (a_up(lambda a: a[:, :7].clone()), [WEIGHTS, A_UP, "7"]),
    "transposed": (a_up(lambda a: a.T.contiguous()), [WEIGHTS, A_UP, "16"]),
    "a vector": (a_up(lambda a: a.flatten()), [WEIGHTS, A_UP, "matrix"]),
    "no rows": (a_up(lambda a: a[:0].clone()), [WEIGHTS, A_UP, "matrix"]),
    "rank of one": (a_up(lambda a: a[:2].clone()), [WEIGHTS, A_UP, "rank"]),
    "rank of config": (lambda d: edit_config(d, r=8), [WEIGHTS, "lora_A", "rank", "8"]),
    "rank of two": (
        lambda d: (
            edit_config(d, rank_pattern={"down": 2}),
            a_up(lambda a: a[:2].clone())(d),
        ),
        [WEIGHTS, "up.lora_", "rank"],
    ),
    "integers": (a_up(lambda a: a.int()), [WEIGHTS, A_UP, "int32"]),
    "complex": (a_up(lambda a: a.cfloat()), [WEIGHTS, A_UP, "complex"]),
    "half a pair": (lambda d: edit_weights(d, lambda t: t.pop(A_UP)), [WEIGHTS, B_UP, "lora_A"]),
    "renamed factor": (_rename(A_UP, "base_model.model.up.lora_X.weight"), [WEIGHTS, B_UP, "lora_A"]),
    "renamed module": (
        lambda d: (_rename(A_UP, A_UP.replace("up", "xx"))(d), _rename(B_UP, B_UP.replace("up", "xx"))(d)),
        [WEIGHTS, A_UP, "model.xx"],
    ),
    "other model's": (
        lambda d: save_file({f"other.{i}": torch.zeros(2) for i in range(3)}, d / WEIGHTS),
        [WEIGHTS, "other.0", "no tensor of this adapter"],
    ),
    "other targets": (lambda d: edit_config(d, target_modules=["nowhere"]), [CONFIG, "target_modules", "nowhere"]),
    "no regex": (lambda d: edit_config(d, modules_to_save=["("]), [CONFIG, "unterminated"]),
}


@pytest.mark.parametrize("kind", CONFIG_DAMAGE)
def test_damaged_config_is_refused_before_the_base_is_touched(saved, kind):
    """Would catch: a KeyError that names nothing, `r="8"` used as a rank, layers injected before the check."""
    damage, words = CONFIG_DAMAGE[kind]
    damage(saved)
    base = mlp()
    before = fingerprint(base)
    with pytest.raises(AdapterFileError) as error:
        PeftModel.from_pretrained(base, saved)
    for word in words:
        assert word in str(error.value), f"{error.value} does not say {word!r}"
    assert fingerprint(base) == before


@pytest.mark.parametrize("kind", ["empty", "r string", "targets number", "unknown peft_type", "alpha past a float"])
def test_a_configuration_read_alone_is_refused_by_file(saved, kind):
    """Would catch: `PeftConfig.from_pretrained` that says which field is wrong, of the many folders a program reads in
    none."""
    damage, words = CONFIG_DAMAGE[kind]
    damage(saved)
    with pytest.raises(AdapterFileError) as error:
        PeftConfig.from_pretrained(saved)
    assert error.value.file == str(saved / CONFIG) and all(word in str(error.value) for word in words)


def test_names_of_the_reader_s_own_arguments_are_unknown_keys(saved):
    """Would catch: a key "cls" in a file that is taken for an argument of the function that reads it."""
    edit_config(saved, cls=1, self=2, config=3)
    with pytest.warns(UserWarning, match=r"\['cls', 'config', 'self'\]"):
        PeftConfig.from_pretrained(saved)


def test_what_is_not_built_is_refused_with_the_file_s_name(saved):
    """Would catch: an error about a field of some file, of the many that a program loads, that does not say which."""
    edit_config(saved, use_qalora=True)
    base, model = mlp(), PeftModel(mlp(), LoraConfig(target_modules=["up"]))
    before = fingerprint(base)
    for load in (lambda: PeftModel.from_pretrained(base, saved), lambda: model.load_adapter(saved, "second")):
        with pytest.raises(NotImplementedError, match=rf"{CONFIG}: LoraConfig\.use_qalora=True"):
            load()
    assert fingerprint(base) == before and list(model.peft_config) == ["default"]


@pytest.mark.parametrize("kind", WEIGHT_DAMAGE)
def test_damaged_weights_are_refused_and_the_base_is_as_it_was(saved, kind):
    """Would catch PEFT 0.21's fault: a damaged weight file leaves adapters of random values on the base model."""
    damage, words = WEIGHT_DAMAGE[kind]
    damage(saved)
    base = mlp()
    before = fingerprint(base)
    with pytest.raises(ValueError) as error:
        PeftModel.from_pretrained(base, saved)
    for word in words:
        assert word in str(error.value), f"{error.value} does not say {word!r}"
    assert fingerprint(base) == before


@pytest.mark.parametrize("kind", ["cut in the data", "wrong shape", "half a pair", "rank of one", "other model's"])
@pytest.mark.parametrize("name", ["default", "second"])
def test_load_adapter_refuses_damage_and_keeps_the_model(saved, kind, name):
    """Would catch: a half-loaded adapter, or a second adapter left behind by a failed load."""
    model = PeftModel.from_pretrained(mlp(), saved, is_trainable=True)
    WEIGHT_DAMAGE[kind][0](saved)
    before, configs = fingerprint(model), dict(model.peft_config)
    with pytest.raises(ValueError):
        model.load_adapter(saved, name)
    assert fingerprint(model) == before and model.peft_config == configs


def test_a_failure_late_in_loading_is_rolled_back(saved, monkeypatch):
    """Would catch: hooks, frozen parameters and injected layers left behind when the last step fails."""
    base = mlp()
    base.up.weight.requires_grad_(False)
    base.get_input_embeddings = lambda: base.emb
    before = fingerprint(base)
    monkeypatch.setattr(PeftModel, "_load_tensors", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        PeftModel.from_pretrained(base, saved)
    assert fingerprint(base) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_are_warned_about_by_name(saved, value):
    """Would catch: NaN loading without a word, as in PEFT 0.21."""
    edit_weights(saved, lambda t: t[A_UP].view(-1).__setitem__(3, value))
    with pytest.warns(UserWarning, match=f"NaN or Inf in '{A_UP}'"):
        PeftModel.from_pretrained(mlp(), saved)


@pytest.mark.parametrize(
    "value, wide, narrow", [(1e300, torch.float64, torch.float32), (1e6, torch.float32, torch.float16)]
)
def test_values_that_do_not_fit_the_adapter_s_dtype_are_warned_about(saved, value, wide, narrow):
    """Catches a finite value in the file that becomes Inf in the model without a word."""
    tensors = {key: t.to(wide) for key, t in load_file(saved / WEIGHTS).items()}
    save_file(tensors, saved / WEIGHTS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a wider dtype by itself is nothing to warn of
        PeftModel.from_pretrained(mlp().to(narrow), saved, autocast_adapter_dtype=False)
    tensors[A_UP][0, 0] = value
    save_file(tensors, saved / WEIGHTS)
    kind = str(narrow).removeprefix("torch.")
    for low in (False, True):
        with pytest.warns(
            UserWarning, match=rf"{WEIGHTS}: too large for the adapter's {kind}, loaded as Inf: '{A_UP}'"
        ):
            PeftModel.from_pretrained(mlp().to(narrow), saved, autocast_adapter_dtype=False, low_cpu_mem_usage=low)


@pytest.mark.parametrize("field", ["peft_type", "task_type", "r", "lora_alpha", "init_lora_weights", "target_modules"])
def test_long_values_are_not_repeated_whole(saved, field):
    """Catches a message of 100,000 characters that a file's value fills."""
    content = json.loads((saved / CONFIG).read_text())
    for value in ("x" * 100_000, ["x" * 100_000]):
        (saved / CONFIG).write_text(json.dumps(content | {field: value}))
        with pytest.raises((AdapterFileError, TypeError)) as caught:
            PeftModel.from_pretrained(mlp(), saved)
        assert len(str(caught.value)) < 1000 + len(str(saved)) + 200 and "xxx" in str(caught.value)
        if field not in ("target_modules",):
            with pytest.raises((ValueError, TypeError, NotImplementedError)) as caught:
                PeftConfig.from_pretrained(saved)
            assert len(str(caught.value)) < 1200 + len(str(saved))
    (saved / CONFIG).write_text(json.dumps(content | {"y" * 100_000: 1}))
    with pytest.warns(UserWarning, match="does not know the keys") as told:
        PeftConfig.from_pretrained(saved)
    assert all(len(str(warning.message)) < 1300 for warning in told)


def test_unknown_keys_are_warned_about_and_cannot_reach_the_base(saved):
    """Would catch: an adapter file that overwrites weights of the base model under their own names."""
    base = mlp()
    keys = {"base_model.model.up.base_layer.weight": torch.zeros(24, 16), "base_model.model.head.bias": torch.ones(5)}
    edit_weights(saved, lambda t: t.update(keys))
    edit_config(saved, from_the_future=1)
    weight, bias = base.up.weight.detach().clone(), base.head.bias.detach().clone()
    with pytest.warns(UserWarning) as warned:
        PeftModel.from_pretrained(base, saved)
    text = "\n".join(str(w.message) for w in warned)
    assert all(key in text for key in keys) and "from_the_future" in text
    assert torch.equal(base.up.base_layer.weight, weight) and torch.equal(base.head.bias, bias)


def test_whole_layers_may_be_absent_with_a_warning(saved):
    """PEFT saves and loads parts of an adapter; the absent layers are named. Would catch: with low_cpu_mem_usage they
    stay on the meta device, and the model computes with what happens to be in memory."""
    edit_weights(saved, lambda t: (t.pop(A_UP), t.pop(B_UP)))
    loaded = []
    for options in ({}, {"low_cpu_mem_usage": True}):
        with pytest.warns(UserWarning, match="Found missing adapter keys.*up.lora_A.default.weight"):
            loaded.append(PeftModel.from_pretrained(mlp().bfloat16(), saved, **options))
    kinds = [{n: (p.dtype, p.device, p.requires_grad) for n, p in model.named_parameters()} for model in loaded]
    assert kinds[0] == kinds[1]
    assert torch.equal(loaded[0](ids()), loaded[1](ids()))


def test_a_whole_layer_with_a_bias_may_be_absent():
    """Would catch: a part of an adapter that is refused because of the bias that its lora_B has (`lora_bias`)."""
    model = get_peft_model(mlp(), LoraConfig(target_modules=["up", "down"], lora_bias=True))
    tensors = get_peft_model_state_dict(model)
    part = {key: value + 1 for key, value in tensors.items() if ".up." in key}
    result = set_peft_model_state_dict(model, part)
    assert {key.split(".")[2] for key in result.missing_keys} == {"down"} and len(result.missing_keys) == 3
    for name in ("lora_B.bias", "lora_B.weight"):
        lost = {key: value for key, value in tensors.items() if not key.endswith(f"up.{name}")}
        with pytest.raises(AdapterFileError, match=f"up.{name}"):
            set_peft_model_state_dict(model, lost)


def test_missing_folder_and_file_in_its_place(tmp_path):
    """Would catch: a path that is not there reported as an unreachable Hub repository."""
    with pytest.raises(AdapterFileError, match="no such folder"):
        read_config(tmp_path / "not" / "there")
    (tmp_path / "file").write_text("x")
    with pytest.raises(AdapterFileError, match="got a file"):
        read_weights(tmp_path / "file")
    with pytest.raises(AdapterFileError, match=f"{CONFIG} here; found"):
        read_config(tmp_path)


def test_error_has_parts_and_survives_pickling(saved):
    """Would catch: an error of a data-loading worker that cannot be sent to its parent."""
    import pickle

    a_up(lambda a: a.int())(saved)
    with pytest.raises(AdapterFileError) as error:
        PeftModel.from_pretrained(mlp(), saved)
    again = pickle.loads(pickle.dumps(error.value))
    assert (again.file, again.key) == (str(saved / WEIGHTS), A_UP) and str(again) == str(error.value)


def test_bin_is_read_where_there_is_no_safetensors(saved):
    """Adapters of older PEFT releases are `.bin` files of plain tensors."""
    expected = load_file(saved / WEIGHTS)
    torch.save(expected, saved / "adapter_model.bin")
    (saved / WEIGHTS).unlink()
    model = PeftModel.from_pretrained(mlp(), saved)
    assert torch.equal(model.base_model.model.up.lora_A["default"].weight, expected[A_UP])


# --- writing ---------------------------------------------------------------------------------------------------------
