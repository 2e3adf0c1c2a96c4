"""A batch whose rows want different adapters: what models and layers of every method need for it.

`MixedRows` gives the names of a model's adapters slots, the same on all layers. `use` hands a batch to every layer for
the time of a forward; a layer without the adapter that a row names is the base layer for that row. What a layer then
does is its method's: `tuners/lora/mixed.py`, `tuners/ia3/mixed.py`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from peftkern.ops._common import makes_plain_tensors
from peftkern.ops.adapter_route import AdapterBatch
from peftkern.tuners.switching import holders_of
from peftkern.tuners.token_order import TokenOrder
from peftkern.tuners.trainable_tokens import TrainableTokensLayer
from peftkern.utils.module_tree import modules_of
from peftkern.utils.other import ModulesToSaveWrapper

BASE = "__base__"  # the name that PEFT gives a row without an adapter


def check_names(names: Any) -> list[str]:
    """The names of a batch's rows as a list.

    Raises:
        TypeError: a single string, whose letters would be taken for names.
    """
    if isinstance(names, str):
        raise TypeError(f"adapter_names: expected a list of names, got {names!r}")
    return list(names)


def check_batch_axis(batch: AdapterBatch, x: torch.Tensor, axes: int) -> None:
    """Raises ValueError unless x, a convolution's input, has so many axes and a first one of the batch's rows."""
    n = len(batch)
    if x.dim() == axes and x.shape[0] == n:
        return
    if x.dim() == axes:
        batch.refuse_names(x)
    raise ValueError(
        f"adapter_names: expected an input with {axes} axes whose first is the batch, {n} rows, got {list(x.shape)}"
    )


class LayerRows:
    """A batch as one layer sees it.

    Args:
        batch: the slots of the rows.
        names: the adapter of each slot.
    """

    # Of the thread whose block it is, or None where torch.compile, which knows no threads, traced the block.
    __slots__ = ("batch", "names", "thread")

    def __init__(self, batch: AdapterBatch, names: Sequence[str | None]) -> None:
        self.batch, self.names = batch, names
        self.thread = None if torch.compiler.is_compiling() else threading.get_ident()

    def decide(self, layer: Any, known: bool = False) -> None:
        """Settle, before the model runs, what the layer's forward needs to know and a compiled one should not ask.
        `known`: what `MixedRows.unchanged` asks of layers holds for this one."""

    def begin(self) -> None:
        """Serve another forward, for which all has been found unchanged."""

    def slots_present(self) -> Sequence[int]:
        """Slots that rows take, in order; all of them where rows were told by slots."""
        present = self.batch.present if self.batch.named else None
        return range(len(self.names)) if present is None else present

    def present(self) -> list[str]:
        """Names of the adapters that rows take; all of them where rows were told by slots."""
        return [name for name in (self.names[slot] for slot in self.slots_present()) if name is not None]

    def rows_of(self) -> dict[str, list[int]]:
        """The rows of each adapter that is present. Ids that are on a device are read, which waits for it."""
        host = self.batch.ids.tolist() if self.batch.host is None else self.batch.host
        found: dict[str, list[int]] = {}
        for i, slot in enumerate(host):
            name = self.names[slot] if 0 <= slot < len(self.names) else None
            if name is not None:
                found.setdefault(name, []).append(i)
        return found


class Turn:
    """Lets one thread at a time give a model's layers a batch; the others wait. A copy is another model's."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple[Any, ...]:
        return Turn, ()

    def taken(self) -> contextlib.AbstractContextManager[Any]:
        """It is this thread's within the block; nothing under torch.compile, which knows no threads."""
        return contextlib.nullcontext() if torch.compiler.is_compiling() else self._lock


class MixedRows:
    """The adapters of a model by slot.

    Args:
        model: holds the layers.
        slots: adapters that there is room for.
        layer_class: of the layers with adapters, such as `LoraLayer`.

    Attributes:
        names: the adapter in each slot, None where it is empty.
    """

    def __init__(self, model: nn.Module, slots: int, layer_class: type) -> None:
        self.names: list[str | None] = [None] * slots
        self._model, self._layer_class = model, layer_class
        self._last_batch: AdapterBatch | None = None
        self._last_use: _Use | None = None
        self.find_layers()

    @property
    def slots(self) -> int:
        """Adapters that there is room for."""
        return len(self.names)

    def slot_of(self, name: str) -> int:
        """The slot of an adapter.

        Raises:
            ValueError: no adapter of that name has one.
        """
        if name not in self.names:
            known = sorted(held for held in self.names if held is not None)
            raise ValueError(f"adapter_names: no adapter is named {name!r}; there are {known}")
        return self.names.index(name)

    @property
    def device(self) -> torch.device:
        """Where the adapters are, and so the ids."""
        for layer in self._layers:
            for parameter in layer.parameters():
                return parameter.device
        return torch.device("cpu")

    def seat(self, names: Sequence[str]) -> None:
        """Give each of these adapters a slot, which it keeps, and take that of any other."""
        if len(names) == sum(name is not None for name in self.names) and all(name in self.names for name in names):
            return
        self.names = [name if name in names else None for name in self.names]
        for name in names:
            if name not in self.names:
                self.names[self.names.index(None)] = name

    def find_layers(self) -> None:
        """Look for the model's adapted layers again, after some came or went."""
        kinds = (self._layer_class, ModulesToSaveWrapper, TrainableTokensLayer)
        self._layers: list[Any] = [holder for holder in holders_of(self._model) if isinstance(holder, kinds)]
        self._tuned: list[Any] = [layer for layer in self._layers if isinstance(layer, self._layer_class)]
        self._order = TokenOrder(self._model, self._layers)
        self._last_use = None

    def __getstate__(self) -> dict[str, Any]:
        """Without what is remembered of a forward of the original."""
        return self.__dict__ | {"_last_batch": None, "_last_use": None}

    def sync(self) -> None:
        """Bring what is kept here of the layers' adapters up to date."""

    def rows_for(self, layer: Any, batch: AdapterBatch, names: Sequence[str | None]) -> LayerRows:
        """The batch as `layer` sees it."""
        return LayerRows(batch, names)

    def batch(self, adapters: Sequence[str] | torch.Tensor, device: torch.device | str) -> AdapterBatch:
        """The batch of these rows: names ("__base__" for the base alone), or slots in a tensor.

        Raises:
            ValueError: an unknown name.
            TypeError: neither names nor a tensor.
        """
        if isinstance(adapters, torch.Tensor):
            return AdapterBatch(adapters, self.slots)
        if isinstance(adapters, str) or not all(isinstance(name, str) for name in adapters):
            raise TypeError(f"adapter_names: expected a list of names, got {adapters!r}")
        slots = {name: -1 if name == BASE else self.slot_of(name) for name in dict.fromkeys(adapters)}
        host = [slots[name] for name in adapters]
        last, plain = self._last_batch, makes_plain_tensors()
        if plain and last is not None and last.is_again(host, self.slots, device):
            return last
        batch = AdapterBatch(torch.tensor(host, dtype=torch.int64, device=device), self.slots, host)
        if plain:
            self._last_batch = batch
        return batch

    @contextlib.contextmanager
    def use(
        self, batch: AdapterBatch, encoder: nn.Module | None = None, encoder_batch: AdapterBatch | None = None
    ) -> Iterator[None]:
        """Within the block, every adapted layer takes for each row of its input the adapter that `batch` names.

        The layers have one batch at a time, so it has to be this thread's `Turn`. A call from another one raises a
        RuntimeError meanwhile.

        Afterwards layers remember the batch for as long as gradients are recorded, so that what gradient checkpointing
        computes again in backward is the same.

        Args:
            batch: the rows of all layers.
            encoder, encoder_batch: a module, and the rows of the layers in it, where they are others.

        Raises:
            ValueError: adapters are merged, or disabled in some layers, so that none could be taken. In the block, a
                layer's input that has not as many rows as the batch, or rows of which it is not known whose they are.
        """
        if self._layers and all(layer.disable_adapters for layer in self._layers):
            yield  # as in PEFT, `disable_adapter` has the last word: each row gets the base model
            return
        for layer in self._layers:
            if getattr(layer, "merged_adapters", None):
                raise ValueError("adapter_names: adapters are merged into the base weights: call unmerge_adapter first")
            if layer.disable_adapters:
                raise ValueError("adapter_names: adapters are disabled in some layers: enable or disable all of them")
        rows = self._rows(batch, encoder, encoder_batch)
        before = [layer.__dict__.get("_mixed") for layer in self._layers]
        handles = list(self._order.watch())
        try:
            for layer, own in zip(self._layers, rows, strict=True):
                _hand(layer, "_mixed", own)
            yield
        finally:
            for handle in handles:
                handle.remove()
            recorded = torch.is_grad_enabled()
            for layer, own, old in zip(self._layers, rows, before, strict=True):
                _hand(layer, "_mixed_before", own if recorded else None)
                _hand(layer, "_mixed", old)

    def _rows(
        self, batch: AdapterBatch, encoder: nn.Module | None, encoder_batch: AdapterBatch | None
    ) -> list[LayerRows]:
        """The batch as each layer sees it, all decided; those of the last time if nothing has changed since."""
        passing = encoder is not None or torch.compiler.is_compiling() or torch.is_grad_enabled()
        last = None if passing else self._last_use
        if last is not None and not last.holds(self.names):
            last = None
        if last is not None and last.batch is batch:
            for own in last.rows:
                own.begin()
            return last.rows
        self._last_use = None
        if last is None:
            self.sync()
        names = tuple(self.names)
        inside = set() if encoder is None or encoder_batch is None else set(modules_of(encoder))
        views = self._order.views(batch)
        plain = not views
        if encoder_batch is not None:
            encoder_views = self._order.views(encoder_batch)
            views |= {layer: encoder_views.get(layer, encoder_batch) for layer in self._layers if layer in inside}
        rows = [self.rows_for(layer, views.get(layer, batch), names) for layer in self._layers]
        for layer, own in zip(self._layers, rows, strict=True):
            if isinstance(layer, self._layer_class):
                own.decide(layer, known=last is not None)
        if plain and not passing:
            unchanged = self.unchanged(rows) if last is None else last.unchanged  # which is not of the batch
            self._last_use = None if unchanged is None else _Use(batch, names, rows, unchanged, threading.get_ident())
        return rows

    def unchanged(self, rows: Sequence[LayerRows]) -> Callable[[], bool] | None:
        """What tells whether all is still as it was when a batch's rows were decided; None if that cannot be told."""
        return None


class _Use(NamedTuple):
    """What the last batch found, for the next one: all of it if that is the same, and what is of no batch if not."""

    batch: AdapterBatch
    names: tuple[str | None, ...]
    rows: list[LayerRows]
    unchanged: Callable[[], bool]
    thread: int

    def holds(self, names: list[str | None]) -> bool:
        """Whether all is as it was: adapters and their slots, layers, and the thread."""
        return self.names == tuple(names) and self.thread == threading.get_ident() and self.unchanged()


def _hand(layer: Any, name: str, rows: LayerRows | None) -> None:
    """Set an attribute of a layer; `nn.Module` takes ten times as long for it."""
    if torch.compiler.is_compiling():
        setattr(layer, name, rows)
    else:
        layer.__dict__[name] = rows
