"""Which modules of a model a configuration names: matching, and what to say when nothing matched.

Works on names and on a few attributes, so it serves every method that adapts modules. Rules as in PEFT 0.21.2.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from peftkern.tuners.tuner_layer import BaseTunerLayer, is_tuned
from peftkern.utils.adapter_error import cut, shorten, shown
from peftkern.utils.constants import (
    INCLUDE_LINEAR_LAYERS_SHORTHAND,
    MAMBA_MODEL_TYPES,
    MAMBA_UNCALLED_MODULES,
    MIN_TARGET_MODULES_FOR_OPTIMIZATION,
    SEQ_CLS_HEAD_NAMES,
)
from peftkern.utils.error import NoMatchingPeftModuleError
from peftkern.utils.linear_layers import conv1d_class, is_conv1d
from peftkern.utils.module_tree import named_modules_of
from peftkern.utils.other import AuxiliaryTrainingWrapper
from peftkern.utils.peft_types import TaskType
from peftkern.utils.quantized_modules import Linear4bit, Linear8bit, holds_quantized
from peftkern.utils.read_layers import is_uncalled


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is a linear layer: `nn.Linear` (bitsandbytes' are), Conv1D, or one of peftkern's quantized."""
    return isinstance(module, (nn.Linear, Linear4bit, Linear8bit)) or is_conv1d(module)


def linear_sizes(layer: nn.Module, method: str) -> tuple[int, int]:
    """in_features and out_features of a linear layer or a Conv1D, or of a layer that says them; `method` needs them.

    Raises:
        TypeError: The layer tells neither.
    """
    weight = getattr(layer, "weight", None)
    if conv1d_class(layer) is not None and isinstance(weight, torch.Tensor):
        return weight.shape[0], weight.shape[1]
    sizes = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    if not all(isinstance(size, int) for size in sizes):
        raise TypeError(f"{method} needs a linear layer with in_features and out_features, got {type(layer).__name__}")
    return sizes  # type: ignore[return-value]


def fit_fan_in_fan_out(config: Any, target: nn.Module) -> None:
    """Corrects `config.fan_in_fan_out` for a dense linear layer, which knows it, so that the configuration's file says
    it. A quantized weight is [out_features, in_features] whatever it was before: over one the configuration is left as
    it was given, as in PEFT."""
    if holds_quantized(target):
        return
    if config.fan_in_fan_out != is_conv1d(target):
        warnings.warn(
            f"fan_in_fan_out={config.fan_in_fan_out} does not fit a {type(target).__name__}: set to "
            f"{not config.fan_in_fan_out}",
            stacklevel=3,
        )
        config.fan_in_fan_out = not config.fan_in_fan_out


def ends_with_name(key: str, names: Iterable[str]) -> bool:
    """Whether the dotted name `key`, or a tail of it that starts after a dot, is one of `names`."""
    if not isinstance(names, (set, frozenset, dict)):
        names = set(names)
    while key not in names:
        _, dot, key = key.partition(".")
        if not dot:
            return False
    return True


def get_pattern_key(patterns: Iterable[str], key: str) -> str:
    """The first of `patterns` that matches `key` or a tail of it after a dot (as a regular expression), else `key`."""
    return next((p for p in patterns if re.match(rf"(.*\.)?({p})$", key)), key)


def is_excluded(config: Any, key: str) -> bool:
    """Whether `config` keeps the module named `key` from being adapted: excluded by name, or saved whole."""
    excluded = getattr(config, "exclude_modules", None)
    if isinstance(excluded, str) and re.fullmatch(excluded, key):
        return True
    if excluded and not isinstance(excluded, str) and ends_with_name(key, excluded):
        return True
    # An adapter inside a module that is trained whole would train the same thing twice.
    whole = getattr(config, "modules_to_save", None) or ()
    return any(re.match(rf"(^|.*\.){name}($|\..*)", key) for name in whole)


def check_target_module_exists(config: Any, key: str) -> bool:
    """Whether `config` targets the module named `key`.

    Args:
        config: Has `target_modules` (a str: a regular expression for the whole name; otherwise names and dotted tails),
            and may have `exclude_modules`, `modules_to_save`, `layers_to_transform`, `layers_pattern`.
        key: The module's dotted name in the model.
    """
    targets = config.target_modules
    if targets is None or is_excluded(config, key):
        return False
    if isinstance(targets, str):
        return re.fullmatch(targets, key) is not None
    if key in targets:
        # A full name says which layer is meant: the layer indices do not filter it.
        return True
    return ends_with_name(key, targets) and _layer_is_chosen(config, key)


def _layer_is_chosen(config: Any, key: str) -> bool:
    """Whether the layer index in `key` is among `config.layers_to_transform`; True when no layers were chosen."""
    chosen = getattr(config, "layers_to_transform", None)
    if chosen is None or (not isinstance(chosen, int) and len(chosen) == 0):
        return True
    index = _layer_index(config, key)
    return index is not None and (index == chosen if isinstance(chosen, int) else index in chosen)


def _layer_index(config: Any, key: str) -> int | None:
    """The layer index in `key`, by `config.layers_pattern` where that names the lists of layers, or None."""
    lists = getattr(config, "layers_pattern", None)
    # The first numbered level is the layer; a later one may be an expert's number.
    regexes = [r".*?\.[^.]*\.(\d+)\."]
    if lists:
        regexes = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in ([lists] if isinstance(lists, str) else lists)]
    match = next(filter(None, (re.match(regex, key) for regex in regexes)), None)
    return int(match.group(1)) if match else None


def match_targets(
    model: nn.Module,
    config: Any,
    defaults: Mapping[str, list[str] | str],
    prefix: str,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    parameters: Sequence[str] = (),
) -> list[str]:
    """Names of the modules of `model` to adapt, in the model's order.

    `config.target_modules` is made explicit, as it is to be saved: the architecture's default, the names that
    "all-linear" stands for, and few suffixes in place of many names.

    Args:
        model: The base model, adapted or not.
        config: See `check_target_module_exists`.
        defaults: `model_type` -> default `target_modules`.
        prefix: What the method's parameter names start with, such as "lora_".
        state_dict: If given, the modules that its keys name are taken, with a warning where the config says otherwise.
        parameters: Names of parameters that are adapted besides: patterns may be for them, and no module need match.

    Raises:
        ValueError: None matched (NoMatchingPeftModuleError), or no default is known.

    Warns:
        RuntimeWarning: `state_dict` names other modules than the config does.
        UserWarning: Names that were given and match nothing: entries of target_modules and exclude_modules, keys of
            rank_pattern and alpha_pattern.
    """
    layers = {k: m for k, m in named_modules_of(model) if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))}
    inside = set(layers)
    names = [k for k, _ in named_modules_of(model) if k and not lies_under(k, inside)]
    asked, asked_parameters = config.target_modules, getattr(config, "target_parameters", None)
    if asked is None:
        config.target_modules = _default_targets(model, defaults, may_lack=bool(asked_parameters))
    if is_all_linear(config.target_modules):
        linear = {k for k, m in layers.items() if is_tuned(m) and "Linear" in type(m).__name__}
        config.target_modules = all_linear_names(model, config.task_type, inside, linear)
        _warn_of_stacked_experts(model, set(parameters))
    targets = config.target_modules
    if targets is not None and not isinstance(targets, str) and len(targets) >= MIN_TARGET_MODULES_FOR_OPTIMIZATION:
        short = shortest_suffixes(set(targets), [k for k in names if not ends_with_name(k, targets)])
        if len(short) < len(targets):
            config.target_modules = short

    matched = [key for key in names if check_target_module_exists(config, key)]
    if state_dict is not None:
        # torch.compile puts "_orig_mod." in front.
        adapted = {k.removeprefix("_orig_mod.").rsplit("." + prefix, 1)[0] for k in state_dict}
        chosen = [key for key in names if key.removeprefix("_orig_mod.") in adapted]
        more, less = sorted(set(chosen) - set(matched)), sorted(set(matched) - set(chosen))
        if more or less:
            found = [f"{shorten(keys, 3)} {where}" for keys, where in ((more, "by it alone"), (less, "not")) if keys]
            message = f"state_dict decides which modules are adapted, not target_modules: {', '.join(found)}"
            warnings.warn(message, RuntimeWarning, stacklevel=4)
        matched = chosen
    if parameters and not matched and config.target_modules:
        warnings.warn(
            f"target_modules={shown(config.target_modules, 300)} matched no module", RuntimeWarning, stacklevel=4
        )
    if matched and asked_parameters and not parameters:
        warnings.warn(
            f"target_parameters={shown(asked_parameters, 300)} matched no parameter", RuntimeWarning, stacklevel=4
        )
    if not matched and not parameters:
        limits = [name for name in ("exclude_modules", "modules_to_save") if hasattr(config, name)]
        unlimited = dataclasses.replace(config, **dict.fromkeys(limits))
        excluded = [k for k in names if is_excluded(config, k) and check_target_module_exists(unlimited, k)]
        raise NoMatchingPeftModuleError(no_match_message(config, names, excluded))
    # The names of a state dict, or of a default (a saved configuration spells it out), are nobody's slip.
    given = asked is not None and not isinstance(asked, str) and state_dict is None and bool(matched)
    if given and set(asked) != set(defaults.get(_model_type(model) or "", ())):
        missed = _without_a_match(asked, names)
        if missed:
            near = _near_names(missed, names)
            hint = f" (near names: {', '.join(near)})" if near else ""
            warnings.warn(f"target_modules={missed!r} matched no module{hint}: no adapter there", stacklevel=4)
    _warn_of_unused_patterns(config, [*matched, *parameters], names)
    return matched


def _warn_of_stacked_experts(model: nn.Module, adapted: set[str]) -> None:
    """Warns that "all-linear" does not mean the experts of a mixture that are stacked in one parameter."""
    every = {name.replace(".base_layer", ""): p for name, p in model.named_parameters()}
    stacked = [n for n, p in every.items() if p.dim() > 2 and "experts" in n.split(".") and n not in adapted]
    if stacked:
        warnings.warn(
            f'target_modules="all-linear": the stacked experts stay frozen, for they are no linear layers: '
            f"{shorten(stacked, 2)} (LoRA adapts those that target_parameters names)",
            stacklevel=5,
        )


def _without_a_match(entries: Iterable[str], names: Iterable[str]) -> list[str]:
    """Those of `entries`, names and dotted tails of names, that none of `names` answers to."""
    tails: set[str] = set()
    for name in names:
        parts = name.split(".")
        tails |= {".".join(parts[i:]) for i in range(len(parts))}
    return sorted(set(entries) - tails)


def _model_type(model: nn.Module) -> str | None:
    """`model_type` of the model's configuration, an object or a dict."""
    config = getattr(model, "config", None)
    found = config.get("model_type") if isinstance(config, dict) else getattr(config, "model_type", None)
    return found if isinstance(found, str) else None


def _default_targets(
    model: nn.Module, defaults: Mapping[str, list[str] | str], may_lack: bool = False
) -> set[str] | str | None:
    """The architecture's default `target_modules`; None where there is none and it `may_lack` one."""
    model_type = _model_type(model)
    default = None if model_type is None else defaults.get(model_type)
    if default is None and may_lack:
        return None
    if default is None:
        of = "a model without a model_type" if model_type is None else f"model_type {model_type!r}"
        raise NoMatchingPeftModuleError(f"target_modules must be given: no default is known for {of}")
    return default if isinstance(default, str) else set(default)


def _warn_of_unused_patterns(config: Any, matched: list[str], names: list[str]) -> None:
    """Warns of what the configuration names and nothing answers to, and of patterns whose meaning a file would lose."""
    excluded = getattr(config, "exclude_modules", None) or ()
    if isinstance(excluded, str):
        missed: Any = "" if any(re.fullmatch(excluded, key) for key in names) else excluded
    else:
        missed = _without_a_match(excluded, names)
    if missed:
        warnings.warn(f"exclude_modules={cut(repr(missed))} matched no module", stacklevel=5)
    for field in getattr(config, "module_patterns", ()):
        patterns = getattr(config, field)
        used = {get_pattern_key(patterns, key) for key in matched}
        unused = [p for p in patterns if p not in used]
        if unused:
            warnings.warn(f"{field}: {cut(str(unused))} decided nothing for any targeted module", stacklevel=5)
        # The first pattern that matches decides, and the file, PEFT's, holds them in the order of the alphabet.
        kept = sorted(patterns)
        asked = [(key, get_pattern_key(patterns, key), get_pattern_key(kept, key)) for key in matched if len(kept) > 1]
        lost = [(key, p, q) for key, p, q in asked if patterns.get(p) != patterns.get(q)]
        if lost:
            key, now, then = lost[0]
            warnings.warn(
                f"{field}: {now!r} decides for {key!r} here, but {then!r} matches it too and comes first once the "
                f"configuration is saved, in the order of the alphabet ({len(lost)} modules): let no two match one",
                stacklevel=5,
            )


def warn_of_tied_targets(model: nn.Module, config: Any, keys: Iterable[str]) -> None:
    """Warns where an adapter, or a copy that is trained whole, goes on a weight that another module uses too."""
    whole = getattr(config, "modules_to_save", None) or []
    users: dict[int, list[str]] = {}
    for name, module in named_modules_of(model, remove_duplicate=False):
        for parameter in module._parameters.values():
            if parameter is not None:
                users.setdefault(id(parameter), []).append(name)
    targeted = set(keys)
    for modules in users.values():
        if len(modules) > 1 and any(m in targeted or any(m.endswith(w) for w in whole) for m in modules):
            warnings.warn(
                f"the adapter targets a weight that is tied between {' and '.join(modules)}: a module gets an adapter "
                "only if it is targeted itself, and merging changes the weight for all of them",
                stacklevel=4,
            )


def warn_of_uncalled_targets(model: nn.Module, keys: Iterable[str]) -> None:
    """Warns where an adapter goes on a layer that the model does not call: there are such files, so it is no error."""
    dead = [key for key in keys if is_uncalled(model, key)]
    if dead:
        warnings.warn(
            f"the adapters of {shorten(dead, 3)} have no effect and will not learn: the model reads the weights of "
            "these layers without calling them (keep them out with exclude_modules)",
            stacklevel=4,
        )


def output_head_names(model: nn.Module, task_type: str | None) -> set[str]:
    """Names of the layers that turn features into logits, which "all-linear" leaves out.

    A transformers model says which layer that is; for a classifier without output embeddings, the head goes by the
    names that transformers gives it. Other models have no such convention, so nothing is left out.
    """
    heads: list[Any] = []
    transformer: Any = model
    if hasattr(transformer, "get_output_embeddings"):
        heads = [transformer.get_output_embeddings()]
        if heads[0] is None and task_type == TaskType.SEQ_CLS:
            found = (getattr(model, name, None) for name in SEQ_CLS_HEAD_NAMES)
            heads = [next((head for head in found if head is not None), None)]
    return {name for name, module in named_modules_of(model) if any(module is head for head in heads)}


def all_linear_names(model: nn.Module, task_type: str | None, inside: set[str], linear_like: set[str]) -> set[str]:
    """What the shorthand "all-linear" stands for in `model`.

    PEFT also puts adapters on the out_proj of an `nn.MultiheadAttention` (SigLIP's pooling head), which computes
    nothing with them; here they are left out.

    Args:
        model: The model.
        task_type: The configuration's task, which tells a classification head.
        inside: Names of adapted layers and wrappers; what lies in them is never meant.
        linear_like: Those of them that stand in the place of a linear layer.
    """
    names = {name for name, module in named_modules_of(model) if is_linear(module) and not lies_under(name, inside)}
    names = {name for name in names if not _is_read_by_attention(model, name)}
    return (names | linear_like) - output_head_names(model, task_type)


def lies_under(key: str, names: set[str]) -> bool:
    """Whether `key` is the name of something strictly inside a module whose name is in `names`."""
    parent = key.rpartition(".")[0]
    while parent:
        if parent in names:
            return True
        parent = parent.rpartition(".")[0]
    return False


def is_all_linear(targets: Any) -> bool:
    """Whether `targets` is the shorthand "all-linear", in any case."""
    return isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND


def shortest_suffixes(targets: set[str], others: Iterable[str]) -> set[str]:
    """A small set of dotted tails that ends every name of `targets` and none of `others`.

    A saved configuration then holds `{"q_proj", "v_proj"}` rather than hundreds of full names.

    Args:
        targets: Names or dotted tails of names.
        others: Full names that must not match.
    """

    def tails(name: str) -> list[str]:
        parts = name.split(".")
        return [".".join(parts[i:]) for i in reversed(range(len(parts)))]

    taken = {tail for name in others for tail in tails(name)}
    chosen: set[str] = set()
    for name in sorted(targets, key=tails):
        if not ends_with_name(name, chosen):
            chosen.add(next((tail for tail in tails(name) if tail not in taken), name))
    return chosen


def check_mamba_target(config: Any, model: nn.Module, target_name: str) -> None:
    """Raises ValueError for a layer that a Mamba model's kernel reads without calling it: adapting it does nothing."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type in MAMBA_MODEL_TYPES and target_name in MAMBA_UNCALLED_MODULES:
        raise ValueError(
            f"target_modules must not name {target_name!r} in a model of type {model_type!r}: its kernel uses the "
            f"weight without calling the layer, so an adapter there would do nothing (got {config.target_modules!r})"
        )


def _is_read_by_attention(model: nn.Module, key: str) -> bool:
    """Whether `key` is the out_proj of an `nn.MultiheadAttention`, which reads its weight and never calls it."""
    return isinstance(model.get_submodule(key.rpartition(".")[0]), nn.MultiheadAttention)


def check_is_called(config: Any, model: nn.Module, key: str) -> None:
    """Raises ValueError for a layer `key` whose weight the model reads without calling it: adapting it does nothing."""
    if _is_read_by_attention(model, key):
        raise ValueError(
            f"target_modules names {key!r}, whose weight nn.MultiheadAttention reads without calling the layer: an "
            "adapter there would do nothing (keep it out with exclude_modules)"
        )
    check_mamba_target(config, model, key.rpartition(".")[2])


def _listed(indices: set[int]) -> str:
    """Layer indices in words."""
    if not indices:
        return "no layer that has an index, as layers_to_transform and layers_pattern count"
    ordered = sorted(indices)
    if len(ordered) == 1:
        return f"layer {ordered[0]}"
    if ordered[-1] - ordered[0] == len(ordered) - 1:
        return f"layers {ordered[0]} to {ordered[-1]}"
    return f"layers {cut(', '.join(map(str, ordered)), 300)}"


def no_match_message(config: Any, names: list[str], excluded: list[str]) -> str:
    """What to say when `config` matched no module: what was asked for, what was excluded, and names that are near."""
    targets = config.target_modules
    asked_for = targets if isinstance(targets, str) or targets is None else sorted(targets)
    message = f"target_modules={cut(repr(asked_for))} matched no module of the base model that can be adapted"
    parameters = getattr(config, "target_parameters", None)
    if parameters:
        message += f", and target_parameters={cut(repr(sorted(parameters)))} no parameter of a module"
        if not targets:
            return message
    for name in ("layers_to_transform", "layers_pattern"):
        if getattr(config, name, None) is not None:
            message += f", with {name}={shown(getattr(config, name), 300)}"
    if excluded:
        some = ", ".join(excluded[:3]) + (", ..." if len(excluded) > 3 else "")
        message += f"; exclude_modules and modules_to_save left out {len(excluded)} that matched ({some})"
        return message
    if not targets:
        return message + ": name at least one module"
    if getattr(config, "layers_to_transform", None) is not None:
        anywhere = dataclasses.replace(config, layers_to_transform=None, layers_pattern=None)
        found = [key for key in names if check_target_module_exists(anywhere, key)]
        indices = {index for index in (_layer_index(config, key) for key in found) if index is not None}
        if found:
            return message + f". Modules of these names are in {_listed(indices)}"
    asked = [name[-200:] for name in ([targets] if isinstance(targets, str) else sorted(targets)[:50])]
    near = _near_names(asked, names)
    if near:
        return message + f". Near names: {', '.join(near)}"
    tails = _last_parts(names)
    return message + f". Names in the model end in: {', '.join(tails[:20])}{', ...' if len(tails) > 20 else ''}"


def _last_parts(names: Iterable[str]) -> list[str]:
    """What the names end in after their last dot, numbers aside."""
    return sorted({name.rpartition(".")[2] for name in names if not name.rpartition(".")[2].isdigit()} - {""})


def _near_names(asked: Iterable[str], names: Iterable[str]) -> list[str]:
    """The names in the model that are spelled almost like those asked for, without repeats."""
    tails = _last_parts(names)
    near = [n for a in asked for n in difflib.get_close_matches(re.split(r"\\?\.", a)[-1], tails, n=3)]
    return list(dict.fromkeys(near))
