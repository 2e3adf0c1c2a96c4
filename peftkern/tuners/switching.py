"""Which adapters in a model are active, which learn, and which are there at all.

For `BaseTuner`, which knows its adapters by their configurations; and, by PEFT's names, for a module that adapters were
injected into (`peftkern.functional`), where the layers are asked.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from peftkern.tuners.trainable_tokens import TrainableTokensLayer
from peftkern.tuners.tuner_layer import BaseTunerLayer, is_tuned
from peftkern.utils.module_tree import modules_of
from peftkern.utils.other import ModulesToSaveWrapper, _set_adapter, wrappers_of


def layers_of(model: nn.Module, layer_cls: type | tuple[type, ...] = BaseTunerLayer) -> list[Any]:
    """The adapted layers of a class, or of several, in `model`."""
    return [module for module in modules_of(model) if isinstance(module, layer_cls) and is_tuned(module)]


def holders_of(model: nn.Module) -> list[Any]:
    """All that holds adapters in `model`: adapted layers, trained rows of embeddings, and what is trained whole."""
    return [module for module in modules_of(model) if is_tuned(module) or isinstance(module, ModulesToSaveWrapper)]


def activate(model: nn.Module, names: list[str], inference_mode: bool, layer_cls: type = BaseTunerLayer) -> None:
    """Make the named adapters active, and only those trainable (none in inference mode); merged ones are unmerged."""
    _set_adapter(model, names, inference_mode)
    for layer in layers_of(model, (layer_cls, TrainableTokensLayer)):
        if layer.merged:
            warnings.warn("adapters are merged: unmerged before others are set active", stacklevel=3)
            layer.unmerge()
        layer.set_adapter(names, inference_mode)


def remove(model: nn.Module, name: str, active: list[str], layer_cls: type = BaseTunerLayer) -> None:
    """Take an adapter out of all that holds it. `active`: those that are active afterwards."""
    for layer in layers_of(model, (layer_cls, TrainableTokensLayer)):
        # Every layer takes the model's choice, also one that never had the deleted adapter.
        if name in layer.active_adapters:
            layer.set_adapter(active)
        layer.delete_adapter(name)
    for wrapper in wrappers_of(model):
        wrapper.delete_adapter(name, active)


def active_without(name: str, active: Iterable[str], left: Iterable[str]) -> list[str]:
    """The active adapters once `name` is deleted: the others, or the first by name of those that are left."""
    names = [other for other in active if other != name]
    first = sorted(left)[:1]
    if not names and first:
        warnings.warn(f"the active adapter {name!r} was deleted; {first[0]!r} is active now", stacklevel=3)
        return first
    return names


def refuse_merged(model: nn.Module, name: str, before: str) -> None:
    """Raise ValueError if the adapter is in the base weights of a layer; `before`: what it is in the way of."""
    if any(name in layer.merged_adapters for layer in layers_of(model)):
        raise ValueError(f"adapter {name!r} is merged: unmerge it before {before}")


# --- PEFT's functions for a model that is no PeftModel --------------------------------------------------------------


def set_adapter(
    model: nn.Module,
    adapter_name: str | Sequence[str],
    inference_mode: bool = False,
    layer_cls: type = BaseTunerLayer,
) -> None:
    """Make the named adapters of `model` active, and only those trainable; merged ones are unmerged.

    Args:
        model: A module that adapters were injected into.
        adapter_name: One name or several; an empty list: the base model alone.
        inference_mode: Freeze them too.
        layer_cls: Only layers of this class.

    Raises:
        ValueError: A name that nothing in `model` has.
    """
    names = _known(model, adapter_name)
    activate(model, names, inference_mode, layer_cls)


def set_requires_grad(model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Thaw or freeze the named adapters of `model`, active or not.

    Raises:
        ValueError: A name that nothing in `model` has.
    """
    names = _known(model, adapter_names)
    for holder in holders_of(model):
        holder.set_requires_grad(names, requires_grad)


def delete_adapter(
    model: nn.Module, adapter_name: str, prefix: str = "", layer_cls: type = BaseTunerLayer
) -> list[str] | None:
    """Take an adapter out of `model`; if it was the only active one, the first by name that is left becomes active.

    Its entry of `model.peft_config` and the layers themselves stay, as in PEFT.

    Args:
        model: A module that adapters were injected into.
        adapter_name: Which.
        prefix: PEFT's, for its callers; adapted layers are known by their class.
        layer_cls: Only layers of this class.

    Returns:
        The adapters that are active now; None if there are none.

    Raises:
        ValueError: Nothing in `model` has it, or it is merged.
    """
    _known(model, adapter_name)
    refuse_merged(model, adapter_name, before="deleting it")
    holders = holders_of(model)
    left = {name for holder in holders for name in holder._get_available_adapters()} - {adapter_name}
    before = list(dict.fromkeys(name for holder in holders for name in holder.active_adapters))
    active = active_without(adapter_name, before, left) if adapter_name in before else before
    remove(model, adapter_name, active, layer_cls)
    return active or None


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Widen the weights of an adapter that have less than 32 bits to float32, as new parameters.

    Args:
        model: A module with adapters in it.
        adapter_name: Which.
        autocast_adapter_dtype: False: nothing is done.
    """
    if not autocast_adapter_dtype:
        return
    for container in [c for layer in layers_of(model) for c in layer._containers() if adapter_name in c]:
        # A ParameterDict holds the adapter's parameter itself, a ModuleDict a module that holds some.
        owner: Any = container if isinstance(container, nn.ParameterDict) else container[adapter_name]
        names = [adapter_name] if owner is container else [name for name, _ in owner.named_parameters(recurse=False)]
        for name in names:
            parameter = owner.get_parameter(name)
            if parameter.is_floating_point() and parameter.dtype.itemsize < 4:
                wide = nn.Parameter(parameter.detach().float(), requires_grad=parameter.requires_grad)
                owner.register_parameter(name, wide)


def _known(model: nn.Module, adapter_names: str | Sequence[str]) -> list[str]:
    """The names as a list; raises ValueError for one that nothing in `model` has."""
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    held = {name for holder in holders_of(model) for name in holder._get_available_adapters()}
    unknown = [name for name in names if name not in held]
    if unknown:
        raise ValueError(f"no adapter is named {unknown}; there are: {sorted(held)}")
    return names
