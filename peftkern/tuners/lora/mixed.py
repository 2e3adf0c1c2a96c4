"""A batch whose rows want different LoRA adapters: what a model's layers need for it, and their forward.

`MixedAdapters` keeps the adapters of each linear layer in a pool (`LayerAdapters`), by the slots that `MixedRows` gives
them. Where a layer cannot be one operation it is called as it is, and each adapter's part is added for its rows by
plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import nn

from peftkern.adapter_pool import LayerAdapters
from peftkern.ops import multi_lora_linear
from peftkern.ops.adapter_route import AdapterBatch
from peftkern.tuners.fusing import (
    bare_quantized_weight,
    bare_weight,
    base_alone,
    compute_dtype,
    has_own_bias,
    is_bare,
    why_plain,
)
from peftkern.tuners.lora.unchanged import Unchanged
from peftkern.tuners.mixed import LayerRows, MixedRows

_PARAMETERS = frozenset((nn.Parameter,))


class MixedAdapters(MixedRows):
    """The adapters of a model by slot, and each layer's pool of them.

    Args:
        model: holds the layers.
        slots: adapters that there is room for.
        max_rank: the largest rank that there is room for.
        layer_class: of the layers with adapters (`LoraLayer`).

    Attributes:
        names: the adapter in each slot, None where it is empty.
        is_fixed: whether these pools are an `AdapterBank`'s, which no others may take the place of.
    """

    is_fixed: bool = False

    def __init__(self, model: nn.Module, slots: int, max_rank: int, layer_class: type) -> None:
        self.max_rank = max_rank
        self._pools: dict[nn.Module, LayerAdapters] = {}
        self._seen: dict[nn.Module, tuple[Any, ...]] = {}
        # Adapters of a layer that are not in its pool, having another dtype: for them it is called as it is.
        self._apart: dict[nn.Module, set[str]] = {}
        super().__init__(model, slots, layer_class)

    @property
    def pools(self) -> dict[nn.Module, LayerAdapters]:
        """The pool of each linear layer that has one."""
        return self._pools

    def make_pool(self, layer: Any, dtype: torch.dtype, device: torch.device) -> LayerAdapters:
        """The pool of a linear layer; one that has none gets an empty one."""
        pool = self._pools.get(layer)
        if pool is None:
            sizes = (layer.in_features, layer.out_features, self.slots, self.max_rank)
            pool = self._pools[layer] = LayerAdapters(*sizes, dtype, device)
        return pool

    def sync(self) -> None:
        """Bring pools and layers into agreement: adapters that came or went, scalings, parameters made anew or moved.

        Raises:
            TypeError, ValueError: an adapter does not fit into its layer's pool.
        """
        if torch.compiler.is_compiling():
            return
        changed = []
        for layer in self._pooled():
            now = _adapters_now(layer)
            if now is None or self._seen.get(layer) != (now, self.names):
                changed.append(layer)
        for layer in self._with_room_for_ranks(changed):
            self._sync_layer(layer)
            now = _adapters_now(layer)  # in the pool by now, but for what two of its adapters share
            pool = self._pools.get(layer)
            if now is None or (pool is not None and not pool.is_settled()):
                self._seen.pop(layer, None)
            else:
                self._seen[layer] = (now, list(self.names))

    def _with_room_for_ranks(self, changed: list[Any]) -> list[Any]:
        """The layers to bring into agreement: these; all of them where an adapter's rank is more than pools have room
        for, which are then made anew. A bank's refuse the adapter."""
        weights = [A._parameters.get("weight") for layer in changed for A in layer._modules["lora_A"]._modules.values()]
        highest = max((w.shape[0] for w in weights if type(w) is nn.Parameter), default=0)
        if self.is_fixed or highest <= self.max_rank:
            return changed
        self.max_rank = highest
        self._pools.clear()
        self._seen.clear()
        return self._pooled()

    def _pooled(self) -> list[Any]:
        """The layers whose adapters can be in a pool."""
        return [layer for layer in self._tuned if layer.is_pooled]

    def _sync_layer(self, layer: Any) -> None:
        held = layer._modules
        As, Bs, scalings = held["lora_A"]._modules, held["lora_B"]._modules, layer.scaling
        pool = self._pools.get(layer)
        new = []
        for slot, name in enumerate(self.names):
            entry = None if pool is None else pool.entries[slot]
            A = As.get(name)
            if A is not None and name is not None:
                a, b = A._parameters.get("weight"), Bs[name]._parameters.get("weight")
                same = entry is not None and entry.lora_A is a and entry.lora_B is b
                if same and pool is not None and pool.layout.places[slot][1] == a.shape[0]:
                    if entry.scaling != scalings[name] and pool is not None:
                        pool.rescale(slot, scalings[name])
                    continue
                if type(a) is not nn.Parameter or type(b) is not nn.Parameter or a.is_meta:
                    continue  # parametrized or sharded: `_why_not_fused` will say so
                new.append((slot, a, b, scalings[name]))
            if entry is not None and pool is not None:
                pool.drop(slot)
        # Between the two: those that stay may have moved to where the new ones are, those that went have not.
        if pool is not None:
            pool.settle()
        self._apart.pop(layer, None)
        for slot, a, b, scaling in new:
            self._put(layer, slot, a, b, scaling)

    def _put(self, layer: Any, slot: int, a: torch.Tensor, b: torch.Tensor, scaling: float) -> None:
        pool = self.make_pool(layer, a.dtype, a.device)
        if all(entry is None for i, entry in enumerate(pool.entries) if i != slot):
            pool.adopt_kind(a)
        name = self.names[slot]
        if not self.is_fixed and name is not None and a.dtype == b.dtype != pool.pool_a.dtype:
            self._apart.setdefault(layer, set()).add(name)
            return
        pool.put(slot, a, b, scaling)

    def rows_for(self, layer: Any, batch: AdapterBatch, names: Sequence[str | None]) -> LayerRows:
        pool = self._pools.get(layer)
        if pool is not None and not any(pool.entries) and not torch.compiler.is_compiling():
            # No parameter of it moves with the model; rows that are told by slots are added from it all the same.
            device, _ = layer._base_device_and_dtype()
            if device is not None and device.type != "meta":
                pool.adopt_kind(pool.pool_a.new_empty(0, device=device))
        return LayerBatch(batch, names, pool, self._apart.get(layer, ()))

    def unchanged(self, rows: Sequence[Any]) -> Callable[[], bool] | None:
        """See `MixedRows`; of layers that `is_simple` holds for, with all of their adapters."""
        if len(self._tuned) < len(self._layers):
            return None
        for layer in self._tuned:
            # Of adapters that are no plain parameters there is no address.
            if not _is_simple(layer, list(layer.scaling)) or _adapters_now(layer) is None:
                return None
            # What layers share is in one pool, and a copy in another: each forward has to look.
            pool = self._pools.get(layer)
            if pool is not None and not pool.is_settled():
                return None
        holds = Unchanged(self._layers).holds
        return lambda: not why_plain() and holds()


def _adapters_now(layer: Any) -> tuple[Any, ...] | None:
    """The adapters of a layer as a sync finds them, by name, identity, address and scaling; None of any but plain
    parameters. Every forward asks, so few steps of Python."""
    held = layer._modules
    As, Bs = held["lora_A"]._modules, held["lora_B"]._modules
    weights = [module._parameters.get("weight") for modules in (As, Bs) for module in modules.values()]
    if set(map(type, weights)) - _PARAMETERS:
        return None
    sizes = [*map(torch.Tensor.numel, weights)]  # of one that was cut to a smaller rank in its place
    addresses = [*map(torch.Tensor.data_ptr, weights)]
    return list(As), [*map(id, weights)], addresses, sizes, list(layer.scaling.values())


class LayerBatch(LayerRows):
    """A batch as one layer sees it.

    Args:
        batch: the slots of the rows.
        names: the adapter of each slot.
        pool: the layer's, if it is linear and has one.
        apart: adapters of the layer that the pool does not hold for their dtype.
    """

    __slots__ = ("_fresh", "apart", "biased", "dropout_p", "empty", "fused", "pool", "training")

    def __init__(
        self,
        batch: AdapterBatch,
        names: Sequence[str | None],
        pool: LayerAdapters | None,
        apart: Collection[str] = (),
    ) -> None:
        super().__init__(batch, names)
        self.pool = pool
        self.apart = apart
        self._fresh = True

    def begin(self) -> None:
        self._fresh = True

    def decide(self, layer: Any, known: bool = False) -> None:
        """How the linear layer's forward will run: told by `fused`, `empty`, `dropout_p` and `biased`.

        Before the model runs, so that a compiled model sees the decision and not what it was made from: it is the same
        for adapters that come and go.
        """
        here = [name for name in self.present() if name in layer.scaling]
        self.training = layer.training
        self.empty = not here and (self.pool is None or self.batch.named)
        self.dropout_p = _shared_dropout(layer, here)
        self.biased = tuple(name for name in here if layer.lora_bias[name])
        self.fused = self.pool is not None and self.dropout_p is not None
        if self.fused and not known and not _is_simple(layer, here) and layer._why_not_fused(here):
            self.fused = False
        if self.apart and any(name in self.apart for name in here):
            self.fused = False

    def settle(self) -> None:
        """Notice parameters that left the pool since the last forward; before the first one `sync` has done so."""
        if torch.compiler.is_compiling() or self.pool is None:
            return
        if not self._fresh:
            self.pool.settle(self.batch.present)
        self._fresh = False


def _is_simple(layer: Any, names: list[str]) -> bool:
    """A quick yes to `_why_not_fused`: a bare linear layer, dense or quantized, and adapters of bare ones."""
    held = layer._modules
    base = bare_weight(held["base_layer"])
    if base is None and bare_quantized_weight(held["base_layer"]) is None:
        return False
    if layer.fan_in_fan_out or why_plain():
        return False
    As, Bs, dropouts = held["lora_A"]._modules, held["lora_B"]._modules, held["lora_dropout"]._modules
    for name in names:
        for module in (As[name], Bs[name], dropouts[name]):
            kind = type(module)
            if kind is not nn.Linear and kind is not nn.Identity and kind is not nn.Dropout:
                return False
            if not is_bare(module):
                return False
        if has_own_bias(As[name]) or (has_own_bias(Bs[name]) and not layer.lora_bias[name]):
            return False
        dtype = As[name]._parameters["weight"].dtype
        if base is not None and dtype is not base.dtype and dtype is not torch.float32:
            return False
    return True


def linear_forward(layer: Any, mixed: LayerBatch, x: torch.Tensor, args: tuple[Any, ...], kwargs: Any) -> torch.Tensor:
    """Forward of a linear layer for a batch of many adapters."""
    if not args and not kwargs and not torch.compiler.is_compiling():
        y = _repeated(layer, mixed, x)
        if y is not None:
            return y
    if layer._shared_input is not None and not args and not kwargs:
        y = layer._shared_input.forward(layer, x, mixed)
        if y is not None:
            return y
    if layer.training is not mixed.training and not torch.compiler.is_compiling():
        mixed.decide(layer)
    if mixed.empty:
        mixed.batch.check_rows(x, "adapter_names")
        return base_alone(layer, x, *args, **kwargs)
    pool, p = mixed.pool, mixed.dropout_p
    if args or kwargs or not mixed.fused or pool is None or p is None:
        mixed.batch.check_rows(x, "adapter_names")
        return add_parts(layer, layer.base_layer(x, *args, **kwargs), x, mixed)
    mixed.settle()
    weight, base = layer._weight_by_rows(), layer._modules["base_layer"]
    bias = base._parameters["bias"] if type(base) is nn.Linear else base.bias
    if isinstance(weight, torch.Tensor):
        y = multi_lora_linear(x, weight, pool, mixed.batch, bias, dropout_p=p)
    else:
        # As a quantized layer does by itself: computed in its own dtype, whatever x has.
        dtype = compute_dtype(base, x.dtype)
        y = multi_lora_linear(x.to(dtype), weight, pool, mixed.batch, bias, dropout_p=p).to(x.dtype)
    return _add_biases(layer, y, mixed) if mixed.biased else y


def _repeated(layer: Any, mixed: LayerBatch, x: torch.Tensor) -> torch.Tensor | None:
    """y where the batch's last forward over the layer tells how; `multi_lora_linear` would find the same, at the end of
    a way that takes as long as a product of a few rows. None elsewhere."""
    repeated = None if mixed.empty else mixed.batch.repeated.get(mixed.pool)
    if repeated is None or not mixed.fused or mixed.biased or layer.training is not mixed.training:
        return None
    mixed.settle()
    base = layer._modules["base_layer"]._parameters
    serves = repeated.serves(x, base.get("weight"), base.get("bias"), mixed.pool, mixed.dropout_p)
    return repeated.run(x) if serves else None


def _shared_dropout(layer: Any, names: list[str]) -> float | None:
    """The probability that all these adapters drop with now; None if they differ."""
    held = layer.lora_dropout._modules
    found = {d.p if isinstance(d, nn.Dropout) and d.training else 0.0 for d in (held[name] for name in names)}
    return found.pop() if len(found) == 1 else None if found else 0.0


def _add_biases(layer: Any, y: torch.Tensor, mixed: LayerBatch) -> torch.Tensor:
    """`y` plus scaling times the bias of each row's lora_B."""
    total = mixed.batch.entries(y)
    for name, rows in mixed.rows_of().items():
        if name in mixed.biased:
            index = torch.tensor(rows, device=y.device)
            added = (layer.lora_B[name].bias * layer.scaling[name]).to(y.dtype)
            total = total.index_add(0, index, added.expand(len(rows), *total.shape[1:]))
    return total.view(y.shape)


def add_parts(layer: Any, y: torch.Tensor, x: torch.Tensor, mixed: LayerBatch) -> torch.Tensor:
    """`y` plus each adapter's part for its rows, by calling the adapter's modules; in y's dtype."""
    features = 1 if x.is_floating_point() else 0  # an embedding's input has none
    rows_x, total = mixed.batch.entries(x, features), mixed.batch.entries(y)
    if rows_x is None or total is None:
        mixed.batch.refuse_names(x)
        raise ValueError(
            f"adapter_names: expected an input whose first dimension is the batch, {len(mixed.batch)} rows, got "
            f"{list(x.shape)}"
        )
    for name, rows in mixed.rows_of().items():
        if name not in layer.scaling:
            continue
        index = torch.tensor(rows, device=x.device)
        part = layer._part(rows_x.index_select(0, index), name)
        total = total.index_add(0, index, part.to(y.dtype))
    return total.view(y.shape)
