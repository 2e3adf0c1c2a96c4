"""`target_parameters`, LoRA on stacked experts and other parameters, beside PEFT's: numbers, names, files, merging."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import peftkern
from moe_models import FAMILIES, moe, net, randomize, tokens
from peftkern.tuners.lora import ParamWrapper
from peftkern.utils.adapter_error import AdapterFileError

peft: Any = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::FutureWarning")

BOTH = {name: ["experts.gate_up_proj", "experts.down_proj"] for name in FAMILIES}
BOTH["nemotron_h"] = ["experts.up_proj", "experts.down_proj"]


def adapted(library: Any, family: str, adapter: str = "default", base: Any = None, **fields: Any) -> Any:
    """The family's model with an adapter by PEFT or by peftkern, initial values drawn from the same seed."""
    fields = dict(r=3, lora_alpha=5, target_modules=["q_proj"], target_parameters=BOTH.get(family)) | fields
    torch.manual_seed(7)
    base = moe(family) if base is None else base
    return library.get_peft_model(base, library.LoraConfig(**fields), adapter_name=adapter)


def pair(family: str, **fields: Any) -> tuple[Any, Any]:
    return tuple(adapted(library, family, **fields).eval() for library in (peft, peftkern))  # type: ignore[return-value]


def run(model: Any, ids: torch.Tensor | None = None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and the gradient of every parameter that is trained."""
    ids = tokens() if ids is None else ids
    model.zero_grad()
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return out.logits.detach(), {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}


def close(a: torch.Tensor, b: torch.Tensor, within: float = 2e-5) -> None:
    """Equal up to what float32 loses over two layers, of the largest element."""
    assert a.shape == b.shape
    assert (a - b).abs().max() <= within * b.abs().max().clamp(min=1e-6)


def same(model: Any, other: Any) -> None:
    """The same logits, and the same gradients of the same parameters."""
    (y, grads), (expected, truth) = run(model), run(other)
    close(y, expected)
    assert grads.keys() == truth.keys() and len(grads) >= 2
    for name, gradient in grads.items():
        close(gradient, truth[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_and_names_are_pefts(family):
    """Catches wrappers nested in another order, values drawn in another order, lora_B read with the rank outside of the
    experts, a transposed stack taken for a plain one, interleaved gates, biases of another expert."""
    theirs, mine = pair(family)
    before = [dict(model.named_parameters()) for model in (theirs, mine)]
    assert list(before[0]) == list(before[1])
    assert all(torch.equal(p, before[1][name]) for name, p in before[0].items())
    assert [p.requires_grad for p in before[0].values()] == [p.requires_grad for p in before[1].values()]
    for model in (theirs, mine):
        randomize(model)
    same(mine, theirs)
    assert mine.base_model.targeted_parameter_names == theirs.base_model.targeted_parameter_names
    assert mine.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    paths = {row.path for row in peftkern.explain(mine).rows if "experts" in row.name}
    assert paths == ({"unfused"} if family == "llama4" else {"torch"})


@pytest.mark.parametrize("family, targets", [("mixtral", ["down_proj"]), ("gpt_oss", ["experts.gate_up_proj"])])
def test_one_projection(family, targets):
    """Catches a projection without an adapter that is left out or given the other one's."""
    theirs, mine = pair(family, target_modules=[], target_parameters=targets, use_rslora=True)
    for model in (theirs, mine):
        randomize(model)
    same(mine, theirs)


def test_patterns_and_layers():
    """Catches rank_pattern and alpha_pattern that are matched against the module's name, and a parameter named in full
    that is adapted in every layer."""
    key = "model.layers.1.mlp.experts.gate_up_proj"
    fields = dict(rank_pattern={"experts.down_proj": 5}, alpha_pattern={r".*\.gate_up_proj": 9}, target_modules=[])
    theirs, mine = pair("mixtral", target_parameters=[key, "experts.down_proj"], **fields)
    for model in (theirs, mine):
        randomize(model)
    same(mine, theirs)
    wrappers = [m for m in mine.modules() if isinstance(m, ParamWrapper)]
    assert [(w.parameter_name, w.r["default"], w.lora_alpha["default"]) for w in wrappers] == [
        ("down_proj", 5, 5),
        ("down_proj", 5, 5),
        ("gate_up_proj", 3, 9),
    ]


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_three_steps_of_training(family):
    """Catches gradients that are right once and are not cleared, and anything that only shows when B is not zero."""
    theirs, mine = pair(family, init_lora_weights="gaussian")
    losses: list[list[float]] = []
    for model in (theirs, mine):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        losses.append([])
        for seed in range(3):
            loss = model.train()(input_ids=tokens(seed=seed), labels=tokens(seed=seed)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    others = dict(theirs.named_parameters())  # in another order: PEFT's wrappers take parameters out and put them back
    for name, p in mine.named_parameters():
        close(p.detach(), others[name].detach())


ALL_LINEAR = {
    "all-linear": dict(target_modules="all-linear"),
    "names": dict(target_modules=["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
    "both": dict(target_modules=["k_proj", "down_proj"], target_parameters=["gate.weight"]),
    "expression": dict(target_modules=r".*\.(q_proj|experts\.(gate_proj|up_proj)|mlp\.gate)"),
    "parameters alone": dict(target_modules=None, target_parameters=["experts.down_proj"]),
}


@pytest.mark.parametrize("case", ALL_LINEAR)
def test_names_of_layers_that_became_parameters(case):
    """Catches "all-linear" and lists of names that mean other things than in PEFT: experts that stay frozen, a gate_up
    with the rank of one of its halves, a router that is left out."""
    theirs, mine = pair("qwen3_moe", **{"target_parameters": None, **ALL_LINEAR[case]})
    a, b = theirs.peft_config["default"], mine.peft_config["default"]
    assert set(a.target_modules) == set(b.target_modules or ())
    assert set(a.target_parameters) == set(b.target_parameters)
    assert a.rank_pattern == b.rank_pattern and a.alpha_pattern == b.alpha_pattern
    for model in (theirs, mine):
        randomize(model)
    same(mine, theirs)


def test_an_expression_keeps_its_layers():
    """Catches an expression about one layer that adapts all, as PEFT's does once an expert is among its targets."""
    expression = r"model\.layers\.1\.(mlp\.experts\.down_proj|self_attn\.q_proj)"
    mine = adapted(peftkern, "qwen3_moe", target_modules=expression, target_parameters=None)
    assert mine.targeted_module_names == ["model.layers.1.self_attn.q_proj"]
    assert mine.targeted_parameter_names == ["model.layers.1.mlp.experts.down_proj"]


def test_what_all_linear_leaves_out_is_said():
    """Catches shared experts without an adapter and without a word, where PEFT takes their names for the experts'."""
    import transformers

    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=40)
    sizes |= dict(num_key_value_heads=1, n_routed_experts=2, n_shared_experts=1, n_group=1, topk_group=1, head_dim=8)
    config = transformers.Glm4MoeConfig(moe_intermediate_size=16, first_k_dense_replace=1, **sizes)
    with pytest.warns(UserWarning, match="layers.0.mlp.down_proj.* get no adapter.*stacked in one parameter"):
        mine = adapted(peftkern, "", base=transformers.Glm4MoeForCausalLM(config), target_modules="all-linear")
    assert "model.layers.1.mlp.experts.gate_up_proj" in mine.targeted_parameter_names
    other = adapted(peft, "", base=transformers.Glm4MoeForCausalLM(config), target_modules="all-linear")
    assert list(dict(mine.named_parameters())) == list(dict(other.named_parameters()))


def test_half_of_a_parameter_is_refused():
    """Catches gate_proj without up_proj, which would adapt both."""
    with pytest.raises(ValueError, match=r"target_modules names \['gate_proj'\] but not \['up_proj'\].*gate_up_proj"):
        adapted(peftkern, "qwen3_moe", target_modules=["gate_proj", "q_proj"], target_parameters=None)


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h"])
def test_files_go_both_ways(family, tmp_path):
    """Catches other names or shapes in a file, and a file of ours that PEFT cannot read or the other way round."""
    theirs, mine = pair(family, modules_to_save=["lm_head"])
    for seed, (model, folder) in enumerate(((theirs, "theirs"), (mine, "ours"))):
        randomize(model, seed=seed + 1)
        model.save_pretrained(tmp_path / folder)
    a, b = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("theirs", "ours"))
    assert {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}
    configs = [json.loads((tmp_path / f / "adapter_config.json").read_text()) for f in ("theirs", "ours")]
    for config in configs:
        config["target_modules"] = sorted(config["target_modules"] or ())
        config["target_parameters"] = sorted(config["target_parameters"])
        config.pop("peft_version")
    assert configs[0] == configs[1]
    same(peftkern.PeftModel.from_pretrained(moe(family), tmp_path / "theirs", is_trainable=True).eval(), theirs)
    same(peft.PeftModel.from_pretrained(moe(family), tmp_path / "ours", is_trainable=True).eval(), mine)
    empty = peftkern.PeftModel.from_pretrained(moe(family), tmp_path / "ours", low_cpu_mem_usage=True)
    close(run_logits(empty), run_logits(mine))


def run_logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens()).logits


def test_files_that_do_not_fit(tmp_path):
    """Catches a stacked factor of another number of experts, or without its partner, that is read all the same."""
    mine = adapted(peftkern, "mixtral")
    mine.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight"
    assert tensors[key].shape == (3 * 4, 16)
    with pytest.raises(AdapterFileError, match=r"experts.base_layer.lora_A.weight.*shape is \[12, 16\].*\[15, 16\]"):
        peftkern.PeftModel.from_pretrained(moe("mixtral", num_local_experts=5), tmp_path)
    save_file({k: v for k, v in tensors.items() if k != key}, file)
    with pytest.raises(AdapterFileError, match="partner"):
        peftkern.PeftModel.from_pretrained(moe("mixtral"), tmp_path)
    save_file(tensors | {key: torch.zeros(4, 16)}, file)
    with pytest.raises(AdapterFileError, match="rank"):
        peftkern.PeftModel.from_pretrained(moe("mixtral"), tmp_path)
    base = moe("mixtral")
    before = {name: id(module) for name, module in base.named_modules()}
    with pytest.raises(AdapterFileError):
        peftkern.PeftModel.from_pretrained(base, tmp_path)
    assert before == {name: id(module) for name, module in base.named_modules()}


def test_state_dict_alone_does_not_tell():
    """Catches an injection from a state dict, whose names do not say which parameter a wrapper is of."""
    state = peftkern.get_peft_model_state_dict(adapted(peftkern, "mixtral"))
    config = peftkern.LoraConfig(r=3, target_modules=["q_proj"], target_parameters=BOTH["mixtral"])
    with pytest.raises(ValueError, match="state_dict: .*target_parameters"):
        peftkern.inject_adapter_in_model(config, moe("mixtral"), state_dict=state)


def per_expert_file(folder: Path, family: str, router: bool) -> None:
    """An adapter as transformers 4 had it: LoRA of rank 2 on each expert's layers, and on the router."""
    names, block = ("w1", "w3", "w2"), "block_sparse_moe"
    if family != "mixtral":
        names, block = ("gate_proj", "up_proj", "down_proj"), "mlp"
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(2):
        prefix = f"base_model.model.model.layers.{layer}.{block}"
        count = 4 if family == "mixtral" else 5
        sizes = {f"experts.{e}.{n}": (24, 16) if n != names[2] else (16, 24) for e in range(count) for n in names}
        for module, (out, inner) in (sizes | ({"gate": (count, 16)} if router else {})).items():
            tensors[f"{prefix}.{module}.lora_A.weight"] = torch.randn(2, inner, generator=generator) * 0.3
            tensors[f"{prefix}.{module}.lora_B.weight"] = torch.randn(out, 2, generator=generator) * 0.3
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = [*names, *(["gate"] if router else [])]
    peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets, inference_mode=True).save_pretrained(folder)


@pytest.mark.parametrize("family, router", [("mixtral", False), ("qwen3_moe", False), ("qwen3_moe", True)])
def test_files_of_single_experts(family, router, tmp_path):
    """Catches adapters of older files that are not loaded, halves of gate_up in another order, experts mixed up, and an
    adapter of two halves that is scaled as one."""
    per_expert_file(tmp_path, family, router)
    theirs, mine = (lib.PeftModel.from_pretrained(moe(family), tmp_path) for lib in (peft, peftkern))
    close(run_logits(mine), run_logits(theirs))
    assert (run_logits(mine) - run_logits(moe(family))).abs().max() > 1e-3
    for (name, a), (_, b) in zip(mine.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    gone = next(key for key in tensors if ".experts.1." in key).partition(".lora_")[0]
    save_file({k: v for k, v in tensors.items() if not k.startswith(gone)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterFileError, match=r"experts\.1\..*missing, while those of other experts"):
        peftkern.PeftModel.from_pretrained(moe(family), tmp_path)


def test_a_router_of_an_older_file():
    """Catches a router's adapter that is lost because its module had another name."""
    mine = adapted(peftkern, "mixtral", target_modules=[], target_parameters=["gate.weight"])
    randomize(mine)
    state = peftkern.get_peft_model_state_dict(mine)
    assert all(".mlp.gate.lora_" in key for key in state)
    other = adapted(peftkern, "mixtral", target_modules=[], target_parameters=["gate.weight"])
    old = {key.replace(".mlp.", ".block_sparse_moe."): value for key, value in state.items()}
    result = peftkern.set_peft_model_state_dict(other, old)
    assert not result.missing_keys and not result.unexpected_keys
    close(run_logits(other), run_logits(mine))


# -- several adapters, merging ----------------------------------------------------------------------------------------


def two(library: Any, family: str) -> Any:
    model = adapted(library, family).eval()
    fields = dict(r=2, lora_alpha=3, target_modules=["v_proj"], target_parameters=BOTH[family])
    model.add_adapter("other", library.LoraConfig(**fields))
    randomize(model)
    return model


@pytest.mark.parametrize("family", ["mixtral", "llama4"])
def test_several_adapters(family):
    """Catches a second adapter in wrappers of its own, two active ones that are not added up, one that stays after it
    was deleted, and a disabled or deleted one that learns."""
    theirs, mine = two(peft, family), two(peftkern, family)
    assert list(dict(mine.named_parameters())) == list(dict(theirs.named_parameters()))
    base = run_logits(moe(family))
    for names in ("default", "other", ["default", "other"]):
        for model in (theirs, mine):
            model.base_model.set_adapter(names)
        same(mine, theirs)
        with mine.disable_adapter():
            close(run_logits(mine), base)
    for model in (theirs, mine):
        for layer in model.modules():
            if hasattr(layer, "set_scale"):
                layer.set_scale("other", 0.5)
    same(mine, theirs)
    mine.delete_adapter("default")
    theirs.base_model.set_adapter("other")
    same(mine, theirs)
    status = mine.get_layer_status()
    wrapped = [layer for layer in status if "experts" in layer.name]
    assert len(wrapped) == 4 and all(layer.module_type == "lora.ParamWrapper" for layer in wrapped)
    assert all(layer.available_adapters == ["other"] and layer.requires_grad == {"other": True} for layer in wrapped)


def test_adapters_must_have_the_same_parameters():
    """Catches two adapters whose wrappers stand for different parameters, so that files would be read wrongly."""
    mine = adapted(peftkern, "mixtral")
    before = list(mine.state_dict())
    with pytest.raises(
        ValueError, match=r"target_parameters: all adapters.*'experts.down_proj'\] beside .* of 'default'"
    ):
        mine.add_adapter("other", peftkern.LoraConfig(target_parameters=["experts.down_proj"], target_modules=[]))
    assert list(mine.state_dict()) == before
    mine.add_adapter("layers", peftkern.LoraConfig(target_modules=["v_proj"]))
    with torch.no_grad():
        mine.set_adapter("layers")
        close(run_logits(mine.eval()), run_logits(moe("mixtral")))  # B is zero


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4"])
@pytest.mark.parametrize("safe", [False, True])
def test_merging(family, safe):
    """Catches a delta in another layout than the parameter's, a wrapper that adds it again once it is merged, and
    wrappers that stay when adapters are unloaded."""
    theirs, mine = two(peft, family), two(peftkern, family)
    base, y = run_logits(moe(family)), run_logits(mine)
    mine.merge_adapter(safe_merge=safe)
    theirs.merge_adapter(safe_merge=safe)
    close(run_logits(mine), y)
    for (name, a), (_, b) in zip(mine.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-6), name
    with mine.disable_adapter():
        close(run_logits(mine), base)
    mine.merge_adapter(safe_merge=safe)
    mine.unmerge_adapter()
    close(run_logits(mine), y)
    merged = mine.merge_and_unload(safe_merge=safe, adapter_names=["default"])
    assert type(merged) is type(moe(family)) and not any("lora" in name for name, _ in merged.named_parameters())
    assert [type(m) for m in merged.modules()] == [type(m) for m in moe(family).modules()]
    close(run_logits(merged), y)
    close(run_logits(two(peftkern, family).unload()), base)


def test_safe_merge_of_a_broken_adapter():
    """Catches a stack that is half changed when a sum is not finite."""
    mine = adapted(peftkern, "mixtral")
    randomize(mine)
    before = {name: p.clone() for name, p in mine.named_parameters()}
    experts = mine.base_model.model.model.layers[1].mlp.experts
    experts.lora_B["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        mine.merge_adapter(safe_merge=True)
    for name, p in mine.named_parameters():
        if "lora_" not in name:
            assert torch.equal(p, before[name]), name


# -- what is refused --------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "dropout": (dict(lora_dropout=0.1), ValueError, "lora_dropout=0.1 does not go with target_parameters"),
    "fan_in_fan_out": (dict(fan_in_fan_out=True), ValueError, "fan_in_fan_out=True does not go"),
    "lora_bias": (dict(lora_bias=True), ValueError, "lora_bias=True does not go"),
    "dora": (dict(use_dora=True), ValueError, "use_dora=True does not go"),
    "loftq": (dict(init_lora_weights="loftq", loftq_config={"loftq_bits": 4}), ValueError, "'loftq' does not go"),
    "a string": (dict(target_parameters="odd.matrix"), TypeError, "target_parameters must be a list"),
    "nothing there": (dict(target_parameters=["odd.nothing"]), ValueError, r"target_parameters=\['odd.nothing'\] no"),
    "a module": (dict(target_parameters=["odd"]), ValueError, r"target_parameters=\['odd'\] no parameter"),
    "a vector": (dict(target_parameters=["odd.offset"]), ValueError, r"'odd.offset' of shape \[5\]"),
    "integers": (dict(target_parameters=["odd.numbers"]), ValueError, "'odd.numbers', a Parameter of torch.int64"),
    "a layer twice": (
        dict(target_parameters=["last.weight"], target_modules=["last"]),
        ValueError,
        "'last.weight', of a module that target_modules names too",
    ),
    # It was made, and each forward failed at the weight, which such a layer only shows.
    "a layer twice by all-linear": (
        dict(target_parameters=["last.weight"], target_modules="all-linear"),
        ValueError,
        "'last.weight', of a module that target_modules names too",
    ),
    "trained whole": (
        dict(target_parameters=["odd.matrix"], modules_to_save=["odd"]),
        ValueError,
        "'odd.matrix', of a module that modules_to_save trains whole",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case):
    """Catches a field that is ignored, an adapter on what has no matrix, and a model that is changed by a refusal."""
    fields, error, words = REFUSED[case]
    model = net()
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(error, match=words):
        fields = dict(target_modules=[], target_parameters=["odd.matrix"]) | fields
        peftkern.get_peft_model(model, peftkern.LoraConfig(**fields))
    assert before == {name: id(module) for name, module in model.named_modules()}
    assert all(p.requires_grad or name == "odd.numbers" for name, p in model.named_parameters())


def test_parameters_of_the_model_itself():
    """Catches a model that is put into a wrapper of its own."""
    with pytest.raises(ValueError, match="a parameter of the model itself"):
        peftkern.get_peft_model(net().odd, peftkern.LoraConfig(target_parameters=["matrix"], target_modules=[]))


def test_half_a_match_is_warned_about():
    """Catches a name that matches nothing without a word where another field matched."""
    with pytest.warns(RuntimeWarning, match=r"target_parameters=\['no.where'\] matched no parameter"):
        peftkern.get_peft_model(net(), peftkern.LoraConfig(target_modules=["first"], target_parameters=["no.where"]))
    with pytest.warns(RuntimeWarning, match=r"target_modules=\{'nobody'\} matched no module"):
        fields = dict(target_modules=["nobody"], target_parameters=["odd.matrix"])
        peftkern.get_peft_model(net(), peftkern.LoraConfig(**fields))


def test_mixed_batches_and_banks_refuse(tmp_path):
    """Catches rows that all take the active adapter's experts where they named others, and a bank that serves an
    adapter without its experts."""
    mine = adapted(peftkern, "mixtral")
    with pytest.raises(NotImplementedError, match=r"adapter_names.*\['default'\] are on parameters"):
        mine(input_ids=tokens(), adapter_names=["default", "__base__"])
    assert {row.path for row in peftkern.explain(mine, mixed=True).rows if "experts" in row.name} == {"refused"}
    mine.save_pretrained(tmp_path)
    with pytest.raises(NotImplementedError, match=r"model: .*\['default'\] are on parameters"):
        peftkern.AdapterBank(mine)
    bank = peftkern.AdapterBank(moe("mixtral"), target_modules=["q_proj"])
    for adapter in (str(tmp_path), peftkern.LoraConfig(target_parameters=BOTH["mixtral"], target_modules=["q_proj"])):
        with pytest.raises(ValueError, match=r"adapter 'law': target_parameters=\['experts.down_proj'"):
            bank.add("law", adapter)
    fields = dict(target_parameters=BOTH["mixtral"], target_modules=["q_proj"])
    with pytest.raises(ValueError, match="target_parameters=.*the model is an AdapterBank's"):
        bank.model.add_adapter("law", peftkern.LoraConfig(**fields))  # which would end all batches of the bank
    assert bank.names == [] and not any(isinstance(m, ParamWrapper) for m in bank.model.modules())
    with pytest.raises(ValueError, match="adapter 'law': target_parameters"):
        peftkern.AdapterBank.from_pretrained(moe("mixtral"), {"law": tmp_path}, progress=False)
    base = moe("mixtral")
    with pytest.raises(ValueError, match="means parameters in this model .*name linear layers"):
        peftkern.AdapterBank(base, target_modules="all-linear")
    assert not any(isinstance(m, ParamWrapper) for m in base.modules())


# -- any module -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [["odd.matrix"], ["odd.stack"], ["odd.stack", "odd.matrix"], ["last.weight"]])
def test_parameters_of_any_module(targets, tmp_path):
    """Catches a 2D parameter taken for [in, out], keyword arguments that are lost, and base parameters that learn."""
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    grads, ys = [], []
    for library in (peft, peftkern):
        torch.manual_seed(3)
        config = library.LoraConfig(r=2, lora_alpha=5, target_modules=[], target_parameters=targets)
        model = library.get_peft_model(net(), config)
        randomize(model)
        ys.append(model(x))
        ys[-1].square().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    close(ys[1].detach(), ys[0].detach(), 1e-6)
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) == 2 * len(targets)
    for name, gradient in grads[1].items():
        close(gradient, grads[0][name], 1e-5)
    model.save_pretrained(tmp_path)
    close(peft.PeftModel.from_pretrained(net(), tmp_path)(x).detach(), ys[0].detach(), 1e-6)
    merged = model.merge_and_unload()
    assert type(merged.odd).__name__ == "Odd"
    close(merged(x).detach(), ys[0].detach(), 1e-5)


def test_a_forward_that_raises_leaves_the_module():
    """Catches a parameter that stays exchanged for W + delta after an error, and a state dict that has lost it."""
    fields = dict(r=2, target_modules=[], target_parameters=["odd.matrix", "odd.stack"])
    model = peftkern.get_peft_model(net(), peftkern.LoraConfig(**fields))
    randomize(model)
    odd = model.base_model.model.odd.get_base_layer()
    held, x = dict(odd._parameters), torch.ones(2, 6)
    y = model(x)
    odd.fails = True
    with pytest.raises(ArithmeticError, match="as asked"):
        model(x)
    assert all(odd._parameters[name] is p for name, p in held.items())
    odd.fails = False
    assert torch.equal(model(x), y)


def test_a_parametrized_parameter():
    """Catches an adapter that is added before the parametrization, or stays in its list after the call."""
    outputs = []
    for library in (peft, peftkern):
        base = net()
        nn.utils.parametrize.register_parametrization(base.odd, "matrix", nn.Tanh())
        torch.manual_seed(0)
        config = library.LoraConfig(r=2, target_modules=[], target_parameters=["odd.matrix"])
        model = library.get_peft_model(base, config)
        randomize(model)
        outputs.append(model(torch.ones(2, 6)))
    assert torch.allclose(outputs[0], outputs[1], atol=1e-6)
    assert len(base.odd.get_base_layer().parametrizations["matrix"]) == 1
    with pytest.raises(TypeError, match="parametrized"):
        model.merge_adapter()


def test_no_warning_in_ordinary_use(tmp_path):
    """Catches warnings about patterns that decided for a parameter, which PEFT has; and "all-linear" that means other
    layers to a second adapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        mine = adapted(peftkern, "qwen3_moe", target_modules="all-linear", target_parameters=None)
        mine.save_pretrained(tmp_path)
        again = peftkern.PeftModel.from_pretrained(moe("qwen3_moe"), Path(tmp_path))
        again.add_adapter("other", peftkern.LoraConfig(r=2, target_modules="all-linear"))
    names = [{n for n, _ in again.named_parameters() if f".{adapter}." in n} for adapter in ("default", "other")]
    assert {name.replace(".default.", ".other.") for name in names[0]} == names[1] and len(names[1]) == 2 * 2 * (4 + 3)
