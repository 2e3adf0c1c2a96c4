"""The one error of a damaged adapter: it names the file, the key and the reason; and how long a message may be."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from peftkern.utils.error import PeftError

_MOST = 1000  # characters of a message: what a file says may be any length


class AdapterFileError(PeftError, ValueError):
    """An adapter file cannot be used.

    Args:
        file: The file (or folder) that is at fault.
        reason: What was expected and what came.
        key: The configuration field or tensor name at fault, where there is one.

    Attributes:
        file, key, reason: The three arguments, for programs that react to them.
    """

    def __init__(self, file: str | os.PathLike[str], reason: str, key: str | None = None) -> None:
        self.file, self.key, self.reason = os.fspath(file), key, cut(reason)
        at = "" if key is None else f"{shown(key, 300)}: "
        super().__init__(f"{self.file}: {at}{self.reason}")

    def __reduce__(self) -> tuple[type, tuple[str, str, str | None]]:
        return type(self), (self.file, self.reason, self.key)


def cut(text: str, most: int = _MOST) -> str:
    """`text` for a message: its middle is left out where it is longer than `most` characters."""
    if len(text) <= most:
        return text
    return f"{text[: most // 2]} ... ({len(text) - most} characters left out) ... {text[-(most - most // 2) :]}"


def shown(value: object, most: int = 80) -> str:
    """The value as in code, for a message; the end of a long one is left out."""
    text = repr(value)
    return text if len(text) <= most else text[:most] + "..."


@contextlib.contextmanager
def short_messages() -> Iterator[None]:
    """Errors about values in the block do not repeat long ones whole."""
    try:
        yield
    except (NotImplementedError, TypeError, ValueError) as error:
        text = str(error)
        if len(text) <= _MOST or type(error) not in (NotImplementedError, TypeError, ValueError):
            raise
        raise type(error)(cut(text)) from None


def shorten(names: list[str], most: int = 8) -> str:
    """`names` as text for a message: the first `most` of them, then how many were left out."""
    listed = ", ".join(shown(name, 300) for name in names[:most])
    return listed if len(names) <= most else f"{listed} and {len(names) - most} more"
