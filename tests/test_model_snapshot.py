"""A model that was half changed when an error came is what it was: modules, hooks, flags and attributes."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from peftkern.utils.model_snapshot import restored_on_error
from tiny_models import ids, mlp


class Stop(Exception):
    pass


def test_all_that_was_changed_comes_back():
    """Would catch a container that is left as the body made it, or is another object than hooks' handles hold on to."""
    model = mlp()
    model.up.table = torch.arange(6).reshape(2, 3)  # an attribute that has no truth value
    model.up.names, model.up.seen, model.up.none = ["a"], {"b"}, {}
    calls = []
    handle = model.up.register_forward_hook(lambda *_: calls.append("before"))
    held = {name: value for name, value in model.up.__dict__.items() if isinstance(value, (dict, list, set))}
    before = {name: value.copy() for name, value in held.items()}
    up, weight = model.up, model.up.weight
    with pytest.raises(Stop), restored_on_error(model):
        model.up.register_forward_hook(lambda *_: calls.append("late"))
        model.up.register_forward_pre_hook(lambda *_: calls.append("late"))
        model.up.register_buffer("late", torch.zeros(1))
        model.up.weight = nn.Parameter(torch.zeros(24, 16))
        model.up.names.append("late")
        model.up.seen.clear()
        model.up.none["late"] = 1
        model.up.new = 1
        model.down.weight.requires_grad_(False)
        model.up = nn.Identity()
        raise Stop
    assert model.up is up and model.up.weight is weight and model.down.weight.requires_grad
    assert not hasattr(model.up, "new") and not hasattr(model.up, "late")
    now = model.up.__dict__
    assert all(now[name] is value and value == before[name] for name, value in held.items())
    model(ids())
    assert calls == ["before"]
    handle.remove()
    model(ids())
    assert calls == ["before"]


def test_a_large_model_costs_few_objects():
    """Would catch copies of each module's dozen empty hook dicts: with thousands of modules the collector's passes over
    them took most of the time of adding an adapter."""
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(500)))
    gc.collect()
    before = len(gc.get_objects())
    with restored_on_error(model):
        made = len(gc.get_objects()) - before
    assert made < 8 * 500
