"""What the tests of LoRA's starts share: a little training, and what a model says then."""

from __future__ import annotations

import torch
from torch import nn


def stepped(model: nn.Module, steps: int = 3, lr: float = 0.5) -> nn.Module:
    """`model`, of an `Mlp`, after some steps of plain gradient descent that depend on nothing else."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        ids = torch.randint(0, 128, (8, 6), generator=generator)
        model.zero_grad()
        model(ids).float().sub(1).square().mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= lr * parameter.grad
    model.zero_grad()
    return model.eval()


@torch.no_grad()
def output(model: nn.Module) -> torch.Tensor:
    """What `model` makes of all ids."""
    return model(torch.arange(128).view(8, 16)).float()
