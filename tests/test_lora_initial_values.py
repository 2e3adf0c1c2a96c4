"""The starts of LoRA that decompose the base weight (PiSSA, OLoRA, MiCA) and the orthogonal one, beside PEFT's."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from initial_values_data import output, stepped
from loftq_data import linear, product, weight
from peftkern import LoraConfig, PeftModel, get_peft_model
from peftkern.ops import dequantize, quantize_4bit
from peftkern.tuners.lora.initial_values import principal_part
from peftkern.utils.quantized_modules import Linear4bit, Linear8bit, weight_of
from tiny_models import mlp

peft = pytest.importorskip("peft")

RESIDUAL = ["pissa", "pissa_niter_4", "olora"]
ALL = [*RESIDUAL, "orthogonal", "mica"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SCALED = {"r": 8, "lora_alpha": 24}


def both(base, init, seed=5, **options):
    """The layers of peftkern's and PEFT's model of one layer, made from copies of `base` after the same seed."""
    layers = []
    for library in (None, peft):
        model = nn.ModuleDict({"up": copy.deepcopy(base)})
        arguments = {"target_modules": ["up"], "init_lora_weights": init, **SCALED, **options}
        config = (library or LoraConfig) if library is None else library.LoraConfig
        torch.manual_seed(seed)
        made = (get_peft_model if library is None else library.get_peft_model)(model, config(**arguments))
        layers.append(made.base_model.model["up"])
    return layers


def adapted(base, init, **options):
    model = nn.ModuleDict({"up": base})
    model = get_peft_model(model, LoraConfig(target_modules=["up"], init_lora_weights=init, **SCALED, **options))
    return model, model.base_model.model["up"]


def dense(layer):
    """The base weight, as rows."""
    held = weight_of(layer.get_base_layer())
    return (layer.weight if held is None else dequantize(held)).detach().float()


# --- beside PEFT -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"rank_pattern": {"up": 5}, "alpha_pattern": {"up": 3}}])
@pytest.mark.parametrize("init", ALL)
def test_float32_agrees_with_peft(init, options):
    """Would catch another part of the weight, a scaling left out or in the wrong place, other random draws, patterns
    that are looked at too late, and a residual of another adapter."""
    options = {"rank_pattern": {"up": 6}, "alpha_pattern": {"up": 3}} if init == "orthogonal" and options else options
    base = linear()
    ours, theirs = both(base, init, **options)
    assert ours.scaling == theirs.scaling and ours.lora_A["default"].weight.shape == theirs.lora_A.default.weight.shape
    torch.testing.assert_close(product(ours), product(theirs), rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-5, atol=2e-6)
    moved = (ours.weight - base.weight).abs().max()
    assert moved > 0.01 if init in RESIDUAL else moved == 0
    x = torch.randn(7, 160)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(ours(x), base(x), rtol=1e-5, atol=2e-5)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert mine.dtype == other.dtype and mine.requires_grad == other.requires_grad
    # Of one side alone, where no sign is free: the split between A and B, and what is drawn.
    if init in ("olora", "orthogonal"):
        torch.testing.assert_close(ours.lora_A["default"].weight, theirs.lora_A.default.weight)
    else:
        for mine, other in ((ours.lora_A, theirs.lora_A), (ours.lora_B, theirs.lora_B)):
            torch.testing.assert_close(mine["default"].weight.abs(), other.default.weight.abs(), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("init", ALL)
def test_sixteen_bits_agree_with_peft(init, dtype):
    """Would catch a residual of rounded factors, which a file of PEFT's was not trained over, and another dtype."""
    base = linear(dtype=dtype)
    ours, theirs = both(base, init)
    assert ours.weight.dtype == dtype and ours.lora_A["default"].weight.dtype == torch.float32
    # Both round the same float32 numbers, which differ by their own rounding: seldom to the neighbour.
    step = torch.finfo(dtype).eps * base.weight.abs().max()
    assert (ours.weight != theirs.weight).float().mean() < 0.005
    assert (ours.weight - theirs.weight).abs().max() <= step
    A, B = ours.lora_A["default"].weight, ours.lora_B["default"].weight
    magnitude = (B.abs() @ A.abs()).detach()
    assert ((product(ours) - product(theirs)).abs() <= 2 * torch.finfo(dtype).eps * magnitude + 1e-7).all()


def test_peft_s_sizes_for_the_decompositions():
    """Would catch the formulas changed: each against fp64."""
    w = weight().double()
    for init in RESIDUAL:
        A, B = principal_part(w.float(), 8, 3.0, init)
        assert A.shape == (8, 160) and B.shape == (96, 8)
        part = (B.double() @ A.double()) * (1 if init == "olora" else 3.0)
        if init == "olora":
            # Q R of the first columns: those of W are met exactly.
            torch.testing.assert_close(part[:, :8], w[:, :8], rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(B.double().T @ B.double(), torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-5)
            continue
        S = torch.linalg.svdvals(w)
        error = (w - part).square().sum()
        tail = S[8:].square().sum()
        # Eckart and Young for the whole decomposition; iterations come near.
        assert abs(error - tail) < (1e-5 if init == "pissa" else 0.05) * tail
        torch.testing.assert_close(A.double().norm(dim=1), B.double().norm(dim=0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("init", ALL)
def test_conv1d_is_turned(init):
    """Would catch a stored [in, out] weight that is decomposed as it is: PEFT's OLoRA does."""
    conv1d = pytest.importorskip("transformers").pytorch_utils.Conv1D(96, 160)
    conv1d.weight = nn.Parameter(weight().T.contiguous())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*fan_in_fan_out.*")
        base = linear()
        torch.manual_seed(5)
        _, layer = adapted(copy.deepcopy(conv1d), init)
        torch.manual_seed(5)
        _, plain = adapted(base, init)
    assert layer.get_base_layer().weight.is_contiguous()
    torch.testing.assert_close(layer.weight.T, plain.weight, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(product(layer), product(plain), rtol=1e-5, atol=2e-6)
    x = torch.randn(3, 160)
    torch.testing.assert_close(layer(x), conv1d(x), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("init", ALL)
def test_embeddings_agree_with_peft(init):
    """Would catch an embedding without its adapter, or other draws than PEFT's."""
    models = []
    for config, make in ((LoraConfig, get_peft_model), (peft.LoraConfig, peft.get_peft_model)):
        torch.manual_seed(1)
        models.append(make(mlp(), config(r=4, target_modules=["emb"], init_lora_weights=init)))
    ours, theirs = (m.base_model.model.emb for m in models)
    for name in ("lora_embedding_A", "lora_embedding_B"):
        mine, other = getattr(ours, name)["default"], getattr(theirs, name)["default"]
        assert mine.requires_grad == other.requires_grad == (init != "mica" or name.endswith("A"))
        torch.testing.assert_close(mine.abs() if init == "mica" else mine, other.abs() if init == "mica" else other)
    assert torch.equal(ours.weight, theirs.weight)


@pytest.mark.parametrize("init", RESIDUAL)
def test_rank_above_the_sizes(init):
    """Would catch PEFT's adapters of another rank than r, which no file can be loaded into, and torch's error."""
    base = linear(5, 70)
    _, layer = adapted(copy.deepcopy(base), init)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert A.shape == (8, 70) and B.shape == (5, 8)
    assert (A[5:] != 0).all() and not B[:, 5:].any()
    torch.testing.assert_close(layer.weight + 3 * B @ A, base.weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal"])
def test_with_dora(init):
    """Would catch a magnitude of the residual's rows, by which the output is another from the start."""
    ours, theirs = both(linear(), init, use_dora=True)
    torch.testing.assert_close(
        ours.lora_magnitude_vector["default"].weight, theirs.lora_magnitude_vector["default"].weight
    )
    x = torch.randn(3, 160)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(ours(x), linear_like(ours)(x), rtol=1e-4, atol=2e-4)


def linear_like(layer):
    base = linear()
    base.bias = layer.get_base_layer().bias
    return base


# --- quantized bases -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("double_quant", [False, True])
def test_olora_over_four_bits_agrees_with_peft(double_quant):
    """Would catch the weight left as it was, quantized with other settings, or its dtype lost."""
    bnb = pytest.importorskip("bitsandbytes")
    # bitsandbytes' CPU kernel decodes wrongly where rows are not whole blocks.
    base = bnb.nn.Linear4bit(192, 96, quant_type="nf4", compress_statistics=double_quant)
    base.load_state_dict(linear(96, 192).state_dict())
    base.to("cpu")
    before = weight_of(base)
    own = nn.ModuleDict({"up": Linear4bit.from_weight(before, base.bias)})
    options = {"target_modules": ["up"], "init_lora_weights": "olora", **SCALED}
    theirs = peft.get_peft_model(nn.ModuleDict({"up": copy.deepcopy(base)}), peft.LoraConfig(**options))
    theirs = theirs.base_model.model["up"]
    for model in (own, nn.ModuleDict({"up": base})):
        layer = get_peft_model(model, LoraConfig(**options)).base_model.model["up"]
        held = weight_of(layer.get_base_layer())
        assert held.dtype == before.dtype and held.nested == before.nested
        assert not layer.get_base_layer().weight.requires_grad
        torch.testing.assert_close(product(layer), product(theirs), rtol=1e-5, atol=2e-6)
        # A weight between two codes may fall to the other side.
        assert ((dense(layer) - dense(theirs)).abs() > 1e-4 * dense(theirs).abs().max()).float().mean() < 0.005
        # The residual's rounding is the only difference to the base.
        exact = dequantize(before) - 3 * product(layer)
        assert (dense(layer) - exact).norm() < 1.01 * (dequantize(quantize_4bit(exact, "nf4", 64)) - exact).norm()


def test_olora_over_eight_bits_agrees_with_peft():
    """Would catch scales of the old weight that are read with the new one."""
    bnb = pytest.importorskip("bitsandbytes")
    base = bnb.nn.Linear8bitLt(160, 96, has_fp16_weights=False)
    base.load_state_dict(linear().state_dict())
    base.to("cpu")
    before = weight_of(base)
    own = Linear8bit.from_weight(before, base.bias)
    ours = adapted(own, "olora")[1], adapted(base, "olora")[1]
    for layer in ours:
        exact = dequantize(before).float() - 3 * product(layer)
        assert (dense(layer) - exact).abs().max() <= exact.abs().max() / 127
        part = dequantize(before).float() - dense(layer)
        torch.testing.assert_close(3 * product(layer), part, rtol=0, atol=(exact.abs().max() / 127).item())
        A, B = principal_part(dequantize(before, torch.float16).float(), 8, 3.0, "olora")
        torch.testing.assert_close(product(layer), B @ A, rtol=1e-5, atol=2e-6)


def bnb_layer(bits):
    bnb = pytest.importorskip("bitsandbytes")
    with torch.random.fork_rng():
        torch.manual_seed(0)  # of the bias
        values = linear(96, 192).state_dict()
    made = bnb.nn.Linear4bit(192, 96, quant_type="nf4") if bits == 4 else bnb.nn.Linear8bitLt(192, 96, True, False)
    made.load_state_dict(values)
    return made.to("cpu")


@pytest.mark.parametrize("bits", [4, 8])
def test_olora_over_a_quantized_base_is_loaded_and_undone(tmp_path, bits):
    """Would catch a residual that another load rounds to other codes, one that a file's adapter does not find, and
    statistics that stay when adapting the rest of the model fails."""
    model, layer = adapted(bnb_layer(bits), "olora")
    with torch.no_grad():
        layer.lora_B["default"].weight.add_(0.01)
    model.save_pretrained(tmp_path)
    x = torch.randn(3, 192)
    for low_cpu_mem_usage in (False, True):
        base = nn.ModuleDict({"up": bnb_layer(bits)})
        again = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).base_model.model["up"]
        assert torch.equal(dense(again), dense(layer)) and torch.equal(again(x), layer(x))
    base = bnb_layer(bits)
    before, model = dequantize(weight_of(base)), nn.ModuleDict({"up": base, "down": copy.deepcopy(DOUBLE)})
    with pytest.raises(TypeError, match="float64"):
        get_peft_model(model, LoraConfig(target_modules=["up", "down"], init_lora_weights="olora"))
    assert model["up"] is base and torch.equal(dequantize(weight_of(base)), before)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "mica"])
def test_quantized_bases_are_refused(init):
    """Would catch packed bytes taken as numbers."""
    for base in (Linear4bit.from_linear(linear()), Linear8bit.from_linear(linear())):
        model = nn.ModuleDict({"up": base})
        with pytest.raises(TypeError, match=rf"init_lora_weights='{init}' needs a dense weight, but a Linear\dbit"):
            get_peft_model(model, LoraConfig(target_modules=["up"], init_lora_weights=init))
        assert model["up"] is base


def test_orthogonal_over_four_bits():
    """Would catch PEFT's cast of A and B to the dtype of the packed bytes."""
    base = Linear4bit.from_linear(linear())
    _, layer = adapted(base, "orthogonal")
    assert layer.lora_A["default"].weight.dtype == torch.float32 and layer.lora_A["default"].weight.any()
    assert product(layer).abs().max() < 1e-6


DOUBLE = nn.Linear(8, 8, dtype=torch.float64)

# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "init, options, base, error, match",
    [
        ("pissa", {"lora_alpha": 0}, None, ValueError, "'pissa' needs a scaling above 0, got 0"),
        ("pissa_niter_1", {"lora_alpha": -8}, None, ValueError, "'pissa_niter_1' needs a scaling above 0, got -1"),
        ("orthogonal", {"r": 5}, None, ValueError, "'orthogonal' needs an even r .*got r=5"),
        ("orthogonal", {"rank_pattern": {"up": 3}}, None, ValueError, "even r .*got r=3"),
        ("mica", {"r": 97}, None, ValueError, r"'mica' .*got r=97 for \[96, 160\]"),
        (
            "mica",
            {},
            nn.Linear(8, 8, dtype=torch.float64),
            TypeError,
            "float32, float16 or bfloat16, got torch.float64",
        ),
        (
            "pissa",
            {},
            nn.Linear(8, 8, dtype=torch.float64),
            TypeError,
            "float32, float16 or bfloat16, got torch.float64",
        ),
        ("olora", {}, nn.Linear(8, 8, device="meta"), ValueError, "'olora': the weight .* on the meta device"),
        ("olora", {}, nn.utils.parametrizations.orthogonal(nn.Linear(8, 8)), TypeError, "parametrized"),
    ],
)
def test_what_cannot_be_started_is_refused_by_name(init, options, base, error, match):
    """Would catch NaN factors, torch's own errors, and a model that is left half adapted."""
    base = linear() if base is None else base
    model = nn.ModuleDict({"up": base})
    held = dict(model.named_parameters())
    with pytest.raises(error, match=match):
        get_peft_model(model, LoraConfig(target_modules=["up"], init_lora_weights=init, **options))
    assert model["up"] is base and all(p is held[name] for name, p in model.named_parameters())


@pytest.mark.parametrize("init", ["pissa_niter_", "pissa_niter_-1", "pissa_2", "Pissa", "Orthogonal", "MiCA"])
def test_other_words_are_refused(init):
    """Would catch a word that PEFT takes for something else than was meant."""
    with pytest.raises(ValueError, match="init_lora_weights must be .*'pissa_niter_<n>'"):
        LoraConfig(init_lora_weights=init)


def test_what_does_not_go_together_is_refused():
    """Would catch a frozen B under a magnitude, as PEFT refuses it, adapters of parameters that start as something
    else, and a layer whose own file would not tell its base."""
    with pytest.raises(ValueError, match="use_dora=True does not go with init_lora_weights='mica'"):
        LoraConfig(init_lora_weights="mica", use_dora=True)
    with pytest.raises(ValueError, match="lora_bias=True needs init_lora_weights True or False, got 'pissa'"):
        LoraConfig(init_lora_weights="pissa", lora_bias=True)
    with pytest.warns(UserWarning, match="use_rslora=True and rank_pattern or alpha_pattern: save_pretrained cannot"):
        LoraConfig(init_lora_weights="olora", use_rslora=True, rank_pattern={"up": 3})
    import peftkern

    for init in ALL:
        config = LoraConfig(target_modules=[], target_parameters=["up.weight"], init_lora_weights=init)
        with pytest.raises(ValueError, match=f"init_lora_weights='{init}' does not go with target_parameters"):
            get_peft_model(mlp(), config)
        with pytest.raises(ValueError, match=f"'gaussian' for a layer by itself, got '{init}'"):
            peftkern.nn.LoraLinear.from_linear(linear(), init_lora_weights=init)
    bank = peftkern.AdapterBank(mlp(), slots=2, max_rank=8, target_modules=["up"])
    with pytest.raises(ValueError, match="init_lora_weights='pissa': the model is an AdapterBank's"):
        bank.add("one", LoraConfig(r=4, target_modules=["up"], init_lora_weights="pissa"))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_error_leaves_the_whole_model_as_it_was(init):
    """Would catch weights written to in place: the first layers are done when a later one fails."""
    model = mlp()
    quantized = Linear4bit.from_linear(model.head)
    if init == "olora":
        model.head = quantized
    with torch.no_grad():
        model.down.weight[0, 0] = float("inf")
    x = torch.randint(0, 128, (2, 3))
    codes = quantized.weight.clone()
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=f"'{init}': the weight of a Linear has NaN or infinity"):
        get_peft_model(model, LoraConfig(target_modules=["up", "head", "down"], r=2, init_lora_weights=init))
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and torch.equal(quantized.weight, codes)
    assert all(after[name] is p and torch.equal(p, value) for name, (p, value) in before.items())
    assert model(x).shape == (2, 3, 5)


def test_a_failed_second_adapter_leaves_a_quantized_base():
    """Would catch statistics of a 4-bit weight that stay behind when its bytes come back."""
    model = nn.ModuleDict({"up": Linear4bit.from_linear(linear()), "down": linear(8, 8, torch.float64)})
    model = get_peft_model(model, LoraConfig(target_modules=["up", "down"]))
    base = model.base_model.model["up"].get_base_layer()
    before = dequantize(base.quantized_weight())
    with (
        pytest.warns(UserWarning, match=r"'olora' changes the base weight, which the adapters \['default'\]"),
        pytest.raises(TypeError, match="float64"),
    ):
        model.add_adapter("second", LoraConfig(target_modules=["up", "down"], init_lora_weights="olora"))
    assert torch.equal(dequantize(base.quantized_weight()), before) and list(model.peft_config) == ["default"]


# --- several adapters, merging, leaving -------------------------------------------------------------------------------


def test_other_adapters_and_merged_ones():
    """Would catch the base of another adapter changed without a word, and a merged one made part of the residual."""
    model, layer = adapted(linear(), True)
    with pytest.warns(UserWarning, match=r"init_lora_weights='pissa' changes the base weight, which.*\['default'\]"):
        model.add_adapter("second", LoraConfig(target_modules=["up"], init_lora_weights="pissa"))
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"'olora' changes the base weight: unmerge \['default'\] first"):
        model.add_adapter("third", LoraConfig(target_modules=["up"], init_lora_weights="olora"))
    assert set(layer.lora_A) == {"default", "second"}


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_base_keeps_the_residual(init):
    """Would catch a silent difference: as in PEFT the base weight is the residual when the adapter is gone, and the
    original again when it was merged."""
    base = linear()
    model, layer = adapted(copy.deepcopy(base), init)
    residual = layer.weight.detach().clone()
    with pytest.warns(UserWarning, match="adapters disabled whose initialization took"), model.disable_adapter():
        pass
    with pytest.warns(UserWarning, match="adapters unloaded whose initialization took"):
        left = copy.deepcopy(model).unload()
    assert torch.equal(left["up"].weight, residual)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(merged["up"].weight, base.weight, rtol=1e-5, atol=1e-6)
    with pytest.warns(UserWarning, match="adapters deleted whose initialization took"):
        model.delete_adapter("default")
    assert torch.equal(layer.weight, residual)


def test_mica_trains_a_alone():
    """Would catch a B that thaws when adapters are switched, enabled, widened or named one by one, and a frozen B of
    an adapter that took the name."""
    config = LoraConfig(r=4, target_modules=["up", "emb"], init_lora_weights="mica")
    model = get_peft_model(mlp(), config)
    model.add_adapter("other", LoraConfig(r=4, target_modules=["up", "emb"]))

    def learning(adapter="default"):
        return {n.split(".")[-3] if n.endswith("weight") else n.split(".")[-2]
                for n, p in model.named_parameters() if p.requires_grad and f".{adapter}" in n}  # fmt: skip

    only_a = {"lora_A", "lora_embedding_A"}
    both_parts = {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"}
    assert learning() == only_a
    model.set_adapter("other")
    assert learning() == set() and learning("other") == both_parts
    model.set_requires_grad("default")
    assert learning() == only_a
    model.base_model.set_adapter(["default", "other"])
    assert learning() == only_a and learning("other") == both_parts
    with model.disable_adapter():
        assert learning() == set()
    assert learning() == only_a
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model(torch.randint(0, 128, (4, 6))).square().sum().backward()
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert (
        {n for n in changed if ".default" in n} == {n for n in changed if "default" in n and "A.default" in n} != set()
    )
    model.delete_adapter("default")
    model.add_adapter("default", LoraConfig(r=4, target_modules=["up", "emb"]))
    model.set_adapter("default")
    assert learning() == both_parts


@pytest.mark.parametrize("init", ALL)
def test_a_combined_adapter_leaves_the_base(init):
    """Would catch PEFT's fault: the combined adapter is made by the first one's initialization, which decomposes the
    base weight once more."""
    model, layer = adapted(linear(), init)
    base = layer.weight
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*stand on too")
        model.add_adapter("second", LoraConfig(target_modules=["up"], **SCALED))
    model.add_weighted_adapter(["default", "second"], [1.0, 0.5], "sum", combination_type="linear")
    assert layer.weight is base and model.peft_config["sum"].init_lora_weights is True
    assert layer.lora_B["sum"].weight.requires_grad is False
    model.set_adapter("sum")
    assert layer.lora_B["sum"].weight.requires_grad


# --- files -----------------------------------------------------------------------------------------------------------

TARGETS = {"target_modules": ["up", "down"], "r": 4, "lora_alpha": 12}


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal", "mica"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trained_files_go_both_ways(tmp_path, init, dtype):
    """Would catch an adapter that is loaded over the original weight, where it does not belong, and one of PEFT's that
    finds another residual here."""

    def base():
        return mlp().to(dtype)

    ours = get_peft_model(base(), LoraConfig(init_lora_weights=init, **TARGETS))
    theirs = peft.get_peft_model(base(), peft.LoraConfig(init_lora_weights=init, **TARGETS))
    for name, model in (("ours", ours), ("theirs", theirs)):
        stepped(model)
        model.save_pretrained(tmp_path / name)
        # 16-bit weights differ by a rounding here and there, as the two decompositions do in float32.
        close = {"rtol": 0, "atol": (1e-5 if dtype == torch.float32 else 0.01) * output(model).abs().max().item()}
        loaded = [
            PeftModel.from_pretrained(base(), tmp_path / name),
            PeftModel.from_pretrained(base(), tmp_path / name, low_cpu_mem_usage=True),
            peft.PeftModel.from_pretrained(base(), tmp_path / name),
        ]
        for again in loaded:
            torch.testing.assert_close(output(again), output(model), **close)
        assert torch.equal(output(loaded[0]), output(loaded[1]))
        assert (output(model) - output(base())).abs().max() > 10 * close["atol"], "training was too short to tell"


def test_a_saved_base_is_not_decomposed_twice(tmp_path):
    """Would catch the residual taken out of a residual: the base that was saved goes with init_lora_weights=True."""
    model = stepped(get_peft_model(mlp(), LoraConfig(init_lora_weights="pissa", **TARGETS)))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path)
    before = output(model)
    again = PeftModel.from_pretrained(copy.deepcopy(model).base_model.unload(), tmp_path)
    assert torch.equal(output(again), before)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_layer_that_the_file_lacks(tmp_path, init):
    """Would catch a residual without what was taken out of it, where parameters wait on the meta device for values."""
    from safetensors.torch import load_file, save_file

    x = torch.randint(0, 128, (2, 3))
    model = get_peft_model(mlp(), LoraConfig(r=2, target_modules=["up", "down"], init_lora_weights=init))
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({name: t for name, t in load_file(file).items() if ".up." in name}, file)
    for low_cpu_mem_usage in (False, True):
        with pytest.warns(UserWarning, match="missing adapter keys"):
            again = PeftModel.from_pretrained(mlp(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        torch.testing.assert_close(again(x), mlp()(x), rtol=1e-5, atol=1e-5)
        assert not any(layer._unread_factors for layer in again.base_model._layers())


def test_a_drawn_residual_is_told_of(tmp_path):
    """Would catch an adapter that quietly stands on another residual than it was trained over, as it may in PEFT."""
    torch.manual_seed(3)
    model, layer = adapted(linear(), "pissa_niter_1")
    model.save_pretrained(tmp_path)
    torch.manual_seed(3)
    with pytest.warns(UserWarning, match="'pissa_niter_1' draws at random what it leaves in the base weight"):
        again = PeftModel.from_pretrained(nn.ModuleDict({"up": linear()}), tmp_path)
    assert torch.equal(again.base_model.model["up"].weight, layer.weight)
