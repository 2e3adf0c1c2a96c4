"""What a user says about quantization, in transformers' words, checked and in one form."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peftkern.utils.adapter_error import short_messages, shown
from peftkern.utils.quantized_files import QUANT_STORAGES
from peftkern.weights import DENSE_DTYPES, QUANT_TYPES

# The fields of transformers' BitsAndBytesConfig, and its defaults.
_DEFAULTS: dict[str, Any] = {
    "load_in_4bit": False,
    "load_in_8bit": False,
    "bnb_4bit_compute_dtype": torch.float32,
    "bnb_4bit_quant_type": "fp4",
    "bnb_4bit_use_double_quant": False,
    "bnb_4bit_quant_storage": torch.uint8,
    "llm_int8_skip_modules": None,
    "llm_int8_threshold": 6.0,
    "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False,
}
_REDUNDANT = ("quant_method", "_load_in_4bit", "_load_in_8bit")  # in config.json beside the above


@dataclass(frozen=True)
class QuantizationSettings:
    """How to quantize a model.

    Attributes:
        bits: 4 or 8.
        quant_type: "nf4" or "fp4", of 4 bits.
        double_quant: whether scales are quantized too.
        compute_dtype: what products are computed in.
        quant_storage: the dtype that packed bytes are held as.
        skip_modules: patterns of the layers to leave alone; None for the default choice.
        fields: all fields of transformers' configuration, as values of JSON.
    """

    bits: int
    quant_type: str
    double_quant: bool
    compute_dtype: torch.dtype
    quant_storage: torch.dtype
    skip_modules: list[str] | None
    fields: dict[str, Any]

    @classmethod
    @short_messages()
    def of(cls, config: Any) -> QuantizationSettings:
        """From transformers' `BitsAndBytesConfig`, anything with its attributes, or a dict of them.

        Raises:
            TypeError: `config` is no such thing.
            ValueError: a field is unknown or wrong; the message names it.
            NotImplementedError: `llm_int8_has_fp16_weight`.
        """
        if isinstance(config, Mapping):
            unknown = sorted(set(config) - set(_DEFAULTS) - set(_REDUNDANT))
            if unknown:
                raise ValueError(f"quantization_config: unknown field {unknown[0]!r}; known are {sorted(_DEFAULTS)}")
            given = {name: config[name] for name in _DEFAULTS if name in config}
        elif hasattr(config, "load_in_4bit") or hasattr(config, "load_in_8bit"):
            given = {name: getattr(config, name) for name in _DEFAULTS if hasattr(config, name)}
        else:
            raise TypeError(
                "quantization_config: expected transformers' BitsAndBytesConfig or a dict of its fields, "
                f"got {type(config).__name__}"
            )
        values = _DEFAULTS | given
        for name, default in _DEFAULTS.items():  # transformers refuses these by a TypeError, without the file's name
            kinds = (bool,) if isinstance(default, bool) else (int, float) if isinstance(default, float) else ()
            if kinds and (type(values[name]) not in kinds):
                what = "true or false" if bool in kinds else "a number"
                raise ValueError(f"{name}: expected {what}, got {shown(values[name])}")
        try:
            values["llm_int8_threshold"] = float(values["llm_int8_threshold"])
        except OverflowError as error:
            raise ValueError(f"llm_int8_threshold: {error}, got {shown(values['llm_int8_threshold'])}") from error
        for name in ("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage"):
            values[name] = _dtype(name, _DEFAULTS[name] if values[name] is None else values[name])
        if bool(values["load_in_4bit"]) == bool(values["load_in_8bit"]):
            raise ValueError("quantization_config: expected load_in_4bit or load_in_8bit to be true, and not both")
        if values["llm_int8_has_fp16_weight"]:
            raise NotImplementedError("llm_int8_has_fp16_weight: 16-bit main weights beside int8 are not built")
        _check("bnb_4bit_quant_type", values["bnb_4bit_quant_type"], QUANT_TYPES)
        _check("bnb_4bit_compute_dtype", values["bnb_4bit_compute_dtype"], DENSE_DTYPES)
        _check("bnb_4bit_quant_storage", values["bnb_4bit_quant_storage"], QUANT_STORAGES)
        skip = values["llm_int8_skip_modules"]
        return cls(
            bits=4 if values["load_in_4bit"] else 8,
            quant_type=values["bnb_4bit_quant_type"],
            double_quant=bool(values["bnb_4bit_use_double_quant"]),
            compute_dtype=values["bnb_4bit_compute_dtype"],
            quant_storage=values["bnb_4bit_quant_storage"],
            skip_modules=None if skip is None else check_patterns("llm_int8_skip_modules", skip),
            fields={n: str(v).removeprefix("torch.") if isinstance(v, torch.dtype) else v for n, v in values.items()},
        )


def _dtype(name: str, value: Any) -> torch.dtype:
    found = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name}: expected a dtype or its name, got {value!r}")
    return found


def _check(name: str, value: Any, known: tuple[Any, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(map(str, known))}, got {value!r}")


def check_patterns(name: str, patterns: Any) -> list[str]:
    """`patterns` as a list, if each is a string and a regular expression."""
    if not isinstance(patterns, (list, tuple, set)) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(f"{name}: expected a list of module names, got {patterns!r}")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:  # too deep; a{99999999999}
            raise ValueError(f"{name}: {shown(pattern, 300)} is no regular expression: {error}") from error
    return list(patterns)


def is_skipped(name: str, patterns: list[str]) -> bool:
    """Whether a layer is left alone, by transformers' rule: a pattern is the beginning of its dotted name up to a dot
    or the end, as text or as a regular expression, or simply its ending."""
    return any(re.match(rf"(?:{p})(?:(?<=\.)|\.|$)", name) or name.endswith(p) for p in patterns)


def default_skips(model: Any) -> list[str]:
    """The layers that are left alone where nobody says which: output embeddings, tied weights, and the last layer (a
    classifier's head) of a transformers model; as in transformers."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    names = {key.removesuffix(".weight") for pair in tied.items() for key in pair}
    if not hasattr(model, "get_output_embeddings"):
        return sorted(names)
    head = output_embeddings(model)
    names |= {name for name, module in model.named_modules() if head is not None and module is head}
    last = [name for name, _ in model.named_parameters()][-1:]
    return sorted(names | {name.rpartition(".")[0] for name in last})


def output_embeddings(model: Any) -> nn.Module | None:
    """The model's lm_head; None where it has none, or does not know."""
    try:
        return model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def exact_skips(dense: list[str], quantized: list[str]) -> list[str]:
    """Patterns that skip the layers `dense` and none of `quantized`: names, where these will do."""
    return [f"^{re.escape(n)}$" if any(is_skipped(q, [n]) for q in quantized) else n for n in dense]
