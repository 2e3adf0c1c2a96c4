"""Which tensor of a model belongs to which name in an adapter's file: one map, used for saving and for loading.

In the model a name carries the adapter's name, `base_model.model.<m>.lora_A.<adapter>.weight`; in the file it does
not, `base_model.model.<m>.lora_A.weight`, because an adapter may be loaded under another name. The map is read off the
module tree, not guessed from names: a user's module may well be called `lora_A` or `default`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from peftkern.tuners.prompt_learning.encoder import PROMPT_KEY, VirtualTokens
from peftkern.tuners.trainable_tokens import TrainableTokensLayer, TrainableTokensWrapper
from peftkern.tuners.tuner_layer import BaseTunerLayer, is_tuned
from peftkern.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peftkern.utils.module_tree import named_modules_of
from peftkern.utils.other import ModulesToSaveWrapper, embeddings_of

EMBEDDING_LAYER_NAMES = ("embed_tokens", "lm_head")
# DoRA's magnitudes: in a file a tensor, in the model since PEFT 0.11 a module with a `weight`.
MAGNITUDE = "lora_magnitude_vector"
# Where the base model's own module is in what is put around it.
_WRAPPED: tuple[tuple[type, str], ...] = (
    (BaseTunerLayer, "base_layer"),
    (ModulesToSaveWrapper, "original_module"),
    (TrainableTokensWrapper, "token_adapter"),
)
# Names that FSDP and activation checkpointing add to modules but not to state dicts.
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def adapter_key_map(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """Names in the file -> names in `model.state_dict()`, for every tensor of the adapter, biases and embeddings aside.

    Covers each adapted layer's own parameters, virtual tokens, the copies of `modules_to_save`, and trained rows of
    embeddings, once where tied layers share them. Layers of `peftkern.nn` are part of the base, but where they are all
    that is adapted (`layer_files`, which says so by `stands_alone`). A layer inside a module of which another adapter
    has a copy goes by its name in the base model.
    """
    found: dict[str, str] = {}
    alone = getattr(model, "stands_alone", False)
    wrappers: list[str] = []
    encoder = prompt_encoder_of(model, adapter_name)
    for name, module in _named_modules(model):
        dot = f"{name}." if name else ""
        around = [wrapper for wrapper in wrappers if dot.startswith(wrapper)]
        if any(dot.startswith(f"{wrapper}modules_to_save.") for wrapper in around):
            continue
        own = dot
        for wrapper in reversed(around):
            own = wrapper + own.removeprefix(wrapper).removeprefix("original_module.")
        if isinstance(module, (ModulesToSaveWrapper, TrainableTokensWrapper)):
            if isinstance(module, ModulesToSaveWrapper):
                wrappers.append(dot)
            load_map = module.adapter_state_dict_load_map(adapter_name)
            found.update({f"{own}{saved}": f"{dot}{held}" for saved, held in load_map.items()})
        elif module is encoder:
            found[PROMPT_KEY] = f"{dot}embedding.weight"
        elif isinstance(module, TrainableTokensLayer) and module.tied_adapter is not None:
            continue  # see `tied_rows_key_map`
        elif is_tuned(module) or (alone and isinstance(module, BaseTunerLayer)):
            for child_name, child in module.named_children():  # type: ignore[attr-defined]
                if child_name not in module.adapter_layer_names:  # the base, dropout, numbers that files do not have
                    continue
                if isinstance(child, nn.ParameterDict):
                    if adapter_name in child:
                        found[f"{own}{child_name}"] = f"{dot}{child_name}.{adapter_name}"
                elif adapter_name in child:
                    for key in child[adapter_name].state_dict():
                        saved = child_name if child_name == MAGNITUDE else f"{child_name}.{key}"
                        found[f"{own}{saved}"] = f"{dot}{child_name}.{adapter_name}.{key}"
    return found


def tied_rows_key_map(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """Names in the file -> names in `model.state_dict()` of trained rows that are another layer's too.

    PEFT writes them twice where training rows is the method (TRAINABLE_TOKENS); a file need not have them.
    """
    named = list(_named_modules(model))
    wrapped = {f"{name}.token_adapter" for name, module in named if isinstance(module, TrainableTokensWrapper)}
    return {
        f"{name}.trainable_tokens_delta": f"{name}.trainable_tokens_delta.{adapter_name}"
        for name, module in named
        if isinstance(module, TrainableTokensLayer)
        and name not in wrapped
        and module.tied_adapter is not None
        and adapter_name in module.trainable_tokens_delta
    }


def prompt_encoder_of(model: nn.Module, adapter_name: str) -> VirtualTokens | None:
    """The module that makes an adapter's virtual tokens; None where the adapter is no prompt."""
    encoders = model._modules.get("prompt_encoder")
    found = encoders._modules.get(adapter_name) if encoders is not None else None
    return found if isinstance(found, VirtualTokens) else None


def base_bias_keys(model: nn.Module, config: Any) -> list[str]:
    """Names in `model.state_dict()` of the base model's biases that `config.bias` makes part of the adapter."""
    bias = getattr(config, "bias", "none")
    found = []
    if bias != "none":
        for name, module in _named_modules(model):
            if bias == "all" and not isinstance(module, ModulesToSaveWrapper | BaseTunerLayer):
                if isinstance(module._parameters.get("bias"), torch.Tensor) and not _inside_adapter(model, name):
                    found.append(f"{name}.bias" if name else "bias")
            elif bias.endswith("_only") and is_tuned(module) and not isinstance(module, TrainableTokensLayer):
                base = module.get_base_layer()
                if isinstance(getattr(base, "bias", None), torch.Tensor):
                    found.append(f"{name}.base_layer.bias" if name else "base_layer.bias")
    return found


def embedding_key_map(model: nn.Module, targeted: bool, adapter_name: str) -> dict[str, str]:
    """Names in the file -> names in `model.state_dict()`, for the base model's own input and output embeddings.

    An embedding that is adapted goes by the name of its wrapped layer (`....base_layer.weight`); one of which adapters
    have copies (`modules_to_save`) by its name in the base model. One of which rows are trained brings those of the
    adapter, as in PEFT also where they are another layer's. With `targeted` embeddings one that is not adapted is
    left out. Empty for a model without `get_input_embeddings`.
    """
    found = {}
    for layer in embeddings_of(model):
        if targeted and not isinstance(getattr(layer, "base_layer", None), nn.Linear | nn.Embedding):
            continue
        name = next((name for name, module in _named_modules(model) if module is layer), None)
        if name is None:
            continue
        if isinstance(layer, ModulesToSaveWrapper):
            found.update({f"{name}.{k}": f"{name}.original_module.{k}" for k in layer.original_module.state_dict()})
            continue
        wrapped = isinstance(layer, TrainableTokensWrapper)
        if wrapped and adapter_name in layer._get_available_adapters():
            rows = f"{name}.token_adapter.trainable_tokens_delta"
            found[rows] = f"{rows}.{adapter_name}"
        dot = "token_adapter.base_layer." if wrapped else "base_layer." if isinstance(layer, BaseTunerLayer) else ""
        inner = layer.get_submodule(dot.rstrip("."))
        found.update({f"{name}.{dot}{key}": f"{name}.{dot}{key}" for key in inner.state_dict()})
    return found


def embedding_is_targeted(model: nn.Module, config: Any) -> bool:
    """Whether `config.target_modules` reaches the embeddings (by the names that PEFT looks for)."""
    targets = getattr(config, "target_modules", None)
    if not targets or targets == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        return False
    if isinstance(targets, str):
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        names = (name for name, _ in named_modules_of(base) if name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES)
        return any(re.fullmatch(targets, name) for name in names)
    return any(name in targets for name in EMBEDDING_LAYER_NAMES)


def _named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in named_modules_of(model):
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        yield name, module


def _inside_adapter(model: nn.Module, name: str) -> bool:
    """Whether module `name` is part of an adapter (a `lora_B` with a bias, a copy of `modules_to_save`)."""
    return base_name(model, name) is None


def base_name(model: nn.Module, name: str) -> str | None:
    """The name that a module or tensor of `model` has in the model without adapters; None of what is an adapter's.

    Args:
        model: A model with adapters.
        name: As in `model.named_modules()` (without FSDP's additions) or `model.state_dict()`.
    """
    kept = []
    module: nn.Module | None = model
    for part in name.split("."):
        inner = next((child for kind, child in _WRAPPED if isinstance(module, kind)), None)
        if inner is None:
            kept.append(part)
        elif part != inner:
            return None
        module = module._modules.get(part) if module is not None else None
        for wrapper in _WRAPPERS:
            wrapped = module._modules.get(wrapper[:-1]) if module is not None else None
            module = wrapped if wrapped is not None else module
    return ".".join(kept)
