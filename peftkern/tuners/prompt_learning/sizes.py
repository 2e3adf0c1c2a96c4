"""The sizes of virtual tokens: the configuration's, checked against the model's or filled in from them."""

from __future__ import annotations

from typing import Any

from peftkern.utils.peft_types import PeftType, TaskType

# The names that models give to their sizes, transformers' own first.
_NAMES = {
    "num_layers": ("num_hidden_layers", "num_layers", "n_layer"),
    "token_dim": ("hidden_size", "n_embd", "d_model"),
    "num_attention_heads": ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads"),
}
_OF_A_DECODER = {
    "num_layers": ("decoder_layers", "num_decoder_layers"),
    "num_attention_heads": ("decoder_attention_heads",),
}
# Layers that have keys and values of all tokens to put a prefix before.
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}


def settle_sizes(config: Any, model_config: Any, embedding_dim: int | None) -> None:
    """Fill in what `config` leaves to the model, as PEFT 0.21.2 does, and refuse what does not fit it.

    Args:
        config: A `PromptLearningConfig`; changed in place.
        model_config: The model's configuration: an object or a dict; None if it has none.
        embedding_dim: The width of the model's word embeddings, where they are known.

    Raises:
        ValueError: A size is neither given nor to be found, or is not the model's.
        NotImplementedError: A prefix for layers that differ in their keys' sizes, share keys or have none.
    """
    if config.num_virtual_tokens is None:
        raise ValueError("num_virtual_tokens must be a positive int, got None")
    is_pair = config.task_type == TaskType.SEQ_2_SEQ_LM
    if config.num_transformer_submodules is None:
        config.num_transformer_submodules = 2 if is_pair else 1
    if config.num_transformer_submodules == 2 and not is_pair:
        raise ValueError(f"num_transformer_submodules must be 1 for task_type {config.task_type!r}, got 2")
    text = _text_config(model_config)
    is_prefix = config.peft_type == PeftType.PREFIX_TUNING
    has_two = _get(model_config, "is_encoder_decoder")
    if is_pair and has_two is False:
        raise ValueError("task_type must not be SEQ_2_SEQ_LM for a model that is no encoder-decoder")
    if is_prefix and has_two and not is_pair:
        raise ValueError(
            f"task_type must be SEQ_2_SEQ_LM for prefix tuning of an encoder-decoder model, got {config.task_type!r}"
        )
    if is_prefix:
        _settle_prefix(config, text, is_pair)
    else:
        _settle_prompt(config, text, embedding_dim)
    if getattr(config, "encoder_hidden_size", 0) is None:
        config.encoder_hidden_size = config.token_dim


def _settle_prompt(config: Any, text: Any, embedding_dim: int | None) -> None:
    """The sizes of vectors that stand among word embeddings; heads and layers are only noted."""
    for name in ("num_layers", "num_attention_heads"):
        if getattr(config, name) is None:
            setattr(config, name, _find(text, _NAMES[name]))
    if config.token_dim is None:
        config.token_dim = embedding_dim or _required(text, "token_dim", _NAMES["token_dim"])
    elif embedding_dim is not None and config.token_dim != embedding_dim:
        raise ValueError(f"token_dim must be {embedding_dim}, the width of word embeddings, got {config.token_dim}")


def _settle_prefix(config: Any, text: Any, is_pair: bool) -> None:
    """The sizes of keys and values."""
    _refuse_odd_layers(text)
    of_decoder = _OF_A_DECODER if is_pair else {}
    layers = _find(text, of_decoder.get("num_layers", ()) + _NAMES["num_layers"])
    if config.num_layers is None:
        config.num_layers = _required(text, "num_layers", of_decoder.get("num_layers", ()) + _NAMES["num_layers"])
    elif layers is not None and config.num_layers != layers:
        raise ValueError(f"num_layers must be {layers}, the model's, got {config.num_layers}")
    heads_names = of_decoder.get("num_attention_heads", ()) + _NAMES["num_attention_heads"]
    heads, width = _find(text, heads_names), _find(text, _NAMES["token_dim"])
    shared = _key_value_heads(text)
    head_dim = _find(text, ("head_dim", "d_kv"))
    if head_dim is None and heads and width:
        head_dim = width // heads
    if shared is not None and head_dim is not None:
        # Keys have fewer heads than queries. As in PEFT the model's sizes hold, whatever the configuration says.
        config.token_dim, config.num_attention_heads = head_dim * shared, shared
        return
    if config.num_attention_heads is None:
        config.num_attention_heads = _required(text, "num_attention_heads", heads_names)
    if config.token_dim is None:
        if head_dim is None:
            raise ValueError("token_dim must be given: the model's configuration does not say")
        config.token_dim = head_dim * config.num_attention_heads
    if config.token_dim % config.num_attention_heads:
        raise ValueError(
            f"token_dim must be a multiple of num_attention_heads ({config.num_attention_heads}), got "
            f"{config.token_dim}"
        )
    if heads and head_dim and (config.token_dim, config.num_attention_heads) != (head_dim * heads, heads):
        raise ValueError(
            f"token_dim and num_attention_heads must be {head_dim * heads} and {heads}, the model's, got "
            f"{config.token_dim} and {config.num_attention_heads}"
        )


def _key_value_heads(text: Any) -> int | None:
    """How many heads keys and values have, where the model's configuration tells them from the queries'."""
    if _get(text, "multi_query") and not _get(text, "new_decoder_architecture"):
        return 1
    return _find(text, ("num_key_value_heads", "num_kv_heads"))


def _refuse_odd_layers(text: Any) -> None:
    """Refuse a prefix where one shape of keys and values does not serve all layers."""
    odd = sorted(set(_get(text, "layer_types") or ()) - _ATTENTION)
    shared = _get(text, "num_kv_shared_layers") or _get(text, "kv_sharing_modes")
    if odd:
        raise NotImplementedError(
            f"prefix tuning of layers of the kinds {odd} is not built: they keep no keys of tokens"
        )
    if shared:
        raise NotImplementedError("prefix tuning of a model whose layers share their keys (KV sharing) is not built")
    if _get(text, "kv_lora_rank") is not None:
        raise NotImplementedError("prefix tuning of multi-head latent attention is not built")
    if _get(text, "global_head_dim") is not None or _differ(text):
        raise NotImplementedError(
            "prefix tuning of a model whose layers differ in the sizes of their keys is not built"
        )


def _differ(text: Any) -> bool:
    """Whether a transformers configuration has layers with other heads than the rest."""
    layers = _get(text, "per_layer_config")
    layers = list(layers.values()) if isinstance(layers, dict) else list(layers or ())
    return len({(_get(layer, "head_dim"), _get(layer, "num_key_value_heads")) for layer in layers}) > 1


def _text_config(model_config: Any) -> Any:
    """The part of a model's configuration that is about text."""
    if hasattr(model_config, "get_text_config"):
        return model_config.get_text_config()
    return _get(model_config, "text_config") or model_config


def _get(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, dict) else getattr(config, name, None)


def _find(config: Any, names: tuple[str, ...]) -> Any:
    """The first of `names` that the model's configuration has a value for."""
    return next((value for value in (_get(config, name) for name in names) if value is not None), None)


def _required(config: Any, field: str, names: tuple[str, ...]) -> Any:
    found = _find(config, names)
    if found is None:
        raise ValueError(f"{field} must be given: the model's configuration has none of {', '.join(names)}")
    return found
