"""`IA3Model` beside real PEFT's: targets, gradients, switching, merging, weighted sums; files both ways."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import peftkern
from peftkern import IA3Config, IA3Model, LoraConfig, PeftModel, get_peft_model
from tiny_models import fingerprint, ids, mlp, randomize, tiny_llama

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def perturb(model: nn.Module, seed: int = 1) -> None:
    """Vectors around 1 and modules trained whole around what they are, equal for equal names."""
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    randomize(model, ("ia3_", "modules_to_save"), seed=seed)
    for name, p in model.named_parameters():
        if "ia3_" in name or "modules_to_save" in name:
            p.data += before[name]


def tuned(model: nn.Module, *configs: dict, values: bool = True, active: list[str] | None = None):
    """Adapters "a", "b", ... of these configurations on equal models: peftkern's and PEFT's, with equal values."""
    models = []
    for tuner, make in ((IA3Model, IA3Config), (peft.IA3Model, peft.IA3Config)):
        torch.manual_seed(3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = tuner(copy.deepcopy(model), make(**configs[0]), "a")
            for name, config in zip("bcd", configs[1:], strict=False):
                made.peft_config[name] = make(**config)
                made.inject_adapter(made.model, name)
            if active is not None:
                made.set_adapter(active)
        if values:
            perturb(made)
        models.append(made)
    return models


def trainable(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


def assert_same_step(ours: nn.Module, theirs: nn.Module, x: torch.Tensor) -> None:
    """The same logits, and the same gradients for the same parameters."""
    results = []
    for model in (ours, theirs):
        model.zero_grad()
        out = model(x)
        logits = out.logits if hasattr(out, "logits") else out
        logits.float().square().mean().backward()
        results.append((logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (y, grads), (want, want_grads) = results
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
    assert list(grads) == list(want_grads)
    for name in grads:
        torch.testing.assert_close(grads[name], want_grads[name], rtol=1e-3, atol=1e-6, msg=name)


CASES = {
    "defaults": {},
    "targets": {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "regex": {"target_modules": r".*\.(k|down)_proj", "feedforward_modules": r".*\.1\..*down_proj"},
    "output alone": {"target_modules": ["v_proj", "up_proj"], "feedforward_modules": []},
    "exclude": {
        "target_modules": ["k_proj", "v_proj"],
        "feedforward_modules": [],
        "exclude_modules": ["0.self_attn.k_proj"],
    },
    "whole": {"target_modules": ["k_proj"], "feedforward_modules": [], "modules_to_save": ["lm_head", "norm"]},
    "random": {"init_ia3_weights": False},
    "inference": {"inference_mode": True},
}


@pytest.mark.parametrize("name", CASES)
def test_llama_is_that_of_peft(name):
    """Catches any difference in parameter names, initial bits, what trains, logits or gradients."""
    ours, theirs = tuned(tiny_llama(attention_bias=True), CASES[name], values=False)
    mine, other = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(other) and all(torch.equal(mine[k], other[k]) for k in mine)
    assert trainable(ours) == trainable(theirs)
    perturb(ours)
    perturb(theirs)
    if name == "inference":
        assert not trainable(ours)
        torch.testing.assert_close(ours(ids()).logits, theirs(ids()).logits, rtol=1e-4, atol=1e-5)
    else:
        assert_same_step(ours, theirs, ids())


def test_other_architectures_are_those_of_peft():
    """Catches Conv1D's transposed weight with the default targets of GPT-2, and T5's gated feed-forward."""
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=128)).eval()
    ours, theirs = tuned(gpt2, {})
    assert ours.peft_config["a"].fan_in_fan_out is True
    assert_same_step(ours, theirs, ids())
    config = transformers.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=128)
    config.decoder_start_token_id = 0
    t5 = transformers.T5ForConditionalGeneration(config).eval()
    ours, theirs = tuned(t5, {})
    assert trainable(ours) == trainable(theirs)
    kwargs = {"input_ids": ids(), "labels": ids(seed=1)}
    torch.testing.assert_close(ours(**kwargs).loss, theirs(**kwargs).loss, rtol=1e-5, atol=1e-6)


class Convs(nn.Module):
    """Convolutions of two and three dimensions and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, groups=1)
        self.conv3d = nn.Conv3d(1, 4, (2, 3, 3))
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv3d(torch.relu(self.conv(x)).unsqueeze(1))
        return self.head(h.mean((2, 3, 4)))


def test_convolutions_are_those_of_peft():
    """Catches a vector on another axis than the channels."""
    torch.manual_seed(0)
    options = {"target_modules": ["conv", "conv3d", "head"], "feedforward_modules": ["conv3d"]}
    ours, theirs = tuned(Convs(), options)
    assert_same_step(ours, theirs, torch.randn(2, 3, 9, 8))
    for model in (ours, theirs):
        model.merge_adapter()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def test_several_adapters_switch_delete_and_merge_as_in_peft():
    """Catches vectors that do not multiply, a switch that trains the wrong ones, merging that leaves something out."""
    configs = [{"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}] * 2
    configs.append({"target_modules": ["v_proj"], "feedforward_modules": []})
    ours, theirs = tuned(tiny_llama(), *configs)
    for active in ("a", "b", "c"):
        for model in (ours, theirs):
            model.set_adapter(active)
        assert trainable(ours) == trainable(theirs)
        assert_same_step(ours, theirs, ids())
    with torch.no_grad():
        plain = ours.model(ids()).logits
        ours.disable_adapter_layers()
        torch.testing.assert_close(ours.model(ids()).logits, tiny_llama()(ids()).logits)
        ours.enable_adapter_layers()
        torch.testing.assert_close(ours.model(ids()).logits, plain)
    ours.set_adapter(["a", "b"])
    both = ours(ids()).logits
    theirs.active_adapter = ["a", "b"]
    for layer in theirs.modules():
        if hasattr(layer, "ia3_l"):
            layer.set_adapter(["a", "b"])
    torch.testing.assert_close(both, theirs(ids()).logits, rtol=1e-4, atol=1e-5)
    ours.merge_adapter()
    torch.testing.assert_close(ours(ids()).logits, both, rtol=1e-4, atol=1e-5)
    ours.unmerge_adapter()
    torch.testing.assert_close(ours(ids()).logits, both, rtol=1e-4, atol=1e-5)
    ours.delete_adapter("c")
    assert not any(".c" in name for name in ours.state_dict())
    merged = ours.merge_and_unload(safe_merge=True)
    assert type(merged) is type(tiny_llama()) and not any("ia3" in n for n in merged.state_dict())
    torch.testing.assert_close(merged(ids()).logits, both, rtol=1e-4, atol=1e-5)


def test_safe_merge_changes_nothing_in_any_layer():
    """Catches a model of which the first half is merged when the second turns out to be broken."""
    ours, _ = tuned(tiny_llama(), {})
    last = [m for m in ours.modules() if hasattr(m, "ia3_l")][-1]
    last.ia3_l["a"].data.view(-1)[0] = float("nan")
    before = fingerprint(ours.model)
    with pytest.raises(ValueError, match="not finite"):
        ours.merge_adapter(safe_merge=True)
    assert str(fingerprint(ours.model)) == str(before)


def test_weighted_sum_of_adapters_is_that_of_peft():
    """Catches wrong weights, targets that are not joined, and values taken from one adapter only."""
    first = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    second = {"target_modules": ["v_proj", "k_proj"], "feedforward_modules": []}
    ours, theirs = tuned(tiny_llama(), first, second)
    for model in (ours, theirs):
        model.add_weighted_adapter(["a", "b"], [0.7, 0.4], "sum")
        model.set_adapter("sum")
    mine, other = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(other)
    torch.testing.assert_close(mine, other)
    assert ours.peft_config["sum"].target_modules == {"k_proj", "v_proj", "down_proj"}
    torch.testing.assert_close(ours(ids()).logits, theirs(ids()).logits, rtol=1e-4, atol=1e-5)
    for arguments, message in (
        ((["a", "x"], [1, 1], "n"), "no adapter is named"),
        ((["a"], [1], "b"), "already"),
        ((["a", "b"], [1], "n"), "weights"),
        (([], [], "n"), "at least one"),
    ):
        with pytest.raises(ValueError, match=message):
            ours.add_weighted_adapter(*arguments)
    assert set(ours.peft_config) == {"a", "b", "sum"}


BAD = [
    ({"target_modules": ["k_proj"]}, None, "custom"),  # no default of feedforward_modules for a model without a type
    ({"target_modules": ["embed_tokens"], "feedforward_modules": []}, "llama", "Embedding"),
    ({"target_modules": ["nothing"], "feedforward_modules": []}, "llama", "matched no module"),
]


@pytest.mark.parametrize("arguments, model, message", BAD)
def test_what_cannot_be_adapted_is_refused_and_nothing_changed(arguments, model, message):
    """Catches a model that is half adapted when an error is raised."""
    base = tiny_llama() if model else mlp()
    arguments = arguments if model else {"target_modules": ["up"]}
    before = str(fingerprint(base))
    with pytest.raises(ValueError, match=message):
        IA3Model(base, IA3Config(**arguments), "a")
    assert str(fingerprint(base)) == before


def test_methods_and_sides_do_not_mix():
    """Catches IA3 around a LoRA layer, and a layer that scales its input for one adapter and its output for another."""
    model = get_peft_model(mlp(), LoraConfig(target_modules=["up"]))
    with pytest.raises(ValueError, match="another method"):
        IA3Model(model.base_model.model, IA3Config(target_modules=["up"], feedforward_modules=[]), "b")
    made = IA3Model(mlp(), IA3Config(target_modules=["up"], feedforward_modules=[]), "a")
    made.peft_config["b"] = IA3Config(target_modules=["up"], feedforward_modules=["up"])
    with pytest.raises(ValueError, match="would scale the input"):
        made.inject_adapter(made.model, "b")


@pytest.mark.parametrize("targets", ["all-linear", None])
def test_what_is_saved_can_be_read_again(targets, tmp_path):
    """Catches a saved configuration that its own class refuses: feed-forward names spelt otherwise than targets."""
    options = {} if targets is None else {"target_modules": targets, "feedforward_modules": ["down_proj"]}
    model = get_peft_model(tiny_llama(), IA3Config(**options))
    perturb(model)
    y = model(ids()).logits
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    torch.testing.assert_close(again(ids()).logits, y)
    feedforward = [n for n, m in again.named_modules() if getattr(m, "is_feedforward", False)]
    assert len(feedforward) == 2 and all(n.endswith("down_proj") for n in feedforward)
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path))
    torch.testing.assert_close(theirs(ids()).logits, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("only_last", [False, True])
def test_many_full_names_keep_their_sides(only_last, tmp_path):
    """Catches feed-forward layers that scale their output: a long list of full names is shortened, and theirs were
    then looked for among the short ones."""
    base = tiny_llama(num_hidden_layers=4)
    projections = ("self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.gate_proj", "mlp.down_proj")
    targets = [f"model.layers.{i}.{name}" for i in range(4) for name in projections]
    down = [name for name in targets if name.endswith("down_proj") and (not only_last or ".3." in name)]
    options = {"target_modules": targets, "feedforward_modules": down}
    model = get_peft_model(copy.deepcopy(base), IA3Config(**options))
    scaled = [n for n, m in model.base_model.model.named_modules() if getattr(m, "is_feedforward", False)]
    assert scaled == down
    perturb(model)
    y = model(ids()).logits
    model.save_pretrained(tmp_path)
    for library in (peftkern, peft):
        again = library.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
        torch.testing.assert_close(again(ids()).logits, y, rtol=1e-4, atol=1e-5)


FILES = {name: CASES[name] for name in ("defaults", "targets", "regex", "whole")} | {
    "task": {"task_type": "CAUSAL_LM"},
}


@pytest.mark.parametrize("name", FILES)
def test_files_go_both_ways_and_are_those_of_peft(name, tmp_path: Path):
    """Catches a tensor's name, shape or value, or a configuration, that the other library reads differently."""
    models = []
    for library, folder in ((peftkern, "ours"), (peft, "theirs")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = library.get_peft_model(tiny_llama(), library.IA3Config(**FILES[name]))
        perturb(model)
        model.save_pretrained(str(tmp_path / folder))
        models.append(model)
    ours, theirs = (load_file(tmp_path / folder / WEIGHTS) for folder in ("ours", "theirs"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    mine, other = (json.loads((tmp_path / folder / CONFIG).read_text()) for folder in ("ours", "theirs"))
    assert mine.pop("peft_version") and other.pop("peft_version")  # that of the format, and the installed one
    sets = ("target_modules", "feedforward_modules")
    assert {k: sorted(v) if k in sets and isinstance(v, list) else v for k, v in other.items()} == mine
    y = models[0](ids()).logits
    here = PeftModel.from_pretrained(tiny_llama(), tmp_path / "theirs")
    there = peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "ours"))
    torch.testing.assert_close(here(ids()).logits, y)
    torch.testing.assert_close(there(ids()).logits, y, rtol=1e-4, atol=1e-5)
    assert not trainable(here)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda t, k: t.__setitem__(k, t[k][:-1].clone()), "ia3_l"),
        (lambda t, k: t.pop(k), "ia3_l"),
        (lambda t, k: t.__setitem__(k, t[k].int()), "ia3_l"),
    ],
)
def test_damaged_files_are_refused_before_the_model_changes(damage, message, tmp_path):
    """Catches a file that loads though a vector is missing, too short or no float."""
    from safetensors.torch import save_file

    model = get_peft_model(mlp(), IA3Config(target_modules=["up", "down"], feedforward_modules=["down"]))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    damage(tensors, "base_model.model.up.ia3_l")
    save_file(tensors, tmp_path / WEIGHTS)
    base = mlp()
    before = str(fingerprint(base))
    with pytest.raises(peftkern.AdapterFileError, match=message):
        PeftModel.from_pretrained(base, tmp_path)
    assert str(fingerprint(base)) == before


def test_a_quantized_model_trains_merges_and_loads():
    """Catches a 4-bit base whose layers fall back to their own forward, or a merge that PEFT's callers cannot use."""
    model = peftkern.quantize_model(tiny_llama(), {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, progress=False)
    made = get_peft_model(model, IA3Config())
    perturb(made)
    rows = peftkern.explain(made).rows
    assert len(rows) == 6 and {row.path for row in rows} == {"dequantize:torch"}
    y = made(ids()).logits
    y.square().mean().backward()
    assert all(p.grad is not None for n, p in made.named_parameters() if "ia3_" in n)
    merged = made.merge_and_unload()
    torch.testing.assert_close(merged(ids()).logits, y, rtol=1e-3, atol=1e-3)


def test_pickle_and_deepcopy():
    """Catches state that copies share, or that cannot be sent to another process."""
    ours, _ = tuned(mlp(), {"target_modules": ["up"], "feedforward_modules": []})
    ours.merge_adapter()
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        again.unmerge_adapter()
        torch.testing.assert_close(again.model.up.base_layer.weight, mlp().up.weight)
    assert ours.model.up.merged
