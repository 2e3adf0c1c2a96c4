"""`LiveBytes`: how much memory tensors hold, and the most they ever held, on any device, real or fake."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Context manager that counts the bytes of the storages that operations make while it is open, until they die.

    Counted: every storage that an operation returns, once, from then until nothing refers to it. Not counted: the
    storages in `excluded` (parameters, what exists anyway), and what an operation allocates and frees within itself.
    Works on real tensors and, inside a FakeTensorMode, on tensors without memory.

    Attributes:
        now: bytes alive.
        peak: the most that were alive since the start, or since `restart`.
    """

    def __init__(self, excluded: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        # A storage's Python object lives as long as its memory, so its death is the memory's.
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        for t in excluded:
            storage = t.untyped_storage()
            self._known[id(storage)] = weakref.ref(storage)

    def restart(self) -> int:
        """Forget the peak so far; returns the bytes alive."""
        self.peak = self.now
        return self.now

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        known = self._known.get(key)
        if known is not None and known() is storage:
            return
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)

        def died(_: Any) -> None:
            self.now -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, died)
