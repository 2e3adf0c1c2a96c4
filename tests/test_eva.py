"""EVA's start of an adapter beside PEFT's: components, ranks, what becomes of the layers, and what is refused."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
import torch.distributed as dist

from initial_values_data import output, stepped
from peftkern import EvaConfig, LoraConfig, PeftModel, get_eva_state_dict, get_peft_model, initialize_lora_eva_weights
from peftkern.tuners.lora.eva import _gathered
from peftkern.tuners.lora.layer import Linear
from peftkern.tuners.lora.running_svd import RunningSvd
from tiny_models import mlp, tiny_llama

peft = pytest.importorskip("peft")
incremental_pca = pytest.importorskip("peft.utils.incremental_pca")

TARGETS = {"r": 3, "target_modules": ["up", "down", "head"], "lora_alpha": 6}
BY_IDS = {
    "forward_fn": lambda model, ids: model(ids),
    "prepare_model_inputs_fn": None,
    "prepare_layer_inputs_fn": None,
    "show_progress_bar": False,
}


def skewed():
    """A model whose first layer is given many directions, the others few: ranks move."""
    model = mlp()
    with torch.no_grad():
        model.emb.weight *= torch.linspace(1.2, 0.8, 16)
        model.up.weight *= 3 * torch.arange(24).div(-0.5).exp()[:, None]
    return model


def batches(n=3, rows=8, tokens=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 128, (rows, tokens), generator=generator) for _ in range(n)]


def theirs_and_ours(make=skewed, **options):
    """PEFT's model and peftkern's, with adapters that wait for EVA's values."""
    made = []
    for config, adapt, eva in (
        (peft.LoraConfig, peft.get_peft_model, peft.EvaConfig),
        (LoraConfig, get_peft_model, EvaConfig),
    ):
        fields = TARGETS | {"init_lora_weights": "eva"} | options
        # Random inputs have no leading components: at the default of 0.99 it would take long until they stand still.
        fields["eva_config"] = eva(**({"tau": 0.6} | fields.get("eva_config", {})))
        torch.manual_seed(4)
        made.append(adapt(make(), config(**fields)))
    return made


def test_components_are_those_of_peft():
    """Would catch a mean that is forgotten between batches, a share of another variance, and other signs or draws."""
    generator = torch.Generator().manual_seed(1)
    ours, theirs = RunningSvd(5), incremental_pca.IncrementalPCA(5, lowrank=True, lowrank_seed=42)
    rows = []
    for n in (40, 7, 23):
        x = torch.randn(n, 20, generator=generator) * torch.linspace(3, 0.1, 20) + torch.linspace(-1, 1, 20) + n / 10
        rows.append(x)
        before, state = x.clone(), torch.random.get_rng_state()
        ours.add(x)
        assert torch.equal(x, before) and torch.equal(torch.random.get_rng_state(), state)
        theirs.partial_fit(x)
        torch.testing.assert_close(ours.components, theirs.components_, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours.singular_values, theirs.singular_values_)
        torch.testing.assert_close(ours.explained, theirs.explained_variance_ratio_, check_dtype=False)
    # And those of all rows at once.
    every = torch.cat(rows).double()
    _, S, Vh = torch.linalg.svd(every - every.mean(0), full_matrices=False)
    assert ((ours.components[:2] @ Vh[:2].T).abs().diagonal() > 0.99).all()
    torch.testing.assert_close(ours.singular_values[:2].double(), S[:2], rtol=0.02, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"eva_config": {"rho": 1.0, "tau": 0.9}},
        {"eva_config": {"rho": 3.0, "whiten": True, "adjust_scaling_factors": False}},
        {"rank_pattern": {"up": 5}, "alpha_pattern": {"head": 4}, "eva_config": {"rho": 1.5}},
        {"use_rslora": True, "use_dora": True},
    ],
)
def test_it_agrees_with_peft(options):
    """Would catch components, ranks, scalings and layers that lose their adapter other than PEFT's."""
    theirs, ours = theirs_and_ours(**options)
    want = peft.get_eva_state_dict(theirs, batches(), **BY_IDS)
    found = get_eva_state_dict(ours, batches(), **BY_IDS)
    assert found.keys() == want.keys()
    for name, A in found.items():
        torch.testing.assert_close(A, want[name], rtol=1e-4, atol=1e-5, msg=name)
    given = {name: A.clone() for name, A in found.items()}
    initialize_lora_eva_weights(ours, eva_state_dict=found)
    assert found.keys() == given.keys(), "the caller's dict was emptied"
    peft.initialize_lora_eva_weights(theirs, eva_state_dict=dict(given))
    state, other = ours.state_dict(), theirs.state_dict()
    assert state.keys() == other.keys()
    for name in state:
        assert state[name].shape == other[name].shape and state[name].dtype == other[name].dtype
        if "lora_" in name:
            torch.testing.assert_close(state[name], other[name], msg=name)
    for name, layer in theirs.base_model.model.named_children():
        mine = getattr(ours.base_model.model, name)
        assert isinstance(mine, Linear) == hasattr(layer, "lora_A")
        if isinstance(mine, Linear):
            assert mine.scaling == layer.scaling and mine.r == layer.r and mine.lora_alpha == layer.lora_alpha
            assert all(p.requires_grad for p in mine.lora_A.parameters())
    mine, config = ours.peft_config["default"], theirs.peft_config["default"]
    ranks = {len(A) for A in given.values()}
    assert (len(ranks) > 1) == (options.get("eva_config", {}).get("rho") != 1.0), ranks
    assert mine.target_modules == set(config.target_modules)
    assert (mine.rank_pattern, mine.alpha_pattern) == (config.rank_pattern, config.alpha_pattern)
    assert torch.equal(output(ours), output(skewed())) or "use_dora" in options
    torch.testing.assert_close(output(ours), output(skewed()), rtol=1e-5, atol=1e-6)


def language_batches():
    generator = torch.Generator().manual_seed(3)
    made = []
    for _ in range(3):
        ids = torch.randint(0, 128, (4, 16), generator=generator)
        labels, attended = ids.clone(), torch.ones_like(ids)
        labels[:, :4] = -100
        attended[1, 12:] = 0
        made.append({"input_ids": ids, "attention_mask": attended, "labels": labels})
    return made


def test_a_language_model_agrees_with_peft():
    """Would catch tokens without attention or label that are counted, inputs that several layers share decomposed as
    if they were others, and layers that are not seen because their model's forward was taken over."""
    pytest.importorskip("transformers")
    options = {"r": 2, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}
    theirs, ours = theirs_and_ours(lambda: tiny_llama(num_hidden_layers=1), **options)
    ids = {"input_ids": torch.arange(12).view(2, 6)}
    before = ours(**ids).logits
    quiet = {"show_progress_bar": False}
    ours.base_model.model.model.layers[0].mlp.train()
    want = peft.get_eva_state_dict(theirs, language_batches(), **quiet)
    initialize_lora_eva_weights(ours, language_batches(), **quiet)
    peft.initialize_lora_eva_weights(theirs, eva_state_dict=want)
    ranks = {name: layer.r["default"] for name, layer in ours.base_model._named_layers().items()}
    wanted = {n: m.r["default"] for n, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert ranks == wanted and len(set(ranks.values())) > 1, "no rank moved"
    for name in ranks:
        A, B = (m.base_model.model.get_submodule(name).lora_A["default"].weight for m in (ours, theirs))
        torch.testing.assert_close(A, B, rtol=1e-3, atol=1e-4, msg=name)
    assert not any(module._forward_hooks for module in ours.modules())
    layer = ours.base_model.model.model.layers[0]
    assert layer.mlp.training and not layer.self_attn.training, "modes were not put back"
    torch.testing.assert_close(ours(**ids).logits, before)
    ours(**ids).logits.square().sum().backward()
    grads = [layer.lora_B["default"].weight.grad for layer in ours.base_model._layers()]
    assert all(grad is not None and grad.any() for grad in grads)


def test_a_base_model_by_itself():
    """Would catch names that the adapted model does not find again, and targets that the configuration limits."""
    config = LoraConfig(**TARGETS, init_lora_weights="eva", eva_config=EvaConfig(tau=0.5))
    alone = get_eva_state_dict(skewed(), batches(), config, **BY_IDS)
    model = get_peft_model(skewed(), copy.deepcopy(config))
    inside = get_eva_state_dict(model, batches(), **BY_IDS)
    assert {f"base_model.model.{name}" for name in alone} == inside.keys()
    assert all(torch.equal(alone[name], inside[f"base_model.model.{name}"]) for name in alone)
    initialize_lora_eva_weights(model, eva_state_dict=alone)
    layer = model.base_model.model.up
    assert torch.equal(layer.lora_A["default"].weight, alone["up"].float())
    config = LoraConfig(r=2, init_lora_weights="eva", eva_config={"tau": 0.5})
    every = get_eva_state_dict(skewed(), batches(), config, **BY_IDS)
    assert every.keys() == {"up", "down", "head"}


def test_a_trained_file_goes_both_ways(tmp_path):
    """Would catch ranks and targets that the configuration does not tell of."""
    _, model = theirs_and_ours(eva_config={"rho": 3.0})
    initialize_lora_eva_weights(model, batches(), **BY_IDS)
    stepped(model).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["eva_config"]["rho"] == 3.0 and saved["rank_pattern"]
    for library in (PeftModel, peft.PeftModel):
        again = library.from_pretrained(skewed(), tmp_path)
        torch.testing.assert_close(output(again), output(model), rtol=1e-5, atol=1e-6)
    again = PeftModel.from_pretrained(skewed(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(output(again), output(model))
    assert (output(model) - output(skewed())).abs().max() > 0.05, "training was too short to tell"


def state_of(**ranks):
    sizes = {"up": 16, "down": 24, "head": 16}
    return {name: torch.randn(rank, sizes[name]) for name, rank in ranks.items()}


def test_other_adapters_keep_their_layers():
    """Would catch PEFT's loss: a layer of rank 0 that is taken out with all adapters, active or not."""
    _, model = theirs_and_ours()
    model.add_adapter("other", LoraConfig(target_modules=["head"]))
    frozen = model.base_model.model.up.lora_B["default"].weight.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        initialize_lora_eva_weights(model, eva_state_dict=state_of(up=4, down=3, head=0))
    base = model.base_model.model
    assert set(base.head.lora_A) == {"other"} and base.head.active_adapters == ["default"]
    assert base.up.lora_A["default"].weight.shape == (4, 16) and base.up.scaling["default"] == 6 / 3
    assert base.up.lora_B["default"].weight is not frozen and not base.up.lora_B["default"].weight.requires_grad
    assert model.peft_config["default"].target_modules == {"up", "down"}
    model.set_adapter("other")
    assert base.head.lora_A["other"].weight.requires_grad


def test_layers_that_eva_does_not_know():
    """Would catch a layer left as it waits, and a matrix without a layer that is dropped without a word."""
    _, model = theirs_and_ours(target_modules=["up", "emb"])
    with pytest.warns(UserWarning) as told:
        initialize_lora_eva_weights(model, eva_state_dict=state_of(up=3, down=2))
    texts = [str(w.message) for w in told]
    assert any("no layers of 'default', left out: 'down'" in text for text in texts), texts
    assert any("EVA has nothing for 'emb'" in text for text in texts)
    base = model.base_model.model
    assert not base.emb.lora_embedding_A["default"].any() and base.emb.lora_embedding_B["default"].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("widened", [False, True])
def test_dtypes_stay(dtype, widened):
    """Would catch PEFT's mixture: layers whose rank changed in the base's dtype, the others in float32."""
    config = LoraConfig(**TARGETS, init_lora_weights="eva", eva_config=EvaConfig())
    model = get_peft_model(skewed().to(dtype), config, autocast_adapter_dtype=widened)
    initialize_lora_eva_weights(model, eva_state_dict=state_of(up=4, down=3, head=2))
    factors = [p for name, p in model.named_parameters() if "lora_" in name]
    assert len(factors) == 6 and {p.dtype for p in factors} == {torch.float32 if widened else dtype}


def test_meta_adapters_are_filled():
    """Would catch an adapter that was made on the meta device and stays there."""
    config = LoraConfig(**TARGETS, init_lora_weights="eva", eva_config=EvaConfig(tau=0.5))
    model = get_peft_model(skewed(), config, low_cpu_mem_usage=True)
    initialize_lora_eva_weights(model, batches(), **BY_IDS)
    assert not any(p.is_meta for p in model.parameters())
    assert torch.equal(output(model), output(skewed()))


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, match",
    [
        ({"dataloader": []}, "dataloader: expected batches and a length, got 0 of a list"),
        ({"dataloader": iter(batches())}, "dataloader: expected batches and a length, got None"),
        ({"dataloader": batches(rows=1, tokens=5)}, r"no batch has as many rows .*\(6 at base_model.model.up\)"),
        ({"prepare_layer_inputs_fn": {"nope": None}}, "prepare_layer_inputs_fn: no layers of these names: 'nope'"),
        ({"prepare_layer_inputs_fn": lambda x, ids, name: x[0]}, r"expected rows .* got shape \[8, 12, 16\]"),
        ({"prepare_layer_inputs_fn": lambda x, ids, name: x[0][0].log()}, "base_model.model.up has NaN or infinity"),
        ({"forward_fn": lambda model, ids: model.base_model.model.emb(ids)}, "forward does not call .*up"),
        ({"adapter_name": "nobody"}, r"no adapter 'nobody'; there are \['default'\]"),
    ],
)
def test_what_cannot_be_searched_is_refused(change, match):
    """Would catch PEFT's endless loop over batches that are too small, hooks that stay behind, and a changed mode."""
    _, model = theirs_and_ours()
    arguments = {"dataloader": batches()} | BY_IDS | change
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.train()
    with pytest.raises(ValueError, match=match):
        initialize_lora_eva_weights(model, **arguments)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(module._forward_hooks for module in model.modules()) and model.training
    assert not any(layer.disable_adapters for layer in model.base_model._layers())


def test_more_components_than_features():
    """Would catch torch's error in the middle of a decomposition."""
    _, model = theirs_and_ours(r=9)
    with pytest.raises(ValueError, match="rank times rho is 18 at base_model.model.up, whose inputs have 16 features"):
        get_eva_state_dict(model, batches(), **BY_IDS)
    with pytest.raises(TypeError, match="expected batches that are dicts, got a Tensor"):
        get_eva_state_dict(model, batches(), forward_fn=BY_IDS["forward_fn"], show_progress_bar=False)


def test_what_is_no_eva_adapter_is_refused():
    """Would catch an adapter with trained values that are overwritten, and a matrix of another layer."""
    _, model = theirs_and_ours()
    for state, match in (
        (state_of(up=3) | {"down": torch.randn(3, 9)}, r"eva_state_dict\['down'\]: expected shape \[rank, 24\], got"),
        ({"up": torch.full((3, 16), float("nan"))}, r"eva_state_dict\['up'\]: expected finite numbers"),
        ({"elsewhere": torch.randn(3, 16)}, "no layer of 'default' gets a rank from it, got 'elsewhere'"),
        ({}, "no layer of 'default' gets a rank from it"),
    ):
        with pytest.raises(ValueError, match=match):
            initialize_lora_eva_weights(model, eva_state_dict=state)
    with pytest.raises(ValueError, match="dataloader: needed where eva_state_dict is None"):
        initialize_lora_eva_weights(model)
    model.merge_adapter()
    with pytest.raises(ValueError, match="adapters are merged into up: unmerge them first"):
        initialize_lora_eva_weights(model, eva_state_dict=state_of(up=3))
    model.unmerge_adapter()
    model.add_adapter("usual", LoraConfig(target_modules=["up"]))
    with pytest.raises(ValueError, match="'usual' must have init_lora_weights='eva', got True"):
        initialize_lora_eva_weights(model, eva_state_dict=state_of(up=3), adapter_name="usual")
    model.base_model.set_adapter(["default", "usual"])
    with pytest.raises(ValueError, match=r"expected one active adapter, got \['default', 'usual'\]"):
        initialize_lora_eva_weights(model, eva_state_dict=state_of(up=3))
    with pytest.raises(ValueError, match="expected a PeftModel with LoRA adapters, got a Mlp"):
        initialize_lora_eva_weights(skewed(), batches())
    with pytest.raises(ValueError, match=r"peft_config: needed for a model without LoRA adapters \(Mlp\)"):
        get_eva_state_dict(skewed(), batches())


@pytest.mark.parametrize(
    "settings, error, match",
    [
        ({"rho": 0.5}, ValueError, "rho must be finite and at least 1, got 0.5"),
        ({"rho": float("inf")}, ValueError, "rho must be finite"),
        ({"tau": 1.5}, ValueError, r"tau must be in \[0, 1\], got 1.5"),
        ({"tau": "x"}, TypeError, "tau must be a number, got 'x'"),
        ({"ro": 2}, ValueError, r"eva_config must have no fields but rho, .*\['ro'\]"),
        (3, TypeError, "eva_config must be EvaConfig"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, error, match):
    """Would catch settings that are first looked at when batches have been run."""
    with pytest.raises(error, match=match):
        LoraConfig(init_lora_weights="eva", eva_config=settings)


def test_config_goes_both_ways():
    """Would catch a file that PEFT reads as something else, and settings that are dropped without a word."""
    ours = LoraConfig(init_lora_weights="eva", eva_config=EvaConfig(rho=1.5))
    theirs = peft.LoraConfig(init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.5))
    assert ours.to_json_dict() == json.loads(json.dumps(theirs.to_dict()))
    assert LoraConfig.from_dict(ours.to_json_dict()) == ours
    with pytest.warns(UserWarning, match="without eva_config"):
        assert LoraConfig(init_lora_weights="eva").eva_config == EvaConfig()
    with pytest.warns(UserWarning, match="has no effect with init_lora_weights=True"):
        LoraConfig(eva_config=EvaConfig())


def test_rows_of_all_ranks(tmp_path):
    """Would catch padding taken for rows, and a gathering that is left out where there are ranks."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        x = torch.randn(5, 3)
        assert torch.equal(_gathered(x), x)
        _, model = theirs_and_ours()
        with pytest.warns(UserWarning, match="EVA takes the inputs of all ranks"):
            found = get_eva_state_dict(model, batches(), **BY_IDS)
        alone = get_eva_state_dict(model, batches(), gather_distributed_inputs=False, **BY_IDS)
        assert all(torch.equal(found[name], alone[name]) for name in alone)
    finally:
        dist.destroy_process_group()
