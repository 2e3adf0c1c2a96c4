"""The static check's grid of `dora_linear` and `dora_norm`, forward and backward.

As static_cases.py, which adds these to its own: launches are those of the library's own functions, on meta tensors,
along the path that the plan chooses, or along one that it might choose once it has been measured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from peftkern.backend import DeviceInfo
from peftkern.ops import _dora_linear_triton
from peftkern.ops.plan import plan_dora_linear
from peftkern_kernels.dropout import Dropout
from peftkern_kernels.launch import Call

HALF = torch.bfloat16
Q, KV, DOWN = (4096, 4096), (4096, 1024), (14336, 4096)  # (K, N) in an 8B Llama: q and o, k and v, down
TOKENS = (1, 512, 8192)


@dataclass(frozen=True, slots=True)
class DoraLinear:
    """A call of `dora_linear` with its backward.

    Attributes:
        M, K, N, R: tokens, in_features, out_features, rank.
        dtype: of x and the weight. masters: whether adapter and magnitude are fp32 whatever that is.
        dropout, bias: whether there is any.
        conv1d: whether the weight is the transpose of a [K, N] matrix, as in Conv1D.
        norm: whether the norms are given.
        learns: whether there is a backward; without one u is not kept.
        path: "auto" for the plan's, or one that is forced.
    """

    M: int
    K: int
    N: int
    R: int = 16
    dtype: torch.dtype = HALF
    masters: bool = True
    dropout: bool = False
    bias: bool = False
    conv1d: bool = False
    norm: bool = False
    learns: bool = True
    path: str = "auto"

    @property
    def aligned(self) -> bool:
        """Whether every row of x, weight and y starts at a multiple of 16 elements, as Triton's wide copies ask."""
        return self.K % 16 == 0 and self.N % 16 == 0

    def label(self) -> str:
        """The case in a few words."""
        words = [f"DoRA M{self.M} K{self.K} N{self.N} r{self.R} {str(self.dtype).removeprefix('torch.')}"]
        words += [name for name in ("masters", "dropout", "bias", "conv1d", "norm") if getattr(self, name)]
        words += ["" if self.learns else "no backward", "" if self.path == "auto" else f"path={self.path}"]
        return " ".join(filter(None, words))

    def plan(self, arch: int) -> str:
        """The path that the library takes by itself."""
        weight_row = self.N if self.conv1d else self.K
        aligned = all(row * self.dtype.itemsize % 16 == 0 for row in (self.K, weight_row))
        options = (None, self.norm, self.dtype, DeviceInfo("cuda", arch), aligned)
        return plan_dora_linear(self.M, self.N, self.K, self.R, *options).path

    def launches(self, arch: int) -> list[Call]:
        """The kernel launches of forward and backward on an architecture; cuBLAS's are left out."""
        path = self.path if self.path != "auto" else self.plan(arch)
        if path == "torch":
            return []
        x = torch.empty(self.M, self.K, dtype=self.dtype, device="meta")
        weight = x.new_empty(self.K, self.N).t() if self.conv1d else x.new_empty(self.N, self.K)
        adapter = torch.float32 if self.masters else self.dtype
        lora_A, lora_B = x.new_empty(self.R, self.K, dtype=adapter), x.new_empty(self.N, self.R, dtype=adapter)
        magnitude = x.new_empty(self.N, dtype=adapter)
        bias = x.new_empty(self.N) if self.bias else None
        norm = x.new_empty(self.N, dtype=torch.float32) if self.norm else None
        drop = Dropout(x.new_empty(1, dtype=torch.int64), 0.1) if self.dropout else None
        tensors = (x, weight, weight, lora_A, lora_B, magnitude, bias, norm)
        rest: Any = (2.0, drop, path, arch)
        y, s, u, c, _, calls = _dora_linear_triton.forward_calls(*tensors, *rest, self.learns)
        if self.learns:
            saved = (y, x, weight, lora_A, lora_B, s, u, c)
            calls += _dora_linear_triton.backward_calls(*saved, *rest, (True,) * 4, True)[-1]
        return [call for call in calls if isinstance(call, Call)]


def quick_cases_dora() -> list[DoraLinear]:
    """The headline shape, forward: backward's launches are `lora_linear`'s and IA3's."""
    return [DoraLinear(8192, *Q, masters=False, learns=False)]


def all_cases_dora() -> list[DoraLinear]:
    """Sizes in bfloat16, then what changes the code of what DoRA adds, one thing at a time: its products are
    `lora_linear`'s, whose grid is static_cases.py's."""
    headline = [
        DoraLinear(M, *sizes, R) for sizes, M, R in product((Q, KV, DOWN), TOKENS, (8, 16, 64)) if R == 16 or sizes == Q
    ]
    some = [DoraLinear(512, *Q, R) for R in (16, 64)]
    options: tuple[dict[str, Any], ...] = (
        {"masters": False},
        {"dropout": True},
        {"bias": True},
        {"conv1d": True},
        {"norm": True, "learns": False},
        {"dtype": torch.float16},
        {"dtype": torch.float32},
        {"dtype": torch.float32, "dropout": True},
        {"R": 128},
        {"R": 512},
    )
    variants = [replace(case, **variant) for case, variant in product(some, options)]
    # Rows of 4095 elements are not 16-byte aligned; rows of 4104 are, but Triton looks for multiples of 16 elements.
    awkward = [
        replace(case, K=K, N=N, dtype=dtype, dropout=dropout, bias=True)
        for case, (K, N), (dtype, dropout) in product(
            some, ((4095, 1000), (4096, 1001), (4104, 4104)), ((HALF, False), (HALF, True), (torch.float32, False))
        )
    ]
    # What is stored beside the accumulator of a persistent GEMM, or in its place.
    outputs = [
        DoraLinear(8192, *sizes, R, masters=masters, bias=True, learns=learns)
        for sizes, R, masters, learns in product((Q, (4104, 4104)), (16, 64, 128), (False, True), (False, True))
    ]
    outputs.append(replace(outputs[0], R=12))  # rows of S with gaps
    return list(dict.fromkeys([*quick_cases_dora(), *headline, *variants, *awkward, *outputs]))
