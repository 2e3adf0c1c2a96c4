"""Base models of transformers and others for `peftkern.auto`. Imported lazily."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from peftkern.integrations.extras import require
from peftkern.utils.adapter_files import PathLike

_ALLOWED = ("diffusers", "lerobot", "megatron-core", "transformers")


def base_model_class(
    auto_class: str | None, auto_mapping: dict[str, str] | None, import_allowlist: list[str] | None = None
) -> Any:
    """The class whose `from_pretrained` loads the base model.

    Args:
        auto_class: The name of a transformers auto class; if given it decides, unless there is an `auto_mapping`.
        auto_mapping: `base_model_class` and `parent_library` of an adapter's configuration. It comes out of a file, so
            the library must be, or lie in, one of `import_allowlist`.

    Raises:
        ImportError: The library is not installed; the message says how to install it.
        ValueError: Neither tells the class, the library is not on the list, or it has no such class.
    """
    if auto_mapping is None:
        if auto_class is None:
            raise ValueError("AutoPeftModel: the adapter names a task, or no auto_mapping; use the class for its task")
        return getattr(require("transformers", "loading a base model"), auto_class)
    library, name = auto_mapping.get("parent_library"), auto_mapping.get("base_model_class")
    allowed = tuple(_ALLOWED if import_allowlist is None else import_allowlist)
    if not isinstance(library, str) or not isinstance(name, str):
        raise ValueError(f"auto_mapping: expected parent_library and base_model_class, got {auto_mapping!r}")
    if not any(library == item or library.startswith(f"{item}.") for item in allowed):
        raise ValueError(
            f"auto_mapping: wants to import {library!r}, which is not one of {sorted(allowed)}; if you trust it, pass "
            f"import_allowlist=[{library!r}]"
        )
    found = getattr(require(library, "loading the adapter's base model"), name, None)
    if not isinstance(found, type) or not hasattr(found, "from_pretrained"):
        raise ValueError(f"auto_mapping: {library!r} has no model class {name!r}")
    return found


def load_base_model(target: Any, name_or_path: str, revision: str | None, options: dict[str, Any]) -> nn.Module:
    """`target.from_pretrained` of the base model; the options' own `revision` is the adapter's, so it is left out."""
    options = {name: value for name, value in options.items() if name not in ("revision", "subfolder")}
    return target.from_pretrained(name_or_path, **options, **({} if revision is None else {"revision": revision}))


def fit_embeddings_to_tokenizer(
    model: nn.Module, adapter: PathLike, hub_kwargs: dict[str, Any], options: dict[str, Any]
) -> None:
    """Enlarge the embeddings if the tokenizer saved with the adapter has more tokens than they have rows."""
    from transformers import AutoTokenizer

    from peftkern.utils.hub import file_exists_on_hub

    known = {name: hub_kwargs[name] for name in ("revision", "token") if name in hub_kwargs}
    exists = os.path.exists(os.path.join(adapter, "tokenizer_config.json"))
    if not exists and not os.path.isdir(adapter):
        exists = bool(file_exists_on_hub(os.fspath(adapter), "tokenizer_config.json", **known))
    if exists and hasattr(model, "get_input_embeddings"):
        trust = options.get("trust_remote_code", False)
        tokenizer = AutoTokenizer.from_pretrained(adapter, trust_remote_code=trust, **known)
        if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(len(tokenizer))
