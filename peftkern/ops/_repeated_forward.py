"""`multi_lora_linear` in plain PyTorch for a batch that comes again: another token, or request, of the same rows.

What a layer's forward works out of the batch, the pool and x's shape is the same then, and costs several times what
the products of a few rows do. `RepeatedForward` is what is left of it: views of the adapters where they lie in the
pool, so that values that change are seen, and a handful of torch's calls. These are the general forward's, in their
order, so that the result is the same to the bit; so the first forward of a batch runs by them too.
"""

from __future__ import annotations

from typing import Any

import torch

from peftkern.adapter_pool import LayerAdapters
from peftkern.backend import backend_in_force
from peftkern.ops._adapter_groups import Group, InOrder
from peftkern.ops._base_product import base
from peftkern.ops._common import in_dtype, makes_plain_tensors
from peftkern.ops._lora_linear_torch import dense_rows
from peftkern.ops._multi_lora_linear_torch import add_products, scale_of, take


class RepeatedForward:
    """y of a batch's rows over one layer on a CPU, without gradients and without dropout.

    Args:
        x, weight, bias, pool: what a forward by `path` is made of, checked, and for which `can_be` holds.
        in_order: the groups of x's rows.
    """

    __slots__ = ("_back", "_given", "_kind", "_order", "_parts", "_path", "_shapes", "_told")

    def __init__(
        self, x: torch.Tensor, weight: Any, bias: torch.Tensor | None, pool: LayerAdapters, path: str, in_order: InOrder
    ) -> None:
        rows, K = x.numel() // x.shape[-1], x.shape[-1]
        self._given = (weight, bias)
        self._told = (pool.layout, pool.scalings, pool.pool_a, pool.pool_b)
        self._kind = (x.dtype, weight.dtype, backend_in_force())
        self._shapes = (x.shape, (rows, K), (*x.shape[:-1], pool.N))
        self._path = path.rpartition(":")[2]
        self._order, self._back, groups = in_order
        self._parts = [_Part(group, pool, x.dtype) for group in groups]

    @staticmethod
    def can_be(x: torch.Tensor, weight: Any, path: str) -> bool:
        """Whether there is one for these: weight, in x's dtype or quantized, and the adapters are multiplied in it."""
        dense = isinstance(weight, torch.Tensor)
        return x.is_cpu and not path.endswith("torch_fp32") and (not dense or weight.dtype is x.dtype)

    def serves(self, x: Any, weight: Any, bias: Any, pool: Any, dropout_p: Any) -> bool:
        """Whether this is the forward that is asked for."""
        if type(x) is not torch.Tensor or x.shape != self._shapes[0] or torch.is_grad_enabled() or dropout_p != 0.0:
            return False
        own_weight, own_bias = self._given
        if weight is not own_weight or bias is not own_bias:
            return False
        layout, scalings, pool_a, pool_b = self._told
        if pool.pool_a is not pool_a or pool.pool_b is not pool_b:
            return False
        if pool.layout is not layout or pool.scalings is not scalings:
            return False
        dtype, weight_dtype, backend = self._kind
        if x.dtype is not dtype or weight.dtype is not weight_dtype or not x.is_cpu:
            return False
        if torch._C._is_any_autocast_enabled() or not makes_plain_tensors():
            return False
        return backend_in_force() == backend

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """y [..., N] of x [..., K], for which `serves` holds."""
        _, flat, shape = self._shapes
        rows = x.reshape(flat)
        rows = dense_rows(rows) if self._order is None else rows.index_select(0, self._order)
        weight, bias = self._given
        y = base(rows, weight, in_dtype(bias, x.dtype), self._path)
        for part in self._parts:
            part.add(rows, y)
        if self._back is not None:
            y = y.index_select(0, self._back)
        return y.view(shape)


class _Part:
    """What one group of rows adds to y."""

    __slots__ = ("_alpha", "_factors", "_group", "_pieces", "_pool", "_scales")

    def __init__(self, group: Group, pool: LayerAdapters, dtype: torch.dtype) -> None:
        self._pieces = (len(group.slots), group.length, pool.K)
        self._group, self._pool = group, (pool.pool_a.detach(), pool.pool_b.detach(), pool.N, dtype)
        # Views, unless the adapters have to be copied together or cast: that is done anew each time.
        self._factors = self._read() if group.offsets is None and pool.pool_a.dtype is dtype else None
        scale: Any = scale_of(group, pool.scalings, 0.0, pool.pool_a.new_empty(0, dtype=dtype))
        self._scales: torch.Tensor | None = scale if isinstance(scale, torch.Tensor) else None
        self._alpha: float = 1.0 if self._scales is not None else scale

    def _read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A [P, K, r] and B [P, r, N]."""
        pool_a, pool_b, N, dtype = self._pool
        a, b = self._group.factors_a(pool_a), self._group.factors_b(pool_b, N)
        return in_dtype(a, dtype).transpose(1, 2), in_dtype(b, dtype).transpose(1, 2)

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """x [M, K] -> y [M, N], added to in place."""
        rows = self._group.rows
        a, b = self._factors or self._read()
        low = torch.bmm(take(x, rows).view(self._pieces), a)
        if self._scales is not None:
            low.mul_(self._scales)
        add_products(y, rows, [(low, b)], None, False, self._alpha)
