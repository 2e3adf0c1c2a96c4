"""`LayerAdapters`: the adapters of one layer, both factors in one pool, as `multi_lora_linear` takes them.

An adapter's parameters stay parameters: they are views into the pool, so that a step of an optimizer is seen by the
kernels, and a state dict by its usual names. What moves them off the pool (`.to()`, `.half()`, an optimizer that
replaces `p.data`) is noticed by `settle`, which lays the pool out anew.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn

from peftkern_kernels.adapters import Adapters

_PLAIN_TENSORS = (nn.Parameter, torch.Tensor)


class Layout:
    """Where each slot's rank rows are in the pool: (first row, rank) for each, rank 0 where it is empty.

    Its hash is worked out once: every layer of a model asks for the same one in every forward.
    """

    __slots__ = ("_hash", "places")

    def __init__(self, places: Iterable[tuple[int, int]]) -> None:
        self.places = tuple(places)
        self._hash = hash(self.places)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Layout) and self.places == other.places)


class Entry(NamedTuple):
    """What a slot holds: lora_A [r, K] and lora_B [N, r], views into the pool, and the scaling."""

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    scaling: float


class LayerAdapters:
    """Room for `slots` adapters of rank at most `max_rank` on a layer with weight [out_features, in_features].

    Slot s owns the rank rows s * max_rank and on. What changes when an adapter comes or goes is written in place, rows
    before tables, so that a captured graph keeps working.

    Args:
        in_features, out_features: K and N of the layer.
        slots: adapters that there is room for.
        max_rank: the largest rank of any.
        dtype, device: of the pools, and so of every adapter's parameters.

    Attributes:
        pool_a, pool_b, row_offset, rank, scaling, max_rank, N: as of `peftkern_kernels.adapters.Adapters`.
        layout: `row_offset` and `rank` as the host knows them.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        slots: int,
        max_rank: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, value in (("slots", slots), ("max_rank", max_rank)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an int of at least 1, got {value!r}")
        self.K, self.N, self.max_rank = in_features, out_features, max_rank
        self.entries: list[Entry | None] = [None] * slots
        self._allocate(dtype, torch.device(device))
        self._refresh()

    @property
    def slots(self) -> int:
        """Adapters that there is room for."""
        return len(self.entries)

    @torch.inference_mode(False)  # a pool made there could not be trained later
    def _allocate(self, dtype: torch.dtype, device: torch.device) -> None:
        rows = self.slots * self.max_rank
        self.pool_a = torch.zeros(rows, self.K, dtype=dtype, device=device)
        self.pool_b = torch.zeros(rows * self.N, dtype=dtype, device=device)
        self.row_offset = torch.arange(0, rows, self.max_rank, dtype=torch.int32, device=device)
        self.rank = torch.zeros(self.slots, dtype=torch.int32, device=device)
        self.scaling = torch.zeros(self.slots, dtype=torch.float32, device=device)

    def _refresh(self) -> None:
        ranks = [0 if entry is None else entry.lora_A.shape[0] for entry in self.entries]
        self.layout = Layout((slot * self.max_rank, rank) for slot, rank in enumerate(ranks))
        self.scalings = tuple(0.0 if entry is None else entry.scaling for entry in self.entries)
        # Those of `_places`, without making the views: pools are filled slot by slot, and this is for all slots.
        each_a, each_b = (self.max_rank * n * self.pool_a.element_size() for n in (self.K, self.N))
        a, b = self.pool_a.data_ptr(), self.pool_b.data_ptr()
        self._addresses = tuple(
            None if entry is None else (a + slot * each_a, b + slot * each_b) for slot, entry in enumerate(self.entries)
        )

    def _places(self, slot: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The views of a slot's two factors in the pool."""
        first = slot * self.max_rank
        b = self.pool_b[first * self.N : (first + rank) * self.N]
        return self.pool_a[first : first + rank], b.view(self.N, rank)

    def fits(self, lora_A: torch.Tensor, lora_B: torch.Tensor) -> None:
        """Raises unless the two factors can be an adapter here.

        Raises:
            TypeError: they are no plain tensors of the pool's dtype.
            ValueError: their shapes or device do not fit, or the rank is more than `max_rank`.
        """
        for name, t in (("lora_A", lora_A), ("lora_B", lora_B)):
            if type(t) not in _PLAIN_TENSORS:
                raise TypeError(f"{name}: expected a plain tensor, got a {type(t).__name__}")
            if t.dtype != self.pool_a.dtype:
                raise TypeError(f"{name}: expected the pool's dtype {self.pool_a.dtype}, got {t.dtype}")
            if t.device != self.pool_a.device:
                raise ValueError(f"{name}: expected the pool's device {self.pool_a.device}, got {t.device}")
        if lora_A.dim() != 2 or lora_A.shape[1] != self.K or lora_A.shape[0] < 1:
            raise ValueError(f"lora_A: expected shape [r, {self.K}], got {list(lora_A.shape)}")
        if lora_A.shape[0] > self.max_rank:
            raise ValueError(f"lora_A: expected a rank of at most {self.max_rank}, got {lora_A.shape[0]}")
        if lora_B.shape != (self.N, lora_A.shape[0]):
            raise ValueError(f"lora_B: expected shape {[self.N, lora_A.shape[0]]}, got {list(lora_B.shape)}")

    @torch.inference_mode(False)
    @torch.no_grad()
    def put(self, slot: int, lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float) -> None:
        """Give a slot an adapter; the two tensors become views into the pool, with the values that they have.

        Those of the adapter that was there before keep their values, in memory of their own.

        Raises:
            IndexError: no such slot. TypeError, ValueError: see `fits`; nothing is changed then.
        """
        if not 0 <= slot < self.slots:
            raise IndexError(f"slot: expected 0 to {self.slots - 1}, got {slot}")
        self.fits(lora_A, lora_B)
        rank = lora_A.shape[0]
        self._release(slot, lora_A, lora_B)
        for tensor, place in zip((lora_A, lora_B), self._places(slot, rank), strict=True):
            if tensor.data_ptr() != place.data_ptr():
                place.copy_(tensor)
            elif tensor.stride() != place.stride():  # cut to a smaller rank where it lay
                place.copy_(tensor.clone())
            tensor.data = place
        self.entries[slot] = Entry(lora_A, lora_B, float(scaling))
        self.scaling[slot] = float(scaling)
        self.rank[slot] = rank
        self._refresh()

    @torch.inference_mode(False)
    @torch.no_grad()
    def _release(self, slot: int, *staying: torch.Tensor) -> None:
        """Give a slot's tensors, but for those that stay, memory of their own: who still holds them, an optimizer or a
        caller, would otherwise read and write the next adapter of the slot."""
        entry, addresses = self.entries[slot], self._addresses[slot]
        if entry is None or addresses is None:
            return
        for tensor, address in zip((entry.lora_A, entry.lora_B), addresses, strict=True):
            if tensor.data_ptr() == address and not any(tensor is other for other in staying):
                tensor.data = tensor.data.clone()

    def adopt_kind(self, like: torch.Tensor) -> None:
        """Give an empty pool the dtype and device of `like`."""
        if (self.pool_a.dtype, self.pool_a.device) != (like.dtype, like.device):
            self.entries = [None] * self.slots
            self._allocate(like.dtype, like.device)
            self._refresh()

    def drop(self, slot: int) -> None:
        """Empty a slot: its rows take the base alone from now on. The parameters keep their values, in memory of their
        own."""
        if self.entries[slot] is not None:
            self.rank[slot] = 0
            self._release(slot)
            self.entries[slot] = None
            self._refresh()

    def rescale(self, slot: int, scaling: float) -> None:
        """Change the scaling of a slot's adapter."""
        entry = self.entries[slot]
        if entry is not None and entry.scaling != scaling:
            self.entries[slot] = entry._replace(scaling=float(scaling))
            self.scaling[slot] = float(scaling)
            self._refresh()

    def settle(self, slots: Iterable[int] | None = None) -> bool:
        """Lay the pool out anew if a parameter has left it; whether that was needed.

        Args:
            slots: which to look at; None for all.

        Raises:
            TypeError, ValueError: the parameters are no longer of one dtype on one device.
        """
        if self.is_settled(slots):
            return False
        self._lay_out()
        return True

    def is_settled(self, slots: Iterable[int] | None = None) -> bool:
        """Whether the parameters of these slots, or of all, lie in the pool."""
        addresses, entries = self._addresses, self.entries
        for slot in range(len(entries)) if slots is None else slots:
            entry = entries[slot]
            if entry is not None and (entry.lora_A.data_ptr(), entry.lora_B.data_ptr()) != addresses[slot]:
                return False
        return True

    def _lay_out(self) -> None:
        held = [(slot, entry) for slot, entry in enumerate(self.entries) if entry is not None]
        first = held[0][1].lora_A
        kinds = {(t.dtype, t.device) for _, entry in held for t in (entry.lora_A, entry.lora_B)}
        if len(kinds) > 1:
            raise TypeError(f"adapters of one layer must have one dtype and device, got {sorted(map(str, kinds))}")
        self._allocate(first.dtype, first.device)
        for slot, entry in held:
            self.put(slot, *entry)

    def kernel_adapters(self) -> Adapters:
        """The same as the kernels take it."""
        tables = (self.row_offset, self.rank, self.scaling)
        return Adapters(self.pool_a, self.pool_b, *tables, self.max_rank, self.N)
