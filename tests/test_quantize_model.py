"""Whole models: quantized in place, saved, loaded, prepared; beside transformers and bitsandbytes, and without them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import peftkern
from peftkern import QuantizedFileError, load_quantized, quantize_model, save_quantized
from peftkern.utils.quantized_modules import Linear4bit, Linear8bit, weight_of
from quantized_models import BITS4, BITS8, CONFIGS, NESTED, NOT_ON_CPU, ours, read, same_tensors, saved_llama, theirs
from tiny_models import ids, mlp, tiny_llama

ROOT = Path(__file__).resolve().parent.parent


def nested(depth: int) -> str:
    """An empty list in lists, so deep that what reads it as a list does and what walks through it may not."""
    return "[" * depth + "]" * depth


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    """The folder of a tiny dense Llama in bfloat16."""
    return saved_llama(tmp_path_factory.mktemp("dense"))


# --- quantizing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_quantize_model_makes_what_transformers_and_bitsandbytes_make(dense, name):
    """Catches another choice of layers, other bits, a bias that was lost, a setting of the configuration ignored."""
    mine, other = ours(dense, name), theirs(dense, name)
    same_tensors(mine.state_dict(), other.state_dict(), but=NOT_ON_CPU if name == "nested" else ())
    layers = [m for m in mine.modules() if isinstance(m, Linear4bit | Linear8bit)]
    assert len(layers) == 14 and type(mine.lm_head) is nn.Linear
    assert not any(p.requires_grad for layer in layers for p in layer.parameters())
    if name != "int8":
        assert {layer.compute_dtype for layer in layers} == {torch.bfloat16}
    # Bits are the same, the order of additions need not be; in training mode bitsandbytes does not repack its weights.
    a, b = mine(ids()).logits, other.train()(ids()).logits
    tolerance = 0.02 if name != "int8" else 0.05  # bitsandbytes' int8 forward rounds activations to 8 bits
    assert (a - b).abs().max() <= tolerance * b.abs().max()


def test_marks_are_those_of_transformers(dense):
    """Catches a model that Trainer takes for a dense one, or TRL and accelerate for one of another method."""
    for name, flag in (("nf4", "is_loaded_in_4bit"), ("int8", "is_loaded_in_8bit")):
        mine, other = ours(dense, name), theirs(dense, name)
        for attribute in ("is_quantized", "quantization_method", flag):
            assert getattr(mine, attribute) == getattr(other, attribute)
        assert type(mine.hf_quantizer) is type(other.hf_quantizer) and mine.hf_quantizer.is_trainable
        assert mine.config._is_quantized and mine.model.config._is_quantized
        wanted = other.config.quantization_config.to_dict() | {"llm_int8_skip_modules": ["lm_head"]}
        assert mine.config.quantization_config.to_dict() == wanted
        with pytest.raises(ValueError, match="purely quantized"):
            transformers.trainer_utils.validate_quantization_for_training(mine)
        with pytest.raises(ValueError, match="half"):
            mine.half()
        count = read(dense).num_parameters()
        assert mine.num_parameters() == count
        assert mine.num_parameters(exclude_embeddings=True) == count - 128 * 64
        assert mine.num_parameters(only_trainable=True) < count


def test_dense_weights_are_freed_one_by_one(monkeypatch):
    """Catches a second copy of the model held until the end."""
    import weakref

    from peftkern.utils import quantized_modules

    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    alive = [weakref.ref(layer.weight) for layer in model]
    counts = []
    quantize = quantized_modules.quantize_4bit
    monkeypatch.setattr(
        quantized_modules,
        "quantize_4bit",
        lambda *a: counts.append(sum(r() is not None for r in alive)) or quantize(*a),
    )
    assert quantize_model(model, BITS4) is model
    assert counts == [4, 3, 2, 1] and not any(r() is not None for r in alive)
    assert all(isinstance(layer, Linear4bit) for layer in model)


def test_what_is_left_alone():
    """Catches a tied weight that is no longer tied, a head that is quantized, patterns of another rule than
    transformers', and a subclass of nn.Linear replaced."""
    tied = quantize_model(tiny_llama(tie_word_embeddings=True), BITS4)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight and weight_of(tied.model.layers[0].mlp.up_proj)

    classifier = quantize_model(tiny_llama(cls="LlamaForSequenceClassification"), BITS4)
    assert type(classifier.score) is nn.Linear

    for patterns in (["up", "head"], ["^up$", "h.*d"]):
        model = quantize_model(mlp(), BITS4, skip_modules=patterns)
        assert [type(m) for m in (model.up, model.down, model.head)] == [nn.Linear, Linear4bit, nn.Linear]
    model = quantize_model(mlp(), BITS4 | {"llm_int8_skip_modules": ["own"]})
    assert type(model.down) is nn.Linear and isinstance(model.head, Linear4bit)

    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 8)})
    model["b"].weight = model["a"].weight
    model["attention"] = nn.MultiheadAttention(8, 2)
    model["again"] = model["c"]
    with pytest.warns(
        UserWarning, match=r"NonDynamically\w*Linear layers \(a subclass of nn.Linear\) stay dense: 'att.*out_proj'"
    ):
        quantize_model(model, BITS8)
    assert model["b"].weight is model["a"].weight and isinstance(model["c"], Linear8bit)
    assert model["again"] is model["c"]
    assert isinstance(model["attention"].out_proj, nn.Linear)


def test_subclasses_that_stay_dense_are_told_once_by_class():
    """Catches a model of layers of its own (Falcon's) that stays dense in silence, and words about what was skipped."""
    config = transformers.FalconConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=128)
    model = transformers.FalconForCausalLM(config)
    model.transformer.h[0].extra = nn.Linear(64, 64)
    with pytest.warns(UserWarning) as told:
        quantize_model(model, BITS4)
    words = [str(warning.message) for warning in told if "FalconLinear" in str(warning.message)]
    assert len(words) == 1 and "stay dense: 'transformer.h.0.self_attention.query_key_value'" in words[0]
    assert "and 5 more" in words[0] and "lm_head" not in words[0]
    model = transformers.FalconForCausalLM(config)
    model.transformer.h[0].extra = nn.Linear(64, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_model(model, BITS4, skip_modules=["query_key_value", "dense", "4h", "to_h", "lm_head"])


@pytest.mark.parametrize(
    "config, words",
    [
        ({}, "load_in_4bit or load_in_8bit"),
        (dict(load_in_4bit=True, load_in_8bit=True), "load_in_4bit or load_in_8bit"),
        (BITS4 | {"bits": 4}, "unknown field 'bits'"),
        (BITS4 | {"bnb_4bit_quant_type": "int4"}, "bnb_4bit_quant_type.*int4"),
        (BITS4 | {"bnb_4bit_compute_dtype": "int8"}, "bnb_4bit_compute_dtype"),
        (BITS4 | {"bnb_4bit_compute_dtype": "float13"}, "bnb_4bit_compute_dtype.*float13"),
        (BITS4 | {"bnb_4bit_quant_storage": torch.int32}, "bnb_4bit_quant_storage"),
        (BITS4 | {"llm_int8_skip_modules": "lm_head"}, "llm_int8_skip_modules"),
        (BITS4 | {"llm_int8_skip_modules": ["("]}, "no regular expression"),
        (BITS4 | {"llm_int8_skip_modules": ["(" * 10_000]}, r"'\(+\.\.\. is no regular expression"),
        (BITS4 | {"bits" * 10_000: 4}, "unknown field 'bits.*characters left out"),
        (BITS4 | {"bnb_4bit_quant_type": "int4" * 10_000}, "bnb_4bit_quant_type: .*characters left out"),
        (BITS4 | {"llm_int8_skip_modules": 5}, "llm_int8_skip_modules: expected a list"),
        ({"load_in_4bit": "yes"}, "load_in_4bit: expected true or false, got 'yes'"),
        (BITS4 | {"load_in_8bit": 0}, "load_in_8bit: expected true or false, got 0"),
        (BITS4 | {"bnb_4bit_use_double_quant": None}, "bnb_4bit_use_double_quant: expected true or false, got None"),
        (BITS4 | {"llm_int8_threshold": "6"}, "llm_int8_threshold: expected a number, got '6'"),
    ],
)
def test_wrong_settings_are_refused_by_name(config, words):
    """Catches a setting that is ignored, after half of the model was replaced."""
    model = mlp()
    with pytest.raises(ValueError, match=words):
        quantize_model(model, config)
    assert type(model.up) is nn.Linear


def test_models_that_cannot_be_quantized_are_refused():
    """Catches a second quantization, an adapter under a new layer, a weight without values, hooks that vanish."""
    with pytest.raises(TypeError, match="quantization_config"):
        quantize_model(mlp(), "nf4")
    with pytest.raises(NotImplementedError, match="llm_int8_has_fp16_weight"):
        quantize_model(mlp(), BITS8 | {"llm_int8_has_fp16_weight": True})
    with pytest.raises(ValueError, match="quantized already"):
        quantize_model(quantize_model(mlp(), BITS4), BITS4)
    with pytest.raises(ValueError, match="carries an adapter"):
        quantize_model(peftkern.get_peft_model(mlp(), peftkern.LoraConfig(target_modules=["up"])), BITS4)
    with pytest.raises(ValueError, match="up.weight is on the meta device"):
        quantize_model(mlp().to("meta"), BITS4)
    hooked = mlp()
    hooked.down.register_forward_hook(lambda *a: None)
    with pytest.raises(ValueError, match="down has hooks"):
        quantize_model(hooked, BITS4)
    with pytest.raises(ValueError, match="down has hooks"):
        normed = mlp()
        torch.nn.utils.weight_norm(normed.down)
        quantize_model(normed, BITS4)
    broken = mlp()
    broken.down.weight.data[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"down: w: expected finite numbers, got nan at \[3, 4\]"):
        quantize_model(broken, BITS4)


@pytest.mark.parametrize(
    "layer, settings, words",
    [
        (nn.Linear(8, 8).double(), {}, "1.weight: expected .*bfloat16.*, got torch.float64"),
        (nn.Linear(0, 8), {}, r"1.weight: expected .*at least one element, got .*\[8, 0\]"),
        (nn.Linear(3, 3), {"bnb_4bit_quant_storage": "float32"}, "1: quant_storage: 5 packed bytes"),
    ],
)
def test_a_layer_that_does_not_fit_is_refused_before_any_is_replaced(layer, settings, words):
    """Catches a model left half quantized, and an error that does not say by which layer."""
    model = nn.Sequential(nn.Linear(8, 8), layer)
    with pytest.raises(ValueError, match=words):
        quantize_model(model, BITS4 | settings)
    assert type(model[0]) is nn.Linear


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_models_load_in_transformers_and_here(dense, tmp_path, name):
    """Catches a file that bitsandbytes reads otherwise than we, and a round trip that changes a byte."""
    model = ours(dense, name)
    save_quantized(model, tmp_path / "a")
    state = model.state_dict()
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    same_tensors(state, other.state_dict())
    loaded = load_quantized(tmp_path / "a")
    same_tensors(state, loaded.state_dict())
    assert not loaded.training and torch.equal(loaded(ids()).logits, model.eval()(ids()).logits)
    assert loaded.lm_head.weight.dtype == torch.bfloat16 and loaded.is_quantized
    assert loaded.config.name_or_path == str(tmp_path / "a")
    for again, folder in ((loaded, "b"), (other, "c")):
        save_quantized(again, tmp_path / folder)
        files = [(tmp_path / f / "model.safetensors").read_bytes() for f in ("a", folder)]
        assert files[0] == files[1], f"{folder} differs"
    assert not list(tmp_path.glob(".*")), "a staging folder was left"


@pytest.mark.parametrize("name", ["nested", "storage", "int8"])
def test_checkpoints_of_bitsandbytes_load_here(dense, tmp_path, name):
    """Catches files as transformers itself writes them: no list of skipped modules, several files."""
    other = theirs(dense, name)
    state = {key: value.clone() for key, value in other.state_dict().items()}
    other.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 3
    for options in (
        {},
        {"model_class": transformers.AutoModelForCausalLM},
        {"model_class": transformers.LlamaForCausalLM},
    ):
        loaded = load_quantized(tmp_path, **options)
        same_tensors(state, loaded.state_dict())
    same_tensors(
        {k: v for k, v in state.items() if "layers" in k},
        {f"model.{k}": v for k, v in _base_model(tmp_path).state_dict().items() if "layers" in k},
    )


def _base_model(folder: Path) -> nn.Module:
    with pytest.warns(UserWarning, match="no place in the model for 'lm_head.weight'"):
        return load_quantized(folder, transformers.AutoModel)


def test_models_that_bitsandbytes_repacked_are_saved_right(dense, tmp_path):
    """Catches scales that bitsandbytes leaves transposed when it undoes its CPU kernel's layout to save."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    other = theirs(dense, "nf4")
    before = {name: weight_of(m).absmax.clone() for name, m in other.named_modules() if weight_of(m) is not None}
    for name in before:
        layer = other.get_submodule(name)
        layer.weight.data, layer.weight.quant_state = _convert_weight_packed_for_cpu(
            layer.weight.data, layer.weight.quant_state
        )
    with pytest.warns(UserWarning, match="repacked"):
        save_quantized(other, tmp_path)
    loaded = load_quantized(tmp_path)
    for name, absmax in before.items():
        assert torch.equal(weight_of(loaded.get_submodule(name)).absmax, absmax.bfloat16().float()), name


def test_shards_dtype_and_generation_settings(dense, tmp_path):
    """Catches an index that names the wrong file, a dtype that is ignored, settings lost on the way."""
    model = ours(dense, "nested")
    model.generation_config.max_new_tokens = 7
    save_quantized(model, tmp_path, max_shard_size=20_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    same_tensors(model.state_dict(), load_quantized(tmp_path).state_dict())
    loaded = load_quantized(tmp_path, dtype=torch.float32, attn_implementation="eager")
    assert loaded.lm_head.weight.dtype == loaded.model.norm.weight.dtype == torch.float32
    assert loaded.config._attn_implementation == "eager" and loaded.generation_config.max_new_tokens == 7
    assert {p.device.type for p in loaded.parameters()} == {"cpu"}
    # One file in the place of several: what is left of the old ones would be read in its stead.
    save_quantized(model, tmp_path)
    assert [f.name for f in tmp_path.glob("model*")] == ["model.safetensors"]
    same_tensors(model.state_dict(), load_quantized(tmp_path).state_dict())


def test_tied_weights_and_other_architectures(tmp_path):
    """Catches a tied lm_head reported as missing, and buffers that only the model's making gives values."""
    tied = quantize_model(tiny_llama(tie_word_embeddings=True), NESTED)
    t5 = transformers.T5Config(d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=4, vocab_size=128)
    t5.decoder_start_token_id = 0
    bert = transformers.BertConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=128
    )
    models = [
        (tied, dict(input_ids=ids())),
        (transformers.T5ForConditionalGeneration(t5), dict(input_ids=ids(), decoder_input_ids=ids())),
        (transformers.BertForSequenceClassification(bert), dict(input_ids=ids())),
    ]
    for number, (model, inputs) in enumerate(models):
        model = (model if model is tied else quantize_model(model, NESTED)).eval()
        save_quantized(model, tmp_path / str(number))
        loaded = load_quantized(tmp_path / str(number))
        same_tensors(model.state_dict(), loaded.state_dict())
        same_tensors(model.state_dict(), type(model).from_pretrained(tmp_path / str(number)).state_dict())
        assert torch.equal(model(**inputs).logits, loaded(**inputs).logits)
    assert (again := load_quantized(tmp_path / "0")).lm_head.weight is again.model.embed_tokens.weight


def test_checkpoints_under_older_names_load(tmp_path):
    """Catches a language model inside another, or a head, that files know by a name from before."""
    size = dict(vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4)
    vision = size | dict(model_type="clip_vision_model", image_size=28, patch_size=14, projection_dim=64)
    vision.pop("vocab_size")
    llava = transformers.LlavaConfig(text_config=size | dict(model_type="llama"), vision_config=vision)
    models = {
        "language_model.model.layers.0.mlp.up_proj.weight": (transformers.LlavaForConditionalGeneration, llava),
        "embed_out.weight": (transformers.GPTNeoXForCausalLM, transformers.GPTNeoXConfig(**size)),
    }
    for number, (key, (cls, config)) in enumerate(models.items()):
        folder = tmp_path / str(number)
        model = quantize_model(cls._from_config(config, dtype=torch.bfloat16), NESTED, progress=False).eval()
        model.save_pretrained(folder)
        assert key in load_file(folder / "model.safetensors"), "transformers writes its own names now"
        loaded = load_quantized(folder)
        same_tensors(model.state_dict(), loaded.state_dict())
        assert torch.equal(model(ids()).logits, loaded(ids()).logits)


def test_a_save_that_fails_leaves_the_old_checkpoint(dense, tmp_path, monkeypatch):
    """Catches files that are written into the folder one by one, so that a kill leaves a mixture."""
    model = ours(dense, "nf4")
    save_quantized(model, tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").write_text("{}")
    before = {f.name: f.read_bytes() for f in (tmp_path / "m").iterdir()}
    other = ours(dense, "int8")
    write = type(other).save_pretrained

    def torn(self, folder, **kwargs):
        write(self, folder, **kwargs)
        os.truncate(os.path.join(folder, "model.safetensors"), 100)
        raise KeyboardInterrupt

    monkeypatch.setattr(type(other), "save_pretrained", torn)
    with pytest.raises(KeyboardInterrupt):
        save_quantized(other, tmp_path / "m")
    assert {f.name: f.read_bytes() for f in (tmp_path / "m").iterdir()} == before
    assert not [f for f in tmp_path.iterdir() if f.name.startswith(".")]
    monkeypatch.undo()
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (replace(a, b), (_ for _ in ()).throw(OSError("full")))[0])
    with pytest.raises(OSError, match="full"):
        save_quantized(other, tmp_path / "m")
    with pytest.raises(QuantizedFileError, match="expected config.json here"):  # refused, not mixed
        load_quantized(tmp_path / "m")
    monkeypatch.undo()
    save_quantized(other, tmp_path / "m")
    assert (tmp_path / "m" / "tokenizer.json").exists()
    same_tensors(other.state_dict(), load_quantized(tmp_path / "m").state_dict())


def test_a_folder_on_another_disk_is_saved_into(dense, tmp_path, monkeypatch):
    """Catches staging beside a mount point or a link: no rename comes across, and the old config.json is gone by then;
    files that only their owner can read; what killed writers left in staging, a model's size each, piling up."""
    model, folder = ours(dense, "nf4"), tmp_path / "mounted"
    folder.mkdir()
    replace = os.replace

    def within(a, b):
        if not Path(a).is_relative_to(folder):
            raise OSError(18, "Invalid cross-device link", str(a), None, str(b))
        replace(a, b)

    monkeypatch.setattr(os, "replace", within)
    monkeypatch.setattr(os, "rename", within)
    for age, name in ((7200, ".checkpoint_staging_old"), (10, ".checkpoint_staging_new")):
        (folder / name).mkdir()
        (folder / name / "model.safetensors").write_bytes(b"0")
        for path in (folder / name / "model.safetensors", folder / name):
            os.utime(path, (path.stat().st_mtime - age,) * 2)
    for _ in range(2):
        save_quantized(model, folder)
        same_tensors(model.state_dict(), load_quantized(folder).state_dict())
    assert [f.name for f in folder.iterdir() if f.name.startswith(".")] == [".checkpoint_staging_new"]
    assert [f.name for f in tmp_path.iterdir()] == ["mounted"]
    (tmp_path / "plain").write_text("x")
    expected = (tmp_path / "plain").stat().st_mode
    assert {f.stat().st_mode for f in folder.iterdir() if f.is_file()} == {expected}


def test_what_cannot_be_saved_is_refused(dense, tmp_path):
    """Catches a dense model, a plain module or an adapted one written as a quantized checkpoint."""
    with pytest.raises(TypeError, match="transformers model, got Mlp"):
        save_quantized(mlp(), tmp_path / "m")
    with pytest.raises(ValueError, match="no layer of it is quantized"):
        save_quantized(read(dense), tmp_path / "m")
    assert not (tmp_path / "m").exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="got a file"):
        save_quantized(ours(dense, "nf4"), tmp_path / "file")


@pytest.fixture(scope="module")
def good(dense, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    save_quantized(ours(dense, "nested"), folder)
    return folder


UP = "model.layers.0.mlp.up_proj."
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
GENERATION = "generation_config.json"


def edit_tensors(change):
    def damage(folder: Path) -> None:
        tensors = {name: t.clone() for name, t in load_file(folder / WEIGHTS).items()}
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return damage


def edit_config(**fields):
    def damage(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text()) | fields
        (folder / CONFIG).write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

    return damage


def index(content: dict | str):
    """Rename the weights and put an index beside them."""

    def damage(folder: Path) -> None:
        os.rename(folder / WEIGHTS, folder / "model-00001-of-00001.safetensors")
        (folder / INDEX).write_text(content if isinstance(content, str) else json.dumps(content))

    return damage


SHARD = "model-00001-of-00001.safetensors"
# name -> (what is done to the folder, words of the error: file, key, reason)
DAMAGE = {
    "no config": (lambda d: (d / CONFIG).unlink(), [CONFIG]),
    "config cut": (lambda d: os.truncate(d / CONFIG, 50), [CONFIG, "JSON"]),
    "dense": (edit_config(quantization_config=None), [CONFIG, "not quantized", "peftkern.quantize_model"]),
    "another method": (edit_config(quantization_config={"quant_method": "gptq"}), [CONFIG, "gptq", "bitsandbytes"]),
    "settings a list": (edit_config(quantization_config=[1]), [CONFIG, "quantization_config", "list"]),
    "settings unknown": (edit_config(quantization_config={"load_in_3bit": True}), [CONFIG, "load_in_3bit"]),
    "settings of another kind": (
        edit_config(quantization_config={"load_in_4bit": "yes"}),
        [CONFIG, "load_in_4bit", "true or false", "'yes'"],
    ),
    "threshold past a float": (
        edit_config(quantization_config={"load_in_8bit": True, "llm_int8_threshold": 10**400}),
        [CONFIG, "llm_int8_threshold"],
    ),
    "a million layers": (edit_config(num_hidden_layers=10**6), [CONFIG, "num_hidden_layers", "1000000"]),
    "head_dim of gigabytes": (edit_config(head_dim=2**31), [CONFIG, "head_dim", str(2**31)]),
    "layers text": (edit_config(num_hidden_layers="2"), [CONFIG, "num_hidden_layers"]),
    "dtype a number": (edit_config(dtype=3), [CONFIG, "transformers cannot use it"]),
    "architectures a number": (edit_config(architectures=3), [CONFIG, "architectures", "3"]),
    "another architecture": (edit_config(architectures=["NoSuchModel"]), [CONFIG, "NoSuchModel", "pass model_class"]),
    "deep": (
        lambda d: (d / CONFIG).write_text(
            (d / CONFIG).read_text().rstrip()[:-1] + ', "x": ' + nested(sys.getrecursionlimit() // 2) + "}"
        ),
        [CONFIG, "recursion"],
    ),
    "generation settings cut": (lambda d: os.truncate(d / GENERATION, 9), [GENERATION, "JSON"]),
    "generation settings a folder": (lambda d: ((d / GENERATION).unlink(), (d / GENERATION).mkdir()), [GENERATION]),
    "another table": (
        edit_tensors(lambda t: t.update({UP + "weight.quant_map": torch.linspace(-1, 1, 16)})),
        [WEIGHTS, UP + "weight.quant_map", "nf4"],
    ),
    "a state of no kind": (
        edit_tensors(lambda t: t.update({UP + "weight.quant_state.x": torch.ones(1)})),
        [WEIGHTS, UP + "weight.quant_state.x", "belongs to no 4-bit weight"],
    ),
    "no weights": (lambda d: (d / WEIGHTS).unlink(), [WEIGHTS, "found"]),
    "weights empty": (lambda d: (d / WEIGHTS).write_bytes(b""), [WEIGHTS, "empty"]),
    "weights cut": (lambda d: os.truncate(d / WEIGHTS, (d / WEIGHTS).stat().st_size - 7), [WEIGHTS, "cut"]),
    "weights a pickle": (lambda d: (d / WEIGHTS).write_bytes(b"\x80\x04" + b"a" * 30), [WEIGHTS, "pickle"]),
    "weights dense": (lambda d: save_file({"a": torch.ones(1)}, d / WEIGHTS), ["no quantized weight"]),
    "no absmax": (edit_tensors(lambda t: t.pop(UP + "weight.absmax")), [WEIGHTS, UP + "weight.absmax", "missing"]),
    "no state": (edit_tensors(lambda t: t.pop(UP + "weight.quant_state.bitsandbytes__nf4")), [UP, "missing"]),
    "no codes": (edit_tensors(lambda t: t.pop(UP + "weight")), [UP + "weight", "missing"]),
    "no layer": (
        edit_tensors(lambda t: [t.pop(k) for k in list(t) if k.startswith(UP + "weight")]),
        [UP + "weight", "1 tensors are missing"],
    ),
    "no norm": (edit_tensors(lambda t: t.pop("model.norm.weight")), ["model.norm.weight", "missing"]),
    "no bias": (
        edit_tensors(lambda t: t.pop("model.layers.0.self_attn.q_proj.bias")),
        ["model.layers.0.self_attn.q_proj.bias", "missing"],
    ),
    "norm of another size": (
        edit_tensors(lambda t: t.update({"model.norm.weight": torch.ones(63, dtype=torch.bfloat16)})),
        ["model.norm.weight", "[63]", "[64]"],
    ),
    "dense where quantized int": (
        edit_tensors(lambda t: t.update({"lm_head.weight": torch.ones(128, 64, dtype=torch.uint8)})),
        ["lm_head.weight", "uint8"],
    ),
    "quantized norm": (
        edit_tensors(lambda t: t.update({"model.norm.weight.absmax": torch.ones(1)})),
        ["model.norm.weight", "LlamaRMSNorm"],
    ),
    "quantized nowhere": (
        edit_tensors(lambda t: t.update({"model.layers.7.x.weight.absmax": torch.ones(1)})),
        ["model.layers.7.x.weight", "has no"],
    ),
    "another model": (edit_config(intermediate_size=64), ["model.layers.0.mlp.", "[64, 128]", "[64, 64]"]),
    "index cut": (index("{"), [INDEX, "JSON"]),
    "index without a map": (index({"metadata": {}}), [INDEX, "weight_map"]),
    "index of numbers": (index({"weight_map": {"a": 1}}), [INDEX, "weight_map"]),
    "index out of the folder": (index({"weight_map": {"a": "../" + SHARD}}), [INDEX, "beside it", "../"]),
    "index of pickles": (index({"weight_map": {"a": "model.bin"}}), [INDEX, "beside it", "model.bin"]),
    "index of nothing": (index({"weight_map": {"a": "model-2.safetensors"}}), ["model-2.safetensors", "found"]),
    "index of another tensor": (index({"weight_map": {"a": SHARD}}), [INDEX, "'a'", "is not"]),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_checkpoints_are_refused_by_name(good, tmp_path, name):
    """Catches a damaged checkpoint that loads, and an error that does not say which file and tensor."""
    for file in good.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    damage, words = DAMAGE[name]
    damage(tmp_path)
    with pytest.raises(QuantizedFileError) as caught:
        load_quantized(tmp_path)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_unknown_names_are_told_and_unknown_options_refused(good, tmp_path):
    """Catches a tensor that is left out, or an option ignored, without a word."""
    for file in good.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    edit_tensors(lambda t: t.update(other=torch.ones(1)))(tmp_path)
    with pytest.warns(UserWarning, match="no place in the model for 'other'"):
        load_quantized(tmp_path)
    nan = torch.full((64,), float("nan"), dtype=torch.bfloat16)
    edit_tensors(lambda t: t.update({"model.norm.weight": nan}))(tmp_path)
    with pytest.warns(UserWarning, match=r"model\.safetensors: NaN or Inf in 'model\.norm\.weight'"):
        load_quantized(tmp_path)
    with pytest.raises(TypeError, match="unknown option 'device_map'"):
        load_quantized(tmp_path, device_map="auto")
    edit_config(architectures=["NoSuchModel"])(tmp_path)
    with pytest.raises(ValueError, match="NoSuchModel.*; pass model_class"):
        load_quantized(tmp_path)


def test_without_bitsandbytes(good):
    """Catches an import of bitsandbytes on the way, ours or one that transformers makes for a model so marked."""
    code = f"""
        import sys, warnings
        sys.modules["bitsandbytes"] = None
        import torch, peftkern
        from tiny_models import ids
        model = peftkern.load_quantized({str(good)!r})
        logits = model(ids()).logits
        print(logits.float().sum().item())
        assert model.num_parameters() > 90_000
        warnings.simplefilter("ignore")
        peftkern.prepare_model_for_kbit_training(model)
        model.train()
        embeds = model.get_input_embeddings()(ids()).requires_grad_()
        model(inputs_embeds=embeds).logits.sum().backward()
        assert embeds.grad.isfinite().all()
        peftkern.save_quantized(model.eval(), {str(good.parent / "again")!r})
        dense = peftkern.quantize_model(model.__class__(model.config), {{"load_in_8bit": True}}, progress=False)
        assert dense.is_loaded_in_8bit
    """
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "tests")))}
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=env, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    expected = load_quantized(good)(ids()).logits.float().sum().item()
    assert float(run.stdout.splitlines()[0]) == expected
