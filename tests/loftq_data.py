"""What the tests of LoftQ share: weights, a model of one layer, and PEFT's functions made to run on a CPU."""

from __future__ import annotations

import importlib
import inspect
import types

import pytest
import torch
from torch import nn

from peftkern import LoftQConfig, LoraConfig, get_peft_model


def weight(n=96, k=160, dtype=torch.float32, seed=0):
    """A matrix with outliers and a few strong directions, as trained weights have."""
    g = torch.Generator().manual_seed(seed)
    w = 0.02 * torch.randn(n, k, generator=g) * torch.exp(0.3 * torch.randn(n, 1, generator=g))
    w += 0.01 * torch.randn(n, 3, generator=g) @ torch.randn(3, k, generator=g)
    return w.to(dtype)


def linear(n=96, k=160, dtype=torch.float32, seed=0):
    made = nn.Linear(k, n, dtype=dtype)
    made.weight = nn.Parameter(weight(n, k, dtype, seed))
    return made


LOFTQ = {"init_lora_weights": "loftq", "loftq_config": LoftQConfig()}


def adapted(base, **options):
    """The layer of a model of one layer, under LoftQ unless `options` say otherwise."""
    model = get_peft_model(nn.ModuleDict({"up": base}), LoraConfig(target_modules=["up"], **(LOFTQ | options)))
    return model, model.base_model.model["up"]


def product(layer, adapter="default"):
    return (layer.lora_B[adapter].weight @ layer.lora_A[adapter].weight).detach()


def on_cpu(function):
    """PEFT's function, which computes on "cuda" whatever there is, with that one constant changed to "cpu"."""
    inner = inspect.unwrap(function)
    constants = tuple("cpu" if c == "cuda" else c for c in inner.__code__.co_consts)
    assert constants != inner.__code__.co_consts
    made = types.FunctionType(
        inner.__code__.replace(co_consts=constants), inner.__globals__, argdefs=inner.__defaults__
    )
    return torch.no_grad()(made)


def peft_loftq() -> types.ModuleType:
    """PEFT's module of LoftQ; the test is skipped without it."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft")
    return importlib.import_module("peft.utils.loftq_utils")
