"""The two files of an adapter: `adapter_config.json` and `adapter_model.safetensors`, in PEFT 0.21's format.

Reading refuses damage with an `AdapterFileError` that names file, key and reason. Writing is atomic for the pair:

1. both new files are written and synced in a hidden staging folder beside the old ones;
2. one rename turns the staging folder into `.adapter_commit`: from here on the new adapter is the one that counts;
3. the two files are renamed into place and the empty folder is removed.

A writer killed before step 2 leaves the old adapter, one killed after it the new one: `read_config`, `read_weights` and
the next writer look into `.adapter_commit` first. A reader that does not know it (PEFT) sees the old pair or the new
one too, except between the renames of step 3 when the *configuration* changed as well: there it finds no configuration
and refuses, rather than silently pairing old settings with new weights.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from peftkern.utils.adapter_error import AdapterFileError, cut, shorten
from peftkern.utils.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peftkern.utils.safetensors_header import check_regular_file, check_safetensors, parse_json_object

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_COMMIT = ".adapter_commit"
_STAGING = ".adapter_staging_"
# Not the final names: transformers takes any folder that holds an adapter_model.safetensors for another adapter.
_STAGED = {CONFIG_NAME: "config.new", SAFETENSORS_WEIGHTS_NAME: "weights.new"}
_MAX_CONFIG = 64 * 1024 * 1024
_STALE_SECONDS = 3600.0
_STALE_SECONDS_LOCKED = 60.0  # under the lock that every writer takes, unless the file system keeps it to one machine
_LONGEST_WAIT = 10.0  # seconds that a reader waits for a writer
_FLOAT4 = getattr(torch, "float4_e2m1fn_x2", None)  # two values a byte, on which next to nothing can be computed

PathLike = str | os.PathLike[str]


def read_config(folder_or_hub_id: PathLike, subfolder: str | None = None, **hub_kwargs: Any) -> dict[str, Any]:
    """Read `adapter_config.json` of a local folder, or of a Hub repository, as a plain dict.

    Args:
        folder_or_hub_id: A folder, or the id of a repository on the Hub (which needs `huggingface_hub`).
        subfolder: A folder inside it.
        hub_kwargs: What `huggingface_hub.hf_hub_download` takes (`revision`, `token`, `cache_dir`, ...).

    Raises:
        AdapterFileError: The file is missing, empty, or not a JSON object.
    """
    with reading(folder_or_hub_id, subfolder):
        return read_config_file(_find(folder_or_hub_id, (CONFIG_NAME,), subfolder, hub_kwargs))


def read_config_file(path: PathLike) -> dict[str, Any]:
    """`read_config` of a file by its path."""
    path = os.fspath(path)
    size = check_regular_file(path)
    if size > _MAX_CONFIG:
        raise AdapterFileError(path, f"a configuration of {size} bytes is not plausible (at most {_MAX_CONFIG})")
    with open(path, "rb") as file:
        return parse_json_object(path, file.read())


def read_weights(
    folder_or_hub_id: PathLike,
    subfolder: str | None = None,
    device: str | torch.device = "cpu",
    **hub_kwargs: Any,
) -> dict[str, torch.Tensor]:
    """Read the tensors of an adapter: `adapter_model.safetensors`, or else `adapter_model.bin` by the safe unpickler.

    Args:
        folder_or_hub_id, subfolder, hub_kwargs: As for `read_config`.
        device: Where the tensors are put.

    Returns:
        The tensors by the name that they have in the file, `base_model.model.<module>.lora_A.weight` and so on.

    Raises:
        AdapterFileError: The file is missing, empty, cut, of another format, or malformed.
        ValueError: `device` is none that tensors can be read to.

    Warns:
        UserWarning: Tensors that hold NaN or Inf, by name.
    """
    device = readable_to(device)
    with reading(folder_or_hub_id, subfolder):
        path = _find(folder_or_hub_id, (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME), subfolder, hub_kwargs)
        if os.path.basename(path) == WEIGHTS_NAME:
            tensors = read_bin(path, device)
        else:
            check_safetensors(path)
            try:
                tensors = load_file(path, device=str(device))
            except SafetensorError as error:
                raise AdapterFileError(path, f"not a valid safetensors file: {error}") from error
    if not tensors:
        raise AdapterFileError(path, "it holds no tensors")
    bad = [name for name, value in tensors.items() if value.is_floating_point() and not all_finite(value)]
    if bad:
        warnings.warn(f"{path}: NaN or Inf in {shorten(bad)}.", stacklevel=2)
    return tensors


def readable_to(device: Any) -> torch.device:
    """`device`, if tensors can be read to it; safetensors would call the file invalid if not."""
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"device: expected a device that is here, got {device!r}: {cut(str(error))}") from error
    if found.type == "meta":
        raise ValueError("device: expected one with memory, got meta")
    return found


def weights_file(folder_or_hub_id: PathLike, subfolder: str | None = None, **hub_kwargs: Any) -> str:
    """The path that `read_weights` reads, for messages."""
    return _find(folder_or_hub_id, (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME), subfolder, hub_kwargs)


def config_file(folder_or_hub_id: PathLike, subfolder: str | None = None, **hub_kwargs: Any) -> str:
    """The path that `read_config` reads, for messages."""
    return _find(folder_or_hub_id, (CONFIG_NAME,), subfolder, hub_kwargs)


@contextlib.contextmanager
def blamed_on_config(model_id: PathLike, hub_kwargs: dict[str, Any]) -> Iterator[None]:
    """Turn an error about a configuration that was read from `model_id` into one that names the file."""
    try:
        yield
    except AdapterFileError:
        raise
    except NotImplementedError as error:
        raise NotImplementedError(f"{config_file(model_id, **hub_kwargs)}: {cut(str(error))}") from error
    except (TypeError, ValueError, re.error) as error:
        raise AdapterFileError(config_file(model_id, **hub_kwargs), str(error)) from error


def write_config(folder: PathLike, config: Mapping[str, Any]) -> None:
    """Write `config` as `adapter_config.json`, atomically; the bytes are those of PEFT for an equal configuration."""
    _replace_files(folder, {CONFIG_NAME: _config_writer(config)})


def write_weights(folder: PathLike, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Write `state_dict` as `adapter_model.safetensors`, atomically.

    Raises:
        TypeError: A value is not a tensor.
        ValueError: A tensor is on the meta device and so has no values.
    """
    _replace_files(folder, {SAFETENSORS_WEIGHTS_NAME: _weights_writer(state_dict)})


def write_adapter(folder: PathLike, config: Mapping[str, Any], state_dict: Mapping[str, torch.Tensor]) -> None:
    """Write both files as one: a kill at any moment leaves the old pair or the new one (see the module's text)."""
    writers = {SAFETENSORS_WEIGHTS_NAME: _weights_writer(state_dict), CONFIG_NAME: _config_writer(config)}
    _replace_files(folder, writers)


def write_text_file(path: PathLike, text: str) -> None:
    """Write `text` to `path` by way of a file beside it and one rename."""
    with replacing(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def replacing(path: PathLike) -> Iterator[IO[bytes]]:
    """A file beside `path` to write to, which takes its place where nothing is raised."""
    prefix, folder = f".{os.path.basename(path)}_", os.path.dirname(path) or "."
    _remove_stale(folder, prefix)
    handle, beside = tempfile.mkstemp(prefix=prefix, dir=folder)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(beside, 0o666 & ~_umask())
        os.replace(beside, path)
    except BaseException:
        if os.path.exists(beside):
            os.unlink(beside)
        raise


@contextlib.contextmanager
def reading(folder_or_hub_id: PathLike, subfolder: str | None = None) -> Iterator[None]:
    """Within the block no other process replaces the files of a local adapter, so that both are of one save.

    Where locks are not to be had the block runs without one, as it does when a writer takes more than ten seconds.
    """
    folder = os.path.join(folder_or_hub_id, subfolder or "")
    with contextlib.ExitStack() as opened:
        with contextlib.suppress(OSError):
            if fcntl is not None and os.path.isdir(folder):
                handle = os.open(folder, os.O_RDONLY)
                opened.callback(_unlock, handle)
                end = time.monotonic() + _LONGEST_WAIT
                while not _is_locked_for_reading(handle) and time.monotonic() < end:
                    time.sleep(0.002)
        yield


def adapter_folder(save_directory: PathLike, adapter_name: str) -> str:
    """Where an adapter is saved; never outside of `save_directory`."""
    if adapter_name == "default":
        return os.fspath(save_directory)
    folder = os.path.join(save_directory, adapter_name)
    root = os.path.abspath(save_directory)
    if os.path.commonpath([root, os.path.abspath(folder)]) != root:
        raise ValueError(f"adapter name {adapter_name!r}: would be saved outside of {root}")
    return folder


# --- finding ---------------------------------------------------------------------------------------------------------


def _find(model_id: PathLike, names: tuple[str, ...], subfolder: str | None, hub_kwargs: dict[str, Any]) -> str:
    """The path of the first of `names` in the folder, or downloaded from the Hub."""
    model_id = os.fspath(model_id)
    folder = os.path.join(model_id, subfolder) if subfolder else model_id
    if os.path.isdir(model_id):
        for name in names:
            for path in (os.path.join(folder, _COMMIT, _STAGED.get(name, name)), os.path.join(folder, name)):
                if os.path.lexists(path):
                    return path
        others = sorted(os.listdir(folder))[:8] if os.path.isdir(folder) else "no such folder"
        raise AdapterFileError(folder, f"expected {' or '.join(names)} here; found {others}")
    if os.path.exists(model_id):
        raise AdapterFileError(model_id, "expected the folder of an adapter, got a file")
    from peftkern.utils.hub import download  # the Hub's client is imported only when a download is asked for

    return download(model_id, names, subfolder=subfolder, **hub_kwargs)


def read_bin(path: str, device: str | torch.device) -> dict[str, torch.Tensor]:
    """Read a `.bin` file by torch's restricted unpickler, which builds tensors and containers only."""
    size = check_regular_file(path)
    _check_zip(path, size)
    try:
        loaded = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch.load raises whatever the damaged bytes led its readers to
        raise AdapterFileError(path, f"torch.load(weights_only=True) refused it: {error}") from error
    if not isinstance(loaded, dict):
        raise AdapterFileError(path, f"expected a dict of tensors, got {type(loaded).__name__}")
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise AdapterFileError(path, f"expected a tensor by a string, got {type(value).__name__}", key=str(name))
        if value.is_meta or value.layout != torch.strided or value.is_nested or value.dtype == _FLOAT4:
            kinds = {"nested": value.is_nested, "one without values (on the meta device)": value.is_meta}
            held = next((kind for kind, fits in kinds.items() if fits), f"{value.layout} of {value.dtype}")
            raise AdapterFileError(path, f"expected a dense tensor, got {held}", key=name)
        if value.nbytes > value.untyped_storage().nbytes():  # by strides of 0 a few bytes make any number of elements
            reason = f"its shape {list(value.shape)} has more elements than the file holds values for it"
            raise AdapterFileError(path, reason, key=name)
    return dict(loaded)


def _check_zip(path: str, size: int) -> None:
    """Refuse an archive that unpacks to more than its own size: torch.save compresses nothing."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(item.file_size for item in archive.infolist())
    except (zipfile.BadZipFile, NotImplementedError, UnicodeError) as error:
        raise AdapterFileError(path, f"a damaged zip archive: {error}") from error
    if unpacked > size:
        raise AdapterFileError(path, f"it would unpack to {unpacked} bytes, torch.save does not compress: {size} here")


def all_finite(value: torch.Tensor) -> bool:
    """Whether no element is NaN or Inf (the one-byte floats are widened first: isfinite does not know them all)."""
    return bool(torch.isfinite(value.float() if value.element_size() == 1 else value).all())


# --- writing ---------------------------------------------------------------------------------------------------------


def _config_writer(config: Mapping[str, Any]) -> Callable[[str], None]:
    text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False)

    def write(path: str) -> None:
        with open(path, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)

    return write


def _weights_writer(state_dict: Mapping[str, torch.Tensor]) -> Callable[[str], None]:
    """Make the tensors fit for safetensors: contiguous, no two sharing memory."""
    ready: dict[str, torch.Tensor] = {}
    seen: set[tuple[torch.device, int]] = set()
    for name, value in state_dict.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"state_dict[{name!r}]: expected a tensor, got {type(value).__name__}")
        if value.is_meta:
            raise ValueError(f"state_dict[{name!r}]: the tensor is on the meta device and has no values to save")
        value = value.detach().contiguous()
        storage = (value.device, value.untyped_storage().data_ptr())
        ready[name] = value.clone() if storage in seen and value.numel() else value
        seen.add(storage)

    def write(path: str) -> None:
        save_file(ready, path, metadata={"format": "pt"})

    return write


def _replace_files(folder: PathLike, writers: Mapping[str, Callable[[str], None]]) -> None:
    """Replace the named files of `folder` as one, each written by its function of a path."""
    folder = os.fspath(folder)
    if os.path.isfile(folder):
        raise ValueError(f"save_directory: expected a folder, got a file: {folder}")
    os.makedirs(folder, exist_ok=True)
    with _locked(folder) as is_locked:
        _remove_stale(folder, _STAGING, _STALE_SECONDS_LOCKED if is_locked else _STALE_SECONDS)
        _finish_commit(folder)
        staging = tempfile.mkdtemp(prefix=_STAGING, dir=folder)
        try:
            for name, write in writers.items():
                path = os.path.join(staging, _STAGED[name])
                try:
                    write(path)
                except (OSError, SafetensorError) as error:  # a full disk, mostly, which neither says
                    raise OSError(f"{os.path.join(folder, name)}: {error}") from error
                os.chmod(path, 0o666 & ~_umask())  # safetensors lets only the user read what it writes
                _sync(path)
            _sync(staging)
            os.rename(staging, os.path.join(folder, _COMMIT))
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        _sync(folder)
        _finish_commit(folder)


@contextlib.contextmanager
def _locked(folder: str) -> Iterator[bool]:
    """Keep other writers out of `folder`, where the system and the file system have locks; a kill releases it.

    Yields whether they have."""
    if fcntl is None:
        yield False
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        is_locked = False
        # A network file system may have no locks; then several writers at once are the caller's affair.
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
            is_locked = True
        yield is_locked
    finally:
        _unlock(handle)


def _unlock(handle: int) -> None:
    """Give a lock back. To close its handle is not enough: a process that was forked meanwhile has one too."""
    with contextlib.suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_UN)
    os.close(handle)


def _is_locked_for_reading(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:  # a writer has it
        return False
    return True


def _finish_commit(folder: str) -> None:
    """Move the files of a committed save into place (step 3); nothing to do where there is none."""
    commit = os.path.join(folder, _COMMIT)
    if not os.path.isdir(commit):
        return
    staged = {name: os.path.join(commit, short) for name, short in _STAGED.items()}
    config = os.path.join(folder, CONFIG_NAME)
    if all(map(os.path.isfile, (*staged.values(), config))) and not _same_bytes(staged[CONFIG_NAME], config):
        os.unlink(config)
    for name in (SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME):
        if os.path.isfile(staged[name]):
            os.replace(staged[name], os.path.join(folder, name))
    _sync(folder)
    os.rmdir(commit)


def _remove_stale(folder: str, prefix: str, age: float = _STALE_SECONDS) -> None:
    """Remove what a killed writer left in staging: files and folders with that beginning of a name in which nothing was
    written for `age` seconds (a younger one may be in use)."""
    for entry in list(os.scandir(folder)):
        if not entry.name.startswith(prefix):
            continue
        with contextlib.suppress(OSError):  # another writer removes it too
            inside = [item.stat().st_mtime for item in os.scandir(entry.path)] if entry.is_dir() else []
            if time.time() - max(entry.stat().st_mtime, *inside, 0.0) > age:
                shutil.rmtree(entry.path) if entry.is_dir() else os.unlink(entry.path)


def _same_bytes(first: str, second: str) -> bool:
    with open(first, "rb") as a, open(second, "rb") as b:
        return a.read() == b.read()


def _sync(path: str) -> None:
    """Flush a file or folder to the disk (Windows has no way to do it for a folder)."""
    if os.name == "nt" and os.path.isdir(path):
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    """The process's umask (it can only be read by setting it)."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
