"""Forward and backward of `lora_linear_shared`, by plain PyTorch or kernels, for both of its doors."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from peftkern.backend import device_info
from peftkern.ops import _lora_linear_shared_torch as plain
from peftkern.ops._common import stored_apart, unflattened, without_autocast
from peftkern.ops._projection_group import Group
from peftkern.weights import Weight

Optional = torch.Tensor | None


@without_autocast
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
    mask = None
    if group.is_plain:
        ys, s, mask = plain.forward(rows, group, lora_As, lora_Bs, biases, seed)
    else:
        from peftkern.ops import _lora_linear_shared_triton as kernels
        from peftkern.ops._lora_linear_triton import dropout

        drop, arch = dropout(seed, group.dropout_p), device_info(x.device).arch
        ys, s = kernels.forward(rows, group, lora_As, lora_Bs, biases, drop, arch)
    return ys if x.dim() == 2 else [unflattened(y, x.shape[:-1]) for y in ys], s, mask


@without_autocast
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
    parts = (grads, rows, group, lora_As, lora_Bs, s)
    if group.is_plain:
        dx, da, dbs = plain.backward(*parts, mask, needs)
    else:
        from peftkern.ops import _lora_linear_shared_triton as kernels
        from peftkern.ops._lora_linear_triton import dropout

        drop, arch = dropout(seed, group.dropout_p), device_info(grads[0].device).arch
        dx, da, dbs = kernels.backward(*parts, drop, arch, needs)
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
    # Of B's rows only the last stride: ranks may differ.
    factors = {(A.dtype, A.stride(), B.dtype, B.stride(1)) for A, B in zip(lora_As, lora_Bs, strict=True)}
    if len(factors) > 1:
        return "their adapters differ in dtype or strides"
    return stored_apart(weights, biases, addresses)
