"""The Hugging Face Hub: fetch files, ask whether one is there, upload. Its client is imported only when used."""

from __future__ import annotations

import os
import re
from typing import Any

from peftkern.utils.adapter_error import AdapterFileError

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


def upload_folder(folder: str | os.PathLike[str], repo_id: str, **kwargs: Any) -> str:
    """Create repository `repo_id` where it is missing and upload the files of `folder`; return the commit's address.

    `kwargs`: `private`, `token`, `commit_message`, `revision`, `create_pr`.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=kwargs.pop("token", None))
    repo = api.create_repo(repo_id, private=kwargs.pop("private", None), exist_ok=True)
    return str(api.upload_folder(repo_id=repo.repo_id, folder_path=folder, **kwargs))
