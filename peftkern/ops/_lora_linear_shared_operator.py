"""`peftkern::lora_linear_shared`: the operator that torch.compile, fake tensors and dispatch modes see.

One operator for dense and quantized weights: they cross its boundary as a list of tensors and a list of numbers, from
which they are put together again (`flatten_all`, `unflatten_all`). Of biases it takes those that there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from peftkern.ops._common import (
    is_plain,
    rank_columns,
    refuse_double_backward,
)
from peftkern.ops._lora_linear_shared_call import Optional, backward_shared, forward_shared, launched_apart
from peftkern.ops._projection_group import Group, dtype_of_all
from peftkern.ops._rank_rows import fake_s, s_columns
from peftkern.ops.lora_linear_quantized import flatten, unflatten
from peftkern.ops.plan import DECODE_PATHS, path_of_all, path_of_each
from peftkern.weights import Weight

NUMBERS = 4  # of each weight: its tensors, one if it is dense; N, K and blocksize of a quantized one


def call_operator(
    x: torch.Tensor,
    weights: Sequence[Weight],
    lora_As: Sequence[torch.Tensor],
    lora_Bs: Sequence[torch.Tensor],
    scalings: Sequence[float],
    biases: Sequence[Optional],
    p: float,
    seed: Optional,
    path: str,
) -> tuple[torch.Tensor, ...]:
    """`lora_linear_shared` as a call of the operator; weights and biases learn nothing."""
    held = [bias for bias in biases if bias is not None]
    biased = [bias is not None for bias in biases]
    parts = (*flatten_all(weights), held, biased)
    ys, _, _ = _operator(x, list(lora_As), list(lora_Bs), *parts, seed, list(scalings), p, path)
    return tuple(ys)


def flatten_all(weights: Sequence[Weight]) -> tuple[list[torch.Tensor], list[int]]:
    """The tensors and the numbers of weights."""
    tensors: list[torch.Tensor] = []
    numbers: list[int] = []
    for weight in weights:
        parts, sizes = ([weight], [0, 0, 0]) if isinstance(weight, torch.Tensor) else flatten(weight)
        tensors += parts
        numbers += [len(parts), *sizes]
    return tensors, numbers


def unflatten_all(tensors: Sequence[torch.Tensor], numbers: Sequence[int]) -> list[Any]:
    """The inverse of `flatten_all`."""
    rest = iter(tensors)
    weights: list[Any] = []
    for i in range(0, len(numbers), NUMBERS):
        count, *sizes = numbers[i : i + NUMBERS]
        parts = [next(rest) for _ in range(count)]
        weights.append(parts[0] if count == 1 else unflatten(parts, sizes))
    return weights


def _draws_mask(seed: Optional, path: str) -> bool:
    """Whether forward keeps a mask, rather than the seed to draw it again."""
    return seed is not None and is_plain(path)


@torch.library.custom_op("peftkern::lora_linear_shared", mutates_args=())
def _operator(
    x: torch.Tensor,
    lora_As: Sequence[torch.Tensor],
    lora_Bs: Sequence[torch.Tensor],
    tensors: Sequence[torch.Tensor],
    numbers: Sequence[int],
    biases: Sequence[torch.Tensor],
    biased: Sequence[bool],
    seed: torch.Tensor | None,
    scalings: Sequence[float],
    dropout_p: float,
    path: str,
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """(each y, S of all, mask); mask is empty unless the plain path drew one."""
    weights, held = unflatten_all(tensors, numbers), iter(biases)
    all_biases = [next(held) if has else None for has in biased]
    group = Group(tuple(weights), tuple(scalings), s_columns([A.shape[0] for A in lora_As], x, path), dropout_p, path)
    if path in DECODE_PATHS and launched_apart(weights, lora_As, lora_Bs, all_biases):
        ys, s = _forward_apart(x, group, lora_As, lora_Bs, all_biases, seed)
        mask = None
    else:
        ys, s, mask = forward_shared(x, group, lora_As, lora_Bs, all_biases, seed)
    return ys, s, x.new_empty(0, dtype=torch.bool) if mask is None else mask


def _forward_apart(
    x: torch.Tensor,
    group: Group,
    lora_As: Sequence[torch.Tensor],
    lora_Bs: Sequence[torch.Tensor],
    biases: Sequence[Optional],
    seed: Optional,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """`forward_shared` with launches for each projection: addresses that no plan could see are aligned differently."""
    ys, parts = [], []
    for weight, lora_A, lora_B, scaling, bias in zip(
        group.weights, lora_As, lora_Bs, group.scalings, biases, strict=True
    ):
        one = Group((weight,), (scaling,), rank_columns([lora_A]), group.dropout_p, group.path)
        (y,), s, _ = forward_shared(x, one, [lora_A], [lora_B], [bias], seed)
        ys.append(y)
        parts.append(s)
    return ys, torch.cat(parts, dim=1)


@_operator.register_fake
def _(x, lora_As, lora_Bs, tensors, numbers, biases, biased, seed, scalings, dropout_p, path):
    K = x.shape[-1]
    M = x.numel() // K
    return (
        [x.new_empty(*x.shape[:-1], lora_B.shape[0]) for lora_B in lora_Bs],
        fake_s(x, M, s_columns([A.shape[0] for A in lora_As], x, path)[-1].stop, path),
        x.new_empty((M, K) if _draws_mask(seed, path) else (0,), dtype=torch.bool),
    )


@torch.library.custom_op("peftkern::lora_linear_shared_backward", mutates_args=())
def _operator_backward(
    dys: Sequence[torch.Tensor],
    x: torch.Tensor | None,
    lora_As: Sequence[torch.Tensor],
    lora_Bs: Sequence[torch.Tensor],
    tensors: Sequence[torch.Tensor],
    numbers: Sequence[int],
    s: torch.Tensor | None,
    mask: torch.Tensor | None,
    seed: torch.Tensor | None,
    scalings: Sequence[float],
    starts: Sequence[int],
    dropout_p: float,
    path: str,
    needs_x: bool,
    needs_a: bool,
    needs_bs: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Gradients of x, of A of all these projections [R, K] and of each B, empty where not asked for.

    `starts`: each one's first column of S, which may have those of other projections too.
    """
    columns = tuple(slice(at, at + lora_A.shape[0]) for at, lora_A in zip(starts, lora_As, strict=True))
    group = Group(tuple(unflatten_all(tensors, numbers)), tuple(scalings), columns, dropout_p, path)
    needs = (needs_x, needs_a, needs_bs)
    dx, da, dbs = backward_shared(dys, x, group, lora_As, lora_Bs, s, mask, seed, needs)
    nothing = dys[0].new_empty
    return (
        nothing(0) if dx is None else dx,
        nothing(0) if da is None else da.to(dtype_of_all(lora_As)),
        [nothing(0) if db is None else db.to(B.dtype) for db, B in zip(dbs, lora_Bs, strict=True)],
    )


@_operator_backward.register_fake
def _(
    dys,
    x,
    lora_As,
    lora_Bs,
    tensors,
    numbers,
    s,
    mask,
    seed,
    scalings,
    starts,
    dropout_p,
    path,
    needs_x,
    needs_a,
    needs_bs,
):
    dy, K = dys[0], lora_As[0].shape[1]
    R = sum(lora_A.shape[0] for lora_A in lora_As)
    return (
        dy.new_empty((*dy.shape[:-1], K) if needs_x else (0,)),
        dy.new_empty((R, K), dtype=dtype_of_all(lora_As)) if needs_a else dy.new_empty(0),
        [
            dy.new_empty(B.shape, dtype=B.dtype) if need else dy.new_empty(0)
            for B, need in zip(lora_Bs, needs_bs, strict=True)
        ],
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, lora_As, lora_Bs, tensors, numbers, biases, _, seed, scalings, dropout_p, path = inputs
    ys, s, mask = output
    each_a, each_b = ([t.requires_grad for t in given] for given in (lora_As, lora_Bs))
    ctx.set_materialize_grads(False)
    unlearned = [s, mask]
    if not x.requires_grad:  # an output that nothing learns from has no history, as by single calls
        unlearned += [y for y, a, b in zip(ys, each_a, each_b, strict=True) if not (a or b)]
    ctx.mark_non_differentiable(*unlearned)
    draws = _draws_mask(seed, path)
    # What the eager door keeps; weights, A and B exist anyway.
    ctx.save_for_backward(
        x if any(each_a) else None,
        s if any(each_b) else None,
        mask if draws else None,
        None if draws else seed,
        *lora_As,
        *lora_Bs,
        *tensors,
    )
    ctx.numbers, ctx.scalings, ctx.rest, ctx.biases = list(numbers), list(scalings), (dropout_p, path), len(biases)
    ctx.starts = [columns.start for columns in s_columns([A.shape[0] for A in lora_As], x, path)]


def _operator_autograd(ctx: Any, dys: Sequence[Optional], *_: Optional) -> tuple[Any, ...]:
    refuse_double_backward("lora_linear_shared")
    x, s, mask, seed, *held = ctx.saved_tensors
    needs_x, each_a, each_b, *_others = ctx.needs_input_grad
    n = len(dys)
    lora_As, lora_Bs, tensors = held[:n], held[n : 2 * n], held[2 * n :]
    das: list[Optional] = [None] * n
    dbs: list[Optional] = [None] * n
    dx: Optional = None
    live = [i for i, dy in enumerate(dys) if dy is not None]
    if live:
        weights = unflatten_all(tensors, ctx.numbers)
        live_tensors, numbers = flatten_all([weights[i] for i in live])
        live_As, live_Bs = [lora_As[i] for i in live], [lora_Bs[i] for i in live]
        scalings, starts = [ctx.scalings[i] for i in live], [ctx.starts[i] for i in live]
        needs = (needs_x, any(each_a[i] for i in live), [each_b[i] for i in live])
        parts = (live_As, live_Bs, live_tensors, numbers, s, mask, seed, scalings, starts)
        dropout_p, path = ctx.rest
        live_path = path_of_all([path_of_each(path, n)[i] for i in live])
        all_dx, all_da, live_dbs = _operator_backward([dys[i] for i in live], x, *parts, dropout_p, live_path, *needs)
        dx = all_dx if needs_x else None
        for i, lora_A, place, db in zip(live, live_As, rank_columns(live_As), live_dbs, strict=True):
            das[i] = all_da[place].to(lora_A.dtype) if each_a[i] else None
            dbs[i] = db if each_b[i] else None
    return dx, das, dbs, [None] * len(tensors), None, [None] * ctx.biases, *(None,) * 5


_operator.register_autograd(_operator_autograd, setup_context=_setup_context)
