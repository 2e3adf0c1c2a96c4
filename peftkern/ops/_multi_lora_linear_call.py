"""Forward and backward of `multi_lora_linear`, whichever door they are called through and whatever path they take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from peftkern.adapter_pool import LayerAdapters, Layout
from peftkern.ops import _multi_lora_linear_torch as plain
from peftkern.ops._lora_linear_fp32 import _row_blocks
from peftkern.ops._lora_linear_torch import dense_rows
from peftkern.ops.adapter_route import AdapterBatch
from peftkern.ops.lora_linear import PLAIN_PATHS
from peftkern.ops.lora_linear_quantized import _dense_blocks
from peftkern.ops.quantize import dequantize
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


def is_plain(path: str) -> bool:
    """Whether a path, also one that begins with "dequantize:", is plain PyTorch."""
    return path.rpartition(":")[2] in PLAIN_PATHS


def forward(x: torch.Tensor, bias: Optional, call: Call, *, keep: bool) -> tuple[torch.Tensor, Optional]:
    """y [..., N], and S [M, max_rank] if it is to be kept."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    weight, adapters, p = call.weight, call.adapters, call.dropout_p
    if isinstance(weight, torch.Tensor) and weight.dtype != x.dtype:
        weight = weight.to(x.dtype)
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    s: Optional = None
    if is_plain(call.path):
        dense_path = call.path.rpartition(":")[2]
        y = _base(rows, weight, bias, dense_path)
        layout, scalings = call.layout()
        groups = call.batch.groups(rows.shape[0], layout)
        if keep:
            s = x.new_zeros(rows.shape[0], adapters.max_rank)
        kept = plain.masks(groups, call.seed, rows.shape[1], p)
        pools = (adapters.pool_a.detach(), adapters.pool_b.detach())
        plain.add_adapters(y, rows, *pools, groups, scalings, kept, p, s, dense_path == "torch_fp32")
    else:
        y, s = _kernel_forward(rows, weight, bias, call, keep)
    return (y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])), s


def _base(rows: torch.Tensor, weight: Any, bias: Optional, path: str) -> torch.Tensor:
    """x W^T + bias, a quantized weight decoded block by block."""
    if isinstance(weight, torch.Tensor):
        return plain.base(rows, weight, bias, path)
    y: Any = None
    for part, dense in _dense_blocks(weight, rows.dtype, path):
        added = plain.base(rows, dense, None if bias is None else bias[part], path)
        if dense.shape[0] == weight.shape[0]:
            return added
        y = rows.new_empty(rows.shape[0], weight.shape[0]) if y is None else y
        y[:, part] = added
    return y


def _base_backward(dy: torch.Tensor, weight: Any, path: str) -> torch.Tensor:
    """dY W [M, K]."""
    if isinstance(weight, torch.Tensor):
        return _times(dy, weight, path)
    dx: Any = None
    for part, dense in _dense_blocks(weight, dy.dtype, path):
        added = _times(dy[:, part], dense, path)
        dx = added if dx is None else dx.add_(added)
    return dx


def _times(dy: torch.Tensor, weight: torch.Tensor, path: str) -> torch.Tensor:
    if path != "torch_fp32":
        return dense_rows(dy).mm(weight)
    dx = dy.new_empty(dy.shape[0], weight.shape[1])
    with torch.autocast("cpu", enabled=False):
        wide = weight.float()
        for rows in _row_blocks(dy.shape[0]):
            dx[rows] = dy[rows].float().mm(wide)
    return dx


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
    weight: Any = call.weight
    N, K = weight.shape
    grad = dy if dy.dim() == 2 else dy.reshape(-1, N)
    rows = x if x is None or x.dim() == 2 else x.reshape(-1, K)
    if isinstance(weight, torch.Tensor) and weight.dtype != dy.dtype:
        weight = weight.to(dy.dtype)
    if is_plain(call.path):
        dx, grads = _plain_backward(grad, rows, s, weight, call, needs_x, needs_adapters)
    else:
        dx, grads = _kernel_backward(grad, rows, s, weight, call, needs_x, needs_adapters)
    if dx is not None and dy.dim() != 2:
        dx = dx.view(*dy.shape[:-1], K)
    dw = (grad.t() @ rows).to(call.weight.dtype) if needs_weight and rows is not None else None
    wide = torch.float32 if dy.dtype.itemsize == 2 else dy.dtype
    dbias = None if bias_dtype is None else grad.sum(0, dtype=wide).to(bias_dtype)
    return dx, dw, dbias, grads


def _plain_backward(
    grad: torch.Tensor, rows: Optional, s: Optional, weight: Any, call: Call, needs_x: bool, needs_adapters: bool
) -> tuple[Optional, list[torch.Tensor]]:
    dense_path = call.path.rpartition(":")[2]
    dx = _base_backward(grad, weight, dense_path) if needs_x else None
    adapters = call.adapters
    layout, scalings = call.layout()
    groups = call.batch.groups(grad.shape[0], layout)
    kept = plain.masks(groups, call.seed, weight.shape[1], call.dropout_p)
    owners = call.owners if needs_adapters else []
    whole = bool(owners) and owners[0][0] == WHOLE_POOL
    slots = range(len(layout.places)) if whole else [slot for slot, _, _ in owners]
    wanted: plain.Gradients = {slot: [None, None] for slot in slots}
    pools = (adapters.pool_a.detach(), adapters.pool_b.detach())
    wide, p = dense_path == "torch_fp32", call.dropout_p
    plain.backward(grad, rows, dx, *pools, groups, scalings, kept, p, s, wanted, wide)
    N, K = weight.shape
    if whole:
        return dx, _pool_gradients(wanted, layout, *pools, N)
    grads: list[torch.Tensor] = []
    for slot, _, rank in owners:
        da, db = wanted[slot]
        grads.append(pools[0].new_zeros(rank, K) if da is None else da)
        grads.append(pools[1].new_zeros(N, rank) if db is None else db)
    return dx, grads


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
    rows: torch.Tensor, weight: Any, bias: Optional, call: Call, keep: bool
) -> tuple[torch.Tensor, Optional]:
    from peftkern.ops import _multi_lora_linear_triton as kernels

    weight, path = _for_kernels(weight, rows.dtype, call.path)
    routing = call.batch.routing(rows.shape[0])
    return kernels.forward(
        rows, weight, call.kernel_adapters(), routing, bias, call.seed, call.dropout_p, path, keep_s=keep
    )


def _kernel_backward(
    grad: torch.Tensor, rows: Optional, s: Optional, weight: Any, call: Call, needs_x: bool, needs_adapters: bool
) -> tuple[Optional, list[torch.Tensor]]:
    from peftkern.ops import _multi_lora_linear_triton as kernels

    N = weight.shape[0]
    weight, path = _for_kernels(weight, grad.dtype, call.path)
    routing = call.batch.routing(grad.shape[0])
    needs = (needs_x, needs_adapters, needs_adapters)
    dx, pool_a, pool_b = kernels.backward(
        grad, rows, weight, call.kernel_adapters(), s, routing, call.seed, call.dropout_p, path, needs
    )
    if pool_a is None or pool_b is None:
        return dx, []
    if call.owners[0][0] == WHOLE_POOL:
        return dx, [pool_a, pool_b]
    grads = []
    for _, first, rank in call.owners:
        grads += [pool_a[first : first + rank], pool_b[first * N : (first + rank) * N].view(N, rank)]
    return dx, grads


def _for_kernels(weight: Any, dtype: torch.dtype, path: str) -> tuple[Any, str]:
    """The weight as the kernels of a path take it, and that path: "dequantize:PATH" is PATH over a dense weight."""
    how, _, dense_path = path.partition(":")
    return (dequantize(weight, dtype), dense_path) if how == "dequantize" else (weight, path)
