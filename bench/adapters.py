"""What an implementation is to the benchmark: a way to put an adapter on one `nn.Linear`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from bench.cases import Problem

# (x [M, K], weight [N, K], A [R, K], B [N, R], scaling, dropout probability or 0) -> y [M, N]
LoraFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float, float], torch.Tensor]


class Adapted(NamedTuple):
    """A layer with its adapter, and the adapter's parameters (None on a frozen layer)."""

    module: nn.Module
    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None


@dataclass(frozen=True)
class Rival:
    """One implementation.

    Attributes:
        name: as in the results, such as "peft bf16 adapters".
        group: measured together: "peftkern", "peft", "compiled" or "others"; "frozen" is in every group.
        wrap: puts an adapter of rank R with scaling alpha / R and dropout p on a layer: wrap(linear, R, alpha, p).
        fp32_adapters: its adapters are fp32 beside a 16-bit weight.
        autocast: it runs under autocast.
        compiled: through torch.compile.
        version: of the package it comes from.
        unavailable: why it cannot run in this process, or "".
        needs_gpu, takes_dropout, sixteen_bit_only: what it does not do without, or at all.
        most_tokens: that it takes; 0 for any number.
        path: the path that it is held to, "" where it chooses.
        finish: what it does to a model once all of its layers have their adapters.
        layers_only: in a single linear layer it is the same as another.
    """

    name: str
    group: str
    wrap: Callable[[nn.Linear, int, float, float], Adapted]
    fp32_adapters: bool = False
    autocast: bool = False
    compiled: bool = False
    version: str | None = None
    unavailable: str = ""
    needs_gpu: bool = False
    takes_dropout: bool = True
    sixteen_bit_only: bool = False
    most_tokens: int = 0
    path: str = ""
    finish: Callable[[nn.Module], Any] | None = None
    layers_only: bool = False

    def why_not(self, problem: Problem, device: torch.device) -> str:
        """Why it cannot take this problem on this device, or ""."""
        if self.unavailable:
            return self.unavailable
        if self.needs_gpu and device.type != "cuda":
            return "needs a GPU"
        if problem.dropout and not self.takes_dropout:
            return "has no dropout"
        if self.sixteen_bit_only and problem.dtype.itemsize != 2:
            return "the same as another mode in fp32"
        if self.layers_only and not problem.decoder:
            return "the same as another in a single linear layer"
        if 0 < self.most_tokens < problem.M:
            return f"for at most {self.most_tokens} tokens"
        return ""

    def context(self, problem: Problem, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """Autocast to the problem's dtype if it runs under autocast."""
        if not self.autocast:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=problem.dtype)


class HandLinear(nn.Module):
    """A frozen linear layer whose forward is one call of a LoRA function: how a kernel without modules is measured."""

    def __init__(
        self, linear: nn.Linear, R: int, alpha: float, dropout: float, function: LoraFunction, fp32: bool
    ) -> None:
        super().__init__()
        N, K = linear.weight.shape
        options: dict[str, Any] = {
            "device": linear.weight.device,
            "dtype": torch.float32 if fp32 else linear.weight.dtype,
        }
        self.weight = linear.weight
        self.lora_A = nn.Parameter(torch.empty(R, K, **options))
        self.lora_B = nn.Parameter(torch.empty(N, R, **options))
        self.scaling, self.dropout, self.function = alpha / R, dropout, function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        p = self.dropout if self.training else 0.0
        return self.function(x, self.weight, self.lora_A, self.lora_B, self.scaling, p)


def by_hand(function: LoraFunction, fp32: bool = False) -> Callable[[nn.Linear, int, float, float], Adapted]:
    """`Rival.wrap` for a bare function."""

    def wrap(linear: nn.Linear, R: int, alpha: float, dropout: float) -> Adapted:
        module = HandLinear(linear, R, alpha, dropout, function, fp32)
        return Adapted(module, module.lora_A, module.lora_B)

    return wrap
