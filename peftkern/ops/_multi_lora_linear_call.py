"""Forward and backward of `multi_lora_linear`, whichever door they are called through and whatever path they take.

Written for projections that share x, its batch and its dropout mask; one layer by itself is a group of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from peftkern.adapter_pool import LayerAdapters, Layout
from peftkern.ops import _multi_lora_linear_torch as plain
from peftkern.ops._base_product import add_base_backward, base
from peftkern.ops._common import in_dtype, is_plain, unflattened, without_autocast
from peftkern.ops.adapter_route import AdapterBatch
from peftkern_kernels.adapters import Adapters

WHOLE_POOL = -1  # as an owner's slot: the pools themselves ask for a gradient
Owner = tuple[int, int, int]  # slot, first pool row, rank
Optional = torch.Tensor | None


@dataclass(slots=True)
class Call:
    """What the operation needs beside x, bias and the parameters that learn.

    Attributes:
        weight: dense [N, K] or quantized.
        adapters: `LayerAdapters`, or the kernels' `Adapters`.
        batch: the ids.
        seed: of the dropout masks, None where nothing is dropped.
        dropout_p, path: see `lora_linear`.
        owners: whose parameters the gradients that backward returns belong to.
    """

    weight: Any
    adapters: Any
    batch: AdapterBatch
    seed: torch.Tensor | None
    dropout_p: float
    path: str
    owners: Sequence[Owner]

    def layout(self) -> tuple[Layout, Sequence[float]]:
        """Where the adapters are in the pool, and their scalings, as the host knows them or else reads them."""
        adapters = self.adapters
        if isinstance(adapters, LayerAdapters):
            return adapters.layout, adapters.scalings
        places = zip(adapters.row_offset.tolist(), adapters.rank.tolist(), strict=True)
        return Layout(places), adapters.scaling.tolist()

    def kernel_adapters(self) -> Adapters:
        """The adapters as the kernels take them."""
        held = self.adapters
        return held.kernel_adapters() if isinstance(held, LayerAdapters) else held


def forward(x: torch.Tensor, bias: Optional, call: Call, *, keep: bool) -> tuple[torch.Tensor, Optional]:
    """y [..., N], and S [M, max_rank] if it is to be kept."""
    (y,), (s,) = forward_shared(x, [bias], [call], [keep])
    return y, s


@without_autocast
def forward_shared(
    x: torch.Tensor, biases: Sequence[Optional], calls: Sequence[Call], keeps: Sequence[bool]
) -> tuple[list[torch.Tensor], list[Optional]]:
    """y [..., N] of each projection of x, and S [M, max_rank] of those that are to keep it.

    The calls have one batch, one seed and one path.
    """
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    weights = [_in_dtype(call.weight, x.dtype) for call in calls]
    biases = [in_dtype(bias, x.dtype) for bias in biases]
    run = _plain_forward if is_plain(calls[0].path) else _kernel_forward
    ys, ss = run(rows, weights, biases, calls, keeps)
    return (ys if x.dim() == 2 else [unflattened(y, x.shape[:-1]) for y in ys]), ss


def _in_dtype(weight: Any, dtype: torch.dtype) -> Any:
    """A dense weight in `dtype`; a quantized one as it is."""
    return weight.to(dtype) if isinstance(weight, torch.Tensor) and weight.dtype != dtype else weight


def _plain_forward(
    rows: torch.Tensor,
    weights: Sequence[Any],
    biases: Sequence[Optional],
    calls: Sequence[Call],
    keeps: Sequence[bool],
) -> tuple[list[torch.Tensor], list[Optional]]:
    dense_path = calls[0].path.rpartition(":")[2]
    M, p = rows.shape[0], calls[0].dropout_p
    ys: list[Any] = [None] * len(calls)
    ss: list[Optional] = [None] * len(calls)
    layouts = [call.layout() for call in calls]
    for layout, members in _by_layout(layouts):
        # Rows out of the adapters' order are put into it before the base product, and y back: one gather of each.
        order, back, groups = calls[0].batch.in_order(M, layout)
        x = rows if order is None else rows.index_select(0, order)
        alike = []
        for i in members:
            y = base(x, weights[i], biases[i], dense_path)
            s = rows.new_zeros(M, calls[i].adapters.max_rank) if keeps[i] else None
            alike.append(_projection(y, s, calls[i], layouts[i][1], {}))
        kept = plain.masks(groups, calls[0].seed, rows.shape[1], p)
        plain.add_adapters(x, alike, groups, kept, p, dense_path == "torch_fp32")
        for i, each in zip(members, alike, strict=True):
            ys[i], ss[i] = each.rows, each.s
            if back is not None:
                ys[i] = each.rows.index_select(0, back)
                ss[i] = None if each.s is None else each.s.index_select(0, back)
    return ys, ss


def _projection(
    rows: torch.Tensor, s: Optional, call: Call, scalings: Sequence[float], wanted: plain.Gradients
) -> plain.Projection:
    """What the plain path takes of a call, beside its y or dY and its S."""
    adapters = call.adapters
    return plain.Projection(rows, adapters.pool_a.detach(), adapters.pool_b.detach(), scalings, s, wanted)


def _by_layout(layouts: Sequence[tuple[Layout, Sequence[float]]]) -> list[tuple[Layout, Sequence[int]]]:
    """Which projections' adapters lie alike, so that their groups are the same."""
    if len(layouts) == 1:  # hashing would cost more than all of this
        return [(layouts[0][0], (0,))]
    found: dict[Layout, list[int]] = {}
    for i, (layout, _) in enumerate(layouts):
        found.setdefault(layout, []).append(i)
    return list(found.items())


@without_autocast
def backward(
    dy: torch.Tensor,
    x: Optional,
    s: Optional,
    call: Call,
    needs_x: bool,
    needs_weight: bool,
    bias_dtype: torch.dtype | None,
    needs_adapters: bool,
) -> tuple[Optional, Optional, Optional, list[torch.Tensor]]:
    """Gradients of x [..., K], weight, bias (where it has a dtype), and of each owner's A and B in turn.

    The latter are in the pools' dtype; all of them or none.
    """
    dx, (grads,) = backward_shared([dy], x, [s], [call], needs_x, [needs_adapters])
    grad = _flat(dy)
    dw = (grad.t() @ _flat(x)).to(call.weight.dtype) if needs_weight and x is not None else None
    wide = torch.float32 if dy.dtype.itemsize == 2 else dy.dtype
    dbias = None if bias_dtype is None else grad.sum(0, dtype=wide).to(bias_dtype)
    return dx, dw, dbias, grads


@without_autocast
def backward_shared(
    dys: Sequence[torch.Tensor],
    x: Optional,
    ss: Sequence[Optional],
    calls: Sequence[Call],
    needs_x: bool,
    needs_adapters: Sequence[bool],
) -> tuple[Optional, list[list[torch.Tensor]]]:
    """The gradient of x [..., K], one buffer for all projections, and those of each one's owners as in `backward`.

    The calls are those of the projections whose dY there is.
    """
    dy = dys[0]
    grads = [_flat(each) for each in dys]
    weights = [_in_dtype(call.weight, dy.dtype) for call in calls]
    run = _plain_backward if is_plain(calls[0].path) else _kernel_backward
    dx, found = run(grads, None if x is None else _flat(x), ss, weights, calls, needs_x, needs_adapters)
    return (dx if dx is None or dy.dim() == 2 else dx.view(*dy.shape[:-1], dx.shape[1])), found


def _flat(t: torch.Tensor) -> torch.Tensor:
    return t if t.dim() == 2 else t.reshape(-1, t.shape[-1])


def _plain_backward(
    grads: Sequence[torch.Tensor],
    rows: Optional,
    ss: Sequence[Optional],
    weights: Sequence[Any],
    calls: Sequence[Call],
    needs_x: bool,
    needs_adapters: Sequence[bool],
) -> tuple[Optional, list[list[torch.Tensor]]]:
    dense_path, p = calls[0].path.rpartition(":")[2], calls[0].dropout_p
    dx: Optional = None
    if needs_x:
        for grad, weight in zip(grads, weights, strict=True):
            dx = add_base_backward(dx, grad, weight, dense_path)
    M, K = grads[0].shape[0], weights[0].shape[1]
    wants = [_wanted(call) if needs else {} for call, needs in zip(calls, needs_adapters, strict=True)]
    layouts = [call.layout() for call in calls]
    parts = zip(grads, ss, calls, layouts, wants, strict=True)
    projections = [_projection(grad, s, call, layout[1], wanted) for grad, s, call, layout, wanted in parts]
    for layout, members in _by_layout(layouts):
        groups = calls[0].batch.groups(M, layout)
        kept = plain.masks(groups, calls[0].seed, K, p)
        alike = [projections[i] for i in members]
        plain.backward(rows, dx, alike, groups, kept, p, dense_path == "torch_fp32")
    return dx, [_gradients(*each) for each in zip(projections, calls, layouts, strict=True)]


def _wanted(call: Call) -> plain.Gradients:
    """Room for the gradients of the slots that the call's owners have."""
    whole = bool(call.owners) and call.owners[0][0] == WHOLE_POOL
    slots = range(call.adapters.rank.shape[0]) if whole else [slot for slot, _, _ in call.owners]
    return {slot: [None, None] for slot in slots}


def _gradients(projection: plain.Projection, call: Call, layout: tuple[Layout, Sequence[float]]) -> list[torch.Tensor]:
    """The gradients of the call's owners, A and B in turn; zeros where an owner has no rows."""
    wanted, pool_a, pool_b = projection.wanted, projection.pool_a, projection.pool_b
    N, K = projection.rows.shape[1], pool_a.shape[1]
    if not wanted:
        return []
    if call.owners[0][0] == WHOLE_POOL:
        return _pool_gradients(wanted, layout[0], pool_a, pool_b, N)
    grads: list[torch.Tensor] = []
    for slot, _, rank in call.owners:
        da, db = wanted[slot]
        grads.append(pool_a.new_zeros(rank, K) if da is None else da)
        grads.append(pool_b.new_zeros(N, rank) if db is None else db)
    return grads


def _pool_gradients(
    wanted: plain.Gradients, layout: Layout, pool_a: torch.Tensor, pool_b: torch.Tensor, N: int
) -> list[torch.Tensor]:
    """Each slot's gradients where its factors lie in the pools, and zeros elsewhere."""
    grads = [torch.zeros_like(pool_a), torch.zeros_like(pool_b)]
    for slot, (da, db) in wanted.items():
        first, rank = layout.places[slot]
        if da is not None and db is not None:
            grads[0][first : first + rank] = da
            grads[1][first * N : (first + rank) * N] = db.reshape(-1)
    return grads


def _kernel_forward(
    rows: torch.Tensor,
    weights: Sequence[Any],
    biases: Sequence[Optional],
    calls: Sequence[Call],
    keeps: Sequence[bool],
) -> tuple[list[torch.Tensor], list[Optional]]:
    from peftkern.ops import _multi_lora_linear_triton as kernels

    first = calls[0]
    routing = first.batch.routing(rows.shape[0])
    each = zip(weights, calls, biases, strict=True)
    layers = [kernels.Layer(weight, call.kernel_adapters(), bias) for weight, call, bias in each]
    ys, ss = kernels.forward(rows, layers, routing, first.seed, first.dropout_p, first.path, keep_s=any(keeps))
    return ys, [s if keep else None for s, keep in zip(ss, keeps, strict=True)]


def _kernel_backward(
    grads: Sequence[torch.Tensor],
    rows: Optional,
    ss: Sequence[Optional],
    weights: Sequence[Any],
    calls: Sequence[Call],
    needs_x: bool,
    needs_adapters: Sequence[bool],
) -> tuple[Optional, list[list[torch.Tensor]]]:
    from peftkern.ops import _multi_lora_linear_triton as kernels

    first = calls[0]
    routing = first.batch.routing(grads[0].shape[0])
    needs = (needs_x, tuple((needs, needs) for needs in needs_adapters))
    layers = [kernels.Layer(weight, call.kernel_adapters()) for weight, call in zip(weights, calls, strict=True)]
    dx, pools = kernels.backward(grads, rows, layers, ss, routing, first.seed, first.dropout_p, first.path, needs)
    return dx, [_of_owners(call, *pair) for call, pair in zip(calls, pools, strict=True)]


def _of_owners(call: Call, pool_a: Optional, pool_b: Optional) -> list[torch.Tensor]:
    """Each owner's part of its pools' gradients."""
    if pool_a is None or pool_b is None:
        return []
    if call.owners[0][0] == WHOLE_POOL:
        return [pool_a, pool_b]
    N, found = call.weight.shape[0], []
    for _, first, rank in call.owners:
        found += [pool_a[first : first + rank], pool_b[first * N : (first + rank) * N].view(N, rank)]
    return found
