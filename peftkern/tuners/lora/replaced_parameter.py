"""Calling a module with another tensor in the place of one of its parameters, for the time of the call.

The module is the same afterwards, whatever forward did or raised, and gradients flow to what the tensor was made from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.func import functional_call


class _Changed(nn.Module):
    """A parametrization: the parameter after `change`."""

    def __init__(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.change = change

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return self.change(weight)


def call_with(
    module: nn.Module,
    path: str,
    change: Callable[[torch.Tensor], torch.Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """`module(*args, **kwargs)` with `change(parameter)` in the place of the parameter at `path`.

    Args:
        module: Called with its hooks.
        path: The parameter's dotted name in `module`.
        change: The parameter -> what stands in its place; of a parametrized one, what the parametrization gives.
        args, kwargs: Of the call.
    """
    parent, _, name = path.rpartition(".")
    owner = module.get_submodule(parent)
    parametrized: Any = owner._modules.get("parametrizations")
    if parametrized is not None and name in parametrized:
        steps: Any = parametrized[name]
        steps.append(_Changed(change))
        try:
            # One value for all that read the parameter in this call.
            with nn.utils.parametrize.cached():
                return module(*args, **kwargs)
        finally:
            del steps[-1]
    if "_hf_hook" in owner.__dict__ and getattr(owner, name).is_meta:
        return _call_offloaded(module, owner, path, change, args, kwargs)
    held = {path: change(getattr(owner, name))}
    # Of a tied parameter one name is adapted, as a parametrization would do it.
    return functional_call(module, held, args, dict(kwargs), tie_weights=False)


def _call_offloaded(
    module: nn.Module,
    owner: Any,
    path: str,
    change: Callable[[torch.Tensor], torch.Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """The same where accelerate fetches the parameter within the call: its hook calls `owner._old_forward` then."""
    name, inner = path.rpartition(".")[2], owner._old_forward

    def with_changed(*inner_args: Any, **inner_kwargs: Any) -> Any:
        fetched = owner._parameters[name]
        owner._parameters[name] = change(fetched)
        try:
            return inner(*inner_args, **inner_kwargs)
        finally:
            owner._parameters[name] = fetched

    owner._old_forward = with_changed
    try:
        return module(*args, **kwargs)
    finally:
        owner._old_forward = inner
