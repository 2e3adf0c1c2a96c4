"""AdaLoRA's adapters in files: triplets that training cut are left out, and `rank_pattern` says where they were.

An adapter that is made for such a file takes its ranks (`fit_to_pattern`). One that is there with all its triplets, as
when training resumes, keeps them, and its optimizer's state with them: the file's go to their places (`with_all_rows`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from peftkern.tuners.adalora.ranks import as_saved, by_module, layers_with
from peftkern.utils.adapter_error import AdapterFileError, shorten
from peftkern.utils.constants import PREFIX

_AXES = {"lora_A": 0, "lora_E": 0, "lora_B": 1}  # the one that counts triplets


def _factors(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, str, str, torch.Tensor]]:
    """(key, module in the base model, "lora_A" and so on, tensor) for AdaLoRA's tensors of a file."""
    for key, value in tensors.items():
        module, _, kind = key.rpartition(".")
        if kind in _AXES:
            yield key, module.removeprefix(PREFIX), kind, value


def pruned(tensors: Mapping[str, torch.Tensor], config: Any, adapter_name: str) -> dict[str, torch.Tensor]:
    """The tensors of an adapter, by their names in files, without the triplets that its `rank_pattern` does not keep;
    which gets the names that files have, as in PEFT.

    Warns:
        UserWarning: E is not zero for some of those, so that what is saved is not what runs: they were cut some steps
            ago and have learned since, or the pattern is not this adapter's.
    """
    if config.rank_pattern is not None:
        config.rank_pattern = as_saved(config.rank_pattern, adapter_name)
    found, alive = dict(tensors), []
    kept = by_module(config.rank_pattern, adapter_name)
    for key, module, kind, value in _factors(tensors):
        mask = kept.get(module)
        # Another length than the adapter's: its ranks are cut already, as in PEFT.
        if mask is None or len(mask) != value.shape[_AXES[kind]] or all(mask):
            continue
        rows = torch.tensor(mask, dtype=torch.bool, device=value.device)
        if kind == "lora_E" and not value.is_meta and bool(value.detach()[~rows].any()):
            alive.append(module)
        found[key] = value.detach().index_select(_AXES[kind], rows.nonzero().view(-1))
    if alive:
        warnings.warn(
            f"adapter {adapter_name!r}: triplets that rank_pattern leaves out of the file are not zero in "
            f"{shorten(alive, 3)}: save right after a step at which update_and_allocate cut ranks",
            stacklevel=4,
        )
    return found


def fit_to_pattern(
    model: nn.Module, tensors: Mapping[str, torch.Tensor], adapter_name: str, config: Any, source: Any
) -> None:
    """Cuts the ranks of an adapter in `model` to those of a file's tensors, where its `rank_pattern` says which.

    Raises:
        AdapterFileError: The pattern speaks of another number of triplets than the adapter or the file has.
    """
    kept = by_module(config.rank_pattern, adapter_name)
    layers = {name.removeprefix(PREFIX): layer for name, layer in layers_with(model, adapter_name).items()}
    for key, module, kind, value in _factors(tensors):
        if kind != "lora_E" or module not in kept or module not in layers or value.dim() != 2:
            continue
        layer, mask = layers[module], kept[module]
        rank = layer.r[adapter_name]
        if len(value) == rank:
            continue
        if len(value) != sum(mask) or len(mask) != rank:
            text = (
                f"it has {len(value)} triplets, rank_pattern of adapter_config.json keeps {sum(mask)} of {len(mask)}, "
                f"and the adapter has {rank}"
            )
            raise AdapterFileError(source, text, key=key)
        layer.resize(adapter_name, mask)


def with_all_rows(
    model: nn.Module, tensors: Mapping[str, torch.Tensor], adapter_name: str, saved: Any
) -> dict[str, torch.Tensor]:
    """A file's tensors with the triplets that it lacks: E is zero there, A and B are what the adapter in `model` has.

    Args:
        model: Has the adapter.
        tensors: The file's.
        adapter_name: The adapter.
        saved: The file's configuration.
    """
    found, kept = dict(tensors), by_module(saved.rank_pattern, adapter_name)
    layers = {name.removeprefix(PREFIX): layer for name, layer in layers_with(model, adapter_name).items()}
    for key, module, kind, value in _factors(tensors):
        if module not in kept or module not in layers or value.dim() != 2:
            continue
        axis, mask = _AXES[kind], kept[module]
        held = getattr(layers[module], kind)[adapter_name].detach()
        if value.shape[axis] != sum(mask) or held.shape[axis] != len(mask) or all(mask):
            continue  # what does not fit is refused where all tensors are
        rows = torch.tensor(mask, dtype=torch.bool, device=held.device).nonzero().view(-1)
        whole = torch.zeros_like(held) if kind == "lora_E" else held.clone()
        if value.shape[1 - axis] == held.shape[1 - axis]:
            found[key] = whole.index_copy(axis, rows, value.to(held.device, held.dtype))
    return found


def check_tensors(source: Any, tensors: Mapping[str, torch.Tensor], config: Any) -> None:
    """Checks what a file says by itself, before any model is touched: three matrices a layer, of one rank.

    Raises:
        AdapterFileError: One of A, B and E is missing, no floating-point matrix, or of another rank than the others or
            than `init_r` and `rank_pattern` say.
    """
    kept = by_module(config.rank_pattern, "")
    layers: dict[str, dict[str, tuple[str, torch.Tensor]]] = {}
    for key, module, kind, value in _factors(tensors):
        if not value.is_floating_point():
            raise AdapterFileError(source, f"expected floating point, got {value.dtype}", key=key)
        if value.dim() != 2:
            raise AdapterFileError(source, f"expected a matrix, got shape {list(value.shape)}", key=key)
        layers.setdefault(module, {})[kind] = key, value
    for module, held in layers.items():
        key = next(iter(held.values()))[0]
        missing = sorted(set(_AXES) - set(held))
        if missing:
            raise AdapterFileError(source, f"its partners are missing: {', '.join(missing)}", key=key)
        for kind, (key, value) in held.items():
            mask = kept.get(module)
            ranks = {config.init_r} if mask is None else {sum(mask), len(mask)}
            rank = value.shape[_AXES[kind]]
            if rank not in ranks:
                text = f"its rank is {rank} (shape {list(value.shape)}), adapter_config.json says {sorted(ranks)}"
                raise AdapterFileError(source, text, key=key)
        if len({value.shape[_AXES[kind]] for kind, (_, value) in held.items()}) > 1:
            shapes = {kind: list(value.shape) for kind, (_, value) in held.items()}
            raise AdapterFileError(source, f"shapes of A, B and E differ in rank: {shapes}", key=key)
