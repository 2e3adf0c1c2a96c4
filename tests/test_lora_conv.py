"""LoRA on convolutions, by layer, beside real PEFT's: initial bits, outputs, gradients, DoRA, merging, refusals."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import peftkern
from lora_pairs import Holder, assert_close, pair, run
from peftkern.tuners.lora import Conv2d, CordaConfig, EvaConfig, LoftQConfig, LoraConfig, LoraGAConfig, LoraModel
from peftkern.utils.warning import PeftWarning
from tiny_models import copied

peft = pytest.importorskip("peft")

EPS = torch.finfo(torch.float32).eps * 16
BASES = {
    "conv1d": lambda: nn.Conv1d(6, 9, 3, padding=1),
    "conv1d_pixel": lambda: nn.Conv1d(6, 9, 1, bias=False),
    "conv2d": lambda: nn.Conv2d(6, 9, 3, stride=2, padding=(1, 0)),
    "conv2d_pixel": lambda: nn.Conv2d(6, 9, 1),
    "conv2d_same": lambda: nn.Conv2d(6, 9, (2, 5), padding="same", bias=False),
    "conv2d_groups": lambda: nn.Conv2d(6, 9, 3, padding=1, groups=3),
    "conv3d": lambda: nn.Conv3d(6, 9, (1, 2, 3), stride=(2, 1, 1)),
    "conv3d_groups": lambda: nn.Conv3d(6, 9, 2, groups=3, bias=False),
}
SINGLE = [kind for kind in BASES if "groups" not in kind]  # those that can be merged
DIMENSIONS = ["conv1d", "conv2d", "conv3d"]
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"r": 3, "lora_alpha": 5},
    "rslora": {"r": 6, "use_rslora": True},
    "bias": {"r": 3, "lora_bias": True},
    "dora": {"r": 3, "use_dora": True},
}


def inputs(base: nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    space = {nn.Conv1d: (9,), nn.Conv2d: (7, 8), nn.Conv3d: (5, 4, 6)}
    shape = (2, 6, *next(sizes for kind, sizes in space.items() if isinstance(base, kind)))
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)


def both(kind: str, variant: str, names: tuple[str, ...] = ("default",), **more: Any) -> tuple[nn.Module, Any, Any]:
    base = BASES[kind]()
    ours, theirs = pair(base, names, **(VARIANTS[variant] | more))
    return base, ours, theirs


def fits(kind: str, variant: str) -> bool:
    return not (variant == "dora" and kind not in SINGLE)


FITTING = pytest.mark.parametrize("kind, variant", [(k, v) for k in BASES for v in VARIANTS if fits(k, v)])


@pytest.mark.parametrize("init", [True, False, "gaussian"])
@FITTING
def test_initial_bits_are_those_of_peft(kind, variant, init):
    """Catches another shape, order or number of draws from torch's generator, and names that differ from PEFT's."""
    if variant == "bias" and init == "gaussian":
        with pytest.raises(ValueError, match="lora_bias"):  # as in PEFT
            LoraConfig(init_lora_weights=init, **VARIANTS[variant])
        return
    ours, theirs = pair(BASES[kind](), values=None, init_lora_weights=init, **VARIANTS[variant])
    mine, other = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(other)
    for name, want in other.items():
        if "magnitude" in name:  # sums of squares, in another order
            torch.testing.assert_close(mine[name], want)
        else:
            assert torch.equal(mine[name], want), name


@pytest.mark.parametrize("names", [("default",), ("default", "second")], ids=len)
@FITTING
def test_output_and_gradients_are_those_of_peft(kind, variant, names):
    """Catches a stride, padding or group that A or B lacks, a scaling, a bias or an adapter left out."""
    base, ours, theirs = both(kind, variant, names)
    row = ours.model.layer.explain_row("layer")
    assert (row.fused, row.in_features, row.out_features) == (False, 6, 9) and "convolution" in row.reason
    assert ours.model.layer.plan(4).path == "unfused"
    assert_close(run(ours, inputs(base)), run(theirs, inputs(base)), EPS)
    # Without the axis of the batch, which PEFT's DoRA needs.
    assert_close({"y": ours(inputs(base)[0]).detach()}, {"y": ours(inputs(base))[0].detach()}, EPS)


@pytest.mark.parametrize("kind, variant", [("conv1d", "plain"), ("conv2d", "dora"), ("conv3d", "dora")])
def test_dropout_drops_what_peft_drops(kind, variant):
    """Catches dropout on the wrong side, and with DoRA a base product of x where PEFT's is of what was not dropped."""
    base, ours, theirs = both(kind, variant, lora_dropout=0.4)
    results = []
    for model in (ours, theirs):
        torch.manual_seed(5)
        results.append(run(model, inputs(base)))
    assert_close(*results, EPS)
    for model in (ours, theirs):
        model.eval()
    assert_close(run(ours, inputs(base)), run(theirs, inputs(base)), EPS)


@pytest.mark.parametrize("variant", ["plain", "dora"])
@pytest.mark.parametrize("wide", [True, False], ids=["masters", "narrow"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_keeps_dtypes_and_stays_near_the_truth(dtype, wide, variant):
    """Catches a widened output, a gradient in the wrong dtype, and an error beyond PEFT's own plus a few roundings."""
    base = BASES["conv2d"]().to(dtype)
    ours, theirs = pair(base, **VARIANTS[variant])
    for model in (ours, theirs):
        model._cast_adapter_dtype("default", wide)
    x = inputs(base, dtype)
    truth = run(copy.deepcopy(theirs).double(), x.double())
    mine, other = run(ours, x), run(theirs, x)
    assert {k: v.dtype for k, v in mine.items()} == {k: v.dtype for k, v in other.items()}
    for name, want in truth.items():
        allowed = (other[name].double() - want).abs().max() + 4 * torch.finfo(dtype).eps * want.abs().max()
        assert (mine[name].double() - want).abs().max() <= allowed, name


@pytest.mark.parametrize("variant", ["plain", "dora"])
def test_autocast_is_that_of_peft(variant):
    """Catches an output that is not in autocast's dtype, as the layers after it expect."""
    base, ours, theirs = both("conv2d", variant)
    with torch.autocast("cpu", torch.bfloat16):
        mine, other = run(ours, inputs(base)), run(theirs, inputs(base))
    assert mine["y"].dtype == other["y"].dtype == torch.bfloat16
    assert_close(mine, other, torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("variant", ["plain", "dora"])
def test_channels_last_stays_so(variant):
    """Catches an adapter that turns the layout of activations, which every layer after it would turn back, and a weight
    in that layout whose norm or delta is of elements in another order."""
    base, ours, _ = both("conv2d", variant)
    turned = copy.deepcopy(ours).to(memory_format=torch.channels_last)
    x = inputs(base)
    mine, want = run(turned, x.to(memory_format=torch.channels_last)), run(ours, x)
    assert turned(x.to(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)
    assert_close(mine, want, EPS)
    for model in (turned, ours):
        model.model.layer.merge()
    assert turned.model.layer.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(turned.model.layer.weight, ours.model.layer.weight)


# -- merging -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("names", [("default",), ("default", "second")], ids=len)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", DIMENSIONS + ["conv2d_pixel"])
def test_merged_weights_are_those_of_peft_and_come_out_again(kind, variant, names, safe_merge):
    """Catches a delta with its kernel turned, a bias left out, and merged layers that add their adapters once more."""
    base, ours, theirs = both(kind, variant, names)
    x, layer = inputs(base), ours.model.layer
    before, weight = run(ours, x)["y"], layer.weight.detach().clone()
    for model in (ours, theirs):
        model.model.layer.merge(safe_merge=safe_merge)
    assert_close({"w": layer.weight.data}, {"w": theirs.model.layer.weight.data}, EPS)
    assert_close({"b": layer.bias.data}, {"b": theirs.model.layer.bias.data}, EPS)
    assert_close({"y": ours(x).detach()}, {"y": before}, EPS)
    layer.unmerge()
    assert_close({"w": layer.weight.data, "y": ours(x).detach()}, {"w": weight, "y": before}, EPS)


@pytest.mark.parametrize("kernel", [(1, 1, 1), (1, 1, 3)])
def test_a_delta_weight_is_the_product_of_the_matrices(kernel):
    """Catches PEFT's product for kernels of 1 x 1, which it takes for these too and which fails on them."""
    torch.manual_seed(0)
    layer = pair(nn.Conv3d(6, 9, kernel), r=3)[0].model.layer
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    want = torch.einsum("nr,rkabc->nkabc", B[:, :, 0, 0, 0], A) * layer.scaling["default"]
    torch.testing.assert_close(layer.get_delta_weight("default"), want)
    assert layer.get_delta_weight("default").shape == layer.weight.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_weight_is_rounded_once(dtype):
    """Catches a delta that is rounded before it is added: small ones would be lost."""
    base = BASES["conv2d"]().to(dtype)
    layer = pair(base, r=3)[0].model.layer
    layer.lora_A.float(), layer.lora_B.float()
    want = (base.weight + layer.get_delta_weight("default")).to(dtype)
    layer.merge(safe_merge=True)
    assert layer.weight.dtype == dtype and torch.equal(layer.weight, want)


@pytest.mark.parametrize("kind", ["conv2d_groups", "conv3d_groups"])
def test_groups_are_refused_where_there_is_no_delta(kind):
    """Catches a product of grouped factors, whose shape may fit the weight by chance; as PEFT refuses it."""
    _, ours, theirs = both(kind, "plain")
    before = ours.model.layer.weight.detach().clone()
    for model in (ours, theirs):
        for safe_merge in (False, True):
            with pytest.raises(NotImplementedError, match="groups"):
                model.model.layer.merge(safe_merge=safe_merge)
            with pytest.raises(NotImplementedError, match="groups"):
                model.merge_and_unload(safe_merge=safe_merge)
    with pytest.raises(NotImplementedError, match="every input channel"):
        ours.model.layer.get_delta_weight("default")
    assert not ours.model.layer.merged and torch.equal(ours.model.layer.weight, before)


def test_a_merge_that_is_not_finite_leaves_everything_alone():
    """Catches a weight that is written before its sum is looked at."""
    _, ours, _ = both("conv2d", "bias")
    layer = ours.model.layer
    layer.lora_B["default"].bias.data[0] = torch.inf
    before = layer.weight.detach().clone()
    with pytest.raises(ValueError, match="not finite"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.weight, before) and not layer.merged
    with pytest.raises(ValueError, match="no bias"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        both("conv2d_same", "bias")[1].model.layer.merge()


# -- settings that PEFT's adapter lacks --------------------------------------------------------------------------------

ODD = {
    "dilation": lambda: nn.Conv2d(6, 9, 3, dilation=(2, 1)),
    "dilation_same": lambda: nn.Conv1d(6, 9, 3, padding="same", dilation=2),
    "circular": lambda: nn.Conv2d(6, 9, 3, padding=1, padding_mode="circular"),
    "reflect": lambda: nn.Conv1d(6, 9, 5, padding=2, padding_mode="reflect", bias=False),
    "replicate": lambda: nn.Conv3d(6, 9, 3, padding=1, padding_mode="replicate"),
}


@pytest.mark.parametrize("variant", ["plain", "dora"])
@pytest.mark.parametrize("kind", ODD)
def test_dilation_and_padding_are_the_base_layers(kind, variant):
    """Catches an adapter that is not dilated or pads with zeros, as PEFT's: merged it would be another one. The oracle
    is PEFT's merged layer."""
    base = ODD[kind]()
    with pytest.warns(PeftWarning, match="PEFT's has not"):
        LoraModel(Holder(copy.deepcopy(base)), LoraConfig(target_modules=["layer"]), "default")
    ours, theirs = pair(base, ("default",), lora_dropout=0.3, **VARIANTS[variant])
    x = inputs(base)
    for model in (ours, theirs):
        model.eval()
    got = ours(x)
    theirs.model.layer.merge()
    assert_close({"y": got.detach()}, {"y": theirs(x).detach()}, EPS)
    if variant == "plain":
        return
    # In training DoRA takes the base layer's product anew: with nothing dropped it has to be what it was.
    ours.train()
    ours.model.layer.lora_dropout["default"].p = 0.0
    assert_close({"y": ours(x).detach()}, {"y": got.detach()}, EPS)


class Padded(nn.Conv2d):
    """A convolution that pads by itself, as image models have them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(nn.functional.pad(x, [k // 2 for k in self.kernel_size[::-1] for _ in range(2)]))


class Awkward(Padded):
    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3)


def test_a_class_with_a_forward_of_its_own_is_called_as_it_is():
    """Catches a plain convolution as its A, whose output has another size; and a merge that does not say its doubt."""
    base = Padded(6, 9, 3)
    ours, theirs = pair(base, r=3)
    assert_close(run(ours, inputs(base)), run(theirs, inputs(base)), EPS)
    before = ours(inputs(base))
    with pytest.warns(UserWarning, match="Padded, which has a forward of its own"):
        ours.model.layer.merge()
    torch.testing.assert_close(ours(inputs(base)), before)
    # DoRA's product of what was not dropped is the class's own too; with nothing dropped it is the output without bias.
    ours, theirs = pair(Padded(6, 9, 3), r=3, use_dora=True, lora_dropout=0.5)
    ours.model.layer.lora_dropout["default"].p = 0.0
    theirs.eval()
    assert_close(run(ours.train(), inputs(base)), run(theirs, inputs(base)), EPS)
    with pytest.raises(TypeError, match="Awkward, which has a forward of its own"):
        LoraModel(Holder(Awkward(6)), LoraConfig(target_modules=["layer"]), "default")


def test_a_parametrized_weight_is_adapted_and_not_merged():
    """Catches A of the class that parametrizing made, which lacks its parametrization. Audio models have such."""
    base = nn.utils.parametrizations.weight_norm(BASES["conv1d"]())
    model = LoraModel(Holder(base), LoraConfig(target_modules=["layer"], r=3), "default")
    layer = model.model.layer
    nn.init.normal_(layer.lora_B["default"].weight)
    x = inputs(nn.Conv1d(6, 9, 3))
    want = base(x) + layer.lora_B["default"](layer.lora_A["default"](x)) * layer.scaling["default"]
    torch.testing.assert_close(model(x), want)
    with pytest.raises(TypeError, match="parametrized"):
        layer.merge()


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_compute_the_same(how):
    """Catches a layer that holds what cannot be copied."""
    base, ours, _ = both("conv2d", "dora")
    assert_close(run(copied(ours, how), inputs(base)), run(ours, inputs(base)), 0.0)


def test_model_code_can_ask_for_the_settings():
    """Catches an adapted convolution without them: Whisper's encoder multiplies the strides of two. PEFT's has none."""
    for kind in BASES:
        base = BASES[kind]()
        layer = pair(base, r=3)[0].model.layer
        for name in set(base.__constants__) - {"output_padding"}:  # which transposed convolutions alone use
            assert getattr(layer, name) == getattr(base, name), name


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora", "orthogonal", "eva", "mica", "corda", "loftq"])
def test_initializations_of_matrices_are_refused_by_name(init):
    """Catches a weight of four axes in a decomposition of matrices. PEFT refuses them too, without the layer's name."""
    more = {"loftq_config": LoftQConfig()} if init == "loftq" else {}
    more |= {"eva_config": EvaConfig()} if init == "eva" else {}
    more |= {"corda_config": CordaConfig()} if init == "corda" else {}
    config = LoraConfig(target_modules=["layer"], init_lora_weights=init, **more)
    base = BASES["conv2d"]()
    with pytest.raises(ValueError, match=f"'{init}' does not go with 'layer', a Conv2d"):
        LoraModel(Holder(base), config, "default")
    with pytest.raises(ValueError, match=f"'{init}' does not go with a Conv2d"):
        Conv2d(base, "default", config)


def test_lora_ga_leaves_convolutions_as_with_true():
    """Catches an error where a model has convolutions beside the linear layers that LoRA-GA is for; as in PEFT."""
    bits = []
    for init in ("lora_ga", True):
        torch.manual_seed(2)
        more = {"lora_ga_config": LoraGAConfig()} if init == "lora_ga" else {}
        config = LoraConfig(target_modules=["layer"], init_lora_weights=init, **more)
        bits.append(LoraModel(Holder(nn.Conv2d(6, 9, 3)), config, "default").state_dict())
    assert all(torch.equal(bits[0][name], bits[1][name]) for name in bits[1])


def test_what_groups_do_not_go_with_is_refused_and_nothing_is_changed():
    """Catches a rank that leaves a group short, also in a second adapter (PEFT: torch's error, half-way), and DoRA's
    norm of a product that is no weight's, which PEFT 0.21.2 takes because its shape fits by chance."""
    for name, library in (("ours", peftkern), ("theirs", peft)):
        with pytest.raises(ValueError, match="groups=3"):
            library.LoraModel(Holder(BASES["conv2d_groups"]()), library.LoraConfig(r=4, target_modules=["layer"]), name)
    config = LoraConfig(r=3, target_modules=["layer"])
    model = LoraModel(Holder(BASES["conv2d_groups"]()), config, "default")
    before = list(model.state_dict())
    model.peft_config["second"] = LoraConfig(r=3, rank_pattern={"layer": 4}, target_modules=["layer"])
    with pytest.raises(ValueError, match="r=4 does not go with 'layer', a Conv2d with groups=3"):
        model.inject_adapter(model.model, "second")
    with pytest.raises(ValueError, match="r=5 does not go with"):
        model.model.layer.update_layer("default", 5, 1, config)
    assert list(model.state_dict()) == before and model.model.layer.r == {"default": 3}
    with pytest.raises(NotImplementedError, match="use_dora=True does not go with 'layer', a Conv2d with groups=3"):
        dora = LoraConfig(r=3, use_dora=True, target_modules=["layer"])
        LoraModel(Holder(BASES["conv2d_groups"]()), dora, "default")


def test_other_modules_are_refused_by_name():
    """Catches a weight that is not there yet, or of other axes, and a transposed convolution taken for a plain one."""
    config = LoraConfig(target_modules=["layer"])
    with pytest.raises(ValueError, match="'layer', a LazyConv2d, has no weight yet"):
        LoraModel(Holder(nn.LazyConv2d(9, 3)), config, "default")
    with pytest.raises(ValueError, match="'layer', a ConvTranspose2d: LoRA adapts"):
        LoraModel(Holder(nn.ConvTranspose2d(6, 9, 3)), config, "default")
    with pytest.raises(ValueError, match="expected a weight with 4 axes, got a Conv1d with 3"):
        Conv2d(nn.Conv1d(6, 9, 3), "default", config)


def test_several_adapters_come_and_go():
    """Catches a layer that keeps a deleted adapter, adds a disabled one, or does not take out what was merged."""
    base, ours, _ = both("conv2d", "plain", ("default", "second"))
    layer, x = ours.model.layer, inputs(base)
    alone = {}
    for name in ("default", "second"):
        layer.set_adapter(name)
        alone[name] = ours(x).detach()
    with pytest.warns(UserWarning, match="'default' is active"):
        layer.delete_adapter("second")
    assert torch.equal(ours(x), alone["default"]) and list(layer.lora_A) == list(layer.lora_B) == ["default"]
    layer.merge()
    layer.enable_adapters(False)
    torch.testing.assert_close(ours(x), base(x))
    assert not layer.merged
    layer.enable_adapters(True)
    torch.testing.assert_close(ours(x), alone["default"])
    with pytest.raises(NotImplementedError, match="adapter_names"):
        layer(x, adapter_names=["default", "default"])
