"""Put another adapter's values in the place of one that a model holds, without a new module or a new compilation.

A compiled model, and a captured CUDA graph, are of one rank and one scaling. `prepare_model_for_compiled_hotswap`
gives the adapters of a model one rank, by zeros; what takes a prepared adapter's place is filled up with zeros too, and
the quotient of the two scalings is multiplied into its B (rounded with it to the adapter's dtype), so that the layer's
number stays. A model that is not prepared gets the adapter exactly as `load_adapter` would make it, with its rank and
scaling.

Names and arguments are those of `peft.utils.hotswap`.
"""

from __future__ import annotations

import collections
import math
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import nn

from peftkern.config import PeftConfig
from peftkern.tuners.lora.attention import OUT_PROJ
from peftkern.tuners.lora.config import LoraConfig, changes_base
from peftkern.tuners.lora.experts import ParamWrapper
from peftkern.tuners.lora.layer import LoraLayer
from peftkern.tuners.lora.model import rank_and_alpha
from peftkern.tuners.switching import refuse_merged
from peftkern.utils.adapter_files import PathLike, reading
from peftkern.utils.adapter_keys import MAGNITUDE, adapter_key_map, embedding_key_map
from peftkern.utils.constants import PREFIX
from peftkern.utils.model_snapshot import restored_on_error
from peftkern.utils.module_tree import named_modules_of
from peftkern.utils.peft_types import PeftType
from peftkern.utils.save_and_load import (
    check_lora_tensors,
    load_config,
    read_adapter,
    set_peft_model_state_dict,
)

# Of a layer's parameters those that have the rank as a dimension, and which dimension that is. Of a convolution with
# groups A's rows lie group by group, and B has those of one group.
_RANK_AXES = {"lora_A": 0, "lora_embedding_A": 0, "lora_B": 1, "lora_embedding_B": 1}


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: LoraConfig | dict[str, LoraConfig] | None = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
) -> None:
    """Make room in `model` for adapters of other ranks and scalings, which then change values only.

    To be called once the first adapter is there and before the model is compiled or captured. Outputs stay as they are.
    `r` and `lora_alpha` of the model's configurations, and the patterns, become those of the filled-up adapters, so
    that they are saved as what they are. Adapters that come later are not prepared.

    Args:
        model: A `PeftModel`, or a model that adapters were injected into.
        target_rank: The rank that all adapters get: the largest of those that will come. None: each keeps its own.
        config: A configuration, or several by adapter name, to be brought up to date beside the model's own.
        check_compiled: What to do where the model is compiled already, so that preparing it compiles it again: raise an
            "error", "warn", or "ignore" it.

    Raises:
        TypeError: `config` is something else, or has the name of no adapter.
        ValueError: The model has no LoRA adapter, or one of a rank above `target_rank`, or is compiled; a convolution's
            groups do not divide `target_rank`; `target_rank` or `check_compiled` is none of the above.
        NotImplementedError: `target_rank` is not the rank of an adapter on a parameter (`target_parameters`).
    """
    if check_compiled not in ("error", "warn", "ignore"):
        raise ValueError(f"check_compiled must be 'error', 'warn' or 'ignore', got {check_compiled!r}")
    whole = not isinstance(target_rank, bool) and isinstance(target_rank, int) and target_rank > 0
    if target_rank is not None and not whole:
        raise ValueError(f"target_rank must be an int of at least 1, or None, got {target_rank!r}")
    plain = _uncompiled(model)
    if plain is not model or getattr(model, "_compiled_call_impl", None) is not None:
        text = "the model is compiled already: prepare it for swapping adapters before that"
        if check_compiled == "error":
            raise ValueError(text)
        if check_compiled == "warn":
            warnings.warn(f"{text}, or it is compiled again", stacklevel=2)
    held = getattr(plain, "peft_config", None) or {}
    given_configs = {} if config is None else config if isinstance(config, dict) else dict.fromkeys(held, config)
    for name, given in given_configs.items():
        if name not in held or not isinstance(given, LoraConfig):
            raise TypeError(
                f"config: expected a LoraConfig, or a dict of them by the names of adapters {sorted(held)}, got "
                f"{type(given).__name__} for {name!r}"
            )
    layers = _lora_layers(plain)
    if not layers:
        raise ValueError("model: no LoRA adapter is in it: load the first adapter, then prepare the model")
    for name, layer in layers.items():
        for adapter, r in layer.r.items():
            if target_rank is None or r == target_rank:
                continue
            if r > target_rank:
                raise ValueError(f"target_rank={target_rank}: adapter {adapter!r} has rank {r} on {name!r}")
            if target_rank % layer.rank_groups:
                raise ValueError(
                    f"target_rank={target_rank} does not go with {name!r}, a convolution with "
                    f"groups={layer.rank_groups}: each needs an equal part of it"
                )
            if isinstance(layer, ParamWrapper):
                raise NotImplementedError(
                    f"target_rank={target_rank}: adapter {adapter!r} has rank {r} on a parameter of {name!r} "
                    "(target_parameters), whose adapters keep their rank"
                )
    with restored_on_error(plain):
        for layer in layers.values():
            for adapter in layer.scaling:
                _fill_up(layer, adapter, layer.r[adapter] if target_rank is None else target_rank)
                layer.swaps_in_place[adapter] = True
        if target_rank is not None:
            _tell_configs(plain, layers, target_rank, given_configs)


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: PathLike,
    adapter_name: str,
    torch_device: str | torch.device | None = None,
    **kwargs: Any,
) -> None:
    """Put the adapter that is saved at `model_name_or_path` in the place of `adapter_name`, whose name it takes.

    Layers that the new adapter lacks are as without an adapter then. Dropout stays that of the old one.

    Args:
        model: A `PeftModel`, or a model that adapters were injected into; compiled or not.
        model_name_or_path: A folder, or a repository of the Hub.
        adapter_name: The adapter to replace.
        torch_device: Where the file is read to.
        kwargs: For the Hub: `subfolder`, `revision`, `token`, `cache_dir` and the like; `key_mapping`.

    Raises:
        AdapterFileError: (a ValueError) A file is missing or damaged.
        ValueError: As `hotswap_adapter_from_state_dict`; the model is as it was.
    """
    plain = _uncompiled(model)
    key_mapping = kwargs.pop("key_mapping", None)
    hub, _, options = PeftConfig._split_kwargs(kwargs)
    options["torch_device"] = torch_device
    with reading(model_name_or_path, hub.get("subfolder")):
        config: Any = load_config(model_name_or_path, **hub)
        _check_config(plain, adapter_name, config)
        tensors, options = read_adapter(model_name_or_path, config, key_mapping, False, hub, options)
    if options:
        raise TypeError(f"unknown arguments: {', '.join(sorted(options))}")
    _swap(plain, tensors, adapter_name, config, model_name_or_path)


def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, torch.Tensor],
    adapter_name: str,
    config: LoraConfig,
    parameter_prefix: str = "lora_",
) -> None:
    """Put the tensors of `state_dict` in the place of those of `adapter_name`.

    Args:
        model: A `PeftModel`, or a model that adapters were injected into; compiled or not.
        state_dict: The new adapter's tensors by their names in `model.state_dict()`, `adapter_name` included.
        adapter_name: The adapter to replace.
        config: The new adapter's configuration, which gives its scaling.
        parameter_prefix: PEFT's, for its callers; parameters are known by their layers.

    Raises:
        ValueError: `model` has no such adapter, or it is merged; a tensor is of no layer that has the adapter, or of
            another shape than the layer and the rank ask for; the rank is above that of a prepared model; one adapter
            has DoRA and the other has not, or lacks a layer. The model is as it was.
        TypeError: `config` is no LoraConfig.
    """
    plain = _uncompiled(model)
    _check_config(plain, adapter_name, config)
    if not isinstance(state_dict, Mapping) or not all(isinstance(v, torch.Tensor) for v in state_dict.values()):
        raise TypeError(f"state_dict: expected a dict of names to tensors, got a {type(state_dict).__name__}")
    saved = {held: key for key, held in adapter_key_map(plain, adapter_name).items()}
    tensors = {saved.get(key, key): value for key, value in state_dict.items()}
    check_lora_tensors("state_dict", tensors, config)
    _swap(plain, tensors, adapter_name, config, "state_dict")


def check_hotswap_configs_compatible(config0: PeftConfig, config1: PeftConfig) -> None:
    """Raise ValueError unless both are LoRA's, on the same base weights, with the same trained tokens, and both with
    DoRA or neither."""
    for config in (config0, config1):
        if config.peft_type != PeftType.LORA:
            raise ValueError(f"adapters of LoRA can be swapped, got one of {config.peft_type}")
        init = getattr(config, "init_lora_weights", True)
        if changes_base(init):
            raise ValueError(f"adapters can be swapped on base weights that both are for; {init!r} changed its own")
    for field in ("use_dora", "trainable_token_indices"):
        ours, theirs = (getattr(config, field, None) for config in (config0, config1))
        if _lists(ours) != _lists(theirs):
            raise ValueError(f"the adapters do not go into one another's place: {field} is {ours} and {theirs}")


def _lists(value: Any) -> Any:
    """Ids of tokens without the names of what has them, which a list leaves out; anything else as it is."""
    if isinstance(value, Mapping):
        return [list(ids) for ids in value.values()]
    return [list(value)] if isinstance(value, (list, tuple)) else value


def _check_config(model: nn.Module, adapter: str, config: Any) -> None:
    configs = getattr(model, "peft_config", None) or {}
    if adapter not in configs:
        raise ValueError(f"adapter_name: no adapter {adapter!r}; there are {sorted(configs)}")
    if not isinstance(config, PeftConfig):
        raise TypeError(f"config: expected a LoraConfig, got {type(config).__name__}")
    check_hotswap_configs_compatible(configs[adapter], config)


def _uncompiled(model: nn.Module) -> nn.Module:
    """The model that `torch.compile` was given."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    inner = model.__dict__.get("_modules", {}).get("_orig_mod")
    return model if inner is None else inner


def _lora_layers(model: nn.Module) -> dict[str, Any]:
    """The layers with adapters of LoRA itself: what AdaLoRA has beside A and B could not be filled up."""
    layers = {name: layer for name, layer in named_modules_of(model) if isinstance(layer, LoraLayer) and layer.scaling}
    return {name: layer for name, layer in layers.items() if layer.peft_type == PeftType.LORA}


def _key(layer: Any, name: str) -> str:
    """The name that patterns of a configuration know a layer by: of one around a parameter's module the parameter's, of
    an attention's out_proj the attention's."""
    if not isinstance(layer, ParamWrapper):
        return name.removesuffix(OUT_PROJ)
    while name.endswith(".base_layer"):
        name = name.removesuffix(".base_layer")
    return f"{name}.{layer.parameter_name}"


# -- one rank for all -------------------------------------------------------------------------------------------------


def _fill_up(layer: Any, adapter: str, rank: int) -> None:
    """Bring an adapter of a layer to `rank` by zeros, without a change of its scaling."""
    _make_rank(layer, adapter, rank, _padded)
    _settle_scaling(layer, adapter, rank, layer.scaling[adapter])


def _make_rank(layer: Any, adapter: str, rank: int, make: Callable[..., torch.Tensor]) -> None:
    """Factors of another rank for an adapter of a layer: `make` of the old one, its axis of the rank, the rank and the
    number of groups."""
    if layer.r[adapter] == rank:
        return
    for kind, axis in _RANK_AXES.items():
        held = getattr(layer, kind)
        if adapter not in held:
            continue
        is_parameter = isinstance(held, nn.ParameterDict)
        old: Any = held[adapter] if is_parameter else held[adapter].weight
        made = make(old.detach(), axis, rank, layer.rank_groups)
        new = nn.Parameter(made, requires_grad=old.requires_grad)
        if is_parameter:
            held[adapter] = new
        else:
            _set_weight(held[adapter], new)


def _zeros(t: torch.Tensor, axis: int, rank: int, groups: int) -> torch.Tensor:
    """Zeros in the place of a factor, to be loaded into."""
    shape = list(t.shape)
    shape[axis] = rank if axis == 0 else rank // groups
    return t.new_zeros(shape)


def _padded(t: torch.Tensor, axis: int, rank: int, groups: int) -> torch.Tensor:
    """A copy of a factor, A (axis 0) or B (axis 1), with zeros for the rest of the rank, in each of the groups."""
    blocks = t.unflatten(0, (groups if axis == 0 else 1, -1))
    shape = list(blocks.shape)
    shape[axis + 1] = rank // groups
    padded = t.new_zeros(shape)
    padded.narrow(axis + 1, 0, blocks.shape[axis + 1]).copy_(blocks)
    return padded.flatten(0, 1)


def _set_weight(module: Any, weight: nn.Parameter) -> None:
    module.weight = weight
    if weight.dim() == 2:
        module.out_features, module.in_features = weight.shape
    else:
        module.out_channels, module.in_channels = weight.shape[0], weight.shape[1] * module.groups


def _settle_scaling(layer: Any, adapter: str, rank: int, scaling: float) -> None:
    """Note a rank, and the `lora_alpha` with which it gives `scaling`."""
    layer.r[adapter] = rank
    layer.lora_alpha[adapter] = scaling * (math.sqrt(rank) if layer.use_rslora[adapter] else rank)
    layer.scaling[adapter] = scaling


def _tell_configs(model: nn.Module, layers: dict[str, Any], rank: int, given: Mapping[str, LoraConfig]) -> None:
    """Write rank and alphas of the adapters into the model's configurations, and into others that were given."""
    held = getattr(model, "peft_config", None) or {}
    for adapter in held:
        prefix = PREFIX if any(name.startswith(PREFIX) for name in layers) else ""
        alphas = {
            _key(layer, name.removeprefix(prefix)): layer.lora_alpha[adapter]
            for name, layer in layers.items()
            if adapter in layer.lora_alpha
        }
        if not alphas:
            continue
        alpha = collections.Counter(alphas.values()).most_common(1)[0][0]
        patterns = {f"^{re.escape(name)}": value for name, value in alphas.items() if value != alpha}
        for config in {id(c): c for c in (held[adapter], given.get(adapter)) if c is not None}.values():
            config.r, config.lora_alpha, config.rank_pattern, config.alpha_pattern = rank, alpha, {}, patterns


# -- the swap ---------------------------------------------------------------------------------------------------------


def _swap(model: Any, tensors: Mapping[str, torch.Tensor], adapter: str, config: Any, source: PathLike) -> None:
    """`tensors` by their names in a file."""
    refuse_merged(model, adapter, before="swapping it")
    saved = {held: key for key, held in adapter_key_map(model, adapter).items()}
    wrapped = any(key.startswith(PREFIX) for key in saved.values())
    found = dict(tensors) if wrapped else {key.removeprefix(PREFIX): value for key, value in tensors.items()}
    _leave_out_embeddings(model, found, set(saved.values()), adapter, source)
    unknown = sorted(key for key in found if key not in saved.values())
    if unknown:
        raise ValueError(f"{source}: adapter {adapter!r} of the model has no place for {', '.join(unknown[:5])}")
    if not any(key in found for held, key in saved.items() if any(f".{kind}." in held for kind in _RANK_AXES)):
        raise ValueError(f"{source}: no tensor of adapter {adapter!r} is in it")
    layers = {name: layer for name, layer in _lora_layers(model).items() if adapter in layer.scaling}
    in_place = {layer.swaps_in_place.get(adapter, False) for layer in layers.values()} == {True}
    with restored_on_error(model):
        for name, layer in layers.items():
            own = {held[len(name) + 1 :]: key for held, key in saved.items() if _is_of(held, name)}
            base = _key(layer, name.removeprefix(PREFIX))
            found.update(_fitted(layer, base, adapter, own, found, config, in_place))
        set_peft_model_state_dict(model, found, adapter, source=source)
        if not in_place:
            known = model.peft_config[adapter]
            for field in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"):
                setattr(known, field, getattr(config, field))


def _leave_out_embeddings(
    model: nn.Module, found: dict[str, Any], own_keys: set[str], adapter: str, source: PathLike
) -> None:
    """Take the base model's embeddings, which files of adapters on them hold too, out of `found`; what has one of
    `own_keys` is the adapter's.

    Raises:
        ValueError: One of them is not the model's own, which other adapters stand on.
    """
    places = embedding_key_map(model, False, adapter) | embedding_key_map(model, True, adapter)
    places |= {held: held for held in places.values()}
    state = model.state_dict()
    for key in [key for key in found if key in places and key not in own_keys]:
        value, own = found.pop(key), state[places[key]]
        if value.shape != own.shape or not torch.equal(value.to(own.device, own.dtype), own):
            raise ValueError(
                f"{source}: {key} is another embedding than the model's, which a swap leaves as it is: load the "
                "adapter by load_adapter"
            )


def _is_of(held: str, name: str) -> bool:
    """Whether a parameter is of the layer `name` itself, and of no layer inside."""
    return held.startswith(f"{name}.") and held[len(name) + 1 :].partition(".")[0] in (*_RANK_AXES, MAGNITUDE)


def _fitted(
    layer: Any, name: str, adapter: str, own: dict[str, str], found: Mapping[str, Any], config: Any, in_place: bool
) -> dict[str, torch.Tensor]:
    """A layer's new tensors where they are others than the file's, by their names there; the layer is made ready for
    them.

    Args:
        own: the layer's parameters, by their names in it -> their names in the file.
    """
    absent = [key for key in own.values() if key not in found]
    is_absent = len(absent) == len(own)
    if absent and not is_absent:
        return {}  # loading will say what is missing
    if is_absent and MAGNITUDE in (part.partition(".")[0] for part in own):
        raise ValueError(f"the adapter has no values for {name!r}, whose DoRA magnitude nothing can stand for")
    rank, alpha = rank_and_alpha(config, name)
    is_parameter = isinstance(layer, ParamWrapper)
    if not is_absent:
        first = next(key for part, key in own.items() if part.startswith(("lora_A", "lora_embedding_A")))
        rank = found[first].shape[0] // getattr(layer, "num_experts", 1)
    elif is_parameter:
        rank = layer.r[adapter]
    scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
    if not in_place:
        if is_parameter and rank != layer.r[adapter]:
            raise ValueError(
                f"the adapter has rank {rank} on a parameter of {name!r}, the model's has {layer.r[adapter]}: delete "
                "that and load the other"
            )
        layer.use_rslora[adapter] = config.use_rslora
        _make_rank(layer, adapter, rank, _zeros)
        _settle_scaling(layer, adapter, rank, scaling)
        layer.lora_alpha[adapter] = alpha
    if is_absent:
        return {key: torch.zeros_like(layer.get_parameter(part)) for part, key in own.items()}
    return _as_held(layer, name, adapter, own, found, rank, scaling) if in_place else {}


def _as_held(
    layer: Any, name: str, adapter: str, own: dict[str, str], found: Mapping[str, Any], rank: int, scaling: float
) -> dict[str, torch.Tensor]:
    """The tensors of an adapter of this rank and scaling as those of one of the layer's own rank and scaling.

    Raises:
        ValueError: The layer's rank is smaller, or its scaling is 0.
    """
    held_rank, held_scaling = layer.r[adapter], layer.scaling[adapter]
    if rank > held_rank:
        raise ValueError(
            f"the adapter has rank {rank} on {name!r}, and the model is prepared for {held_rank}: give "
            "prepare_model_for_compiled_hotswap the largest rank as target_rank"
        )
    if held_scaling == 0.0 != scaling:
        raise ValueError(f"the model's adapter has scaling 0 on {name!r}, which no values of another can make up for")
    made = {}
    for part, key in own.items():
        kind = part.partition(".")[0]
        value = found[key]
        if kind in _RANK_AXES and rank < held_rank and not part.endswith(".bias"):
            value = _padded(value, _RANK_AXES[kind], held_rank, layer.rank_groups)
        if _RANK_AXES.get(kind) == 1 and scaling != held_scaling:  # B, and its bias
            # Rounded once, to what the layer holds.
            value = value.to(torch.promote_types(value.dtype, torch.float32)) * (scaling / held_scaling)
        made[key] = value
    return made
