"""`multi_lora_linear` as a list of kernel launches, forward and backward, for adapters and a routing that are given.

As in _lora_linear_triton.py nothing runs here: outputs are allocated and returned with the `Call`s that fill them.
Paths over a dense weight: "triton" (the expand is in the base GEMM's accumulator), "cublas" (the grouped expand writes
first, cuBLAS adds the base in place), "decode" (at most 64 rows; up to 16 the base is our kernels' too). Over a
`Weight4bit`: "fused_4bit", and "decode_4bit" (at most 16 rows).
"""

from __future__ import annotations

from typing import Any

import torch

from peftkern.backend import device_info
from peftkern.ops._lora_linear_triton import (
    FUSED_4BIT_PATHS,
    Calls,
    Kept,
    _add_base,
    dropout,
    packed,
    precision,
    weight_parts,
    write_base,
)
from peftkern_kernels import replay
from peftkern_kernels.adapters import Adapters
from peftkern_kernels.dropout import Dropout
from peftkern_kernels.launch import TorchCall, scratch
from peftkern_kernels.lora_linear import base_plus_expand_calls
from peftkern_kernels.lora_linear_4bit import base_4bit_plus_expand_calls, base_4bit_transposed_plus_expand_calls
from peftkern_kernels.multi_decode import MAX_ROWS, multi_decode_calls
from peftkern_kernels.multi_decode_base import MAX_ROWS as BASE_MAX_ROWS
from peftkern_kernels.multi_decode_base import multi_linear_decode_calls
from peftkern_kernels.multi_expand import multi_expand_calls
from peftkern_kernels.multi_shrink import multi_shrink_calls
from peftkern_kernels.multi_tables import DecodeTile
from peftkern_kernels.multi_tile import MixedFactor
from peftkern_kernels.multi_weight_gradient import multi_weight_gradient_calls
from peftkern_kernels.routing import Routing

__all__ = ["BASE_MAX_ROWS", "MAX_ROWS", "backward_calls", "forward_calls", "multi_calls"]


def forward_calls(
    x: torch.Tensor,
    weight: Any,
    adapters: Adapters,
    routing: Routing,
    bias: torch.Tensor | None,
    dropout: Dropout | None,
    path: str,
    arch: int,
    keep_s: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None, Calls]:
    """x [M, K] -> y [M, N], S [M, max_rank] (scaling in it, zeros past each row's rank), and the launches.

    `keep_s` False lets the path "decode" leave S out (None): nothing but a backward needs it.
    """
    M, N, R = x.shape[0], weight.shape[0], adapters.max_rank
    y = x.new_empty(M, N)
    common: dict[str, Any] = {"arch": arch, "precision": precision()}
    if path in ("decode", "decode_4bit") and dropout is None:
        s_out = x.new_empty(M, R) if keep_s else None
        if M <= BASE_MAX_ROWS:
            stored = packed(weight) if path == "decode_4bit" else weight
            options: dict[str, Any] = {"bias": bias, "s_out": s_out}
            return y, s_out, [*multi_linear_decode_calls(x, stored, adapters, routing, y, **options, **common)]
        calls: Calls = [write_base(x, weight, y)] if M else []
        calls += multi_decode_calls(x, adapters, routing, y, base=y, bias=bias, s_out=s_out, **common)
        return y, s_out, calls
    s = x.new_empty(M, R)
    calls = [*multi_shrink_calls(x, adapters, routing, s, dropout=dropout, **common)]
    if path == "triton":
        calls += base_plus_expand_calls(x, weight, s, MixedFactor(adapters, routing, "b"), y, bias=bias, **common)
    elif path in FUSED_4BIT_PATHS:
        factor = MixedFactor(adapters, routing, "b")
        calls += base_4bit_plus_expand_calls(x, packed(weight), s, factor, y, bias=bias, **common)
    elif M:
        calls += multi_expand_calls(s, adapters, routing, y, bias=bias, **common)
        calls.append(_add_base(x, weight, y))
    return y, s, calls


def backward_calls(
    dy: torch.Tensor,
    x: Kept,
    weight: Any,
    adapters: Adapters,
    s: Kept,
    routing: Routing,
    dropout: Dropout | None,
    path: str,
    arch: int,
    needs: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, Calls]:
    """dy [M, N] -> (dX [M, K], gradient of pool_a, gradient of pool_b, launches), each only if `needs` asks for it.

    The pools' gradients are contiguous, in the pools' dtype, zero for adapters without rows and rows of no adapter.
    `x` may be None if pool_a's is not asked for, `s` if pool_b's is not.
    """
    needs_x, needs_a, needs_b = needs
    M, K = dy.shape[0], weight.shape[1]
    common: dict[str, Any] = {"arch": arch, "precision": precision()}
    dx = dy.new_empty(M, K) if needs_x else None
    da = torch.empty_like(adapters.pool_a, memory_format=torch.contiguous_format) if needs_a else None
    db = torch.empty_like(adapters.pool_b) if needs_b else None
    ds: Kept = None
    if needs_x or needs_a:
        ds = scratch(M, adapters.max_rank, dtype=dy.dtype, device=dy.device)
    # One fill of memory, where finding out who is absent would take a kernel of its own.
    calls: Calls = [TorchCall("zero", torch.Tensor.zero_, (t,)) for t in (da, db) if t is not None]
    if ds is not None:
        calls += multi_shrink_calls(dy, adapters, routing, ds, pool="b", **common)
    factor = MixedFactor(adapters, routing, "a")
    if dx is not None and path == "triton":
        calls += base_plus_expand_calls(dy, weight.t(), ds, factor, dx, dropout=dropout, **common)
    elif dx is not None and path in FUSED_4BIT_PATHS:
        calls += base_4bit_transposed_plus_expand_calls(dy, packed(weight), ds, factor, dx, dropout=dropout, **common)
    elif dx is not None and M:
        calls += multi_expand_calls(ds, adapters, routing, dx, pool="a", dropout=dropout, **common)
        calls.append(_add_base(dy, weight.t(), dx))
    if da is not None or db is not None:
        calls += multi_weight_gradient_calls(
            ds if da is not None else None,
            x if da is not None else None,
            s if db is not None else None,
            dy if db is not None else None,
            da,
            db,
            adapters,
            routing,
            dropout=dropout,
            **common,
        )
    return dx, da, db, calls


def _tensors(weight: Any, adapters: Adapters, routing: Routing) -> tuple[Any, list[Any]]:
    """What a recording of the launches must know of these: numbers, and tensors."""
    blocksize, *held = weight_parts(weight)
    tables = (adapters.pool_a, adapters.pool_b, adapters.row_offset, adapters.rank, adapters.scaling)
    return (blocksize, adapters.max_rank, adapters.N), [*held, *tables, *routing.tensors]


def forward(
    x: torch.Tensor,
    weight: Any,
    adapters: Adapters,
    routing: Routing,
    bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    p: float,
    path: str,
    *,
    keep_s: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run the launches of `forward_calls`, from a recording once the situation has been met; y and S."""
    arch, (numbers, tensors) = device_info(x.device).arch, _tensors(weight, adapters, routing)
    drop = dropout(seed, p)

    def build() -> Any:
        y, s, calls = forward_calls(x, weight, adapters, routing, bias, drop, path, arch, keep_s)
        return (y, s), calls

    key = ("multi_lora_linear", numbers, p, path, keep_s, precision())
    y, s = replay.produce(key, (x, *tensors, bias, seed), build, x.device)
    return y, s


def backward(
    dy: torch.Tensor,
    x: Kept,
    weight: Any,
    adapters: Adapters,
    s: Kept,
    routing: Routing,
    seed: torch.Tensor | None,
    p: float,
    path: str,
    needs: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Run the launches of `backward_calls`, likewise; the gradients of x and of the pools."""
    arch, (numbers, tensors) = device_info(dy.device).arch, _tensors(weight, adapters, routing)
    drop = dropout(seed, p)

    def build() -> Any:
        *results, calls = backward_calls(dy, x, weight, adapters, s, routing, drop, path, arch, needs)
        return results, calls

    key = ("multi_lora_linear backward", numbers, p, path, needs, precision())
    dx, da, db = replay.produce(key, (dy, x, *tensors, s, seed), build, dy.device)
    return dx, da, db


def multi_calls(
    x: torch.Tensor,
    adapters: Adapters,
    routing: Routing,
    y: torch.Tensor,
    *,
    arch: int,
    decode: bool | None = None,
    tile: DecodeTile | None = None,
) -> Calls:
    """Launches of the low-rank part alone, `y[m] += scaling[s] * x[m] A_s^T B_s^T`: what a benchmark times as a pair.

    Args:
        x: [M, K]. y: [M, N], added to in place. decode: which kernels; None takes the decode path up to 64 rows.
        tile: overrides the decode path's table.
    """
    common: dict[str, Any] = {"arch": arch, "precision": precision()}
    if decode is None:
        decode = x.shape[0] <= MAX_ROWS
    if decode:
        return [*multi_decode_calls(x, adapters, routing, y, base=y, tile=tile, **common)]
    s = x.new_empty(x.shape[0], adapters.max_rank)
    calls: Calls = [*multi_shrink_calls(x, adapters, routing, s, **common)]
    return calls + multi_expand_calls(s, adapters, routing, y, accumulate=True, **common)
