"""PEFT's class of warnings, for code that filters by it."""

from __future__ import annotations


class PeftWarning(UserWarning):
    """Given where PEFT gives it; all other warnings here are plain UserWarnings."""
