"""`multi_lora_linear` as a list of kernel launches, forward and backward, for adapters and a routing that are given.

As in _lora_linear_triton.py nothing runs here: outputs are allocated and returned with the `Call`s that fill them.
Paths over a dense weight: "triton" (the expand is in the base GEMM's accumulator), "cublas" (the grouped expand writes
first, cuBLAS adds the base in place), "decode" (at most 64 rows; up to 16 the base is our kernels' too). Over a
`Weight4bit`: "fused_4bit", and "decode_4bit" (at most 16 rows). Over any quantized weight "dequantize:PATH": it is
written out for the launches of PATH, one weight at a time (_weight_calls.py); what takes several at once, or would take
a factor in blocks, gives way to "cublas". Written for several projections of one x that share batch, mask and path; one
layer is a group of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from peftkern.backend import device_info
from peftkern.ops._lora_linear_triton import FUSED_4BIT_PATHS, Kept, add_base, dropout, precision, write_base
from peftkern.ops._weight_calls import Calls, Part, Stored, is_whole_on, packed, parts_of, room_for, stored
from peftkern.ops.plan import DECODE_PATHS
from peftkern_kernels import replay
from peftkern_kernels.adapters import Adapters
from peftkern_kernels.dropout import Dropout
from peftkern_kernels.launch import TorchCall, nbytes, scratch
from peftkern_kernels.lora_linear import base_plus_expand_calls
from peftkern_kernels.lora_linear_4bit import base_4bit_plus_expand_calls, base_4bit_transposed_plus_expand_calls
from peftkern_kernels.multi_decode import MAX_ROWS, group_decode_calls, multi_decode_calls
from peftkern_kernels.multi_decode_base import MAX_ROWS as BASE_MAX_ROWS
from peftkern_kernels.multi_decode_base import group_linear_decode_calls
from peftkern_kernels.multi_expand import group_expand_calls, multi_expand_calls
from peftkern_kernels.multi_group import Projection
from peftkern_kernels.multi_shrink import group_shrink_calls, multi_shrink_calls
from peftkern_kernels.multi_tables import DecodeTile
from peftkern_kernels.multi_tile import MixedFactor
from peftkern_kernels.multi_weight_gradient import multi_weight_gradient_calls
from peftkern_kernels.projections import columns
from peftkern_kernels.routing import Routing

__all__ = ["BASE_MAX_ROWS", "MAX_ROWS", "backward_calls", "forward_calls", "multi_calls"]

IN_GEMM = ("triton", *FUSED_4BIT_PATHS)  # paths whose GEMM has the expand in its accumulator


@dataclass(frozen=True, slots=True)
class Layer:
    """One projection of x: its weight, dense [N, K] or quantized, its adapters, and its bias [N] or None."""

    weight: Any
    adapters: Adapters
    bias: torch.Tensor | None = None


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
    layer = Layer(weight, adapters, bias)
    (y,), s, calls = shared_forward_calls(x, [layer], routing, dropout, path, arch, keep_s)
    return y, s, calls


def shared_forward_calls(
    x: torch.Tensor,
    layers: Sequence[Layer],
    routing: Routing,
    dropout: Dropout | None,
    path: str,
    arch: int,
    keep_s: bool = True,
) -> tuple[list[torch.Tensor], torch.Tensor | None, Calls]:
    """The same for several projections of x: each one's y, and their S side by side, [M, sum of max_rank].

    The shrink is one launch for all; so is what follows on the decode paths. Elsewhere each has its base and expand.
    """
    M, ranks = x.shape[0], [layer.adapters.max_rank for layer in layers]
    ys = [x.new_empty(M, layer.weight.shape[0]) for layer in layers]
    common: dict[str, Any] = {"arch": arch, "precision": precision()}
    parts = _parts(layers, path, x, arch)
    if dropout is None and _are_decoded(parts):
        s_out = x.new_empty(M, sum(ranks)) if keep_s else None
        weights = [own[0].weight for own in parts]
        calls: Calls = [call for own in parts for call in own[0].calls]
        beside = list(zip(layers, ys, columns(s_out, ranks), strict=True))
        if M <= BASE_MAX_ROWS:
            group = [Projection(each.adapters, y, None, each.bias, part) for each, y, part in beside]
            taken = [weight if isinstance(weight, torch.Tensor) else packed(weight) for weight in weights]
            return ys, s_out, [*calls, *group_linear_decode_calls(x, taken, group, routing, **common)]
        calls += [write_base(x, weight, y) for weight, y in zip(weights, ys, strict=True)]
        group = [Projection(each.adapters, y, y, each.bias, part) for each, y, part in beside]
        return ys, s_out, [*calls, *group_decode_calls(x, group, routing, **common)]
    s = x.new_empty(M, sum(ranks))
    calls = [*group_shrink_calls(x, [each.adapters for each in layers], routing, s, dropout=dropout, **common)]
    for layer, own, y, own_s in zip(layers, parts, ys, columns(s, ranks), strict=True):
        factor = MixedFactor(layer.adapters, routing, "b")
        if is_whole_on(own, *IN_GEMM):
            calls += own[0].calls
            if isinstance(own[0].weight, torch.Tensor):
                calls += base_plus_expand_calls(x, own[0].weight, own_s, factor, y, bias=layer.bias, **common)
            else:
                weight = packed(own[0].weight)
                calls += base_4bit_plus_expand_calls(x, weight, own_s, factor, y, bias=layer.bias, **common)
        elif M:
            calls += multi_expand_calls(own_s, layer.adapters, routing, y, bias=layer.bias, **common)
            for part in own:
                calls += [*part.calls, add_base(x, part.weight, part.of_columns(y))]
    return ys, s, calls


def _are_decoded(parts: Sequence[Sequence[Part]]) -> bool:
    """Whether the decode paths' launches, which take all weights at once, may: of those that are written out only one
    is there at a time."""
    if not all(is_whole_on(own, *DECODE_PATHS) for own in parts):
        return False
    return len(parts) == 1 or not any(own[0].calls for own in parts)


def _parts(layers: Sequence[Layer], path: str, like: torch.Tensor, arch: int) -> list[list[Part]]:
    """The parts of each layer's weight, which take turns in one memory where they are written out."""
    room = room_for([layer.weight for layer in layers], path, like)
    return [list(parts_of(layer.weight, path, like, arch, room)) for layer in layers]


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
    needs_x, *pools = needs
    layer, asked = Layer(weight, adapters), (needs_x, [(pools[0], pools[1])])
    dx, ((da, db),), calls = shared_backward_calls([dy], x, [layer], [s], routing, dropout, path, arch, asked)
    return dx, da, db, calls


Pair = tuple[torch.Tensor | None, torch.Tensor | None]  # gradients of pool_a and pool_b
SharedNeeds = tuple[bool, Sequence[tuple[bool, bool]]]  # whether x asks, and each projection's pools


def shared_backward_calls(
    dys: Sequence[torch.Tensor],
    x: Kept,
    layers: Sequence[Layer],
    parts_s: Sequence[Kept],
    routing: Routing,
    dropout: Dropout | None,
    path: str,
    arch: int,
    needs: SharedNeeds,
) -> tuple[torch.Tensor | None, list[Pair], Calls]:
    """The same for several projections of x: one dX, and each one's gradients of its pools.

    dX is one buffer: the first launches write it, the others add to it.
    """
    needs_x, needs_pools = needs
    first, M, K = dys[0], dys[0].shape[0], layers[0].weight.shape[1]
    common: dict[str, Any] = {"arch": arch, "precision": precision()}
    dx = first.new_empty(M, K) if needs_x else None
    pairs: list[Pair] = []
    for layer, (needs_a, needs_b) in zip(layers, needs_pools, strict=True):
        da = torch.empty_like(layer.adapters.pool_a, memory_format=torch.contiguous_format) if needs_a else None
        pairs.append((da, torch.empty_like(layer.adapters.pool_b) if needs_b else None))
    # One fill of memory, where finding out who is absent would take a kernel of its own.
    calls: Calls = [TorchCall("zero", torch.Tensor.zero_, (t,)) for pair in pairs for t in pair if t is not None]
    parts_ds: list[Kept] = [None] * len(layers)
    if needs_x or any(needs_a for needs_a, _ in needs_pools):
        ranks = [layer.adapters.max_rank for layer in layers]
        parts_ds = [*columns(scratch(M, sum(ranks), dtype=first.dtype, device=first.device), ranks)]
        for i, (dy, layer) in enumerate(zip(dys, layers, strict=True)):
            if needs_x or needs_pools[i][0]:
                calls += multi_shrink_calls(dy, layer.adapters, routing, parts_ds[i], pool="b", **common)
            else:
                parts_ds[i] = None
    if dx is not None:
        calls += _dx_calls(dys, layers, parts_ds, routing, dx, dropout, path, common)
    for dy, layer, s, ds, (da, db) in zip(dys, layers, parts_s, parts_ds, pairs, strict=True):
        if da is not None or db is not None:
            calls += multi_weight_gradient_calls(
                ds if da is not None else None,
                x if da is not None else None,
                s if db is not None else None,
                dy if db is not None else None,
                da,
                db,
                layer.adapters,
                routing,
                dropout=dropout,
                **common,
            )
    return dx, pairs, calls


def _dx_calls(
    dys: Sequence[torch.Tensor],
    layers: Sequence[Layer],
    parts_ds: Sequence[Kept],
    routing: Routing,
    dx: torch.Tensor,
    dropout: Dropout | None,
    path: str,
    common: dict[str, Any],
) -> Calls:
    """Launches of dX = sum over the projections of dY W + keep / (1 - p) * (dS A)."""
    calls: Calls = []
    if dx.shape[0] == 0:
        return calls
    options: dict[str, Any] = {"dropout": dropout, **common}
    others = list(zip(dys, layers, _parts(layers, path, dx, common["arch"]), parts_ds, strict=True))
    if is_whole_on(others[0][2], *IN_GEMM):
        dy, layer, (part,), ds = others.pop(0)
        calls += _base_and_expand(dy, layer.adapters, part, ds, routing, dx, options)
    if path in FUSED_4BIT_PATHS:  # that kernel only writes: a second buffer, added
        for dy, layer, (part,), ds in others:
            more = scratch(*dx.shape, dtype=dx.dtype, device=dx.device)
            calls += _base_and_expand(dy, layer.adapters, part, ds, routing, more, options)
            calls.append(TorchCall("dX: sum", torch.Tensor.add_, (dx, more), nbytes(dx, dx, more)))
        return calls
    if others:
        held = [layer.adapters for _, layer, _, _ in others]
        accumulate = len(others) < len(dys)
        calls += group_expand_calls([ds for *_, ds in others], held, routing, dx, accumulate=accumulate, **options)
        for dy, _, own, _ in others:
            for part in own:
                calls += [*part.calls, add_base(part.of_columns(dy), part.weight.t(), dx)]
    return calls


def _base_and_expand(
    dy: torch.Tensor,
    adapters: Adapters,
    part: Part,
    ds: Kept,
    routing: Routing,
    dx: torch.Tensor,
    options: dict[str, Any],
) -> Calls:
    """One projection's dX by a GEMM with the expand in its accumulator."""
    factor = MixedFactor(adapters, routing, "a")
    if isinstance(part.weight, torch.Tensor):
        return [*part.calls, *base_plus_expand_calls(dy, part.weight.t(), ds, factor, dx, **options)]
    return [*base_4bit_transposed_plus_expand_calls(dy, packed(part.weight), ds, factor, dx, **options)]


def _stored(layers: Sequence[Layer], routing: Routing) -> Stored:
    """What a recording of a path's launches must know of these."""
    key, seen, told = stored(*(layer.weight for layer in layers))
    numbers, tensors = list(key), [*seen]
    for layer in layers:
        adapters = layer.adapters
        numbers += [adapters.max_rank, adapters.N]
        tensors += [adapters.pool_a, adapters.pool_b, adapters.row_offset, adapters.rank, adapters.scaling, layer.bias]
    return Stored(tuple(numbers), [*tensors, *routing.tensors], told)


def forward(
    x: torch.Tensor,
    layers: Sequence[Layer],
    routing: Routing,
    seed: torch.Tensor | None,
    p: float,
    path: str,
    *,
    keep_s: bool = True,
) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    """Run the launches of `shared_forward_calls`, from a recording once the situation has been met; y and S of each."""
    arch, frozen = device_info(x.device).arch, _stored(layers, routing)
    drop = dropout(seed, p)

    def build() -> Any:
        ys, s, calls = shared_forward_calls(x, layers, routing, drop, path, arch, keep_s)
        return (*ys, s), calls

    key = ("multi_lora_linear", frozen.key, p, path, keep_s, precision())
    *ys, s = replay.produce(key, (x, *frozen.seen, seed), build, x.device, frozen.told)
    return ys, columns(s, [layer.adapters.max_rank for layer in layers])


def backward(
    dys: Sequence[torch.Tensor],
    x: Kept,
    layers: Sequence[Layer],
    parts_s: Sequence[Kept],
    routing: Routing,
    seed: torch.Tensor | None,
    p: float,
    path: str,
    needs: SharedNeeds,
) -> tuple[torch.Tensor | None, list[Pair]]:
    """Run the launches of `shared_backward_calls`, likewise; the gradients of x and of each one's pools."""
    device = dys[0].device
    arch, frozen = device_info(device).arch, _stored(layers, routing)
    drop = dropout(seed, p)

    def build() -> Any:
        dx, pairs, calls = shared_backward_calls(dys, x, layers, parts_s, routing, drop, path, arch, needs)
        return [dx, *(t for pair in pairs for t in pair)], calls

    key = ("multi_lora_linear backward", frozen.key, p, path, needs[0], tuple(needs[1]), precision())
    dx, *flat = replay.produce(key, (*dys, x, *frozen.seen, *parts_s, seed), build, device, frozen.told)
    return dx, list(zip(flat[::2], flat[1::2], strict=True))


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
