"""The static check's grid over many adapters: the routing, `multi_lora_linear` and its shared form, both ways.

As static_cases.py, which adds these to its own: launches are those of the library's own functions, on meta tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from bench.cases import LLAMA_8B
from bench.static_cases_4bit import weight_on_meta
from peftkern.ops import _multi_lora_linear_triton
from peftkern_kernels.adapters import Adapters
from peftkern_kernels.dropout import Dropout
from peftkern_kernels.launch import Call
from peftkern_kernels.projections import columns
from peftkern_kernels.route_kernel import MAX_ROWS, route_calls
from peftkern_kernels.routing import empty_routing

HALF = torch.bfloat16
DECODED = (1, 16, 64)
TOKENS = (256, 1024, 8192)
SLOTS = 64


def adapters_on_meta(slots: int, R: int, N: int, K: int, dtype: torch.dtype) -> Adapters:
    """Room for `slots` adapters of rank R, without data."""

    def empty(*shape: int, of: torch.dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=of, device="meta")

    return Adapters(
        pool_a=empty(slots * R, K, of=dtype),
        pool_b=empty(slots * R * N, of=dtype),
        row_offset=empty(slots, of=torch.int32),
        rank=empty(slots, of=torch.int32),
        scaling=empty(slots, of=torch.float32),
        max_rank=R,
        N=N,
    )


@dataclass(frozen=True, slots=True)
class MultiLoraLinear:
    """A call of `multi_lora_linear`, with its routing and, if it trains, its backward.

    Attributes:
        M, K, N, R: tokens, in_features, out_features, the largest rank.
        path: as `_multi_lora_linear_triton.forward_calls` takes it; those named 4bit are over a 4-bit weight.
        slots_: adapters that there is room for.
        dtype: of x and the weight. masters: whether the adapters are fp32 whatever that is.
        dropout, bias, training: whether there is any.
    """

    M: int
    K: int
    N: int
    R: int
    path: str
    slots_: int = SLOTS
    dtype: torch.dtype = HALF
    masters: bool = False
    dropout: bool = False
    bias: bool = False
    training: bool = True

    @property
    def aligned(self) -> bool:
        """Whether every row of x, weight and y starts at a multiple of 16 elements."""
        return self.K % (128 if "4bit" in self.path else 16) == 0 and self.N % 16 == 0

    def label(self) -> str:
        """The case in a few words."""
        words = [f"many M{self.M} K{self.K} N{self.N} r{self.R} {str(self.dtype).removeprefix('torch.')}"]
        words += [name for name in ("masters", "dropout", "bias", "training") if getattr(self, name)]
        return " ".join([*words, f"slots{self.slots_}", f"path={self.path}"])

    def launches(self, arch: int) -> list[Call]:
        """The kernel launches on an architecture; cuBLAS's are left out."""
        x = torch.empty(self.M, self.K, dtype=self.dtype, device="meta")
        weight: Any = x.new_empty(self.N, self.K)
        if "4bit" in self.path:
            weight = weight_on_meta(self.N, self.K, dtype=self.dtype)
        bias = x.new_empty(self.N) if self.bias else None
        adapters = adapters_on_meta(self.slots_, self.R, self.N, self.K, torch.float32 if self.masters else self.dtype)
        routing = empty_routing(self.M, self.slots_, "meta")
        dropout = Dropout(x.new_empty(1, dtype=torch.int64), 0.1) if self.dropout else None
        calls = []
        if self.M <= MAX_ROWS:
            calls += route_calls(x.new_empty(self.M, dtype=torch.int64), routing)
        y, s, forward = _multi_lora_linear_triton.forward_calls(
            x, weight, adapters, routing, bias, dropout, self.path, arch, keep_s=self.training
        )
        calls += [call for call in forward if isinstance(call, Call)]
        if self.training:
            needs = (True, True, True)
            *_, backward = _multi_lora_linear_triton.backward_calls(
                torch.empty_like(y), x, weight, adapters, s, routing, dropout, self.path, arch, needs
            )
            calls += [call for call in backward if isinstance(call, Call)]
        return calls


@dataclass(frozen=True, slots=True)
class MultiLoraLinearShared:
    """A call of `multi_lora_linear_shared`: projections of one x that share launches; the rest as `MultiLoraLinear`.

    Attributes:
        Ns: out_features of each.
    """

    M: int
    K: int
    Ns: tuple[int, ...]
    R: int
    path: str
    slots_: int = SLOTS
    dtype: torch.dtype = HALF
    masters: bool = False
    dropout: bool = False
    bias: bool = False
    training: bool = True

    @property
    def aligned(self) -> bool:
        """Whether every row of x, the weights and each y starts at a multiple of 16 elements."""
        return self.K % (128 if "4bit" in self.path else 16) == 0 and all(N % 16 == 0 for N in self.Ns)

    def label(self) -> str:
        """The case in a few words."""
        sizes = "+".join(map(str, self.Ns))
        words = [f"many shared M{self.M} K{self.K} N{sizes} r{self.R} {str(self.dtype).removeprefix('torch.')}"]
        words += [name for name in ("masters", "dropout", "bias", "training") if getattr(self, name)]
        return " ".join([*words, f"slots{self.slots_}", f"path={self.path}"])

    def launches(self, arch: int) -> list[Call]:
        """The kernel launches on an architecture; cuBLAS's and the route are left out."""
        x = torch.empty(self.M, self.K, dtype=self.dtype, device="meta")
        adapter = torch.float32 if self.masters else self.dtype
        layers = []
        for N in self.Ns:
            weight: Any = x.new_empty(N, self.K)
            if "4bit" in self.path:
                weight = weight_on_meta(N, self.K, dtype=self.dtype)
            adapters = adapters_on_meta(self.slots_, self.R, N, self.K, adapter)
            layers.append(_multi_lora_linear_triton.Layer(weight, adapters, x.new_empty(N) if self.bias else None))
        routing = empty_routing(self.M, self.slots_, "meta")
        dropout = Dropout(x.new_empty(1, dtype=torch.int64), 0.1) if self.dropout else None
        options = (routing, dropout, self.path, arch)
        ys, s, calls = _multi_lora_linear_triton.shared_forward_calls(x, layers, *options, keep_s=self.training)
        if self.training:
            needs = (True, [(True, True)] * len(layers))
            dys, parts = list(map(torch.empty_like, ys)), columns(s, [self.R] * len(layers))
            *_, more = _multi_lora_linear_triton.shared_backward_calls(dys, x, layers, parts, *options, needs)
            calls += more
        return [call for call in calls if isinstance(call, Call)]


def shared_cases_multi() -> list[MultiLoraLinearShared]:
    """Attention's three and the MLP's two projections of an 8B Llama, and four; then what changes the code."""
    qkv, mlp, four = (4096, 1024, 1024), (14336, 14336), (4096, 1024, 1024, 512)
    decode = [
        MultiLoraLinearShared(M, 4096, Ns, R, "decode", training=False)
        for M, Ns, R in product(DECODED, (qkv, mlp, four), (16, 64))
        if R == 16 or Ns == qkv
    ]
    train = [
        MultiLoraLinearShared(M, 4096, Ns, R, path)
        for M, Ns, R, path in product((256, 8192), (qkv, mlp, four), (16, 64), ("cublas", "triton"))
        if R == 16 or Ns == qkv
    ]
    plain = [c for c in (*decode, *train) if c.Ns == qkv and c.M in (16, 64, 8192) and c.path != "triton"]
    changes: tuple[dict[str, Any], ...] = (
        {"masters": True}, {"dtype": torch.float32}, {"K": 4095, "Ns": (4095, 1023, 1023)},
        {"dropout": True, "training": True}, {"dropout": True, "training": True, "masters": True},
        {"bias": True}, {"R": 8},
    )  # fmt: skip
    variants = [replace(case, **change) for case, change in product(plain, changes)]
    packed = [
        MultiLoraLinearShared(M, 4096, Ns, 16, path)
        for Ns, (M, path) in product((qkv, mlp, four), ((1, "decode_4bit"), (16, "decode_4bit"), (64, "fused_4bit")))
    ]
    return [*dict.fromkeys([*decode, *train, *variants, *packed])]


def all_cases_multi() -> list[MultiLoraLinear | MultiLoraLinearShared]:
    """Decoding and training over the projections of an 8B Llama, then what changes the code, one thing at a time."""
    square = (4096, 4096)
    decode = [
        MultiLoraLinear(M, K, N, R, "decode", training=False)
        for (_, K, N), M, R in product(LLAMA_8B, DECODED, (16, 64))
        if R == 16 or square == (K, N)
    ]
    train = [
        MultiLoraLinear(M, K, N, R, path)
        for (_, K, N), M, R, path in product(LLAMA_8B, TOKENS, (16, 64), ("cublas", "triton"))
        if R == 16 or (square == (K, N) and M != 1024)
    ]
    plain = [c for c in (*decode, *train) if square == (c.K, c.N) and c.M in (64, 256, 8192)]
    changes: tuple[dict[str, Any], ...] = (
        {"masters": True}, {"dtype": torch.float32}, {"K": 4095, "N": 4095}, {"dropout": True, "training": True},
        {"dropout": True, "training": True, "masters": True},
    )  # fmt: skip
    variants = [replace(case, **change) for case, change in product(plain, changes)]
    small = [c for c in plain if c.R == 16]
    variants += [replace(c, **change) for c in small for change in ({"bias": True}, {"slots_": 1024}, {"R": 8})]
    variants += [replace(plain[-1], M=256, R=128, training=True, dropout=dropout) for dropout in (False, True)]
    variants += [replace(c, R=1) for c in small if c.M != 256]  # a number that is 1 is no tensor in the kernel
    packed = [
        MultiLoraLinear(M, K, N, R, path)
        for (_, K, N), (M, path), R in product(
            LLAMA_8B, ((1, "decode_4bit"), (16, "decode_4bit"), (64, "fused_4bit"), (512, "fused_4bit")), (16, 64)
        )
        if (R == 16 and M == 64) or square == (K, N)
    ]
    packed += [replace(case, dropout=True) for case in packed if case.path == "fused_4bit" and case.K == case.N]
    return [*dict.fromkeys([*decode, *train, *variants, *packed]), *shared_cases_multi()]
