"""What methods share that make one adapter of several (`add_weighted_adapter`): checks, and the targets of all."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from peftkern.utils.other import wrappers_of

if TYPE_CHECKING:
    from peftkern.tuners.tuners_utils import BaseTuner


def check_sources(model: BaseTuner, adapters: list[str], weights: list[float], adapter_name: str) -> list[float]:
    """The weights as floats.

    Args:
        model: The model with adapters.
        adapters: Names of adapters of it.
        weights: A number for each.
        adapter_name: The new adapter's name.

    Raises:
        TypeError: `adapters` is a str, or a weight is no number.
        ValueError: An unknown name, one that is taken, other than one finite weight each, or more than one adapter with
            `modules_to_save` of the same module.
    """
    if isinstance(adapters, str):
        raise TypeError(f"adapters must be a list of adapter names, got the str {adapters!r}")
    if not adapters:
        raise ValueError("adapters: expected at least one name, got none")
    model._check_names(adapters)
    if adapter_name in model.peft_config:
        raise ValueError(f"adapter_name: there is an adapter {adapter_name!r} already")
    if len(weights) != len(adapters):
        raise ValueError(f"weights: expected one for each of {len(adapters)} adapters, got {len(weights)}")
    for wrapper in wrappers_of(model.model):
        both = [name for name in dict.fromkeys(adapters) if name in wrapper.modules_to_save]
        if len(both) > 1:
            raise ValueError(f"adapters: {both} each have a copy of a module (modules_to_save): no sum of them")
    return [_number(weight) for weight in weights]


def _number(weight: Any) -> float:
    try:
        value = None if isinstance(weight, (str, bytes)) else float(weight)
    except (TypeError, ValueError):
        value = None
    if value is None:
        raise TypeError(f"weights: expected numbers, got {weight!r}")
    if not math.isfinite(value):
        raise ValueError(f"weights: expected finite numbers, got {weight!r}")
    return value


def joined_targets(model: BaseTuner, adapters: list[str], field: str) -> set[str] | str:
    """What any of the adapters' configurations names in `field`: a set of names, or one regular expression.

    Raises:
        ValueError: Some have names and others expressions.
    """
    values = [getattr(model.peft_config[name], field) for name in adapters]
    if len({isinstance(value, str) for value in values}) > 1:
        raise ValueError(f"adapters: expected {field} that are all names or all expressions, got {values}")
    if isinstance(values[0], str):
        return "|".join(f"({value})" for value in values)
    return set().union(*values)
