"""The static check's grid over 4-bit weights: dequantization, and `lora_linear` forward and backward.

As static_cases.py, which adds these to its own: launches are those of the library's own functions, on meta tensors,
along the path that the plan chooses, or along one that it might choose once it has been measured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from bench.cases import LLAMA_8B
from peftkern.backend import DeviceInfo
from peftkern.ops import _lora_linear_triton
from peftkern.ops._common import is_plain
from peftkern.ops._weight_calls import packed
from peftkern.ops.plan import plan_lora_linear_quantized
from peftkern.weights import NESTED_BLOCKSIZE, Weight4bit
from peftkern_kernels.dequantize_4bit import dequantize_4bit_calls
from peftkern_kernels.dropout import Dropout
from peftkern_kernels.launch import Call

HALF = torch.bfloat16
# (N, K) of a dequantization: q and o, gate and up, k and v of an 8B Llama; an odd K, whose blocks straddle rows.
DEQUANTIZED = ((4096, 4096), (4096, 14336), (1024, 4096), (4096, 4095))
TOKENS = (1, 16, 64, 128, 512)


def weight_on_meta(
    N: int, K: int, *, blocksize: int = 64, nested: bool = True, dtype: torch.dtype = HALF
) -> Weight4bit:
    """A 4-bit weight [N, K] without data."""
    blocks = -(-N * K // blocksize)

    def empty(size: int, of: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(size, dtype=of, device="meta")

    extra: dict[str, Any] = {}
    if nested:
        extra = {"nested_absmax": empty(-(-blocks // NESTED_BLOCKSIZE)), "nested_code": empty(256), "offset": empty(1)}
    packed, absmax = empty(-(-N * K // 2), torch.uint8), empty(blocks, torch.uint8 if nested else torch.float32)
    return Weight4bit(packed, absmax, empty(16), torch.Size((N, K)), blocksize, dtype=dtype, **extra)


@dataclass(frozen=True, slots=True)
class Dequantize4bit:
    """A weight [N, K] written out dense in `dtype`."""

    N: int
    K: int
    dtype: torch.dtype = HALF
    nested: bool = True
    blocksize: int = 64

    @property
    def aligned(self) -> bool:
        """Whether every row starts at a multiple of 16 elements (the kernel, to which W is flat, does not ask)."""
        return self.K % 16 == 0

    def label(self) -> str:
        """The case in a few words."""
        nested = " nested" if self.nested else ""
        return f"dequantize N{self.N} K{self.K} {str(self.dtype).removeprefix('torch.')} b{self.blocksize}{nested}"

    def launches(self, arch: int) -> list[Call]:
        """The one launch."""
        weight = weight_on_meta(self.N, self.K, blocksize=self.blocksize, nested=self.nested)
        out = torch.empty(self.N, self.K, dtype=self.dtype, device="meta")
        return dequantize_4bit_calls(packed(weight), out, arch=arch)


@dataclass(frozen=True, slots=True)
class LoraLinear4bit:
    """A call of `lora_linear` over a 4-bit weight, with its backward.

    Attributes:
        M, K, N, R: tokens, in_features, out_features, rank.
        dtype: of x. masters: whether the adapters are fp32 whatever that is.
        nested, blocksize: double quantization; elements that share a scale.
        dropout, bias: whether there is any.
        path: "auto" for the plan's, or one that is forced.
    """

    M: int
    K: int
    N: int
    R: int
    dtype: torch.dtype = HALF
    masters: bool = False
    nested: bool = True
    blocksize: int = 64
    dropout: bool = False
    bias: bool = False
    path: str = "auto"

    @property
    def aligned(self) -> bool:
        """Whether every row of x and y starts at a multiple of 16 elements, and every row of W at one of 16 words."""
        return self.K % 128 == 0 and self.N % 16 == 0

    def label(self) -> str:
        """The case in a few words."""
        words = [f"4-bit M{self.M} K{self.K} N{self.N} r{self.R} {str(self.dtype).removeprefix('torch.')}"]
        words += [name for name in ("nested", "masters", "dropout", "bias") if getattr(self, name)]
        words += [
            "" if self.blocksize == 64 else f"b{self.blocksize}",
            "" if self.path == "auto" else f"path={self.path}",
        ]
        return " ".join(filter(None, words))

    def plan(self, arch: int) -> str:
        """The path that the library takes by itself."""
        sizes = {"M": self.M, "N": self.N, "K": self.K, "R": self.R, "blocksize": self.blocksize}
        aligned, device = self.K * self.dtype.itemsize % 16 == 0, DeviceInfo("cuda", arch)
        return plan_lora_linear_quantized(**sizes, dtype=self.dtype, device=device, aligned=aligned).path

    def launches(self, arch: int) -> list[Call]:
        """The kernel launches of forward and backward on an architecture; cuBLAS's are left out."""
        path = self.path if self.path != "auto" else self.plan(arch)
        if is_plain(path):
            return []
        x = torch.empty(self.M, self.K, dtype=self.dtype, device="meta")
        weight = weight_on_meta(self.N, self.K, blocksize=self.blocksize, nested=self.nested, dtype=self.dtype)
        adapter = torch.float32 if self.masters else self.dtype
        lora_A, lora_B = x.new_empty(self.R, self.K, dtype=adapter), x.new_empty(self.N, self.R, dtype=adapter)
        bias = x.new_empty(self.N) if self.bias else None
        dropout = Dropout(x.new_empty(1, dtype=torch.int64), 0.1) if self.dropout else None
        y, s, forward = _lora_linear_triton.forward_calls(x, weight, lora_A, lora_B, 2.0, bias, dropout, path, arch)
        *_, backward = _lora_linear_triton.backward_calls(
            torch.empty_like(y), x, weight, lora_A, lora_B, s, 2.0, dropout, path, arch, (True, True, True)
        )
        return [call for call in (*forward, *backward) if isinstance(call, Call)]


Case4bit = Dequantize4bit | LoraLinear4bit


def quick_cases_4bit() -> list[Case4bit]:
    """One dequantization, one decode step, one fused product: forward and backward."""
    return [Dequantize4bit(4096, 4096), *(LoraLinear4bit(M, 4096, 4096, 16) for M in (1, 64))]


def all_cases_4bit() -> list[Case4bit]:
    """Sizes in bfloat16, nested; then what changes the code, one or two things at a time, on the way."""
    dequantized: list[Case4bit] = [
        Dequantize4bit(N, K, dtype, nested)
        for (N, K), dtype, nested in product(DEQUANTIZED, (HALF, torch.float16, torch.float32), (True, False))
    ]
    dequantized += [Dequantize4bit(4096, 4096, HALF, blocksize=blocksize) for blocksize in (32, 4096)]
    llama = [
        LoraLinear4bit(M, K, N, R, dropout=dropout)
        for (_, K, N), M, R, dropout in product(LLAMA_8B, TOKENS, (16, 64), (False, True))
    ]
    square = [case for case in llama if case.K == case.N and not case.dropout]
    kinds: tuple[dict[str, Any], ...] = ({"masters": True}, {"dtype": torch.float16}, {"nested": False})
    variants = [
        replace(case, dropout=dropout, **changes) for case, dropout, changes in product(square, (False, True), kinds)
    ]
    options = [
        replace(case, **changes)
        for case in square
        if case.R == 16
        for changes in ({"bias": True}, {"blocksize": 32}, {"blocksize": 128}, {"blocksize": 4096})
    ]
    options += [LoraLinear4bit(M, 4096, 4096, 36, dropout=dropout) for M in (16, 128) for dropout in (False, True)]
    # What the plan could choose instead, past its present crossover.
    forced = [
        replace(case, M=M, path="fused_4bit", dropout=dropout)
        for case, M, dropout in product(square[:2], (1, 16, 1024, 2048), (False, True))
    ]
    # fp32 and an odd K: written out dense; a K of whole 32s only: in units of 32.
    awkward = [
        replace(case, **changes)
        for case in square
        if case.R == 16
        for changes in ({"dtype": torch.float32}, {"K": 4095}, {"K": 4128})
    ]
    return [*dequantized, *dict.fromkeys([*llama, *variants, *options, *forced, *awkward])]
