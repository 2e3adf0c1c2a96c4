"""The static check's grid of `grouped_lora_linear` over stacks of experts, forward and backward.

As static_cases.py, which adds these to its own: launches are those of the library's own functions, on meta tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from peftkern.ops import _grouped_lora_linear_triton
from peftkern_kernels.launch import Call

HALF = torch.bfloat16
# (experts, experts of a token, (K, N) of gate and up together, and of down).
QWEN3_30B = (128, 8, ((2048, 1536), (768, 2048)))
MIXTRAL = (8, 2, ((4096, 28672), (14336, 4096)))
TOKENS = (4, 512, 8192)


@dataclass(frozen=True, slots=True)
class Experts:
    """A call of `grouped_lora_linear` with its backward.

    Attributes:
        T, E, K, N, R: rows of all experts, experts, in_features, out_features, rank; R 0 for experts alone.
        dtype: of x and the weight. masters: whether the adapters are fp32 whatever that is.
        bias: whether there is one.
        transposed: whether the stack is stored as [E, K, N].
        peft_b: whether lora_B has its experts innermost, as PEFT's has, or is contiguous.
        dx: whether x needs a gradient.
    """

    T: int
    E: int
    K: int
    N: int
    R: int = 16
    dtype: torch.dtype = HALF
    masters: bool = False
    bias: bool = False
    transposed: bool = False
    peft_b: bool = True
    dx: bool = True

    @property
    def aligned(self) -> bool:
        """Whether every row of x, weight and y starts at a multiple of 16 elements, as Triton's wide copies ask."""
        return self.K % 16 == 0 and self.N % 16 == 0

    def label(self) -> str:
        """The case in a few words."""
        words = [f"experts{self.E} T{self.T} K{self.K} N{self.N} r{self.R} {str(self.dtype).removeprefix('torch.')}"]
        words += [name for name in ("masters", "bias", "transposed") if getattr(self, name)]
        words += ["" if self.peft_b else "contiguous B", "" if self.dx else "no dX"]
        return " ".join(filter(None, words))

    def launches(self, arch: int) -> list[Call]:
        """The kernel launches of forward and backward on an architecture; copies and fills are left out."""
        x = torch.empty(self.T, self.K, dtype=self.dtype, device="meta")
        if self.transposed:
            weight = x.new_empty(self.E, self.K, self.N).transpose(1, 2)
        else:
            weight = x.new_empty(self.E, self.N, self.K)
        lora_A: Any = None
        lora_B: Any = None
        if self.R:
            adapter = torch.float32 if self.masters else self.dtype
            lora_A = x.new_empty(self.E, self.R, self.K, dtype=adapter)
            lora_B = x.new_empty(self.E, self.N, self.R, dtype=adapter)
            if self.peft_b:
                lora_B = x.new_empty(self.N, self.R, self.E, dtype=adapter).permute(2, 0, 1)
        bias = x.new_empty(self.E, self.N) if self.bias else None
        offsets = x.new_empty(self.E, dtype=torch.int32)
        operands = (weight, lora_A, lora_B)
        y, s, calls = _grouped_lora_linear_triton.forward_calls(x, *operands, 2.0, bias, offsets, arch)
        needs = (self.dx, self.R > 0, self.R > 0)
        *_, backward = _grouped_lora_linear_triton.backward_calls(
            torch.empty_like(y), x, *operands, s, 2.0, offsets, arch, needs
        )
        return [call for call in (*calls, *backward) if isinstance(call, Call)]


def quick_cases_experts() -> list[Experts]:
    """One layer's larger projection."""
    E, k, ((K, N), _) = QWEN3_30B
    return [Experts(8192 * k, E, K, N)]


def all_cases_experts() -> list[Experts]:
    """Two models' layers at three numbers of tokens, then what changes the code, one thing at a time."""
    layers = [
        Experts(tokens * k, E, K, N)
        for (E, k, shapes), tokens in product((QWEN3_30B, MIXTRAL), TOKENS)
        for K, N in shapes
    ]
    some = [case for case in layers if (case.E, case.K) == (128, 2048)]
    changes: tuple[dict[str, Any], ...] = (
        {"R": 1}, {"R": 8}, {"R": 64}, {"R": 128}, {"R": 0}, {"masters": True}, {"masters": True, "R": 64},
        {"masters": True, "peft_b": False}, {"bias": True}, {"transposed": True}, {"peft_b": False},
        {"dtype": torch.float16}, {"dtype": torch.float32}, {"dx": False}, {"E": 1}, {"E": 512},
        {"K": 2047, "N": 1535}, {"K": 2880, "N": 5760, "transposed": True, "bias": True}, {"K": 2056, "N": 1544},
    )  # fmt: skip
    return list(
        dict.fromkeys([*quick_cases_experts(), *layers, *(replace(c, **ch) for c, ch in product(some, changes))])
    )
