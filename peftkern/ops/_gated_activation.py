"""`h = act(gate) * up` and its gradients, by plain PyTorch or by one kernel each, inside the operation that needs them.

What is written is new memory or a buffer that the caller gives up; gate and up are never changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from peftkern.backend import device_info
from peftkern.ops._common import PLAIN_PATHS

_aten = torch.ops.aten
ACTIVATIONS: dict[str, tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]] = {
    "silu": (F.silu, _aten.silu_backward),
    "gelu": (F.gelu, _aten.gelu_backward),
    "gelu_tanh": (
        lambda gate: F.gelu(gate, approximate="tanh"),
        lambda grad, gate: _aten.gelu_backward(grad, gate, approximate="tanh"),
    ),
}


def is_plain(path: str) -> bool:
    """Whether the projection that h goes into runs in plain PyTorch."""
    return path.rpartition(":")[2] in PLAIN_PATHS


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


def gated_gradients(
    dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, h: torch.Tensor, activation: str, path: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dgate, dup) [M, C], in the memory of dh and of h, which is no longer needed and is only written."""
    if is_plain(path):
        act, act_backward = ACTIVATIONS[activation]
        torch.mul(dh, act(gate), out=h)
        return act_backward(dh.mul_(up), gate), h
    from peftkern_kernels import replay
    from peftkern_kernels.gated_activation import gated_backward_calls

    def build() -> Any:
        arch = device_info(gate.device).arch
        return (), gated_backward_calls(dh, gate, up, dh, h, activation=activation, arch=arch)

    replay.produce(("gated backward", activation), (dh, gate, up, h), build, gate.device)
    return dh, h
