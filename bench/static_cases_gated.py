"""Calls of `gated_lora_linear` whose kernel launches the static check compiles: the two passes over the activations of
an 8B Llama's MLP. The projection's own launches are in the grid already.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from peftkern_kernels.gated_activation import ACTIVATIONS, gated_backward_calls, gated_forward_calls
from peftkern_kernels.launch import Call


@dataclass(frozen=True, slots=True)
class Gated:
    """`act(gate) * up` and its gradients: M tokens, an MLP of K features."""

    M: int
    K: int
    activation: str = "silu"
    dtype: torch.dtype = torch.bfloat16

    @property
    def aligned(self) -> bool:
        """Whether every row starts at a multiple of 16 elements."""
        return self.K % 16 == 0

    def label(self) -> str:
        """The case in a few words."""
        return f"gated M{self.M} K{self.K} {self.activation} {str(self.dtype).removeprefix('torch.')}"

    def launches(self, arch: int) -> list[Call]:
        """The launches of forward and backward on an architecture; backward writes over what is not needed after."""
        gate, up, h, dh = (torch.empty(self.M, self.K, dtype=self.dtype, device="meta") for _ in range(4))
        options = {"activation": self.activation, "arch": arch}
        forward = gated_forward_calls(gate, up, h, **options)
        return [*forward, *gated_backward_calls(dh, gate, up, dh, h, **options)]


def quick_cases_gated() -> list[Gated]:
    """An 8B Llama's."""
    return [Gated(8192, 14336)]


def all_cases_gated() -> list[Gated]:
    """Every activation and dtype, and rows that are not aligned."""
    kinds = [Gated(8192, 14336, activation) for activation in ACTIVATIONS]
    dtypes = [Gated(8192, 14336, dtype=dtype) for dtype in (torch.float16, torch.float32)]
    return [*kinds, *dtypes, Gated(8192, 4095)]
