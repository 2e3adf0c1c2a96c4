"""Files of a network that holds layers of `peftkern.nn`: PEFT's, written and read without a `PeftModel`.

Such a network has no configuration, so one is put together from its layers: their full names, the commonest rank and
alpha, and patterns for the rest. Everything else is what `PeftModel` does: names and checks of
`peftkern.utils.save_and_load`, the atomic pair of files of `peftkern.utils.adapter_files`.
"""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from peftkern.config import PeftConfig
from peftkern.tuners.ia3 import IA3Config
from peftkern.tuners.ia3.layer import IA3Layer
from peftkern.tuners.lora.config import LoraConfig
from peftkern.tuners.lora.layer import LoraLayer
from peftkern.tuners.lora.model import rank_and_alpha
from peftkern.tuners.targets import ends_with_name, lies_under
from peftkern.tuners.tuner_layer import BaseTunerLayer
from peftkern.utils.adapter_error import AdapterFileError, shorten
from peftkern.utils.adapter_files import PathLike, config_file, reading, weights_file, write_adapter
from peftkern.utils.constants import MIN_TARGET_MODULES_FOR_OPTIMIZATION, PREFIX
from peftkern.utils.peft_types import PeftType
from peftkern.utils.save_and_load import (
    check_lora_tensors,
    config_to_save,
    get_peft_model_state_dict,
    load_config,
    load_peft_weights,
    plan_load,
)

# The one adapter of a layer of `peftkern.nn`.
ADAPTER = "default"


def save_adapter(model: nn.Module, folder: PathLike) -> None:
    """Writes the adapters of a network's layers as PEFT does: `adapter_config.json` and `adapter_model.safetensors`.

    `peft.PeftModel.from_pretrained(network, folder)`, peftkern's, and `load_adapter` put them on a network with the
    same weights whose layers go by the same names. Both files are replaced as one: a kill leaves the old pair or the
    new one. Only adapters are written; whatever else was trained is the caller's to save.

    Args:
        model: The network; holds `LoraLinear` and `LoraEmbedding` layers, or `IA3Linear` ones.
        folder: Made if it is not there.

    Raises:
        TypeError: `model` is no module.
        ValueError: It holds no such layer, layers of both methods, is such a layer itself, or is a `PeftModel`; LoRA
            layers differ in `use_rslora` or `use_dora`, which the files say once for all; or `folder` is a file.

    Warns:
        UserWarning: Layers differ in dropout: the commonest is written. Outputs do not depend on it.
    """
    model = _bare(model)
    config = _config_of(model, _layers_of(model))
    tensors = get_peft_model_state_dict(
        _as_peft_model(model, config), adapter_name=ADAPTER, save_embedding_layers=False
    )
    write_adapter(os.fspath(folder), config_to_save(config, model), tensors)


@torch.no_grad()
def load_adapter(model: nn.Module, folder: PathLike) -> None:
    """Reads an adapter that `save_adapter`, PEFT or peftkern wrote into the layers of a network, in place.

    The values are cast to the layers' adapter dtype. `lora_alpha` and `use_rslora`, and so the scaling, become those
    of the file; ranks have to be equal, and dropout stays the layers' own.

    Args:
        model: As for `save_adapter`; its layers are those that the file has, no more and no fewer.
        folder: The adapter's folder, or its repository on the Hub.

    Raises:
        TypeError: `model` is no module.
        ValueError: As for `save_adapter`; or an adapter is merged, or on the meta device.
        AdapterFileError: (a ValueError) A file is missing or damaged, is of the other method, or has layers, shapes or
            tensors that the network has not, or lacks a layer of it; by name. Nothing was changed.
    """
    model = _bare(model)
    layers = _layers_of(model)
    config = _config_of(model, layers)
    for name, layer in layers.items():
        if layer.merged:
            raise ValueError(f"model: the adapter of {name!r} is merged into the weight: call its unmerge() first")
        if any(p.is_meta for container in layer._containers() for p in container.parameters()):
            raise ValueError(
                f"model: the adapter of {name!r} is on the meta device: give it memory with to_empty first"
            )
    with reading(folder):
        saved: Any = load_config(folder)
        if saved.peft_type != config.peft_type:
            kinds = [PeftType(kind).value for kind in (saved.peft_type, config.peft_type)]
            text = f"it is {kinds[0]}, the network's layers are {kinds[1]}"
            raise AdapterFileError(config_file(folder), text, key="peft_type")
        tensors = load_peft_weights(folder)
        file = weights_file(folder)
    if isinstance(saved, LoraConfig):
        check_lora_tensors(file, tensors, saved)
    holder = _as_peft_model(model, config)
    plan = plan_load(holder, tensors, ADAPTER, source=file)
    if plan.unexpected:
        names = [key.removeprefix(PREFIX) for key in plan.unexpected]
        raise AdapterFileError(file, f"the network has no adapter for {shorten(names)}")
    if plan.missing:
        found = [key.removeprefix(PREFIX) for key in plan.missing]
        absent = [name for name in layers if any(key.startswith(f"{name}.") for key in found)]
        raise AdapterFileError(file, f"layers of the network are not in it: {shorten(absent)}")
    holder.load_state_dict(plan.tensors, strict=False)
    if isinstance(saved, LoraConfig):
        for name, layer in layers.items():
            layer.lora_alpha[ADAPTER] = rank_and_alpha(saved, name)[1]
            layer.use_rslora[ADAPTER] = saved.use_rslora
            layer.set_scale(ADAPTER, 1.0)


def _bare(model: nn.Module) -> nn.Module:
    """The network itself, out of the wrapper of torch.compile or DDP, whose names the files do not have."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    inner = getattr(model, "_orig_mod", model)
    return inner.module if isinstance(inner, nn.parallel.DistributedDataParallel) else inner


def _layers_of(model: nn.Module) -> dict[str, Any]:
    """The network's layers with an adapter, by name; raises as `save_adapter` says."""
    if getattr(model, "peft_config", None):
        kind = type(model).__name__
        raise ValueError(
            f"model: {kind} was adapted by a configuration: save and load it by its own save_pretrained "
            "and load_adapter"
        )
    if isinstance(model, BaseTunerLayer):
        raise ValueError(
            f"model: expected a network that holds such layers, got a {type(model).__name__} itself: files name a "
            "layer by its place in a network; put it in one, such as nn.Sequential(layer)"
        )
    layers = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    kinds = [kind for kind in (LoraLayer, IA3Layer) if any(isinstance(layer, kind) for layer in layers.values())]
    if len(kinds) != 1:
        found = "both LoRA and IA3 ones, of which one folder holds one kind" if kinds else "none"
        raise ValueError(f"model: expected layers of peftkern.nn (LoraLinear, LoraEmbedding or IA3Linear), got {found}")
    for name, layer in layers.items():
        if layer._get_available_adapters() != {ADAPTER}:
            have = sorted(layer._get_available_adapters())
            raise ValueError(f"model: expected one adapter, {ADAPTER!r}, in {name!r}, got {have}")
    return layers


def _as_peft_model(model: nn.Module, config: PeftConfig) -> nn.Module:
    """`model` under the names that a `PeftModel` gives it, for what reads and writes those."""
    holder, tuner = nn.Module(), nn.Module()
    tuner.model, holder.base_model = model, tuner
    holder.peft_config = {ADAPTER: config}  # type: ignore[assignment]
    holder.stands_alone = True  # type: ignore[assignment]
    return holder


# --- the configuration that layers amount to -------------------------------------------------------------------------


def _config_of(model: nn.Module, layers: Mapping[str, Any]) -> PeftConfig:
    """What `get_peft_model` would have to be given to adapt these layers and no others."""
    others = [key for key, _ in model.named_modules() if key and key not in layers and not lies_under(key, set(layers))]
    # A name in a list also matches a longer one that ends in it ("0" is the end of "block.0"), an expression only all.
    ambiguous = any(ends_with_name(key, layers) for key in others)
    targets = _expression(layers) if ambiguous else list(layers)
    linear = {name: layer for name, layer in layers.items() if hasattr(layer, "fan_in_fan_out")}
    transposed = bool(linear) and all(layer.fan_in_fan_out for layer in linear.values())
    if isinstance(next(iter(layers.values())), IA3Layer):
        named = [name for name, layer in layers.items() if layer.is_feedforward]
        # Endings, with or without a dot before; and a long list of targets is shortened to others when it is read.
        ambiguous |= any(key.endswith(tuple(named)) for key in layers if key not in named)
        as_expression = named and (ambiguous or len(layers) >= MIN_TARGET_MODULES_FOR_OPTIMIZATION)
        feedforward = _expression(named) if as_expression else named
        return IA3Config(target_modules=targets, feedforward_modules=feedforward, fan_in_fan_out=transposed)
    ranks = {name: layer.r[ADAPTER] for name, layer in layers.items()}
    alphas = {name: layer.lora_alpha[ADAPTER] for name, layer in layers.items()}
    # An embedding's adapter has no dropout.
    dropouts = {name: getattr(layer.lora_dropout[ADAPTER], "p", 0.0) for name, layer in linear.items()}
    r, alpha = _commonest(ranks), _commonest(alphas)
    dropout = _commonest(dropouts) if dropouts else 0.0
    if any(p != dropout for p in dropouts.values()):
        shown = ", ".join(f"{name!r}: {p}" for name, p in dropouts.items() if p != dropout)
        warnings.warn(f"lora_dropout differs between layers ({shown}): {dropout} is written for all", stacklevel=3)
    return LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets,
        fan_in_fan_out=transposed,
        use_dora=_agreed("use_dora", layers),
        use_rslora=_agreed("use_rslora", layers),
        lora_bias=_agreed("lora_bias", layers),
        rank_pattern={f"^{re.escape(name)}": value for name, value in ranks.items() if value != r},
        alpha_pattern={f"^{re.escape(name)}": value for name, value in alphas.items() if value != alpha},
    )


def _commonest(values: Mapping[str, Any]) -> Any:
    """The value that most layers have; of several the first."""
    return Counter(values.values()).most_common(1)[0][0]


def _expression(names: Iterable[str]) -> str:
    """A regular expression that matches these names and no others."""
    return "|".join(re.escape(name) for name in names)


def _agreed(field: str, layers: Mapping[str, Any]) -> bool:
    """The value of a field that a configuration has once for all layers."""
    values = {name: bool(getattr(layer, field)[ADAPTER]) for name, layer in layers.items()}
    first, *rest = values
    other = next((name for name in rest if values[name] != values[first]), None)
    if other is not None:
        raise ValueError(
            f"model: {field} must be the same in all layers, which the files say once, got {values[first]} in "
            f"{first!r} and {values[other]} in {other!r}"
        )
    return values[first]
