"""Batches over many adapters: what is measured, its operands, its results in float64, and its physical limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from bench.check import WrongResultError, relative_error, tolerance
from peftkern_kernels.adapters import Adapters

LEAST_SLOTS = 8  # of a decode step; more tokens have as many
HEADLINE = (4096, 4096)  # K, N
SHAPES = (HEADLINE, (4096, 14336), (14336, 4096), (4096, 6144))
DECODE_TOKENS = (1, 4, 16, 64)
PREFILL_TOKENS = (512, 2048, 8192)
ADAPTERS = (1, 4, 16, 64)
KINDS = ("distinct", "uniform", "skewed", "identical")
RANK = 16
MIXED = (8, 16, 32, 64)  # in turn, slot by slot
SMOKE_SHAPE = (64, 48)


@dataclass(frozen=True, slots=True)
class Case:
    """One batch.

    Attributes:
        part: "decode": the low-rank pair alone; "prefill": a whole layer forward; "train": forward and backward.
        M, K, N: tokens, in_features, out_features. slots: adapters that there is room for.
        ids: what the tokens want, see `make_ids`.
        ranks: of the slots, in turn.
    """

    part: str
    M: int
    K: int
    N: int
    slots: int
    ids: str
    ranks: tuple[int, ...]
    dtype: torch.dtype

    @property
    def key(self) -> str:
        """Unique within a run, and readable: "decode K4096 N4096 M64 distinct r16"."""
        ranks = "r" + "+".join(map(str, self.ranks))
        who = self.ids if self.part == "decode" else f"{self.slots} adapters"
        return f"{self.part} K{self.K} N{self.N} M{self.M} {who} {ranks}"


def decode_cases(shapes: Sequence[tuple[int, int]], tokens: Sequence[int], dtype: torch.dtype) -> list[Case]:
    """All ids at rank 16; distinct ids of mixed ranks, and with every other row on the base alone."""
    cases = []
    for K, N in shapes:
        for M in tokens:
            kinds = [*(KINDS if M > 1 else KINDS[:1]), *(["half base"] if M > 1 else [])]
            slots = max(LEAST_SLOTS, M)
            cases += [Case("decode", M, K, N, slots, kind, (RANK,), dtype) for kind in kinds]
            cases.append(Case("decode", M, K, N, slots, "distinct", MIXED, dtype))
    return cases


def layer_cases(
    part: str, shapes: Sequence[tuple[int, int]], tokens: Sequence[int], slots: Sequence[int], dtype: torch.dtype
) -> list[Case]:
    """A sequence for each adapter, of M / slots tokens."""
    return [
        Case(part, M, K, N, n, "sequences", (RANK,), dtype)
        for K, N in shapes
        for M in tokens
        for n in slots
        if M % n == 0
    ]


def smoke_cases(parts: Sequence[str], dtype: torch.dtype) -> list[Case]:
    """Tiny ones, of every kind."""
    K, N = SMOKE_SHAPE
    cases = [
        Case("decode", 1, K, N, 6, "distinct", (16,), dtype),
        Case("decode", 5, K, N, 6, "half base", (8, 16), dtype),
        Case("prefill", 24, K, N, 3, "sequences", (16,), dtype),
        Case("train", 24, K, N, 3, "sequences", (16,), dtype),
    ]
    return [case for case in cases if case.part in parts]


def make_ids(kind: str, M: int, slots: int) -> torch.Tensor:
    """int32 [M] on the CPU.

    "distinct": a slot each, in no order. "uniform": any. "skewed": slot floor(slots * u^3) of a uniform u, so that the
    most wanted eighth of the slots has half of the tokens. "identical": one for all. "half base": distinct, and -1 in
    every other row. "sequences": M / slots tokens of each, in no order of slots.
    """
    generator = torch.Generator().manual_seed(M)
    order = torch.randperm(slots, generator=generator)
    if kind == "sequences":
        ids = order.repeat_interleave(M // slots)
    elif kind == "identical":
        ids = order[:1].expand(M)
    elif kind in ("distinct", "half base"):
        ids = order.repeat(-(-M // slots))[:M]
    else:
        u = torch.rand(M, generator=generator)
        ids = (slots * (u if kind == "uniform" else u**3)).long()
    ids = ids.int().clone()
    if kind == "half base":
        ids[::2] = -1
    return ids


class Pool:
    """Adapters of one layer with weight [N, K], as everybody wants them.

    A [slots, max_rank, K] and B [slots, N, max_rank], zeros past a slot's rank, ~ N(0, 1/K) and N(0, 1/(4 rank));
    scaling 1 to 2; the same as peftkern's pools (`adapters`).
    """

    def __init__(self, case: Case, device: torch.device) -> None:
        K, N, slots = case.K, case.N, case.slots
        generator = torch.Generator(device).manual_seed(0)
        self.ranks = [case.ranks[s % len(case.ranks)] for s in range(slots)]
        self.max_rank = R = max(self.ranks)
        self.A = torch.zeros(slots, R, K, dtype=case.dtype, device=device)
        self.B = torch.zeros(slots, N, R, dtype=case.dtype, device=device)
        for s, rank in enumerate(self.ranks):
            a = torch.randn(rank, K, generator=generator, device=device)
            b = torch.randn(N, rank, generator=generator, device=device)
            self.A[s, :rank] = (a * K**-0.5).to(case.dtype)
            self.B[s, :, :rank] = (b * 0.5 * rank**-0.5).to(case.dtype)
        self.scaling = 1 + torch.arange(slots, dtype=torch.float32, device=device) / slots
        self.rank = torch.tensor(self.ranks, dtype=torch.int32, device=device)

    @cached_property
    def adapters(self) -> Adapters:
        """One after another, nothing between."""
        rows = self.rank.cumsum(0, dtype=torch.int32) - self.rank
        pool_a = torch.cat([self.A[s, :rank] for s, rank in enumerate(self.ranks)])
        pool_b = torch.cat([self.B[s, :, :rank].reshape(-1) for s, rank in enumerate(self.ranks)])
        return Adapters(pool_a, pool_b, rows, self.rank, self.scaling, self.max_rank, self.B.shape[1])

    @cached_property
    def scaled_B(self) -> torch.Tensor:
        """B with the scaling in it, for those who scale when an adapter is loaded."""
        return (self.B * self.scaling[:, None, None]).to(self.B.dtype)


class Batch:
    """The operands of a case on a device: x [M, K] and dy, y0 [M, N] of unit scale, W [N, K] ~ N(0, 1/K), and ids."""

    def __init__(self, case: Case, pool: Pool, device: torch.device) -> None:
        self.case, self.pool, self.device = case, pool, device
        generator = torch.Generator(device).manual_seed(1)

        def normal(rows: int, columns: int, scale: float = 1.0) -> torch.Tensor:
            return torch.randn(rows, columns, generator=generator, device=device).mul_(scale).to(case.dtype)

        self.host_ids = make_ids(case.ids, case.M, case.slots)
        self.ids = self.host_ids.to(device)
        self.x, self.y0 = normal(case.M, case.K), normal(case.M, case.N)
        self.present = sorted(set(self.host_ids.tolist()) - {-1})
        if case.part != "decode":
            self.weight, self.dy = normal(case.N, case.K, case.K**-0.5), normal(case.M, case.N)

    def rows_of(self, slot: int) -> torch.Tensor:
        """The rows of one slot, on the device."""
        return (self.host_ids == slot).nonzero()[:, 0].to(self.device)

    def factors(self, slot: int) -> tuple[torch.Tensor, torch.Tensor, float]:
        """A [rank, K], B [N, rank] in float64, and the scaling."""
        rank = self.pool.ranks[slot]
        a, b = self.pool.A[slot, :rank].double(), self.pool.B[slot, :, :rank].double()
        return a, b, self.pool.scaling[slot].item()

    def add_delta(self, y: torch.Tensor) -> torch.Tensor:
        """float64 y [M, N] plus the adapters' part, in place."""
        for slot in self.present:
            rows, (a, b, scale) = self.rows_of(slot), self.factors(slot)
            y[rows] += scale * (self.x[rows].double() @ a.T) @ b.T
        return y

    @cached_property
    def truth(self) -> dict[str, torch.Tensor]:
        """float64 results: "y"; of "train" also "dX", and "dA", "dB" in the order of the slots that are present."""
        if self.case.part == "decode":
            return {"y": self.add_delta(self.y0.double())}
        weight = self.weight.double()
        truth = {"y": self.add_delta(self.x.double() @ weight.T)}
        if self.case.part == "train":
            dx, das, dbs = self.dy.double() @ weight, [], []
            for slot in self.present:
                rows, (a, b, scale) = self.rows_of(slot), self.factors(slot)
                x, dy = self.x[rows].double(), self.dy[rows].double()
                ds = scale * dy @ b
                dx[rows] += ds @ a
                das.append((ds.T @ x).reshape(-1))
                dbs.append((dy.T @ (scale * x @ a.T)).reshape(-1))
            truth |= {"dX": dx, "dA": torch.cat(das), "dB": torch.cat(dbs)}
        return truth

    def check(self, got: dict[str, torch.Tensor]) -> dict[str, float]:
        """Relative errors of the results that are given.

        Raises:
            WrongResultError: one is outside its bound.
        """
        bound = tolerance(self.case.dtype, max(self.case.K, self.case.N, self.case.M))
        errors = {}
        for name, value in got.items():
            truth = self.truth[name]
            if value.shape != truth.shape:
                raise WrongResultError(f"{name}: shape {tuple(value.shape)}, expected {tuple(truth.shape)}")
            errors[name] = relative_error(value, truth)
            if not errors[name] <= bound:
                raise WrongResultError(f"{name}: relative error {errors[name]:.2e} (bound {bound:.2e})")
        return errors

    @property
    def adapter_bytes(self) -> int:
        """Of the distinct adapters that the batch wants."""
        size = self.case.dtype.itemsize
        return sum(self.pool.ranks[s] for s in self.present) * (self.case.K + self.case.N) * size

    @property
    def pair_bytes(self) -> int:
        """What shrink and expand must move: distinct adapters once; x read, y read and written, of rows with one."""
        rows = int((self.host_ids >= 0).sum())
        return self.adapter_bytes + rows * (self.case.K + 2 * self.case.N) * self.case.dtype.itemsize

    @property
    def pair_flops(self) -> int:
        """Multiply-adds of shrink and expand, 2 for each."""
        ranks = torch.tensor([*self.pool.ranks, 0])[self.host_ids.long()]  # -1 takes the last
        return 2 * int(ranks.sum()) * (self.case.K + self.case.N)
