"""The grid of real calls whose kernel launches the static check compiles; over 4-bit weights, of DoRA, of IA3, over
many adapters, of projections that share x, of gated MLPs and over experts: static_cases_4bit.py, _dora.py, _ia3.py,
_multi.py, _shared.py, _gated.py and _experts.py.

A case is an operation with its sizes, dtypes and options. Its launches are the library's own: tensors on the meta
device go through `plan` and the functions that an operation takes its launches from; what is compiled would run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from bench.static_cases_4bit import Case4bit, all_cases_4bit, quick_cases_4bit
from bench.static_cases_dora import DoraLinear, all_cases_dora, quick_cases_dora
from bench.static_cases_experts import Experts, all_cases_experts, quick_cases_experts
from bench.static_cases_gated import Gated, all_cases_gated, quick_cases_gated
from bench.static_cases_ia3 import IA3Linear, all_cases_ia3, quick_cases_ia3
from bench.static_cases_multi import MultiLoraLinear, MultiLoraLinearShared, all_cases_multi
from bench.static_cases_shared import LoraLinearShared, all_cases_shared
from peftkern.backend import DeviceInfo
from peftkern.ops import _lora_linear_triton
from peftkern.ops.plan import plan_lora_embedding, plan_lora_linear
from peftkern_kernels.dropout import Dropout
from peftkern_kernels.launch import Call
from peftkern_kernels.lora_embedding import embedding_backward_calls, embedding_forward_calls

HALF = torch.bfloat16
S1: dict[str, Any] = {"M": 8192, "K": 4096, "N": 4096, "R": 16}
S2: dict[str, Any] = {"M": 4096, "K": 4096, "N": 14336, "R": 64}
# (K, N) of the projections of an 8B Llama: q and o; k and v; gate and up; down.
LLAMA_8B = ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096))
# Rows of 4095 elements are not 16-byte aligned; rows of 4104 are, but Triton only looks for multiples of 16 elements.
AWKWARD = ((4095, 4096), (4096, 4095), (4104, 4104))
TOKENS = (1, 16, 512, 4096, 8192)
RANKS = (8, 16, 64, 128)


@dataclass(frozen=True, slots=True)
class LoraLinear:
    """A call of `lora_linear` with its backward.

    Attributes:
        M, K, N, R: tokens, in_features, out_features, rank.
        dtype: of x and the weight. masters: whether the adapters are fp32 whatever that is.
        dropout, bias: whether there is any.
        conv1d: whether the weight is the transpose of a [K, N] matrix, as in Conv1D.
        path: "auto" for the plan's, or one that is forced.
        dx: whether x needs a gradient.
    """

    M: int
    K: int
    N: int
    R: int
    dtype: torch.dtype = HALF
    masters: bool = False
    dropout: bool = False
    bias: bool = False
    conv1d: bool = False
    path: str = "auto"
    dx: bool = True

    @property
    def aligned(self) -> bool:
        """Whether every row of x, weight and y starts at a multiple of 16 elements, as Triton's wide copies ask."""
        return self.K % 16 == 0 and self.N % 16 == 0

    def label(self) -> str:
        """The case in a few words."""
        words = [f"M{self.M} K{self.K} N{self.N} r{self.R} {str(self.dtype).removeprefix('torch.')}"]
        words += [name for name in ("masters", "dropout", "bias", "conv1d") if getattr(self, name)]
        words += ["" if self.dx else "no dX", "" if self.path == "auto" else f"path={self.path}"]
        return " ".join(filter(None, words))

    def launches(self, arch: int) -> list[Call]:
        """The kernel launches of forward and backward on an architecture; cuBLAS's are left out."""
        x = torch.empty(self.M, self.K, dtype=self.dtype, device="meta")
        weight = x.new_empty(self.K, self.N).t() if self.conv1d else x.new_empty(self.N, self.K)
        adapter = torch.float32 if self.masters else self.dtype
        lora_A, lora_B = x.new_empty(self.R, self.K, dtype=adapter), x.new_empty(self.N, self.R, dtype=adapter)
        bias = x.new_empty(self.N) if self.bias else None
        dropout = Dropout(x.new_empty(1, dtype=torch.int64), 0.1) if self.dropout else None
        path = self.path if self.path != "auto" else self.plan(arch)
        if path == "torch":
            return []
        y, s, forward = _lora_linear_triton.forward_calls(x, weight, lora_A, lora_B, 2.0, bias, dropout, path, arch)
        *_, backward = _lora_linear_triton.backward_calls(
            torch.empty_like(y), x, weight, lora_A, lora_B, s, 2.0, dropout, path, arch, (self.dx, True, True)
        )
        return [call for call in (*forward, *backward) if isinstance(call, Call)]

    def plan(self, arch: int) -> str:
        """The path that the library takes by itself."""
        weight_row = self.N if self.conv1d else self.K
        aligned = all(row * self.dtype.itemsize % 16 == 0 for row in (self.K, weight_row))
        sizes = {"M": self.M, "N": self.N, "K": self.K, "R": self.R}
        return plan_lora_linear(**sizes, dtype=self.dtype, device=DeviceInfo("cuda", arch), aligned=aligned).path


@dataclass(frozen=True, slots=True)
class LoraEmbedding:
    """A call of `lora_embedding` with its backward: T tokens, a table of V rows of E elements, rank R."""

    T: int
    V: int
    E: int
    R: int
    dtype: torch.dtype = HALF
    masters: bool = False

    @property
    def aligned(self) -> bool:
        """Whether every row that its loop loads, which runs over the rank, starts at a multiple of 16 elements."""
        return self.E % 16 == 0 and self.R % 16 == 0

    def label(self) -> str:
        """The case in a few words."""
        masters = " masters" if self.masters else ""
        return f"embedding T{self.T} V{self.V} E{self.E} r{self.R} {str(self.dtype).removeprefix('torch.')}{masters}"

    def launches(self, arch: int) -> list[Call]:
        """The kernel launches of forward and backward on an architecture."""
        if plan_lora_embedding(self.T, self.dtype, DeviceInfo("cuda", arch)).path != "triton":
            return []
        weight = torch.empty(self.V, self.E, dtype=self.dtype, device="meta")
        adapter = torch.float32 if self.masters else self.dtype
        lora_A, lora_B = (
            weight.new_empty(self.R, self.V, dtype=adapter),
            weight.new_empty(self.E, self.R, dtype=adapter),
        )
        ids = weight.new_empty(self.T, dtype=torch.int64)
        y, s = weight.new_empty(self.T, self.E), weight.new_empty(self.T, self.R)
        da, db = torch.empty_like(lora_A), torch.empty_like(lora_B)
        forward = embedding_forward_calls(ids, weight, lora_A, lora_B, y, s, scaling=2.0, arch=arch)
        backward = embedding_backward_calls(y, ids, lora_B, s, da, db, scaling=2.0, arch=arch)
        return [call for call in (*forward, *backward) if isinstance(call, Call)]


Case = (
    LoraLinear | LoraEmbedding | Case4bit | DoraLinear | IA3Linear | MultiLoraLinear | LoraLinearShared
    | MultiLoraLinearShared | Experts | Gated
)  # fmt: skip


def quick_cases() -> list[Case]:
    """A handful: the headline shape, forward and backward, and one token; the same over a 4-bit weight."""
    linear = [LoraLinear(**S1), LoraLinear(**{**S1, "M": 1})]
    others = [*quick_cases_4bit(), *quick_cases_dora(), *quick_cases_ia3(), *quick_cases_gated()]
    return [*linear, *others, *quick_cases_experts()]


def embedding_cases() -> list[Case]:
    """An 8B Llama's table, and one whose rows are not aligned."""
    llama = [LoraEmbedding(T, 128_256, 4096, R) for T, R in product((1, 512, 8192), (8, 16, 64))]
    variants = [
        replace(llama[-2], masters=True),
        *(replace(llama[-2], dtype=d) for d in (torch.float16, torch.float32)),
    ]
    return [*llama, *variants, replace(llama[-2], E=4095)]


def odd_ranks() -> list[LoraLinear]:
    """Ranks that are no multiple of 16, one below each block of ranks: loads of single elements, each with a mask."""
    square = [LoraLinear(M, 4096, 4096, R) for M, R in product((512, 8192), (12, 20, 36))]
    square += [replace(case, dropout=True) for case in square]
    masters = [LoraLinear(8192, 4096, 4096, R, masters=True, dropout=R != 36) for R in (12, 20, 36)]
    few = [LoraLinear(16, 4096, 4096, R, dropout=R == 12) for R in (12, 36)]
    wide = [LoraLinear(M, 4096, 4096, 100, dropout=M == 8192, masters=True) for M in (512, 8192)]
    # Rows of S that are no multiples of 16 bytes.
    first = LoraLinear(**{**S1, "R": 4})
    gaps = [first, replace(first, conv1d=True), replace(first, R=12, masters=True)]
    gaps.append(replace(first, R=12, dtype=torch.float16))
    return [*square, *masters, *few, *wide, *gaps]


def all_cases() -> list[Case]:
    """The whole grid: sizes and ranks in bfloat16, then what changes the code, one thing at a time, on the way."""
    llama = [
        LoraLinear(M, K, N, R, dropout=dropout)
        for (K, N), M, R, dropout in product(LLAMA_8B, TOKENS, RANKS, (False, True))
        if R == 16 or (K == N and not (dropout and R in (8, 128)))
    ]
    headline = [LoraLinear(**S1), LoraLinear(**S2)]
    sizes = [replace(LoraLinear(**S1), M=M, R=R) for M, R in product((1, 16, 512, 8192), (16, 64))]
    variants = [
        replace(case, dropout=dropout, **variant)
        for case, variant, dropout in product(sizes, ({"masters": True}, {"dtype": torch.float32}), (False, True))
    ]
    # fp16 compiles to what bf16 compiles to, but for the instructions' types.
    variants += [replace(case, dtype=torch.float16) for case in sizes]
    variants += [replace(case, dtype=torch.float16, dropout=True, masters=True) for case in sizes[-2:]]
    awkward = [
        replace(case, K=K, N=N, dtype=dtype, dropout=dropout)
        for case, (K, N), (dtype, dropout) in product(
            sizes[::2], AWKWARD, ((HALF, False), (HALF, True), (torch.float32, False))
        )
    ]
    options = [replace(case, **{name: True}) for case in sizes[::2] for name in ("bias", "conv1d")]
    options += [replace(case, dx=False) for case in sizes]
    # What the plan could choose instead.
    forced = [
        replace(case, path=path, dtype=dtype, dropout=dropout)
        for case, path, dtype, dropout in product(headline, ("triton", "cublas"), (HALF, torch.float32), (False, True))
    ]
    forced += [replace(case, path="triton") for case in (*sizes[:4], *awkward)]
    forced += [
        replace(case, path="triton", masters=masters, bias=masters, **variant)
        for case, masters, variant in product(headline, (False, True), ({}, {"K": 4104}, {"dtype": torch.float16}))
    ]
    linear = dict.fromkeys([*headline, *llama, *variants, *awkward, *options, *forced, *odd_ranks()])
    others = [*all_cases_4bit(), *all_cases_dora(), *all_cases_ia3(), *all_cases_multi(), *all_cases_shared()]
    return [*linear, *embedding_cases(), *others, *all_cases_gated(), *all_cases_experts()]
