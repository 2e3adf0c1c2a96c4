"""The adapters of one layer as the kernels take them: two pools of rank rows, and tables that say whose they are.

Adapters of different ranks lie one after another, so that a mixed batch pads nothing. Everything that changes when an
adapter comes or goes is a tensor that is written in place: a captured graph keeps working.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Adapters:
    """Adapters of a layer with weight [N, K].

    Attributes:
        pool_a: [rank_rows, K], rows contiguous; adapter s has the rows row_offset[s] .. row_offset[s] + rank[s].
        pool_b: flat [rank_rows * N], contiguous, of pool_a's dtype; adapter s has the rank[s] * N elements from
            row_offset[s] * N on, which are its lora_B [N, rank[s]], row by row.
        row_offset: int32 [slots]. rank: int32 [slots], 0 where a slot is empty. scaling: float32 [slots].
        max_rank: the largest rank that the capacity allows: the width of S and what grids are sized for.
        N: out_features.
    """

    pool_a: torch.Tensor
    pool_b: torch.Tensor
    row_offset: torch.Tensor
    rank: torch.Tensor
    scaling: torch.Tensor
    max_rank: int
    N: int

    @property
    def K(self) -> int:
        """in_features."""
        return self.pool_a.shape[1]

    @property
    def slots(self) -> int:
        """Adapters that there is room for."""
        return self.rank.shape[0]
