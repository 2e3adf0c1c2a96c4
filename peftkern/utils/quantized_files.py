"""Quantized weights in state dicts and safetensors files, under the names and with the bytes of bitsandbytes 0.50.

For a linear layer whose names begin with `prefix` ("model.layers.0.mlp.up_proj."):

    4-bit   prefix + "weight"                    the packed codes, [bytes / itemsize, 1] of any storage dtype
            prefix + "weight.absmax"             float32 [blocks], or uint8 [blocks] with double quantization
            prefix + "weight.quant_map"          float32 [16]
            prefix + "weight.nested_absmax"      float32 [blocks / 256], with double quantization, as the next
            prefix + "weight.nested_quant_map"   float32 [256]
            prefix + "weight.quant_state.bitsandbytes__nf4" (or __fp4)    uint8, JSON text with the numbers
    8-bit   prefix + "weight"                    int8 [N, K]
            prefix + "SCB"                       float32 [N]
            prefix + "weight_format"             uint8 scalar, 0 (rows)

What is read may come from anyone: it is checked before anything is allocated after it, and refused by file and name.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from peftkern.ops._quantize_torch import code_4bit
from peftkern.utils.adapter_error import AdapterFileError, shown
from peftkern.utils.safetensors_header import parse_json_object
from peftkern.weights import BLOCKSIZES, NESTED_BLOCKSIZE, QUANT_TYPES, Weight4bit, Weight8bit

# What bitsandbytes and transformers allow as the dtype that the packed bytes are stored as.
QUANT_STORAGES = (torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64)

_STATE = "weight.quant_state."
_TENSORS_4BIT = ("weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map")
_EXTRAS_8BIT = ("SCB", "weight_format")
_ROWS = 0  # the one weight_format still in use
_TOO_MANY = 2**63  # elements
_MAX_STATE = 16 * 1024  # bytes; bitsandbytes writes under 200
_FIELDS = ("quant_type", "blocksize", "dtype", "shape")
_NESTED_FIELDS = ("nested_blocksize", "nested_dtype", "nested_offset")
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

PathLike = str | os.PathLike[str]


class QuantizedFileError(AdapterFileError):
    """A quantized checkpoint cannot be used; `file`, `key` and `reason` say where and why."""


def quantized_keys(prefix: str) -> tuple[str, ...]:
    """Every name that a quantized weight of the layer may have, `prefix` ending with a dot (or empty)."""
    states = (f"{_STATE}bitsandbytes__{kind}" for kind in QUANT_TYPES)
    return tuple(prefix + name for name in ("weight", *_TENSORS_4BIT, *states, *_EXTRAS_8BIT))


def keys_of(weight: Weight4bit | Weight8bit, prefix: str) -> tuple[str, ...]:
    """The names that `read_quantized` takes such a weight from (`weight_format` may be missing)."""
    if isinstance(weight, Weight8bit):
        return tuple(prefix + name for name in ("weight", *_EXTRAS_8BIT))
    tensors = _TENSORS_4BIT if weight.nested_absmax is not None else _TENSORS_4BIT[:2]
    return tuple(prefix + name for name in ("weight", *tensors, f"{_STATE}bitsandbytes__{weight.quant_type}"))


def quantized_prefixes(keys: Iterable[str]) -> dict[str, list[str]]:
    """The layers that have a quantized weight, known by the names alone.

    Args:
        keys: all names of a state dict or a checkpoint.

    Returns:
        Prefix -> the names of that layer that belong to its quantized weight, `weight` among them.
    """
    found: dict[str, list[str]] = {}
    weights = []
    for key in keys:
        if key == "weight" or key.endswith(".weight"):
            weights.append(key)
            continue
        prefix = _prefix_of(key)
        if prefix is not None:
            found.setdefault(prefix, []).append(key)
    for key in weights:
        if key.removesuffix("weight") in found:
            found[key.removesuffix("weight")].append(key)
    return found


def _prefix_of(key: str) -> str | None:
    """The prefix of a name that only quantized layers have."""
    head, dot, _ = key.partition("." + _STATE)
    if dot or key.startswith(_STATE):
        return head + "." if dot else ""
    for name in (*_TENSORS_4BIT, *_EXTRAS_8BIT):
        if key == name or key.endswith("." + name):
            return key.removesuffix(name)
    return None


def is_quantized(tensors: Mapping[str, torch.Tensor], prefix: str) -> bool:
    """Whether `tensors` has a name that only a quantized weight of the layer has."""
    return any(key in tensors for key in quantized_keys(prefix)[1:])


# --- writing ---------------------------------------------------------------------------------------------------------


def write_quantized(
    weight: Weight4bit | Weight8bit, prefix: str, quant_storage: torch.dtype = torch.uint8
) -> dict[str, torch.Tensor]:
    """The tensors that stand for `weight` in a state dict, in bitsandbytes' order; they share memory with it.

    Args:
        weight: what to write; on a GPU, reading the offset of double quantization waits for the GPU.
        prefix: as in the module's text.
        quant_storage: the dtype that the packed bytes of a 4-bit weight are seen as.

    Raises:
        ValueError: `quant_storage` does not divide the packed bytes.
    """
    if isinstance(weight, Weight8bit):
        layout = torch.tensor(_ROWS, dtype=torch.uint8, device="cpu")
        return {prefix + "weight": weight.data, prefix + "SCB": weight.scale, prefix + "weight_format": layout}
    parts = {
        prefix + "weight": stored_as(weight.packed, quant_storage),
        prefix + "weight.absmax": weight.absmax,
        prefix + "weight.quant_map": weight.code,
    }
    fields: dict[str, Any] = {
        "quant_type": weight.quant_type,
        "blocksize": weight.blocksize,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    if weight.nested_absmax is not None and weight.nested_code is not None and weight.offset is not None:
        parts[prefix + "weight.nested_absmax"] = weight.nested_absmax
        parts[prefix + "weight.nested_quant_map"] = weight.nested_code
        fields["nested_blocksize"] = NESTED_BLOCKSIZE
        fields["nested_dtype"] = "float32"
        fields["nested_offset"] = None if weight.offset.is_meta else weight.offset.item()
    text = bytearray(json.dumps(fields), "utf-8")
    parts[f"{prefix}{_STATE}bitsandbytes__{weight.quant_type}"] = torch.frombuffer(text, dtype=torch.uint8)
    return parts


def stored_as(packed: torch.Tensor, quant_storage: torch.dtype) -> torch.Tensor:
    """The packed bytes (uint8) seen as [bytes / itemsize, 1] of `quant_storage`, by reference.

    Raises:
        ValueError: a dtype that cannot store them, or whose size does not divide them.
    """
    check_stores(packed.numel(), quant_storage)
    return packed.reshape(-1).view(quant_storage).unsqueeze(1)


def check_stores(size: int, quant_storage: torch.dtype) -> None:
    """Raise ValueError, as `stored_as` says, unless `size` packed bytes can be seen as `quant_storage`."""
    if quant_storage not in QUANT_STORAGES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in QUANT_STORAGES)
        raise ValueError(f"quant_storage: expected one of {known}, got {quant_storage}")
    if size % quant_storage.itemsize:
        raise ValueError(f"quant_storage: {size} packed bytes are no whole number of {quant_storage} values")


# --- reading ---------------------------------------------------------------------------------------------------------


def read_quantized(
    tensors: Mapping[str, torch.Tensor],
    prefix: str,
    *,
    file: PathLike = "state_dict",
    dtype: torch.dtype = torch.bfloat16,
) -> Weight4bit | Weight8bit:
    """The quantized weight of the layer whose names begin with `prefix`; its tensors are those of `tensors`.

    Args:
        tensors: names -> tensors, of the whole model or of this layer; other names are not looked at.
        prefix: as in the module's text.
        file: named in errors.
        dtype: the `dtype` of an 8-bit weight (its file does not say what it was quantized from).

    Raises:
        QuantizedFileError: a name is missing, or a tensor or number is not what the format says; it names the key.
    """
    if any(prefix + name in tensors for name in _EXTRAS_8BIT):
        return _read_8bit(tensors, prefix, file, dtype)
    return _read_4bit(tensors, prefix, file)


def _read_8bit(tensors: Mapping[str, torch.Tensor], prefix: str, file: PathLike, dtype: torch.dtype) -> Weight8bit:
    data = _get(tensors, prefix + "weight", file)
    if data.dtype != torch.int8 or data.dim() != 2 or 0 in data.shape:
        raise _refused(file, f"expected int8 [out_features, in_features], got {_kind(data)}", prefix + "weight")
    scale = _expect(tensors, prefix + "SCB", file, torch.float32, data.shape[0], "one a row")
    layout = tensors.get(prefix + "weight_format")
    if layout is not None and (layout.numel() != 1 or layout.is_floating_point()):
        raise _refused(file, f"expected one integer, got {_kind(layout)}", prefix + "weight_format")
    if layout is not None and not layout.is_meta and layout.item() != _ROWS:
        reason = f"expected {_ROWS} (row-major), the one layout of bitsandbytes 0.50, got {layout.item()}"
        raise _refused(file, reason, prefix + "weight_format")
    return Weight8bit(data.contiguous(), scale.reshape(-1).contiguous(), dtype)


def _read_4bit(tensors: Mapping[str, torch.Tensor], prefix: str, file: PathLike) -> Weight4bit:
    key, quant_type = _state_key(tensors, prefix, file)
    nested = prefix + "weight.nested_absmax" in tensors or prefix + "weight.nested_quant_map" in tensors
    fields = _read_state(tensors[key], key, quant_type, nested, file)
    shape, blocksize = torch.Size(fields["shape"]), fields["blocksize"]
    numel = math.prod(shape)
    blocks = -(-numel // blocksize)

    stored = _get(tensors, prefix + "weight", file)
    size = -(-numel // 2)
    if stored.dtype not in QUANT_STORAGES or stored.nbytes != size:
        reason = f"expected {size} bytes (two codes a byte for {list(shape)}), got {stored.nbytes} of {stored.dtype}"
        raise _refused(file, reason, prefix + "weight")
    absmax_dtype = torch.uint8 if nested else torch.float32
    absmax = _expect(
        tensors, prefix + "weight.absmax", file, absmax_dtype, blocks, f"one for {blocksize} elements of {list(shape)}"
    )
    code = _expect(tensors, prefix + "weight.quant_map", file, torch.float32, 16, "the value of each code")
    # bitsandbytes dequantizes by quant_type whatever stands here: another table's weights would be others there.
    if not code.is_meta and not torch.equal(code.cpu(), code_4bit(quant_type)):
        reason = f"expected the values of {quant_type}'s codes, by which bitsandbytes dequantizes, got others"
        raise _refused(file, reason, prefix + "weight.quant_map")
    parts: dict[str, torch.Tensor] = {}
    if nested:
        groups, name = -(-blocks // NESTED_BLOCKSIZE), prefix + "weight.nested_"
        parts["nested_absmax"] = _expect(
            tensors, name + "absmax", file, torch.float32, groups, f"one for {NESTED_BLOCKSIZE} blocks"
        )
        parts["nested_code"] = _expect(tensors, name + "quant_map", file, torch.float32, 256, "the value of each code")
        parts["offset"] = torch.tensor([fields["nested_offset"]], dtype=torch.float32, device=stored.device)
    packed = stored.detach().contiguous().view(-1).view(torch.uint8)
    return Weight4bit(packed, absmax, code, shape, blocksize, quant_type, _DTYPES[fields["dtype"]], **parts)


def _state_key(tensors: Mapping[str, torch.Tensor], prefix: str, file: PathLike) -> tuple[str, str]:
    """The name of the layer's state, and the quant_type that it ends with."""
    states = [(f"{prefix}{_STATE}bitsandbytes__{kind}", kind) for kind in QUANT_TYPES]
    found = [(key, kind) for key, kind in states if key in tensors]
    if len(found) == 1:
        return found[0]
    if found:
        raise _refused(file, f"two states for one weight: {found[1][0]!r} is there too", found[0][0])
    others = sorted(key for key in tensors if key.startswith(prefix + _STATE))
    if others:
        kind = others[0].removeprefix(prefix + _STATE)
        raise _refused(file, f"unknown quant_type {kind!r}: expected bitsandbytes__nf4 or bitsandbytes__fp4", others[0])
    raise _refused(file, "the name is missing: a 4-bit weight's shape and block size stand there", states[0][0])


def _read_state(blob: torch.Tensor, key: str, quant_type: str, nested: bool, file: PathLike) -> dict[str, Any]:
    """The fields of a state's JSON text, each checked."""
    if blob.is_meta:
        raise _refused(file, "the tensor is on the meta device and has no values", key)
    if blob.dtype != torch.uint8 or blob.dim() != 1:
        raise _refused(file, f"expected uint8 of one dimension (JSON text), got {_kind(blob)}", key)
    if blob.numel() > _MAX_STATE:
        raise _refused(file, f"a state of {blob.numel()} bytes is not plausible (at most {_MAX_STATE})", key)
    try:
        fields = parse_json_object(file, bytes(blob.cpu().tolist()))
    except AdapterFileError as error:
        inside = "" if error.key is None else f" in {error.key!r}"
        raise _refused(file, f"{error.reason}{inside}", key) from error
    expected = _FIELDS + (_NESTED_FIELDS if nested else ())
    for name in expected:
        if name not in fields:
            raise _refused(file, f"its JSON lacks {name!r}", key)
    for name in fields:
        if name not in expected:
            hint = ": the nested tensors are missing" if name in _NESTED_FIELDS else ""
            raise _refused(file, f"unknown field {name!r} in its JSON{hint}", key)
    wanted: dict[str, tuple[bool, str]] = {
        "quant_type": (fields["quant_type"] == quant_type, f"{quant_type!r}, as the name says"),
        "blocksize": (_is_int(fields["blocksize"]) and fields["blocksize"] in BLOCKSIZES, _one_of(BLOCKSIZES)),
        "dtype": (isinstance(fields["dtype"], str) and fields["dtype"] in _DTYPES, _one_of(_DTYPES)),
        "shape": (_is_matrix(fields["shape"]), "[out_features, in_features], each at least 1, below 2**63 elements"),
    }
    if nested:
        value = fields["nested_offset"]
        finite = type(value) in (int, float) and abs(value) <= torch.finfo(torch.float32).max
        wanted["nested_blocksize"] = (fields["nested_blocksize"] == NESTED_BLOCKSIZE, str(NESTED_BLOCKSIZE))
        wanted["nested_dtype"] = (fields["nested_dtype"] == "float32", "'float32'")
        wanted["nested_offset"] = (finite, "a finite float32")
    for name, (fits, expectation) in wanted.items():
        if not fits:
            raise _refused(file, f"{name}: expected {expectation}, got {shown(fields[name])}", key)
    return fields


def _expect(
    tensors: Mapping[str, torch.Tensor], key: str, file: PathLike, dtype: torch.dtype, numel: int, meaning: str
) -> torch.Tensor:
    """The tensor of that name, one-dimensional, if it is as long as it must be and holds finite numbers."""
    t = _get(tensors, key, file)
    if t.dtype != dtype or t.numel() != numel:
        raise _refused(file, f"expected {dtype} [{numel}] ({meaning}), got {_kind(t)}", key)
    if t.is_floating_point() and not t.is_meta and not bool(torch.isfinite(t).all()):
        raise _refused(file, "NaN or Inf in it", key)
    return t.detach().reshape(-1).contiguous()


def _get(tensors: Mapping[str, torch.Tensor], key: str, file: PathLike) -> torch.Tensor:
    if key not in tensors:
        raise _refused(file, "the name is missing, while others of the same quantized weight are there", key)
    return tensors[key]


def _refused(file: PathLike, reason: str, key: str) -> QuantizedFileError:
    return QuantizedFileError(file, reason, key)


def _kind(t: torch.Tensor) -> str:
    return f"{t.dtype} {list(t.shape)}"


def _one_of(values: Iterable[object]) -> str:
    return "one of " + ", ".join(map(str, values))


def _is_int(value: object) -> bool:
    return type(value) is int


def _is_matrix(value: object) -> bool:
    if not isinstance(value, list) or len(value) != 2:
        return False
    return all(_is_int(item) and item > 0 for item in value) and math.prod(value) < _TOO_MANY
