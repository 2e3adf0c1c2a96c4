"""LoRA's `add_weighted_adapter` beside real PEFT's: every combination, its values, outputs, files and errors."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from numerics import EPS32, assert_rounded
from peftkern import LoraConfig, PeftModel, get_peft_model
from peftkern.tuners.lora import LoraModel
from peftkern.tuners.lora.weighted import COMBINATIONS
from tiny_models import VOCAB, fingerprint, ids, randomize, tiny_llama

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

STACKING = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
# Of the first two the ranks are equal; "c" has another, and is where "b" is not.
ADAPTERS = {
    "a": {"r": 4, "lora_alpha": 8, "target_modules": ["emb", "mix", "up", "down"]},
    "b": {"r": 4, "lora_alpha": 2, "target_modules": ["mix", "up"]},
    "c": {"r": 3, "lora_alpha": 7, "target_modules": ["emb", "mix", "down"]},
}


class Net(nn.Module):
    """An embedding, a Conv1D and linear layers of odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(VOCAB, 13)
        self.mix = transformers.pytorch_utils.Conv1D(21, 13)
        self.up = nn.Linear(21, 29)
        self.down = nn.Linear(29, 17)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(self.mix(self.emb(ids))))


def quiet(function: Any, *args: Any, **kwargs: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return Net().to(dtype).eval()


def adapted(library: Any, base: nn.Module, adapters: dict[str, dict[str, Any]]) -> Any:
    """The library's LoRA on a copy of `base` with these adapters, of values that are the same for every library."""
    tuner, config = (LoraModel, LoraConfig) if library is None else (library.LoraModel, library.LoraConfig)
    names = list(adapters)
    model = quiet(tuner, copy.deepcopy(base), config(**adapters[names[0]]), names[0])
    for name in names[1:]:
        model.peft_config[name] = config(**adapters[name])
        quiet(model.inject_adapter, model.model, name)
    randomize(model, ("lora_",))
    return model


def both(base: nn.Module | None = None, adapters: dict[str, dict[str, Any]] = ADAPTERS) -> list[Any]:
    base = net() if base is None else base
    return [adapted(library, base, adapters) for library in (None, peft)]


def combine(model: Any, names: list[str], weights: list[float], how: str, seed: int = 5, **options: Any) -> Any:
    """Adds the combination "new" after that seed, and makes it active."""
    torch.manual_seed(seed)
    quiet(model.add_weighted_adapter, names, weights, "new", how, **options)
    model.set_adapter("new")
    return model


def factors(model: Any, name: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A and B of an adapter by the layer's name."""
    found = {}
    for key, layer in model.model.named_modules():
        if name in getattr(layer, "lora_embedding_A", ()):
            found[key] = (layer.lora_embedding_A[name].detach(), layer.lora_embedding_B[name].detach())
        elif name in getattr(layer, "lora_A", ()):
            found[key] = (layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach())
    return found


def assert_near(got: torch.Tensor, want: torch.Tensor, terms: int) -> None:
    """Within `terms` roundings of float32 of the largest value: both are sums of about that many terms."""
    assert got.shape == want.shape and got.dtype == want.dtype
    assert (got - want).abs().max() <= 2 * terms * EPS32 * want.abs().max().clamp(min=1e-3)


def with_signs_of(pair: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B whose components have the signs of another's: singular vectors have none of their own."""
    (A, B), (want, _) = pair, other
    sign = torch.where((A * want).sum(1) < 0, -1.0, 1.0)
    return A * sign[:, None], B * sign


# -- every combination -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [[0.7, 1.3, 0.4], [0.9, -0.6, -1.1]])
@pytest.mark.parametrize("how", COMBINATIONS)
def test_combinations_are_those_of_peft(how, weights):
    """Catches a wrong factor, sign, mask or order of draws in any combination, on any kind of layer; layers that not
    every adapter has; another rank, alpha or set of targets; an adapter that trains before it is active."""
    names = ["a", "b"] if how in STACKING else ["a", "b", "c"]
    options = {} if how in ("linear", "svd", "cat") else {"density": 0.6}
    models = both()
    for model in models:
        combine(model, names, weights[: len(names)], how, **options)
        model.set_adapter("a")
    ours, theirs = models
    assert not any(p.requires_grad for n, p in theirs.named_parameters() if ".new" in n)
    for field in ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "bias", "fan_in_fan_out"):
        assert getattr(ours.peft_config["new"], field) == getattr(theirs.peft_config["new"], field), field
    assert [n for n, p in ours.named_parameters() if p.requires_grad] == [
        n for n, p in theirs.named_parameters() if p.requires_grad
    ]
    mine, other = factors(ours, "new"), factors(theirs, "new")
    assert mine.keys() == other.keys() and len(mine) == 4
    for key, want in other.items():
        got = with_signs_of(mine[key], want) if how == "svd" else mine[key]
        for t, w in zip(got, want, strict=True):
            assert_near(t, w, 64 if how.endswith("svd") else 8)
    for model in models:
        model.set_adapter("new")
    assert_near(ours(ids()), theirs(ids()), 64)


@pytest.mark.parametrize("options", [{"majority_sign_method": "frequency"}, {"density": 1.0}, {"density": 0.0}])
@pytest.mark.parametrize("how", ["ties", "ties_svd", "dare_ties"])
def test_options_of_ties_are_those_of_peft(how, options):
    """Catches a majority of another kind, and the ends of the density's range."""
    options = {"density": 0.5} | options
    if how == "dare_ties" and options["density"] == 0:  # PEFT divides by it
        return
    ours, theirs = (combine(model, ["a", "b"], [0.7, -0.4], how, **options) for model in both())
    assert_near(ours(ids()), theirs(ids()), 64)


@pytest.mark.parametrize(
    "options", [{"svd_rank": 2}, {"svd_clamp": 0.9}, {"svd_rank": 9}, {"svd_full_matrices": False}]
)
def test_options_of_svd_are_those_of_peft(options):
    """Catches a rank that is not cut, another quantile, and a clamp that hits one of the two only."""
    ours, theirs = (combine(model, ["a", "b"], [0.7, -0.4], "svd", **options) for model in both())
    assert ours.peft_config["new"].r == theirs.peft_config["new"].r
    assert_near(ours(ids()), theirs(ids()), 64)


def test_a_combination_has_the_exact_value():
    """Catches an error that PEFT shares: cat, and svd of enough rank, are the sum of the deltas; svd of less is the
    nearest of its rank."""
    models = {how: combine(both()[0], ["a", "b", "c"], [0.7, -1.3, 0.4], *how) for how in (("svd",), ("cat",))}
    models["full"] = combine(both()[0], ["a", "b", "c"], [0.7, -1.3, 0.4], "svd", svd_rank=25)  # more than any side
    for how, model in models.items():
        for key, (A, B) in factors(model, "new").items():
            layer = model.model.get_submodule(key)
            held = [(n, w) for n, w in zip("abc", [0.7, -1.3, 0.4], strict=True) if n in layer.scaling]
            parts = [(*(t.double() for t in factors(model, n)[key]), w * layer.scaling[n]) for n, w in held]
            truth = sum(f * (B_i @ A_i) for A_i, B_i, f in parts)
            magnitude = sum(abs(f) * (B_i.abs() @ A_i.abs()) for A_i, B_i, f in parts)
            got = B.double() @ A.double()
            assert A.shape[0] == B.shape[1] == model.peft_config["new"].r
            if how != ("svd",):
                floor = magnitude if how == ("cat",) else magnitude.max().expand_as(magnitude)
                assert_rounded(got.float(), truth, floor, terms=32)
                continue
            S = torch.linalg.svdvals(truth)
            error, least = torch.linalg.matrix_norm(got - truth), S[model.peft_config["new"].r :].norm()
            assert error <= least * (1 + 1e-5) + 32 * EPS32 * S[0]


def test_one_adapter_is_scaled_whatever_the_combination():
    """Catches an SVD, or a density asked for, where there is nothing to combine."""
    ours, theirs = (combine(model, ["a"], [-0.5], "ties_svd") for model in both())
    for (A, B), (want_A, want_B) in zip(factors(ours, "new").values(), factors(theirs, "new").values(), strict=True):
        assert_near(A, want_A, 4)
        assert_near(B, want_B, 4)
    assert_near(ours(ids()), theirs(ids()), 64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("how", COMBINATIONS)
def test_adapters_of_other_dtypes(how, dtype):
    """Catches arithmetic in 16 bits (PEFT's svd fails there), a result in another dtype than the adapters', and doubles
    that pass through float32: what is made is the float32 (or float64) result, rounded once."""
    options = {} if how in ("linear", "svd", "cat") else {"density": 1.0}
    made = []
    for wide in (torch.float64, dtype):
        model = adapted(None, net(dtype), {n: ADAPTERS[n] for n in "ab"})
        model.to(wide)
        made.append(factors(combine(model, ["a", "b"], [0.7, -0.4], how, **options), "new"))
    truth, got = made
    eps = torch.finfo(dtype).eps
    for key, (A, B) in got.items():
        assert A.dtype == B.dtype == dtype
        want_A, want_B = truth[key]
        if not how.endswith("svd"):
            for t, want in ((A, want_A), (B, want_B)):
                assert (t.double() - want).abs().max() <= (eps / 2 + 8 * min(EPS32, eps)) * want.abs().max()
            continue
        error = B.double() @ A.double() - want_B @ want_A
        bound = want_B.abs() @ want_A.abs()
        assert (error.abs() <= (eps + 64 * min(EPS32, eps)) * bound.max()).all()


@pytest.mark.parametrize("how", ["linear", "cat", "svd", "magnitude_prune_svd"])
def test_autocast_does_not_reach_in(how):
    """Catches products that autocast takes to bfloat16."""
    options = {"density": 0.5} if how.endswith("prune_svd") else {}
    made = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            made.append(factors(combine(both()[0], ["a", "b"], [0.7, -0.4], how, **options), "new"))
    assert all(torch.equal(t, w) for key in made[0] for t, w in zip(made[0][key], made[1][key], strict=True))


def test_masks_of_dare_follow_the_seed():
    """Catches masks that a seed does not repeat, or that another seed does not change."""
    model = both()[0]
    outputs = []
    for seed in (1, 1, 2):
        combine(model, ["a", "b"], [1.0, 1.0], "dare_linear", seed, density=0.5)
        outputs.append(model(ids()).detach())
        quiet(model.delete_adapter, "new")
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


# -- kinds of adapters and models --------------------------------------------------------------------------------------


def test_ranks_by_pattern_leave_zeros_and_can_be_read_again(tmp_path):
    """Catches a layer whose rank is not the configuration's, which PEFT saves and cannot read (its sizes mismatch)."""
    adapters = {name: ADAPTERS[name] | {"rank_pattern": {"up": 2}} for name in "ab"}
    for how in ("linear", "cat"):
        ours, theirs = (combine(model, ["a", "b"], [0.7, 0.4], how) for model in both(adapters=adapters))
        want = theirs(ids())
        assert_near(ours(ids()), want, 64)
        wrapped = quiet(get_peft_model, net(), LoraConfig(**adapters["a"]), adapter_name="a")
        quiet(wrapped.add_adapter, "b", LoraConfig(**adapters["b"]))
        randomize(wrapped.base_model, ("lora_",))
        combine(wrapped, ["a", "b"], [0.7, 0.4], how)
        wrapped.save_pretrained(tmp_path / how, selected_adapters=["new"])
        for library in (PeftModel, peft.PeftModel):
            again = quiet(library.from_pretrained, net(), str(tmp_path / how / "new"))
            assert_near(again(ids()), want, 64)


def test_rslora_is_scaled_as_its_adapters_are():
    """Catches PEFT's new adapter, which has rsLoRA's scaling in its values and once more in its configuration: its
    output is too far from the base by the root of the rank."""
    adapters = {name: ADAPTERS[name] | {"use_rslora": True, "target_modules": ["up"]} for name in "ab"}
    model = combine(both(adapters=adapters)[0], ["a", "b"], [1.0, 0.5], "cat")
    assert model.model.up.scaling["new"] == 1 and model.peft_config["new"].use_rslora is False
    model.set_adapter(["a", "b"])
    model.model.up.scaling["b"] *= 0.5
    want = model(ids())
    model.set_adapter("new")
    assert_near(model(ids()), want, 64)


def test_scalings_that_were_changed_count():
    """Catches the configuration's scaling in place of the layer's."""
    models = both()
    for model in models:
        model.model.up.set_scale("a", 3.0)
        combine(model, ["a", "b"], [0.7, 0.4], "svd")
    assert_near(models[0](ids()), models[1](ids()), 64)


def test_dora_is_combined_as_in_peft_and_told():
    """Catches magnitudes other than PEFT's, whose new adapter has those of the base weight, and silence about it."""
    adapters = {"a": ADAPTERS["a"] | {"use_dora": True}, "b": ADAPTERS["b"]}
    ours, theirs = both(adapters=adapters)
    with pytest.warns(UserWarning, match="magnitudes of \\['a'\\]"):
        ours.add_weighted_adapter(["a", "b"], [0.7, 0.4], "new", "linear")
    quiet(theirs.add_weighted_adapter, ["a", "b"], [0.7, 0.4], "new", "linear")
    for model in (ours, theirs):
        model.set_adapter("new")
    assert_near(ours(ids()), theirs(ids()), 64)
    with pytest.warns(UserWarning, match="has no magnitudes"):
        ours.add_weighted_adapter(["b", "a"], [0.7, 0.4], "other", "linear")
    assert not ours.peft_config["other"].use_dora


def test_layers_that_the_first_configuration_does_not_reach_are_named():
    """Catches content that is lost without a word, and a layer that no adapter has, of which PEFT fails half-way."""
    adapters = {
        "a": {"target_modules": ["q_proj"], "layers_to_transform": [0]},
        "b": {"target_modules": ["v_proj"], "layers_to_transform": [1]},
        "c": {"target_modules": ["q_proj"]},
    }
    model = adapted(None, tiny_llama(), adapters)
    with pytest.warns(UserWarning, match=r"does not reach 'model.layers.1.self_attn.v_proj'"):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "new", "linear")
    model.delete_adapter("c")
    before = {n: p.detach().clone() for n, p in model.model.named_parameters() if ".new" in n}
    assert len(before) == 4
    # v_proj of layer 0 has the new one alone.
    A, B = factors(model, "new")["model.layers.0.self_attn.v_proj"]
    assert not B.any() and A.any()


def test_modules_trained_whole_are_told():
    """Catches silence about a head that the new adapter does not have, and a list that two configurations share."""
    adapters = {"a": {"target_modules": ["up"], "modules_to_save": ["down"]}, "b": {"target_modules": ["up"]}}
    ours, theirs = both(adapters=adapters)
    with pytest.warns(UserWarning, match="trained whole"):
        ours.add_weighted_adapter(["a", "b"], [1.0, 1.0], "new")
    quiet(theirs.add_weighted_adapter, ["a", "b"], [1.0, 1.0], "new")
    assert ours.peft_config["new"].modules_to_save is not ours.peft_config["a"].modules_to_save
    for model in (ours, theirs):
        assert not any(p.requires_grad for n, p in model.named_parameters() if ".new" in n)
        model.set_adapter("new")
    assert_near(ours(ids()), theirs(ids()), 64)


def test_loftq_does_not_quantize_the_base_again():
    """Catches the initialization of the first adapter being run for the new one: it writes into the base weight."""
    config = {"target_modules": ["up"], "init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}
    torch.manual_seed(0)
    base = nn.ModuleDict({"up": nn.Linear(64, 64)})
    model = quiet(LoraModel, base, LoraConfig(**config), "a")
    weight = model.model["up"].weight.detach().clone()
    quiet(model.add_weighted_adapter, ["a"], [1.0], "new")
    assert torch.equal(model.model["up"].weight, weight) and model.peft_config["new"].init_lora_weights is True


@pytest.mark.parametrize("how", ["svd", "linear", "dare_ties_svd"])
def test_a_quantized_base_makes_no_difference(how):
    """Catches a combination that reads the base weight, or its packed shape."""
    bnb = pytest.importorskip("bitsandbytes")
    models = []
    for library in (None, peft):
        base = nn.ModuleDict({"up": bnb.nn.Linear4bit(64, 96, compute_dtype=torch.float32, quant_type="nf4")})
        torch.manual_seed(0)
        base["up"].load_state_dict(nn.Linear(64, 96).state_dict())
        base.to("cpu")
        adapters = {name: {"r": 4, "target_modules": ["up"]} for name in "ab"}
        model = adapted(library, base, adapters)
        models.append(
            combine(model, ["a", "b"], [0.7, -0.4], how, **({} if how != "dare_ties_svd" else {"density": 0.5}))
        )
    x = torch.randn(3, 64)
    outputs = [model.model["up"](x) for model in models]
    assert_near(outputs[0], outputs[1], 64)


# -- an adapter like any other -----------------------------------------------------------------------------------------


@pytest.fixture
def llama() -> PeftModel:
    first = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "down_proj"])
    model = quiet(get_peft_model, tiny_llama(), first, "a")
    model.add_adapter("b", LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "gate_proj"]))
    randomize(model, ("lora_",))
    return model


@pytest.mark.parametrize("how", ["svd", "cat", "ties"])
def test_what_is_saved_loads_in_peft(llama, how, tmp_path):
    """Catches files whose rank, scaling or names are not those of the adapter, and a view of a larger memory saved."""
    llama.add_weighted_adapter(["a", "b"], [0.7, -0.4], "new", how, **({"density": 0.5} if how == "ties" else {}))
    llama.set_adapter("new")
    want = llama(ids()).logits
    for name in ("a", "b"):
        llama.delete_adapter(name)
    assert list(llama.peft_config) == ["new"] and torch.equal(llama(ids()).logits, want)
    llama.save_pretrained(tmp_path)
    for library in (PeftModel, peft.PeftModel):
        again = quiet(library.from_pretrained, tiny_llama(), str(tmp_path / "new"))
        assert_near(again(ids()).logits, want, 64)
    for A, B in factors(llama.base_model, "new").values():
        assert all(t.untyped_storage().nbytes() == t.numel() * 4 for t in (A, B))


def test_it_trains_merges_and_is_mixed_in_a_batch(llama):
    """Catches tensors shared with the sources, which training would change, and a pool that does not know of it."""
    with torch.no_grad():
        llama(ids(), adapter_names=["a", "b"])  # the sources become views into a pool
    llama.add_weighted_adapter(["a", "b"], [1.0, 1.0], "new", "svd")
    before = {n: p.detach().clone() for n, p in llama.named_parameters() if ".new" not in n}
    llama.set_adapter("new")
    trained = [p for n, p in llama.named_parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    llama(ids(), labels=ids()).loss.backward()
    assert len(trained) == 2 * len(factors(llama.base_model, "new")) and all(p.grad is not None for p in trained)
    optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in llama.named_parameters() if ".new" not in n)
    with torch.no_grad():
        want = llama(ids()).logits
        mixed = llama(ids(), adapter_names=["new", "a"]).logits
        assert_near(mixed[:1], want[:1], 256)
        llama.merge_adapter()
        assert_near(llama(ids()).logits, want, 256)
        llama.unmerge_adapter()
        with llama.disable_adapter():
            assert_near(llama(ids()).logits, tiny_llama()(ids()).logits, 256)
    llama.delete_adapter("a")
    assert_near(llama(ids()).logits, want, 256)
    quiet(llama.delete_adapter, "new")
    assert not any(".new" in name for name in llama.state_dict())


# -- what is refused ---------------------------------------------------------------------------------------------------

BAD = [
    ((["a", "x"], [1, 1], "n"), {}, ValueError, "no adapter is named"),
    (("ab", [1, 1], "n"), {}, TypeError, "must be a list"),
    ((["a", "b"], [1, 1], "c"), {}, ValueError, "already"),
    ((["a", "b"], [1], "n"), {}, ValueError, "weights: expected one for each of 2"),
    ((["a", "b"], [1, "2"], "n"), {}, TypeError, "weights"),
    ((["a", "b"], [1, float("nan")], "n"), {}, ValueError, "finite"),
    (([], [], "n"), {}, ValueError, "at least one"),
    ((["a", "b"], [1, 1], "n.m"), {}, ValueError, "without a dot"),
    ((["a", "b"], [1, 1], "n", "mean"), {}, ValueError, "combination_type must be one of svd, cat, linear"),
    ((["a", "c"], [1, 1], "n", "linear"), {}, ValueError, r"one rank, got ranks \[4, 3\]"),
    ((["a", "p"], [1, 1], "n", "linear"), {}, ValueError, r"\[4, 2\] in 'up'"),
    ((["a", "b"], [1, 1], "n", "ties"), {}, ValueError, "density .* got None"),
    ((["a", "b"], [1, 1], "n", "ties_svd"), {"density": 1.5}, ValueError, "density"),
    ((["a", "b"], [1, 1], "n", "dare_linear"), {"density": 0}, ValueError, "above 0"),
    ((["a", "b"], [1, 1], "n", "ties"), {"density": 0.5, "majority_sign_method": "most"}, ValueError, "majority_sign"),
    ((["a", "b"], [1, 1], "n"), {"svd_rank": 0}, ValueError, "svd_rank"),
    ((["a", "b"], [1, 1], "n"), {"svd_clamp": 2.0}, ValueError, "svd_clamp"),
    ((["a", "b"], [1, 1], "n"), {"svd_driver": "gesvdx"}, ValueError, "svd_driver"),
    ((["a", "b"], [1, 1], "n"), {"svd_driver": "gesvd"}, ValueError, "CUDA"),
    ((["a", "e"], [1, 1], "n"), {}, ValueError, "all names or all expressions"),
    ((["a", "bias"], [1, 1], "n"), {}, ValueError, "lora_bias"),
    ((["a", "w"], [1, 1], "n", "linear"), {}, ValueError, "'w' has values in 'up' that are not finite"),
    ((["whole", "whole2"], [1, 1], "n"), {}, ValueError, "modules_to_save"),
]


@pytest.fixture(scope="module")
def crowd() -> Any:
    """A model of many adapters that do not go together."""
    up = {"target_modules": ["up"], "r": 4}
    others = {
        "p": ADAPTERS["a"] | {"rank_pattern": {"up": 2}},
        "e": {"target_modules": ".*up"},
        "bias": up | {"lora_bias": True},
        "w": up,
        "whole": up | {"modules_to_save": ["down"]},
        "whole2": up | {"modules_to_save": ["down"]},
    }
    no_down = {
        n: {k: [t for t in v if t != "down"] if k == "target_modules" else v for k, v in ADAPTERS[n].items()}
        for n in "abc"
    }
    others["p"] = no_down["a"] | {"rank_pattern": {"up": 2}}
    model = adapted(None, net(), no_down | others)
    model.model.up.lora_A["w"].weight.data[0, 0] = float("inf")
    return model


@pytest.mark.parametrize("arguments, options, error, message", BAD)
def test_what_cannot_be_combined_is_refused_and_nothing_changed(crowd, arguments, options, error, message):
    """Catches an error that comes half-way, or does not say what was wrong."""
    configs, before = dict(crowd.peft_config), str(fingerprint(crowd.model))
    with pytest.raises(error, match=message):
        crowd.add_weighted_adapter(*arguments, **options)
    assert crowd.peft_config == configs and str(fingerprint(crowd.model)) == before


def test_a_result_that_its_dtype_cannot_hold_is_refused():
    """Catches infinities in a float16 adapter, and an adapter that stays behind when an error comes late."""
    model = adapted(None, net(torch.float16), {n: ADAPTERS[n] for n in "ab"})
    before = str(fingerprint(model.model))
    with pytest.raises(ValueError, match="cannot hold"):
        model.add_weighted_adapter(["a", "b"], [1e6, 1.0], "new", "cat")
    assert list(model.peft_config) == ["a", "b"] and str(fingerprint(model.model)) == before


class Stack(nn.Module):
    """A module with a parameter that is no layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)
        self.inner = nn.Module()
        self.inner.weights = nn.Parameter(torch.randn(2, 8, 8))


def test_adapters_on_parameters_are_refused():
    """Catches a new adapter that lacks what the others have on parameters."""
    config = LoraConfig(target_modules=["up"], target_parameters=["inner.weights"])
    model = quiet(LoraModel, Stack(), config, "a")
    with pytest.raises(ValueError, match=r"'a' adapts parameters \(target_parameters\)"):
        model.add_weighted_adapter(["a"], [1.0], "new")
    assert list(model.peft_config) == ["a"]
