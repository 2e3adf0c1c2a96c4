"""Forward and backward of `lora_linear_shared`, by plain PyTorch or kernels, for both of its doors."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from peftkern.backend import device_info
from peftkern.ops import _lora_linear_shared_torch as plain
from peftkern.ops._common import storage
from peftkern.ops.lora_linear import PLAIN_PATHS
from peftkern.weights import Weight

Optional = torch.Tensor | None


@dataclasses.dataclass(slots=True)
class Group:
    """What forward and backward know of the projections beside tensors that learn: weights that are frozen, scalings,
    each one's columns of S, the dropout, and the path."""

    weights: tuple[Any, ...]
    scalings: tuple[float, ...]
    columns: tuple[slice, ...]
    dropout_p: float
    path: str

    @property
    def is_plain(self) -> bool:
        return self.path.rpartition(":")[2] in PLAIN_PATHS

    def only(self, which: Sequence[int], dense: Sequence[Optional]) -> Group:
        """The group of these projections, with `dense` weights where there are; their columns of S are as before."""
        weights = tuple(self.weights[i] if dense[i] is None else dense[i] for i in which)
        scalings, columns = tuple(self.scalings[i] for i in which), tuple(self.columns[i] for i in which)
        return Group(weights, scalings, columns, self.dropout_p, self.path)


def forward_shared(
    x: torch.Tensor,
    group: Group,
    lora_As: Sequence[torch.Tensor],
    lora_Bs: Sequence[torch.Tensor],
    biases: Sequence[Optional],
    seed: Optional,
) -> tuple[list[torch.Tensor], torch.Tensor, Optional]:
    """Each y [..., N], S [M, R], and a mask [M, K] on the plain path with dropout."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    parts = (rows, group.weights, lora_As, lora_Bs, group.scalings, biases, group.columns)
    mask = None
    if group.is_plain:
        ys, s, mask = plain.forward(*parts, group.dropout_p, seed, group.path.rpartition(":")[2])
    else:
        from peftkern.ops import _lora_linear_shared_triton as kernels
        from peftkern.ops._lora_linear_triton import dropout

        arch = device_info(x.device).arch
        ys, s = kernels.forward(*parts, dropout(seed, group.dropout_p), group.path, arch)
    return ys if x.dim() == 2 else [y.view(*x.shape[:-1], y.shape[1]) for y in ys], s, mask


def backward_shared(
    dys: Sequence[torch.Tensor],
    x: Optional,
    group: Group,
    lora_As: Sequence[torch.Tensor],
    lora_Bs: Sequence[torch.Tensor],
    s: Optional,
    mask: Optional,
    seed: Optional,
    needs: tuple[bool, bool, Sequence[bool]],
) -> tuple[Optional, Optional, list[Optional]]:
    """Gradients of x [..., K], of A of all projections [R, K] and of each B."""
    shape = dys[0].shape[:-1]
    grads = [dy if dy.dim() == 2 else dy.reshape(-1, dy.shape[-1]) for dy in dys]
    rows = x if x is None or x.dim() == 2 else x.reshape(-1, x.shape[-1])
    parts = (grads, rows, group.weights, lora_As, lora_Bs, s)
    if group.is_plain:
        path = group.path.rpartition(":")[2]
        options = (mask, group.scalings, group.columns, group.dropout_p, needs, path)
        dx, da, dbs = plain.backward(*parts, *options)
    else:
        from peftkern.ops import _lora_linear_shared_triton as kernels
        from peftkern.ops._lora_linear_triton import dropout

        drop, arch = dropout(seed, group.dropout_p), device_info(grads[0].device).arch
        dx, da, dbs = kernels.backward(*parts, group.scalings, group.columns, drop, group.path, arch, needs)
    return None if dx is None else dx.view(*shape, dx.shape[1]), da, dbs


def launched_apart(
    weights: Sequence[Weight],
    lora_As: Sequence[torch.Tensor],
    lora_Bs: Sequence[torch.Tensor],
    biases: Sequence[Optional],
    *,
    addresses: bool = True,
) -> str:
    """What one launch of the decode kernels cannot have two of, in words; "" for nothing.

    Without `addresses` tensors need have none (torch.compile's, fake ones), and what depends on them is not told.
    """
    if len({storage(weight, addresses) for weight in weights}) > 1:
        return "their weights are stored differently"
    # Of B's rows only the last stride: ranks may differ.
    factors = {(A.dtype, A.stride(), B.dtype, B.stride(1)) for A, B in zip(lora_As, lora_Bs, strict=True)}
    if len(factors) > 1:
        return "their adapters differ in dtype or strides"
    if len({None if bias is None else bias.stride(0) for bias in biases}) > 1:
        return "some have a bias and some have not, or they lie differently"
    return ""
