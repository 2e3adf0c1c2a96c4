"""Every class of experts in the installed transformers that its `use_experts_implementation` runs, with adapters."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import peftkern
from moe_models import fill, randomize
from peftkern.tuners.lora.experts_forward import projections, why_not_grouped

transformers: Any = pytest.importorskip("transformers")
FOLDER = Path(transformers.__file__).parent / "models"
# What a field of a configuration is called -> its value; the first that fits.
FIELDS = {
    "act": "silu",
    "latent": None,
    "top": 2,
    "per_tok": 2,
    "limit": 7.0,
    "alpha": 1.7,
    "eps": 1e-6,
    "softcap": 5.0,
}
FIELDS |= {"experts": 4, "hidden": 8, "inter": 6, "ffn": 6}


class AnyConfig:
    """Answers for every model's configuration, by what the field is called."""

    _experts_implementation = "eager"

    def __getattr__(self, name: str) -> Any:
        found = [value for part, value in FIELDS.items() if part in name and not name.startswith("__")]
        if not found:
            raise AttributeError(name)
        return found[0]


def classes() -> list[type[nn.Module]]:
    """The decorated classes, each of the module that defines it."""
    found: list[type[nn.Module]] = []
    for file in sorted(FOLDER.glob("*/modeling_*.py")):
        if "@use_experts_implementation" in file.read_text():
            module = importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}")
            found += [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__]
    marker = "transformers.integrations.moe"
    kinds = [c for c in found if issubclass(c, nn.Module) and hasattr(c.forward, "__wrapped__")]
    return [c for c in kinds if c.forward.__globals__["__name__"] == marker]


def test_every_class_of_experts_is_run_by_rows():
    """Catches a class whose experts have other parameters, another gate, a norm, biases or another layout than its
    attributes say, and one that would be called unfused: the output and x's gradient are those of its own loop over
    experts with W + BA in place. (Some of these compute in float32 whatever x has, so to its rounding.)"""
    tried = classes()
    assert len(tried) >= 50  # 55 in transformers 5.17
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(7, 8, generator=generator, dtype=torch.float64).requires_grad_()
    chosen = torch.rand(7, 4, generator=generator).argsort(1)[:, :2]
    weights = torch.rand(7, 2, generator=generator, dtype=torch.float64)
    for kind in tried:
        model: Any = nn.Module()
        model.experts = kind(AnyConfig()).double()
        fill(model)
        assert why_not_grouped(model.experts) == "", kind
        targets = [f"experts.{name}" for name in projections(model.experts)]
        config = peftkern.LoraConfig(r=2, target_modules=[], target_parameters=targets)
        peftkern.inject_adapter_in_model(config, model)
        randomize(model)
        y = model.experts(x, chosen, weights)
        (dx,) = torch.autograd.grad(y.sum(), [x])
        with torch.no_grad():
            for wrapper in model.experts._chain():
                wrapper.get_param().add_(wrapper.get_delta_weight("default"))
        expected = model.experts.get_base_layer()(x, chosen, weights)
        (dx_expected,) = torch.autograd.grad(expected.sum(), [x])
        for got, want in ((y, expected), (dx, dx_expected)):
            assert (got - want).abs().max() <= 1e-6 * want.abs().max(), kind
