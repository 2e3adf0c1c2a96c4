"""LoftQ's start of an adapter: the formula, PEFT beside it, layers, configuration and files."""

from __future__ import annotations

import copy
import importlib.util
import json

import pytest
import torch
from torch import nn

from loftq_data import LOFTQ, adapted, linear, on_cpu, peft_loftq, product, weight
from peftkern import LoftQConfig, LoraConfig, PeftModel, get_peft_model
from peftkern.ops import dequantize, quantize_4bit, quantize_8bit
from peftkern.tuners.lora.base_weight import low_rank_factors
from peftkern.tuners.lora.loftq import loftq, rounded_to_bits
from peftkern.utils.quantized_modules import Linear4bit, weight_of
from tiny_models import mlp

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


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
    with pytest.raises(ValueError, match="matrix: expected finite"):
        low_rank_factors(bad, 4)


# --- beside PEFT -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("iterations", [1, 3])
def test_float32_agrees_with_peft(bits, iterations):
    """Would catch another split of turns than PEFT's, another sign, or another quantizer."""
    w = weight(128, 192)
    w = w.half().float() if bits == 8 else w  # PEFT's 8 bits start from float16
    Q, A, B = loftq(w, 8, bits, iterations)
    theirs, lora_A, lora_B = on_cpu(peft_loftq().loftq_init)(w, bits, 8, iterations)
    if iterations == 1 and bits == 4:
        assert torch.equal(Q, theirs)
    # In later turns an element that lies between two codes may fall to the other side.
    step = (w - Q).abs().max()
    moved = (Q - theirs).abs() > 1e-6 * w.abs().max()
    assert moved.float().mean() <= (0 if iterations == 1 else 1e-3) and (Q - theirs).abs().max() <= 3 * step
    assert (B @ A - lora_B @ lora_A).norm() < (1e-4 if iterations == 1 else 3e-2) * (B @ A).norm()


def test_below_float32_it_is_nearer_than_peft():
    """Would catch an adapter that is fitted to a weight which the layer does not hold."""
    w = weight(128, 192, torch.bfloat16)
    Q, A, B = loftq(w, 8, 4, 1)
    theirs, lora_A, lora_B = on_cpu(peft_loftq().loftq_init)(w, 4, 8, 1)
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
