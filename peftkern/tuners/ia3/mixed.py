"""A batch whose rows want different IA3 adapters: a layer's forward for it.

    y[m] = (x[m] W^T + b) * l_i, or y[m] = (x[m] * l_i) W^T + b for a feed-forward layer, i the adapter of row m

The vectors of the adapters that the batch names are stacked for each forward, [present, C], with ones for an adapter
that the layer does not have; autograd hands each parameter its own row of the gradient, and one that no row names gets
none. Rows find theirs by its place in that table, worked out once for all layers. Where a layer cannot be one operation
it is called as it is, and each row multiplied by its vector in plain PyTorch.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from peftkern.ops._ia3_linear_torch import slots_of
from peftkern.ops.adapter_route import AdapterBatch
from peftkern.tuners.fusing import base_alone
from peftkern.tuners.mixed import LayerRows, MixedRows, check_batch_axis


class MixedVectors(MixedRows):
    """The IA3 adapters of a model by slot; their vectors stay where they are."""

    def rows_for(self, layer: Any, batch: AdapterBatch, names: Sequence[str | None]) -> LayerRows:
        return LayerVectors(batch, names)


class LayerVectors(LayerRows):
    """A batch as one IA3 layer sees it.

    Attributes:
        here: those of the adapters that rows take which the layer has.
        columns: for each row of the table of vectors the adapter whose vector it is, None for ones.
    """

    __slots__ = ("columns", "here")

    def decide(self, layer: Any, known: bool = False) -> None:
        """Which vectors there are. Before the model runs, so that a compiled one takes the rows' places as given."""
        self.here = [name for name in self.present() if name in layer.ia3_l]
        found = (self.names[slot] for slot in self.slots_present())
        self.columns = [name if name in self.here else None for name in found]
        self.batch.places()

    def table(self, layer: Any) -> torch.Tensor:
        """The vectors [present, C], in the dtype that holds all of theirs."""
        vectors = {name: layer.vector(name) for name in self.here}
        dtype = functools.reduce(torch.promote_types, (vector.dtype for vector in vectors.values()))
        rows: dict[str | None, torch.Tensor] = {name: vector.to(dtype) for name, vector in vectors.items()}
        if None in self.columns:
            rows[None] = torch.ones_like(rows[self.here[0]])
        return torch.stack([rows[name] for name in self.columns])

    def of_batch(self, table: torch.Tensor, device: torch.device) -> torch.Tensor:
        """The vector of each entry of the batch [n, C], ones for none."""
        slots = table.shape[0]
        with_none = torch.cat([table, table.new_ones(1, table.shape[1])])
        return with_none[slots_of(self.batch.places().to(device), slots)]


class _OfBatch(torch.autograd.Function):
    """`t` as it is; backward refuses a checkpointed forward that was computed again under another batch than this.

    The operation cannot: another batch's places in another table may be the same numbers.
    """

    @staticmethod
    def forward(ctx: Any, t: torch.Tensor, batch: AdapterBatch) -> torch.Tensor:
        ctx.save_for_backward(batch.ids)
        ctx.batch = batch
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.batch.refuse_other(ctx.saved_tensors[0], "adapter_names")
        return grad, None


def _table_and_input(layer: Any, mixed: LayerVectors, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The table of vectors, and x, of which one notices another batch if backward passes here at all."""
    table = mixed.table(layer)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        if table.requires_grad:
            return _OfBatch.apply(table, mixed.batch), x
        if x.requires_grad:
            return table, _OfBatch.apply(x, mixed.batch)
    return table, x


def linear_forward(
    layer: Any, mixed: LayerVectors, x: torch.Tensor, args: tuple[Any, ...], kwargs: Any
) -> torch.Tensor:
    """Forward of a linear layer for a batch of many adapters."""
    M = mixed.batch.check_rows(x, "adapter_names")
    if not mixed.here:
        return base_alone(layer, x, *args, **kwargs)
    table, x = _table_and_input(layer, mixed, x)
    if not args and not kwargs and not layer._why_not_fused(mixed.here):
        return layer._fused(x, table, mixed.batch.places_of_rows(x))
    scale = mixed.of_batch(table, x.device)
    each = mixed.batch.rows_of_an_id(x, x.dim() - 1)
    if each:
        scale = scale.repeat_interleave(each, dim=0, output_size=M)
    by_rows = x.shape[:-1] if scale.shape[0] == M else (len(mixed.batch), *(1,) * (x.dim() - 2))
    return layer._scaled_plain(x, scale.view(*by_rows, scale.shape[1]), *args, **kwargs)


def conv_forward(layer: Any, mixed: LayerVectors, x: torch.Tensor, args: Any, kwargs: Any) -> torch.Tensor:
    """Forward of a convolution for a batch of many adapters: x [batch, channels, ...]."""
    n, axes = len(mixed.batch), layer._kernel_dim
    check_batch_axis(mixed.batch, x, axes)
    if not mixed.here:
        return layer.base_layer(x, *args, **kwargs)
    table, x = _table_and_input(layer, mixed, x)
    scale = mixed.of_batch(table, x.device).view(n, -1, *(1,) * (axes - 2))
    return layer._scaled_plain(x, scale, *args, **kwargs)
