"""AdaLoRA's layer beside real PEFT's: outputs, gradients, paths, quantized bases, and what its scaling goes by."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import peftkern
from lora_pairs import BASES, IN, OUT, Holder, assert_close, conv1d, inputs, run
from peftkern.ops import dequantize
from peftkern.tuners.adalora import AdaLoraConfig, AdaLoraModel, SVDLinear
from peftkern.tuners.adalora.ranknum import RankNumbers
from peftkern.utils.quantized_modules import Linear4bit, Linear8bit, weight_of
from tiny_models import copied, randomize

peft = pytest.importorskip("peft")

EPS32 = torch.finfo(torch.float32).eps


def pair(base: nn.Module, names: tuple[str, ...] = ("default",), **arguments: Any) -> list[Any]:
    """The same adapters on equal layers, by peftkern and by PEFT, with the same random values; all are active."""
    models = []
    for tuner, config in ((AdaLoraModel, AdaLoraConfig), (peft.AdaLoraModel, peft.AdaLoraConfig)):
        given = {"target_modules": ["layer"], "total_step": 10, "init_r": 5, "lora_alpha": 7} | arguments
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(7)
            model = tuner(Holder(copy.deepcopy(base)), config(**given), names[0])
            for name in names[1:]:
                model.peft_config[name] = config(**(given | {"init_r": 3, "inference_mode": True}))
                model.inject_adapter(model.model, name)
            model.set_adapter(list(names))
        randomize(model, ("lora_",))
        models.append(model)
    return models


@pytest.mark.parametrize("base", ["linear", "no_bias", "conv1d"])
@pytest.mark.parametrize("names", [("default",), ("a", "b")])
def test_outputs_and_gradients_are_those_of_peft(base, names):
    """Catches a scaling, a transposed weight, an adapter or a gradient of A, B, E or x that differs."""
    ours, theirs = pair(BASES[base](), names)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    row = ours.model.layer.explain_row()
    assert row.fused and row.r == (5 if len(names) == 1 else 8), row.reason
    got, want = (run(model, inputs(BASES[base]())) for model in (ours, theirs))
    assert len(got) == 2 + 3 * len(names)
    assert_close(got, want, EPS32)
    with peftkern.use_backend("unfused"):
        assert not ours.model.layer.explain_row().fused
        assert_close(run(ours, inputs(BASES[base]())), want, EPS32)


def test_initial_bits_are_those_of_peft():
    """Catches another initialization, or numbers drawn in another order, so that what is made next differs too."""
    for init in (True, False):
        drawn = []
        for tuner, config in ((AdaLoraModel, AdaLoraConfig), (peft.AdaLoraModel, peft.AdaLoraConfig)):
            torch.manual_seed(0)
            wanted = config(target_modules=["layer"], total_step=5, init_lora_weights=init)
            model = tuner(Holder(nn.Linear(IN, OUT)), wanted, "default")
            drawn.append([*model.state_dict().items(), ("next", torch.rand(3))])
        for (name, got), (other, want) in zip(*drawn, strict=True):
            assert name == other and torch.equal(got, want), name


@pytest.mark.parametrize("hooked", [False, True])
def test_dropout_is_on_the_adapters_input(hooked):
    """Catches dropout of the base's input, none, or one in evaluation: y - base(x) over its value without dropout has
    the mean 1 and, where x drops whole, is 0."""
    ours, _ = pair(BASES["linear"](), lora_dropout=0.5)
    layer = ours.model.layer
    if hooked:
        layer.base_layer.register_forward_hook(lambda *_: None)
    x = torch.zeros(4000, IN)
    x[:, 3] = 1.0  # one feature, so that a row's adapter is there whole, doubled, or not at all
    with torch.no_grad():
        ours.eval()
        part = layer(x) - layer.base_layer(x)
        assert part.abs().min() > 0
        ours.train()
        ratio = (layer(x) - layer.base_layer(x)) / part
    dropped = ratio.abs().amax(dim=1) < 1e-3
    assert 0.45 < dropped.float().mean() < 0.55
    torch.testing.assert_close(ratio[~dropped], torch.full_like(ratio[~dropped], 2.0), rtol=1e-3, atol=1e-3)


def test_sixteen_bits_with_master_weights_match_float64():
    """Catches 16-bit arithmetic where it shows: PEFT's fp16 layer makes Inf of a product that ranknum would divide."""
    torch.manual_seed(0)
    base = nn.Linear(IN, OUT).half()
    ours, _ = pair(base, lora_alpha=64, init_r=8)
    layer = ours.model.layer
    peftkern.tuners.tuners_utils.cast_adapter_dtype(ours, "default")
    for held in (layer.lora_A, layer.lora_B, layer.lora_E):
        assert held["default"].dtype == torch.float32
        held["default"].data.fill_(2.0)
    x = torch.full((3, IN), 2.0, dtype=torch.float16)
    with torch.no_grad():
        y = layer(x)
    A, B, E = (held["default"].double() for held in (layer.lora_A, layer.lora_B, layer.lora_E))
    want = base.double()(x.double()) + 64 / (8 + 1e-5) * (x.double() @ (E * A).T @ B.T)
    assert want.max() < 65504 < 8 * want.max(), "the case is no case"
    torch.testing.assert_close(y.double(), want, rtol=2**-10, atol=0)


@pytest.mark.parametrize("make", [Linear8bit.from_linear, Linear4bit.from_linear], ids=["8 bits", "4 bits"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantized_base_is_its_dense_weight(make, dtype):
    """Catches a quantized layer that is called as it is, or computes in another dtype; and merging that is not the
    sum, or does not come back."""
    torch.manual_seed(0)
    base = make(nn.Linear(64, 48).to(dtype)).requires_grad_(False)
    quantized = made(base)
    dense = nn.Linear(64, 48).to(dtype)
    dense.weight.data, dense.bias.data = dequantize(weight_of(base), dtype), base.bias.data
    plain = made(dense)
    assert quantized.model.layer.explain_row().fused
    x = torch.randn(2, 5, 64).to(dtype)
    got, want = run(quantized, x), run(plain, x)
    assert_close(got, {k: v for k, v in want.items() if k in got}, torch.finfo(dtype).eps)
    assert sum("lora_" in name for name in got) == 3
    quantized.merge_adapter()
    assert type(quantized.model.layer.base_layer) is nn.Linear
    assert_close({"y": quantized(x).detach()}, {"y": got["y"]}, 4 * torch.finfo(dtype).eps)
    quantized.unmerge_adapter()
    assert_close(run(quantized, x), got, 0)


def made(base: nn.Module) -> Any:
    """Peftkern's model of this very layer, with fp32 adapters of random values."""
    config = AdaLoraConfig(target_modules=["layer"], total_step=10, init_r=5, lora_alpha=7)
    model = AdaLoraModel(Holder(base), config, "default")
    peftkern.tuners.tuners_utils.cast_adapter_dtype(model, "default")
    randomize(model, ("lora_",))
    return model


def test_bitsandbytes_layers_are_those_of_peft():
    """Catches an adapter that PEFT's 4-bit and 8-bit layers have otherwise; what quantizing loses is in both."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    linear = nn.Linear(128, 64)
    four = bnb.nn.Linear4bit(128, 64, True, torch.float32, True, "nf4")
    eight = bnb.nn.Linear8bitLt(128, 64, True, has_fp16_weights=False)
    for made, flag in ((four, "is_loaded_in_4bit"), (eight, "is_loaded_in_8bit")):
        made.load_state_dict(linear.state_dict())
        parts = []
        for tuner, config in ((AdaLoraModel, AdaLoraConfig), (peft.AdaLoraModel, peft.AdaLoraConfig)):
            holder = Holder(copy.deepcopy(made).to("cpu").requires_grad_(False))
            setattr(holder, flag, True)
            wanted = config(target_modules=["layer"], total_step=10, init_r=5, lora_alpha=7)
            model = tuner(holder, wanted, "default")
            randomize(model, ("lora_",))
            x = torch.randn(6, 128, generator=torch.Generator().manual_seed(1))
            y = model(x)
            y.square().sum().backward()
            with torch.no_grad():
                model.disable_adapter_layers()
                parts.append((y - model(x)).detach())
        assert parts[0].abs().max() > 0.1
        torch.testing.assert_close(*parts, rtol=1e-4, atol=1e-5)


def test_merging_comes_back_and_scaling_follows_its_setters():
    """Catches merging with another scaling than forward's, and setters that divide by the rank once more, as PEFT's."""
    for base in ("linear", "conv1d"):
        ours, theirs = pair(BASES[base]())
        x = inputs(BASES[base]())
        layer = ours.model.layer
        y = ours(x).detach()
        for model in (ours, theirs):
            model.merge_adapter(safe_merge=True)
        assert_close({"w": layer.weight.data}, {"w": theirs.model.layer.weight.data}, EPS32)
        assert_close({"y": ours(x).detach()}, {"y": y}, 4 * EPS32)
        ours.unmerge_adapter()
        assert_close({"y": ours(x).detach()}, {"y": y}, 4 * EPS32)
        added = y - layer.base_layer(x).detach()
        layer.set_scale("default", 3.0)
        assert_close({"y": ours(x).detach() - layer.base_layer(x).detach()}, {"y": 3 * added}, 8 * EPS32)
        layer.unscale_layer()
        assert_close({"y": ours(x).detach()}, {"y": y}, EPS32)


def test_ranknum_is_told_by_what_is_on_the_host():
    """Catches a stale number after loading, replacing, changing in place, moving or copying; and one that a cast to
    bfloat16, which has no 257, rounds."""
    layer = SVDLinear(nn.Linear(4, 3), "a", AdaLoraConfig(total_step=5, init_r=257), r=257)
    assert layer.effective_scaling("a") == 8 / (257 + 1e-5)
    layer.to(torch.bfloat16)
    assert layer.ranknum.value("a") == 257 != layer.ranknum["a"].item()
    for assign in (False, True):
        state = layer.state_dict() | {"ranknum.a": torch.tensor([5.0 + assign])}
        layer.load_state_dict(state, assign=assign)
        assert layer.ranknum.value("a") == 5 + assign
    with torch.no_grad():
        layer.ranknum["a"].fill_(3)
    assert layer.ranknum.value("a") == 3
    layer.ranknum["a"] = nn.Parameter(torch.tensor([7.0]), requires_grad=False)
    assert layer.ranknum.value("a") == 7
    for how in ("copy", "pickle"):
        other = copied(layer, how)
        assert other.ranknum.value("a") == 7 and type(other.ranknum) is RankNumbers
        other.ranknum["a"] = torch.tensor([9.0])
        assert (other.ranknum.value("a"), layer.ranknum.value("a")) == (9, 7)
    layer.delete_adapter("a")
    assert not layer.ranknum and not layer.ranknum._known


@pytest.mark.parametrize("base", [lambda: nn.Linear(IN, OUT), conv1d])
def test_no_triplet_is_the_base_alone(base):
    """Catches an operation that is asked for a rank of 0, and a merged weight that changes."""
    ours, _ = pair(base())
    layer = ours.model.layer
    x = inputs(base())
    layer.resize("default", [False, True, False, True, True])
    layer.resize("default", [False, False, False])
    assert layer.r["default"] == 0 and layer.lora_B["default"].shape == (OUT, 0)
    assert layer.ranknum.value("default") == 5
    assert torch.equal(ours(x), layer.base_layer(x))
    assert "base layer runs alone" in layer.plan(16).reason
    before = layer.weight.clone()
    ours.merge_adapter()
    assert torch.equal(layer.weight, before)
    with pytest.raises(ValueError, match="merged"):
        layer.resize("default", [])
    with pytest.raises(ValueError, match="expected a bool for each of 0"):
        layer.resize("default", [True])
