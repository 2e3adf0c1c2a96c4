"""PEFT's classes of errors, for code that catches them by these names."""

from __future__ import annotations


class PeftError(Exception):
    """Base of the errors that have a class of their own. Each is a ValueError too."""


class NoMatchingPeftModuleError(PeftError, ValueError):
    """An adapter's configuration matched no module and no parameter of the model."""
