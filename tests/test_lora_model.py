"""`LoraModel` beside real PEFT's: parameters, gradients, switching, deleting, merging, modules trained whole."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections import OrderedDict

import pytest
import torch
from torch import nn

import peftkern
from peftkern import get_peft_model_state_dict
from peftkern.mapping import inject_adapter_in_model
from peftkern.tuners.lora import LoraConfig, LoraModel
from peftkern.tuners.tuners_utils import BaseTunerLayer
from peftkern.utils import ModulesToSaveWrapper, _get_submodules
from tiny_models import fingerprint, ids, mlp, randomize, tiny_llama

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


def tuned(model: nn.Module, *configs: dict, seed: int | None = 1, active: list[str] | None = None):
    """Adapters "a", "b", ... of these configurations on equal models: peftkern's and PEFT's, with equal values."""
    models = []
    for tuner, make in ((LoraModel, LoraConfig), (peft.LoraModel, peft.LoraConfig)):
        torch.manual_seed(3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = tuner(copy.deepcopy(model), make(**configs[0]), "a")
            for name, config in zip("bcd", configs[1:], strict=False):
                made.peft_config[name] = make(**config)
                made.inject_adapter(made.model, name)
        if active is not None:
            made.set_adapter(active)
        if seed is not None:
            randomize(made, seed=seed)
        models.append(made)
    return models


def trainable(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


def counts(model: nn.Module) -> tuple[int, int]:
    """Trainable and all parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad), sum(p.numel() for p in model.parameters())


def step(model: nn.Module, x: torch.Tensor, **kwargs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits and gradients of one forward and backward."""
    model.zero_grad()
    out = model(x, **kwargs)
    logits = out.logits if hasattr(out, "logits") else out
    torch.nn.functional.cross_entropy(logits.flatten(0, -2).float(), x.flatten() % logits.shape[-1]).backward()
    return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same_step(ours: nn.Module, theirs: nn.Module, x: torch.Tensor) -> None:
    """The same logits, and the same gradients for the same parameters."""
    (y, grads), (want, want_grads) = step(ours, x), step(theirs, x)
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
    assert list(grads) == list(want_grads)
    for name in grads:
        torch.testing.assert_close(grads[name], want_grads[name], rtol=1e-3, atol=1e-6, msg=name)


# -- what is trained -----------------------------------------------------------------------------------------------


def test_gpt2_trains_the_known_number_of_parameters():
    """Catches a target too many or too few: the figures are those of PEFT's documentation."""
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config())
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        made = LoraModel(model, LoraConfig(), "default")
    assert counts(made) == (294_912, 124_734_720)
    assert made.peft_config["default"].fan_in_fan_out is True


def test_mt0_large_trains_the_known_number_of_parameters():
    """Catches the same on an encoder-decoder, whose cross-attention has targets too."""
    config = transformers.MT5Config(d_model=1024, d_kv=64, d_ff=2816, num_layers=24, num_heads=16, vocab_size=250_112)
    with torch.device("meta"):
        model = transformers.MT5ForConditionalGeneration(config)
        # The published count has a head of its own, as transformers 4 made it; transformers 5 ties it.
        model.lm_head.weight = nn.Parameter(torch.empty(250_112, 1024))
    made = LoraModel(model, LoraConfig(r=8, task_type="SEQ_2_SEQ_LM"), "default")
    assert counts(made) == (2_359_296, 1_231_940_608)


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_biases_that_train_are_those_of_peft(bias):
    """Catches a bias mode that trains too much, or nothing, and a gradient that does not reach a base bias."""
    model = tiny_llama(attention_bias=True)
    ours, theirs = tuned(model, {"bias": bias, "target_modules": ["q_proj", "o_proj"]})
    assert trainable(ours) == trainable(theirs)
    assert_same_step(ours, theirs, ids())


def test_only_one_adapter_may_train_biases():
    """Catches two adapters that both claim the base's biases."""
    made = LoraModel(mlp(), LoraConfig(target_modules=["up"], bias="all"), "a")
    made.peft_config["b"] = LoraConfig(target_modules=["up"], bias="lora_only")
    with pytest.raises(ValueError, match=r"\['a', 'b'\]"):
        made.inject_adapter(made.model, "b")


CASES = {
    "llama": {"target_modules": "all-linear", "r": 4, "lora_alpha": 16},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}, "use_rslora": True},
    "embedding": {"target_modules": ["embed_tokens", "v_proj", "lm_head"]},
    "lora_bias": {"target_modules": ["q_proj", "v_proj"], "lora_bias": True},
    "whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    "inference": {"target_modules": ["q_proj"], "inference_mode": True},
}


@pytest.mark.parametrize("name", CASES)
def test_llama_is_that_of_peft(name):
    """Catches any difference in parameter names, initial bits, what trains, logits or gradients."""
    model = tiny_llama(attention_bias=True)
    ours, theirs = tuned(model, CASES[name], seed=None)
    mine, other = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(other) and all(torch.equal(mine[k], other[k]) for k in mine)
    assert trainable(ours) == trainable(theirs)
    randomize(ours)
    randomize(theirs)
    if name == "inference":
        assert not trainable(ours)
        torch.testing.assert_close(ours(ids()).logits, theirs(ids()).logits, rtol=1e-4, atol=1e-5)
    else:
        assert_same_step(ours, theirs, ids())


@pytest.mark.parametrize("architecture", ["gpt2", "t5"])
def test_other_architectures_are_those_of_peft(architecture):
    """Catches Conv1D's transposed weight, and model code that reads an adapted layer's weight (T5's `wo`)."""
    if architecture == "gpt2":
        config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=128, n_positions=16)
        model = transformers.GPT2LMHeadModel(config).eval()
        ours, theirs = tuned(model, {"target_modules": ["c_attn", "mlp.c_proj", "wte"]})
        assert_same_step(ours, theirs, ids())
    else:
        config = transformers.T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=4, vocab_size=128)
        config.decoder_start_token_id = 0
        model = transformers.T5ForConditionalGeneration(config).eval()
        ours, theirs = tuned(model, {"target_modules": ["q", "v", "wo"]})
        x = ids()
        (y, grads), (want, want_grads) = step(ours, x, labels=x), step(theirs, x, labels=x)
        torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
        assert list(grads) == list(want_grads)


def test_bfloat16_model_with_fp32_adapters_under_autocast():
    """Catches a mix of dtypes that fails, or adapters that are not widened as PEFT's are."""
    model = tiny_llama().bfloat16()
    ours, theirs = tuned(model, {"target_modules": "all-linear"})
    for made in (ours, theirs):
        made._cast_adapter_dtype("a")
    dtypes = {n: p.dtype for n, p in ours.named_parameters()}
    assert dtypes == {n: p.dtype for n, p in theirs.named_parameters()}
    assert torch.float32 in dtypes.values() and torch.bfloat16 in dtypes.values()
    assert trainable(ours) == trainable(theirs)
    with torch.autocast("cpu", torch.bfloat16):
        y, want = ours(ids()).logits, theirs(ids()).logits
    assert y.dtype == want.dtype
    torch.testing.assert_close(y, want, rtol=0.1, atol=0.05)


def test_thirty_steps_follow_pefts_curve():
    """Catches a gradient that is slightly wrong: it adds up over steps."""
    losses = []
    for made in tuned(tiny_llama(), {"target_modules": "all-linear", "r": 4}, seed=None):
        optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=1e-2)
        losses.append([])
        for i in range(30):
            x = ids(seed=i % 3)
            optimizer.zero_grad()
            loss = made(x, labels=x).loss
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0][-1] < 0.9 * losses[0][0]
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 2e-3


# -- several adapters ----------------------------------------------------------------------------------------------

TWO = ({"target_modules": ["up", "down"]}, {"target_modules": ["down", "head"], "r": 3, "lora_alpha": 1})


def test_a_second_adapter_waits_until_it_is_set():
    """Catches a second adapter that is active or trainable at once, or one that freezes the first."""
    ours, theirs = tuned(mlp(), *TWO)
    assert ours.active_adapters == theirs.active_adapters == ["a"]
    assert trainable(ours) == trainable(theirs) and all(".a." in name for name in trainable(ours))
    for active in (["b"], ["a", "b"], "a", ["b", "a"]):
        ours.set_adapter(active)
        theirs.set_adapter(active)
        assert trainable(ours) == trainable(theirs) and ours.active_adapter == theirs.active_adapter
        assert_same_step(ours, theirs, ids())
    ours.set_adapter("b", inference_mode=True)
    assert not trainable(ours)
    ours.set_requires_grad("a")
    assert trainable(ours) and all(".a." in name for name in trainable(ours))
    with pytest.raises(ValueError, match="typo"):
        ours.set_adapter("typo")
    with pytest.raises(ValueError, match="typo"):
        ours.set_requires_grad(["typo"])


def test_disable_and_enable():
    """Catches adapters that stay trainable while disabled, or frozen after."""
    ours, theirs = tuned(mlp(), *TWO)
    for made in (ours, theirs):
        made.disable_adapter_layers()
    assert trainable(ours) == trainable(theirs) == []
    assert torch.equal(ours(ids()), mlp()(ids()))
    for made in (ours, theirs):
        made.enable_adapter_layers()
    assert trainable(ours) == trainable(theirs) != []
    made = LoraModel(mlp(), LoraConfig(target_modules=["up"], bias="all"), "a")
    with pytest.warns(UserWarning, match="biases"):
        made.disable_adapter_layers()


@pytest.mark.parametrize("deleted, active", [("a", ["a"]), ("b", ["a"]), ("a", ["a", "b"]), ("b", ["b"])])
def test_deleting_is_as_in_peft(deleted, active):
    """Catches parameters left behind, an active adapter that no longer exists, and layers that disagree on it."""
    ours, theirs = tuned(mlp(), *TWO, active=active)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours.delete_adapter(deleted)
        theirs.delete_adapter(deleted)
    left = "b" if deleted == "a" else "a"
    assert list(ours.state_dict()) == list(theirs.state_dict()) and list(ours.peft_config) == [left]
    assert ours.active_adapters == [left]
    assert {tuple(m.active_adapters) for m in ours.modules() if isinstance(m, BaseTunerLayer)} == {(left,)}
    want, _ = tuned(mlp(), *TWO, active=[left])
    torch.testing.assert_close(ours(ids()), want(ids()))
    assert trainable(ours) == [n for n in trainable(want) if f".{deleted}." not in n]


def test_deleting_what_is_not_there_or_is_merged_is_refused():
    """Catches an adapter whose part stays in the weights for good."""
    ours, _ = tuned(mlp(), *TWO)
    with pytest.raises(ValueError, match="typo"):
        ours.delete_adapter("typo")
    ours.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        ours.delete_adapter("a")
    with pytest.raises(ValueError, match="merged"):
        ours.inject_adapter(ours.model, "a")
    ours, _ = tuned(mlp(), *TWO)
    ours.delete_adapter("b")
    ours.delete_adapter("a")
    assert ours.active_adapters == [] and torch.equal(ours(ids()), mlp()(ids()))


def test_setting_an_adapter_unmerges():
    """Catches a merged adapter that stays in the weight under another one."""
    ours, _ = tuned(mlp(), *TWO)
    ours.set_adapter("b")
    want = ours(ids())
    ours.set_adapter("a")
    ours.merge_adapter()
    with pytest.warns(UserWarning, match="unmerged"):
        ours.set_adapter("b")
    torch.testing.assert_close(ours(ids()), want)


# -- merging and unloading -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [None, ["a"], ["b"], ["a", "b"]])
def test_merge_and_unload_is_that_of_peft(names):
    """Catches other bits in a merged checkpoint, or modules of ours left in it."""
    ours, theirs = tuned(mlp(), *TWO)
    ours.set_adapter(names or ["a"])
    want = ours(ids())
    ours.set_adapter("a")
    merged, other = ours.merge_and_unload(adapter_names=names), theirs.merge_and_unload(adapter_names=names)
    mine, wanted = merged.state_dict(), other.state_dict()
    assert list(mine) == list(wanted) == list(mlp().state_dict())
    assert all(torch.equal(mine[k], wanted[k]) for k in mine)
    assert not any(isinstance(m, BaseTunerLayer) for m in merged.modules()) and not hasattr(merged, "peft_config")
    torch.testing.assert_close(merged(ids()), want)


def test_unload_gives_the_base_back():
    """Catches an unload that merges, or a model that cannot be adapted again."""
    model = mlp()
    before = [id(m) for m in model.modules()]
    made = LoraModel(model, LoraConfig(target_modules=["up", "emb"], init_lora_weights=False), "default")
    base = made.unload()
    assert base is model and [id(m) for m in model.modules()] == before
    assert torch.equal(base(ids()), mlp()(ids()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LoraModel(base, LoraConfig(target_modules=["up"]), "default")


def test_merge_adapter_and_back():
    """Catches a model whose output changes by merging or by unmerging."""
    ours, theirs = tuned(
        tiny_llama(), {"target_modules": "all-linear"}, {"target_modules": ["q_proj"]}, active=["a", "b"]
    )
    want = ours(ids()).logits
    for safe in (False, True):
        ours.merge_adapter(["b"], safe_merge=safe)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ours.merge_adapter(safe_merge=safe)
        torch.testing.assert_close(ours(ids()).logits, want, rtol=1e-4, atol=1e-5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ours.unmerge_adapter()
        torch.testing.assert_close(ours(ids()).logits, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(theirs(ids()).logits, want, rtol=1e-4, atol=1e-5)


def test_a_merge_that_one_layer_refuses_changes_none():
    """Catches a model that is half merged after an error."""
    model = mlp()
    nn.utils.parametrizations.weight_norm(model.head)
    made = LoraModel(model, LoraConfig(target_modules=["up", "head"], init_lora_weights=False), "default")
    before = made.model.up.weight.detach().clone()
    for merge in (made.merge_adapter, made.merge_and_unload):
        with pytest.raises(TypeError, match="parametrized"):
            merge()
        assert torch.equal(made.model.up.weight, before)


# -- modules trained whole -----------------------------------------------------------------------------------------


def test_modules_to_save_are_those_of_peft():
    """Catches another name, a copy that is not trained, or an original that is."""
    whole = {"target_modules": ["up"], "modules_to_save": ["head"]}
    ours, theirs = tuned(mlp(), whole, {"target_modules": ["up"]}, whole | {"r": 2}, seed=None)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert "model.head.modules_to_save.a.weight" in ours.state_dict()
    assert isinstance(ours.model.head, ModulesToSaveWrapper)
    for active in ("a", "c", "b", ["b", "a"], "c"):
        for made in (ours, theirs):
            made.set_adapter(active)
            randomize(made)
        assert trainable(ours) == trainable(theirs), active
        assert_same_step(ours, theirs, ids())
    with pytest.raises(ValueError, match="one active adapter at a time"):
        ours.set_adapter(["a", "c"])
    for made in (ours, theirs):
        made.set_adapter("a")
        made.disable_adapter_layers()
    torch.testing.assert_close(ours(ids()), theirs(ids()))
    for made in (ours, theirs):
        made.enable_adapter_layers()
    assert trainable(ours) == trainable(theirs)
    assert ours.model.head.weight is ours.model.head.modules_to_save["a"].weight
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours.delete_adapter("c")
        theirs.delete_adapter("c")
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert torch.equal(ours.merge_and_unload()(ids()), theirs.merge_and_unload()(ids()))


def test_adapters_that_cannot_be_active_together_change_nothing():
    """Catches a refusal that comes after some modules were switched and others not."""
    ours, _ = tuned(mlp(), {"target_modules": ["emb"], "modules_to_save": ["up"]}, {"target_modules": ["emb"]})
    ours.peft_config["c"] = LoraConfig(target_modules=["emb"], modules_to_save=["down", "up"])
    ours.inject_adapter(ours.model, "c")
    ours.peft_config["d"] = LoraConfig(target_modules=["emb"], modules_to_save=["down"])
    ours.inject_adapter(ours.model, "d")
    before = fingerprint(ours)
    with pytest.raises(ValueError, match="one active adapter at a time"):
        ours.set_adapter(["b", "d", "c"])
    assert fingerprint(ours) == before


@pytest.mark.parametrize("method", ["merge_and_unload", "unload"])
def test_a_module_trained_whole_may_hold_another_adapters_layers(method):
    """Catches an unloading that stops half way, at a layer whose name was another before its wrapper was taken away."""
    blocks = nn.Sequential(OrderedDict(body=nn.Sequential(OrderedDict(up=nn.Linear(6, 6))), head=nn.Linear(6, 6)))
    whole = {"target_modules": ["head"], "modules_to_save": ["body"]}
    ours, theirs = tuned(blocks, {"target_modules": ["up"]}, whole)
    assert list(get_peft_model_state_dict(ours, adapter_name="a")) == [f"model.body.up.lora_{f}.weight" for f in "AB"]
    x = torch.randn(3, 6)
    torch.testing.assert_close(ours(x), theirs(x))
    want = ours(x) if method == "merge_and_unload" else blocks(x)
    merged = getattr(ours, method)()  # PEFT leaves the adapted layer in the module
    assert list(merged.state_dict()) == list(blocks.state_dict())
    torch.testing.assert_close(merged(x), want)


@pytest.mark.parametrize("method", ["merge_and_unload", "unload"])
def test_a_trained_head_outlives_unloading_while_adapters_are_disabled(method):
    """Catches adapters merged and the head trained with them lost, because forward happened to be the base's."""
    ours, theirs = tuned(mlp(), {"target_modules": ["up"], "modules_to_save": ["head"]})
    kept = ours.model.head.modules_to_save["a"].weight
    for made in (ours, theirs):
        made.disable_adapter_layers()
    merged, other = getattr(ours, method)(), getattr(theirs, method)()
    assert merged.head.weight is kept
    torch.testing.assert_close(merged(ids()), other(ids()))


def test_a_wrapper_refuses_what_it_cannot_wrap():
    """Catches a copy of a container, which has no forward, and of an adapted layer."""
    for module in (nn.ModuleList([nn.Linear(1, 1)]), peftkern.nn.LoraLinear(2, 2)):
        with pytest.raises(TypeError, match="modules_to_save"):
            ModulesToSaveWrapper(module, "a")


def test_a_head_that_was_tied_and_is_trained_stays_untied():
    """Catches a merged model that ties its head again when it is loaded, and loses the training."""
    model = tiny_llama(tie_word_embeddings=True)
    with pytest.warns(UserWarning, match="tied"):
        made = LoraModel(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), "default")
    randomize(made)
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        merged = made.merge_and_unload()
    assert merged.config.tie_word_embeddings is False


# -- other doors ---------------------------------------------------------------------------------------------------


def test_inject_adapter_in_model():
    """Catches a wrapper around the user's model, other keys than PEFT's, and one injection that undoes another."""
    ours, theirs = mlp(), mlp()
    torch.manual_seed(3)
    assert inject_adapter_in_model(LoraConfig(target_modules=["up"]), ours) is ours
    torch.manual_seed(3)
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["up"]), theirs)
    mine, other = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(other) and all(torch.equal(mine[k], other[k]) for k in mine)
    with pytest.warns(UserWarning, match="'second' joins"):
        peftkern.inject_adapter_in_model(LoraConfig(target_modules=["down"]), ours, "second")
    assert list(ours.peft_config) == ["default", "second"]
    with pytest.warns(UserWarning):
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["down"]), theirs, "second")
    assert trainable(ours) == trainable(theirs)
    for made in (ours, theirs):
        randomize(made)
    assert_same_step(ours, theirs, ids())
    with pytest.raises(TypeError, match="str"):
        inject_adapter_in_model("lora", mlp())
    with pytest.raises(TypeError, match="expected a PeftConfig of peftkern's, got peft.tuners.lora.config.LoraConfig"):
        inject_adapter_in_model(peft.LoraConfig(target_modules=["up"]), mlp())
    with pytest.raises(TypeError, match="PeftConfig of peftkern's, got peft.tuners.lora.config.LoraConfig"):
        peftkern.get_peft_model(mlp(), peft.LoraConfig(target_modules=["up"]))
    with pytest.raises(TypeError, match="LoraConfig"):
        LoraModel(mlp(), peft.LoraConfig(target_modules=["up"]), "default")


@pytest.mark.parametrize("name", ["default", "x"])
def test_a_layer_of_the_other_door_is_part_of_the_base(name, tmp_path):
    """Catches a layer of `peftkern.nn` whose own adapter is trained, switched, merged or saved by a model around it."""
    model = mlp()
    model.up = own = peftkern.nn.LoraLinear.from_linear(model.up, r=2, init_lora_weights=False)
    before = model(ids())
    with pytest.warns(UserWarning, match="part of the base model: 'up' keep their adapters, which are frozen"):
        made = peftkern.get_peft_model(model, LoraConfig(target_modules=["down", "emb"]), adapter_name=name)
    assert trainable(made) == [key for key in dict(made.named_parameters()) if f".{name}" in key and ".up." not in key]
    assert torch.equal(made(ids()), before), "the new adapter starts from nothing"
    made.save_pretrained(tmp_path)
    folder = tmp_path if name == "default" else tmp_path / name
    assert not any(".up." in key for key in peftkern.load_peft_weights(folder))
    randomize(made)
    with made.disable_adapter():
        base = made(ids())
    model.up, held = own.base_layer, model.up
    with made.disable_adapter():
        assert not torch.equal(made(ids()), base), "disabling took the layer's own adapter away"
    model.up = held
    made.add_adapter("b", LoraConfig(target_modules=["down"]))
    made.set_adapter("b")
    assert torch.equal(made(ids()), base) and not any(p.requires_grad for p in own.parameters())
    made.set_requires_grad(name)
    assert not any(p.requires_grad for p in own.parameters())
    made.set_adapter(name)
    y = made(ids())
    with torch.no_grad():
        assert torch.equal(made(ids(), adapter_names=["__base__"] * len(ids())), base)
        rows = made(ids(), adapter_names=[name] * len(ids()))
    torch.testing.assert_close(rows, y)
    made.merge_adapter()
    assert made.model.down.merged and not own.merged
    merged = made.merge_and_unload()
    assert merged.up is own and own.active_adapters == ["default"] and type(merged.down) is nn.Linear
    torch.testing.assert_close(merged(ids()), y)


@pytest.mark.parametrize("targets", [["up"], ["down", "up"]])
def test_a_layer_of_the_other_door_is_no_target(targets):
    """Catches a second adapter quietly put beside a layer's own, and "all-linear" that cannot be had beside one."""
    model = mlp()
    model.up = peftkern.nn.LoraLinear.from_linear(model.up, r=2)
    for config in (
        LoraConfig(target_modules=targets),
        peftkern.IA3Config(target_modules=targets, feedforward_modules=[]),
    ):
        with pytest.raises(ValueError, match="target_modules names 'up', a layer of peftkern.nn"):
            peftkern.get_peft_model(model, config)
    with pytest.warns(UserWarning, match="part of the base"):
        made = peftkern.get_peft_model(model, LoraConfig(target_modules="all-linear"))
    assert made.targeted_module_names and "up" not in made.targeted_module_names


def test_copies_and_pickles():
    """Catches a layer that loses its state in a copy, or shares it with the original."""
    ours, _ = tuned(mlp(), {"target_modules": ["up", "emb"], "lora_dropout": 0.5}, {"target_modules": ["up"]})
    ours.eval()
    for made in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(made(ids()), ours(ids()))
        made.merge_adapter()
        assert made.model.up.merged and not ours.model.up.merged
        with pytest.warns(UserWarning, match="unmerged"):
            made.set_adapter("b")
        assert ours.active_adapters == ["a"]


def test_low_cpu_mem_usage_leaves_values_to_the_file():
    """Catches values drawn for nothing, an adapter that cannot take the file's, and one that takes part before it has
    any, in forward or a merge: torch multiplies by whatever is in memory."""
    state = torch.get_rng_state()
    made = LoraModel(mlp(), LoraConfig(target_modules=["up", "emb"]), "default", low_cpu_mem_usage=True)
    assert torch.equal(state, torch.get_rng_state())
    adapter = {n: p for n, p in made.named_parameters() if "lora_" in n}
    assert len(adapter) == 4 and all(p.is_meta for p in adapter.values())
    empty = LoraModel(mlp(), LoraConfig(target_modules=["up"]), "default", low_cpu_mem_usage=True)
    for use in (lambda: empty(ids()), lambda: empty(ids(), adapter_names=["default"] * 2), empty.merge_adapter):
        with pytest.raises(ValueError, match="'default'.* is on the meta device"):
            use()
    made.load_state_dict({n: torch.ones(p.shape) for n, p in adapter.items()}, strict=False, assign=True)
    assert made.model.up.explain_row().fused and made(ids()).isfinite().all()


def test_attributes_are_those_of_the_wrapped_model():
    """Catches `model.config` and the like that PeftModel's users ask for."""
    model = tiny_llama()
    made = LoraModel(model, LoraConfig(), "default")
    assert made.config is model.config and made.get_input_embeddings() is model.model.embed_tokens
    assert made.model is model and model.peft_config is made.peft_config and made.prefix == "lora_"
    assert _get_submodules(model, "model.layers.0.self_attn.q_proj")[2] == "q_proj"
    with pytest.raises(AttributeError):
        _ = made.no_such_thing
    with (
        pytest.raises(ValueError, match="no adapter is named .'a'"),
        made._enable_peft_forward_hooks(adapter_names=["a"]),
    ):
        pass


def test_a_failed_injection_changes_nothing():
    """Catches a base model that is half adapted, frozen or hooked after an error."""
    model = tiny_llama()
    before = fingerprint(model)
    for config, error in (
        ({"target_modules": ["q_proj", "norm"]}, ValueError),
        ({"target_modules": ["typo"]}, ValueError),
        ({"target_modules": ["embed_tokens", "q_proj"], "lora_bias": True}, ValueError),
        ({"target_modules": ["lm_head"], "modules_to_save": ["layers"]}, TypeError),
    ):
        with pytest.raises(error):
            LoraModel(model, LoraConfig(**config), "default")
        with pytest.raises(ValueError, match="adapter_name"):
            LoraModel(model, LoraConfig(), "not.a.name")
        assert fingerprint(model) == before
