"""LoRA's layers beside real PEFT's: initial bits, outputs, gradients, and when the base layer is called as it is."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import peftkern.nn
from lora_pairs import BASES, IN, OUT, VOCAB, Holder, assert_close, conv1d, inputs, pair, pytorch_utils, run
from numerics import padded_randn
from peftkern.tuners.lora import Embedding, Linear, LoraConfig, LoraModel
from peftkern.tuners.lora import layer as layer_module
from tiny_models import randomize

# -- initial values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", [True, False, "gaussian", "Gaussian"])
@pytest.mark.parametrize("kind", BASES)
def test_initial_bits_are_those_of_peft(kind, init):
    """Catches another order or number of draws from torch's generator, and names that differ from PEFT's."""
    ours, theirs = pair(BASES[kind](), ("default", "second"), values=None, init_lora_weights=init, r=5)
    mine, other = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(other)
    assert all(torch.equal(mine[k], other[k]) for k in mine)
    assert ours.model.layer.scaling == theirs.model.layer.scaling


def test_initial_bits_of_low_precision_and_lora_bias():
    """Catches adapters that are drawn in the base's dtype, and a bias that is not drawn when it should be."""
    for init in (True, False):
        ours, theirs = pair(nn.Linear(IN, OUT).bfloat16(), values=None, init_lora_weights=init, lora_bias=True)
        for model in (ours, theirs):
            assert model.model.layer.lora_A["default"].weight.dtype == torch.bfloat16
            model._cast_adapter_dtype("default", True)
        mine, other = ours.state_dict(), theirs.state_dict()
        assert list(mine) == list(other) and "model.layer.lora_B.default.bias" in mine
        assert all(torch.equal(mine[k], other[k]) and mine[k].dtype == other[k].dtype for k in mine)


# -- forward and backward ------------------------------------------------------------------------------------------

VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True, "r": 6},
    "lora_bias": {"lora_bias": True},
    "alpha": {"lora_alpha": 31, "r": 3},
}


# An embedding refuses lora_bias: test_embedding_refuses_lora_bias.
@pytest.mark.parametrize(
    "kind, variant", sorted({(k, v) for k in BASES for v in VARIANTS} - {("embedding", "lora_bias")})
)
@pytest.mark.parametrize("names", [("default",), ("default", "second", "third")], ids=len)
def test_output_and_gradients_are_those_of_peft(kind, names, variant):
    """Catches a wrong scaling, a transposed weight, a bias counted twice, an adapter left out of several."""
    base = BASES[kind]()
    ours, theirs = pair(base, names, **VARIANTS[variant])
    assert ours.model.layer.explain_row("layer").fused
    assert_close(run(ours, inputs(base)), run(theirs, inputs(base)), torch.finfo(torch.float32).eps * 4)


@pytest.mark.parametrize("wide", [True, False], ids=["masters", "narrow"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", BASES)
def test_low_precision_keeps_dtypes_and_stays_near_the_truth(kind, dtype, wide):
    """Catches a widened output, a gradient in the wrong dtype, and an error beyond PEFT's own plus a few roundings."""
    base = BASES[kind]().to(dtype)
    ours, theirs = pair(base)
    for model in (ours, theirs):
        model._cast_adapter_dtype("default", wide)
    x = inputs(base, dtype)
    truth_model = copy.deepcopy(theirs).double()
    truth = run(truth_model, x.double() if x.is_floating_point() else x)
    mine, other = run(ours, x), run(theirs, x)
    assert {k: v.dtype for k, v in mine.items()} == {k: v.dtype for k, v in other.items()}
    for name, want in truth.items():
        allowed = (other[name].double() - want).abs().max() + 4 * torch.finfo(dtype).eps * want.abs().max()
        assert (mine[name].double() - want).abs().max() <= allowed, name


def test_autocast_is_that_of_peft():
    """Catches an output that is not in autocast's dtype, as the layers after it expect."""
    base = nn.Linear(IN, OUT)
    for names in (("default",), ("default", "second")):
        ours, theirs = pair(base, names)
        with torch.autocast("cpu", torch.bfloat16):
            mine, other = run(ours, inputs(base)), run(theirs, inputs(base))
        assert mine["y"].dtype == other["y"].dtype == torch.bfloat16
        assert_close(mine, other, torch.finfo(torch.bfloat16).eps)


def test_awkward_inputs():
    """Catches a dependence on contiguous rows, and an empty or one-dimensional input that fails."""
    ours, theirs = pair(nn.Linear(IN, OUT))
    x = padded_randn(7, IN, pad=3, dtype=torch.float32)
    for given in (x, x[:0], x[0], x.unsqueeze(0).expand(3, 7, IN)):
        torch.testing.assert_close(ours(given), theirs(given))


def test_dropout_is_a_mask_on_the_adapter_alone():
    """Catches dropout on the base's input, without the 1 / (1 - p), at the wrong rate, or in eval mode."""
    base = nn.Linear(IN, OUT)
    ours, _ = pair(base, lora_dropout=0.25, r=IN, lora_alpha=IN)
    layer = ours.model.layer
    for container in (layer.lora_A, layer.lora_B):
        container["default"].weight.data.zero_()
        container["default"].weight.data.diagonal().fill_(1.0)
    x = torch.ones(4000, IN)
    ours.train()
    added = (ours(x) - base(x)).detach()[:, : min(IN, OUT)]
    kept = added.abs() > 0.5
    torch.testing.assert_close(added[kept], torch.full_like(added[kept], 1 / 0.75))
    assert added[~kept].abs().max() < 1e-5
    share = (~kept).float().mean().item()
    assert abs(share - 0.25) < 5 * math.sqrt(0.25 * 0.75 / kept.numel())
    ours.eval()
    torch.testing.assert_close(ours(x), base(x) + x[:, :OUT])


def test_several_adapters_with_dropout_each_draw_their_own_mask():
    """Catches one mask shared by all adapters, and a first adapter that is the only one to drop."""
    ours, _ = pair(nn.Linear(IN, OUT), ("default", "second"), lora_dropout=0.5)
    ours.train()
    x = inputs(nn.Linear(1, 1)).detach()
    layer = ours.model.layer
    # With identity factors, an adapter's part shows its mask in the output.
    size = min(IN, OUT)
    masks = []
    for muted in ("second", "default"):
        for name in ("default", "second"):
            layer.lora_A[name].weight.data.zero_().diagonal().fill_(1.0)
            layer.lora_B[name].weight.data.zero_().diagonal().fill_(0.0 if name == muted else 1.0)
        torch.manual_seed(5)
        added = (ours(x) - layer.base_layer(x)).detach()[..., :size]
        masks.append(added.abs() > 1e-4)
    shown = masks[0][..., :3], masks[1][..., :3]
    assert all(0.1 < m.float().mean() < 0.9 for m in shown) and not torch.equal(*shown)


def test_layers_with_dropout_in_eval_are_fused_for_several_adapters(monkeypatch):
    """Catches several operations where one is enough, and one where dropout needs each adapter apart."""
    calls = []

    def counted(*args, **kwargs):
        calls.append(kwargs)
        return real(*args, **kwargs)

    real = layer_module.lora_linear
    monkeypatch.setattr(layer_module, "lora_linear", counted)
    ours, _ = pair(nn.Linear(IN, OUT), ("default", "second"), lora_dropout=0.5)
    x = inputs(nn.Linear(1, 1))
    ours.eval()
    ours(x)
    assert len(calls) == 1 and not calls[0]["training"]
    ours.train()
    ours(x)
    assert len(calls) == 2 and calls[1]["dropout_p"] == 0.5 and calls[1]["training"]


def test_trained_base_parameters_get_gradients():
    """Catches an operation that drops the gradient of a base weight or bias that is being trained."""
    for base in (nn.Linear(IN, OUT), conv1d()):
        ours, theirs = pair(base)
        for model in (ours, theirs):
            model.model.layer.base_layer.requires_grad_(True)
        mine, other = run(ours, inputs(base)), run(theirs, inputs(base))
        assert "model.layer.base_layer.weight" in mine and "model.layer.base_layer.bias" in mine
        assert_close(mine, other, torch.finfo(torch.float32).eps * 4)


def test_disabled_adapters_are_the_base_bit_for_bit():
    """Catches an adapter that leaks while disabled, and a merged one that stays in the weight."""
    for kind in BASES:
        base = BASES[kind]()
        ours, _ = pair(base)
        x = inputs(base).detach()
        ours.disable_adapter_layers()
        assert torch.equal(ours(x), base(x))
        ours.enable_adapter_layers()
        assert not torch.equal(ours(x), base(x))
        ours.merge_adapter()
        ours.disable_adapter_layers()
        torch.testing.assert_close(ours(x), base(x))
        assert not ours.model.layer.merged


# -- scaling, adding, deleting -------------------------------------------------------------------------------------


def test_scaling_methods_are_those_of_peft():
    """Catches a scale that diffusers sets and the layer does not follow."""
    ours, theirs = pair(nn.Linear(IN, OUT), ("default", "second"), use_rslora=True)
    mine, other = ours.model.layer, theirs.model.layer
    for change in (
        lambda layer: layer.scale_layer(3.0),
        lambda layer: layer.unscale_layer(2.0),
        lambda layer: layer.set_scale("second", 0.5),
        lambda layer: layer.set_scale("absent", 0.5),
        lambda layer: layer.unscale_layer(),
    ):
        change(mine)
        change(other)
        assert mine.scaling == other.scaling
        x = inputs(nn.Linear(1, 1))
        torch.testing.assert_close(ours(x), theirs(x))


def test_names_and_ranks_that_cannot_be_are_refused():
    """Catches a name that breaks state-dict keys, and re-making an adapter that is inside the weight."""
    layer = Linear(nn.Linear(4, 4), "default", LoraConfig())
    for name in ("", "a.b", "keys", 3):
        with pytest.raises(ValueError, match="adapter_name"):
            layer.update_layer(name, 2, 2, LoraConfig())
    with pytest.raises(ValueError, match="r must be"):
        layer.update_layer("x", 0, 2, LoraConfig())
    layer.merge()
    with pytest.raises(ValueError, match="merged"):
        layer.update_layer("default", 2, 2, LoraConfig())
    with pytest.raises(ValueError, match="merged"):
        layer.delete_adapter("default")


def test_embedding_refuses_lora_bias():
    """Catches a bias that an embedding's adapter has no place for."""
    with pytest.raises(ValueError, match="lora_bias"):
        Embedding(nn.Embedding(4, 4), "default", LoraConfig(lora_bias=True))


def test_adapter_names_are_refused():
    """Catches rows of a batch that all take the active adapter although each names its own."""
    linear = Linear(nn.Linear(4, 4), "a", LoraConfig())
    embedding = Embedding(nn.Embedding(4, 4), "a", LoraConfig())
    for layer, x in ((linear, torch.ones(1, 4)), (embedding, torch.ones(1, dtype=torch.int64))):
        with pytest.raises(NotImplementedError, match="adapter_names"):
            layer(x, adapter_names=["a"])


# -- when the base layer is called as it is ------------------------------------------------------------------------


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class DoubledConv1D(pytorch_utils.Conv1D):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Scaled(nn.Embedding):
    embed_scale = 3.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.embed_scale


def with_hook() -> nn.Module:
    layer = nn.Linear(IN, OUT)
    layer.register_forward_hook(lambda module, args, y: y + 1)
    return layer


def with_pre_hook() -> nn.Module:
    layer = nn.Linear(IN, OUT)
    layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    return layer


def with_own_forward() -> nn.Module:
    layer = nn.Linear(IN, OUT)
    plain = layer.forward
    layer.forward = lambda x: plain(x) + 5
    return layer


AS_IS = {
    "forward hook": (with_hook, "hooks"),
    "forward pre-hook": (with_pre_hook, "hooks"),
    "subclass": (lambda: Doubled(IN, OUT), "forward of its own"),
    "Conv1D subclass": (lambda: DoubledConv1D(OUT, IN), "forward of its own"),
    "instance forward": (with_own_forward, "forward of its own"),
    "parametrization": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(IN, OUT)), "parametrized"),
    "embedding subclass": (lambda: Scaled(VOCAB, OUT), "forward of its own"),
    "max_norm": (lambda: nn.Embedding(VOCAB, OUT, max_norm=1e6), "max_norm"),
}


@pytest.mark.parametrize("case", AS_IS)
def test_base_layers_that_do_more_are_called_and_explained(case):
    """Catches a fused path that skips what a hook, a parametrization or a forward of its own does."""
    make, words = AS_IS[case]
    base = make()
    ours, theirs = pair(base, ("default", "second"))
    row = ours.model.layer.explain_row("layer")
    assert not row.fused and words in row.reason and row.name == "layer"
    x = inputs(base)
    assert_close(run(ours, x), run(theirs, x), torch.finfo(torch.float32).eps * 4)


def test_offloaded_base_is_called_and_adapters_stay_on_the_device():
    """Catches the silently wrong result of using a weight that accelerate keeps on the meta device."""
    accelerate = pytest.importorskip("accelerate")
    model = Holder(nn.Linear(IN, OUT))
    want = copy.deepcopy(model)
    weights = {k: v.clone() for k, v in model.layer.state_dict().items()}
    hook = accelerate.hooks.AlignDevicesHook(execution_device="cpu", offload=True, weights_map=weights)
    accelerate.hooks.add_hook_to_module(model.layer, hook)
    assert model.layer.weight.is_meta
    tuned = LoraModel(model, LoraConfig(target_modules=["layer"]), "default")
    assert tuned.model.layer.lora_A["default"].weight.device.type == "cpu"
    randomize(tuned, ("lora_",))
    layer = tuned.model.layer
    assert "accelerate" in layer.explain_row().reason
    x = inputs(nn.Linear(1, 1)).detach()
    delta = (layer.lora_B["default"].weight @ layer.lora_A["default"].weight) * layer.scaling["default"]
    torch.testing.assert_close(tuned(x), want(x) + x @ delta.T)


def test_adapter_modules_that_do_more_are_called():
    """Catches a fused path around a hook on lora_A, a replaced dropout, or an adapter in a narrower dtype."""
    ours, theirs = pair(nn.Linear(IN, OUT))
    for model in (ours, theirs):
        model.model.layer.lora_A["default"].register_forward_hook(lambda module, args, y: y * 2)
    assert "hooks" in ours.model.layer.explain_row().reason
    torch.testing.assert_close(ours(inputs(nn.Linear(1, 1))), theirs(inputs(nn.Linear(1, 1))))

    ours, theirs = pair(nn.Linear(IN, OUT))
    for model in (ours, theirs):
        model.model.layer.lora_A.bfloat16()
        model.model.layer.lora_B.bfloat16()
    assert "torch.bfloat16 beside" in ours.model.layer.explain_row().reason
    assert torch.equal(ours(inputs(nn.Linear(1, 1))), theirs(inputs(nn.Linear(1, 1))))

    ours, _ = pair(nn.Linear(IN, OUT))
    ours.model.layer.lora_dropout["default"] = nn.AlphaDropout(0.5)
    assert "AlphaDropout" in ours.model.layer.explain_row().reason


def test_explain_row_says_when_the_base_runs_alone():
    """Catches a table that calls a merged or disabled layer fused."""
    ours, _ = pair(nn.Linear(IN, OUT), ("default", "second"))
    layer = ours.model.layer
    row = layer.explain_row("layer")
    assert (row.kind, row.in_features, row.out_features, row.r) == ("Linear", IN, OUT, 8 + 3)
    assert row.dtype == torch.float32 and row.fused and row.reason == "" and layer.plan(5).path == "torch"
    layer.merge()
    assert "default, second merged" in layer.explain_row().reason and layer.plan(5).path == "unfused"
    layer.unmerge()
    layer.enable_adapters(False)
    assert "disabled" in layer.explain_row().reason
    layer.enable_adapters(True)
    row = Embedding(nn.Embedding(4, 3), "default", LoraConfig(r=2))
    assert row.explain_row().r == 2 and row.plan(5).path == "torch"
    layer.set_adapter([])
    assert "no active adapter" in layer.explain_row().reason


def test_compiles_without_a_graph_break_and_checkpoints():
    """Catches Python in forward that Dynamo cannot follow, and dropout that differs when recomputed."""
    layer = peftkern.nn.LoraLinear(IN, OUT, r=4, lora_dropout=0.5, init_lora_weights=False)
    x = inputs(nn.Linear(1, 1))
    for mode in (True, False):
        layer.train(mode)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        torch.manual_seed(5)
        want = layer(x)
        torch.manual_seed(5)
        torch.testing.assert_close(compiled(x), want)
    layer.train()
    for reentrant in (True, False):
        grads = []
        for use in (True, False):
            layer.zero_grad()
            torch.manual_seed(5)
            y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant) if use else layer(x)
            y.square().sum().backward()
            grads.append([p.grad.clone() for p in layer.parameters() if p.requires_grad])
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# -- the layers by themselves --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "no_bias", "conv1d"])
def test_from_linear_is_the_same_layer(kind):
    """Catches a second implementation that drifts, and a copy of the weight where it should be shared."""
    base = BASES[kind]()
    config = {"r": 4, "lora_alpha": 16, "use_rslora": True, "init_lora_weights": "gaussian"}
    torch.manual_seed(7)
    layer = peftkern.nn.LoraLinear.from_linear(base, **config)
    ours, _ = pair(base, values=None, **config)
    assert layer.base_layer is base and not base.weight.requires_grad
    mine, other = layer.state_dict(), ours.model.layer.state_dict()
    assert list(mine) == list(other) and all(torch.equal(mine[k], other[k]) for k in mine)
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == [
        "lora_A.default.weight",
        "lora_B.default.weight",
    ]
    assert isinstance(layer, Linear)


def test_lora_linear_by_itself():
    """Catches an adapter in the wrong dtype or on the wrong device, and a merge that changes the output."""
    layer = peftkern.nn.LoraLinear(IN, OUT, r=3, bias=False, dtype=torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16 and layer.lora_A["default"].weight.dtype == torch.float32
    assert layer.bias is None and layer.r == {"default": 3} and layer.scaling == {"default": 8 / 3}
    narrow = peftkern.nn.LoraLinear(IN, OUT, dtype=torch.bfloat16, adapter_dtype=torch.bfloat16)
    assert narrow.lora_B["default"].weight.dtype == torch.bfloat16
    assert peftkern.nn.LoraLinear(IN, OUT, dtype=torch.float64).lora_A["default"].weight.dtype == torch.float64
    meta = peftkern.nn.LoraLinear(IN, OUT, device="meta")
    assert all(p.is_meta for p in meta.parameters())
    layer = peftkern.nn.LoraLinear(IN, OUT, init_lora_weights=False)
    x = inputs(nn.Linear(1, 1)).detach()
    want = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), want)
    layer.unmerge()
    torch.testing.assert_close(layer(x), want)
    with pytest.raises(ValueError, match="r must"):
        peftkern.nn.LoraLinear(IN, OUT, r=0)
    with pytest.raises(TypeError, match="Conv2d"):
        peftkern.nn.LoraLinear.from_linear(nn.Conv2d(1, 1, 1))
    with pytest.raises(TypeError, match=r"this LoraLinear has an adapter already; for a new one .*get_base_layer"):
        peftkern.nn.LoraLinear.from_linear(layer)
    with pytest.raises(TypeError, match="x in torch.float16 and weight in torch.float32: cast x, or run under"):
        layer(x.half())


def test_sizes_and_dtypes_that_no_layer_has_are_refused_before_anything_is_frozen():
    """Catches a base that is frozen by a call that fails, and an `adapter_dtype` that `.to()` takes for a device, or
    that no operation can multiply."""
    nn_, linear, embedding = peftkern.nn, nn.Linear(IN, OUT), nn.Embedding(VOCAB, OUT)
    for wrong in ("cpu", torch.complex64, torch.int64, 3):
        for call in (
            lambda wrong=wrong: nn_.LoraLinear(IN, OUT, adapter_dtype=wrong),
            lambda wrong=wrong: nn_.LoraLinear.from_linear(linear, adapter_dtype=wrong),
            lambda wrong=wrong: nn_.LoraEmbedding.from_embedding(embedding, adapter_dtype=wrong),
            lambda wrong=wrong: nn_.IA3Linear.from_linear(linear, adapter_dtype=wrong),
            lambda wrong=wrong: nn_.IA3Linear(IN, OUT, dtype=wrong),
            lambda wrong=wrong: nn_.LoraEmbedding(VOCAB, OUT, dtype=wrong),
        ):
            with pytest.raises(TypeError, match="dtype: expected float32"):
                call()
    assert all(p.requires_grad for p in (*linear.parameters(), *embedding.parameters()))
    for sizes in ((-1, OUT), (IN, 0), (IN, 2.5), (None, OUT), (True, OUT)):
        for layer in (nn_.LoraLinear, nn_.IA3Linear, nn_.LoraEmbedding):
            with pytest.raises(ValueError, match="expected an int of at least 1"):
                layer(*sizes)
    with pytest.raises(ValueError, match="padding_idx"):
        nn_.LoraEmbedding(VOCAB, OUT, padding_idx=VOCAB)


def test_lora_embedding_by_itself():
    """Catches an embedding door that is another implementation, and a padding row that is trained."""
    base = nn.Embedding(VOCAB, OUT, padding_idx=3)
    layer = peftkern.nn.LoraEmbedding.from_embedding(base, r=4, init_lora_weights=False)
    assert layer.base_layer is base and isinstance(layer, Embedding)
    layer(torch.arange(VOCAB)).sum().backward()
    grad = layer.lora_embedding_A["default"].grad
    assert (grad[:, 3] == 0).all() and (grad[:, 4] != 0).any()
    made = peftkern.nn.LoraEmbedding(VOCAB, OUT, padding_idx=3, dtype=torch.bfloat16)
    assert made.lora_embedding_A["default"].dtype == torch.float32 and made.base_layer.padding_idx == 3
    assert torch.equal(made(torch.arange(VOCAB)), made.base_layer(torch.arange(VOCAB)))
    with pytest.raises(TypeError, match="Linear"):
        peftkern.nn.LoraEmbedding.from_embedding(nn.Linear(1, 1))
    with pytest.raises(TypeError, match="this LoraEmbedding has an adapter already"):
        peftkern.nn.LoraEmbedding.from_embedding(layer)


def test_a_base_layer_that_returns_a_tuple_is_refused_in_words():
    """Catches a router (Llama 4's, PhiMoE's) on which the sum of a tuple and a tensor fails, without a word of why."""

    class Router(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    layer = Linear(Router(8, 4), "default", LoraConfig(r=2))
    with pytest.raises(TypeError, match="a Router, returned a tuple .*exclude_modules"):
        layer(torch.randn(3, 8))


@pytest.mark.parametrize(
    "base, layout", [(nn.Linear, torch.jagged), (nn.Linear, torch.strided), (nn.Embedding, torch.jagged)]
)
def test_rows_of_several_lengths(base, layout):
    """Catches an operation that is given a nested tensor, whose shape it cannot know (packed sequences of a batch)."""
    found = []
    for library in (peftkern, pytest.importorskip("peft")):
        torch.manual_seed(0)
        model = library.get_peft_model(Holder(base(IN, OUT)), library.LoraConfig(r=2, target_modules=["layer"]))
        randomize(model)
        rows = [torch.ones(n, IN) if base is nn.Linear else torch.arange(n) for n in (2, 5)]
        y = model.base_model.model.layer(torch.nested.nested_tensor(rows, layout=layout)).unbind()
        sum(part.sum() for part in y).backward()
        found.append([*y, *(p.grad for p in model.parameters() if p.grad is not None)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)
