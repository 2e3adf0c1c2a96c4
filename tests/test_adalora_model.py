"""`AdaLoraModel` beside real PEFT's: training with ranks that are cut, the loss, files both ways, adapters in turn."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import peftkern
from peftkern import AdaLoraConfig, AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from peftkern.utils.save_and_load import get_peft_model_state_dict, set_peft_model_state_dict
from tiny_models import fingerprint, ids, mlp, randomize, tiny_llama

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SCHEDULE = {"init_r": 6, "target_r": 3, "total_step": 60, "tinit": 10, "tfinal": 15, "deltaT": 5, "lora_alpha": 16}
TARGETS = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}


def made(library: Any = peftkern, base: Any = None, values: bool = True, **fields: Any) -> Any:
    """A model with the adapter "default"."""
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = library.AdaLoraConfig(**(SCHEDULE | TARGETS | fields))
        model = library.get_peft_model(tiny_llama() if base is None else base, config)
    if values:
        randomize(model, ("lora_A", "lora_B", "lora_E"))
    return model


def train(model: Any, steps: range, lr: float = 1e-2) -> list[float]:
    """Plain training; the losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for step in steps:
        batch = ids(seed=step % 5) % 16 + 1
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def pattern_of(model: Any) -> dict[str, list[bool]]:
    """What is left of each layer, by names as in files."""
    pattern = model.peft_config["default"].rank_pattern or {}
    return {name.removesuffix(".default"): list(kept) for name, kept in pattern.items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Any:
    """Peftkern's and PEFT's model after the same training, their losses, and the folders that they were saved to."""
    models, losses, folders = [], [], []
    for library in (peftkern, peft):
        model = made(library, values=False)
        losses.append(train(model, range(62)))
        folders.append(tmp_path_factory.mktemp(library.__name__))
        models.append(model)
    patterns = [pattern_of(model) for model in models]  # which PEFT renames when it saves
    for model, folder in zip(models, folders, strict=True):
        model.save_pretrained(str(folder))
    return models, losses, patterns, folders


def test_training_reaches_the_ranks_of_peft(trained):
    """Catches a schedule, a score, a threshold, a gradient or a regularized loss that differs (fp32, 62 steps)."""
    (ours, theirs), losses, patterns, _ = trained
    assert patterns[0] == patterns[1] and len(patterns[0]) == 6
    ranks = [sum(kept) for kept in patterns[0].values()]
    assert sum(ranks) == 3 * 6 and len(set(ranks)) > 2, "the layers should differ, or the case says little"
    assert losses[1][0] - losses[1][-1] > 0.5
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-5, atol=1e-5)
    mine, other = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(other)
    torch.testing.assert_close(mine, other, rtol=0, atol=2e-5)
    for name, kept in patterns[0].items():
        E = ours.base_model.model.get_parameter(f"{name}.default")
        assert (E[:, 0] != 0).tolist() == kept


def test_files_are_those_of_peft_and_go_both_ways(trained):
    """Catches a tensor that is cut otherwise, a name, a configuration, or a scaling that a file's reader has not."""
    (ours, theirs), _, patterns, folders = trained
    mine, other = (load_file(folder / WEIGHTS) for folder in folders)
    assert {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in other.items()}
    torch.testing.assert_close(mine, other, rtol=0, atol=2e-5)
    configs = [json.loads((folder / CONFIG).read_text()) for folder in folders]
    assert configs[0].pop("peft_version") and configs[1].pop("peft_version")
    configs[1]["target_modules"].sort()
    assert configs[0] == configs[1] and configs[0]["rank_pattern"] == patterns[0]
    y = ours(ids()).logits
    for library in (peftkern, peft):
        for folder, tolerance in zip(folders, (1e-5, 1e-4), strict=True):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                again = library.PeftModel.from_pretrained(tiny_llama(), str(folder))
            torch.testing.assert_close(again(ids()).logits, y, rtol=tolerance, atol=tolerance)
            tensors = get_peft_model_state_dict(again) if library is peftkern else {}
            assert all(torch.equal(value, load_file(folder / WEIGHTS)[key]) for key, value in tensors.items())
    assert len(tensors) == 0 and len(mine) == 3 * 6


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_loaded_adapter_has_its_ranks_and_runs_fused(trained, low_cpu_mem_usage, tmp_path):
    """Catches layers at their first rank, a scaling by the rank that is left, wrong ones that learn, meta tensors."""
    (ours, _), _, patterns, (folder, _) = trained
    y = ours(ids()).logits
    for trainable in (False, True):
        model = PeftModel.from_pretrained(
            tiny_llama(), folder, is_trainable=trainable, low_cpu_mem_usage=low_cpu_mem_usage
        )
        torch.testing.assert_close(model(ids()).logits, y)
        learned = [name for name, p in model.named_parameters() if p.requires_grad]
        assert len(learned) == (18 if trainable else 0)
        rows = peftkern.explain(model).rows
        assert [row.r for row in rows] == [sum(kept) for kept in patterns[0].values()]
        assert {row.path for row in rows if row.r} == {"torch"}
        model.save_pretrained(tmp_path)
        assert (tmp_path / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
        assert json.loads((tmp_path / CONFIG).read_text())["rank_pattern"] == patterns[0]
    model.base_model.update_and_allocate(61)  # nothing is left to mask
    with pytest.raises(ValueError, match="has its ranks cut already"):
        model.base_model.update_and_allocate(20)
    plain = model.base_model.model(ids(), labels=ids()).loss
    assert model(ids(), labels=ids()).loss > plain + 1e-3, "layers of several ranks are not regularized"
    merged = model.merge_and_unload()
    assert not any("lora" in name for name in merged.state_dict())
    torch.testing.assert_close(merged(ids()).logits, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("library", ["ours", "theirs"])
def test_training_resumes_from_a_file_with_all_its_triplets(trained, library, tmp_path):
    """Catches an adapter that loses its size, its optimizer's state then not fitting, or keeps values of triplets that
    were cut; PEFT refuses such a file."""
    (ours, _), _, patterns, folders = trained
    model = made()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    result = model.load_adapter(folders[library == "theirs"], "default", is_trainable=True)
    assert not result.missing_keys and not result.unexpected_keys
    torch.testing.assert_close(model(ids()).logits, ours(ids()).logits, rtol=1e-4, atol=2e-5)
    assert pattern_of(model) == patterns[0]
    for name, p in model.named_parameters():
        if name in before:
            assert p.shape == before[name].shape and p.requires_grad
            kept = patterns[0][name.removeprefix("base_model.model.").rsplit(".", 2)[0] + ".lora_E"]
            cut = p[~torch.tensor(kept)] if "lora_B" not in name else p[:, ~torch.tensor(kept)]
            assert not cut.any() if "lora_E" in name else all(kept) or cut.abs().max() > 1e-3
    losses = train(model, range(61, 65))
    assert pattern_of(model) == patterns[0] and losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    shapes = [{k: v.shape for k, v in load_file(f / WEIGHTS).items()} for f in (tmp_path, folders[0])]
    assert shapes[0] == shapes[1]


def test_the_loss_is_regularized_as_in_peft():
    """Catches a weight, a mean, a norm or a gradient that differs; and what should have none: no labels, a weight of 0,
    adapters that are disabled, merged or frozen."""
    for weight in (0.7, 0.0):
        ours, theirs = (made(library, orth_reg_weight=weight) for library in (peftkern, peft))
        for model in (ours, theirs):
            model(ids(), labels=ids()).loss.backward()
        torch.testing.assert_close(*(model(ids(), labels=ids()).loss for model in (ours, theirs)), rtol=1e-6, atol=0)
        grads = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
        for name, p in ours.named_parameters():
            assert (p.grad is None) == (name not in grads)
            if name in grads:
                torch.testing.assert_close(p.grad, grads[name], rtol=1e-4, atol=1e-7, msg=name)
    model = made(orth_reg_weight=0.7, task_type=None)  # where PEFT leaves it out
    plain = model.base_model.model(ids(), labels=ids()).loss
    added = model(ids(), labels=ids()).loss - plain
    assert added > 0.1 and ours(ids()).loss is None
    torch.testing.assert_close(model.base_model(ids(), labels=ids()).loss - plain, added)
    with model.disable_adapter():
        assert torch.equal(model(ids(), labels=ids()).loss, tiny_llama()(ids(), labels=ids()).loss)
    model.merge_adapter()
    torch.testing.assert_close(model(ids(), labels=ids()).loss, plain)
    model.unmerge_adapter()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(ids(), labels=ids()).loss - model.base_model.model(ids(), labels=ids()).loss
    torch.testing.assert_close(mixed.float(), added, rtol=1e-5, atol=1e-5)  # in 16 bits it would be off by 1e-2


def test_triplets_of_no_layer_left_and_ranks_of_several(tmp_path):
    """Catches a regularization, a file or a model that cannot do with a rank of 0, or with several ranks."""
    model = made()
    names = [name for name, m in model.base_model.model.named_modules() if hasattr(m, "lora_E")]
    pattern = {f"{name}.lora_E.default": [i < rank for i in range(6)] for rank, name in enumerate(names)}
    given = {k: torch.tensor(v) if i % 2 else v for i, (k, v) in enumerate(pattern.items())}
    for name, kept in pattern.items():
        model.base_model.model.get_parameter(name).data[~torch.tensor(kept)] = 0
    y = model(ids()).logits
    full = model(ids(), labels=ids()).loss
    model.base_model.resize_modules_by_rank_pattern(given, "default")
    torch.testing.assert_close(model(ids()).logits, y)
    torch.testing.assert_close(model(ids(16, 48)).logits[:2], model(ids(16, 48)[:2]).logits)  # in groups, and by itself
    rows = peftkern.explain(model, tokens=768).rows
    assert [(row.r, row.path, row.kind) for row in rows[:2]] == [
        (0, "unfused", "Linear (AdaLoRA)"),
        (1, "torch", "Linear (AdaLoRA)"),
    ]
    loss = model(ids(), labels=ids()).loss
    loss.backward()
    assert loss < full and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    model.peft_config["default"].rank_pattern = pattern
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / WEIGHTS)["base_model.model.model.layers.0.self_attn.q_proj.lora_A"].shape == (0, 64)
    for library in (peftkern, peft):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            again = library.PeftModel.from_pretrained(tiny_llama(), str(tmp_path))
        torch.testing.assert_close(again(ids()).logits, y, rtol=1e-4, atol=1e-5)
    tuner = model.base_model
    for wrong, error, message in (
        ({"nothing.lora_E": [True]}, ValueError, "no layer"),
        ({f"{names[3]}.lora_E": [True]}, ValueError, "expected a bool for each of 3"),
        ({f"{names[3]}.lora_E": 3}, TypeError, "must be a list or a tensor"),
    ):
        with pytest.raises(error, match=message):
            tuner.resize_modules_by_rank_pattern(wrong, "default")
    with pytest.raises(ValueError, match="no adapter is named"):
        tuner.resize_modules_by_rank_pattern(pattern, "other")


def test_saving_what_was_cut_but_lives_is_warned_of(tmp_path):
    """Catches a configuration used twice, whose pattern silently cuts the second model's file."""
    model = made()
    name = "model.layers.0.self_attn.q_proj.lora_E"
    model.peft_config["default"].rank_pattern = {name: [False] + [True] * 5}
    with pytest.warns(UserWarning, match="are not zero in .*layers.0.self_attn.q_proj"):
        model.save_pretrained(tmp_path)
    model.base_model.model.get_parameter(f"{name}.default").data[0] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        tensors = get_peft_model_state_dict(model)
    assert tensors[f"base_model.model.{name}"].shape == (5, 1)


def test_adapters_in_turn(tmp_path):
    """Catches a second trainable adapter, and a trainable one that is not known for it after another was."""
    model = made()
    before = str(fingerprint(model))
    with pytest.raises(ValueError, match="only 1 trainable adapter"):
        model.add_adapter("b", AdaLoraConfig(**SCHEDULE, target_modules=["q_proj"]))
    assert str(fingerprint(model)) == before
    model.save_pretrained(tmp_path)
    y = model(ids()).logits
    model.load_adapter(tmp_path, "b")
    model.set_adapter("b")
    torch.testing.assert_close(model(ids()).logits, y)
    plain = model.base_model.model(ids(), labels=ids()).loss
    assert torch.equal(model(ids(), labels=ids()).loss, plain), "the trainable adapter takes no part"
    model.delete_adapter("default")
    assert (model.base_model.trainable_adapter_name, model.base_model.rankallocator) == (None, None)
    with pytest.raises(ValueError, match="no adapter is trainable"):
        model.base_model.update_and_allocate(1)
    model.add_adapter("c", AdaLoraConfig(**SCHEDULE, target_modules=["q_proj"]))
    model.set_adapter("c")
    assert model.base_model.rankallocator.init_bgt == 12
    model(ids(), labels=ids()).loss.backward()
    model.update_and_allocate(11)
    with pytest.raises(TypeError, match="add_weighted_adapter"):
        model.add_weighted_adapter(["b"], [1.0], "d")
    assert type(model.unload()) is type(tiny_llama())


def test_what_cannot_be_done_is_refused_by_name(tmp_path):
    """Catches a batch, a bank or LoftQ that takes AdaLoRA for LoRA, and methods around one another."""
    model = made()
    with pytest.raises(NotImplementedError, match="AdaLoraModel cannot mix adapters"):
        model(ids(), adapter_names=["default", "__base__"])
    assert {row.path for row in peftkern.explain(model, mixed=True).rows} == {"refused"}
    with pytest.raises(TypeError, match="expected LoRA adapters, got AdaLoraModel"):
        peftkern.AdapterBank(model, slots=2, max_rank=8)
    bank = peftkern.AdapterBank(tiny_llama(), slots=2, max_rank=8, target_modules=["q_proj"])
    model.save_pretrained(tmp_path)
    for config in (tmp_path, model.peft_config["default"]):
        with pytest.raises(ValueError, match="LoRA"):
            bank.add("a", config)
    with pytest.raises(ValueError, match="expected LoRA adapters, got AdaLoraModel"):
        peftkern.replace_lora_weights_loftq(model)
    for first, second in ((made(base=mlp(), **{"target_modules": ["up"]}), LoraConfig(target_modules=["up"])),):
        with pytest.raises(ValueError, match="another method"):
            peftkern.LoraModel(first.base_model.model, second, "b")
    lora = get_peft_model(mlp(), LoraConfig(target_modules=["up"]))
    with pytest.raises(ValueError, match="another method"):
        peftkern.AdaLoraModel(lora.base_model.model, AdaLoraConfig(total_step=5, target_modules=["up"]), "b")
    base = mlp()
    before = str(fingerprint(base))
    with pytest.raises(ValueError, match="Embedding: AdaLoRA is built for nn.Linear"):
        get_peft_model(base, AdaLoraConfig(total_step=5, target_modules=["emb", "up"]))
    assert str(fingerprint(base)) == before


DAMAGE = [
    (lambda t, k: t.pop(k), "partners are missing: lora_E"),
    (lambda t, k: t.__setitem__(k, t[k][:-1].clone()), "rank is 5"),
    (lambda t, k: t.__setitem__(k, t[k].int()), "floating point"),
    (lambda t, k: t.__setitem__(k, t[k].view(-1)), "expected a matrix"),
]


@pytest.mark.parametrize("damage, message", DAMAGE)
def test_damaged_files_are_refused_before_the_model_changes(damage, message, tmp_path):
    """Catches a file of which a part is missing or misshapen, and that loads all the same."""
    model = made()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    key = "base_model.model.model.layers.0.mlp.down_proj.lora_E"
    damage(tensors, key)
    save_file(tensors, tmp_path / WEIGHTS)
    base = tiny_llama()
    before = str(fingerprint(base))
    with pytest.raises(peftkern.AdapterFileError, match=message):
        PeftModel.from_pretrained(base, tmp_path)
    assert str(fingerprint(base)) == before
    before = str(fingerprint(model))
    with pytest.raises(peftkern.AdapterFileError):
        set_peft_model_state_dict(model, tensors)
    assert str(fingerprint(model)) == before


def test_a_pattern_that_the_file_contradicts_is_refused(tmp_path):
    """Catches triplets in other places than they had; and a model left with cut ranks when that shows late."""
    model = made()
    model.save_pretrained(tmp_path)
    tensors = {key: value for key, value in load_file(tmp_path / WEIGHTS).items() if "layers.0.mlp" not in key}
    name = "model.layers.1.mlp.down_proj.lora_E"
    tensors[f"base_model.model.{name}"] = tensors[f"base_model.model.{name}"][:4].clone()
    model.peft_config["default"].rank_pattern = {name: [True] * 3 + [False] * 3}
    before = str(fingerprint(model))
    with pytest.raises(peftkern.AdapterFileError, match="keeps 3 of 6"):
        set_peft_model_state_dict(model, tensors)
    model.peft_config["default"].rank_pattern = {name: [True] * 4 + [False] * 2}
    with pytest.raises(peftkern.AdapterFileError, match="shape"):  # A and B still have six
        set_peft_model_state_dict(model, tensors)
    model.peft_config["default"].rank_pattern = {name: [True] * 3 + [False] * 3}
    assert str(fingerprint(model)) == before
    settings = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(settings | {"rank_pattern": {name: [True] * 5}}))
    with pytest.raises(peftkern.AdapterFileError, match=r"its rank is 6 .* says \[5\]"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)


def test_injected_automatic_and_whole_modules(tmp_path):
    """Catches names of a bare model, `AutoPeftModel`, and modules trained whole beside cut ranks."""
    tiny_llama().save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = made(base=base, modules_to_save=["lm_head"])
    layer = model.base_model.model.model.layers[1].mlp.down_proj
    layer.lora_E["default"].data[2:] = 0
    kept = [True, True, False, False, False, False]
    model.peft_config["default"].rank_pattern = {"model.layers.1.mlp.down_proj.lora_E.default": kept}
    model.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(again(ids()).logits, model(ids()).logits)
    bare = copy.deepcopy(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    config = peftkern.PeftConfig.from_pretrained(tmp_path / "adapter")
    peftkern.inject_adapter_in_model(config, bare)
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    set_peft_model_state_dict(bare, tensors)
    torch.testing.assert_close(bare(ids()).logits, model(ids()).logits)
    got = get_peft_model_state_dict(bare)
    assert {f"base_model.model.{key}" for key in got} == set(tensors)
    assert peftkern.get_model_status(model).adapter_model_type == "AdaLoraModel"
    kinds = {row.module_type for row in peftkern.get_layer_status(model)}
    assert "adalora.SVDLinear" in kinds


def test_layers_of_one_input_and_gated_mlps_are_computed_together(monkeypatch):
    """Catches products that are made and thrown away, and an output that outlives a change of E."""
    model = made(target_modules="all-linear").train()
    x = ids(16, 48)
    model(x).logits.sum().backward()
    groups = {m._shared_input for m in model.modules() if getattr(m, "_shared_input", None) is not None}
    assert len(groups) == 4 and all(group._misses == 0 and group._left is None for group in groups)
    assert model.base_model.model.model.layers[0].mlp.down_proj._ends_mlp.is_in_force(16 * 48)
    assert "one shrink" in peftkern.explain(model, tokens=768).summary()
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with peftkern.use_backend("unfused"):
        model(x).logits.sum().backward()
    for name, p in model.named_parameters():
        if name in got:
            scale = p.grad.abs().max().item()
            torch.testing.assert_close(got[name], p.grad, rtol=0, atol=1e-5 * scale, msg=name)
    q, k = (getattr(model.base_model.model.model.layers[0].self_attn, n) for n in ("q_proj", "k_proj"))
    h = torch.randn(16, 48, 64)
    with torch.no_grad():
        q(h)
        k.lora_E["default"].mul_(2)
        y = k(h)
        k.__dict__["_shared_input"] = None
        torch.testing.assert_close(y, k(h))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    """Catches a product of E and A that is not there when a region is computed again."""
    model = made(target_modules="all-linear", lora_dropout=0.2).train()
    got = []
    for checkpointed in (False, True):
        if checkpointed:
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(1)
        model(ids(4, 32), labels=ids(4, 32), use_cache=False).loss.backward()
        got.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    assert len(got[0]) == 42
    torch.testing.assert_close(got[0], got[1])


class Attention(torch.nn.Module):
    """Projections of one input and an output of transformers with a loss: what a compiler has to go through."""

    def __init__(self) -> None:
        super().__init__()
        self.config = transformers.PretrainedConfig()
        self.embed = torch.nn.Embedding(128, 16)
        self.q_proj, self.v_proj = torch.nn.Linear(16, 24), torch.nn.Linear(16, 24)
        self.down_proj = torch.nn.Linear(24, 128)

    def forward(self, input_ids: Any, labels: Any) -> Any:
        x = self.embed(input_ids)
        logits = self.down_proj(torch.tanh(self.q_proj(x)) * self.v_proj(x))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


def test_compiled_whole():
    """Catches a graph break, and a rank that is asked of a device, in forward, regularization and backward."""
    model = made(base=Attention(), task_type=None)
    peftkern.share_inputs(model)
    want = model(input_ids=ids(), labels=ids()).loss
    want.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch._dynamo.reset()
    loss = torch.compile(model, backend="aot_eager", fullgraph=True)(input_ids=ids(), labels=ids()).loss
    torch.testing.assert_close(loss, want)
    loss.backward()
    assert len(grads) == 9
    for name, p in model.named_parameters():
        if name in grads:
            torch.testing.assert_close(p.grad, grads[name], msg=name)


class Cut(transformers.TrainerCallback):
    """What a Trainer needs to have ranks cut: a call between the optimizer's step and zero_grad."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        model.update_and_allocate(state.global_step + 1)


def test_trainer_cuts_saves_and_resumes(tmp_path: Path):
    """Catches a Trainer that saves the whole model, or cannot resume when a checkpoint's ranks are cut."""
    rows = [{"input_ids": row, "labels": row} for row in ids(16, 8) % 8 + 1]

    def trainer(steps: int) -> Any:
        options = dict(per_device_train_batch_size=2, max_steps=8, save_steps=6, logging_steps=1, learning_rate=1e-2)
        options |= dict(report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="steps", seed=0)
        model = made(init_r=4, target_r=2, total_step=8, tinit=1, tfinal=3, deltaT=1, orth_reg_weight=0.0)
        args = transformers.TrainingArguments(str(tmp_path), **options)
        return transformers.Trainer(model=model, args=args, train_dataset=rows, callbacks=[Cut()])

    first = trainer(8)
    first.train()
    assert sum(map(sum, pattern_of(first.model).values())) == 2 * 6
    saved = load_file(tmp_path / "checkpoint-6" / WEIGHTS)
    assert sum(len(value) for key, value in saved.items() if key.endswith("lora_E")) == 2 * 6
    again = trainer(8)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert again.state.global_step == 8 and pattern_of(again.model) == pattern_of(first.model)
    ends = [[e["loss"] for e in t.state.log_history if "loss" in e][-2:] for t in (first, again)]
    assert ends[0] == pytest.approx(ends[1], abs=1e-5)
