"""How far AdaLoRA's factors are from orthogonal: what training adds to the loss.

    R = mean over all A and B of the model of || A A^T - I ||_F and || B^T B - I ||_F

(Zhang et al. 2023, arXiv:2303.10512, equation 4; the norm without its square, and the mean, are PEFT's.) The products
of layers of one rank are stacked, so that all of them take one subtraction and one norm.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


def whole(t: Any) -> torch.Tensor:
    """A tensor that FSDP2 shards, gathered, with its gradient going back to the shards; any other as it is."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def orthogonality(factors: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor | None:
    """R in float32 (float64 of such factors), differentiable; None of no factors.

    Autocast is off within: PEFT's would be computed in 16 bits under it, whose rounding is larger than what is left to
    learn.

    Args:
        factors: For each layer A [r, in] and B [out, r].
    """
    products: dict[tuple[torch.device, int], list[torch.Tensor]] = {}
    for A, B in factors:
        with torch.autocast(A.device.type, enabled=False):
            a, b = (whole(t).to(torch.promote_types(t.dtype, torch.float32)) for t in (A, B))
            products.setdefault((A.device, A.shape[0]), []).extend((a @ a.T, b.T @ b))
    if not products:
        return None
    count = sum(map(len, products.values()))
    device = next(iter(products))[0]
    total: torch.Tensor | None = None
    for (_, rank), each in products.items():
        stacked = torch.stack(each)
        identity = torch.eye(rank, dtype=stacked.dtype, device=stacked.device)
        norms = torch.linalg.vector_norm(stacked - identity, dim=(1, 2)).sum().to(device)
        total = norms if total is None else total + norms
    return None if total is None else total / count
