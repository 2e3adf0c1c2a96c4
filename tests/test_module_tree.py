"""Walking a model by hand gives what torch gives, in the same order."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import peftkern
from peftkern.utils.module_tree import modules_of, named_modules_of, parameters_of_model
from tiny_models import mlp, tiny_llama


def tied() -> nn.Module:
    """Modules and a parameter under several names, one inside of the other's tree, and places that are empty."""
    model = nn.Module()
    model.first = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model.again = model.first[0]
    model.late = nn.ModuleDict({"inner": nn.Sequential(model.first, nn.Linear(2, 2, bias=False))})
    model.late["inner"][1].weight = model.first[0].weight
    model.register_module("nothing", None)
    model.register_parameter("none", None)
    model.own = nn.Parameter(torch.zeros(1))
    return model


def adapted() -> nn.Module:
    return peftkern.get_peft_model(mlp(), peftkern.LoraConfig(target_modules=["up", "emb"], modules_to_save=["head"]))


@pytest.mark.parametrize("make", [tied, adapted, tiny_llama, nn.ReLU, lambda: nn.DataParallel(mlp())])
def test_lists_are_torchs(make):
    """Would catch another order, a module or parameter twice or not at all, or a name that no state dict has."""
    model = make()
    assert modules_of(model) == list(model.modules())
    for once in (True, False):
        assert named_modules_of(model, remove_duplicate=once) == list(model.named_modules(remove_duplicate=once))
    mine, torchs = parameters_of_model(model), list(model.parameters())
    assert len(mine) == len(torchs) and all(p is q for p, q in zip(mine, torchs, strict=True))
