"""Put a model back exactly as it was, when adapting it failed half-way."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, TypeGuard

from torch import nn

from peftkern.utils.module_tree import modules_of


@contextlib.contextmanager
def restored_on_error(model: nn.Module) -> Iterator[None]:
    """If the body raises, give `model` back the modules, parameters, hooks, flags and attributes that it came with.

    Remembered are, for every module in the tree, its class, its attributes (dicts, lists and sets by their content: so
    children, parameters, buffers and hooks) and, for every parameter, `requires_grad`. Values of tensors are not: the
    body must not write into the parameters that were there before. What it may do is unmerge adapters, as activating
    others does; they are then merged again, so that base weights are within a rounding of what they were. Costs a few
    references for each module.
    """
    modules = [(module, type(module), module.__dict__.copy()) for module in modules_of(model)]
    contents = [_contents(attributes) for _, _, attributes in modules]
    parameters = (p for module, _, _ in modules for p in module._parameters.values() if p is not None)
    grads = [(parameter, parameter.requires_grad) for parameter in parameters]
    merged = [(m, list(m.merged_adapters), m._modules["base_layer"]) for m, _, _ in modules if _is_merged(m)]
    try:
        yield
    except BaseException:
        for layer, names, base in merged:
            lost = [name for name in names if name not in layer.merged_adapters]
            # A quantized base stands aside while a dense one is merged into: putting that back is enough.
            if lost and layer._modules["base_layer"] is base:
                layer.merge(adapter_names=lost)
        for (module, cls, attributes), filled in zip(modules, contents, strict=True):
            module.__class__ = cls
            module.__dict__.clear()
            module.__dict__.update({name: _refill(value, filled.get(name)) for name, value in attributes.items()})
        for parameter, requires_grad in grads:
            parameter.requires_grad_(requires_grad)
        raise


def _is_merged(module: nn.Module) -> TypeGuard[Any]:
    """Whether it is a layer with adapters in its base weight."""
    return bool(module.__dict__.get("merged_adapters"))


_CONTAINERS = (dict, list, set, OrderedDict)


def _contents(attributes: dict[str, Any]) -> dict[str, Any]:
    """Copies of the attributes that are containers with something in them. Most of a module's hooks are empty, and a
    copy of each would be thousands of objects in a large model, which the garbage collector then walks."""
    return {name: value.copy() for name, value in attributes.items() if type(value) in _CONTAINERS and value}


def _refill(value: Any, content: Any) -> Any:
    """The very container that was there (hook handles hold on to it), with the content that it had: none, if that was
    not kept."""
    if type(value) in _CONTAINERS:
        value.clear()
        if content is not None:
            value.extend(content) if isinstance(value, list) else value.update(content)
    return value
