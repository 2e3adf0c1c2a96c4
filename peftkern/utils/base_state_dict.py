"""The base model's state dict, read from and written to a model that has adapters, by the names it had without them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from peftkern.utils.adapter_error import shorten
from peftkern.utils.adapter_keys import base_name


def get_base_model_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of the base model, by the names that they have without adapters; they share memory with the model.

    What was merged is in them, and biases that an adapter trains (`bias`) are as trained; modules that are trained
    whole (`modules_to_save`) are the originals.

    Args:
        model: A `PeftModel`, or a model that adapters were injected into.
    """
    state, names = _base_names(model)
    return {name: state[held] for name, held in names.items()}


def set_base_model_state_dict(
    model: nn.Module, state_dict: Mapping[str, torch.Tensor], strict: bool = True
) -> _IncompatibleKeys:
    """Load a state dict of the base model into a model that has adapters, which stay as they are.

    Args:
        model: As for `get_base_model_state_dict`.
        state_dict: By names of the model without adapters.
        strict: Refuse missing and unexpected names.

    Returns:
        `missing_keys` and `unexpected_keys`.

    Raises:
        TypeError: `state_dict` is no mapping.
        RuntimeError: Names are missing or unexpected (`strict`), or, as torch says it, a tensor of another shape.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict: expected a dict of names to tensors, got {type(state_dict).__name__}")
    _, names = _base_names(model)
    missing = [name for name in names if name not in state_dict]
    unexpected = [name for name in state_dict if name not in names]
    if strict and (missing or unexpected):
        found = [
            f"{what}: {shorten(keys)}" for what, keys in (("missing", missing), ("unexpected", unexpected)) if keys
        ]
        raise RuntimeError(f"state_dict: not that of this base model: {'; '.join(found)}")
    tensors = {names[name]: value for name, value in state_dict.items() if name in names}
    _base_of(model).load_state_dict(tensors, strict=False)
    return _IncompatibleKeys(missing, unexpected)


def _base_of(model: nn.Module) -> nn.Module:
    """The model that adapters are in, of a `PeftModel` around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _base_names(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The model's state dict, and of the base's tensors: name without adapters -> name in it."""
    base = _base_of(model)
    state = base.state_dict()
    found = ((base_name(base, held), held) for held in state)
    return state, {name: held for name, held in found if name is not None}
