"""DoRA in LoRA's layers beside real PEFT's: initial values, outputs, gradients, merging, quantized weights."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_pairs import BASES, IN, OUT, Holder, assert_close, conv1d, inputs, pair, run
from numerics import padded_randn
from peftkern.helpers import DoraCaching
from peftkern.nn import LoraEmbedding, LoraLinear
from peftkern.ops import dequantize
from peftkern.tuners.lora import Linear, LoraConfig, LoraModel, dora
from peftkern.tuners.lora.dora import keeps_norms
from peftkern.utils.quantized_modules import Linear4bit, Linear8bit, weight_of
from tiny_models import randomize

peft = pytest.importorskip("peft")

EPS = torch.finfo(torch.float32).eps
MANY = ("default", "second")


def doras(base, names=("default",), **arguments):
    """A pair of models with DoRA adapters, whose magnitudes are near the norms and not at them."""
    ours, theirs = pair(base, names, use_dora=True, **arguments)
    generator = torch.Generator().manual_seed(8)
    for name in names:
        held = [model.model.layer.lora_magnitude_vector[name].weight for model in (ours, theirs)]
        value = 0.5 + torch.rand(held[0].shape, generator=generator)
        for parameter in held:
            parameter.data.copy_(value)
    return ours, theirs


def one_plain_one_dora(base, order, **arguments):
    """Adapters "plain" (LoRA) and "dora" on equal layers, added and active in this order."""
    models = []
    for tuner, make in ((LoraModel, LoraConfig), (peft.LoraModel, peft.LoraConfig)):
        configs = {
            name: make(target_modules=["layer"], r=3, use_dora=name == "dora", **arguments)
            for name in ("plain", "dora")
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = tuner(Holder(copy.deepcopy(base)), configs[order[0]], order[0])
            model.peft_config[order[1]] = configs[order[1]]
            model.inject_adapter(model.model, order[1])
        model.set_adapter(list(order))
        randomize(model, ("lora_",))
        models.append(model)
    return models


def truth(layer, name="default"):
    """V's rows scaled to the magnitude, in float64, stored as the base weight is; and the scale of each row."""
    weight = layer.get_base_layer().weight.detach().double()
    delta = layer.get_delta_weight(name).detach().double()
    by_rows = getattr(layer, "fan_in_fan_out", True)
    scale = layer.lora_magnitude_vector[name].weight.detach().double() / (weight + delta).norm(dim=0 if by_rows else 1)
    return (weight + delta) * (scale if by_rows else scale[:, None])


# -- initial values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", [True, False, "gaussian"])
@pytest.mark.parametrize("kind", BASES)
def test_initial_values_and_names_are_those_of_peft(kind, init):
    """Catches a magnitude made before A and B are, of the wrong axis, or under another name or place in the order."""
    ours, theirs = pair(BASES[kind](), MANY, values=None, init_lora_weights=init, r=5, use_dora=True)
    mine, other = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(other) and "model.layer.lora_magnitude_vector.second.weight" in mine
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    for name, value in other.items():
        if "magnitude" in name:
            torch.testing.assert_close(mine[name], value, rtol=4 * EPS, atol=0)
        else:
            assert torch.equal(mine[name], value)
    layer = ours.model.layer
    x = inputs(layer.get_base_layer())
    if init is not False:
        # Where B A is zero, c is one.
        torch.testing.assert_close(ours(x), layer.get_base_layer()(x), rtol=8 * EPS, atol=8 * EPS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_initial_dtypes_are_those_of_peft(dtype):
    """Catches a magnitude that is not widened with A and B, or not born in the base's dtype."""
    ours, theirs = pair(nn.Linear(IN, OUT).to(dtype), values=None, use_dora=True)
    for wide in (False, True):
        for model in (ours, theirs):
            model._cast_adapter_dtype("default", wide)
        mine, other = ours.state_dict(), theirs.state_dict()
        assert {k: v.dtype for k, v in mine.items()} == {k: v.dtype for k, v in other.items()}
        name = "model.layer.lora_magnitude_vector.default.weight"
        torch.testing.assert_close(mine[name], other[name], rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_an_adapter_made_anew_without_dora_loses_its_magnitude():
    """Catches a magnitude that outlives its adapter, and a deleted adapter that leaves it."""
    ours, _ = doras(nn.Linear(IN, OUT), MANY)
    layer = ours.model.layer
    layer.update_layer("default", 4, 8, LoraConfig())
    assert list(layer.lora_magnitude_vector) == ["second"] and layer.use_dora == {"default": False, "second": True}
    layer.delete_adapter("second")
    assert not layer.lora_magnitude_vector and layer.use_dora == {"default": False}
    assert layer.explain_row().fused


def test_a_new_magnitude_is_of_the_weight_without_what_is_merged():
    """Catches the norm of a weight that has another adapter in it."""
    ours, _ = doras(nn.Linear(IN, OUT))
    layer = ours.model.layer
    want = layer.weight.detach().norm(dim=1)
    layer.merge()
    layer.update_layer("late", 4, 8, LoraConfig(use_dora=True))
    torch.testing.assert_close(layer.lora_magnitude_vector["late"].weight.detach(), want, rtol=1e-5, atol=0)


# -- forward and backward ------------------------------------------------------------------------------------------

VARIANTS = {"plain": {}, "rslora": {"use_rslora": True, "r": 6}, "alpha": {"lora_alpha": 31, "r": 3}}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("names", [("default",), MANY], ids=len)
@pytest.mark.parametrize("kind", BASES)
def test_output_and_gradients_are_those_of_peft(kind, names, variant):
    """Catches a scale on the bias, a gradient through the norm, adapters that do not act one after another."""
    base = BASES[kind]()
    ours, theirs = doras(base, names, **VARIANTS[variant])
    row = ours.model.layer.explain_row("layer")
    assert row.fused == (len(names) == 1 or kind == "embedding"), row.reason
    assert_close(run(ours, inputs(base)), run(theirs, inputs(base)), 8 * EPS)


@pytest.mark.parametrize("order", [("plain", "dora"), ("dora", "plain")])
@pytest.mark.parametrize("kind", BASES)
def test_beside_a_plain_adapter_the_order_counts_as_in_peft(kind, order):
    """Catches a plain adapter added last or first whatever the order, and a merge in another order than forward's."""
    base = BASES[kind]()
    ours, theirs = one_plain_one_dora(base, order)
    assert_close(run(ours, inputs(base)), run(theirs, inputs(base)), 8 * EPS)
    x = inputs(base).detach()
    want, before = ours(x).detach(), ours.model.layer.weight.detach().clone()
    ours.merge_adapter()
    theirs.merge_adapter()
    torch.testing.assert_close(ours(x), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.model.layer.weight, theirs.model.layer.weight, rtol=1e-5, atol=1e-6)
    ours.unmerge_adapter()
    torch.testing.assert_close(ours.model.layer.weight, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wide", [True, False], ids=["masters", "narrow"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", BASES)
def test_low_precision_keeps_dtypes_and_stays_near_the_truth(kind, dtype, wide):
    """Catches a widened output, a gradient in the wrong dtype, and an error beyond PEFT's own plus a few roundings."""
    base = BASES[kind]().to(dtype)
    ours, theirs = doras(base)
    for model in (ours, theirs):
        model._cast_adapter_dtype("default", wide)
    x = inputs(base, dtype)
    exact = run(copy.deepcopy(theirs).double(), x.double() if x.is_floating_point() else x)
    mine, other = run(ours, x), run(theirs, x)
    assert {k: v.dtype for k, v in mine.items()} == {k: v.dtype for k, v in other.items()}
    for name, want in exact.items():
        allowed = (other[name].double() - want).abs().max() + 4 * torch.finfo(dtype).eps * want.abs().max()
        assert (mine[name].double() - want).abs().max() <= allowed, name


def test_autocast_is_that_of_peft():
    """Catches an output that is not in autocast's dtype, as the layers after it expect."""
    base = nn.Linear(IN, OUT)
    ours, theirs = doras(base)
    with torch.autocast("cpu", torch.bfloat16):
        mine, other = run(ours, inputs(base)), run(theirs, inputs(base))
    assert mine["y"].dtype == torch.bfloat16
    for name, want in other.items():
        bound = 4 * torch.finfo(torch.bfloat16).eps * want.abs().max()
        assert (mine[name].float() - want.float()).abs().max() <= bound, name


def test_awkward_inputs():
    """Catches a dependence on contiguous rows, and an empty or one-dimensional input that fails."""
    ours, theirs = doras(nn.Linear(IN, OUT))
    x = padded_randn(7, IN, pad=3, dtype=torch.float32)
    for given in (x, x[:0], x[0], x.unsqueeze(0).expand(3, 7, IN)):
        # PEFT gives a vector's output a second dimension.
        torch.testing.assert_close(ours(given), theirs(given).view(*given.shape[:-1], OUT), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changed", ["set_scale", "scale_layer", "assigned"])
@pytest.mark.parametrize("kind", BASES)
def test_a_changed_scaling_turns_the_rows_and_leaves_their_lengths(kind, changed):
    """Catches a norm that is kept from before, or a scaling that scales the magnitude."""
    base = BASES[kind]()
    ours, theirs = doras(base)
    for model in (ours, theirs):
        layer = model.model.layer
        if changed == "set_scale":
            layer.set_scale("default", 0.3)
        elif changed == "scale_layer" and kind != "embedding":  # which PEFT leaves out
            layer.scale_layer(2.5)
        else:
            layer.scaling["default"] = 0.0
    assert_close(run(ours, inputs(base)), run(theirs, inputs(base)), 8 * EPS)
    ours.model.layer.merge()
    merged = ours.model.layer.weight.detach()
    by_rows = merged.norm(dim=1 if kind in ("linear", "no_bias") else 0)
    torch.testing.assert_close(by_rows, ours.model.layer.lora_magnitude_vector["default"].weight.detach())


def test_rows_that_are_zero_stay_zero_and_finite():
    """Catches PEFT's division of zero by zero, which makes NaN of an output that was pruned, and of all gradients."""
    base = nn.Linear(IN, OUT)
    base.weight.data[[2, 5]] = 0
    layer = LoraLinear.from_linear(base, use_dora=True)
    x = torch.randn(4, IN, requires_grad=True)
    for fused in (True, False):
        handle = None if fused else base.register_forward_hook(lambda *_: None)
        y = layer(x)
        assert layer.explain_row().fused == fused
        torch.testing.assert_close(y, base(x))
        gradients = torch.autograd.grad(y.square().sum(), [p for p in layer.parameters() if p.requires_grad] + [x])
        assert all(g.isfinite().all() for g in gradients)
        if handle is not None:
            handle.remove()
    before = base.weight.detach().clone()
    layer.merge()
    torch.testing.assert_close(base.weight, before)
    layer.unmerge()
    torch.testing.assert_close(base.weight, before)


# -- dropout -------------------------------------------------------------------------------------------------------


def test_dropout_is_on_what_the_scale_adds_and_on_the_adapter():
    """Catches dropout of all that the base adds, another rate, a missing 1 / (1 - p), and dropout in eval mode."""
    layer = LoraLinear(IN, IN, lora_dropout=0.25, bias=False, use_dora=True)
    layer.base_layer.weight.data.copy_(torch.eye(IN))
    layer.lora_magnitude_vector["default"].weight.data.fill_(3.0)
    x = torch.ones(2000, IN)
    added = (layer(x) - x).detach()  # (c - 1) x'
    kept = added.abs() > 0.5
    torch.testing.assert_close(added[kept], torch.full_like(added[kept], 2 / 0.75))
    assert added[~kept].abs().max() < 1e-5
    assert abs((~kept).float().mean().item() - 0.25) < 5 * (0.25 * 0.75 / x.numel()) ** 0.5
    torch.testing.assert_close(layer.eval()(x), 3 * x)


@pytest.mark.parametrize("order", [("dora",), ("plain", "dora"), ("dora", "plain")], ids=str)
@pytest.mark.parametrize("kind", ["linear", "no_bias", "conv1d"])
def test_called_as_it_is_the_layer_drops_what_peft_drops(kind, order):
    """Catches, on the plain path, the base product of x in place of x', and masks drawn in another order."""
    base = BASES[kind]()
    names = order if len(order) == 2 else ("dora", "plain")
    models = one_plain_one_dora(base, names, lora_dropout=0.4)
    results = []
    for model in models:
        model.set_adapter(list(order))
        model.model.layer.get_base_layer().register_forward_hook(lambda *_: None)
        torch.manual_seed(11)
        results.append(run(model.train(), inputs(base)))
    assert not models[0].model.layer.explain_row().fused
    assert_close(*results, 8 * EPS)


# -- when it is not one operation ----------------------------------------------------------------------------------


def test_what_is_called_as_it_is_says_why_and_computes_the_same():
    """Catches a hook, a parametrization or a dtype that the one operation would pass over."""
    hooked, theirs = doras(nn.Linear(IN, OUT))
    hooked.model.layer.lora_magnitude_vector["default"].register_forward_hook(lambda *_: None)
    assert "'default': it has hooks" in hooked.model.layer.explain_row().reason
    ways = [(hooked, theirs)]
    hooked, theirs = doras(nn.Linear(IN, OUT))
    for model in (hooked, theirs):
        model.model.layer.lora_A["default"].register_forward_hook(lambda *_: None)
    ways.append((hooked, theirs))
    parametrized, theirs = doras(nn.utils.parametrizations.weight_norm(nn.Linear(IN, OUT)))
    assert "parametrized" in parametrized.model.layer.explain_row().reason
    ways.append((parametrized, theirs))
    for ours, theirs in ways:
        assert ours.model.layer.plan(8).path == "unfused"
        assert_close(run(ours, inputs(nn.Linear(1, 1))), run(theirs, inputs(nn.Linear(1, 1))), 8 * EPS)
    ours, _ = doras(nn.Linear(IN, OUT).bfloat16())
    ours.model.layer.lora_magnitude_vector["default"].half()
    assert "magnitude of torch.float16 beside" in ours.model.layer.explain_row().reason
    assert ours(inputs(nn.Linear(1, 1), torch.bfloat16)).dtype == torch.bfloat16


def test_several_adapters_say_why_they_are_not_one_operation():
    """Catches a slow path without a word."""
    ours, _ = doras(nn.Linear(IN, OUT), MANY)
    plan = ours.model.layer.plan(8)
    assert plan.path == "unfused" and "one after another" in plan.reason
    ours.set_adapter("second")
    assert ours.model.layer.plan(8).path != "unfused"


def test_a_weight_that_is_elsewhere_is_refused_by_name():
    """Catches norms of a weight that an offload hook has taken away."""
    ours, _ = doras(nn.Linear(IN, OUT))
    base = ours.model.layer.get_base_layer()
    base.weight = nn.Parameter(base.weight.to("meta"))
    with pytest.raises(ValueError, match="use_dora=True needs the weight .* meta device"):
        Linear._add_plain(ours.model.layer, torch.zeros(2, OUT), torch.zeros(2, IN), ["default"])


# -- merging -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("safe_merge", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", BASES)
def test_the_merged_weight_is_rounded_once_and_comes_out_again(kind, dtype, safe_merge):
    """Catches a scale along the wrong axis, a second rounding, a new storage that tied weights do not see, and an
    unmerging that forgets the scale."""
    ours, _ = doras(BASES[kind]().to(dtype))
    ours._cast_adapter_dtype("default", True)
    layer = ours.model.layer
    want, before, storage = truth(layer), layer.weight.detach().clone(), layer.weight.data_ptr()
    ours.merge_adapter(safe_merge=safe_merge)
    bound = torch.finfo(dtype).eps / 2 * want.abs() + 16 * EPS * (1 + want.abs())
    assert ((layer.weight.detach().double() - want).abs() <= bound).all()
    assert layer.weight.data_ptr() == storage and layer.merged_adapters == ["default"]
    ours.unmerge_adapter()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(layer.weight, before, rtol=2 * eps, atol=8 * eps)
    assert not layer._merged_scales


@pytest.mark.parametrize("safe_merge", [True, False])
@pytest.mark.parametrize("kind", BASES)
def test_adapters_merged_in_turn_are_those_of_peft(kind, safe_merge):
    """Catches a second norm of a weight that has the first adapter in it."""
    base = BASES[kind]()
    ours, theirs = doras(base, MANY)
    x = inputs(base).detach()
    want, before = ours(x).detach(), ours.model.layer.weight.detach().clone()
    for model in (ours, theirs):
        for name in MANY:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model.model.layer.merge(safe_merge=safe_merge, adapter_names=[name])
    torch.testing.assert_close(ours.model.layer.weight, theirs.model.layer.weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours(x), want, rtol=1e-4, atol=1e-5)
    ours.model.layer.unmerge()
    torch.testing.assert_close(ours.model.layer.weight, before, rtol=1e-4, atol=1e-5)


def test_a_merge_that_is_not_finite_leaves_everything_alone():
    """Catches a magnitude of NaN that a safe merge lets through."""
    ours, _ = doras(nn.Linear(IN, OUT))
    layer = ours.model.layer
    layer.lora_magnitude_vector["default"].weight.data[1] = float("nan")
    before = layer.weight.detach().clone()
    with pytest.raises(ValueError, match="not finite"):
        ours.merge_adapter(safe_merge=True)
    assert torch.equal(layer.weight, before) and not layer.merged


def test_a_magnitude_of_zero_merges_and_says_that_it_cannot_come_out():
    """Catches a base weight of NaN after unmerging."""
    ours, _ = doras(nn.Linear(IN, OUT))
    layer = ours.model.layer
    layer.lora_magnitude_vector["default"].weight.data[1] = 0
    ours.merge_adapter()
    assert layer.weight.isfinite().all() and not layer.weight[1].any()
    with pytest.raises(ValueError, match="'default' .* magnitude was 0 in 1 rows"):
        ours.unmerge_adapter()


# -- quantized weights ---------------------------------------------------------------------------------------------


def quantized(kind):
    torch.manual_seed(0)
    dense = nn.Linear(128, 80)
    if kind == "4-bit":
        return Linear4bit.from_linear(dense, compute_dtype=torch.float32)
    if kind == "8-bit":
        return Linear8bit.from_linear(dense)
    bnb = pytest.importorskip("bitsandbytes")
    if kind == "bitsandbytes 4-bit":
        made = bnb.nn.Linear4bit(128, 80, True, torch.float32, True, "nf4")
    else:
        made = bnb.nn.Linear8bitLt(128, 80, True, has_fp16_weights=False)
    made.load_state_dict(dense.state_dict())
    return made.to("cpu")


KINDS = ["4-bit", "8-bit", "bitsandbytes 4-bit", "bitsandbytes 8-bit"]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_layer_is_the_dense_one_of_its_values(kind, dropout):
    """Catches a norm of codes, a layer called as it is, and a magnitude of the weight before quantizing."""
    base = quantized(kind)
    layer = LoraLinear.from_linear(base, r=4, lora_dropout=dropout, use_dora=True)
    dense = nn.Linear(128, 80)
    dense.weight.data.copy_(dequantize(weight_of(base), torch.float32))
    dense.bias.data.copy_(base.bias)
    twin = LoraLinear.from_linear(dense, r=4, lora_dropout=dropout, use_dora=True)
    values = layer.lora_magnitude_vector["default"].weight.detach()
    torch.testing.assert_close(values, dense.weight.norm(dim=1), rtol=4 * EPS, atol=0)
    results = []
    for each in (layer, twin):
        randomize(each, ("lora_A", "lora_B"))
        assert each.explain_row().fused
        torch.manual_seed(5)
        results.append(run(each, torch.randn(3, 128, generator=torch.Generator().manual_seed(1))))
    assert_close(*results, 8 * EPS)


@pytest.mark.parametrize("requantize", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_merging_into_a_quantized_layer(kind, requantize):
    """Catches a scale left out of the dense copy, of one from a weight that is merged already, and a base that does
    not come back to the bit."""
    base = quantized(kind)
    model = nn.ModuleDict({"layer": base})
    tuned = LoraModel(model, LoraConfig(target_modules=["layer"], use_dora=True, r=4), "default")
    tuned.peft_config["second"] = LoraConfig(target_modules=["layer"], use_dora=True, r=3)
    tuned.inject_adapter(model, "second")
    tuned.set_adapter(["default", "second"])
    randomize(tuned, ("lora_A", "lora_B"))
    layer = model["layer"]
    x = torch.randn(4, 128)
    want = layer(x).detach()
    before = [t.clone() for t in weight_of(base).tensors() if t is not None]
    for names in (["default"], ["second"]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            layer.merge(safe_merge=True, adapter_names=names, requantize=requantize)
    if requantize:
        assert weight_of(layer.get_base_layer()) is not None
        assert (layer(x) - want).norm() < 0.2 * want.norm()
    else:  # rounded to what was quantized: float16 where bitsandbytes takes 8 bits from it
        eps = torch.finfo(layer.get_base_layer().weight.dtype).eps
        assert (layer(x) - want).norm() <= max(eps, 64 * EPS) * want.norm()
    layer.unmerge()
    assert layer.get_base_layer() is base
    after = [t for t in weight_of(base).tensors() if t is not None]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_over_four_bits_it_is_peft_s_layer():
    """Catches another meaning over a quantized weight than PEFT's, whose layer dequantizes as bitsandbytes does."""
    bnb = pytest.importorskip("bitsandbytes")
    dense = nn.Linear(128, 80)
    models = []
    for tuner, make in ((LoraModel, LoraConfig), (peft.LoraModel, peft.LoraConfig)):
        base = bnb.nn.Linear4bit(128, 80, True, torch.float32, True, "nf4")
        base.load_state_dict(dense.state_dict())
        torch.manual_seed(1)
        holder = Holder(base.to("cpu"))
        holder.is_loaded_in_4bit = True
        models.append(tuner(holder, make(target_modules=["layer"], use_dora=True, init_lora_weights=False), "default"))
    names = [n for n, _ in models[0].named_parameters() if "lora_" in n]
    assert names == [n for n, _ in models[1].named_parameters() if "lora_" in n]
    for name in names:
        a, b = (model.get_parameter(name) for model in models)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    x = torch.randn(2, 3, 128)
    assert_close(run(models[0], x), run(models[1], x), 64 * EPS)


# -- norms that are kept ----------------------------------------------------------------------------------------------


@pytest.fixture
def count_norms(monkeypatch):
    """How often a layer's kept norms were made."""
    made = []

    def counted(*args):
        made.append(args)
        return weight_norm(*args)

    weight_norm = dora.weight_norm
    monkeypatch.setattr(dora, "weight_norm", counted)
    return made


@pytest.mark.parametrize("kind", ["dense", "4-bit"])
def test_kept_norms_are_those_of_the_layer_as_it_is(count_norms, kind):
    """Catches norms of a weight, an adapter or a scaling that are others by now, and norms that are made again."""
    base = nn.Linear(128, 80) if kind == "dense" else quantized(kind)
    layer = LoraLinear.from_linear(base, r=4, use_dora=True, init_lora_weights=False).eval()
    twin = copy.deepcopy(layer)
    x = torch.randn(3, 128)
    A, B = layer.lora_A["default"], layer.lora_B["default"]

    def other_weight():
        state = {name: value + 0.1 if value.is_floating_point() else value for name, value in base.state_dict().items()}
        base.load_state_dict(state)

    changes = [
        lambda: None,
        lambda: A.weight.add_(0.1),
        lambda: B.load_state_dict({"weight": B.weight * 2}),
        lambda: layer.set_scale("default", 3.0),
        lambda: setattr(A, "weight", nn.Parameter(A.weight * 0.5)),
        *([other_weight] if kind == "dense" else []),
    ]
    count_norms.clear()
    with torch.no_grad(), DoraCaching():
        for i, change in enumerate(changes):
            change()
            first, again = layer(x), layer(x)
            assert len(count_norms) == i + 1 and torch.equal(first, again)
            twin.load_state_dict(layer.state_dict())
            twin.scaling = dict(layer.scaling)
            with DoraCaching(False):
                torch.testing.assert_close(first, twin(x), rtol=1e-5, atol=1e-6)
        assert "norms given" in layer.plan(4).reason or kind == "dense"
    assert not keeps_norms.get()


def test_norms_are_kept_only_where_nothing_learns(count_norms, monkeypatch):
    """Catches kept norms in training, with gradients, after the block, of inference tensors, in copies, and in a CUDA
    graph, which makes them when it is replayed and not when it is captured."""
    layer = LoraLinear(IN, OUT, use_dora=True, init_lora_weights=False)
    x = torch.randn(3, IN)
    count_norms.clear()
    DoraCaching()(True)
    try:
        layer(x)
        with torch.no_grad():
            layer(x)
        layer.eval()(x)
        assert not count_norms
        with torch.inference_mode():
            assert torch.equal(layer(x), layer(x)) and len(count_norms) == 1
        pickle.loads(pickle.dumps(layer))
        with torch.no_grad():
            copy.deepcopy(layer)(x)
        assert len(count_norms) == 2
        with torch.no_grad(), monkeypatch.context() as captured:
            captured.setattr(dora, "is_capturing", lambda _: True)
            layer.set_scale("default", 2.0)
            layer(x)
            assert len(count_norms) == 2 and not dora.norms_are_kept(layer)
    finally:
        DoraCaching()(False)
    with torch.no_grad():
        layer(x)
    assert len(count_norms) == 2
    with torch.inference_mode():
        made = LoraLinear(IN, OUT, use_dora=True).eval()
        with DoraCaching():
            assert made(x).shape == (3, OUT)


# -- peftkern.nn ---------------------------------------------------------------------------------------------------


def test_layers_by_themselves():
    """Catches `use_dora` that is lost on the way to the layer, and a magnitude rounded to a 16-bit base's dtype."""
    layer = LoraLinear(IN, OUT, use_dora=True, dtype=torch.bfloat16)
    magnitude = layer.lora_magnitude_vector["default"].weight
    assert magnitude.dtype == torch.float32 and magnitude.requires_grad
    torch.testing.assert_close(magnitude.detach(), layer.weight.float().norm(dim=1), rtol=4 * EPS, atol=0)
    for made in (
        LoraLinear.from_linear(conv1d(), use_dora=True),
        LoraLinear(IN, 64, quantization="nf4", use_dora=True),
        LoraEmbedding(9, OUT, use_dora=True),
        LoraEmbedding.from_embedding(nn.Embedding(9, OUT), use_dora=True),
    ):
        assert list(made.lora_magnitude_vector) == ["default"]
    assert not LoraLinear(IN, OUT).lora_magnitude_vector
    x = torch.randn(3, IN, dtype=torch.bfloat16)
    y = layer(x)
    want = F.linear(x.float(), layer.weight.float(), layer.bias.float())
    torch.testing.assert_close(y.float(), want, rtol=1e-2, atol=1e-2)
