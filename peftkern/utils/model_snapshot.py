"""Put a model back exactly as it was, when adapting it failed half-way."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, TypeGuard

from torch import nn


@contextlib.contextmanager
def restored_on_error(model: nn.Module) -> Iterator[None]:
    """If the body raises, give `model` back the modules, parameters, hooks, flags and attributes that it came with.

    Remembered are, for every module in the tree, its class, its attributes (dicts, lists and sets by their content: so
    children, parameters, buffers and hooks) and, for every parameter, `requires_grad`. Values of tensors are not: the
    body must not write into the parameters that were there before. What it may do is unmerge adapters, as activating
    others does; they are then merged again, so that base weights are within a rounding of what they were. Costs a few
    references for each module.
    """
    modules = [(module, type(module), _shallow(module.__dict__)) for module in model.modules()]
    grads = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    merged = [(m, list(m.merged_adapters), m._modules["base_layer"]) for m in model.modules() if _is_merged(m)]
    try:
        yield
    except BaseException:
        for layer, names, base in merged:
            lost = [name for name in names if name not in layer.merged_adapters]
            # A quantized base stands aside while a dense one is merged into: putting that back is enough.
            if lost and layer._modules["base_layer"] is base:
                layer.merge(adapter_names=lost)
        for module, cls, attributes in modules:
            module.__class__ = cls
            module.__dict__.clear()
            module.__dict__.update({name: _refill(value, content) for name, (value, content) in attributes.items()})
        for parameter, requires_grad in grads:
            parameter.requires_grad_(requires_grad)
        raise


def _is_merged(module: nn.Module) -> TypeGuard[Any]:
    """Whether it is a layer with adapters in its base weight."""
    return bool(module.__dict__.get("merged_adapters"))


def _shallow(attributes: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Each attribute with a copy of its content, where it is a plain container."""
    kinds = (dict, list, set, OrderedDict)
    return {name: (value, value.copy() if type(value) in kinds else None) for name, value in attributes.items()}


def _refill(value: Any, content: Any) -> Any:
    """The very container that was there (hook handles hold on to it), with the content that it had."""
    if content is not None:
        value.clear()
        value.extend(content) if isinstance(value, list) else value.update(content)
    return value
