"""The Hugging Face Hub: fetch files, ask whether one is there, upload. Its client is imported only when used."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

from peftkern.utils.adapter_error import AdapterFileError

# Arguments of transformers' `save_pretrained` that mean nothing for an adapter: it is one file in PEFT's format, stays
# here, and is written by safetensors (accelerate's examples pass `save_function=accelerator.save`).
_WITHOUT_EFFECT = ("max_shard_size", "save_function", "save_peft_format", "token")
_REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def download(repo_id: str, names: tuple[str, ...], *, subfolder: str | None = None, **kwargs: Any) -> str:
    """Fetch the first of `names` that repository `repo_id` has; return the path of the cached file.

    Raises:
        AdapterFileError: `repo_id` can be no repository, `huggingface_hub` is not installed, or no file was found.
    """
    if not _REPO_ID.fullmatch(repo_id):
        raise AdapterFileError(repo_id, "no such folder (and not the form of a Hub repository's id)")
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
    except ImportError as error:
        raise AdapterFileError(repo_id, "no such folder; for Hub repositories install huggingface_hub") from error
    reasons = []
    for name in names:
        try:
            return hf_hub_download(repo_id, name, subfolder=subfolder, **kwargs)
        except EntryNotFoundError as error:  # this file is not there (or, offline, not cached): try the next name
            reasons.append(f"{name}: {str(error).splitlines()[0]}")
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise AdapterFileError(repo_id, f"no such folder, and the Hub refused {name}: {error}") from error
    raise AdapterFileError(repo_id, f"no such folder, and the Hub has no such file: {'; '.join(reasons)}")


def file_exists_on_hub(repo_id: str, filename: str, **kwargs: Any) -> bool | None:
    """Whether repository `repo_id` has `filename`; None where that cannot be told (offline, no client, an outage)."""
    try:
        import huggingface_hub
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        return None
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return None
    try:
        return huggingface_hub.file_exists(repo_id, filename, **kwargs)
    except HFValidationError:
        return False
    except OSError:
        return None


def check_save_options(options: Mapping[str, Any]) -> None:
    """Look at what `save_pretrained` was given by transformers' names beside its own.

    Raises:
        ValueError: `push_to_hub` is asked for: `push_to_hub(repo_id)` does that.
        TypeError: An argument that transformers has not, or that would change what is written.
    """
    if options.get("push_to_hub"):
        raise ValueError("push_to_hub: save_pretrained writes to a folder; to upload, call push_to_hub(repo_id)")
    unknown = sorted(set(options) - {"push_to_hub", *_WITHOUT_EFFECT})
    if unknown:
        raise TypeError(f"save_pretrained: unknown arguments: {', '.join(unknown)}")


def upload(
    save: Callable[[str], object],
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str | None = None,
) -> str:
    """Upload what `save(folder)` writes; the arguments of transformers' `push_to_hub`.

    Args:
        save: Writes the files into a folder.
        repo_id: The repository, made where it is missing.
        commit_message, commit_description: Of the commit.
        private: Of a repository that is made now.
        token: To write with; by default the one that is logged in.
        revision: The branch, made where it is missing.
        create_pr: Open a pull request in place of a commit to the branch.
        max_shard_size: Without effect: an adapter is one file.

    Returns:
        The commit's address.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/") and not create_pr:
            api.create_branch(name, branch=revision, exist_ok=True)
        options: dict[str, Any] = {"commit_message": commit_message, "commit_description": commit_description}
        options |= {"revision": revision, "create_pr": create_pr}
        return str(api.upload_folder(repo_id=name, folder_path=folder, **options))
