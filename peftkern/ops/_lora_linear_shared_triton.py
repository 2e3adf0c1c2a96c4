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
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from peftkern.ops._common import rank_columns
from peftkern.ops._lora_linear_torch import dense_rows
from peftkern.ops._lora_linear_triton import (
    FUSED_4BIT_PATHS,
    Calls,
    Kept,
    input_gradient_calls,
    output_calls,
    packed,
    precision,
    thin_calls,
    weight_parts,
)
from peftkern.ops._projection_group import Group
from peftkern.ops._rank_rows import joined, new_s, whole_blocks
from peftkern.ops.lora_linear_quantized import _dense_blocks as dense_blocks
from peftkern.ops.plan import DECODE_PATHS
from peftkern_kernels import replay
from peftkern_kernels.dropout import Dropout
from peftkern_kernels.lora_decode import group_decode_calls
from peftkern_kernels.lora_decode_4bit import group_decode_4bit_calls
from peftkern_kernels.lora_decode_finish import Projection
from peftkern_kernels.lora_shrink import shrink_calls
from peftkern_kernels.weight_gradient import weight_gradient_calls


def _key(what: str, dropout: Dropout | None, *rest: Any) -> tuple[Any, ...]:
    return (what, 0.0 if dropout is None else dropout.p, precision(), *rest)


def _numbers(group: Group) -> tuple[Any, ...]:
    """What launches of the shrinks depend on beside tensors."""
    return group.scalings, tuple((columns.start, columns.stop) for columns in group.columns)


def _seed(dropout: Dropout | None) -> torch.Tensor | None:
    return None if dropout is None else dropout.seed


def _blocks(weight: Any, dtype: torch.dtype, path: str) -> Iterator[tuple[slice, Any, str]]:
    """(rows, these rows of the weight as kernels take them, path): on "dequantize:PATH" dense blocks, for PATH."""
    how, _, dense_path = path.partition(":")
    if how != "dequantize":
        # Of another dtype only under autocast; cast again in backward, so that no copy is kept.
        yield slice(0, weight.shape[0]), weight.to(dtype) if isinstance(weight, torch.Tensor) else weight, path
        return
    for part, dense in dense_blocks(weight, dtype, dense_path):
        yield part, dense, dense_path


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
    lora_A = joined(lora_As, group.columns)
    s = new_s(x, x.shape[0], lora_A.shape[0], group.path, arch)
    replay.run(
        _key("lora_linear_shared", dropout, *_numbers(group)),
        (x, lora_A, s, _seed(dropout)),
        lambda: all_shrinks(x, group, lora_A, s, dropout, arch),
        x.device,
    )
    ys = []
    for weight, lora_B, bias, columns in zip(group.weights, lora_Bs, biases, group.columns, strict=True):
        ys.append(_output(x, weight, s[:, columns], lora_B, bias, group.path, arch))
    return ys, s


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
    # Of another dtype only under autocast, as in `_blocks`.
    weights = tuple(w.to(x.dtype) if isinstance(w, torch.Tensor) else w for w in group.weights)
    group = dataclasses.replace(group, weights=weights)
    s = x.new_empty(x.shape[0], group.columns[-1].stop)
    ys = [x.new_empty(x.shape[0], w.shape[0]) for w in weights]
    blocksizes, tensors = [], []
    for weight in weights:
        blocksize, *held = weight_parts(weight)
        blocksizes.append(blocksize)
        tensors += held
    replay.run(
        _key("lora_linear_shared decode", dropout, group.path, *_numbers(group), *blocksizes),
        (x, *tensors, *lora_As, *lora_Bs, *biases, _seed(dropout), *ys, s),
        lambda: decoded_calls(x, group, lora_As, lora_Bs, biases, ys, s, dropout, arch),
        x.device,
    )
    return ys, s


def decoded_calls(
    x: torch.Tensor,
    group: Group,
    lora_As: Sequence[torch.Tensor],
    lora_Bs: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    ys: Sequence[torch.Tensor],
    s: torch.Tensor,
    dropout: Dropout | None,
    arch: int,
) -> Calls:
    """The two launches of each `y = x W^T + bias + S B^T`, S [M, R] made on the way, for at most 16 tokens."""
    own_s = [s[:, columns] for columns in group.columns]
    parts = zip(lora_As, lora_Bs, group.scalings, ys, own_s, biases, strict=True)
    projections = [Projection(*each) for each in parts]
    common: dict[str, Any] = {"dropout": dropout, "arch": arch, "precision": precision()}
    if group.path == "decode":
        return [*group_decode_calls(x, group.weights, projections, **common)]
    return [*group_decode_4bit_calls(x, [packed(w) for w in group.weights], projections, **common)]


def _output(
    x: torch.Tensor,
    weight: Any,
    s: torch.Tensor,
    lora_B: torch.Tensor,
    bias: torch.Tensor | None,
    path: str,
    arch: int,
) -> torch.Tensor:
    """`y = x W^T + bias + S B^T` [M, N]. No loop of a caller's: its last dense weight would outlive the iteration, and
    stand beside the next projection's."""
    y = x.new_empty(x.shape[0], weight.shape[0])
    for part, rows, rows_path in _blocks(weight, x.dtype, path):
        part_bias = None if bias is None else bias[part]
        _run_output(x, rows, s, lora_B[part], y[:, part], part_bias, rows_path, arch)
    return y


def _run_output(
    x: torch.Tensor,
    weight: Any,
    s: torch.Tensor,
    lora_B: torch.Tensor,
    y: torch.Tensor,
    bias: torch.Tensor | None,
    path: str,
    arch: int,
) -> None:
    """`y = x W^T + bias + S B^T`."""
    blocksize, *held = weight_parts(weight)
    replay.run(
        _key("lora_linear_shared output", None, path, blocksize),
        (x, *held, s, lora_B, bias, y),
        lambda: output_calls(x, weight, s, lora_B, y, bias, path, arch),
        x.device,
    )


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
) -> tuple[torch.Tensor | None, torch.Tensor | None, list[torch.Tensor | None]]:
    """Each dy [M, N] -> dX [M, K], dA [R, K] of all projections, each dB [N, r]; only what `needs` asks for."""
    needs_x, needs_a, needs_bs = needs
    M, device = dys[0].shape[0], dys[0].device
    dbs: list[torch.Tensor | None] = []
    places = rank_columns(lora_As)
    ds: Kept = new_s(dys[0], M, places[-1].stop, group.path, arch) if needs_x or needs_a else None
    parts = zip(dys, lora_Bs, group.scalings, group.columns, places, needs_bs, strict=True)
    for dy, lora_B, scaling, columns, place, needs_b in parts:
        db = torch.empty_like(lora_B, memory_format=torch.contiguous_format) if needs_b else None
        own_s = s[:, columns] if needs_b else None
        _run_thin(dy, lora_B, own_s, None if ds is None else ds[:, place], db, scaling, arch)
        dbs.append(db)
    lora_A = joined(lora_As, places)
    dx: Kept = None
    if needs_x and group.path in FUSED_4BIT_PATHS:
        for dy, weight, own_a, place in zip(dys, group.weights, lora_As, places, strict=True):
            own = _run_input_gradient(dy, weight, ds[:, place], own_a, dropout, group.path, arch)
            dx = own if dx is None else dx.add_(own)
    elif needs_x:
        for dy, weight in zip(dys, group.weights, strict=True):
            dx = _with_input_gradient(dx, dy, weight, ds, lora_A, dropout, group.path, arch)
    da = None
    if needs_a:
        da = torch.empty_like(lora_A)
        replay.run(
            _key("lora_linear_shared dA", dropout),
            (ds, x, da, _seed(dropout)),
            lambda: weight_gradient_calls(
                ds, x, None, None, da, None, dropout=dropout, arch=arch, precision=precision()
            ),
            device,
        )
    return dx, da, dbs


def _run_thin(dy: torch.Tensor, lora_B: torch.Tensor, s: Kept, ds: Kept, db: Kept, scaling: float, arch: int) -> None:
    """`dS = scaling * dY B` and `dB = dY^T S`, those of them that there is a tensor for."""

    def build() -> Calls:
        calls: Calls = []
        done = False
        if ds is not None:
            calls, done = thin_calls(dy, lora_B, s, ds, db, scaling, arch)
        if db is not None and not done:
            calls += weight_gradient_calls(None, None, s, dy, None, db, arch=arch, precision=precision())
        return calls

    replay.run(_key("lora_linear_shared dY", None, scaling), (dy, lora_B, s, ds, db), build, dy.device)


def _with_input_gradient(
    dx: Kept,
    dy: torch.Tensor,
    weight: Any,
    ds: torch.Tensor,
    lora_A: torch.Tensor,
    dropout: Dropout | None,
    path: str,
    arch: int,
) -> torch.Tensor:
    """dX with `dY W` of one projection added in place; without a dX yet, that and the low-rank part of all of them.

    A function of its own as `_output` is."""
    for part, rows, rows_path in _blocks(weight, dy.dtype, path):
        own_dy = dense_rows(dy[:, part])
        if dx is None:
            dx = _run_input_gradient(own_dy, rows, ds, lora_A, dropout, rows_path, arch)
        else:
            dx.addmm_(own_dy, rows)
    return dx


def _run_input_gradient(
    dy: torch.Tensor,
    weight: Any,
    ds: torch.Tensor,
    lora_A: torch.Tensor,
    dropout: Dropout | None,
    path: str,
    arch: int,
) -> torch.Tensor:
    """`dX = dY W + keep / (1 - p) * (dS A)`."""
    blocksize, *held = weight_parts(weight)
    dx = dy.new_empty(dy.shape[0], weight.shape[1])
    replay.run(
        _key("lora_linear_shared dX", dropout, path, blocksize),
        (dy, *held, ds, lora_A, dx, _seed(dropout)),
        lambda: input_gradient_calls(dy, weight, ds, lora_A, dx, dropout, path, arch),
        dy.device,
    )
    return dx
