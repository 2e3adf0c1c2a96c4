"""A whole model's safetensors files: read as one mapping, written so that a kill leaves no mixture.

Layout of transformers: `model.safetensors`, or several files and `model.safetensors.index.json`, whose `weight_map`
names each tensor's file; beside them `config.json`.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from peftkern.utils.adapter_error import AdapterFileError, shorten
from peftkern.utils.adapter_files import PathLike, _locked, _remove_stale, _sync, _umask
from peftkern.utils.quantized_files import QuantizedFileError
from peftkern.utils.safetensors_header import check_regular_file, check_safetensors, parse_json_object

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_STAGING = ".checkpoint_staging_"
_MAX_JSON = 64 * 1024 * 1024
# Names of weight files, one or sharded, that a new checkpoint puts out of date.
_WEIGHT_FILES = re.compile(r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?")


class Checkpoint(Mapping[str, torch.Tensor]):
    """The tensors of a checkpoint by name, each read from its file when it is asked for.

    Args:
        folder_or_hub_id: A folder, or the id of a repository on the Hub (which needs `huggingface_hub`).
        device: Where tensors are put.
        hub_kwargs: What `huggingface_hub.hf_hub_download` takes (`subfolder`, `revision`, `token`, `cache_dir`).

    Raises:
        QuantizedFileError: A file is missing or damaged, the index does not fit the files, or a name is in two.
    """

    def __init__(self, folder_or_hub_id: PathLike, device: torch.device | str = "cpu", **hub_kwargs: Any) -> None:
        self.device = torch.device(device)
        self._source, self._hub_kwargs = os.fspath(folder_or_hub_id), hub_kwargs
        self._file_of: dict[str, str] = {}
        self._open: dict[str, Any] = {}
        first = _find(self._source, (WEIGHTS, INDEX), hub_kwargs)  # transformers' order
        with _as_quantized_error():
            if os.path.basename(first) == INDEX:
                self._read_index(first)
            else:
                self._file_of = dict.fromkeys(check_safetensors(first), first)

    def _read_index(self, path: str) -> None:
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise AdapterFileError(path, "expected an object of file names", key="weight_map")
        for name in dict.fromkeys(weight_map.values()):
            # The index comes from whoever made the checkpoint: it names files of its own folder, and no others.
            if os.path.basename(name) != name or not name.endswith(".safetensors"):
                raise AdapterFileError(path, f"expected the names of .safetensors files beside it, got {name!r}")
            shard = _find(self._source, (name,), self._hub_kwargs)
            for key in check_safetensors(shard):
                if key in self._file_of:
                    raise AdapterFileError(shard, f"the name is in {self._file_of[key]} too", key=key)
                self._file_of[key] = shard
        for key, name in weight_map.items():
            if os.path.basename(self._file_of.get(key, "")) != name:
                raise AdapterFileError(path, f"it says that the tensor is in {name}, but it is not", key=key)

    def file_of(self, key: str) -> str:
        """The file that holds `key`, for messages; the checkpoint's name where none does."""
        return self._file_of.get(key, self._source)

    def __getitem__(self, key: str) -> torch.Tensor:
        path = self._file_of[key]
        try:
            if path not in self._open:
                self._open[path] = safe_open(path, framework="pt", device=str(self.device))
            return self._open[path].get_tensor(key)
        except SafetensorError as error:
            raise QuantizedFileError(path, str(error), key) from error

    def __contains__(self, key: object) -> bool:
        return key in self._file_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


def read_json(path: PathLike) -> dict[str, Any]:
    """The JSON object in the file at `path`, of at most 64 MB.

    Raises:
        QuantizedFileError: The file is missing, too large, or no JSON object.
    """
    with _as_quantized_error():
        size = check_regular_file(path)
        if size > _MAX_JSON:
            raise AdapterFileError(path, f"a JSON file of {size} bytes is not plausible (at most {_MAX_JSON})")
        with open(path, "rb") as file:
            return parse_json_object(path, file.read())


def read_model_config(folder_or_hub_id: PathLike, **hub_kwargs: Any) -> tuple[str, dict[str, Any]]:
    """The path and the content of a model's `config.json`."""
    path = _find(os.fspath(folder_or_hub_id), (CONFIG,), hub_kwargs)
    return path, read_json(path)


def _find(source: str, names: tuple[str, ...], hub_kwargs: dict[str, Any]) -> str:
    """The path of the first of `names` in the folder, or downloaded from the Hub."""
    if os.path.isdir(source):
        folder = os.path.join(source, hub_kwargs.get("subfolder") or "")
        for name in names:
            if os.path.lexists(os.path.join(folder, name)):
                return os.path.join(folder, name)
        others = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
        raise QuantizedFileError(folder, f"expected {' or '.join(names)} here; found {shorten(others) or 'nothing'}")
    if os.path.exists(source):
        raise QuantizedFileError(source, "expected the folder of a model, got a file")
    from peftkern.utils.hub import download  # the Hub's client is imported only when a download is asked for

    with _as_quantized_error():
        return download(source, names, **hub_kwargs)


@contextlib.contextmanager
def _as_quantized_error() -> Iterator[None]:
    """The checks that adapters' files share speak of adapters: say the same of a model's."""
    try:
        yield
    except QuantizedFileError:
        raise
    except AdapterFileError as error:
        raise QuantizedFileError(error.file, error.reason, error.key) from error


@contextlib.contextmanager
def replacing_checkpoint(folder: PathLike) -> Iterator[str]:
    """Yield a staging folder; when the body is through, its files take the places of the old ones.

    A folder that is new is staged beside its place and comes by one rename. One that is there already may be a mount
    point or a link to another disk, so it is staged inside: weights come first and `config.json` last, and the old
    `config.json` goes before anything else. A writer killed between leaves a folder that loaders refuse for lack of it,
    never old numbers under new ones. Weight files of the checkpoint that was there are removed, all else is left. What
    a killed writer left in staging is removed by the next one, an hour later.

    Raises:
        ValueError: `folder` is a file.
    """
    folder = os.path.abspath(os.fspath(folder))
    if os.path.isfile(folder):
        raise ValueError(f"folder: expected a folder, got a file: {folder}")
    parent, name = os.path.split(folder)
    is_there = os.path.isdir(folder)
    where, prefix = (folder, _STAGING) if is_there else (parent, f".{name}{_STAGING}")
    os.makedirs(where, exist_ok=True)
    _remove_stale(where, prefix)
    staging = tempfile.mkdtemp(prefix=prefix, dir=where)
    try:
        os.chmod(staging, 0o777 & ~_umask())
        yield staging
        for entry in os.scandir(staging):
            if entry.is_file():
                os.chmod(entry.path, 0o666 & ~_umask())  # safetensors lets only the user read what it writes
            _sync(entry.path)
        _sync(staging)
        if is_there or not _came_by_rename(staging, folder):
            with _locked(folder):
                _move_into(staging, folder)
        _sync(where)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _came_by_rename(staging: str, folder: str) -> bool:
    """Rename `staging` to `folder`; False if another writer has made one with files there meanwhile."""
    try:
        os.rename(staging, folder)
    except OSError:
        if not os.path.isdir(folder):
            raise
        return False
    return True


def _move_into(staging: str, folder: str) -> None:
    new = os.listdir(staging)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(os.path.join(folder, CONFIG))
    for name in os.listdir(folder):
        if _WEIGHT_FILES.fullmatch(name) and name not in new:
            os.unlink(os.path.join(folder, name))
    for name in sorted(new, key=lambda name: name == CONFIG):
        os.replace(os.path.join(staging, name), os.path.join(folder, name))
    _sync(folder)
