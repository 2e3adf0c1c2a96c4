"""Projections of one x that are computed together: what `lora_linear_shared`'s paths know of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch

from peftkern.ops._common import PLAIN_PATHS
from peftkern.ops.plan import path_of_all, path_of_each


def dtype_of_all(lora_As: Sequence[torch.Tensor]) -> torch.dtype:
    """The dtype of A of all projections in one tensor."""
    return functools.reduce(torch.promote_types, (lora_A.dtype for lora_A in lora_As))


@dataclasses.dataclass(slots=True)
class Group:
    """What forward and backward know of the projections beside tensors that learn.

    Attributes:
        weights: the frozen one of each, dense or quantized.
        scalings: a number each.
        columns: each one's of S [M, R], which may have others, also such that are nobody's (_rank_rows.py).
        dropout_p: of all.
        path: of `plan_shared`, `path_of_all` of each one's.
    """

    weights: tuple[Any, ...]
    scalings: tuple[float, ...]
    columns: tuple[slice, ...]
    dropout_p: float
    path: str

    @property
    def is_plain(self) -> bool:
        return self.dense_path in PLAIN_PATHS

    @property
    def dense_path(self) -> str:
        """The path, or on "dequantize:PATH" PATH."""
        return self.path.rpartition(":")[2]

    @property
    def paths(self) -> list[str]:
        """Each projection's path."""
        return path_of_each(self.path, len(self.weights))

    def only(self, which: Sequence[int], dense: Sequence[torch.Tensor | None]) -> Group:
        """The group of these projections, with `dense` weights where there are; their columns of S are as before."""
        weights = tuple(self.weights[i] if dense[i] is None else dense[i] for i in which)
        scalings, columns = tuple(self.scalings[i] for i in which), tuple(self.columns[i] for i in which)
        return Group(weights, scalings, columns, self.dropout_p, path_of_all([self.paths[i] for i in which]))
