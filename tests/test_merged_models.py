"""A whole model after adapters were merged into its quantized layers: it runs, casts, saves and loads as what it is."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import peftkern
from peftkern import LoraConfig, get_peft_model
from peftkern.ops import dequantize
from peftkern.utils.quantized_modules import weight_of

transformers = pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")

FORMATS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
MARKS = ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Llama of float16, as many checkpoints are."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=128, **sizes)
    folder = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).half().save_pretrained(folder)
    return folder


def quantized(folder, how, kind, dtype):
    settings = transformers.BitsAndBytesConfig(**FORMATS[kind])
    auto = transformers.AutoModelForCausalLM
    if how == "bitsandbytes":
        return auto.from_pretrained(folder, dtype=dtype, quantization_config=settings, device_map="cpu")
    return peftkern.quantize_model(auto.from_pretrained(folder, dtype=dtype), settings, progress=False)


def adapted(base, target_modules="all-linear"):
    """With adapters that do something."""
    torch.manual_seed(1)
    options = {"r": 4, "target_modules": target_modules, "task_type": "CAUSAL_LM", "init_lora_weights": False}
    return get_peft_model(base, LoraConfig(**options)).eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=torch.arange(24).view(2, 12)).logits


def apart(got, expected):
    return ((got.float() - expected.float()).norm() / expected.float().norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("how", ["bitsandbytes", "peftkern"])
def test_a_merged_model_runs_in_its_own_dtype(folder, how, kind, dtype):
    """Catches dense layers in the dtype of a checkpoint (or of bitsandbytes' int8, always float16) beside activations
    in the model's, which stops at the first product."""
    model = adapted(quantized(folder, how, kind, dtype))
    expected = logits(model)
    merged = model.merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {dtype}
    got = logits(merged)
    assert got.dtype == expected.dtype
    # Rounded to 16 bits where the model, or bitsandbytes' int8, is in 16 bits; each weight once or twice.
    assert apart(got, expected) < (0.05 if dtype == torch.bfloat16 else 5e-3)


def test_a_float16_checkpoint_in_a_bfloat16_model(folder, tmp_path):
    """Catches the same where the file says what it was quantized from, and the model is loaded in another dtype."""
    peftkern.save_quantized(quantized(folder, "peftkern", "nf4", torch.float16), tmp_path)
    model = adapted(peftkern.load_quantized(tmp_path, dtype=torch.bfloat16))
    expected = logits(model)
    merged = model.merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert apart(logits(merged), expected) < 0.05


def test_a_model_of_two_dtypes_runs_without_autocast(folder):
    """Catches a merged layer that refuses float32 activations, which the norms of a prepared model hand it."""
    base = quantized(folder, "peftkern", "nf4", torch.bfloat16)
    with pytest.warns(UserWarning, match="embeddings and lm_head stay in 16 bits"):
        base = peftkern.prepare_model_for_kbit_training(base)
    model = adapted(base)
    expected = logits(model)
    merged = model.merge_and_unload()
    assert merged.model.norm.weight.dtype == torch.float32
    assert apart(logits(merged), expected) < 0.05
    with torch.autocast("cpu", torch.bfloat16):
        assert apart(logits(merged), expected) < 0.05


@pytest.mark.parametrize("how", ["bitsandbytes", "peftkern"])
def test_a_merged_model_is_saved_as_the_dense_one_that_it_is(folder, tmp_path, how):
    """Catches a checkpoint of dense weights whose config.json says bitsandbytes: it loads, and as nonsense."""
    merged = adapted(quantized(folder, how, "nf4", torch.float32)).merge_and_unload()
    assert not any(getattr(merged, mark, False) for mark in MARKS)
    assert getattr(merged, "hf_quantizer", None) is None and not hasattr(merged, "quantization_method")
    assert merged.num_parameters() == sum(p.numel() for p in merged.parameters())
    merged.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(merged))
    assert merged.to(torch.bfloat16).dtype == torch.bfloat16, "which transformers refuses to a quantized model"


@pytest.mark.parametrize("how", ["bitsandbytes", "peftkern"])
def test_a_model_that_is_merged_in_part_says_which_layers_are_dense(folder, tmp_path, how):
    """Catches merged layers that are read as quantized ones, with or without bitsandbytes."""
    merged = adapted(quantized(folder, how, "nf4", torch.float32), ["q_proj", "down_proj"]).merge_and_unload()
    assert merged.is_quantized and merged.is_loaded_in_4bit
    peftkern.save_quantized(merged, tmp_path)
    for loaded in (peftkern.load_quantized(tmp_path), transformers.AutoModelForCausalLM.from_pretrained(tmp_path)):
        for name, module in merged.named_modules():
            weight, other = weight_of(module), loaded.get_submodule(name)
            if weight is not None:
                assert torch.equal(dequantize(weight), dequantize(weight_of(other)))
            elif isinstance(module, nn.Linear):
                assert type(other) is nn.Linear and torch.equal(module.weight, other.weight)


def test_a_requantized_model_stays_marked(folder, tmp_path):
    """Catches marks that go although every layer is in 4 bits still."""
    model = adapted(quantized(folder, "bitsandbytes", "nf4", torch.float32))
    with pytest.warns(UserWarning, match="requantiz"):
        merged = model.merge_and_unload(requantize=True)
    assert merged.is_quantized and merged.is_loaded_in_4bit
    peftkern.save_quantized(merged, tmp_path)
    assert torch.equal(logits(peftkern.load_quantized(tmp_path)), logits(merged))


def test_taking_out_what_was_not_merged_changes_nothing(folder):
    """Catches marks or dtypes corrected on a model whose layers came back as they were."""
    base = quantized(folder, "peftkern", "nf4", torch.bfloat16)
    expected, said = logits(base), base.config.quantization_config
    plain = adapted(base).unload()
    assert plain is base and plain.is_quantized and plain.config.quantization_config is said
    assert torch.equal(logits(plain), expected)
