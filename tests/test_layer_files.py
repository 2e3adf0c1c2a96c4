"""Networks with layers of `peftkern.nn` and adapter files: written by one of peftkern, PEFT, read by the other."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import peftkern
from peftkern import AdapterFileError
from peftkern.nn import IA3Linear, LoraEmbedding, LoraLinear, load_adapter, save_adapter
from peftkern.tuners.tuner_layer import BaseTunerLayer
from tiny_models import fingerprint, mlp, randomize

peft = pytest.importorskip("peft")

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LORA, IA3 = ("lora_",), ("ia3_",)


def network() -> nn.Sequential:
    """Without adapters, the same on every call. Names end alike: "1" and "2" of the network, "3.1" and "3.2" inside."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        inner = nn.Sequential(nn.Linear(10, 8), nn.Linear(8, 12), nn.Tanh())
        return nn.Sequential(nn.Embedding(16, 12), nn.Linear(12, 14), nn.Linear(14, 10, bias=False), inner).eval()


def small() -> nn.Sequential:
    """Names of which none is the end of another."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return nn.Sequential(nn.Embedding(16, 12), nn.Linear(12, 14), nn.Tanh(), nn.Linear(14, 10)).eval()


def conv1d() -> nn.Sequential:
    """Layers whose weight is stored transposed."""
    made = pytest.importorskip("transformers").pytorch_utils.Conv1D
    with torch.random.fork_rng():
        torch.manual_seed(6)
        return nn.Sequential(nn.Embedding(16, 12), made(14, 12), nn.Tanh(), made(10, 14)).eval()


def adapt(net: nn.Sequential, add: Callable[[nn.Module, str], Any], names: tuple[str, ...]) -> nn.Sequential:
    """Put the layer that `add` makes in the place of each of these."""
    for name in names:
        parent, _, last = name.rpartition(".")
        setattr(net.get_submodule(parent), last, add(net.get_submodule(name), name))
    return net


def lora(layer: nn.Module, name: str = "", **options: Any) -> Any:
    options = {"r": 4, "lora_alpha": 8} | options
    if isinstance(layer, nn.Embedding):
        return LoraEmbedding.from_embedding(layer, **options)
    return LoraLinear.from_linear(layer, **options)


def mixed_ranks(layer: nn.Module, name: str) -> Any:
    return lora(layer, r={"1": 3}.get(name, 4), lora_alpha={"3.1": 5, "1": 0.5}.get(name, 8))


def ia3(layer: nn.Module, name: str = "") -> Any:
    return IA3Linear.from_linear(layer, is_feedforward=name in ("2", "3", "3.1"))


# name -> (the bare network, what makes a layer, the names of the layers, the adapters' parameters)
CASES: dict[str, tuple[Any, Any, tuple[str, ...], tuple[str, ...]]] = {
    "lora": (small, lora, ("1", "3"), LORA),
    "rslora": (small, lambda layer, name: lora(layer, use_rslora=True), ("1", "3"), LORA),
    "embedding": (small, lora, ("0", "3"), LORA),
    "nested": (network, mixed_ranks, ("1", "2", "3.0", "3.1"), LORA),
    "ends alike": (network, mixed_ranks, ("0", "1", "2", "3.1"), LORA),
    "conv1d": (conv1d, lora, ("1", "3"), LORA),
    "ia3": (small, ia3, ("1", "3"), IA3),
    "ia3 nested": (network, ia3, ("1", "2", "3.0", "3.1"), IA3),
    "ia3 ends alike": (network, ia3, ("2",), IA3),
}


def output(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(16).reshape(2, 8))


def trained(case: str) -> nn.Sequential:
    """A network with random adapters."""
    bare, add, names, parameters = CASES[case]
    net = adapt(bare(), add, names).eval()
    randomize(net, parameters)
    assert not torch.equal(output(net), output(bare()))
    return net


@pytest.mark.parametrize("case", CASES)
def test_saved_by_layers_loads_everywhere(tmp_path, case):
    """Would catch: a name, rank, alpha or orientation that PEFT takes for another, and adapters on layers that only
    end alike."""
    net = trained(case)
    save_adapter(net, tmp_path / "made")
    assert {file.name for file in (tmp_path / "made").iterdir()} == {CONFIG, WEIGHTS}
    bare, add, names, _ = CASES[case]
    for library, kind in ((peft, peft.tuners.tuners_utils.BaseTunerLayer), (peftkern, BaseTunerLayer)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", "fan_in_fan_out")  # PEFT says it of an embedding beside Conv1D
            loaded = library.PeftModel.from_pretrained(bare(), tmp_path / "made").eval()
        adapted = [name.removeprefix("base_model.model.") for name, m in loaded.named_modules() if isinstance(m, kind)]
        assert adapted == list(names)
        torch.testing.assert_close(output(loaded), output(net), rtol=1e-5, atol=1e-6)
        loaded.save_pretrained(tmp_path / "again")
        fresh = adapt(bare(), add, names).eval()
        load_adapter(fresh, tmp_path / "again")
        assert torch.equal(output(fresh), output(net))


def test_written_tensors_are_those_of_peft(tmp_path):
    """Would catch: another file than PEFT writes for the same adapter on the same network."""
    net = trained("lora")
    save_adapter(net, tmp_path / "ours")
    theirs = peft.get_peft_model(small(), peft.LoraConfig(r=4, target_modules=["1", "3"]))
    theirs.save_pretrained(tmp_path / "theirs")
    ours, other = (json.loads((tmp_path / side / CONFIG).read_text()) for side in ("ours", "theirs"))
    assert ours | {"target_modules": None} == other | {"target_modules": None}
    assert ours["target_modules"] == ["1", "3"] and ours["rank_pattern"] == {}
    mine, reference = (load_file(tmp_path / side / WEIGHTS) for side in ("ours", "theirs"))
    assert {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in reference.items()}


def test_many_layers(tmp_path):
    """Would catch: names that reading shortens to endings, so that feed-forward layers are taken for others."""

    def bare() -> nn.Sequential:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            block = lambda: nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 6))  # noqa: E731
            return nn.Sequential(*(block() for _ in range(12))).eval()

    names = tuple(f"{i}.{j}" for i in range(12) for j in range(2))
    for add, kind in ((lora, LORA), (lambda layer, name: IA3Linear.from_linear(layer, name.endswith(".1")), IA3)):
        net = adapt(bare(), add, names)
        randomize(net, kind)
        save_adapter(net, tmp_path)
        x = torch.randn(3, 6)
        for library in (peft, peftkern):
            loaded = library.PeftModel.from_pretrained(bare(), tmp_path).eval()
            torch.testing.assert_close(loaded(x), net(x), rtol=1e-5, atol=1e-6)
        fresh = adapt(bare(), add, names)
        load_adapter(fresh, tmp_path)
        assert torch.equal(fresh(x), net(x))


def test_the_file_says_the_scaling_and_the_layers_their_dtype(tmp_path):
    """Would catch: an adapter that is loaded under another alpha and so means something else; a dtype that changes."""
    net = trained("nested")
    save_adapter(net, tmp_path)
    fresh = adapt(network(), lambda m, name: lora(m, r={"1": 3}.get(name, 4), use_rslora=True), CASES["nested"][2])
    load_adapter(fresh, tmp_path)
    assert torch.equal(output(fresh), output(net))
    half = adapt(
        network(), lambda m, n: lora(m, r={"1": 3}.get(n, 4), adapter_dtype=torch.bfloat16), CASES["nested"][2]
    )
    load_adapter(half, tmp_path)
    got, want = half[1].lora_A["default"].weight, net[1].lora_A["default"].weight
    assert got.dtype == torch.bfloat16 and torch.equal(got, want.bfloat16())


def test_compiled_and_saved_again(tmp_path):
    """Would catch: torch.compile's `_orig_mod` in the names of a file, and a second save that keeps the first."""
    net = trained("lora")
    save_adapter(torch.compile(net, backend="eager"), tmp_path)
    assert all(key.startswith(("base_model.model.1.", "base_model.model.3.")) for key in load_file(tmp_path / WEIGHTS))
    net[1].lora_B["default"].weight.data.mul_(2)
    save_adapter(net, tmp_path)
    fresh = torch.compile(adapt(small(), lora, ("1", "3")), backend="eager")
    load_adapter(fresh, tmp_path)
    assert torch.equal(output(fresh), output(net))


def test_networks_that_cannot_be_saved_are_told_why(tmp_path):
    """Would catch: a folder that holds half of the adapters, or names that lead nowhere."""
    both = adapt(small(), lora, ("1",))
    both[3] = ia3(both[3])
    apart = adapt(small(), lambda layer, name: lora(layer, use_rslora=name == "3"), ("1", "3"))
    several = adapt(small(), lora, ("1",))
    several[1].update_layer("second", 2, 2, peftkern.LoraConfig())
    wrong: list[tuple[Any, str]] = [
        (small(), "got none"),
        (both, "both LoRA and IA3"),
        (lora(nn.Linear(3, 4)), "LoraLinear itself.*nn.Sequential"),
        (apart, "use_rslora must be the same .* False in '1' and True in '3'"),
        (several, "'1', got .*second"),
        (peftkern.get_peft_model(mlp(), peftkern.LoraConfig(target_modules=["up"])), "save_pretrained"),
    ]
    for net, words in wrong:
        for call in (save_adapter, load_adapter):
            with pytest.raises(ValueError, match=words):
                call(net, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    with pytest.raises(TypeError, match="model: expected an nn.Module, got dict"):
        save_adapter({}, tmp_path)  # type: ignore[arg-type]
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="got a file"):
        save_adapter(trained("lora"), tmp_path / "file")
    with pytest.warns(UserWarning, match=r"lora_dropout differs between layers \('1': 0.5\): 0.0 is written"):
        dropout = {"1": 0.5, "2": 0.0, "3.0": 0.0}
        save_adapter(adapt(network(), lambda m, n: lora(m, lora_dropout=dropout[n]), tuple(dropout)), tmp_path)


def edited(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Rewrite the weights of `folder` after `change`."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


P = "base_model.model."


@pytest.mark.parametrize(
    "names, change, words",
    [
        (("1",), None, "no adapter for '3.lora_A.weight'"),
        (("0", "1", "3"), None, "layers of the network are not in it: '0'$"),
        (("0", "3"), None, r"missing: .*\.0.lora_embedding_A'.* unknown: '.*\.1.lora_A.weight'"),
        (("1", "3"), lambda t: t.pop(P + "3.lora_B.weight"), "3.lora_A.weight.*partner lora_B is missing"),
        (("1", "3"), lambda t: t.update({P + "4.weight": torch.ones(2)}), "no adapter for '4.weight'"),
        (("1", "3"), lambda t: t.update({P + "1.lora_B.weight": torch.ones(9, 4)}), r"1.lora_B.*\[9, 4\].*\[14, 4\]"),
        (("1", "3"), "cut", WEIGHTS),
        (("1", "3"), "no config", CONFIG),
        (("1", "3"), "ia3", "'peft_type': it is IA3, the network's layers are LORA"),
        (("1", "3"), "rank", r"1.lora_A.weight.*\[4, 12\].*expects \[6, 12\]"),
    ],
)
def test_what_does_not_fit_is_refused_by_name_and_changes_nothing(tmp_path, names, change, words):
    """Would catch: an adapter that is loaded in part, or under the settings of a file that does not fit."""
    save_adapter(trained("ia3" if change == "ia3" else "lora"), tmp_path)
    if change == "cut":
        (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:-5])
    elif change == "no config":
        (tmp_path / CONFIG).unlink()
    elif callable(change):
        edited(tmp_path, change)
    net = adapt(small(), lambda layer, name: lora(layer, r=6 if change == "rank" else 4, lora_alpha=1), names)
    before = fingerprint(net)
    with pytest.raises(AdapterFileError, match=words):
        load_adapter(net, tmp_path)
    assert fingerprint(net) == before


def test_merged_and_meta_layers_are_refused(tmp_path):
    """Would catch: an adapter that is loaded beside what is merged already, or into parameters without memory."""
    net = trained("lora")
    save_adapter(net, tmp_path)
    empty = copy.deepcopy(net).to("meta")
    with pytest.raises(ValueError, match="'1' is on the meta device"):
        load_adapter(empty, tmp_path)
    net[3].merge()
    with pytest.raises(ValueError, match=r"'3' is merged.*unmerge\(\)"):
        load_adapter(net, tmp_path)
