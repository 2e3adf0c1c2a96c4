"""LoRA on `nn.MultiheadAttention` beside real PEFT's: names, bits, outputs, gradients, merging, files, fast paths."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import peftkern
from lora_pairs import assert_close
from peftkern.tuners.lora import LoraConfig, LoraModel
from peftkern.tuners.lora.attention import AttentionOutput, MultiheadAttention
from peftkern.utils import hotswap
from peftkern.utils.warning import PeftWarning
from tiny_models import randomize

peft = pytest.importorskip("peft")

E, EPS = 8, torch.finfo(torch.float32).eps * 16
BASES: dict[str, dict[str, Any]] = {
    "batch_first": {"batch_first": True},
    "plain": {},
    "no_bias": {"bias": False, "batch_first": True},
    "bias_kv": {"add_bias_kv": True, "add_zero_attn": True},
}
CALLS: dict[str, dict[str, Any]] = {
    "weights": {},
    "each_head": {"average_attn_weights": False},
    "no_weights": {"need_weights": False},
    "mask": {"attn_mask": torch.ones(5, 5).triu(1).bool(), "is_causal": True, "need_weights": False},
}


class Net(nn.Module):
    """Attention of x to itself or, `cross`, to another sequence."""

    def __init__(self, cross: bool = False, **options: Any) -> None:
        super().__init__()
        self.attn, self.cross = nn.MultiheadAttention(E, 2, **options), cross
        self.calls: dict[str, Any] = {}
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        other = x.flip(0) if self.cross else x
        y, weights = self.attn(x, other, other, **self.calls)
        return y if weights is None else torch.cat([y.flatten(), weights.flatten()])


def net(**options: Any) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net(**options)


def tokens(seed: int = 1) -> torch.Tensor:
    return torch.randn(5, 5, E, generator=torch.Generator().manual_seed(seed))


def adapted(
    names: tuple[str, ...] = ("default",), library: Any = peftkern, base: Any = None, wide: bool = True, **fields: Any
) -> Any:
    """A model with adapters of random values."""
    fields = {"target_modules": ["attn"], "r": 2, "lora_alpha": 3} | fields
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = library.LoraConfig(**fields)
        model = library.get_peft_model(copy.deepcopy(base or net()), config, names[0], autocast_adapter_dtype=wide)
        for name in names[1:]:
            model.add_adapter(name, library.LoraConfig(**({"rank_pattern": {"attn": 3}} | fields)))
    model.base_model.set_adapter(list(names))
    randomize(model, ("lora_",))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data *= 4
    return model


def run(model: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(4)))
    return {"y": y.detach(), "x": x.grad} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def merged_by_hand(model: Any, made: Any = None) -> Net:
    """The base model, or `made`, with what PEFT 0.21.2 computes in its weights."""
    layer, made = model.base_model.model.attn, net() if made is None else made
    output = layer.base_layer.out_proj
    for name in layer.active_adapters:
        for held, weight, factor in ((layer, made.attn.in_proj_weight, 1), (output, made.attn.out_proj.weight, 2)):
            delta = held.lora_B[name].weight @ held.lora_A[name].weight * held.scaling[name]
            weight.data += factor * delta.detach()
    return made


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_initial_bits_are_those_of_peft(init):
    """Catches another number of draws (PEFT draws out_proj's factors twice), and names that differ from PEFT's."""
    models = []
    for library in (peftkern, peft):
        base = net()
        torch.manual_seed(7)
        config = library.LoraConfig(target_modules=["attn"], r=3, init_lora_weights=init)
        models.append(library.get_peft_model(base, config))
        models[-1].add_adapter("second", library.LoraConfig(target_modules=["attn"], r=2, init_lora_weights=init))
    mine, other = (model.state_dict() for model in models)
    assert set(mine) == set(other) and all(torch.equal(mine[name], other[name]) for name in other)
    grads = [{name: p.requires_grad for name, p in model.named_parameters()} for model in models]
    assert grads[0] == grads[1]


@pytest.mark.parametrize("names", [("default",), ("default", "second")], ids=len)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", BASES)
def test_output_and_gradients_are_those_of_peft(kind, call, names):
    """Catches a weight without its adapter, another factor of out_proj, and a fast path that computes another thing."""
    base = net(**BASES[kind])
    base.calls = CALLS[call]
    ours, theirs = (adapted(names, library, base, use_rslora=True) for library in (peftkern, peft))
    mine, want = run(ours, tokens()), run(theirs, tokens())
    for name in want:
        if "out_proj.lora_" in name:  # PEFT counts the second of the two deltas without a gradient
            want[name] = 2 * want[name]
    # Of several adapters PEFT gives the last one alone gradients.
    assert len(mine) == 2 + 4 * len(names) and set(want) == {n for n in mine if f".{names[-1]}." in n} | {"y", "x"}
    assert_close({name: mine[name] for name in want}, want, EPS)
    for model in (ours, theirs):
        model.eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens()), theirs(tokens()))


def test_gradients_are_those_of_the_output():
    """Catches half a gradient, which PEFT's out_proj gets, and none, as an adapter beside another, by differences."""
    model = adapted(("default", "second"), base=net(cross=True)).double()
    x = tokens().double()
    grads = run(model, x)
    y = torch.randn(model(x).shape, generator=torch.Generator().manual_seed(4)).double()  # as in `run`
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            continue
        with torch.no_grad():
            sides = []
            for step in (1e-5, -2e-5, 1e-5):
                parameter.view(-1)[1] += step
                sides.append((model(x) * y).sum().item())
        assert abs((sides[0] - sides[1]) / 2e-5 - grads[name].view(-1)[1].item()) < 1e-5, name


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("names", [("default",), ("default", "second")], ids=len)
def test_merging_is_that_of_peft(names, safe_merge):
    """Catches a weight that is merged once where forward adds it twice, or that does not come out again."""
    models = [adapted(names, library).eval() for library in (peftkern, peft)]
    before, weights = models[0](tokens()).detach(), copy.deepcopy(models[0].state_dict())
    for model in models:
        model.merge_adapter(safe_merge=safe_merge)
    torch.testing.assert_close(models[0](tokens()), before)
    mine, other = (model.state_dict() for model in models)
    for name in other:
        torch.testing.assert_close(mine[name], other[name])
    models[0].unmerge_adapter()
    for name, value in models[0].state_dict().items():
        torch.testing.assert_close(value, weights[name])
    plain = models[0].merge_and_unload(safe_merge=safe_merge)
    assert [type(module) for module in plain.modules()] == [type(module) for module in net().modules()]
    assert list(plain.state_dict()) == list(net().state_dict())
    torch.testing.assert_close(plain(tokens()), before)


def test_a_merge_that_is_not_finite_leaves_everything_alone():
    """Catches an in_proj that is merged before out_proj is looked at."""
    model = adapted()
    model.base_model.model.attn.base_layer.out_proj.lora_B["default"].weight.data[0, 0] = torch.inf
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="not finite"):
        model.merge_adapter(safe_merge=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_unloading_and_deleting_and_disabling():
    """Catches an out_proj that stays wrapped, keeps an adapter that in_proj lost, or is added while disabled."""
    model = adapted(("default", "second")).eval()
    both = model(tokens())
    with model.disable_adapter():
        assert torch.equal(model(tokens()), net().eval()(tokens()))
    assert torch.equal(model(tokens()), both)
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(model(tokens()), net().eval()(tokens()))
    torch.testing.assert_close(model(tokens()), both)
    model.set_adapter("second")
    torch.testing.assert_close(model(tokens()), merged_by_hand(model).eval()(tokens()))
    model.delete_adapter("default")
    layers = [module for module in model.modules() if isinstance(module, MultiheadAttention | AttentionOutput)]
    assert [list(layer.lora_A) for layer in layers] == [["second"], ["second"]]
    plain = model.unload()
    assert list(plain.state_dict()) == list(net().state_dict())
    torch.testing.assert_close(plain.eval()(tokens()), net().eval()(tokens()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", [True, False], ids=["masters", "narrow"])
def test_low_precision_keeps_dtypes_and_stays_near_the_truth(dtype, wide):
    """Catches a widened output and an error beyond PEFT's own plus a few roundings."""
    models = [adapted(library=library, base=net().to(dtype), wide=wide) for library in (peftkern, peft)]
    for model in models:
        assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32 if wide else dtype}
        model.base_model.model.calls = {"need_weights": False}
    exact = copy.deepcopy(models[0]).float()
    truth = merged_by_hand(exact, copy.deepcopy(exact).unload())
    truth.calls = {"need_weights": False}
    x = tokens().to(dtype)
    mine, other = (model(x) for model in models)
    want = truth(x.float())
    assert mine.dtype == other.dtype == dtype
    allowed = (other.float() - want).abs().max() + 4 * torch.finfo(dtype).eps * want.abs().max()
    assert (mine.float() - want).abs().max() <= allowed


def test_autocast_is_that_of_peft():
    """Catches an output in another dtype than PEFT's, which is the query's, and a delta that is rounded on its way."""
    models = [adapted(library=library) for library in (peftkern, peft)]
    want = models[0](tokens())
    with torch.autocast("cpu", torch.bfloat16):
        mine, other = (model(tokens()) for model in models)
    assert mine.dtype == other.dtype == torch.float32
    allowed = (other - want).abs().max() + 4 * torch.finfo(torch.bfloat16).eps * want.abs().max()
    assert (mine - want).abs().max() <= allowed


# -- what takes the weights past the layer -----------------------------------------------------------------------------


class Encoder(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(E, 2, 16, dropout=0.0, batch_first=True)
        self.layer = nn.TransformerEncoder(layer, layers) if layers else layer

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return self.layer(x, **kwargs)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("layers", [0, 2])
def test_an_encoder_layer_does_not_take_the_base_weights(layers, padded):
    """Catches adapters that do nothing in evaluation, as PEFT's: torch's fast path reads weights and calls nothing."""
    torch.manual_seed(3)
    base = Encoder(layers)
    model = adapted(base=base, target_modules=["self_attn"])
    options: dict[str, Any] = {}
    if padded:
        options["src_key_padding_mask"] = torch.arange(5).expand(5, 5) >= torch.tensor([5, 5, 3, 4, 2])[:, None]
    kept = ~options["src_key_padding_mask"] if padded else torch.ones(5, 5).bool()
    x = tokens()
    want = model.train()(x, **options)[kept]
    assert not torch.allclose(want, base.train()(x, **options)[kept], atol=1e-2)
    model.eval()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # nested tensors are a prototype
        torch.testing.assert_close(model(x, **options)[kept], want)
        with model.disable_adapter():
            torch.testing.assert_close(model(x, **options)[kept], base.eval()(x, **options)[kept])
        model.merge_adapter()
        torch.testing.assert_close(model(x, **options)[kept], want)
        with model.disable_adapter():  # unmerges within forward, which a fast path would pass by
            torch.testing.assert_close(model(x, **options)[kept], base(x, **options)[kept])


def test_compiled_and_checkpointed_it_is_the_same():
    """Catches weights that are put in place in Python alone, or not again when a region is computed again."""
    model = adapted(base=net(cross=True))
    model.base_model.model.calls = {"need_weights": False}
    want = run(model, tokens())
    compiled = torch.compile(model, backend="eager")
    assert_close({k.removeprefix("_orig_mod."): v for k, v in run(compiled, tokens()).items()}, want, EPS)

    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)

    assert_close({k.removeprefix("inner."): v for k, v in run(Again(), tokens()).items()}, want, EPS)


# -- files, combinations, swaps ----------------------------------------------------------------------------------------


def saved(folder: Path, library: Any = peftkern, **fields: Any) -> tuple[Path, torch.Tensor]:
    model = adapted(library=library, **fields).eval()
    model.save_pretrained(folder)
    return folder, model(tokens()).detach()


@pytest.mark.parametrize(
    "fields", [{}, {"rank_pattern": {"attn": 4}, "alpha_pattern": {"attn": 7}}], ids=["", "patterns"]
)
def test_files_go_both_ways(tmp_path, fields):
    """Catches a name that the other library does not know, and a pattern that out_proj does not follow."""
    for writer, reader in ((peftkern, peft), (peft, peftkern)):
        folder, want = saved(tmp_path / writer.__name__, writer, **fields)
        read = reader.PeftModel.from_pretrained(net(), str(folder)).eval()
        torch.testing.assert_close(read(tokens()), want)
    lean = peftkern.PeftModel.from_pretrained(net(), str(tmp_path / "peft"), low_cpu_mem_usage=True).eval()
    torch.testing.assert_close(lean(tokens()), want)


@pytest.mark.parametrize("how", ["linear", "cat", "svd"])
def test_combinations_are_those_of_peft(how):
    """Catches a combination of in_proj alone."""
    models = []
    for library in (peftkern, peft):
        model = adapted(("law", "code"), library, rank_pattern={}).eval()
        model.add_weighted_adapter(["law", "code"], [0.7, 0.4], "both", combination_type=how)
        model.set_adapter("both")
        models.append(model)
    torch.testing.assert_close(models[0](tokens()), models[1](tokens()))


@pytest.mark.parametrize("prepared", [False, True])
def test_a_swapped_model_is_the_other_one(tmp_path, prepared):
    """Catches an out_proj whose alpha is looked for under a name that no pattern means."""
    first, before = saved(tmp_path / "first")
    second, want = saved(tmp_path / "second", r=3, alpha_pattern={"attn": 7}, init_lora_weights=False)
    model = peftkern.PeftModel.from_pretrained(net(), str(first)).eval()
    if prepared:
        hotswap.prepare_model_for_compiled_hotswap(model, target_rank=4)
        torch.testing.assert_close(model(tokens()), before)
    hotswap.hotswap_adapter(model, second, "default")
    torch.testing.assert_close(model(tokens()), want)
    model.save_pretrained(tmp_path / "again")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = peftkern.PeftModel.from_pretrained(net(), str(tmp_path / "again")).eval()
    torch.testing.assert_close(again(tokens()), want)


# -- what is told and refused ------------------------------------------------------------------------------------------


def test_explain_says_how_it_runs():
    """Catches an out_proj that is told to be one operation, and is never called."""
    rows = peftkern.explain(adapted()).rows
    assert [(row.path, row.in_features, row.out_features, row.dtype) for row in rows] == [
        ("unfused", E, 3 * E, "float32"),
        ("unfused", E, E, "float32"),
    ]
    assert all("reads its weights" in row.reason for row in rows)
    assert {row.path for row in peftkern.explain(adapted(), mixed=True).rows} == {"refused"}


@pytest.mark.parametrize(
    "options, fields, error, message",
    [
        ({"kdim": 4, "vdim": 4}, {}, ValueError, "'attn'.*one size"),
        ({}, {"use_dora": True}, ValueError, "use_dora=True does not go with 'attn'"),
        ({}, {"lora_bias": True}, ValueError, "lora_bias=True does not go with 'attn'"),
        ({}, {"init_lora_weights": "pissa"}, ValueError, "'pissa' does not go with 'attn'"),
        ({}, {"init_lora_weights": "orthogonal"}, ValueError, "'orthogonal' does not go with 'attn'"),
        ({}, {"target_modules": ["attn", "out_proj"]}, ValueError, "out_proj.*without calling"),
    ],
)
def test_what_cannot_be_adapted_is_refused_and_nothing_is_changed(options, fields, error, message):
    """Catches an attention that is half adapted, and fields that PEFT takes and that then do something else."""
    base = net(**options)
    before = list(base.state_dict())
    with pytest.raises(error, match=message):
        LoraModel(base, LoraConfig(**({"target_modules": ["attn"], "r": 2} | fields)), "default")
    assert list(base.state_dict()) == before and type(base.attn) is nn.MultiheadAttention


def test_other_refusals():
    """Catches a batch whose rows all take one adapter, an out_proj without a matrix, and dropout without a word."""
    model = adapted(("x", "y")).eval()
    with pytest.raises(NotImplementedError, match=r"\['x', 'y'\] are on nn.MultiheadAttention"):
        model(tokens(), adapter_names=["x", "y", "x", "y", "x"])
    with pytest.raises(NotImplementedError, match="model: .*nn.MultiheadAttention"):
        peftkern.AdapterBank(model)
    with pytest.raises(ValueError, match="means nn.MultiheadAttention in this model .'attn'"):
        peftkern.AdapterBank(net(), target_modules=["attn"])
    layer = model.base_model.model.attn
    with pytest.raises(NotImplementedError, match="adapter_names"):
        layer(tokens(), tokens(), tokens(), adapter_names=["x"] * 5)
    base = net()
    base.attn.out_proj = nn.Sequential(base.attn.out_proj)
    with pytest.raises(TypeError, match="'attn'.*dense nn.Linear, got a Sequential"):
        LoraModel(base, LoraConfig(target_modules=["attn"]), "default")
    with pytest.warns(PeftWarning, match=r"lora_dropout=0\.1 does nothing"):
        LoraModel(net(), LoraConfig(target_modules=["attn"], lora_dropout=0.1), "default")
    lean = LoraModel(net(), LoraConfig(target_modules=["attn"]), "default", low_cpu_mem_usage=True)
    with pytest.raises(ValueError, match="adapter 'default' of an attention is on the meta device"):
        lean(tokens())
