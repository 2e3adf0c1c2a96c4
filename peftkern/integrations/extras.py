"""Packages that come with an extra of peftkern's: imported when they are needed, or else told how to be installed."""

from __future__ import annotations

import importlib
from types import ModuleType

# Top-level package -> the extra that brings it.
EXTRAS = {"transformers": "hf", "accelerate": "hf", "peft": "peft", "bitsandbytes": "bnb"}


def require(name: str, purpose: str) -> ModuleType:
    """The module `name`, which `purpose` needs.

    Raises:
        ImportError: (ModuleNotFoundError) its package is not installed; the message says how to install it. A package
            that is there and fails to import raises what it raises.
    """
    package = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        wanted = f"'peftkern[{EXTRAS[package]}]'" if package in EXTRAS else package
        message = f"{purpose} needs {package}, which is not installed: pip install {wanted}"
        raise ModuleNotFoundError(message, name=package) from error
