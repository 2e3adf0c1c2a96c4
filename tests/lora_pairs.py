"""The same adapters on equal layers, by peftkern and by real PEFT, and what one step of each gives."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from peftkern.tuners.lora import LoraConfig, LoraModel
from tiny_models import randomize

peft = pytest.importorskip("peft")
pytorch_utils = pytest.importorskip("transformers.pytorch_utils")

IN, OUT, VOCAB = 24, 17, 19


class Holder(nn.Module):
    """One layer under the name "layer", so that a tuner can adapt it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def conv1d() -> nn.Module:
    made = pytorch_utils.Conv1D(OUT, IN)
    nn.init.normal_(made.bias)
    return made


BASES = {
    "linear": lambda: nn.Linear(IN, OUT),
    "no_bias": lambda: nn.Linear(IN, OUT, bias=False),
    "conv1d": conv1d,
    "embedding": lambda: nn.Embedding(VOCAB, OUT, padding_idx=3),
}


def pair(base: nn.Module, names: tuple[str, ...] = ("default",), values: int | None = 1, **arguments):
    """The same adapters on equal layers, by peftkern and by PEFT; random values in both, or None for their own."""
    models = []
    for tuner, config in ((LoraModel, LoraConfig), (peft.LoraModel, peft.LoraConfig)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(7)
            model = tuner(Holder(copy.deepcopy(base)), config(target_modules=["layer"], **arguments), names[0])
            for i, name in enumerate(names[1:]):
                model.peft_config[name] = config(
                    target_modules=["layer"], **(arguments | {"r": 3 + i, "lora_alpha": 7})
                )
                model.inject_adapter(model.model, name)
            model.set_adapter(list(names))
        if values is not None:
            randomize(model, ("lora_",), seed=values)
        models.append(model)
    return models


def inputs(base: nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    if isinstance(base, nn.Embedding):
        return torch.randint(0, VOCAB, (2, 5), generator=torch.Generator().manual_seed(3))
    return torch.randn(2, 5, IN, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()


def run(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output and every gradient of one forward and backward."""
    x = x.detach().clone().requires_grad_(x.is_floating_point())
    model.zero_grad()
    y = model(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(4)).to(y.dtype))
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad} | grads if x.grad is not None else {"y": y.detach()} | grads


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], eps: float) -> None:
    """The same entries, each within a few roundings of `eps` of its own largest value."""
    assert ours.keys() == theirs.keys()
    for name, want in theirs.items():
        got = ours[name]
        assert got.dtype == want.dtype and got.shape == want.shape, name
        bound = 4 * eps * max(want.abs().max().item(), 1e-3)
        assert (got.double() - want.double()).abs().max().item() <= bound, name
