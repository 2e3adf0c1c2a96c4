"""A model's modules and parameters as lists, in torch's order.

`nn.Module.named_modules` goes down by generators inside of generators and spells each name: microseconds a module, and
adding one adapter looks at all of them some twenty times. Of a model with 16 adapters these are ten thousand modules.
"""

from __future__ import annotations

from torch import nn


def modules_of(model: nn.Module) -> list[nn.Module]:
    """`list(model.modules())`."""
    found: list[nn.Module] = []
    seen = set()
    waiting: list[nn.Module | None] = [model]
    while waiting:
        module = waiting.pop()
        if module is None or module in seen:
            continue
        seen.add(module)
        found.append(module)
        children = module._modules
        if children:
            waiting.extend(reversed(children.values()))
    return found


def named_modules_of(model: nn.Module, *, remove_duplicate: bool = True) -> list[tuple[str, nn.Module]]:
    """`list(model.named_modules(remove_duplicate=remove_duplicate))`."""
    found: list[tuple[str, nn.Module]] = []
    seen = set()
    waiting: list[tuple[str, nn.Module | None]] = [("", model)]
    while waiting:
        name, module = waiting.pop()
        if module is None or module in seen:
            continue
        if remove_duplicate:
            seen.add(module)
        found.append((name, module))
        children = module._modules
        if children:
            prefix = f"{name}." if name else ""
            waiting.extend([(prefix + key, child) for key, child in reversed(children.items())])
    return found


def parameters_of_model(model: nn.Module) -> list[nn.Parameter]:
    """`list(model.parameters())`."""
    every = {id(p): p for module in modules_of(model) for p in module._parameters.values() if p is not None}
    return list(every.values())
