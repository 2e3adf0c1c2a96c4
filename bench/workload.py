"""What one implementation does in one problem: a single adapted linear layer at work, ready to be checked and timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bench.adapters import Adapted, Rival
from bench.cases import Problem


@dataclass
class Subject:
    """An implementation on a problem's data.

    Attributes:
        module: the layer (or decoder layer) with its adapters; `call` runs it, compiled and under autocast if it is so.
        inputs: what gradients are taken of: x, then the adapters' parameters.
        dy: gradient of its output.
    """

    module: nn.Module
    call: Callable[[], torch.Tensor]
    inputs: list[torch.Tensor]
    dy: torch.Tensor

    def forward(self) -> torch.Tensor:
        """A forward pass that is ready for a backward one."""
        return self.call()

    def forward_backward(self) -> tuple[torch.Tensor, ...]:
        """Gradients of `inputs`."""
        y = self.call()
        return torch.autograd.grad(y, self.inputs, self.dy.view_as(y))

    def parameters(self) -> list[torch.Tensor]:
        """What exists whether or not anything is saved for backward: parameters and buffers."""
        return [*self.module.parameters(), *self.module.buffers()]


class LinearWorkload:
    """The operands of one problem, of unit scale, so that the adapter's part of y is as large as the base's.

    x [M, K] and dy [M, N] ~ N(0, 1), W [N, K] ~ N(0, 1/K), A [R, K] ~ N(0, 1/K), B [N, R] ~ N(0, 1/(4 R)), scaling 2.
    """

    scaling = 2.0

    def __init__(self, problem: Problem, device: torch.device) -> None:
        self.problem, self.device = problem, device
        p, generator = problem, torch.Generator(device).manual_seed(0)

        def normal(rows: int, columns: int, scale: float) -> torch.Tensor:
            return torch.randn(rows, columns, generator=generator, device=device).mul_(scale).to(p.dtype)

        self.x = normal(p.M, p.K, 1.0).requires_grad_()
        self.linear = nn.Linear(p.K, p.N, bias=False, device=device, dtype=p.dtype)
        self.linear.weight.requires_grad_(False).copy_(normal(p.N, p.K, p.K**-0.5))
        self.lora_A, self.lora_B = normal(p.R, p.K, p.K**-0.5), normal(p.N, p.R, 0.5 * p.R**-0.5)
        self.dy = normal(p.M, p.N, 1.0)

    def adapt(self, rival: Rival) -> Adapted:
        """The layer with `rival`'s adapter, its parameters set to A and B."""
        p = self.problem
        adapted = rival.wrap(self.linear, p.R, self.scaling * p.R, p.dropout)
        if adapted.lora_A is not None and adapted.lora_B is not None:
            with torch.no_grad():
                adapted.lora_A.copy_(self.lora_A)
                adapted.lora_B.copy_(self.lora_B)
        return adapted

    def subject(self, rival: Rival) -> Subject:
        """`rival` on this problem."""
        adapted = self.adapt(rival)
        module: Callable[..., Any] = adapted.module
        if rival.compiled:
            torch._dynamo.reset()  # every problem has a fresh cache, so that none meets a limit on recompilations
            module = torch.compile(adapted.module, dynamic=False)

        def call() -> torch.Tensor:
            with rival.context(self.problem, self.device):
                return module(self.x)

        adapters = [t for t in (adapted.lora_A, adapted.lora_B) if t is not None]
        return Subject(adapted.module, call, [self.x, *adapters], self.dy)
