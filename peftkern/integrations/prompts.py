"""What prompt learning takes from transformers: caches, that hold a prefix, and tokenizers. Imported lazily."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from peftkern.integrations.extras import require
from peftkern.utils.module_tree import named_modules_of

# The last part of a layer's name in a device map, such as `model.layers.3` or `transformer.h.3`.
_LAYER = re.compile(r"\.(?:layers?|h|blocks?)\.(\d+)$")


def token_ids(text: str, tokenizer_name_or_path: str, kwargs: Mapping[str, Any] | None) -> list[int]:
    """The tokens of `text`, special ones included, by the tokenizer of that name.

    Raises:
        ValueError: `kwargs` ask to run code that comes with the tokenizer.
    """
    options = dict(kwargs or {})
    if options.get("trust_remote_code"):
        raise ValueError("tokenizer_kwargs must not have trust_remote_code: a configuration may come from anywhere")
    options.pop("trust_remote_code", None)
    transformers = require("transformers", "prompt_tuning_init TEXT")
    return list(transformers.AutoTokenizer.from_pretrained(tokenizer_name_or_path, **options)(text)["input_ids"])


def prefix_cache(
    model: Any, key_values: Sequence[tuple[torch.Tensor, torch.Tensor]], batch_size: int, cache: Any = None
) -> Any:
    """A cache that holds a prefix, the same for each row of a batch.

    Args:
        model: The base model.
        key_values: The key and value of each layer, [1, heads, tokens, head_dim].
        batch_size: Rows.
        cache: An empty cache to put the prefix into, such as generation made; by default a new one.

    Returns:
        A `DynamicCache`; for an encoder-decoder model an `EncoderDecoderCache`, with the prefix before the decoder's
        own tokens.
    """
    if cache is None:
        cache = _empty_cache(getattr(model, "config", None))
    own = getattr(cache, "self_attention_cache", cache)
    devices = _devices_of_layers(model)
    for layer, (key, value) in enumerate(key_values):
        device = devices.get(layer, key.device)
        key, value = (side.to(device).expand(batch_size, -1, -1, -1) for side in (key, value))
        own.update(key, value, layer)
    return cache


def _empty_cache(config: Any) -> Any:
    from transformers import DynamicCache, EncoderDecoderCache

    if getattr(config, "is_encoder_decoder", False):
        return EncoderDecoderCache(DynamicCache(), DynamicCache())
    return DynamicCache(config=config) if hasattr(config, "get_text_config") else DynamicCache()


def _devices_of_layers(model: Any) -> dict[int, Any]:
    """The device of each layer of a model that accelerate spread over several; empty for any other."""
    device_map: Mapping[str, Any] = getattr(model, "hf_device_map", None) or {}
    if len({str(device) for device in device_map.values()}) < 2:
        return {}
    # What is offloaded to the CPU or a disk computes on the first of the others.
    computing = next((device for device in device_map.values() if device not in ("cpu", "disk")), "cpu")
    found: dict[int, Any] = {}
    for name, module in named_modules_of(model.get_decoder() if hasattr(model, "get_decoder") else model):
        match, parameter = _LAYER.search(f".{name}"), next(iter(module.parameters()), None)
        if match is not None and parameter is not None:
            found[int(match[1])] = computing if parameter.is_meta else parameter.device
    return found


def generating(model: nn.Module, prepare: Any) -> Any:
    """The base model to generate with: itself but for `prepare_inputs_for_generation`, which is `prepare`.

    A second object on the same modules, so that nothing of the model is exchanged, for other threads neither.
    """
    view = object.__new__(type(model))
    view.__dict__.update(model.__dict__)
    view.__dict__["prepare_inputs_for_generation"] = prepare
    return view
