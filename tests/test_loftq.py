"""LoftQ: the formula, PEFT beside it, files, and the replacement of adapters over weights in 4 bits."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import json
import types

import pytest
import torch
from torch import nn

import peftkern
from peftkern import LoftQConfig, LoraConfig, PeftModel, get_peft_model, replace_lora_weights_loftq
from peftkern.ops import dequantize, quantize_4bit, quantize_8bit
from peftkern.tuners.lora.loftq import loftq, low_rank_factors, rounded_to_bits
from peftkern.utils.quantized_modules import Linear4bit, weight_of
from tiny_models import mlp, tiny_llama

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LOFTQ = {"init_lora_weights": "loftq", "loftq_config": LoftQConfig()}


def weight(n=96, k=160, dtype=torch.float32, seed=0):
    """A matrix with outliers and a few strong directions, as trained weights have."""
    g = torch.Generator().manual_seed(seed)
    w = 0.02 * torch.randn(n, k, generator=g) * torch.exp(0.3 * torch.randn(n, 1, generator=g))
    w += 0.01 * torch.randn(n, 3, generator=g) @ torch.randn(3, k, generator=g)
    return w.to(dtype)


def linear(n=96, k=160, dtype=torch.float32, seed=0):
    made = nn.Linear(k, n, dtype=dtype)
    made.weight = nn.Parameter(weight(n, k, dtype, seed))
    return made


def adapted(base, **options):
    """The layer of a model of one layer, under LoftQ unless `options` say otherwise."""
    model = get_peft_model(nn.ModuleDict({"up": base}), LoraConfig(target_modules=["up"], **(LOFTQ | options)))
    return model, model.base_model.model["up"]


def product(layer, adapter="default"):
    return (layer.lora_B[adapter].weight @ layer.lora_A[adapter].weight).detach()


# --- the formula -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_residual_is_below_plain_quantization_and_falls_with_iterations(dtype, bits):
    """Would catch an adapter with the wrong sign, one that is fitted to another Q than the one returned, and turns that
    forget the last adapter."""
    w = weight(dtype=dtype)
    plain = (w.float() - rounded_to_bits(w, bits).float()).norm()
    errors = [plain]
    for t in range(1, 4):
        Q, A, B = loftq(w, 16, bits, t)
        assert Q.dtype == dtype and A.dtype == B.dtype == torch.float32
        errors.append((w.double() - Q.double() - B.double() @ A.double()).norm())
    assert errors[1] < 0.9 * plain
    # Against 16-bit rounding the residual of 8 bits is small: only then may later turns stand still.
    falling = [later < sooner for sooner, later in zip(errors[1:], errors[2:], strict=False)]
    assert all(falling) if bits == 4 else errors[3] <= 1.001 * errors[1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(96, 160), (33, 70), (1, 65), (5, 1)])
def test_q_is_that_of_the_quantizer_bit_for_bit(dtype, shape):
    """Would catch double quantization, another block size, or rounding twice, also in later turns."""
    w = weight(*shape, dtype=dtype)
    Q, A, B = loftq(w, 4, 4, 1)
    assert torch.equal(Q, dequantize(quantize_4bit(w, "nf4", 64, double_quant=False)))
    Q2, _, _ = loftq(w, 4, 4, 2)
    target = (w.float() - B @ A).to(dtype)
    assert torch.equal(Q2, dequantize(quantize_4bit(target, "nf4", 64, double_quant=False)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("iterations", [1, 3])
def test_saved_base_quantizes_to_itself(dtype, iterations):
    """Would catch a Q that the quantized model does not hold, so that adapters would make up for another error."""
    Q, _, _ = loftq(weight(dtype=dtype), 8, 4, iterations)
    again = quantize_4bit(Q, "nf4", 64, double_quant=False)
    assert Q.dtype == dtype and torch.equal(dequantize(again), Q)


def test_eight_bits_are_those_of_the_layer():
    """Would catch a Q of 8 bits that Linear8bitLt would not hold, and an overflow of its float16."""
    w = weight(dtype=torch.float16)
    assert torch.equal(loftq(w, 4, 8, 1)[0], dequantize(quantize_8bit(w)))
    large = 1e6 * weight()
    assert large.half().isinf().any()
    assert torch.equal(loftq(large, 4, 8, 1)[0], dequantize(quantize_8bit(large)))


@pytest.mark.parametrize("shape", [(40, 70), (70, 40), (3, 50)])
@pytest.mark.parametrize("r", [1, 7, 64])
def test_factors_are_the_nearest_of_their_rank(shape, r):
    """Would catch vectors beside the leading ones, and roots in the wrong place: B A is compared with fp64, and the two
    factors share the singular values evenly."""
    residual = weight(*shape)
    A, B = low_rank_factors(residual, r)
    k = min(r, *shape)
    assert A.shape == (k, shape[1]) and B.shape == (shape[0], k)
    S = torch.linalg.svdvals(residual.double())
    error = (residual.double() - B.double() @ A.double()).square().sum()
    # Eckart and Young: the tail of the singular values, and no rank-k matrix is nearer.
    tail = S[k:].square().sum()
    rounding = max(shape) * torch.finfo(torch.float32).eps * S.square().sum()
    assert abs(error - tail) <= rounding
    torch.testing.assert_close((A.double() @ A.double().T).diagonal(), S[:k], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close((B.double().T @ B.double()).diagonal(), S[:k], rtol=1e-4, atol=1e-6)


def test_signs_do_not_hang_on_the_library():
    """Would catch factors that flip with the library's choice: those of the negative are negative on one side alone."""
    residual = weight(30, 50)
    A, B = low_rank_factors(residual, 5)
    assert (B.gather(0, B.abs().argmax(0, keepdim=True)) > 0).all()
    flipped_A, flipped_B = low_rank_factors(-residual, 5)
    torch.testing.assert_close(flipped_A, -A, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(flipped_B, B, rtol=1e-3, atol=1e-5)
    assert all(map(torch.equal, low_rank_factors(residual, 5), (A, B)))


def test_bad_arguments_are_refused_by_name():
    """Would catch numbers of no format, and NaN that a decomposition would spread."""
    with pytest.raises(ValueError, match="bits: expected 4 or 8, got 2"):
        loftq(weight(), 4, 2)
    bad = weight()
    bad[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"w: expected finite numbers, got nan at \[3, 4\]"):
        loftq(bad, 4)
    with pytest.raises(ValueError, match="residual: expected finite"):
        low_rank_factors(bad, 4)


# --- beside PEFT -----------------------------------------------------------------------------------------------------


def on_cpu(function):
    """PEFT's function, which computes on "cuda" whatever there is, with that one constant changed to "cpu"."""
    inner = inspect.unwrap(function)
    constants = tuple("cpu" if c == "cuda" else c for c in inner.__code__.co_consts)
    assert constants != inner.__code__.co_consts
    made = types.FunctionType(
        inner.__code__.replace(co_consts=constants), inner.__globals__, argdefs=inner.__defaults__
    )
    return torch.no_grad()(made)


@pytest.fixture
def loftq_utils():
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft")
    return importlib.import_module("peft.utils.loftq_utils")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("iterations", [1, 3])
def test_float32_agrees_with_peft(loftq_utils, bits, iterations):
    """Would catch another split of turns than PEFT's, another sign, or another quantizer."""
    w = weight(128, 192)
    w = w.half().float() if bits == 8 else w  # PEFT's 8 bits start from float16
    Q, A, B = loftq(w, 8, bits, iterations)
    theirs, lora_A, lora_B = on_cpu(loftq_utils.loftq_init)(w, bits, 8, iterations)
    if iterations == 1 and bits == 4:
        assert torch.equal(Q, theirs)
    # In later turns an element that lies between two codes may fall to the other side.
    step = (w - Q).abs().max()
    moved = (Q - theirs).abs() > 1e-6 * w.abs().max()
    assert moved.float().mean() <= (0 if iterations == 1 else 1e-3) and (Q - theirs).abs().max() <= 3 * step
    assert (B @ A - lora_B @ lora_A).norm() < (1e-4 if iterations == 1 else 3e-2) * (B @ A).norm()


def test_below_float32_it_is_nearer_than_peft(loftq_utils):
    """Would catch an adapter that is fitted to a weight which the layer does not hold."""
    w = weight(128, 192, torch.bfloat16)
    Q, A, B = loftq(w, 8, 4, 1)
    theirs, lora_A, lora_B = on_cpu(loftq_utils.loftq_init)(w, 4, 8, 1)
    assert torch.equal(Q, theirs)
    error = (w.double() - Q.double() - B.double() @ A.double()).norm()
    assert error < (w.double() - Q.double() - lora_B.double() @ lora_A.double()).norm()
    # Not closer: the singular values of such a residual lie close together, so that rounding turns their vectors.
    assert (B @ A - lora_B @ lora_A).norm() < 0.1 * (B @ A).norm()


# --- layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_is_the_formula(dtype):
    """Would catch a base weight that stayed, and an adapter on another Q."""
    base = linear(dtype=dtype)
    before = base.weight
    kept = before.detach().clone()
    Q, A, B = loftq(kept, 8, 4, 2)
    _, layer = adapted(base, loftq_config=LoftQConfig(loftq_iter=2))
    assert torch.equal(layer.weight, Q) and layer.weight.dtype == dtype
    assert not layer.weight.requires_grad
    assert torch.equal(before, kept), "the old parameter was written to"
    rounded = A.to(dtype).float(), B.to(dtype).float()  # as every adapter over such a base starts
    assert torch.equal(layer.lora_A["default"].weight, rounded[0])
    assert torch.equal(layer.lora_B["default"].weight, rounded[1])
    x = torch.randn(4, 160, dtype=dtype)
    want = x.double() @ (Q.double() + rounded[1].double() @ rounded[0].double()).T + base.bias.double()
    eps, eps32 = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    magnitude = x.double().abs() @ (Q.double().abs() + rounded[1].double().abs() @ rounded[0].double().abs()).T
    # One rounding of y, one of the adapter's S and of its 16-bit factors, and 160 + 8 terms in float32.
    bound = eps * want.abs() + (2 * eps + 168 * eps32) * magnitude
    assert ((layer(x).double() - want).abs() <= bound).all()
    y = x.double() @ kept.double().T + base.bias.double()
    assert (layer(x).double() - y).norm() < (x.double() @ (kept.double() - Q.double()).T).norm()


def test_conv1d_is_turned():
    """Would catch PEFT's fault: it decomposes the stored [in, out], whose factors have the other layout."""
    conv1d = pytest.importorskip("transformers").pytorch_utils.Conv1D(96, 160)
    conv1d.weight = nn.Parameter(weight().T.contiguous())
    Q, A, B = loftq(weight(), 8)
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        _, layer = adapted(conv1d)
    assert torch.equal(layer.get_base_layer().weight, Q.T) and layer.get_base_layer().weight.is_contiguous()
    torch.testing.assert_close(product(layer), B @ A)


def test_a_weight_on_the_grid_starts_as_usual_and_trains():
    """Would catch A and B both zero, which have no gradient for ever."""
    base = linear()
    base.weight = nn.Parameter(rounded_to_bits(base.weight.detach(), 4))
    torch.manual_seed(3)
    _, layer = adapted(base)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert not B.any() and (A != 0).all()
    torch.manual_seed(3)
    _, usual = adapted(linear(), init_lora_weights=True, loftq_config={})
    assert A.detach().std().item() == pytest.approx(usual.lora_A["default"].weight.std().item(), rel=0.1)
    layer(torch.randn(3, 160)).square().sum().backward()
    assert B.grad.any()


def test_rank_above_the_sizes():
    """Would catch PEFT's adapters of another rank than r."""
    _, layer = adapted(linear(5, 70), r=12, lora_alpha=12)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert A.shape == (12, 70) and B.shape == (5, 12)
    assert (A[5:] != 0).all() and not B[:, 5:].any()
    torch.testing.assert_close(layer.weight + B @ A, weight(5, 70), rtol=1e-5, atol=1e-6)


def test_it_repeats():
    """Would catch anything drawn at random, or unlike draws for the adapters after it."""
    layers = []
    for _ in range(2):
        torch.manual_seed(1)
        layers.append((*(p.detach() for p in adapted(linear())[1].parameters()), torch.rand(1)))
    assert all(map(torch.equal, *layers))


@pytest.mark.parametrize("kind", ["peftkern", "bitsandbytes"])
def test_a_quantized_base_is_refused_with_the_way_out(kind):
    """Would catch PEFT's result: the packed bytes taken as numbers."""
    base: nn.Module = Linear4bit.from_linear(linear())
    if kind == "bitsandbytes":
        bnb = pytest.importorskip("bitsandbytes")
        base = bnb.nn.Linear4bit(160, 96, quant_type="nf4")
        base.load_state_dict(linear().state_dict())
        base.to("cpu")
    model = nn.ModuleDict({"up": base})
    with pytest.raises(ValueError, match=r"Linear4bit holds a quantized one.*peftkern\.replace_lora_weights_loftq"):
        get_peft_model(model, LoraConfig(target_modules=["up"], **LOFTQ))
    assert model["up"] is base


def test_what_cannot_be_replaced_is_refused():
    """Would catch an embedding half adapted, a merged adapter made part of Q, and weights without values."""
    with pytest.raises(ValueError, match="got an embedding"):
        get_peft_model(mlp(), LoraConfig(target_modules=["emb"], **LOFTQ))
    with pytest.raises(ValueError, match="on the meta device"):
        adapted(nn.Linear(8, 8, device="meta"))
    parametrized = nn.utils.parametrizations.orthogonal(nn.Linear(8, 8))
    with pytest.raises(TypeError, match="parametrized"):
        adapted(parametrized)
    model, layer = adapted(linear())
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"unmerge \['default'\] first"):
        model.add_adapter("second", LoraConfig(target_modules=["up"], **LOFTQ))
    assert set(layer.lora_A) == {"default"}


def test_an_error_leaves_the_whole_model_as_it_was():
    """Would catch weights written to in place: the first layers are done when a later one fails."""
    model = mlp()
    with torch.no_grad():
        model.down.weight[0, 0] = float("inf")
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="finite"):
        get_peft_model(model, LoraConfig(target_modules=["up", "down"], **LOFTQ))
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is p and torch.equal(p, value) for name, (p, value) in before.items())


def test_a_second_adapter_is_told_of():
    """Would catch the first adapter's base changed without a word; where it stays, nothing is said."""
    model, layer = adapted(linear(), init_lora_weights=True, loftq_config={})
    with pytest.warns(UserWarning, match=r"LoftQ changes the base weight, which the adapters \['default'\]"):
        model.add_adapter("second", LoraConfig(target_modules=["up"], **LOFTQ))
    assert product(layer, "second").any()


@pytest.mark.parametrize("options, way", [({"lora_alpha": 16}, "to r$"), ({"use_rslora": True}, r"to sqrt\(r\)")])
def test_a_scaling_other_than_one_is_told_of(options, way):
    """Would catch the trap of PEFT's default recipe: with a scaling of 2 nothing is gained over plain quantization."""
    with pytest.warns(UserWarning, match=f"scaling is 1, got 2.*{way}|scaling is 1, got 2.82843.*{way}"):
        _, layer = adapted(linear(), **options)
    torch.testing.assert_close(product(layer), (lambda q, a, b: b @ a)(*loftq(weight(), 8)))


# --- configuration and files -----------------------------------------------------------------------------------------


@pytest.fixture
def peft_config(monkeypatch):
    """PEFT's LoraConfig; it asks for scipy, which LoftQ no longer uses."""
    peft = pytest.importorskip("peft")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: object() if name == "scipy" else find(name, *a))
    return peft.LoraConfig


@pytest.mark.parametrize("given", [LoftQConfig(), LoftQConfig(8, 5), {"loftq_bits": 4, "loftq_iter": 2}])
def test_config_goes_both_ways(peft_config, tmp_path, given):
    """Would catch a file that PEFT reads as something else, and the other way round."""
    ours = LoraConfig(init_lora_weights="loftq", loftq_config=given)
    theirs = peft_config(init_lora_weights="loftq", loftq_config=copy.copy(given))
    assert ours.to_json_dict() == json.loads(json.dumps(theirs.to_dict()))
    ours.save_pretrained(tmp_path)
    assert LoraConfig.from_pretrained(tmp_path) == ours
    assert peft_config.from_pretrained(str(tmp_path)) == theirs
    # The caller's own dict or object is not kept.
    given_dict = given if isinstance(given, dict) else vars(given)
    assert ours.loftq_config == given_dict and ours.loftq_config is not given_dict


@pytest.mark.parametrize(
    "settings, error, match",
    [
        (None, ValueError, "needs loftq_config"),
        ({}, ValueError, "needs loftq_config"),
        (4, TypeError, "loftq_config must be"),
        (LoftQConfig(2), ValueError, "loftq_bits must be 4 .* or 8 .*, got 2"),
        ({"loftq_bits": 4.0}, TypeError, "loftq_bits"),
        ({"loftq_iter": 0}, ValueError, "loftq_iter must be an int of at least 1"),
        ({"loftq_iter": True}, TypeError, "loftq_iter"),
        ({"bits": 4}, ValueError, r"loftq_config must have no fields but .*\['bits'\]"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, error, match):
    """Would catch PEFT's KeyError, or settings that are first looked at in the middle of a model."""
    with pytest.raises(error, match=match):
        LoraConfig(init_lora_weights="loftq", loftq_config=settings)


def test_settings_without_their_initialization_are_left_out_aloud(peft_config):
    """Would catch an ignored request, and a file unlike PEFT's."""
    with pytest.warns(UserWarning, match="loftq_config=.* has no effect with init_lora_weights=True"):
        ours = LoraConfig(loftq_config=LoftQConfig())
    with pytest.warns(UserWarning):
        theirs = peft_config(loftq_config=LoftQConfig())
    assert ours.loftq_config == theirs.loftq_config == {}
    with pytest.raises(ValueError, match="init_lora_weights must be"):
        LoraConfig(init_lora_weights="LoftQ")
    with pytest.raises(ValueError, match="lora_bias"):
        LoraConfig(lora_bias=True, **LOFTQ)


def trained_and_saved(folder):
    model, layer = adapted(linear())
    with torch.no_grad():
        layer.lora_B["default"].weight.add_(0.01)
    model.save_pretrained(folder)
    return layer


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("start", ["the original", "the saved base"])
def test_a_saved_adapter_finds_its_base_again(tmp_path, start, low_cpu_mem_usage):
    """Would catch an adapter loaded onto the original weight, where it does not belong, or a base quantized twice."""
    layer = trained_and_saved(tmp_path)
    base = linear()
    base.bias = layer.get_base_layer().bias
    if start == "the saved base":
        base.weight = nn.Parameter(layer.weight.detach().clone())
    loaded = PeftModel.from_pretrained(nn.ModuleDict({"up": base}), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    again = loaded.base_model.model["up"]
    assert torch.equal(again.weight, layer.weight)
    x = torch.randn(3, 160)
    assert torch.equal(again(x), layer(x))


def test_a_saved_adapter_goes_onto_the_quantized_base(tmp_path):
    """Would catch the usual end of LoftQ, base saved and loaded in 4 bits, shut off; and an unclear refusal."""
    layer = trained_and_saved(tmp_path)
    base = linear()
    base.weight, base.bias = nn.Parameter(layer.weight.detach().clone()), layer.get_base_layer().bias
    quantized = nn.ModuleDict({"up": Linear4bit.from_linear(base, double_quant=False)})
    with pytest.raises(ValueError, match="to load a saved adapter: pass its config with init_lora_weights=True"):
        PeftModel.from_pretrained(quantized, tmp_path)
    config = LoraConfig.from_pretrained(tmp_path)
    config.init_lora_weights = True
    x = torch.randn(3, 160)
    for options in ({"config": config}, {"low_cpu_mem_usage": True}):
        again = PeftModel.from_pretrained(copy.deepcopy(quantized), tmp_path, **options).base_model.model["up"]
        assert torch.equal(dequantize(weight_of(again.get_base_layer())), layer.weight)
        torch.testing.assert_close(again(x), layer(x))


# --- over weights in 4 bits ------------------------------------------------------------------------------------------


def saved_llama(folder, intermediate_size=96, **options):
    """A Llama in 16 bits, saved; its down projection has 96 columns, so that blocks of 64 straddle rows."""
    model = tiny_llama(intermediate_size=intermediate_size).to(torch.bfloat16)
    model.save_pretrained(folder, **options)
    return model


def quantized_llama(folder, double_quant=True, r=8, **config):
    transformers = pytest.importorskip("transformers")
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": double_quant}
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    peftkern.quantize_model(base, settings | {"bnb_4bit_compute_dtype": "bfloat16"}, progress=False)
    return get_peft_model(base, LoraConfig(r=r, lora_alpha=r, target_modules="all-linear", **config))


def layers_of(model):
    return {name: m for name, m in model.get_base_model().named_modules() if hasattr(m, "lora_A")}


def factors(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def unchanged(model, before):
    return all(torch.equal(p, before[name]) for name, p in model.named_parameters() if "lora_" in name)


@pytest.mark.parametrize("double_quant, files", [(False, "one"), (True, "several")])
def test_replacement_is_the_formula_on_every_layer(tmp_path, double_quant, files):
    """Would catch a layer left out, another layer's original, scales that are not the layer's own, and a residual that
    is no smaller."""
    dense = saved_llama(tmp_path, **({} if files == "one" else {"max_shard_size": "20KB"}))
    assert (tmp_path / "model.safetensors").exists() == (files == "one")
    model = quantized_llama(tmp_path, double_quant)
    stored = {name: weight_of(layer.get_base_layer()).packed.clone() for name, layer in layers_of(model).items()}
    path = tmp_path / "model.safetensors" if double_quant else tmp_path
    replace_lora_weights_loftq(model, path)
    assert len(layers_of(model)) == 14
    for name, layer in layers_of(model).items():
        W = dense.get_submodule(name).weight.detach().float()
        Q = dequantize(weight_of(layer.get_base_layer()), torch.bfloat16).float()
        A, B = low_rank_factors(W - Q, 8)
        torch.testing.assert_close(product(layer), B @ A)
        assert (W - Q - product(layer)).norm() < 0.95 * (W - Q).norm()
        assert torch.equal(weight_of(layer.get_base_layer()).packed, stored[name])
        assert layer.lora_A["default"].weight.requires_grad


def test_replacement_brings_the_output_nearer(tmp_path):
    """Would catch an adapter whose error adds to the quantization's."""
    dense, model = saved_llama(tmp_path), quantized_llama(tmp_path, r=32)
    ids = torch.randint(128, (4, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        truth = dense(ids).logits.float()
        before = (model(ids).logits.float() - truth).norm()
        replace_lora_weights_loftq(model)  # the model says what it was loaded from
        after = (model(ids).logits.float() - truth).norm()
    assert after < 0.8 * before


def test_replacement_agrees_with_peft(loftq_utils, tmp_path, monkeypatch):
    """Would catch other factors than PEFT's on the same layers of bitsandbytes, read by either's own way."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    # In 128: bitsandbytes' own dequantization is wrong on some CPUs where blocks straddle rows.
    saved_llama(tmp_path, intermediate_size=128)
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings, device_map="cpu")
    monkeypatch.setattr(loftq_utils, "_loftq_init_new", on_cpu(loftq_utils._loftq_init_new))
    products, names = [], []
    for library in (peft, peftkern):
        model = library.get_peft_model(
            copy.deepcopy(base), library.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
        )
        called: list[str] = []
        for _ in range(2):  # the second time everything is refused
            library.replace_lora_weights_loftq(
                model, str(tmp_path), callback=lambda m, name, called=called: called.append(name) or len(called) <= 14
            )
        names.append(called)
        products.append({name: product(layer) for name, layer in layers_of(model).items()})
    assert names[0] == names[1] and len(names[0]) == 28
    assert products[0].keys() == products[1].keys()
    for name, theirs in products[0].items():
        assert (products[1][name] - theirs).norm() < 1e-3 * theirs.norm(), name


def test_callback_decides_layer_by_layer(tmp_path):
    """Would catch a refusal that takes back too much or too little, and a name that is not the layer's."""
    saved_llama(tmp_path)
    model = quantized_llama(tmp_path)
    before, seen = factors(model), []

    def keep_mlp(given, name):
        assert given is model and not torch.is_grad_enabled()
        layer = model.get_base_model().get_submodule(name)
        assert layer.lora_B["default"].weight.any(), "called before the change"
        seen.append(name)
        return "mlp" in name

    replace_lora_weights_loftq(model, tmp_path, callback=keep_mlp)
    assert seen == list(layers_of(model))
    changed = {name for name, value in factors(model).items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "mlp" in name}


def test_an_error_in_the_callback_takes_everything_back(tmp_path):
    """Would catch a model of which half is replaced."""
    saved_llama(tmp_path)
    model = quantized_llama(tmp_path)
    before, calls = factors(model), []

    def fail_late(_, name):
        calls.append(name)
        return len(calls) < 5 or 1 / 0

    with pytest.raises(ZeroDivisionError):
        replace_lora_weights_loftq(model, tmp_path, callback=fail_late)
    assert len(calls) == 5 and unchanged(model, before)


def damaged(state, how):
    """A state dict with one wrong entry, and what the error says of it."""
    key = "model.layers.1.mlp.up_proj.weight"
    if how == "missing":
        del state[key]
        return rf"'{key}': the original weight is missing; found 'model.layers.0.mlp.up_proj.weight'"
    if how == "shape":
        state[key] = state[key].T.contiguous()
        return rf"'{key}': expected shape \[96, 64\], got \[64, 96\]"
    if how == "quantized":
        state[key] = state[key].to(torch.int8)
        return rf"'{key}': expected the original weight in one of .*, got I8"
    if how == "nan":
        state[key][3, 3] = float("nan")
        return rf"'{key}': NaN or Inf"
    state[key] = state["model.layers.0.mlp.up_proj.weight"].clone()
    return rf"'{key}': it is not what model.layers.1.mlp.up_proj was quantized from"


@pytest.mark.parametrize("how", ["missing", "shape", "quantized", "nan", "another"])
def test_a_wrong_checkpoint_is_refused_by_name_and_nothing_is_changed(tmp_path, how):
    """Would catch factors of a wrong weight, which nothing would show but a worse model; and a change halfway."""
    save_file = importlib.import_module("safetensors.torch").save_file
    dense = saved_llama(tmp_path / "right")
    model = quantized_llama(tmp_path / "right")
    before, calls = factors(model), []
    state = {name: t.clone() for name, t in dense.state_dict().items()}
    match = damaged(state, how)
    (tmp_path / "wrong").mkdir()
    save_file(state, tmp_path / "wrong" / "model.safetensors")
    with pytest.raises(peftkern.QuantizedFileError, match=match):
        replace_lora_weights_loftq(model, tmp_path / "wrong", callback=lambda _, name: calls.append(name) or True)
    assert unchanged(model, before)
    # Names, shapes and dtypes are looked at first; values when their turn comes.
    assert bool(calls) == (how in ("nan", "another"))


def test_names_with_and_without_the_prefix_of_the_model(tmp_path):
    """Would catch a checkpoint refused that was saved without its head, or with one more."""
    dense = saved_llama(tmp_path / "whole")
    dense.model.save_pretrained(tmp_path / "body")
    model = quantized_llama(tmp_path / "whole")
    replace_lora_weights_loftq(model, tmp_path / "whole")
    want = factors(model)
    body = tiny_llama(cls="LlamaModel")
    body.load_state_dict(dense.model.state_dict())
    peftkern.quantize_model(
        body.to(torch.bfloat16),
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        | {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16"},
        progress=False,
    )
    inner = get_peft_model(body, LoraConfig(r=8, lora_alpha=8, target_modules="all-linear"))
    for given, folder in ((model, "body"), (inner, "whole")):
        replace_lora_weights_loftq(given, tmp_path / folder)
        got = factors(given)
        assert len(got) == len(want) == 28
        for name, value in want.items():
            name = name if given is model else name.replace(".model.model.", ".model.")
            assert torch.equal(got[name], value)


def test_what_cannot_be_done_is_refused(tmp_path):
    """Would catch a silent return where nothing was replaced."""
    saved_llama(tmp_path)
    model = quantized_llama(tmp_path)
    before = factors(model)
    with pytest.raises(TypeError, match="peft_model: expected a PeftModel, got LlamaForCausalLM"):
        replace_lora_weights_loftq(model.get_base_model(), tmp_path)
    with pytest.raises(ValueError, match=r"no adapter 'other'; there are \['default'\]"):
        replace_lora_weights_loftq(model, tmp_path, "other")
    with pytest.raises(ValueError, match="on no layer with a 4-bit weight"):
        replace_lora_weights_loftq(adapted(linear())[0], tmp_path)
    with pytest.raises(ValueError, match="expected model.safetensors or model.safetensors.index.json here"):
        (tmp_path / "empty").mkdir()
        replace_lora_weights_loftq(model, tmp_path / "empty")
    with pytest.raises(ValueError, match="model_path: expected a folder or a Hub id"):
        bare = nn.ModuleDict({"up": Linear4bit.from_linear(linear())})
        replace_lora_weights_loftq(get_peft_model(bare, LoraConfig(target_modules=["up"])))
    assert unchanged(model, before)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"adapters are merged into model.layers.0.*unmerge them first"):
        replace_lora_weights_loftq(model, tmp_path)


def test_a_turned_conv1d_finds_its_original(tmp_path):
    """Would catch transformers' way with GPT-2: its [in, out] is turned before it is quantized, which a square weight
    does not show."""
    save_file = importlib.import_module("safetensors.torch").save_file
    made = Linear4bit.from_linear(linear(64, 64))
    made.source_cls = type("Conv1D", (), {})
    model = get_peft_model(nn.ModuleDict({"up": made}), LoraConfig(target_modules=["up"]))
    save_file({"up.weight": weight(64, 64).T.contiguous()}, tmp_path / "model.safetensors")
    replace_lora_weights_loftq(model, tmp_path)
    A, B = low_rank_factors(weight(64, 64) - dequantize(weight_of(made), torch.float32), 8)
    torch.testing.assert_close(product(model.base_model.model["up"]), B @ A)
