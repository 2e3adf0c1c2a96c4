"""Mixed batches for tests: adapters of many ranks in a pool, NaN in the rows that nobody owns, and ids."""

from __future__ import annotations

import torch

from numerics import padded_randn
from peftkern_kernels.adapters import Adapters
from peftkern_kernels.routing import Routing, build_routing

RANKS = (3, 0, 16, 1, 64, 8)  # by slot; slot 1 is empty


def make_adapters(
    N: int, K: int, dtype: torch.dtype, device: str, ranks: tuple[int, ...] = RANKS, max_rank: int | None = None
) -> Adapters:
    """Adapters of the given ranks, in pools with an unowned NaN row before and after each, slots in another order."""
    row_offset, at = [0] * len(ranks), 1
    for slot in sorted(range(len(ranks)), key=lambda s: (7 * s + 3) % len(ranks)):
        row_offset[slot] = at
        at += ranks[slot] + 1
    nan = float("nan")
    pool_a = torch.full((at, K), nan, dtype=dtype, device=device)
    pool_b = torch.full((at * N,), nan, dtype=dtype, device=device)
    for offset, rank in zip(row_offset, ranks, strict=True):
        pool_a[offset : offset + rank] = torch.randn(rank, K).to(dtype)
        pool_b[offset * N : (offset + rank) * N] = torch.randn(rank * N).to(dtype)
    scaling = torch.tensor([nan if r == 0 else 0.5 + 0.25 * s for s, r in enumerate(ranks)], dtype=torch.float32)
    return Adapters(
        pool_a=pool_a,
        pool_b=pool_b,
        row_offset=torch.tensor(row_offset, dtype=torch.int32, device=device),
        rank=torch.tensor(ranks, dtype=torch.int32, device=device),
        scaling=scaling.to(device),
        max_rank=max_rank or max(ranks),
        N=N,
    )


def factors(adapters: Adapters, slot: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A [rank, K] and B [N, rank] of a slot in fp64, after they were rounded to `dtype`."""
    offset, rank, N = int(adapters.row_offset[slot]), int(adapters.rank[slot]), adapters.N
    a = adapters.pool_a[offset : offset + rank]
    b = adapters.pool_b[offset * N : (offset + rank) * N].view(N, rank)
    return a.to(dtype).double(), b.to(dtype).double()


def ids_for(M: int, slots: int, kind: str = "mixed") -> torch.Tensor:
    """int64 [M]: slots, -1 and numbers that are no slot; or all of one kind."""
    if kind == "none":
        return torch.full((M,), -1)
    if kind == "one":
        return torch.full((M,), slots - 1)
    generator = torch.Generator().manual_seed(M)
    return torch.randint(-1, slots + 1, (M,), generator=generator)


def routed(M: int, slots: int, device: str, kind: str = "mixed") -> Routing:
    """The routing of such ids."""
    return build_routing(ids_for(M, slots, kind).to(device), slots)


def rows_of(routing: Routing, slot: int) -> torch.Tensor:
    """The batch's rows of a slot, in order."""
    return (routing.ids == slot).nonzero()[:, 0]


def wide(M: int, C: int, dtype: torch.dtype, device: str, *, transposed: bool = False) -> torch.Tensor:
    """[M, C] with NaN between its rows, or the transpose of such a one."""
    if transposed:
        return padded_randn(C, M, pad=3, dtype=dtype, device=device).t()
    return padded_randn(M, C, pad=3, dtype=dtype, device=device)
