"""Which parameters of a model `target_parameters` names, and what `target_modules` means for stacked experts.

Rules as in PEFT 0.21.2. transformers 5 stacks the experts of some mixtures that were linear layers before
(`EXPERTS_THAT_WERE_LAYERS`): there, targets that name those layers, and "all-linear", mean the stacked parameters, with
the ranks of gate_proj and up_proj added, as one parameter holds both.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

from peftkern.tuners.lora.experts import ParamWrapper, check_parameter, check_parameter_config
from peftkern.tuners.targets import (
    all_linear_names,
    check_target_module_exists,
    ends_with_name,
    is_all_linear,
    shortest_suffixes,
)
from peftkern.tuners.tuner_layer import BaseTunerLayer, is_tuned
from peftkern.utils.adapter_error import shorten
from peftkern.utils.constants import EXPERTS_THAT_WERE_LAYERS
from peftkern.utils.module_tree import named_modules_of
from peftkern.utils.other import AuxiliaryTrainingWrapper, _get_submodules


class ParameterTarget(NamedTuple):
    """A parameter to adapt.

    Attributes:
        module: The name, in the model as it is now, of what a wrapper goes around: the module, or its outermost
            wrapper.
        key: The parameter's name in the model without wrappers.
        parameter: Its name in the module.
    """

    module: str
    key: str
    parameter: str


def match_parameters(model: nn.Module, config: Any) -> list[ParameterTarget]:
    """The parameters that `config.target_parameters` names, in the order in which they are wrapped.

    A name matches as a whole or as a dotted tail; of a parameter that is parametrized, as a whole only.

    Raises:
        ValueError: A parameter, or its module, cannot be adapted, or a field does not go with target_parameters.
    """
    targets = set(config.target_parameters or ())
    found = []
    for name, module in _base_modules(model) if targets else ():
        clean = name.replace(".base_layer", "")
        parametrized = module._modules.get("parametrizations")
        if parametrized is not None:
            keys = sorted(t for t in targets if t.rpartition(".")[0] == clean and hasattr(module, t.rpartition(".")[2]))
        else:
            own = (f"{clean}.{p}" if clean else p for p, value in module._parameters.items() if value is not None)
            keys = [key for key in own if ends_with_name(key, targets)]
        for key in keys:
            _check_place(model, config, name, key, module)
            found.append(ParameterTarget(_outermost(model, name), key, key.rpartition(".")[2]))
    if found:
        check_parameter_config(config)
    return found


def wrap(model: nn.Module, target: ParameterTarget, adapter_name: str, config: Any, r: int, lora_alpha: Any) -> None:
    """Puts an adapter on the parameter: into the wrapper that it has, or into a new one around all that is there."""
    parent, module, name = _get_submodules(model, target.module)
    layer: Any = module
    while isinstance(layer, ParamWrapper):
        if layer.parameter_name == target.parameter:
            layer.update_layer(adapter_name, r, lora_alpha, config)
            return
        layer = layer.base_layer
    made = ParamWrapper(module, adapter_name, target.parameter, config, r=r, lora_alpha=lora_alpha)
    setattr(parent, name, made)


def _base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the base model by their names, wrappers, adapters and parametrizations left out."""
    inside: list[str] = []
    for name, module in named_modules_of(model):
        if any(name.startswith(prefix) and not name.startswith(f"{prefix}base_layer") for prefix in inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside.append(f"{name}." if name else "")
        elif ".parametrizations." not in f".{name}.":
            yield name, module


def _outermost(model: nn.Module, name: str) -> str:
    """The name of the outermost wrapper around the module `name`, or `name`."""
    while name.endswith(".base_layer"):
        around = name.removesuffix(".base_layer")
        if not isinstance(model.get_submodule(around), ParamWrapper):
            break
        name = around
    return name


def _check_place(model: nn.Module, config: Any, name: str, key: str, module: nn.Module) -> None:
    """Raises ValueError where no wrapper can take the module's place."""
    if not name:
        raise ValueError(f"target_parameters names {key!r}, a parameter of the model itself: only modules are wrapped")
    around = model.get_submodule(name.rpartition(".")[0]) if name.endswith(".base_layer") else None
    layered = isinstance(around, BaseTunerLayer) and not isinstance(around, ParamWrapper)
    clean = name.replace(".base_layer", "")
    if layered or (config.target_modules and check_target_module_exists(config, clean)):
        raise ValueError(
            f"target_parameters names {key!r}, of a module that target_modules names too, or that has an adapter: it "
            "can be adapted in one way (target_modules=[] names no module)"
        )
    parts = clean.split(".")
    ancestors = (model.get_submodule(".".join(name.split(".")[:i])) for i in range(1, len(name.split(".")) + 1))
    whole = getattr(config, "modules_to_save", None) or ()
    if any(isinstance(m, AuxiliaryTrainingWrapper) for m in ancestors) or any(
        ".".join(parts[:i]).endswith(entry) for i in range(1, len(parts) + 1) for entry in whole
    ):
        raise ValueError(f"target_parameters names {key!r}, of a module that modules_to_save trains whole")
    check_parameter(key, getattr(module, key.rpartition(".")[2]))


# -- stacked experts under target_modules -----------------------------------------------------------------------------


def settle_expert_targets(model: nn.Module, config: Any) -> None:
    """Moves what `config.target_modules` says of layers that are stacked parameters now to `target_parameters`.

    Makes `target_modules` explicit, and gives gate_up_proj a rank and an alpha of its own: those of gate_proj and of
    up_proj together. Does nothing where the architecture has no such experts, or `target_modules` names none of them.

    Raises:
        ValueError: Of the layers that one parameter holds, some are targeted and others not.

    Warns:
        UserWarning: Linear layers of such a name (shared experts, dense layers between), left out as in PEFT.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    stacked = EXPERTS_THAT_WERE_LAYERS.get(model_type) if isinstance(model_type, str) else None
    if not stacked:
        return
    parameters = [f"{name}.{p}" for name, module in _base_modules(model) for p in module._parameters]
    parameters = [key.replace(".base_layer", "") for key in parameters]
    # Of a model whose layers are all dense there is nothing to move.
    stacked = {old: new for old, new in stacked.items() if any(key.endswith(f".{new}") for key in parameters)}
    if not stacked:
        return
    if config.target_parameters and config.target_modules is None:
        config.target_modules = set()
        return
    modules, named, reached = _named_by(model, config, stacked, parameters)
    if not named:
        return
    for new in sorted(set(stacked.values())):
        parts = sorted(old for old in stacked if stacked[old] == new)
        present = [old for old in parts if old in named]
        if present and present != parts:
            missing = sorted(set(parts) - set(present))
            raise ValueError(
                f"target_modules names {present} but not {missing}: in this model they are one parameter, {new}, "
                "which is adapted as a whole"
            )
        if present and len(parts) > 1:
            pattern = rf".*\.{re.escape(new)}"
            config.rank_pattern = {**config.rank_pattern, pattern: config.r * len(parts)}
            config.alpha_pattern = {**config.alpha_pattern, pattern: config.lora_alpha * len(parts)}
    config.target_modules = modules
    config.target_parameters = sorted({*(config.target_parameters or ()), *reached})


def _named_by(
    model: nn.Module, config: Any, stacked: Mapping[str, str], parameters: list[str]
) -> tuple[set[str], set[str], set[str]]:
    """What `config.target_modules` names: modules that are layers still, layers of old, and the parameters that those
    are now."""
    targets = config.target_modules
    if is_all_linear(targets):
        layers = {k: m for k, m in named_modules_of(model) if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))}
        linear = {k for k, m in layers.items() if is_tuned(m) and "Linear" in type(m).__name__}
        every = all_linear_names(model, config.task_type, set(layers), linear)
        names = {name for name in every if name.rpartition(".")[2] not in stacked}
        _warn_of_left_out(sorted(every - names))
        return {name.rpartition(".")[2] for name in names}, set(stacked), set(stacked.values())
    if isinstance(targets, str):
        return _named_by_expression(model, config, stacked, parameters)
    found = {t: next((old for old in stacked if t == old or t.endswith(f".{old}")), None) for t in targets or ()}
    named = {old for old in found.values() if old is not None}
    moved = [t for t, old in found.items() if old is not None]
    _warn_of_left_out([k for k, m in named_modules_of(model) if isinstance(m, nn.Linear) and ends_with_name(k, moved)])
    return {t for t, old in found.items() if old is None}, named, {stacked[old] for old in named}


def _named_by_expression(
    model: nn.Module, config: Any, stacked: Mapping[str, str], parameters: list[str]
) -> tuple[set[str], set[str], set[str]]:
    """The same of a regular expression, which is asked about the names that the experts' layers had.

    PEFT keeps the last part of each name only, and so adapts all layers where the expression named some; here the
    names that it matches are kept, as short as they can be.
    """
    named, reached = set(), set()
    for key in parameters:
        for old, new in stacked.items():
            container = key.removesuffix(f".{new}")
            if container != key and check_target_module_exists(config, f"{container}.{old}"):
                named.add(old)
                reached.add(key)
    names = [k for k, _ in named_modules_of(model) if k and ".base_layer" not in k]
    modules = {k for k in names if check_target_module_exists(config, k) and k.rpartition(".")[2] not in stacked}
    left_out = {k for k in names if check_target_module_exists(config, k)} - modules
    _warn_of_left_out([k for k in sorted(left_out) if isinstance(model.get_submodule(k), nn.Linear)])
    short = shortest_suffixes(reached, [key for key in parameters if key not in reached])
    return shortest_suffixes(modules, [k for k in names if k not in modules]), named, short


def _warn_of_left_out(names: list[str]) -> None:
    if names:
        warnings.warn(
            f"target_modules: {shorten(names, 3)} get no adapter: in this architecture their names mean the experts "
            "that are stacked in one parameter, as in PEFT",
            stacklevel=6,
        )
