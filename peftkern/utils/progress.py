"""A bar beside long work."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable
from typing import Any, TypeVar

T = TypeVar("T")


def with_bar(items: Iterable[T], what: str, wanted: bool, **options: Any) -> Iterable[T]:
    """`items`, behind a bar with the words `what`, if `wanted` and tqdm is installed; by default on a terminal only.

    Args:
        options: tqdm's.
    """
    if not wanted or importlib.util.find_spec("tqdm") is None:
        return items
    bar: Iterable[T] = importlib.import_module("tqdm.auto").tqdm(items, desc=what, **({"disable": None} | options))
    return bar
