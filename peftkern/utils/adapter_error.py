"""The one error of a damaged adapter: it names the file, the key and the reason."""

from __future__ import annotations

import os


class AdapterFileError(ValueError):
    """An adapter file cannot be used.

    Args:
        file: The file (or folder) that is at fault.
        reason: What was expected and what came.
        key: The configuration field or tensor name at fault, where there is one.

    Attributes:
        file, key, reason: The three arguments, for programs that react to them.
    """

    def __init__(self, file: str | os.PathLike[str], reason: str, key: str | None = None) -> None:
        self.file, self.key, self.reason = os.fspath(file), key, reason
        super().__init__(f"{self.file}: {reason}" if key is None else f"{self.file}: {key!r}: {reason}")

    def __reduce__(self) -> tuple[type, tuple[str, str, str | None]]:
        return type(self), (self.file, self.reason, self.key)


def shorten(names: list[str], most: int = 8) -> str:
    """`names` as text for a message: the first `most` of them, then how many were left out."""
    listed = ", ".join(repr(name) for name in names[:most])
    return listed if len(names) <= most else f"{listed} and {len(names) - most} more"
