"""`multi_lora_linear`: a frozen linear layer under a batch whose rows each want an adapter of their own.

The same two doors as `lora_linear`: an autograd function in plain eager mode, a `torch.library` operator wherever
something looks at operators. Weight, adapters and batch cross the operator's boundary as lists of tensors and numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from peftkern.adapter_pool import LayerAdapters
from peftkern.backend import backend_in_force, device_info
from peftkern.ops._common import (
    _PLAIN_TYPES,
    FLOATS,
    apply_directly,
    autocast_dtype,
    check_adapters,
    dropout_in_force,
    dropout_seed,
    is_plain,
    kept_s,
    makes_plain_tensors,
    needs_operator,
    refuse_double_backward,
    stream_of,
    taken_s,
)
from peftkern.ops._multi_lora_linear_call import WHOLE_POOL, Call, Owner, backward, forward
from peftkern.ops._repeated_forward import RepeatedForward
from peftkern.ops.adapter_route import AdapterBatch
from peftkern.ops.lora_linear_quantized import flatten, unflatten
from peftkern.ops.plan import Plan, plan_multi_lora_linear
from peftkern.weights import DENSE_DTYPES, Weight, Weight4bit, Weight8bit
from peftkern_kernels.adapters import Adapters
from peftkern_kernels.routing import Routing

DENSE = -1  # as a weight's blocksize among the operator's numbers: it is a tensor


def multi_lora_linear(
    x: torch.Tensor,
    weight: Weight,
    bank: LayerAdapters | Adapters,
    adapter_ids: torch.Tensor | Routing | AdapterBatch,
    bias: torch.Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """`y[m] = x[m] W^T + bias + scaling[i] * dropout(x[m]) A_i^T B_i^T`, where i is the id of row m.

    Gradients flow to x, weight and bias, and to the parameters of the adapters that the ids name; each adapter's are
    those of its rows run alone. An adapter that no row names gets none where the host knows the ids (on the CPU, or an
    `AdapterBatch` made from names), else zeros. Kept for backward: x by reference, S = scaling * dropout(x) A^T
    [M, max_rank], the ids and a seed. Under autocast, x, weight and bias are cast to its dtype. Double backward is not
    supported.

    Args:
        x: [..., in_features], float32, float16 or bfloat16 (float64 on the plain path); any strides.
        weight: [out_features, in_features] in x's dtype, any strides; or a `Weight4bit` or `Weight8bit`.
        bank: the layer's adapters, in x's dtype or float32. (Those of `peftkern_kernels` get gradients to the pools.)
        adapter_ids: int32 or int64, one for each row of x (all but its last dimension taken together), or one for each
            entry of its first dimension. An id that is no slot, such as -1, or that of an empty slot, is the base
            alone. Or what has been prepared for a batch, so that all layers share it.
        bias: [out_features] or None.
        dropout_p, training: as for `lora_linear`.
        seed: int64 tensor of one element on x's device that fixes the mask: the rows of slot s draw that of
            `peftkern_kernels.routing.slot_seed(seed, s)`. Drawn from torch's generator of that device if None.

    Returns:
        [..., out_features] in x's dtype (autocast's under autocast).

    Raises:
        TypeError: an argument's type or dtype is not one of the above.
        ValueError: shapes, devices or a number do not fit.
        RuntimeError: `use_backend("triton")` is in force and Triton kernels cannot run there.
    """
    if type(bank) is LayerAdapters and isinstance(adapter_ids, AdapterBatch) and not torch.compiler.is_compiling():
        repeated = adapter_ids.repeated.get(bank)
        if repeated is not None and repeated.serves(x, weight, bias, bank, dropout_p):
            return repeated.run(x)
    if not isinstance(bank, LayerAdapters | Adapters):
        raise TypeError(f"multi_lora_linear: bank: expected LayerAdapters, got {type(bank).__name__}")
    cast = autocast_dtype(x)
    if cast is not None:
        x = x.to(cast)
    if not _fits(x, weight, bank, bias):
        _check(x, weight, bank, bias, mixed=cast is not None)
    batch = adapter_ids if isinstance(adapter_ids, AdapterBatch) else _batch(adapter_ids, bank)
    if batch.ids.device != x.device:
        raise ValueError(f"multi_lora_linear: adapter_ids: expected device {x.device} as x, got {batch.ids.device}")
    M = batch.check_rows(x)
    p = dropout_in_force(dropout_p, training)
    seed = None if p == 0.0 else dropout_seed(seed, x.device)
    path = plan_for(x, weight, bank.max_rank, backend_in_force()).path
    present = batch.present if batch.named or not torch.compiler.is_compiling() else None
    owners, params = _owners(bank, present)
    dense = isinstance(weight, torch.Tensor)
    tensors, numbers = ([weight], [*weight.shape, DENSE]) if isinstance(weight, torch.Tensor) else flatten(weight)
    if needs_operator(x, *tensors):
        routed = [batch.ids] if is_plain(path) else list(batch.routing(M).tensors)
        pools = [bank.pool_a, bank.pool_b, bank.row_offset, bank.rank, bank.scaling]
        flat = [number for owner in owners for number in owner]
        rest = (bias, seed, numbers, flat, bank.max_rank, p, path)
        return _operator(x, tensors, params, pools, routed, *rest)[0]
    repeats = batch is adapter_ids and seed is None and cast is None and not torch.is_grad_enabled()
    repeats = repeats and is_plain(path) and makes_plain_tensors()
    if repeats and type(bank) is LayerAdapters and RepeatedForward.can_be(x, weight, path):
        repeated = RepeatedForward(x, weight, bias, bank, path, batch.in_order(M, bank.layout))
        batch.repeated[bank] = repeated
        return repeated.run(x)
    call = Call(weight, bank, batch, seed, p, path, owners)
    if torch.is_grad_enabled():
        wanted = [x, *params, *(tensors if dense else []), *([] if bias is None else [bias])]
        if any(t.requires_grad for t in wanted):
            return apply_directly(_MultiLoraLinear, x, weight if dense else None, bias, call, *params)
    return forward(x, bias, call, keep=False)[0]


def plan_for(x: torch.Tensor, weight: Weight, max_rank: int, backend: str) -> Plan:
    """The plan for x [..., K] and weight [N, K]."""
    N, K = weight.shape
    blocksize = None if isinstance(weight, torch.Tensor) else getattr(weight, "blocksize", 0)
    aligned = True
    if not x.is_cpu:
        rows = (x.stride(-2) if x.dim() > 1 else K, max(weight.stride()) if isinstance(weight, torch.Tensor) else K)
        aligned = all(stride * x.element_size() % 16 == 0 for stride in rows)
    plan: Any = plan_multi_lora_linear
    if torch.compiler.is_compiling():
        plan = plan.__wrapped__
    device = device_info(x.device)
    return plan(x.numel() // K, N, K, max_rank, blocksize, x.dtype, device, aligned, backend)


def _fits(x: torch.Tensor, weight: Any, bank: Any, bias: torch.Tensor | None) -> bool:
    """Whether the common case holds, told by a few comparisons; `_check` finds words for the rest."""
    if type(x) not in _PLAIN_TYPES or type(weight) not in _PLAIN_TYPES or x.dim() == 0:
        return False
    dtype, pool = x.dtype, bank.pool_a
    if weight.dtype is not dtype or dtype not in FLOATS or weight.dim() != 2 or 0 in weight.shape:
        return False
    if pool.dtype is not dtype and pool.dtype is not torch.float32:
        return False
    N, K = weight.shape
    if x.shape[-1] != K or bank.N != N or pool.shape[1] != K or bank.pool_b.dtype is not pool.dtype:
        return False
    if not (x.device == weight.device == pool.device == bank.pool_b.device):
        return False
    if bias is None:
        return True
    return type(bias) in _PLAIN_TYPES and bias.dtype is dtype and bias.shape == (N,) and bias.device == x.device


def _check(x: torch.Tensor, weight: Weight, bank: Any, bias: torch.Tensor | None, *, mixed: bool) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"multi_lora_linear: x: expected a tensor, got {type(x).__name__}")
    stand_in: Any = weight
    if isinstance(weight, Weight4bit | Weight8bit):
        if x.dtype not in DENSE_DTYPES:
            raise TypeError(
                f"multi_lora_linear: x: expected float32, float16 or bfloat16 beside a quantized weight, got {x.dtype}"
            )
        stand_in = x.new_empty((), device=weight.device).expand(weight.shape)  # a shape, no memory
    elif not isinstance(weight, torch.Tensor):
        raise TypeError(f"weight: expected a tensor, a Weight4bit or a Weight8bit, got {type(weight).__name__}")
    # A pool's rows are adapters' rows: its first one has their shape, dtype and device.
    b = bank.pool_b[: bank.N].view(bank.N, 1)
    check_adapters("multi_lora_linear", x, stand_in, bank.pool_a[:1], b, bias, mixed=mixed)


def _batch(ids: Any, bank: Any) -> AdapterBatch:
    """What the plain path and the kernels work out from `ids`, for this call alone."""
    slots = bank.rank.shape[0]
    if not isinstance(ids, Routing):
        return AdapterBatch(ids, slots)
    batch = AdapterBatch(ids.ids, slots)
    batch._routings[ids.M, stream_of(ids.ids)] = ids
    return batch


def _owners(bank: Any, present: Sequence[int] | None) -> tuple[list[Owner], list[torch.Tensor]]:
    """The adapters whose parameters ask for gradients, and these, A and B in turn; absent ones are left out."""
    if not torch.is_grad_enabled():
        return [], []
    if isinstance(bank, Adapters):
        learns = bank.pool_a.requires_grad or bank.pool_b.requires_grad
        whole = (WHOLE_POOL, 0, bank.pool_a.shape[0])
        return ([whole], [bank.pool_a, bank.pool_b]) if learns else ([], [])
    owners: list[Owner] = []
    params: list[torch.Tensor] = []
    for slot in range(bank.slots) if present is None else present:
        entry = bank.entries[slot]
        if entry is not None and (entry.lora_A.requires_grad or entry.lora_B.requires_grad):
            first, rank = bank.layout.places[slot]
            owners.append((slot, first, rank))
            params += [entry.lora_A, entry.lora_B]
    return owners, params


class _MultiLoraLinear(torch.autograd.Function):
    """The eager door."""

    @staticmethod
    def forward(ctx: Any, x, weight, bias, call, *params):
        needs_x, needs_weight, needs_bias, _, *needs_params = ctx.needs_input_grad
        learns = any(needs_params)
        y, s = forward(x, bias, call, keep=learns)
        # Pools and parameters are kept by reference, so that autograd notices a change before backward.
        pools = (call.adapters.pool_a, call.adapters.pool_b)
        kept = (x if learns or needs_weight else None, kept_s(s, call.path), call.batch.ids)
        ctx.save_for_backward(*kept, weight, *pools, *params)
        ctx.call, ctx.bias_dtype = call, bias.dtype if needs_bias else None
        return y

    @staticmethod
    def backward(ctx: Any, dy):
        refuse_double_backward("multi_lora_linear")
        x, s, ids, *_ = ctx.saved_tensors
        ctx.call.batch.refuse_other(ids, "multi_lora_linear")
        needs_x, needs_weight, _, _, *needs_params = ctx.needs_input_grad
        learns = any(needs_params)
        dx, dw, dbias, grads = backward(dy, x, taken_s(s), ctx.call, needs_x, needs_weight, ctx.bias_dtype, learns)
        return dx, dw, dbias, None, *(_pick(grads, needs_params))


def _pick(grads: list[torch.Tensor], needs: Sequence[bool]) -> list[torch.Tensor | None]:
    return [g if need else None for g, need in zip(grads, needs, strict=True)] if grads else [None] * len(needs)


# -- the operator -------------------------------------------------------------------------------------------------


def _call_of(
    tensors: Sequence[torch.Tensor],
    pools: Sequence[torch.Tensor],
    routed: Sequence[torch.Tensor],
    seed: torch.Tensor | None,
    numbers: Sequence[int],
    owners: Sequence[int],
    max_rank: int,
    dropout_p: float,
    path: str,
) -> Call:
    """What crossed the operator's boundary, put together again."""
    weight: Any = tensors[0] if numbers[2] == DENSE else unflatten(tensors, numbers)
    pool_a, pool_b, row_offset, rank, scaling = pools
    adapters = Adapters(pool_a, pool_b, row_offset, rank, scaling, max_rank, weight.shape[0])
    ids = _batch(Routing(*routed) if len(routed) > 1 else routed[0], adapters)
    triples = [(owners[i], owners[i + 1], owners[i + 2]) for i in range(0, len(owners), 3)]
    return Call(weight, adapters, ids, seed, dropout_p, path, triples)


@torch.library.custom_op("peftkern::multi_lora_linear", mutates_args=())
def _operator(
    x: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    params: Sequence[torch.Tensor],
    pools: Sequence[torch.Tensor],
    routed: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    numbers: Sequence[int],
    owners: Sequence[int],
    max_rank: int,
    dropout_p: float,
    path: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, S). `params` are views into `pools`, there so that gradients find them."""
    call = _call_of(tensors, pools, routed, seed, numbers, owners, max_rank, dropout_p, path)
    y, s = forward(x, bias, call, keep=True)
    return y, x.new_empty(0) if s is None else s


@_operator.register_fake
def _(x, tensors, params, pools, routed, bias, seed, numbers, owners, max_rank, dropout_p, path):
    return x.new_empty(*x.shape[:-1], numbers[0]), x.new_empty(x.numel() // x.shape[-1], max_rank)


@torch.library.custom_op("peftkern::multi_lora_linear_backward", mutates_args=())
def _operator_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    s: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    params: Sequence[torch.Tensor],
    pools: Sequence[torch.Tensor],
    routed: Sequence[torch.Tensor],
    seed: torch.Tensor | None,
    numbers: Sequence[int],
    owners: Sequence[int],
    max_rank: int,
    dropout_p: float,
    path: str,
    needs: list[bool],
    bias_dtype: torch.dtype | None,
) -> list[torch.Tensor]:
    """Gradients of x, weight, bias, and of each parameter if `needs` [x, weight, adapters] asks; empty if not."""
    call = _call_of(tensors, pools, routed, seed, numbers, owners, max_rank, dropout_p, path)
    needs_x, needs_weight, learns = needs
    *firsts, grads = backward(dy, x, s, call, needs_x, needs_weight, bias_dtype, learns)
    found = [dy.new_empty(0) if g is None else g for g in firsts]
    if not learns:
        grads = [dy.new_empty(0) for _ in params]
    return found + [_alone(g) for g in grads]


def _alone(t: torch.Tensor) -> torch.Tensor:
    """t in contiguous memory that nothing else lies in, as an operator's results must. (Where backward runs under a
    dispatch mode a view does not know its base.)"""
    shares = t.untyped_storage().nbytes() != t.nbytes
    return t.clone(memory_format=torch.contiguous_format) if shares else t.contiguous()


@_operator_backward.register_fake
def _(dy, x, s, tensors, params, pools, routed, seed, numbers, owners, max_rank, dropout_p, path, needs, bias_dtype):
    N, K, _ = numbers
    needs_x, needs_weight, learns = needs
    empty = dy.new_empty
    found = [
        empty(*dy.shape[:-1], K) if needs_x else empty(0),
        empty(N, K, dtype=tensors[0].dtype) if needs_weight else empty(0),
        empty(0) if bias_dtype is None else empty(N, dtype=bias_dtype),
    ]
    return found + [torch.empty_like(p, memory_format=torch.contiguous_format) if learns else empty(0) for p in params]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, tensors, params, pools, routed, bias, seed, numbers, owners, max_rank, dropout_p, path = inputs
    ctx.set_materialize_grads(False)
    ctx.lengths = [len(tensors), len(params), len(pools), len(routed)]
    ctx.save_for_backward(x, output[1], seed, *tensors, *params, *pools, *routed)
    ctx.numbers = (list(numbers), list(owners), max_rank, dropout_p, path)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _operator_autograd(ctx: Any, dy: torch.Tensor | None, *_: torch.Tensor | None) -> tuple[Any, ...]:
    needs_x, needs_tensors, needs_params, _, _, needs_bias, *_ = ctx.needs_input_grad
    refuse_double_backward("multi_lora_linear")
    n_tensors, n_params, n_pools, n_routed = ctx.lengths
    nothing = (None, [None] * n_tensors, [None] * n_params, [None] * n_pools, [None] * n_routed)
    # A list without tensors counts as one value, but an empty one as a list.
    others: tuple[Any, ...] = (None, None if ctx.numbers[1] else [], None, None, None)
    if dy is None:
        return (*nothing, None, None, *others)
    x, s, seed, *rest = ctx.saved_tensors
    lists = []
    for length in ctx.lengths:
        lists.append(list(rest[:length]))
        rest = rest[length:]
    needs = [needs_x, bool(any(needs_tensors)), bool(any(needs_params))]
    bias_dtype = ctx.bias_dtype if needs_bias else None
    dx, dw, dbias, *grads = _operator_backward(dy, x, s, *lists, seed, *ctx.numbers, needs, bias_dtype)
    weights = [dw if needs[1] else None, *[None] * (n_tensors - 1)]
    params = [g if need else None for g, need in zip(grads, needs_params, strict=True)]
    found = (dx if needs_x else None, weights, params, *nothing[3:], dbias if needs_bias else None)
    return (*found, None, *others)


_operator.register_autograd(_operator_autograd, setup_context=_setup_context)
