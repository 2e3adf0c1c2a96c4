"""How a call's arguments change when virtual tokens stand before its text: pure functions of dicts of arguments."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from peftkern.utils.module_tree import modules_of

# Ways to generate that count tokens in a cache by themselves, without virtual ones.
_UNCOUNTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "prefill_chunk_size")


def batch_of(given: Mapping[str, Any]) -> int:
    """How many rows a text has, which is given as `input_ids` or as `inputs_embeds`.

    Raises:
        ValueError: As neither or as both.
    """
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    if (ids is None) == (embeds is None):
        got = "neither" if ids is None else "both"
        raise ValueError(f"input_ids, inputs_embeds: prompt learning expects one of them, got {got}")
    text: Any = ids if embeds is None else embeds
    return int(text.shape[0])


def tokens_in(cache: Any) -> int:
    """How many tokens a model's cache holds; 0 of None, and of what is no cache of transformers'."""
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0


def check_grows(cache: Any) -> None:
    """Raises NotImplementedError for a cache of a fixed size, which was measured without virtual tokens."""
    if getattr(cache, "is_compileable", False):
        raise NotImplementedError(
            f"cache_implementation: prompt learning is built for caches that grow, got a {type(cache).__name__}, which "
            "has no room for virtual tokens"
        )


def check_takes_cache(model: nn.Module) -> None:
    """Raises ValueError for a model that cannot take a prefix: no module of it is called with `past_key_values`."""
    kinds = {type(module) for module in modules_of(model)}
    if not any("past_key_values" in inspect.signature(kind.forward).parameters for kind in kinds):
        raise ValueError(
            f"model: {type(model).__name__} takes no past_key_values, in which prefix tuning puts its prefix"
        )


def check_generation(kwargs: Mapping[str, Any], *configs: Any) -> None:
    """Refuse what generation cannot do with virtual tokens in its cache.

    Args:
        kwargs: The arguments of `generate`.
        configs: Generation configurations in force, or None, or lists of them.

    Raises:
        NotImplementedError: Assisted generation, or a prefill in chunks.
        ValueError: `past_key_values` that hold tokens already.
    """
    every = [kwargs, kwargs.get("generation_config")]
    every += [item for config in configs for item in (config if isinstance(config, Sequence) else [config])]
    for name in _UNCOUNTED:
        given = [c.get(name) if isinstance(c, Mapping) else getattr(c, name, None) for c in every]
        if any(value is not None for value in given):
            raise NotImplementedError(f"{name}: not built for prompt learning, whose virtual tokens it does not count")
    if tokens_in(kwargs.get("past_key_values")):
        raise ValueError("past_key_values: with prompt learning generate expects no cache, or one without tokens in it")


def put_before(given: dict[str, Any], prompts: torch.Tensor, words: Any) -> None:
    """Make the text `inputs_embeds`, behind the vectors `prompts`, [batch, tokens, width], in its dtype.

    Raises:
        ValueError: There are only `input_ids`, and `words`, the module that looks them up, is None.
    """
    ids, embeds = given.pop("input_ids", None), given.get("inputs_embeds")
    if embeds is None:
        if words is None:
            raise ValueError("input_ids: the model does not say where it looks them up: give inputs_embeds")
        embeds = words(ids)
    given["inputs_embeds"] = torch.cat([prompts.to(embeds.device, embeds.dtype), embeds], 1)


def lengthen_mask(given: dict[str, Any], name: str, batch: int, n: int) -> None:
    """Have an attention mask [batch, tokens] let `n` more tokens at the front be seen.

    Raises:
        ValueError: A mask of another shape.
    """
    mask = given.get(name)
    if mask is None:
        return
    _check_by_tokens(name, mask, batch)
    given[name] = torch.cat([mask.new_ones(batch, n), mask], 1)


def _check_by_tokens(name: str, value: Any, batch: int) -> None:
    """Raises ValueError for what is not a number for each token of each row."""
    if not isinstance(value, torch.Tensor) or value.dim() != 2 or value.shape[0] != batch:
        got = f"shape {list(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
        raise ValueError(f"{name}: prompt learning expects a tensor [{batch} rows, tokens], got {got}")


def shift_positions(given: dict[str, Any], name: str, n: int, inserted: int) -> None:
    """Have positions count the `n` virtual tokens, of which `inserted` stand in this call's own input."""
    positions = given.get(name)
    if positions is None:
        return
    if not isinstance(positions, torch.Tensor) or positions.dim() == 0:
        raise ValueError(f"{name}: prompt learning expects a tensor [..., tokens], got {type(positions).__name__}")
    positions = positions + n
    if inserted:
        first = torch.arange(inserted, device=positions.device, dtype=positions.dtype)
        positions = torch.cat([first.expand(*positions.shape[:-1], inserted), positions], -1)
    given[name] = positions


def settle_token_types(given: dict[str, Any], inserted: int, are_taken: bool) -> None:
    """Give the virtual tokens in a call's input type 0; or, where token types are not taken, leave all out.

    Warns:
        UserWarning: They are left out.
    """
    types = given.get("token_type_ids")
    if types is None:
        return
    if not are_taken:
        warnings.warn("token_type_ids: left out, prompt learning of this task has none, as in PEFT", stacklevel=2)
        del given["token_type_ids"]
    elif inserted:
        given["token_type_ids"] = torch.cat([types.new_zeros(types.shape[0], inserted), types], 1)


def lengthen_labels(given: dict[str, Any], batch: int, n: int) -> None:
    """Have labels [batch, tokens] say nothing of `n` tokens at the front (-100).

    Raises:
        ValueError: Labels of another shape.
    """
    labels = given.get("labels")
    if labels is not None:
        _check_by_tokens("labels", labels, batch)
        given["labels"] = torch.cat([labels.new_full((batch, n), -100), labels], 1)
