"""`lora_linear_shared` as launches of kernels, forward and backward.

One shrink makes S [M, R] of all projections, side by side in its columns; each projection's base GEMM takes its own
columns. In backward each dY makes its columns of dS, the first projection writes dX with the low-rank part of all of
them in its accumulator, the others are added to it by cuBLAS, and one launch makes all of dA. A quantized weight that
is to be dense first is written out for one projection at a time.

On the decode paths the two launches of forward take all projections (lora_decode.py). Backward there is as elsewhere:
the decode kernels give a projection its dX together with its dS, so three would be three buffers and torch's additions;
a GEMM with K split and the low-rank part of all, to which cuBLAS adds, reads each W once too and has fewer launches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from peftkern.ops._common import rank_columns
from peftkern.ops._lora_linear_triton import (
    FUSED_4BIT_PATHS,
    Kept,
    dx_calls,
    input_gradient_calls,
    precision,
    product_calls,
    thin_calls,
)
from peftkern.ops._projection_group import Group, dtype_of_all
from peftkern.ops._rank_rows import Columns, joined_parts, new_s, scratch_s, whole_blocks
from peftkern.ops._weight_calls import Calls, packed, parts_of, room_for, stored
from peftkern.ops.plan import DECODE_PATHS
from peftkern_kernels import replay
from peftkern_kernels.dropout import Dropout
from peftkern_kernels.launch import TorchCall, Turns, nbytes, scratch
from peftkern_kernels.lora_decode import group_decode_calls
from peftkern_kernels.lora_decode_4bit import group_decode_4bit_calls
from peftkern_kernels.lora_decode_finish import Projection
from peftkern_kernels.lora_shrink import shrink_calls
from peftkern_kernels.weight_gradient import weight_gradient_calls

Gradients = tuple[Kept, Kept, list[Kept]]  # dX, dA of all projections, each dB


def _key(what: str, dropout: Dropout | None, *rest: Any) -> tuple[Any, ...]:
    return (what, 0.0 if dropout is None else dropout.p, precision(), *rest)


def _numbers(group: Group) -> tuple[Any, ...]:
    """What launches of the shrinks depend on beside tensors."""
    return group.scalings, tuple((columns.start, columns.stop) for columns in group.columns)


def _seed(dropout: Dropout | None) -> torch.Tensor | None:
    return None if dropout is None else dropout.seed


def _join(out: torch.Tensor, *parts: torch.Tensor) -> None:
    torch.cat(parts, out=out)


def joined(lora_As: Sequence[torch.Tensor], columns: Columns) -> tuple[torch.Tensor, Calls]:
    """Memory between launches for A of all projections [R, K], in a dtype that holds each, a row for each column of S
    or dS, and the call that fills it."""
    out = scratch(columns[-1].stop, lora_As[0].shape[1], dtype=dtype_of_all(lora_As), device=lora_As[0].device)
    return out, [TorchCall("join A", _join, (out, *joined_parts(lora_As, columns)), bytes=2 * nbytes(out))]


def all_shrinks(
    x: torch.Tensor, group: Group, lora_A: torch.Tensor, s: torch.Tensor, dropout: Dropout | None, arch: int
) -> Calls:
    """Launches of `S = scaling * dropout(x) A^T` for A [R, K] of all projections, a row for each column of S: one where
    they scale alike."""
    common: dict[str, Any] = {"dropout": dropout, "arch": arch, "precision": precision()}
    if len(set(group.scalings)) == 1:
        return [*shrink_calls(x, lora_A, s, scaling=group.scalings[0], **common)]
    calls: Calls = []
    for columns, scaling in zip(whole_blocks(group.columns), group.scalings, strict=True):
        calls += shrink_calls(x, lora_A[columns], s[:, columns], scaling=scaling, **common)
    return calls


def forward(
    x: torch.Tensor,
    group: Group,
    lora_As: Sequence[torch.Tensor],
    lora_Bs: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    dropout: Dropout | None,
    arch: int,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """x [M, K] -> each y [M, N], and S [M, R] of all projections, with its scaling, in x's dtype."""
    if group.path in DECODE_PATHS:
        return _decoded(x, group, lora_As, lora_Bs, biases, dropout, arch)
    frozen = stored(*group.weights)

    def build() -> Any:
        ys, s, calls = forward_calls(x, group, lora_As, lora_Bs, biases, dropout, arch)
        return (*ys, s), calls

    key = _key("lora_linear_shared", dropout, group.path, *_numbers(group), frozen.key)
    tensors = (x, *frozen.seen, *lora_As, *lora_Bs, *biases, _seed(dropout))
    *ys, s = replay.produce(key, tensors, build, x.device, frozen.told)
    return ys, s


def forward_calls(
    x: torch.Tensor,
    group: Group,
    lora_As: Sequence[torch.Tensor],
    lora_Bs: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    dropout: Dropout | None,
    arch: int,
) -> tuple[list[torch.Tensor], torch.Tensor, Calls]:
    """The results of `forward`, but on the decode paths, and their launches."""
    s = new_s(x, x.shape[0], group.columns[-1].stop, group.path, arch)
    ys = [x.new_empty(x.shape[0], weight.shape[0]) for weight in group.weights]
    lora_A, calls = joined(lora_As, group.columns)
    calls += all_shrinks(x, group, lora_A, s, dropout, arch)
    room = room_for(group.weights, group.path, x)
    each = zip(group.weights, group.paths, lora_Bs, biases, group.columns, ys, strict=True)
    for weight, path, lora_B, bias, columns, y in each:
        parts = parts_of(weight, path, x, arch, room)
        calls += product_calls(x, parts, s[:, columns], lora_B, y, bias, arch)
    return ys, s, calls


def _decoded(
    x: torch.Tensor,
    group: Group,
    lora_As: Sequence[torch.Tensor],
    lora_Bs: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    dropout: Dropout | None,
    arch: int,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """`forward` on the decode paths."""
    # Of another dtype only under autocast; cast again in backward, so that no copy is kept.
    weights = tuple(w.to(x.dtype) if isinstance(w, torch.Tensor) else w for w in group.weights)
    group = dataclasses.replace(group, weights=weights)
    frozen = stored(*weights)

    def build() -> Any:
        ys, s, calls = decoded_calls(x, group, lora_As, lora_Bs, biases, dropout, arch)
        return (*ys, s), calls

    key = _key("lora_linear_shared decode", dropout, group.path, *_numbers(group), frozen.key)
    tensors = (x, *frozen.seen, *lora_As, *lora_Bs, *biases, _seed(dropout))
    *ys, s = replay.produce(key, tensors, build, x.device, frozen.told)
    return ys, s


def decoded_calls(
    x: torch.Tensor,
    group: Group,
    lora_As: Sequence[torch.Tensor],
    lora_Bs: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    dropout: Dropout | None,
    arch: int,
) -> tuple[list[torch.Tensor], torch.Tensor, Calls]:
    """Each `y = x W^T + bias + S B^T`, S [M, R], made on the way, and the two launches, for at most 16 tokens."""
    s = x.new_empty(x.shape[0], group.columns[-1].stop)
    ys = [x.new_empty(x.shape[0], weight.shape[0]) for weight in group.weights]
    own_s = [s[:, columns] for columns in group.columns]
    parts = zip(lora_As, lora_Bs, group.scalings, ys, own_s, biases, strict=True)
    projections = [Projection(*each) for each in parts]
    common: dict[str, Any] = {"dropout": dropout, "arch": arch, "precision": precision()}
    if group.path == "decode":
        return ys, s, [*group_decode_calls(x, group.weights, projections, **common)]
    return ys, s, [*group_decode_4bit_calls(x, [packed(w) for w in group.weights], projections, **common)]


def backward(
    dys: Sequence[torch.Tensor],
    x: Kept,
    group: Group,
    lora_As: Sequence[torch.Tensor],
    lora_Bs: Sequence[torch.Tensor],
    s: Kept,
    dropout: Dropout | None,
    arch: int,
    needs: tuple[bool, bool, Sequence[bool]],
) -> Gradients:
    """Each dy [M, N] -> dX [M, K], dA [R, K] of all projections, each dB [N, r]; only what `needs` asks for."""
    needs_x, needs_a, needs_bs = needs
    frozen = stored(*(group.weights if needs_x else ()))

    def build() -> Any:
        gradients, calls = backward_calls(dys, x, group, lora_As, lora_Bs, s, dropout, arch, needs)
        dx, da, dbs = gradients
        return (dx, da, *dbs), calls

    asked = (needs_x, needs_a, *needs_bs)
    key = _key("lora_linear_shared backward", dropout, group.path, *_numbers(group), asked, frozen.key)
    tensors = (*dys, x, *frozen.seen, *lora_As, *lora_Bs, s, _seed(dropout))
    dx, da, *dbs = replay.produce(key, tensors, build, dys[0].device, frozen.told)
    return dx, da, dbs


def backward_calls(
    dys: Sequence[torch.Tensor],
    x: Kept,
    group: Group,
    lora_As: Sequence[torch.Tensor],
    lora_Bs: Sequence[torch.Tensor],
    s: Kept,
    dropout: Dropout | None,
    arch: int,
    needs: tuple[bool, bool, Sequence[bool]],
) -> tuple[Gradients, Calls]:
    """The results of `backward` and their launches: each `dS = scaling * dY B` and `dB = dY^T S`, then dX, then
    `dA = dS^T dropout(x)` of all projections. Sums that are made in parts have one memory in turn."""
    needs_x, needs_a, needs_bs = needs
    M, K, R = dys[0].shape[0], lora_As[0].shape[1], sum(lora_A.shape[0] for lora_A in lora_As)
    dbs = [
        torch.empty_like(lora_B, memory_format=torch.contiguous_format) if needs_b else None
        for lora_B, needs_b in zip(lora_Bs, needs_bs, strict=True)
    ]
    dx = dys[0].new_empty(M, K) if needs_x else None
    da = lora_As[0].new_empty(R, K, dtype=dtype_of_all(lora_As)) if needs_a else None
    ds: Kept = None
    if dx is not None or da is not None:
        ds = scratch_s(dys[0], M, R, group.path, arch)
    calls: Calls = []
    turns = Turns()
    common: dict[str, Any] = {"arch": arch, "precision": precision()}
    each = zip(dys, lora_Bs, dbs, group.scalings, group.columns, rank_columns(lora_As), strict=True)
    for dy, lora_B, db, scaling, columns, place in each:
        own_s = None if db is None else s[:, columns]
        done = False
        with turns.turn():
            if ds is not None:
                thin, done = thin_calls(dy, lora_B, own_s, ds[:, place], db, scaling, arch)
                calls += thin
            if db is not None and not done:
                calls += weight_gradient_calls(None, None, own_s, dy, None, db, **common)
    if dx is not None:
        calls += _dx_calls(dys, group, lora_As, ds, dx, dropout, arch)
    if da is not None:
        with turns.turn():
            calls += weight_gradient_calls(ds, x, None, None, da, None, dropout=dropout, **common)
    return (dx, da, dbs), calls


def _dx_calls(
    dys: Sequence[torch.Tensor],
    group: Group,
    lora_As: Sequence[torch.Tensor],
    ds: torch.Tensor,
    dx: torch.Tensor,
    dropout: Dropout | None,
    arch: int,
) -> Calls:
    """Launches of dX, the sum of `dY W + keep / (1 - p) * (dS A)` over the projections."""
    places = rank_columns(lora_As)
    calls: Calls = []
    if group.path in FUSED_4BIT_PATHS:
        own: Kept = None  # these kernels only write
        for dy, weight, own_a, place in zip(dys, group.weights, lora_As, places, strict=True):
            to = dx if own is None else own
            calls += input_gradient_calls(dy, weight, ds[:, place], own_a, to, dropout, group.path, arch)
            if own is None:
                own = scratch(*dx.shape, dtype=dx.dtype, device=dx.device)
            else:
                calls.append(TorchCall("+ dX", torch.Tensor.add_, (dx, own), bytes=3 * nbytes(dx)))
        return calls
    lora_A, calls = joined(lora_As, places)
    room = room_for(group.weights, group.path, dx)
    each = zip(dys, group.weights, group.paths, strict=True)
    products = [(dy, part) for dy, weight, path in each for part in parts_of(weight, path, dy, arch, room)]
    return [*calls, *dx_calls(products, ds, lora_A, dx, dropout, arch)]
