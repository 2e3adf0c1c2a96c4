"""Calls of `lora_linear_shared` whose kernel launches the static check compiles: q, k and v, and gate and up, of an 8B
Llama. What a projection's launches do not share is in the grid already; new are S beside others' in its rows, and the
rank of all projections in one shrink, one dX and one dA; and for a few tokens the two launches of all projections.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from bench.static_cases_4bit import weight_on_meta
from peftkern.backend import DeviceInfo
from peftkern.ops import _lora_linear_shared_triton as shared
from peftkern.ops._projection_group import Group
from peftkern.ops._rank_rows import columns_of_s
from peftkern.ops.plan import APART, DECODE_PATHS, plan_lora_linear, plan_shared
from peftkern_kernels.dropout import Dropout
from peftkern_kernels.launch import Call

HALF = torch.bfloat16
QKV, GATE_UP = (4096, 1024, 1024), (14336, 14336)
FOUR = (4096, 1024, 1024, 512)


@dataclass(frozen=True, slots=True)
class LoraLinearShared:
    """A call with its backward: M tokens, in_features K, each projection's out_features, all of rank R.

    Attributes:
        masters: whether the adapters are fp32. dropout: whether there is any.
        path: "auto" for the plan's over dense weights, or one over 4-bit weights. bias: whether there is any.
    """

    M: int
    K: int
    outs: tuple[int, ...]
    R: int
    dtype: torch.dtype = HALF
    masters: bool = False
    dropout: bool = False
    path: str = "auto"
    bias: bool = False

    @property
    def aligned(self) -> bool:
        """Whether every row of x, weight and y starts at a multiple of 16 elements."""
        return self.K % (128 if "4bit" in self.path else 16) == 0 and all(n % 16 == 0 for n in self.outs)

    def label(self) -> str:
        """The case in a few words."""
        sizes = "+".join(map(str, self.outs))
        words = [f"shared M{self.M} K{self.K} N{sizes} r{self.R} {str(self.dtype).removeprefix('torch.')}"]
        words += [name for name in ("masters", "dropout", "bias") if getattr(self, name)]
        return " ".join([*words, *([] if self.path == "auto" else [f"path={self.path}"])])

    def launches(self, arch: int) -> list[Call]:
        """The kernel launches of forward and backward on an architecture; cuBLAS's are left out."""
        path = self.path if self.path != "auto" else self.plan(arch)
        if path in ("torch", APART):
            return []
        x = torch.empty(self.M, self.K, dtype=self.dtype, device="meta")
        kind, count = torch.float32 if self.masters else self.dtype, len(self.outs)
        As = [x.new_empty(self.R, self.K, dtype=kind) for _ in self.outs]
        Bs = [x.new_empty(N, self.R, dtype=kind) for N in self.outs]
        weights: list[Any] = [x.new_empty(N, self.K) for N in self.outs]
        if "4bit" in path:
            weights = [weight_on_meta(N, self.K, dtype=self.dtype) for N in self.outs]
        biases = [x.new_empty(N) if self.bias else None for N in self.outs]
        drop = Dropout(x.new_empty(1, dtype=torch.int64), 0.1) if self.dropout else None
        columns = columns_of_s([self.R] * count, self.dtype, path, arch)
        group = Group(tuple(weights), (2.0,) * count, columns, 0.1 if self.dropout else 0.0, path)
        forward = shared.decoded_calls if path in DECODE_PATHS else shared.forward_calls
        ys, s, calls = forward(x, group, As, Bs, biases, drop, arch)
        calls += shared.backward_calls(ys, x, group, As, Bs, s, drop, arch, (True, True, [True] * count))[1]
        return [call for call in calls if isinstance(call, Call)]

    def plan(self, arch: int) -> str:
        """The path that the library takes by itself."""
        device = DeviceInfo("cuda", arch)
        aligned = self.K * self.dtype.itemsize % 16 == 0
        plans = [plan_lora_linear(self.M, N, self.K, self.R, self.dtype, device, aligned) for N in self.outs]
        return plan_shared(plans, self.M * self.K).path


def all_cases_shared() -> list[LoraLinearShared]:
    """Both groups of an 8B Llama, then what changes the code, one thing at a time."""
    groups = [LoraLinearShared(8192, 4096, outs, R) for outs, R in product((QKV, GATE_UP), (8, 16, 64))]
    small = [replace(case, M=M) for case in groups[1::3] for M in (512, 2048)]  # with products by cuBLAS beside ours
    variants = [replace(groups[1], **{name: True}) for name in ("masters", "dropout")]
    variants += [replace(groups[2], dropout=True, masters=True), replace(groups[1], dtype=torch.float32)]
    variants += [replace(groups[1], dtype=torch.float16), replace(groups[1], K=4104), replace(groups[1], K=4095)]
    variants.append(replace(groups[0], R=4))  # columns of S with gaps
    # Ranks that add up to no multiple of 16.
    odd = [LoraLinearShared(8192, 4096, QKV, 12, dropout=dropout) for dropout in (False, True)]
    fused = [
        replace(case, M=128, path="fused_4bit", dropout=dropout) for case in groups[1::3] for dropout in (False, True)
    ]
    return [*groups, *small, *variants, *odd, *fused, *_decoded_cases()]


def _decoded_cases() -> list[LoraLinearShared]:
    """The same for a few tokens."""
    groups = [LoraLinearShared(M, 4096, outs, R) for M, outs, R in product((1, 16), (QKV, GATE_UP, FOUR), (16, 64))]
    packed = [replace(case, path="decode_4bit") for case in groups]
    few = replace(groups[0], M=16)
    variants = [replace(few, **{name: True}) for name in ("masters", "dropout", "bias")]
    variants += [replace(few, R=64, dropout=True, masters=True, bias=True), replace(few, dtype=torch.float32)]
    variants += [replace(few, dtype=torch.float16), replace(few, K=4104), replace(few, K=4095)]
    variants += [replace(few, K=4095, outs=(4095, 1023, 1023), R=3)]
    over_4bit = [replace(few, path="decode_4bit", dropout=True, **{name: True}) for name in ("masters", "bias")]
    return [*groups, *packed, *variants, *over_4bit]
