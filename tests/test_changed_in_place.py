"""Models that change a layer's output in place, as they may with `nn.Linear`: OLMo clips q, k and v, DeBERTa and
wav2vec2 write into projections or views of them."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn

import peftkern
from peftkern import nn as layers
from peftkern.ops import plan as plans
from peftkern.utils.quantized_modules import Linear4bit, Linear8bit
from tiny_models import VOCAB, ids, randomize, tiny_llama

K, N = 64, 24


def linear(kind):
    """A layer [K] -> [N] of this kind."""
    base = nn.Linear(K, N)
    if kind == "lora":
        return layers.LoraLinear.from_linear(base, r=3)
    if kind == "nf4":
        return layers.LoraLinear.from_linear(Linear4bit.from_linear(base), r=3)
    if kind == "int8":
        return layers.LoraLinear.from_linear(Linear8bit.from_linear(base), r=3)
    if kind == "quantized alone":
        return Linear4bit.from_linear(base)
    return layers.IA3Linear.from_linear(base, is_feedforward=kind == "ia3 feed-forward")


def results(module, x, clip, several=False):
    """Each output after `clip`, and the gradients of x and of everything that learns."""
    x = x.detach().clone()
    if x.is_floating_point():
        x.requires_grad_()
    module.zero_grad()
    found = [clip(y) for y in (module(x) if several else [module(x)])]
    sum((y * (i + 1)).square().sum() for i, y in enumerate(found)).backward()
    learned = [p.grad for p in module.parameters() if p.requires_grad]
    return [y.detach() for y in found] + learned + ([x.grad] if x.is_floating_point() else [])


def assert_may_change(module, x, several=False):
    """What is clipped in place has the values and gradients of what is clipped into a tensor of its own."""
    apart = results(module, x, lambda y: y.clamp(-0.1, 0.2), several)
    in_place = results(module, x, lambda y: y.clamp_(-0.1, 0.2), several)
    part = results(module, x, lambda y: y.transpose(0, -1).clamp_(-0.1, 0.2).transpose(0, -1), several)
    for want, *got in zip(apart, in_place, part, strict=True):
        assert all(torch.equal(each, want) for each in got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, K), (2, 5, K), (K,), (2, 0, K)])
@pytest.mark.parametrize("kind", ["lora", "nf4", "int8", "quantized alone", "ia3", "ia3 feed-forward"])
def test_a_layer(kind, shape, dtype):
    """Would catch an output that is a view made inside the autograd function, which torch refuses to change."""
    torch.manual_seed(0)
    module = linear(kind).to(dtype)
    randomize(module, ("lora_", "ia3_"))
    assert_may_change(module, torch.randn(shape).to(dtype))


def test_a_compiled_layer():
    """Would catch an operator whose output a compiled graph may not write into."""
    torch.manual_seed(0)
    module = linear("lora")
    randomize(module)
    x = torch.randn(2, 5, K)
    want = results(module, x, lambda y: y.clamp(-0.1, 0.2))
    step = torch.compile(lambda v: module(v).clamp_(-0.1, 0.2), backend="aot_eager", fullgraph=True)
    x = x.requires_grad_()
    module.zero_grad()
    y = step(x)
    y.square().sum().backward()
    got = [y.detach(), *(p.grad for p in module.parameters() if p.requires_grad), x.grad]
    torch.testing.assert_close(got, want)


def test_an_embedding():
    """Would catch the same of an embedding's adapter (BERT adds positions to its in place)."""
    base = nn.Module()
    base.emb = nn.Embedding(16, 8)
    base.forward = lambda rows: base.emb(rows)
    model = peftkern.get_peft_model(base, peftkern.LoraConfig(r=2, target_modules=["emb"]))
    randomize(model)
    assert_may_change(model, torch.arange(12).view(3, 4))


@pytest.mark.parametrize("shape", [(5, K), (2, 5, K)])
def test_layers_that_are_computed_together(shape, monkeypatch):
    """Would catch q that cannot be clipped because k and v came with it, and k that changes when q does."""
    module = importlib.import_module("peftkern.tuners.lora.shared_input")
    monkeypatch.setattr(module, "JOINED_ELEMENTS", 0)
    monkeypatch.setattr(plans, "JOINED_ELEMENTS", 0)
    torch.manual_seed(0)
    made = nn.ModuleList([layers.LoraLinear(K, n, r=3) for n in (8, 16, 24)])
    randomize(made)
    layers.share_input(*made)
    made.forward = lambda x: [layer(x) for layer in made]
    assert_may_change(made, torch.randn(shape), several=True)


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_a_batch_of_many_adapters(method):
    """Would catch the same where each row has an adapter of its own."""
    target = ["q_proj"]
    config = (
        peftkern.LoraConfig(r=2, target_modules=target)
        if method == "lora"
        else peftkern.IA3Config(target_modules=target, feedforward_modules=[])
    )
    model = peftkern.get_peft_model(tiny_llama(num_hidden_layers=1), config, adapter_name="one")
    model.add_adapter("two", config)
    randomize(model, ("lora_", "ia3_"))
    model.set_requires_grad(["one", "two"])
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")

    def gradients(clip):
        model.zero_grad()
        handle = layer.register_forward_hook(lambda _, __, y: clip(y))
        model(ids(3), adapter_names=["two", "__base__", "one"]).logits.square().sum().backward()
        handle.remove()
        return [p.grad for p in model.parameters() if p.requires_grad]

    for want, got in zip(gradients(lambda y: y.clamp(-1, 1)), gradients(lambda y: y.clamp_(-1, 1)), strict=True):
        assert torch.equal(want, got)


def test_olmo_clips_its_projections():
    """Would catch OLMo's own models (clip_qkv=8.0) failing in their first training step."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=VOCAB)
    base = transformers.OlmoForCausalLM(transformers.OlmoConfig(clip_qkv=0.05, pad_token_id=0, **sizes))
    model = peftkern.get_peft_model(base, peftkern.LoraConfig(r=2, target_modules="all-linear"))
    randomize(model)
    x = ids()
    model(input_ids=x, labels=x).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
