"""The static check's grid of `ia3_linear` and `multi_ia3_linear`, forward and backward.

As static_cases.py, which adds these to its own: launches are those of the library's own functions, on meta tensors,
along the path that the plan chooses, or along one that it might choose once it has been measured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from peftkern.backend import DeviceInfo
from peftkern.ops import _ia3_linear_triton
from peftkern.ops.plan import plan_ia3_linear
from peftkern_kernels.ia3_scale_sum import Route
from peftkern_kernels.launch import Call

HALF = torch.bfloat16
# (K, N) of what IA3 adapts in an 8B Llama: k and v, whose output is scaled; down, whose input is.
KV, DOWN = (4096, 1024), (14336, 4096)
TOKENS = (1, 16, 512, 2048, 8192)


@dataclass(frozen=True, slots=True)
class IA3Linear:
    """A call of `ia3_linear` with its backward.

    Attributes:
        M, K, N: tokens, in_features, out_features.
        feedforward: whether x is scaled rather than the output.
        dtype: of x and the weight. masters: whether the scale is fp32 whatever that is.
        bias: whether there is one.
        slots: vectors to choose from by row; 0 for one.
        path: "auto" for the plan's, or one that is forced.
        dx: whether x needs a gradient. learns: whether the scale does; if not, z is not kept.
    """

    M: int
    K: int
    N: int
    feedforward: bool
    dtype: torch.dtype = HALF
    masters: bool = True
    bias: bool = False
    slots: int = 0
    path: str = "auto"
    dx: bool = True
    learns: bool = True

    @property
    def aligned(self) -> bool:
        """Whether every row of x, weight and y starts at a multiple of 16 elements, as Triton's wide copies ask."""
        return self.K % 16 == 0 and self.N % 16 == 0

    def label(self) -> str:
        """The case in a few words."""
        words = [f"IA3 M{self.M} K{self.K} N{self.N} {str(self.dtype).removeprefix('torch.')}"]
        words += [name for name in ("feedforward", "masters", "bias") if getattr(self, name)]
        words += [f"{self.slots} slots" if self.slots else "", "" if self.dx else "no dX"]
        words += ["" if self.learns else "no dl"]
        return " ".join(filter(None, [*words, "" if self.path == "auto" else f"path={self.path}"]))

    def plan(self, arch: int) -> str:
        """The path that the library takes by itself."""
        options = (self.feedforward, self.slots > 0, False, self.dtype, DeviceInfo("cuda", arch), self.aligned)
        return plan_ia3_linear(self.M, self.N, self.K, *options).path

    def launches(self, arch: int) -> list[Call]:
        """The kernel launches of forward and backward on an architecture; cuBLAS's are left out."""
        path = self.path if self.path != "auto" else self.plan(arch)
        if path == "torch":
            return []
        x = torch.empty(self.M, self.K, dtype=self.dtype, device="meta")
        weight = x.new_empty(self.N, self.K)
        size = (self.K if self.feedforward else self.N,)
        shape = (self.slots, *size) if self.slots else size
        scale = x.new_empty(shape, dtype=torch.float32 if self.masters else self.dtype)
        bias = x.new_empty(self.N) if self.bias else None
        ids: Any = x.new_empty(self.M, dtype=torch.int64) if self.slots else None
        by_slot = None if ids is None else Route(ids, ids.new_empty(self.slots + 2))
        forward = (x, weight, scale, bias, ids, self.feedforward, path, arch)
        y, z, calls = _ia3_linear_triton.forward_calls(*forward, self.learns and not self.feedforward)
        *_, backward = _ia3_linear_triton.backward_calls(
            y, x, weight, scale, z, ids, by_slot, self.feedforward, path, arch, (self.dx, self.learns, False)
        )
        return [call for call in (*calls, *backward) if isinstance(call, Call)]


def quick_cases_ia3() -> list[IA3Linear]:
    """The headline shapes, and GEMMs with an epilogue of both kinds."""
    return [IA3Linear(8192, *KV, False, path="triton"), IA3Linear(8192, *DOWN, True, path="triton")]


def all_cases_ia3() -> list[IA3Linear]:
    """Sizes in bfloat16 along both paths, then what changes the code, one thing at a time."""
    headline = [
        IA3Linear(M, *sizes, feedforward, path=path)
        for (sizes, feedforward), M, path in product(((KV, False), (DOWN, True)), TOKENS, ("auto", "triton", "cublas"))
    ]
    some = [case for case in headline if case.M in (512, 8192) and case.path != "auto"]
    variants = [
        replace(case, **variant)
        for case, variant in product(
            some,
            (
                {"masters": False},
                {"bias": True},
                {"dx": False},
                {"learns": False},
                {"dtype": torch.float16},
                {"dtype": torch.float32},
            ),
        )
    ]
    # Rows of 4095 elements are not 16-byte aligned; rows of 4104 are, but Triton looks for multiples of 16 elements.
    awkward = [replace(case, K=K, N=N) for case, (K, N) in product(some, ((4095, 1000), (4096, 1001), (4104, 4104)))]
    slots = [replace(case, slots=n, path="auto") for case, n in product(some, (1, 64)) if case.path == "cublas"]
    return list(dict.fromkeys([*quick_cases_ia3(), *headline, *variants, *awkward, *slots]))
