"""`h = act(gate) * up` and its gradients, by plain PyTorch or by one kernel each, inside the operation that needs them.

What is written is new memory or a buffer that the caller gives up; gate and up are never changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from peftkern.backend import device_info
from peftkern.ops._common import is_plain

_aten = torch.ops.aten
ACTIVATIONS: dict[str, tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]] = {
    "silu": (F.silu, _aten.silu_backward),
    "gelu": (F.gelu, _aten.gelu_backward),
    "gelu_tanh": (
        lambda gate: F.gelu(gate, approximate="tanh"),
        lambda grad, gate: _aten.gelu_backward(grad, gate, approximate="tanh"),
    ),
}


def gated(gate: torch.Tensor, up: torch.Tensor, activation: str, path: str) -> torch.Tensor:
    """gate and up [M, C] -> h [M, C], contiguous."""
    if is_plain(path):
        # Contiguous whatever gate is, so that the path that was planned for h is one that it can take.
        return ACTIVATIONS[activation][0](gate.contiguous()).mul_(up)
    from peftkern_kernels import replay
    from peftkern_kernels.gated_activation import gated_forward_calls

    def build() -> Any:
        h = torch.empty_like(gate, memory_format=torch.contiguous_format)
        return (h,), gated_forward_calls(gate, up, h, activation=activation, arch=device_info(gate.device).arch)

    (h,) = replay.produce(("gated", activation), (gate, up), build, gate.device)
    return h


def gated_again(
    gate: torch.Tensor, up: torch.Tensor, activation: str, path: str, needs_h: bool
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """(h or None if it is not needed, what `gated_gradients` takes), as backward makes them."""
    if is_plain(path):
        value = ACTIVATIONS[activation][0](gate.contiguous())
        return value * up if needs_h else None, value
    if needs_h:
        h = gated(gate, up, activation, path)
        return h, h
    return None, torch.empty_like(gate, memory_format=torch.contiguous_format)


def gated_gradients(
    dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, made: torch.Tensor, activation: str, path: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dgate, dup) [M, C], in the memory of dh and of `made`, which `gated_again` gave: act(gate) in plain PyTorch, and
    for the kernel, which makes that itself, only room."""
    if is_plain(path):
        made.mul_(dh)
        return ACTIVATIONS[activation][1](dh.mul_(up), gate), made
    from peftkern_kernels import replay
    from peftkern_kernels.gated_activation import gated_backward_calls

    def build() -> Any:
        arch = device_info(gate.device).arch
        return (), gated_backward_calls(dh, gate, up, dh, made, activation=activation, arch=arch)

    replay.produce(("gated backward", activation), (dh, gate, up, made), build, gate.device)
    return dh, made
