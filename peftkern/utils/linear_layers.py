"""The dense linear layers that a quantized one can stand for: `nn.Linear`, and transformers' Conv1D.

A Conv1D (GPT-2, ImageGPT, Decision Transformer, Clvp) computes `y = x W + b` with W stored [in_features, out_features].
transformers and peftkern turn that weight before they quantize it, so a quantized one is [out_features, in_features]
like any other, and keeps the class that was there as `source_cls`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def conv1d_class(module: nn.Module) -> type[nn.Module] | None:
    """transformers' Conv1D if `module` is one, else None: a linear layer with its weight stored transposed.

    Known by its name, so that transformers need not be imported.
    """
    return _conv1d_among(type(module))


def _conv1d_among(kind: type[Any]) -> type[nn.Module] | None:
    return next((c for c in kind.__mro__ if c.__name__ == "Conv1D" and c.__module__.startswith("transformers.")), None)


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is transformers' Conv1D."""
    return conv1d_class(module) is not None


def source_conv1d(module: nn.Module) -> type[nn.Module] | None:
    """transformers' Conv1D if a quantized `module` stands in the place of one, by its `source_cls`; else None."""
    kind = getattr(module, "source_cls", None)
    return _conv1d_among(kind) if isinstance(kind, type) else None


def is_quantizable(module: nn.Module) -> bool:
    """Whether `module` is a layer that transformers 5.23 replaces by one of bitsandbytes'.

    Those are `nn.Linear` itself and Conv1D. A subclass of `nn.Linear` may use its weight in ways that a quantized layer
    would not (attention's out_proj does), and the parameters of other modules (stacked experts, routers, embeddings)
    are no layers. One difference: a subclass of Conv1D with a forward of its own is left alone here; transformers
    replaces it, and so loses that forward.
    """
    conv1d = conv1d_class(module)
    if conv1d is not None:
        return type(module).forward is conv1d.forward
    return type(module) is nn.Linear


def rows_of(linear: nn.Module) -> torch.Tensor:
    """The weight of an `nn.Linear` or a Conv1D as [out_features, in_features], by reference, without gradient."""
    weight: Any = linear.weight
    return weight.detach().t() if is_conv1d(linear) else weight.detach()


def dense_linear(weight: torch.Tensor, bias: torch.Tensor | None, conv1d: Any = None) -> nn.Module:
    """A frozen layer that holds `weight` [out_features, in_features] and `bias`.

    Args:
        weight: Held by reference by an `nn.Linear`; a Conv1D holds its transpose, contiguous.
        bias: [out_features]; None for an `nn.Linear` without one, as a Conv1D always has it.
        conv1d: transformers' Conv1D for one of that class; None for an `nn.Linear`.
    """
    conv1d = None if bias is None else conv1d
    N, K = weight.shape
    with torch.device("meta"):
        made: Any = nn.Linear(K, N, bias=bias is not None) if conv1d is None else conv1d(N, K)
    made.weight = nn.Parameter(weight if conv1d is None else weight.t().contiguous(), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias, requires_grad=False)
    return made
