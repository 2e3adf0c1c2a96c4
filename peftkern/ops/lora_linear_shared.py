"""`lora_linear_shared`: projections of one x (q, k and v; gate and up), each with its adapter, as one operation.

By themselves three projections read x for their shrinks three times, read it again for each dA, write three dX, and
leave torch to add those. Together they read x once for S and once for dA, and have one dX. For a few tokens, where the
number of launches counts, up to four projections take two launches in all.

Two doors lead to the same forward and backward, as for `lora_linear`: an autograd function in plain eager mode, and an
operator wherever something looks at operators (torch.compile, fake tensors, selective checkpointing). Where the
projections have no such path in common, the operation is the projections one by one on the same dropout seed, which
means the same; the plan says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from peftkern.backend import backend_in_force
from peftkern.ops._common import (
    adapters_fit,
    apply_directly,
    autocast_dtype,
    check_adapters,
    dropout_in_force,
    dropout_seed,
    in_dtype,
    kept_s,
    needs_operator,
    number,
    rank_columns,
    refuse_double_backward,
    taken_s,
)
from peftkern.ops._kept import keep, kept
from peftkern.ops._lora_linear_shared_call import Optional, backward_shared, forward_shared, launched_apart
from peftkern.ops._lora_linear_shared_operator import call_operator
from peftkern.ops._projection_group import Group
from peftkern.ops._rank_rows import remembered_columns
from peftkern.ops.lora_linear import lora_linear
from peftkern.ops.lora_linear import plan_for as plan_for_dense
from peftkern.ops.lora_linear_quantized import check_quantized
from peftkern.ops.lora_linear_quantized import plan_for as plan_for_quantized
from peftkern.ops.plan import APART, DECODE_PATHS, Plan, plan_shared
from peftkern.weights import Weight


def lora_linear_shared(
    x: torch.Tensor,
    weights: Sequence[Weight],
    lora_As: Sequence[torch.Tensor],
    lora_Bs: Sequence[torch.Tensor],
    scalings: Sequence[float],
    biases: Sequence[torch.Tensor | None] | None = None,
    *,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """`y_i = x W_i^T + bias_i + scaling_i * dropout(x) A_i^T B_i^T` for projections i of one x.

    The same as `lora_linear` of each with the same seed: all of them drop the same elements of x. Out features, ranks
    and scalings may differ. One operator forward and one backward also under torch.compile, over dense and quantized
    weights alike; single calls where the plan says so, and where a weight or a bias learns. On "decode" and
    "decode_4bit" K may be split otherwise than for one projection alone, and then sums differ in their last bits. Kept
    for backward: x by reference, S of all projections [M, sum of ranks] (on Hopper of ranks rounded up to multiples of
    8), and a seed (kernels) or one mask (plain PyTorch). Backward serves all outputs at once: gradients of one output
    alone are right, but then another backward needs `retain_graph=True`.

    Args:
        x: [..., in_features], as for `lora_linear`.
        weights: [out_features_i, in_features] each, dense or quantized.
        lora_As, lora_Bs: [r_i, in_features] and [out_features_i, r_i] each.
        scalings: a number each.
        biases: [out_features_i] or None each; None for none at all.
        dropout_p, training, seed: as for `lora_linear`.

    Returns:
        A tuple of [..., out_features_i] in x's dtype (autocast's under autocast).

    Raises:
        TypeError, ValueError, RuntimeError: as `lora_linear`.
        ValueError: the sequences have different lengths, or none.
    """
    count = _length("weights", weights)
    biases = [None] * count if biases is None else biases
    named = {"lora_As": lora_As, "lora_Bs": lora_Bs, "scalings": scalings, "biases": biases}
    for name, given in named.items():
        length = _length(name, given)
        if length != count:
            raise ValueError(f"lora_linear_shared: {name}: expected {count}, one for each weight, got {length}")
    if count == 0:
        raise ValueError("lora_linear_shared: weights: expected at least one, got none")
    p = dropout_in_force(dropout_p, training)
    cast = autocast_dtype(x)
    if cast is not None:
        x = x.to(cast)
    for parts in zip(weights, lora_As, lora_Bs, biases, strict=True):
        _check(x, *parts, mixed=cast is not None)
    scalings = [number("lora_linear_shared: scalings", scaling) for scaling in scalings]
    path = shared_plan_for(x, weights, lora_As, lora_Bs, biases, backend_in_force()).path
    return run(x, weights, lora_As, lora_Bs, scalings, biases, p, seed, path)


def _length(name: str, given: Any) -> int:
    try:
        return len(given)
    except TypeError:
        kind = type(given).__name__
        raise TypeError(f"lora_linear_shared: {name}: expected a list, one for each projection, got {kind}") from None


def run(
    x: torch.Tensor,
    weights: Sequence[Weight],
    lora_As: Sequence[torch.Tensor],
    lora_Bs: Sequence[torch.Tensor],
    scalings: Sequence[float],
    biases: Sequence[torch.Tensor | None],
    p: float,
    seed: torch.Tensor | None,
    path: str,
) -> tuple[torch.Tensor, ...]:
    """`lora_linear_shared` on a path of `shared_plan_for`, all arguments checked and autocast's casts done."""
    seed = None if p == 0.0 else dropout_seed(seed, x.device)
    learned = [t for t in (*weights, *biases) if isinstance(t, torch.Tensor)]
    if path == APART or any(t.requires_grad for t in learned):
        each = zip(weights, lora_As, lora_Bs, scalings, biases, strict=True)
        return tuple(lora_linear(x, *parts, dropout_p=p, seed=seed) for parts in each)
    biases = [in_dtype(bias, x.dtype) for bias in biases]
    if is_looked_at(x, weights, lora_As, lora_Bs, biases):
        return call_operator(x, weights, lora_As, lora_Bs, scalings, biases, p, seed, path)
    return run_eagerly(x, weights, lora_As, lora_Bs, scalings, biases, p, seed, path)


def is_looked_at(
    x: torch.Tensor,
    weights: Sequence[Weight],
    lora_As: Sequence[torch.Tensor],
    lora_Bs: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
) -> bool:
    """`needs_operator` of all that `run` is given."""
    frozen: list[Any] = [w if isinstance(w, torch.Tensor) else w.tensors()[0] for w in weights]  # the others are alike
    return needs_operator(x, *lora_As, *lora_Bs, *frozen, *(bias for bias in biases if bias is not None))


def run_eagerly(
    x: torch.Tensor,
    weights: Sequence[Weight],
    lora_As: Sequence[torch.Tensor],
    lora_Bs: Sequence[torch.Tensor],
    scalings: Sequence[float],
    biases: Sequence[torch.Tensor | None],
    p: float,
    seed: torch.Tensor | None,
    path: str,
) -> tuple[torch.Tensor, ...]:
    """`run` by the eager door: biases are in x's dtype, they and the weights do not learn, and the path is no APART."""
    seed = None if p == 0.0 else dropout_seed(seed, x.device)
    columns = remembered_columns(tuple([A.shape[0] for A in lora_As]), x.dtype, x.device, path)
    group = Group(tuple(weights), tuple(scalings), columns, p, path)
    if torch.is_grad_enabled() and (x.requires_grad or any(t.requires_grad for t in (*lora_As, *lora_Bs))):
        dense = [w if isinstance(w, torch.Tensor) else None for w in weights]
        return apply_directly(_LoraLinearShared, x, seed, group, *dense, *lora_As, *lora_Bs, *biases)
    ys, _, _ = forward_shared(x, group, lora_As, lora_Bs, biases, seed)
    return tuple(ys)


def shared_plan_for(
    x: torch.Tensor,
    weights: Sequence[Weight],
    lora_As: Sequence[torch.Tensor],
    lora_Bs: Sequence[torch.Tensor],
    biases: Sequence[Optional],
    backend: str,
) -> Plan:
    """The plan for x [..., K] and these projections: a path of `lora_linear` that they share, or `plan.APART`."""
    plans = []
    for weight, lora_A in zip(weights, lora_As, strict=True):
        if isinstance(weight, torch.Tensor):
            plans.append(plan_for_dense(x, weight, lora_A.shape[0], backend))
        else:
            plans.append(plan_for_quantized(x, weight, lora_A.shape[0], backend))
    looked_at = needs_operator(x)  # then tensors may have no addresses; the operator looks at those itself
    unlike = ""
    if plans[0].path in DECODE_PATHS:
        unlike = launched_apart(weights, lora_As, lora_Bs, biases, addresses=not looked_at)
    return plan_shared(plans, None if looked_at else x.numel(), unlike)


def _check(
    x: torch.Tensor, weight: Any, lora_A: torch.Tensor, lora_B: torch.Tensor, bias: Optional, *, mixed: bool
) -> None:
    if not isinstance(weight, torch.Tensor):
        check_quantized("lora_linear_shared", x, weight, lora_A, lora_B, bias, mixed=mixed)
    elif not adapters_fit(x, weight, lora_A, lora_B, bias):
        check_adapters("lora_linear_shared", x, weight, lora_A, lora_B, bias, mixed=mixed)


class _LoraLinearShared(torch.autograd.Function):
    """The eager door: x, seed, a `Group`, then n weights (None where quantized), As, Bs and biases."""

    @staticmethod
    def forward(ctx: Any, x, seed, group, *tensors):
        n = len(group.weights)
        lora_As, lora_Bs, biases = tensors[n : 2 * n], tensors[2 * n : 3 * n], tensors[3 * n :]
        ys, s, mask = forward_shared(x, group, lora_As, lora_Bs, biases, seed)
        needs = ctx.needs_input_grad[3:]
        ctx.needs = (any(needs[n : 2 * n]), needs[n : 2 * n], needs[2 * n : 3 * n])
        ctx.set_materialize_grads(False)
        if not ctx.needs_input_grad[0]:  # an output that nothing learns from has no history, as by single calls
            learns = zip(ys, needs[n : 2 * n], needs[2 * n : 3 * n], strict=True)
            ctx.mark_non_differentiable(*(y for y, a, b in learns if not (a or b)))
        ctx.group = group
        own_s = kept_s(s, group.path) if any(ctx.needs[2]) else None
        keep(ctx, 4, x if ctx.needs[0] else None, own_s, mask, seed if mask is None else None, *tensors[: 3 * n])
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys):
        refuse_double_backward("lora_linear_shared")
        group: Group = ctx.group
        n = len(group.weights)
        x, s, mask, seed, *tensors = kept(ctx, 4 + 3 * n)
        live = [i for i, dy in enumerate(dys) if dy is not None]
        absent = [None] * n
        if not live:
            return (None,) * (3 + 4 * n)
        _, each_a, each_b = ctx.needs
        needs_a = any(each_a[i] for i in live)
        needs = (ctx.needs_input_grad[0], needs_a, [each_b[i] for i in live])
        lora_As, lora_Bs = [tensors[n + i] for i in live], [tensors[2 * n + i] for i in live]
        dense = tensors[:n]
        all_alive = len(live) == n and not any(weight is not None for weight in dense)
        part = group if all_alive else group.only(live, dense)
        dx, da, dbs = backward_shared([dys[i] for i in live], x, part, lora_As, lora_Bs, taken_s(s), mask, seed, needs)
        das: list[Any] = list(absent)
        for i, lora_A, columns in zip(live, lora_As, rank_columns(lora_As), strict=True):
            if da is not None and each_a[i]:
                das[i] = in_dtype(da[columns], lora_A.dtype)
        all_dbs: list[Any] = list(absent)
        for i, lora_B, db in zip(live, lora_Bs, dbs, strict=True):
            all_dbs[i] = in_dtype(db, lora_B.dtype)
        return (dx, None, None, *absent, *das, *all_dbs, *absent)
