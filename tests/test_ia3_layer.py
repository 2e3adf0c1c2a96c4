"""IA3's layers beside real PEFT's: initial bits, outputs, gradients, merging; quantized bases; `nn.IA3Linear`."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import peftkern
from lora_pairs import IN, OUT, Holder, assert_close, conv1d, run
from numerics import padded_randn
from peftkern.nn import IA3Linear
from peftkern.ops import dequantize, ia3_linear
from peftkern.tuners.ia3 import IA3Config, IA3Model
from peftkern.utils.quantized_modules import Linear4bit, Linear8bit, weight_of
from tiny_models import randomize

peft = pytest.importorskip("peft")

BASES = {
    "linear": lambda: nn.Linear(IN, OUT),
    "no_bias": lambda: nn.Linear(IN, OUT, bias=False),
    "conv1d": conv1d,
    "conv2d": lambda: nn.Conv2d(IN, 12, 3, padding=1, groups=4),
    "conv2d_plain": lambda: nn.Conv2d(IN, OUT, (3, 1), stride=2, bias=False),
    "conv3d": lambda: nn.Conv3d(IN, OUT, 2),
}
BOTH = pytest.mark.parametrize("feedforward", [False, True], ids=["output", "feedforward"])
LINEAR = ["linear", "no_bias", "conv1d"]


def pair(base: nn.Module, feedforward: bool, names: tuple[str, ...] = ("default",), values: bool = True, **arguments):
    """The same adapters on equal layers, by peftkern and by PEFT; values around 1 in both, or their own."""
    models = []
    options = {"target_modules": ["layer"], "feedforward_modules": ["layer"] if feedforward else []} | arguments
    for tuner, config in ((IA3Model, IA3Config), (peft.IA3Model, peft.IA3Config)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(7)
            model = tuner(Holder(copy.deepcopy(base)), config(**options), names[0])
            for name in names[1:]:
                model.peft_config[name] = config(**options)
                model.inject_adapter(model.model, name)
            for layer in [model.model.layer]:
                layer.set_adapter(list(names))
            model.active_adapter = list(names)
        if values:
            randomize(model, ("ia3_",))
            for name, p in model.named_parameters():
                if "ia3_" in name:
                    p.data += 1.0
        models.append(model)
    return models


def inputs(base: nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    space = {nn.Conv2d: (7, 6), nn.Conv3d: (4, 5, 3)}.get(type(base))
    shape = (2, 5, IN) if space is None else (2, IN, *space)
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()


@BOTH
@pytest.mark.parametrize("init", [True, False])
@pytest.mark.parametrize("kind", BASES)
def test_initial_bits_are_those_of_peft(kind, init, feedforward):
    """Catches another shape, order or number of draws from torch's generator, and names that differ from PEFT's."""
    ours, theirs = pair(BASES[kind](), feedforward, ("default", "second"), values=False, init_ia3_weights=init)
    mine, other = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(other)
    assert all(torch.equal(mine[k], other[k]) for k in mine)


@BOTH
@pytest.mark.parametrize("names", [("default",), ("default", "second", "third")], ids=len)
@pytest.mark.parametrize("kind", BASES)
def test_output_and_gradients_are_those_of_peft(kind, names, feedforward):
    """Catches a vector on the wrong side, a transposed weight, an adapter left out of several."""
    base = BASES[kind]()
    ours, theirs = pair(base, feedforward, names)
    assert ours.model.layer.explain_row("layer").fused == (kind in LINEAR)
    assert_close(run(ours, inputs(base)), run(theirs, inputs(base)), torch.finfo(torch.float32).eps * 16)


@BOTH
@pytest.mark.parametrize("wide", [True, False], ids=["masters", "narrow"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", LINEAR)
def test_low_precision_keeps_dtypes_and_stays_near_the_truth(kind, dtype, wide, feedforward):
    """Catches a widened output, a gradient in the wrong dtype, and an error beyond PEFT's own plus a few roundings."""
    base = BASES[kind]().to(dtype)
    ours, theirs = pair(base, feedforward)
    for model in (ours, theirs):
        model._cast_adapter_dtype("default", wide)
    x = inputs(base, dtype)
    truth = run(copy.deepcopy(theirs).double(), x.double())
    mine, other = run(ours, x), run(theirs, x)
    assert {k: v.dtype for k, v in mine.items()} == {k: v.dtype for k, v in other.items()}
    for name, want in truth.items():
        allowed = (other[name].double() - want).abs().max() + 4 * torch.finfo(dtype).eps * want.abs().max()
        assert (mine[name].double() - want).abs().max() <= allowed, name


@BOTH
def test_autocast_is_that_of_peft(feedforward):
    """Catches an output that is not in autocast's dtype, as the layers after it expect."""
    base = nn.Linear(IN, OUT)
    for names in (("default",), ("default", "second")):
        ours, theirs = pair(base, feedforward, names)
        with torch.autocast("cpu", torch.bfloat16):
            mine, other = run(ours, inputs(base)), run(theirs, inputs(base))
        assert mine["y"].dtype == other["y"].dtype == torch.bfloat16
        assert_close(mine, other, torch.finfo(torch.bfloat16).eps)


@BOTH
def test_gradients_are_right_where_a_vector_is_zero(feedforward):
    """Catches y / l in place of what was multiplied: NaN, or a vector that can never leave zero again."""
    base = nn.Linear(IN, OUT)
    ours, theirs = pair(base, feedforward)
    for model in (ours, theirs):
        model.model.layer.ia3_l["default"].data.view(-1)[::2] = 0.0
    assert_close(run(ours, inputs(base)), run(theirs, inputs(base)), torch.finfo(torch.float32).eps * 16)


@BOTH
def test_awkward_inputs(feedforward):
    """Catches a dependence on contiguous rows, and an empty, one-dimensional or unbatched input that fails."""
    ours, theirs = pair(nn.Linear(IN, OUT), feedforward)
    x = padded_randn(7, IN, pad=3, dtype=torch.float32)
    for given in (x, x[:0], x[0], x.unsqueeze(0).expand(3, 7, IN)):
        torch.testing.assert_close(ours(given), theirs(given))
    conv = pair(BASES["conv2d"](), feedforward)[0]
    image = torch.randn(IN, 7, 6)
    torch.testing.assert_close(conv(image), conv(image[None])[0])


def test_base_layers_that_do_more_are_called_as_they_are():
    """Catches a hook that is skipped, and a layer that does not say why it is slower."""
    for feedforward in (False, True):
        ours, theirs = pair(nn.Linear(IN, OUT), feedforward)
        for model in (ours, theirs):
            model.model.layer.base_layer.register_forward_hook(lambda *a: a[-1] * 2)
        assert "hooks" in ours.model.layer.explain_row().reason
        assert_close(run(ours, inputs(nn.Identity())), run(theirs, inputs(nn.Identity())), 2e-6)


def test_the_layer_says_its_path():
    """Catches a row that is missing from `explain`, or one that does not tell feed-forward layers from others."""
    model = nn.ModuleDict({"k": IA3Linear(8, 12), "down": IA3Linear(8, 12, is_feedforward=True)})
    rows = peftkern.explain(model, tokens=64).rows
    assert [(r.name, r.kind, r.path) for r in rows] == [
        ("k", "Linear (IA3)", "torch"),
        ("down", "Linear (IA3, feed-forward)", "torch"),
    ]
    assert "IA3, feed-forward" in str(peftkern.explain(model))
    with peftkern.use_backend("triton"):
        assert set(peftkern.explain(model, tokens=64).paths) == {"cublas"}
    model["k"].enable_adapters(False)
    assert "disabled" in model["k"].explain_row().reason


# -- merging -------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("kind", BASES)
def test_merging_is_that_of_peft(kind, safe, feedforward):
    """Catches a vector along the wrong axis of the weight (groups, Conv1D), and a bias that is not scaled with it."""
    base = BASES[kind]()
    ours, theirs = pair(base, feedforward, ("default", "second"))
    x = inputs(base).detach()
    before, weight = ours(x), ours.model.layer.base_layer.weight.detach().clone()
    for model in (ours, theirs):
        model.model.layer.merge(safe_merge=safe)
    mine, other = ours.state_dict(), theirs.state_dict()
    for key in mine:
        torch.testing.assert_close(mine[key], other[key], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(ours(x), before, rtol=1e-4, atol=1e-5)
    ours.model.layer.unmerge()
    torch.testing.assert_close(ours.model.layer.base_layer.weight.detach(), weight, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours(x), before, rtol=1e-4, atol=1e-5)
    assert ours.model.layer.merged_adapters == []


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d"])
def test_unmerging_brings_back_what_division_cannot(kind, dtype, feedforward):
    """Catches weights lost for good where the vector is 0, or where products leave the dtype's range."""
    ours, _ = pair(BASES[kind]().to(dtype), feedforward)
    layer = ours.model.layer
    vector = layer.ia3_l["default"].data.view(-1)
    vector[0], vector[1], vector[2], vector[3] = 0.0, 1e-7, 60000.0, -3.0
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    layer.merge()
    layer.half() if dtype is torch.float16 else None
    layer.unmerge()
    for key, value in ours.state_dict().items():
        error = (value.double() - before[key].double()).abs()
        assert (error <= 2 * torch.finfo(dtype).eps * before[key].double().abs()).all(), key


def test_safe_merge_refuses_what_is_not_finite():
    """Catches a base weight that is destroyed by a broken adapter."""
    ours, _ = pair(nn.Linear(IN, OUT), False)
    layer = ours.model.layer
    layer.ia3_l["default"].data[3] = float("inf")
    before = layer.base_layer.weight.clone()
    with pytest.raises(ValueError, match="not finite"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before) and not layer.merged
    with pytest.warns(UserWarning, match="no adapter is merged"):
        layer.unmerge()


def test_a_weight_that_a_hook_makes_anew_is_not_merged_into():
    """Catches a merge that the next call of the layer undoes: PEFT's output is then that of the base alone."""
    base = nn.Sequential(nn.utils.weight_norm(nn.Linear(IN, OUT)))
    ours = peftkern.get_peft_model(base, peftkern.IA3Config(target_modules=["0"], feedforward_modules=[]))
    for merge in (ours.merge_adapter, ours.merge_and_unload, ours.base_model.model[0].merge):
        with pytest.raises(TypeError, match="WeightNorm makes anew"):
            merge()


def test_disabling_a_merged_adapter_unmerges_it():
    """Catches a base model that is still scaled with its adapters disabled."""
    base = nn.Linear(IN, OUT)
    ours, _ = pair(base, False)
    ours.model.layer.merge()
    ours.disable_adapter_layers()
    torch.testing.assert_close(ours(inputs(base)), base(inputs(base)))


# -- quantized bases -------------------------------------------------------------------------------------------------


def bitsandbytes_4bit(linear):
    bnb = pytest.importorskip("bitsandbytes")
    made = bnb.nn.Linear4bit(linear.in_features, linear.out_features, True, torch.bfloat16, True, "nf4")
    made.load_state_dict(linear.state_dict())
    return made.to("cpu")


def bitsandbytes_8bit(linear):
    bnb = pytest.importorskip("bitsandbytes")
    made = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, True, has_fp16_weights=False)
    made.load_state_dict(linear.state_dict())
    return made.to("cpu")


QUANTIZED = {
    "peftkern 4-bit": lambda linear: Linear4bit.from_linear(linear, compute_dtype=torch.bfloat16),
    "peftkern 8-bit": Linear8bit.from_linear,
    "bitsandbytes 4-bit": bitsandbytes_4bit,
    "bitsandbytes 8-bit": bitsandbytes_8bit,
}


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_base(kind, dtype, feedforward):
    """Catches a layer that calls a quantized base as it is (dense in backward), or computes in the wrong dtype."""
    base = QUANTIZED[kind](nn.Linear(96, 80)).requires_grad_(False)
    layer = IA3Linear.from_linear(base, is_feedforward=feedforward)
    assert layer.ia3_l["default"].dtype == torch.float32 and layer.explain_row().fused
    layer.ia3_l["default"].data += torch.randn_like(layer.ia3_l["default"]) * 0.1
    x = torch.randn(2, 5, 96).to(dtype).requires_grad_()
    compute = getattr(base, "compute_dtype", None) or dtype
    weight, scale = dequantize(weight_of(base), compute), layer.ia3_l["default"]

    def expected(x):
        bias = base.bias.to(compute)
        return ia3_linear(x.to(compute), weight, scale.flatten(), bias, is_feedforward=feedforward).to(x.dtype)

    results = []
    for function in (layer, expected):
        y = function(x)
        results.append([y.detach(), *torch.autograd.grad(y.sum(), (x, scale))])
    assert all(torch.equal(got, want) for got, want in zip(*results, strict=True))
    assert results[0][0].dtype == dtype


@BOTH
@pytest.mark.parametrize("kind", QUANTIZED)
def test_merging_into_a_quantized_base_makes_it_dense_and_back(kind, feedforward):
    """Catches a merged weight that is rounded to four bits, and a quantized base that does not come back to the bit."""
    torch.manual_seed(0)
    layer = IA3Linear.from_linear(QUANTIZED[kind](nn.Linear(96, 80)), is_feedforward=feedforward)
    layer.ia3_l["default"].data += torch.randn_like(layer.ia3_l["default"]) * 0.1
    base, x = layer.base_layer, torch.randn(4, 96)
    before = layer(x)
    weight = dequantize(weight_of(base), torch.float32)
    layer.merge(safe_merge=True)
    vector = layer.ia3_l["default"].data
    torch.testing.assert_close(layer.base_layer.weight, weight * vector, rtol=1e-2, atol=1e-3, check_dtype=False)
    torch.testing.assert_close(layer(x), before, rtol=5e-2, atol=5e-2)
    layer.unmerge()
    assert layer.base_layer is base and torch.equal(layer(x), before)


# -- the layer by itself ---------------------------------------------------------------------------------------------


@BOTH
def test_nn_layer_trains_alone(feedforward):
    """Catches a frozen vector, a base that trains, a start that is not the identity, and a state dict that differs."""
    layer = IA3Linear(IN, OUT, is_feedforward=feedforward, dtype=torch.bfloat16)
    x = torch.randn(4, IN).bfloat16()
    assert torch.equal(layer(x), layer.base_layer(x))
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["ia3_l.default"]
    assert list(layer.state_dict()) == ["base_layer.weight", "base_layer.bias", "ia3_l.default"]
    vector = layer.ia3_l["default"]
    assert vector.dtype == torch.float32 and vector.numel() == (IN if feedforward else OUT)
    optimizer, losses = torch.optim.SGD([vector], 0.05), []
    for _ in range(5):
        loss = layer(x).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_nn_layer_from_others():
    """Catches a copy where the layer should be kept by reference, and a misuse that is not named."""
    linear = nn.Linear(IN, OUT)
    layer = IA3Linear.from_linear(linear, init_ia3_weights=False)
    assert layer.base_layer is linear and not linear.weight.requires_grad
    assert IA3Linear(64, 64, quantization="nf4")(torch.randn(2, 64)).shape == (2, 64)
    assert "ia3.IA3Linear" in repr(layer)
    with pytest.raises(TypeError, match="linear must be"):
        IA3Linear.from_linear(nn.Embedding(3, 4))
    with pytest.raises(ValueError, match="quantization: expected"):
        IA3Linear(8, 8, quantization="nf3")
