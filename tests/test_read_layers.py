"""Layers whose weight a model of transformers reads without calling them: told of, and never quantized."""

from __future__ import annotations

import importlib
import inspect
import re
import warnings

import pytest
import torch
from torch import nn

import peftkern
from peftkern.ops import dequantize
from peftkern.utils.quantized_modules import weight_of
from peftkern.utils.read_layers import CAST_TO, UNCALLED, is_uncalled, needs_dense
from tiny_models import ids, mlp, randomize

transformers = pytest.importorskip("transformers")

BITS4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize("where", sorted({**UNCALLED, **CAST_TO}), ids=lambda where: ".".join(where).rpartition("_")[2])
def test_the_tables_are_those_of_transformers(where):
    """Would catch a class that transformers renamed, or that reads its layers no longer."""
    module, name = where
    source = inspect.getsource(getattr(importlib.import_module(module), name))
    for child in UNCALLED.get(where, ()):
        assert re.search(rf"self\.{child} = nn\.Linear\(", source) and f"self.{child}.weight" in source
    for child in CAST_TO.get(where, ()):
        assert re.search(rf"self\.{child} = nn\.Linear\(", source) and re.search(
            rf"\.to\((dtype=)?self\.{child}\.weight\.dtype", source
        )


def mamba():
    """A Mamba of one layer."""
    sizes = dict(hidden_size=16, num_hidden_layers=1, vocab_size=128, state_size=4, time_step_rank=4, expand=2)
    torch.manual_seed(0)
    return transformers.MambaForCausalLM(transformers.MambaConfig(**sizes)).eval()


def switch():
    """A Switch Transformer of one layer on each side, its experts dense ones."""
    sizes = dict(d_model=64, d_kv=16, d_ff=64, num_layers=1, num_decoder_layers=1, num_heads=2, vocab_size=128)
    config = transformers.SwitchTransformersConfig(num_experts=2, num_sparse_encoder_layers=0, **sizes)
    config.num_sparse_decoder_layers, config.decoder_sparse_step, config.encoder_sparse_step = 0, 0, 0
    torch.manual_seed(0)
    return transformers.SwitchTransformersForConditionalGeneration(config).eval()


def test_an_adapter_that_is_never_called_is_told_of():
    """Would catch an adapter that trains nothing in silence; PEFT's files may hold one, so that it is no error."""
    model = mamba()
    assert [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and is_uncalled(model, n)] == [
        "backbone.layers.0.mixer.dt_proj"
    ]
    with pytest.warns(UserWarning, match=r"'backbone\.layers\.0\.mixer\.dt_proj'.*have no effect"):
        adapted = peftkern.get_peft_model(model, peftkern.LoraConfig(r=2, target_modules=["dt_proj", "x_proj"]))
    randomize(adapted)
    adapted.train()(ids()).logits.sum().backward()
    learn = {n.split(".")[-4]: p.grad is not None for n, p in adapted.named_parameters() if "lora_B" in n}
    assert learn == {"dt_proj": False, "x_proj": True}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peftkern.get_peft_model(mamba(), peftkern.LoraConfig(target_modules=["x_proj"]))
        peftkern.get_peft_model(mlp(), peftkern.LoraConfig(target_modules=["up"]))


@pytest.mark.parametrize("make, child", [(mamba, "dt_proj"), (switch, "wo")])
def test_such_layers_are_not_quantized(make, child):
    """Would catch a quantized Mamba that multiplies by packed bytes, and a Switch that casts hidden states to uint8."""
    dense, inputs = make(), {"input_ids": ids()}
    if make is switch:
        inputs["decoder_input_ids"] = ids()
    kept = [n for n, m in dense.named_modules() if isinstance(m, nn.Linear) and needs_dense(dense, n)]
    assert kept and {n.rpartition(".")[2] for n in kept} == {child}
    with pytest.warns(UserWarning, match=rf"whose weight the model reads by itself stay dense: '.*{child}'"):
        model = peftkern.quantize_model(make(), BITS4)
    rounded = {n: weight_of(m) for n, m in model.named_modules() if weight_of(m) is not None}
    assert rounded and not set(rounded) & set(kept)
    for name, weight in rounded.items():
        dense.get_submodule(name).weight.data = dequantize(weight, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, dense(**inputs).logits)
