"""Where `trainable_token_indices` puts trained rows: found and checked before a model changes, then wrapped.

As in PEFT 0.21.2 a list is for the input embedding, and a dict has endings of module names. Where the configuration of
the model ties its embeddings, what has the input embedding's own weight (the output head) takes the same rows, unless
the dict gives it other ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from peftkern.tuners.tied_weights import TiedWeights, find_tied, input_embedding_name, modules_outside
from peftkern.tuners.trainable_tokens.layer import TrainableTokensLayer
from peftkern.tuners.trainable_tokens.wrapper import TrainableTokensWrapper
from peftkern.tuners.tuner_layer import BaseTunerLayer
from peftkern.utils.adapter_error import shorten
from peftkern.utils.module_tree import modules_of, named_modules_of
from peftkern.utils.other import ModulesToSaveWrapper, _get_submodules

FIELD = "trainable_token_indices"


class TokenPlace(NamedTuple):
    """A module that gets trained rows.

    Attributes:
        key: its name.
        indices: the ids of the rows.
        tied_to: the name of the place whose rows these are; None for rows of its own.
    """

    key: str
    indices: list[int]
    tied_to: str | None


def find_places(model: nn.Module, config: Any, adapted: Iterable[str]) -> list[TokenPlace]:
    """The modules that get trained rows, those with rows of their own first. Nothing in the model is changed.

    Args:
        model: the base model, adapted or not.
        config: may have `trainable_token_indices`, `ensure_weight_tying` and `modules_to_save`.
        adapted: names of the modules that get an adapter of the method.

    Raises:
        ValueError: a name that matches nothing, or two that give a module other indices; an id that is not in the
            table; a module that is trained whole, or whose rows another adapter here has tied or not tied; indices that
            differ between tied modules, with `ensure_weight_tying`.
        TypeError: a module that has an adapter, or is neither an embedding nor a linear layer with a dense weight.
    """
    wanted = getattr(config, FIELD, None)
    if wanted is None:
        return []
    modules, tied = modules_outside(model), find_tied(model)
    asked = _asked_for(model, modules, wanted)
    if tied is not None and tied.source in asked and config.ensure_weight_tying:
        found = {key: asked[key] for key in (tied.source, *tied.others) if key in asked}
        if any(indices != asked[tied.source] for indices in found.values()):
            raise ValueError(f"ensure_weight_tying: {FIELD} must be the same for tied modules, got {found}")
    places = _with_tied(asked, tied)
    whole, adapted = getattr(config, "modules_to_save", None) or (), set(adapted)
    for place in places:
        _check_is_free(modules, place.key, whole, adapted)
        _check_place(modules, place, FIELD)
    return places


def places_of(model: nn.Module, keys: Iterable[str], indices: Sequence[int], field: str) -> list[TokenPlace]:
    """The same for modules that are named, which all get these rows.

    Args:
        model: the base model, adapted or not.
        keys: the modules' names.
        indices: the ids of the rows.
        field: what the configuration calls them, for messages.

    Raises:
        TypeError, ValueError: see `find_places`.
    """
    modules = modules_outside(model)
    places = _with_tied({key: list(indices) for key in keys}, find_tied(model))
    for place in places:
        _check_place(modules, place, field)
    return places


def _with_tied(asked: Mapping[str, list[int]], tied: TiedWeights | None) -> list[TokenPlace]:
    """The places that are asked for, and those that are tied to one of them unless any of these has other rows."""
    indices = None if tied is None else asked.get(tied.source)
    if tied is None or indices is None or any(asked.get(key, indices) != indices for key in tied.others):
        return [TokenPlace(key, own, None) for key, own in asked.items()]
    places = [TokenPlace(key, own, None) for key, own in asked.items() if key not in tied.others]
    return places + [TokenPlace(key, indices, tied.source) for key in tied.others]


def put_rows(
    model: nn.Module,
    places: Sequence[TokenPlace],
    adapter_name: str,
    *,
    inference_mode: bool,
    activate: bool,
    wrapped: bool = True,
    init_weights: bool = True,
) -> None:
    """Gives an adapter its rows in each place.

    Args:
        model: what `find_places` looked at.
        places: what it found.
        adapter_name: whose rows they are.
        inference_mode: whether they are frozen.
        activate: whether they are used at once.
        wrapped: put a wrapper in a module's place, as PEFT does beside a method; False: the layer itself, which then is
            the method's.
        init_weights: see `TrainableTokensLayer.update_layer`.
    """
    layers: dict[str, TrainableTokensLayer] = {}
    for place in places:
        parent, module, name = _get_submodules(model, place.key)
        layer = _layer_in(module)
        if layer is None:
            made = TrainableTokensWrapper if wrapped else TrainableTokensLayer
            module = made(module, layers[place.tied_to] if place.tied_to else None)
            setattr(parent, name, module)
            layer = module.token_adapter if isinstance(module, TrainableTokensWrapper) else module
        layers[place.key] = layer
        layer.update_layer(adapter_name, place.indices, init_weights)
        if activate:
            layer.set_adapter(adapter_name, inference_mode)


def rows_of_own(model: nn.Module) -> list[TrainableTokensLayer]:
    """The layers of `model` with trained rows of their own: not those that have another's."""
    layers = [module for module in modules_of(model) if isinstance(module, TrainableTokensLayer)]
    return [layer for layer in layers if layer.tied_adapter is None]


def check_rows_mergeable(model: nn.Module, adapter_names: Sequence[str] | None, safe_merge: bool) -> None:
    """Raises for trained rows that cannot be merged into the base weights, before any are.

    Raises:
        TypeError, ValueError: see `TrainableTokensLayer.check_mergeable`.
        ValueError: the weight is tied to another module's, which does not take these rows: it would change as well; or
            it no longer is that of a module which does, whose rows would be lost.
    """
    merging = {layer: layer.to_merge(adapter_names) for layer in rows_of_own(model)}
    for layer, names in merging.items():
        if not names:
            continue
        layer.check_mergeable(names, safe_merge)
        _check_still_tied(model, layer, names[0])
        weight, users = layer.base_layer.weight, []
        for key, module in named_modules_of(model, remove_duplicate=False):
            if module._parameters.get("weight") is weight:
                around = model.get_submodule(key.rpartition(".")[0])
                is_same = isinstance(around, TrainableTokensLayer) and layer in (around, around.tied_adapter)
                users += [] if is_same else [key.removesuffix(".token_adapter.base_layer")]
        if users:
            raise ValueError(
                f"adapter {names[0]!r}: its trained rows of tokens cannot be merged, for the weight is also that of "
                f"{shorten(users, 2)}, which does not take them"
            )


def _check_still_tied(model: nn.Module, layer: TrainableTokensLayer, adapter: str) -> None:
    """Raises ValueError where a layer with the rows of `layer` has another weight than it: they would not go there."""
    for key, module in named_modules_of(model):
        tied = isinstance(module, TrainableTokensLayer) and module.tied_adapter is layer
        if tied and module.weight.data_ptr() != layer.weight.data_ptr():
            raise ValueError(
                f"adapter {adapter!r}: its trained rows of tokens cannot be merged, for the weight of "
                f"{key.removesuffix('.token_adapter')!r}, which was tied to the embedding's, is another one now: call "
                "the model's tie_weights() first"
            )


# -- what is asked for -----------------------------------------------------------------------------------------------


def _asked_for(
    model: nn.Module, modules: Mapping[str, nn.Module], wanted: Sequence[int] | Mapping[str, Sequence[int]]
) -> dict[str, list[int]]:
    """The indices for each module that the configuration names."""
    if not isinstance(wanted, Mapping):
        key = input_embedding_name(model)
        if key is not None and key not in modules:
            raise ValueError(
                f"{FIELD}: the model's input embedding, {key!r}, is part of what another adapter has a copy of"
            )
        if key is not None:
            return {key: list(wanted)}
        wanted = {"embed_tokens": wanted}
    found: dict[str, list[int]] = {}
    for ending, indices in wanted.items():
        keys = [key for key in modules if key.endswith(ending)]
        if not keys:
            raise ValueError(f"{FIELD}: expected the name of an embedding of the model, got {ending!r}")
        for key in keys:
            if found.setdefault(key, list(indices)) != list(indices):
                raise ValueError(f"{FIELD}: two entries name {key!r} with other indices: {found[key]}, {list(indices)}")
    return found


def _layer_in(module: nn.Module) -> TrainableTokensLayer | None:
    """The layer with trained rows that a module is or wraps, if there is one."""
    layer = module.token_adapter if isinstance(module, TrainableTokensWrapper) else module
    return layer if isinstance(layer, TrainableTokensLayer) else None


def _base_of(module: nn.Module) -> nn.Module:
    """The module itself, out of what gives it trained rows."""
    layer = _layer_in(module)
    return module if layer is None else layer.base_layer


# -- checks ------------------------------------------------------------------------------------------------------------


def _check_is_free(modules: Mapping[str, nn.Module], key: str, whole: Iterable[str], adapted: Iterable[str]) -> None:
    """Raises for a module that something else trains; see `find_places`."""
    levels = key.split(".")
    above = [".".join(levels[:i]) for i in range(1, len(levels) + 1)]
    if isinstance(modules[key], ModulesToSaveWrapper) or any(name.endswith(tuple(whole)) for name in above):
        raise ValueError(
            f"{FIELD} names {key!r}, which modules_to_save trains whole: a module can be trained in one way"
        )
    if (isinstance(modules[key], BaseTunerLayer) and _layer_in(modules[key]) is None) or key in adapted:
        raise TypeError(f"{FIELD} names {key!r}, which has an adapter (target_modules): it can be adapted in one way")


def _check_place(modules: Mapping[str, nn.Module], place: TokenPlace, field: str) -> None:
    """Raises where the module cannot get these rows; see `find_places`."""
    key, layer, base = place.key, _layer_in(modules[place.key]), _base_of(modules[place.key])
    if layer is not None and (layer.tied_adapter is None) != (place.tied_to is None):
        how = ("of its own", "of the embedding it is tied to")[:: 1 if layer.tied_adapter is None else -1]
        others = sorted(layer._get_available_adapters())
        raise ValueError(f"{field}: {key!r} has rows {how[0]} for {others}, and so cannot have rows {how[1]}")
    size = _check_base(key, base, field)
    outside = [index for index in place.indices if index >= size]
    if outside:
        raise ValueError(f"{field}: expected ids in [0, {size}), the rows of {key!r}, got {outside[:5]}")


def _check_base(key: str, base: Any, field: str) -> int:
    """How many rows there are; raises TypeError unless it is a layer of which single ones can be exchanged."""
    kind = type(base).__name__
    linear, embedding = isinstance(base, nn.Linear), isinstance(base, nn.Embedding)
    weight = getattr(base, "weight", None)
    dense = type(weight) in (nn.Parameter, torch.Tensor) and weight.is_floating_point() and weight.dim() == 2
    if not (linear or embedding) or not dense or "parametrizations" in base._modules:
        raise TypeError(
            f"{field} names {key!r}, a {kind} with a weight of type {type(weight).__name__}: expected an nn.Embedding, "
            "or an nn.Linear as the output head, with a dense weight"
        )
    # What another forward makes of a row is not known, but for a factor that its class says.
    known = type(base).forward in (nn.Embedding.forward, nn.Linear.forward) or hasattr(base, "embed_scale")
    if not known:
        raise TypeError(f"{field} names {key!r}, a {kind}, which has a forward of its own: its rows are not known")
    scale = getattr(base, "embed_scale", None)
    if isinstance(scale, torch.Tensor) and scale.numel() != 1:
        raise TypeError(f"{field} names {key!r}: expected one number as its embed_scale, got shape {list(scale.shape)}")
    if weight.is_meta and hasattr(base, "_hf_hook"):
        raise TypeError(f"{field} names {key!r}, whose weight accelerate offloaded: load it on a device")
    return int(weight.shape[0])
