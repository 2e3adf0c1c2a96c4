"""Projections of one x, each under many adapters: what is each one's own, and what they must have in common.

How they share a launch: projections.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .adapters import Adapters
from .launch import MOST_PROJECTIONS
from .multi_tile import check_rows
from .projections import numbered
from .routing import Routing


@dataclass(frozen=True, slots=True)
class Projection:
    """What a projection has by itself in the decode launches.

    Attributes:
        adapters: of the layer.
        out: [M, N], written.
        base: x W^T: [M, N], which may be `out` itself, or fp32 [planes, M, N], added in order; None for zeros.
        bias: [N] or None. s_out: [M, max_rank], written with S, or None.
    """

    adapters: Adapters
    out: torch.Tensor
    base: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    s_out: torch.Tensor | None = None


def table_pointers(group: Sequence[Adapters]) -> dict[str, Any]:
    """Where each projection's adapters lie in its pool."""
    return {
        **numbered("row_offset{}_ptr", [a.row_offset for a in group]),
        **numbered("rank{}_ptr", [a.rank for a in group]),
    }


def check_group(group: Sequence[Adapters], routing: Routing, **tensors: torch.Tensor) -> None:
    """ValueError where the projections cannot share a launch, or `tensors` do not have the routing's rows."""
    if not 1 <= len(group) <= MOST_PROJECTIONS:
        raise ValueError(f"projections: expected 1 to {MOST_PROJECTIONS}, got {len(group)}")
    for adapters in group:
        check_rows(adapters, routing, **tensors)
    kinds = {(a.K, a.pool_a.dtype, a.pool_a.stride(0)) for a in group}
    if len(kinds) > 1:
        raise ValueError(f"projections: expected pools of one width, dtype and row stride, got {len(kinds)} kinds")
