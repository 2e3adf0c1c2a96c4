"""LoRA on convolutions in models: files both ways, mixed batches, banks, combined adapters, swaps, conversion."""

from __future__ import annotations

import copy
import importlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import peftkern
from lora_pairs import assert_close
from peftkern.tuners.lora import Conv1d, Conv2d, Conv3d, LoraConfig, LoraModel
from peftkern.tuners.lora.mutated_init import subtract_initial
from peftkern.utils import hotswap
from tiny_models import randomize

peft = pytest.importorskip("peft")

TARGETS = ["first", "grouped", "pixel", "line", "block", "head"]
MERGEABLE = [name for name in TARGETS if name != "grouped"]
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"lora_alpha": 5},
    "patterns": {"rank_pattern": {"grouped": 6, "pixel": 2}, "alpha_pattern": {"line": 7}, "use_rslora": True},
    "bias": {"lora_bias": True},
    "dora": {"use_dora": True, "target_modules": MERGEABLE},
}


class Net(nn.Module):
    """Convolutions of every dimension, one with groups, and a head: x [batch, 3, 6, 6] -> [batch, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.grouped = nn.Conv2d(6, 6, 3, groups=3)
        self.pixel = nn.Conv2d(6, 8, 1)
        self.line = nn.Conv1d(8, 8, 3, stride=2)
        self.block = nn.Conv3d(1, 4, (2, 3, 2))
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.pixel(torch.relu(self.grouped(torch.relu(self.first(x)))))
        h = self.line(torch.relu(h.flatten(2))).view(len(x), 1, 2, 4, 7)
        return self.head(torch.relu(self.block(h)).flatten(2).mean(2))


def net() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net()


def images(batch: int = 3, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def adapted(names: tuple[str, ...] = ("default",), library: Any = peftkern, **fields: Any) -> Any:
    """A `Net` with adapters of random values."""
    fields = {"target_modules": TARGETS, "r": 3} | fields
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = library.get_peft_model(net(), library.LoraConfig(**fields), adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, library.LoraConfig(**fields))
    randomize(model, ("lora_",))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= 3  # so that adapters, and their order, are seen in the output
    return model.eval()


def saved(folder: Path, library: Any = peftkern, **fields: Any) -> tuple[Path, torch.Tensor, Any]:
    model = adapted(library=library, **fields)
    model.save_pretrained(folder)
    for name, parameter in model.base_model.model.named_parameters():
        if "lora_" not in name:  # what a file has no values for is the same in every model again
            parameter.data = net().get_parameter(name.replace(".base_layer", "")).data
    return folder, model(images()).detach(), model


def test_names_alone_reach_convolutions():
    """Catches "all-linear" that takes convolutions, which PEFT does not mean by it."""
    model = LoraModel(net(), LoraConfig(target_modules="all-linear"), "default")
    assert model.targeted_module_names == ["head"]
    rows = peftkern.explain(adapted()).rows
    assert [row.path == "unfused" for row in rows] == [name != "head" for name in TARGETS]
    assert all("convolution" in row.reason for row in rows if row.path == "unfused")


@pytest.mark.parametrize("variant", VARIANTS)
def test_files_go_both_ways(tmp_path, variant):
    """Catches a name or a shape of a file that the other library does not know, a factor, bias or magnitude that it
    does not hold, and a grouped B, whose second size is a part of the rank, that is taken for a damaged one."""
    for writer, reader in ((peftkern, peft), (peft, peftkern)):
        folder, want, _ = saved(tmp_path / writer.__name__, writer, **VARIANTS[variant])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read = reader.PeftModel.from_pretrained(net(), str(folder)).eval()
        torch.testing.assert_close(read(images()), want)
    lean = peftkern.PeftModel.from_pretrained(net(), str(tmp_path / "peft"), low_cpu_mem_usage=True).eval()
    torch.testing.assert_close(lean(images()), want)


def test_damaged_files_are_refused(tmp_path):
    """Catches a B whose part of the rank is none, taken for that of a convolution with groups."""
    folder, _, model = saved(tmp_path / "adapter")
    tensors = peftkern.get_peft_model_state_dict(model)
    for key, cut in (("first.lora_B", 2), ("first.lora_B", 1), ("grouped.lora_A", 2)):
        name = f"base_model.model.{key}.weight"
        wrong = tensors[name][:, :cut] if key.endswith("B") else tensors[name][:cut]
        save_file(tensors | {name: wrong.contiguous()}, folder / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=key):
            peftkern.PeftModel.from_pretrained(net(), str(folder))


def test_training_is_that_of_peft():
    """Catches a parameter that learns or stays otherwise than in PEFT, in a step of a whole model."""
    models = [adapted(library=library, lora_alpha=4).train() for library in (peftkern, peft)]
    for model in models:
        optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(images()).square().mean().backward()
            optimizer.step()
    mine, other = models[0].state_dict(), models[1].state_dict()
    assert mine.keys() == other.keys()
    for name, want in other.items():
        torch.testing.assert_close(mine[name], want, msg=name)


@pytest.mark.parametrize("variant", ["plain", "dora"])
def test_merging_a_model(variant):
    """Catches convolutions that are left wrapped, or lose their adapter, when a model is merged."""
    model = adapted(**(VARIANTS[variant] | {"target_modules": MERGEABLE}))
    want = model(images()).detach()
    merged = model.merge_and_unload(safe_merge=True)
    assert [type(m) for m in merged.modules()] == [type(m) for m in net().modules()]
    torch.testing.assert_close(merged(images()), want)
    grouped = adapted()
    before = copy.deepcopy(grouped.state_dict())
    with pytest.raises(NotImplementedError, match="groups=3"):
        grouped.merge_adapter()
    assert all(torch.equal(value, before[name]) for name, value in grouped.state_dict().items())


# -- batches of many adapters ------------------------------------------------------------------------------------------

ROWS = ["law", "__base__", "code", "law"]


@pytest.mark.parametrize("variant", ["plain", "bias", "patterns"])
def test_mixed_batches_are_those_of_peft(variant):
    """Catches a row that takes another's adapter or the wrong scaling, and A and B of four axes put into a pool of
    matrices; gradients go to the rows' own adapters."""
    ours, theirs = (adapted(("law", "code"), library, **VARIANTS[variant]) for library in (peftkern, peft))
    theirs.load_state_dict(ours.state_dict())
    ours.set_requires_grad("code"), theirs.set_requires_grad("code")
    x = images(4)
    results = [model(x, adapter_names=ROWS) for model in (ours, theirs)]
    torch.testing.assert_close(*results)
    for y in results:
        y.square().sum().backward()
    grads = [{n: p.grad for n, p in model.named_parameters() if p.grad is not None} for model in (ours, theirs)]
    assert len(grads[0]) == 24 + (12 if variant == "bias" else 0)
    assert_close(*grads, torch.finfo(torch.float32).eps * 16)
    rows = peftkern.explain(ours, mixed=True).rows
    assert {row.path for row in rows if "head" not in row.name} == {"unfused"}
    with torch.no_grad():  # again, which is remembered where it can be; and after an adapter changed
        torch.testing.assert_close(ours(x, adapter_names=ROWS), results[1].detach())
        (
            ours.base_model.model.first.lora_B["law"].weight.mul_(2),
            theirs.base_model.model.first.lora_B["law"].weight.mul_(2),
        )
        torch.testing.assert_close(ours(x, adapter_names=ROWS), theirs(x, adapter_names=ROWS))


def test_an_input_without_the_batch_in_front_is_refused():
    """Catches rows that are taken for a batch's because the channels are as many."""
    bank = peftkern.AdapterBank(adapted(("law", "code")), slots=4, max_rank=8)
    with pytest.raises(ValueError, match="4 axes whose first is the batch"), bank.batch(["law", "code", "law"]):
        bank.model.base_model.model.first(torch.randn(3, 6, 6))
    with pytest.raises(ValueError, match="DoRA"):
        adapted(("law", "code"), **VARIANTS["dora"])(images(), adapter_names=["law", "code", "law"])


def test_a_bank_serves_them(tmp_path):
    """Catches a bank that puts them into pools, cannot keep a place on a convolution with groups, or leaves adapters in
    another dtype than its own."""
    folders = {}
    for i, name in enumerate(("law", "code")):
        model = adapted(**(VARIANTS["patterns"] if i else {}))
        randomize(model, ("lora_",), seed=i + 5)
        model.save_pretrained(tmp_path / name)
        folders[name] = tmp_path / name
    bank = peftkern.AdapterBank.from_pretrained(net(), folders, slots=3)
    alone = {name: peftkern.PeftModel.from_pretrained(net(), str(path)).eval() for name, path in folders.items()}
    x = images(4)

    def check() -> None:
        with torch.no_grad(), bank.batch(ROWS):
            y = bank.model(x)
        for i, name in enumerate(ROWS):
            model = alone.get(name, net())
            torch.testing.assert_close(y[i : i + 1], model(x[i : i + 1]), rtol=1e-4, atol=1e-5)

    check()
    assert bank.add("new", LoraConfig(r=3, target_modules=TARGETS)) == 2
    check()
    bank.replace("code", folders["law"])
    alone["code"] = alone["law"]
    check()
    bank.save("code", tmp_path / "again")
    want = bank.state_dict("law")
    assert all(torch.equal(value, want[name]) for name, value in bank.state_dict("code").items())
    narrow = peftkern.AdapterBank.from_pretrained(net().to(torch.bfloat16), folders)
    assert {p.dtype for p in narrow.parameters("law")} == {torch.float32}


# -- adapters made of others -------------------------------------------------------------------------------------------


def layers_of(model: Any) -> dict[str, Any]:
    return {name: model.base_model.model.get_submodule(name) for name in TARGETS}


@pytest.mark.parametrize(
    "how, options", [("linear", {}), ("ties", {"density": 0.5}), ("magnitude_prune", {"density": 0.4})]
)
def test_combinations_of_factors_are_those_of_peft(how, options):
    """Catches a combination that sees other elements together than PEFT's, with groups too."""
    models = [adapted(("law", "code"), library) for library in (peftkern, peft)]
    for model in models:
        model.add_weighted_adapter(["law", "code"], [0.7, -0.4], "new", combination_type=how, **options)
    want = models[1].state_dict()
    for name, value in models[0].state_dict().items():
        torch.testing.assert_close(value, want[name], msg=name)


@pytest.mark.parametrize("how, options", [("svd", {}), ("svd", {"svd_clamp": 0.9}), ("ties_svd", {"density": 0.5})])
def test_combinations_of_products_are_those_of_peft(how, options):
    """Catches a kernel that is decomposed in another order of its elements; PEFT can do it for two dimensions."""
    targets = ["first", "pixel", "head"]
    models = [adapted(("law", "code"), library, target_modules=targets) for library in (peftkern, peft)]
    for model in models:
        model.add_weighted_adapter(["law", "code"], [0.7, -0.4], "new", combination_type=how, **options)
    for name in targets:
        deltas = [model.base_model.model.get_submodule(name).get_delta_weight("new") for model in models]
        torch.testing.assert_close(*deltas, rtol=1e-4, atol=1e-5)


def test_cat_is_the_exact_sum_with_groups_too(tmp_path):
    """Catches A's rows of two adapters one after the other where each group's have to be together (PEFT's are not), and
    a file of the combination that cannot be read."""
    model = adapted(("law", "code"), rank_pattern={"grouped": 6})
    model.add_weighted_adapter(["law", "code"], [0.7, -0.4], "new", combination_type="cat")
    assert layers_of(model)["grouped"].r["new"] == 12
    inputs = {"first": (3, 5, 5), "grouped": (6, 5, 5), "pixel": (6, 4, 4), "line": (8, 9), "block": (1, 3, 4, 4)}
    for name, shape in inputs.items():
        layer, x = layers_of(model)[name], torch.randn(2, *shape)
        want = 0.7 * layer._part(x, "law") - 0.4 * layer._part(x, "code")
        torch.testing.assert_close(layer._part(x, "new"), want, rtol=1e-4, atol=1e-5)
    model.set_adapter("new")
    model.save_pretrained(tmp_path, selected_adapters=["new"])
    read = peftkern.PeftModel.from_pretrained(net(), str(tmp_path / "new"))
    for name, layer in layers_of(read).items():
        assert torch.equal(layer.lora_A["default"].weight, layers_of(model)[name].lora_A["new"].weight)


def test_a_product_with_groups_is_refused_and_nothing_changed():
    """Catches a decomposition of what is no weight; PEFT fails half-way."""
    model = adapted(("law", "code"))
    before = list(model.state_dict())
    with pytest.raises(NotImplementedError, match="combination_type='svd' does not go with 'grouped'"):
        model.add_weighted_adapter(["law", "code"], [1.0, 1.0], "new", combination_type="svd")
    assert list(model.state_dict()) == before and list(model.peft_config) == ["law", "code"]


def test_ranks_of_patterns_leave_zeros_in_each_group():
    """Catches zeros after all rows of A, where each group's part has to be filled up."""
    model = adapted(("law", "code"), r=6, rank_pattern={"grouped": 3})
    model.add_weighted_adapter(["law", "code"], [1.0, 0.5], "new", combination_type="linear")
    grouped = layers_of(model)["grouped"]
    assert grouped.r["new"] == 6
    A, B = grouped.lora_A["new"].weight, grouped.lora_B["new"].weight
    filled = A.view(3, 2, *A.shape[1:])
    assert (filled[:, 1] == 0).all() and (B[:, 1] == 0).all()
    roots = {name: (weight * grouped.scaling[name]) ** 0.5 for name, weight in (("law", 1.0), ("code", 0.5))}
    for kind, got in (("lora_A", filled[:, 0]), ("lora_B", B[:, :1])):
        held = getattr(grouped, kind)
        want = sum(root * held[name].weight for name, root in roots.items())
        torch.testing.assert_close(got, want)


# -- adapters in the place of others -----------------------------------------------------------------------------------


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize(
    "both, other",
    [
        ({}, {}),
        ({}, {"rank_pattern": {"grouped": 3, "line": 1}, "r": 2, "lora_alpha": 3}),
        (VARIANTS["bias"], {"r": 3}),
        (VARIANTS["dora"], {"r": 3}),
    ],
    ids=["same", "patterns", "bias", "dora"],
)
def test_a_swapped_model_is_the_other_one(tmp_path, both, other, prepared):
    """Catches zeros after all rows of A where each group's part has to be filled up, and sizes that modules say of
    weights that they no longer have."""
    first, before, _ = saved(tmp_path / "first", **({"r": 6} | both))
    fields = both | {"r": 6, "init_lora_weights": False, "lora_alpha": 9} | other
    second, want, _ = saved(tmp_path / "second", **fields)
    model = peftkern.PeftModel.from_pretrained(net(), str(first)).eval()
    if prepared:
        hotswap.prepare_model_for_compiled_hotswap(model, target_rank=9)
        torch.testing.assert_close(model(images()), before)
    held = {name: p for name, p in model.named_parameters() if "lora_" in name}
    hotswap.hotswap_adapter(model, second, "default")
    torch.testing.assert_close(model(images()), want)
    now = {name: p for name, p in model.named_parameters() if "lora_" in name}
    if prepared:
        assert all(now[name] is held[name] for name in held)
    for layer in (layer for layer in layers_of(model).values() if isinstance(layer, Conv1d | Conv2d | Conv3d)):
        A, B = layer.lora_A["default"], layer.lora_B["default"]
        assert A.out_channels == B.in_channels == layer.r["default"] == A.weight.shape[0]
    model.save_pretrained(tmp_path / "again")
    again = peftkern.PeftModel.from_pretrained(net(), str(tmp_path / "again")).eval()
    torch.testing.assert_close(again(images()), want)


def test_a_prepared_model_has_the_weights_of_pefts():
    """Catches a filled-up grouped factor that PEFT's swap would put elsewhere. PEFT fills up linear layers and those
    of two dimensions."""
    theirs = importlib.import_module("peft.utils.hotswap")
    models = [adapted(library=library, target_modules=["first", "grouped", "head"]) for library in (peftkern, peft)]
    hotswap.prepare_model_for_compiled_hotswap(models[0], target_rank=6)
    theirs.prepare_model_for_compiled_hotswap(models[1], target_rank=6)
    want = models[1].state_dict()
    for name, value in models[0].state_dict().items():
        assert torch.equal(value, want[name]), name
    for library, model in ((hotswap, adapted()), (theirs, adapted(library=peft))):
        with pytest.raises(ValueError, match="groups=3"):
            library.prepare_model_for_compiled_hotswap(model, target_rank=8)


def test_conversion_keeps_the_rows_of_a_group_together():
    """Catches the rows of what training started from after those of what it ended with, where groups need them side by
    side: what is subtracted would be another adapter's."""
    start, end = adapted(), adapted()
    randomize(start, ("lora_",), seed=9)
    made = subtract_initial(*(peftkern.get_peft_model_state_dict(model) for model in (end, start)))
    converted = adapted(r=6, lora_alpha=16)
    peftkern.set_peft_model_state_dict(converted, made)
    inputs = {"grouped": (6, 5, 5), "first": (3, 5, 5), "line": (8, 9), "head": (4,)}
    for name, shape in inputs.items():
        x = torch.randn(2, *shape)
        parts = [layers_of(model)[name]._part(x, "default") for model in (end, start, converted)]
        torch.testing.assert_close(parts[2], parts[0] - parts[1], rtol=1e-4, atol=1e-5)
