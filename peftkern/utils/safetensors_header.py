"""Check a safetensors file before anything is allocated for it.

Format (https://huggingface.co/docs/safetensors): 8 bytes, the little-endian length H of the header; H bytes of JSON,
`{name: {"dtype": str, "shape": [int], "data_offsets": [begin, end]}, "__metadata__": {str: str}}`; then the data.
The safetensors package refuses damage too, but names neither the file nor, mostly, the tensor.
"""

from __future__ import annotations

import json
import math
import os
import stat
from typing import Any, NoReturn

from peftkern.utils.adapter_error import AdapterFileError

_MAX_DIMENSIONS = 64  # of a torch tensor
_MAX_SIZE = 2**63 - 1
_MAX_HEADER = 100 * 1024 * 1024  # the limit of the safetensors package itself
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
_FOREIGN = {
    b"PK\x03\x04": "a zip archive, as torch.save writes (adapter_model.bin is that file's name)",
    b"\x80\x02": "a pickle",
    b"\x80\x03": "a pickle",
    b"\x80\x04": "a pickle",
    b"GGUF": "a GGUF file",
    b"\x89HDF": "an HDF5 file",
    b"version ": "a git-lfs pointer: the weights themselves were not downloaded",
    b"<!DO": "an HTML page",
    b"<htm": "an HTML page",
    b"{": "JSON",
}


def check_regular_file(path: str | os.PathLike[str]) -> int:
    """Return the size in bytes of the file at `path`.

    Raises:
        AdapterFileError: It is missing, empty, or not a regular file (a pipe would block the reader for ever).
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise AdapterFileError(path, f"cannot be read: {error.strerror or error}") from error
    if not stat.S_ISREG(status.st_mode):
        raise AdapterFileError(path, "expected a regular file, got a folder, pipe or device")
    if status.st_size == 0:
        raise AdapterFileError(path, "the file is empty (0 bytes)")
    return status.st_size


def check_safetensors(path: str | os.PathLike[str]) -> list[str]:
    """Check the header and the size of the safetensors file at `path`; return the names of its tensors.

    Raises:
        AdapterFileError: The file is missing, empty, cut, of another format, or its header is malformed; the error
            names the tensor where one is at fault.
    """
    size = check_regular_file(path)
    with open(path, "rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            kind = next((kind for magic, kind in _FOREIGN.items() if start.startswith(magic)), None)
            if kind is not None:
                raise AdapterFileError(path, f"expected a safetensors file, got {kind}")
            reason = f"its header claims {length} bytes, but only {max(size - 8, 0)} follow: cut or not safetensors"
            raise AdapterFileError(path, reason if length <= _MAX_HEADER else f"{reason} (at most {_MAX_HEADER})")
        header = parse_json_object(path, file.read(length))
    _check_entries(path, header, size - 8 - length)
    return [name for name in header if name != "__metadata__"]


def parse_json_object(path: str | os.PathLike[str], text: bytes) -> dict[str, Any]:
    """Parse `text` as one JSON object, strictly: UTF-8, no repeated name, no NaN or Infinity, bounded nesting.

    Raises:
        AdapterFileError: It is not such an object; `path` is the file named in the message.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for name, value in pairs:
            if name in made:
                raise AdapterFileError(path, "the name appears twice", key=name)
            made[name] = value
        return made

    def refuse(constant: str) -> NoReturn:
        raise AdapterFileError(path, f"{constant} is not JSON")

    try:
        parsed = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except UnicodeDecodeError as error:
        raise AdapterFileError(path, f"expected JSON text in UTF-8: {error}") from error
    except RecursionError as error:
        raise AdapterFileError(path, "its JSON is nested too deeply") from error
    except AdapterFileError:
        raise
    except ValueError as error:  # json.JSONDecodeError, or an integer of too many digits
        raise AdapterFileError(path, f"expected JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise AdapterFileError(path, f"expected a JSON object, got {type(parsed).__name__}")
    return parsed


def _check_entries(path: str | os.PathLike[str], header: dict[str, Any], data_size: int) -> None:
    """Check that the tensors' byte ranges are those of their shapes and tile the `data_size` bytes exactly."""
    ranges = []
    for name, entry in header.items():
        if name == "__metadata__":
            if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
                raise AdapterFileError(path, "expected an object of strings", key=name)
            continue
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise AdapterFileError(path, "expected dtype, shape and data_offsets", key=name)
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _BITS:
            raise AdapterFileError(path, f"unknown dtype {dtype!r}", key=name)
        if not _is_sizes(shape):
            raise AdapterFileError(path, f"expected a shape of non-negative integers, got {shape!r}", key=name)
        if len(shape) > _MAX_DIMENSIONS:
            raise AdapterFileError(path, f"expected at most {_MAX_DIMENSIONS} dimensions, got {len(shape)}", key=name)
        if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise AdapterFileError(path, f"expected data_offsets [begin, end], got {offsets!r}", key=name)
        begin, end = offsets
        if end > data_size:
            raise AdapterFileError(path, f"its data end at byte {end} of {data_size}: the file is cut", key=name)
        if end - begin != math.prod(shape) * _BITS[dtype] // 8:
            raise AdapterFileError(path, f"{end - begin} bytes of data for {dtype} of shape {shape}", key=name)
        ranges.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(ranges):
        if begin != position:
            raise AdapterFileError(path, f"its data begin at byte {begin}, expected {position}", key=name)
        position = end
    if position != data_size:
        raise AdapterFileError(path, f"the tensors take {position} bytes, but {data_size} follow the header")


def _is_sizes(value: Any) -> bool:
    """Whether `value` is a list of non-negative integers (a bool is not one) that tensors can have."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= _MAX_SIZE for item in value)
