"""`multi_lora_linear_shared`: up to four projections of one x (q, k, v; gate, up), each under a pool of adapters.

It means that many calls of `multi_lora_linear` with one dropout mask, and saves what they would do again for the same
x: launches where these decide (decoding), reads of x, and dX buffers that autograd would add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from peftkern.adapter_pool import LayerAdapters
from peftkern.backend import backend_in_force
from peftkern.ops._common import (
    apply_directly,
    ask,
    autocast_dtype,
    dropout_in_force,
    dropout_seed,
    is_plain,
    kept_s,
    needs_operator,
    refuse_double_backward,
    stored_apart,
    taken_s,
)
from peftkern.ops._multi_lora_linear_call import Call, backward_shared, forward_shared
from peftkern.ops.adapter_route import AdapterBatch
from peftkern.ops.multi_lora_linear import _batch, _check, _fits, _owners, _pick, multi_lora_linear, plan_for
from peftkern.ops.plan import APART, MOST_PROJECTIONS, Plan, plan_multi_lora_linear_shared
from peftkern.weights import Weight
from peftkern_kernels.adapters import Adapters
from peftkern_kernels.routing import Routing


def multi_lora_linear_shared(
    x: torch.Tensor,
    weights: Sequence[Weight],
    pools: Sequence[LayerAdapters | Adapters],
    adapter_ids: torch.Tensor | Routing | AdapterBatch,
    biases: Sequence[torch.Tensor | None] | None = None,
    *,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """`tuple(multi_lora_linear(x, w, pool, adapter_ids, b) for each w, pool, b)` with one dropout mask for all.

    Shared is, on a GPU: for at most 64 tokens without dropout the two launches (the base of more than 16 tokens is
    cuBLAS's, one for each projection); for more the shrink, and in backward the low-rank part of dX; dX is one buffer
    that the first product writes and the others add to. On the plain path: a group's rows of x, taken and masked once,
    and dX likewise. Over 4-bit weights the same, but that on "fused_4bit" each projection has its base GEMM, and dX one
    buffer more, since that kernel only writes. Kept for backward: x by reference, S [M, sum of max_rank], the ids and
    a seed.

    Nothing is shared, and the result is that of the single calls with one seed, under torch.compile, a dispatch mode
    or tensor subclasses, where a base weight or a bias learns, and where the projections are unlike: their paths, or
    their pools' slots or dtypes, or, for kernels, the strides of weights, pools and biases, whether they have a bias,
    the 4-bit format; and on a GPU where quantized weights are written out dense for launches that add the adapters too
    (cuBLAS does not). Weights that are written out take turns in any case. `shared_plan_for` says which, and why.

    Args:
        x: [..., in_features], as for `multi_lora_linear`.
        weights: [out_features, in_features] of each of one to four projections; out_features may differ.
        pools: the adapters of each; ranks and scalings may differ.
        adapter_ids, dropout_p, training, seed: as for `multi_lora_linear`; a seed is drawn once for all.
        biases: [out_features] or None for each; None for none at all.

    Returns:
        [..., out_features] of each projection, in x's dtype (autocast's under autocast).

    Raises:
        TypeError, ValueError, RuntimeError: as `multi_lora_linear`, or the number of projections, pools or biases does
            not fit.
    """
    weights, pools = _sequence("weights", weights), _sequence("pools", pools)
    biases = (None,) * len(weights) if biases is None else _sequence("biases", biases)
    if not 1 <= len(weights) <= MOST_PROJECTIONS:
        raise ValueError(f"multi_lora_linear_shared: weights: expected 1 to {MOST_PROJECTIONS}, got {len(weights)}")
    for name, given in (("pools", pools), ("biases", biases)):
        if len(given) != len(weights):
            raise ValueError(
                f"multi_lora_linear_shared: {name}: expected one for each of {len(weights)} weights, got {len(given)}"
            )
    for pool in pools:
        if not isinstance(pool, LayerAdapters | Adapters):
            raise TypeError(f"multi_lora_linear_shared: pools: expected LayerAdapters, got {type(pool).__name__}")
    cast = autocast_dtype(x)
    if cast is not None:
        x = x.to(cast)
    for weight, pool, bias in zip(weights, pools, biases, strict=True):
        if not _fits(x, weight, pool, bias):
            _check(x, weight, pool, bias, mixed=cast is not None)
    p = dropout_in_force(dropout_p, training)
    seed = None if p == 0.0 else dropout_seed(seed, x.device)
    plan = shared_plan_for(x, weights, pools, biases, backend_in_force())
    if plan.path == APART:
        each = zip(weights, pools, biases, strict=True)
        return tuple(multi_lora_linear(x, w, pool, adapter_ids, b, dropout_p=p, seed=seed) for w, pool, b in each)
    batch = adapter_ids if isinstance(adapter_ids, AdapterBatch) else _batch(adapter_ids, pools[0])
    if batch.ids.device != x.device:
        raise ValueError(
            f"multi_lora_linear_shared: adapter_ids: expected device {x.device} as x, got {batch.ids.device}"
        )
    batch.check_rows(x, "multi_lora_linear_shared")
    calls: list[Call] = []
    params: list[torch.Tensor] = []
    for weight, pool in zip(weights, pools, strict=True):
        owners, learning = _owners(pool, batch.present)
        calls.append(Call(weight, pool, batch, seed, p, plan.path, owners))
        params += learning
    if torch.is_grad_enabled() and (x.requires_grad or params):
        results: tuple[torch.Tensor, ...] = apply_directly(_MultiLoraLinearShared, x, biases, calls, *params)
        return results
    return tuple(forward_shared(x, biases, calls, [False] * len(calls))[0])


def _sequence(name: str, given: Any) -> tuple[Any, ...]:
    if not isinstance(given, list | tuple):
        raise TypeError(
            f"multi_lora_linear_shared: {name}: expected a list, one for each projection, got {type(given).__name__}"
        )
    return tuple(given)


def shared_plan_for(
    x: torch.Tensor,
    weights: Sequence[Weight],
    pools: Sequence[LayerAdapters | Adapters],
    biases: Sequence[torch.Tensor | None],
    backend: str,
) -> Plan:
    """The plan for x [..., K] and projections of it: the path of all, or `plan.APART`, and why."""
    unlike = _kept_apart(x, weights, pools, biases)
    if unlike:
        return ask(plan_multi_lora_linear_shared, (), unlike)
    each = zip(weights, pools, strict=True)
    plans = tuple(plan_for(x, weight, pool.max_rank, backend) for weight, pool in each)
    if len(plans) > 1 and not is_plain(plans[0].path):
        unlike = _launched_apart(weights, pools, biases)
        if plans[0].path in ("dequantize:triton", "dequantize:decode"):
            unlike = "their weights take turns at being dense, each in launches that add its adapters too"
    return ask(plan_multi_lora_linear_shared, plans, unlike)


def _kept_apart(x: torch.Tensor, weights: Sequence[Any], pools: Sequence[Any], biases: Sequence[Any]) -> str:
    """What asks for single calls whatever the path; "" for nothing."""
    dense = [weight for weight in weights if isinstance(weight, torch.Tensor)]
    packed = [t for w in weights if not isinstance(w, torch.Tensor) for t in w.tensors() if t is not None]
    if needs_operator(x, *dense, *packed):
        return "something looks at operators (a compiler, a dispatch mode, a tensor subclass)"
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*dense, *biases)):
        return "a base weight or a bias learns"
    if len({(pool.rank.shape[0], pool.pool_a.dtype) for pool in pools}) > 1:
        return "their pools differ in slots or dtype"
    return ""


def _launched_apart(weights: Sequence[Any], pools: Sequence[Any], biases: Sequence[Any]) -> str:
    """What one launch cannot have two of; "" for nothing."""
    if len({pool.pool_a.stride(0) for pool in pools}) > 1:
        return "their pools' rows lie differently"
    return stored_apart(weights, biases)


class _MultiLoraLinearShared(torch.autograd.Function):
    """The eager door, the only one; operators see single calls."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        biases: Sequence[torch.Tensor | None],
        calls: Sequence[Call],
        *params: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        needs_x, _, _, *needs_params = ctx.needs_input_grad
        parts = _split(needs_params, calls)
        ctx.set_materialize_grads(False)
        ys, ss = forward_shared(x, biases, calls, [any(part) for part in parts])
        if not needs_x:  # what nothing in front of it learns from has no history, as by single calls
            ctx.mark_non_differentiable(*(y for y, part in zip(ys, parts, strict=True) if not any(part)))
        # Weights, pools and parameters are kept by reference, so that autograd notices a change before backward.
        held = [t for c in calls for t in (c.weight, c.adapters.pool_a, c.adapters.pool_b)]
        held = [t for t in held if isinstance(t, torch.Tensor)]
        kept = [kept_s(s, calls[0].path) for s in ss]
        ctx.save_for_backward(x if any(needs_params) else None, calls[0].batch.ids, *kept, *held, *params)
        ctx.calls = calls
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        refuse_double_backward("multi_lora_linear_shared")
        x, ids, *rest = ctx.saved_tensors
        calls = ctx.calls
        calls[0].batch.refuse_other(ids, "multi_lora_linear_shared")
        needs_x, _, _, *needs_params = ctx.needs_input_grad
        parts = _split(needs_params, calls)
        grads: list[list[torch.Tensor]] = [[] for _ in calls]
        # An output that nothing was made of has no dY, and its projection no part in this.
        live = [i for i, dy in enumerate(dys) if dy is not None and (needs_x or any(parts[i]))]
        dx = None
        if live:
            picked: Any = [[each[i] for i in live] for each in (dys, rest, calls)]
            live_dys, live_ss, live_calls = picked
            live_ss = [taken_s(s) for s in live_ss]
            dx, found = backward_shared(live_dys, x, live_ss, live_calls, needs_x, [any(parts[i]) for i in live])
            for i, own in zip(live, found, strict=True):
                grads[i] = own
        flat = [g for own, needs in zip(grads, parts, strict=True) for g in _pick(own, needs)]
        return dx, None, None, *flat


def _split(needs: Sequence[bool], calls: Sequence[Call]) -> list[list[bool]]:
    """What of all parameters is each projection's: A and B of each owner, or the two pools."""
    parts, at = [], 0
    for call in calls:
        count = 2 * len(call.owners)
        parts.append(list(needs[at : at + count]))
        at += count
    return parts
