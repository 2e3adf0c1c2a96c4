"""Writing what EVA found into an adapter: new ranks, and layers that lose it."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from peftkern.tuners.lora.config import PLAIN_START, LoraConfig
from peftkern.tuners.lora.layer import Linear
from peftkern.tuners.lora.model import LoraModel, rank_and_alpha
from peftkern.tuners.targets import shortest_suffixes
from peftkern.tuners.tuner_layer import parameters_of
from peftkern.utils.adapter_error import shorten
from peftkern.utils.constants import MIN_TARGET_MODULES_FOR_OPTIMIZATION, PREFIX
from peftkern.utils.model_snapshot import restored_on_error
from peftkern.utils.module_tree import named_modules_of
from peftkern.utils.other import _get_submodules


def write_eva_weights(
    tuner: LoraModel, config: LoraConfig, state_dict: Mapping[str, torch.Tensor], adapter_name: str
) -> None:
    """See `peftkern.tuners.lora.eva.initialize_lora_eva_weights`."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"eva_state_dict: expected a dict of names to matrices, got a {type(state_dict).__name__}")
    layers = {name: layer for name, layer in tuner._named_layers().items() if adapter_name in layer.scaling}
    merged = [name for name, layer in layers.items() if layer.merged_adapters]
    if merged:
        raise ValueError(f"adapters are merged into {merged[0]}: unmerge them first")
    given = {name.removeprefix(PREFIX): A for name, A in state_dict.items()}
    found = {name: given[name] for name, layer in layers.items() if name in given and isinstance(layer, Linear)}
    for name, A in found.items():
        _check(name, A, layers[name])
    if not any(len(A) for A in found.values()):
        raise ValueError(
            f"eva_state_dict: no layer of {adapter_name!r} gets a rank from it, got {shorten(list(given))}"
        )
    unknown = [name for name in given if name not in found]
    if unknown:
        warnings.warn(f"eva_state_dict: no layers of {adapter_name!r}, left out: {shorten(unknown)}", stacklevel=4)
    others = [name for name, _ in named_modules_of(tuner.model) if name not in layers]
    ranks: dict[str, int] = {}
    alphas: dict[str, int | float] = {}
    with restored_on_error(tuner):
        for name, layer in layers.items():
            r, alpha = rank_and_alpha(config, name)
            new = len(found[name]) if name in found else r
            if new == 0:
                _take_away(tuner, name, layer, adapter_name)
                others.append(name)
                continue
            settings: Any = config.eva_config
            if new != r and settings.adjust_scaling_factors:
                alpha *= new / r  # gradients of the same size, whatever the rank
            if name not in found:
                _make_anew(layer, adapter_name, r, alpha, dataclasses.replace(config, **PLAIN_START))
            elif new != r or layer.lora_A[adapter_name].weight.is_meta:
                _make_anew(layer, adapter_name, new, alpha, config)
            ranks[name], alphas[name] = new, alpha
        tuner.settle_layers(tuner.model)
    for name, A in found.items():
        if name in ranks:
            layers[name].lora_A[adapter_name].weight.copy_(A)
    targets = set(ranks)
    config.target_modules = (
        shortest_suffixes(targets, others) if len(targets) >= MIN_TARGET_MODULES_FOR_OPTIMIZATION else targets
    )
    config.rank_pattern = {name: r for name, r in ranks.items() if r != config.r}
    config.alpha_pattern = {name: alpha for name, alpha in alphas.items() if alpha != config.lora_alpha}
    missing = [name for name in layers if name not in found]
    if missing:
        warnings.warn(
            f"EVA has nothing for {shorten(missing)} (embeddings are not built): they start as with "
            "init_lora_weights=True",
            stacklevel=4,
        )


def _check(name: str, A: Any, layer: Linear) -> None:
    """Raises ValueError for a matrix that is not one of the layer's."""
    shape = list(A.shape) if isinstance(A, torch.Tensor) else type(A).__name__
    if not isinstance(A, torch.Tensor) or A.dim() != 2 or A.shape[1] != layer.in_features:
        raise ValueError(f"eva_state_dict[{name!r}]: expected shape [rank, {layer.in_features}], got {shape}")
    if not bool(A.isfinite().all()):
        raise ValueError(f"eva_state_dict[{name!r}]: expected finite numbers, got NaN or infinity")


def _make_anew(layer: Any, adapter_name: str, r: int, alpha: int | float, config: LoraConfig) -> None:
    """`update_layer`, with the dtypes and the `requires_grad` of what was there."""
    flags = [(p, p.requires_grad) for container in layer._containers() for p in container.parameters()]
    old = {id(c): parameters_of(c[adapter_name]) for c in layer._containers() if adapter_name in c}
    layer.update_layer(adapter_name, r, alpha, config)
    for container in layer._containers():
        if adapter_name in container:
            for p, before in zip(parameters_of(container[adapter_name]), old[id(container)], strict=True):
                p.data = p.data.to(before.dtype)
                p.requires_grad = before.requires_grad
    for p, requires_grad in flags:
        p.requires_grad = requires_grad


def _take_away(tuner: LoraModel, name: str, layer: Any, adapter_name: str) -> None:
    """The layer without the adapter: its base layer, if it has no other."""
    tuner.__dict__["_layers_changed"] = True
    if set(layer.scaling) - {adapter_name}:
        active, layer._active_adapter = layer._active_adapter, []
        layer.delete_adapter(adapter_name)
        layer._active_adapter = active  # the model's choice, which may be one that this layer does not have
        return
    group = layer._shared_input
    for member in group.layers if group is not None else ():
        member.__dict__.pop("_shared_input", None)
    tuner.release_layers(tuner.model)
    parent, _, child = _get_submodules(tuner.model, name)
    setattr(parent, child, layer.get_base_layer())
    tuner.targeted_module_names[:] = [key for key in tuner.targeted_module_names if key != name]
