"""`lora_embedding`: a frozen embedding table and its low-rank adapter as one differentiable operation.

Built like `lora_linear`: one forward and one backward behind two doors, an autograd function in eager mode and a
`torch.library` operator where something looks at operators.
"""

from __future__ import annotations

from typing import Any

import torch

from peftkern.backend import backend_in_force, device_info
from peftkern.ops._common import (
    FLOATS,
    adapters_for,
    apply_directly,
    ask,
    autocast_dtype,
    kept_s,
    needs_operator,
    number,
    refuse_double_backward,
    taken_s,
    unflattened,
    without_autocast,
)
from peftkern.ops.plan import plan_lora_embedding

Grads = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def lora_embedding(
    input: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    *,
    padding_idx: int | None = None,
) -> torch.Tensor:
    """`y = W[i] + scaling * A[:, i]^T B^T` (LoRA on an embedding, with PEFT's `lora_embedding_A` and `_B`).

    Gradients flow to weight, lora_A and lora_B where required; dA is a deterministic scatter. Kept for backward: the
    ids by reference and S = A[:, i]^T [tokens, r]. Double backward is not supported.

    Args:
        input: [...] int32 or int64 ids in [0, num_embeddings).
        weight: [num_embeddings, embedding_dim] float32, float16 or bfloat16 (float64 on the plain path).
        lora_A: [r, num_embeddings], in weight's dtype or float32 (under autocast in any of these).
        lora_B: [embedding_dim, r], likewise.
        scaling: multiplies the adapter's output.
        padding_idx: an id whose rows of weight and lora_A get no gradient, as in `torch.nn.functional.embedding`; a
            negative one counts from the end.

    Returns:
        [..., embedding_dim] in weight's dtype. Autocast changes nothing here, as it changes nothing for an embedding.

    Raises:
        TypeError: an argument's type or dtype is not one of the above.
        ValueError: shapes, devices or padding_idx do not fit.
        IndexError: an id outside the table, on a CPU.
        RuntimeError: `use_backend("triton")` is in force and Triton kernels cannot run there.
    """
    mixed = isinstance(weight, torch.Tensor) and autocast_dtype(weight) is not None
    _check(input, weight, lora_A, lora_B, mixed=mixed)
    V = weight.shape[0]
    if padding_idx is None:
        padding_idx = -1  # no id is negative
    elif isinstance(padding_idx, bool) or not isinstance(padding_idx, int):
        raise TypeError(f"padding_idx: expected None or an int, got {type(padding_idx).__name__}")
    elif not -V <= padding_idx < V:
        raise ValueError(f"padding_idx: expected None or an int in [{-V}, {V}), got {padding_idx!r}")
    else:
        padding_idx %= V
    if mixed and not {lora_A.dtype, lora_B.dtype} <= {weight.dtype, torch.float32}:
        lora_A, lora_B = adapters_for(weight.dtype, lora_A, lora_B)
    plan = ask(plan_lora_embedding, input.numel(), weight.dtype, device_info(input.device), backend_in_force())
    arguments = (input, weight, lora_A, lora_B, number("lora_embedding: scaling", scaling), padding_idx, plan.path)
    if needs_operator(input, weight, lora_A, lora_B):
        return _operator(*arguments)[0]
    if torch.is_grad_enabled() and (weight.requires_grad or lora_A.requires_grad or lora_B.requires_grad):
        return apply_directly(_LoraEmbedding, *arguments)
    return _forward(*arguments)[0]


def _check(
    input: torch.Tensor, weight: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, *, mixed: bool
) -> None:
    """Refuse what the operation cannot mean; `mixed` allows factors in any float dtype (autocast)."""
    where = "lora_embedding"
    for name, t in (("input", input), ("weight", weight), ("lora_A", lora_A), ("lora_B", lora_B)):
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{where}: {name}: expected a tensor, got {type(t).__name__}")
        if t.device != input.device:
            raise ValueError(f"{where}: {name}: expected device {input.device} as input, got {t.device}")
    if input.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{where}: input: expected int32 or int64 ids, got {input.dtype}")
    if weight.dtype not in FLOATS:
        raise TypeError(f"{where}: weight: expected float32, float16, bfloat16 or float64, got {weight.dtype}")
    for name, t in (("lora_A", lora_A), ("lora_B", lora_B)):
        if t.dtype not in (weight.dtype, torch.float32) and not (mixed and t.dtype in FLOATS):
            raise TypeError(f"{where}: {name}: expected weight's dtype {weight.dtype} or torch.float32, got {t.dtype}")
    if weight.dim() != 2:
        raise ValueError(f"{where}: weight: expected [num_embeddings, embedding_dim], got {list(weight.shape)}")
    V, E = weight.shape
    if lora_A.dim() != 2 or lora_A.shape[1] != V or lora_A.shape[0] < 1:
        raise ValueError(f"{where}: lora_A: expected shape [r, {V}], got {list(lora_A.shape)}")
    if lora_B.shape != (E, lora_A.shape[0]):
        raise ValueError(f"{where}: lora_B: expected shape [{E}, {lora_A.shape[0]}], got {list(lora_B.shape)}")


def _forward(
    input: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    padding_idx: int,
    path: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y [..., E] and S [tokens, R] in weight's dtype; on the plain path S is without the scaling."""
    ids = input.reshape(-1)
    E, R = lora_B.shape
    if path == "torch":
        a, b = adapters_for(weight.dtype, lora_A, lora_B)
        s = a.t().index_select(0, ids)
        y = weight.index_select(0, ids).addmm_(s, b.t(), alpha=scaling)
    else:
        from peftkern_kernels.launch import run_all
        from peftkern_kernels.lora_embedding import embedding_forward_calls

        y, s = weight.new_empty(ids.shape[0], E), weight.new_empty(ids.shape[0], R)
        arch = device_info(input.device).arch
        run_all(embedding_forward_calls(ids, weight, lora_A, lora_B, y, s, scaling=scaling, arch=arch), input.device)
    return unflattened(y, input.shape), s


def _scatter_rows(rows: torch.Tensor, ids: torch.Tensor, size: int, padding_idx: int) -> torch.Tensor:
    """out[size, n] with out[i] = sum of the rows whose id is i, in their order; the padding's row stays zero."""
    out = rows.new_zeros(size, rows.shape[1])
    if ids.is_cpu:
        out.index_add_(0, ids, rows)
    else:
        out.index_put_((ids,), rows, accumulate=True)  # sorts, where index_add_ would add in any order
    if padding_idx >= 0:
        out[padding_idx] = 0
    return out


@without_autocast
def _backward(
    dy: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    s: torch.Tensor,
    scaling: float,
    padding_idx: int,
    path: str,
    needs: tuple[bool, bool, bool],
) -> Grads:
    """Gradients of (weight, lora_A, lora_B), None where `needs` does not ask."""
    needs_w, needs_a, needs_b = needs
    ids = input.reshape(-1)
    grad = dy.reshape(-1, weight.shape[1])
    V = weight.shape[0]
    dw = _scatter_rows(grad, ids, V, padding_idx) if needs_w else None
    da = db = None
    if path == "torch":
        a, b = adapters_for(grad.dtype, lora_A, lora_B)
        if needs_a:
            ds = grad.mm(b).to(lora_A.dtype).mul_(scaling)
            da = _scatter_rows(ds, ids, V, padding_idx).t()
        if needs_b:
            db = torch.addmm(b, grad.t(), s, beta=0, alpha=scaling).to(lora_B.dtype)
    elif needs_a or needs_b:
        from peftkern_kernels.launch import run_all
        from peftkern_kernels.lora_embedding import embedding_backward_calls

        da = torch.empty_like(lora_A, memory_format=torch.contiguous_format) if needs_a else None
        db = torch.empty_like(lora_B, memory_format=torch.contiguous_format) if needs_b else None
        arch = device_info(input.device).arch
        calls = embedding_backward_calls(
            grad, ids, lora_B, s, da, db, scaling=scaling, padding_idx=padding_idx, arch=arch
        )
        run_all(calls, input.device)
    return dw, da, db


class _LoraEmbedding(torch.autograd.Function):
    """The eager door."""

    @staticmethod
    def forward(ctx: Any, input, weight, lora_A, lora_B, scaling, padding_idx, path):
        y, s = _forward(input, weight, lora_A, lora_B, scaling, padding_idx, path)
        needs = ctx.needs_input_grad[1:4]
        ctx.save_for_backward(input, weight, lora_A, lora_B, kept_s(s, path) if needs[2] else None)
        ctx.numbers = (scaling, padding_idx, path, needs)
        return y

    @staticmethod
    def backward(ctx: Any, dy):
        refuse_double_backward("lora_embedding")
        input, weight, lora_A, lora_B, s = ctx.saved_tensors
        saved: Any = (input, weight, lora_A, lora_B, taken_s(s))
        return (None, *_backward(dy, *saved, *ctx.numbers), None, None, None)


# -- the operator -------------------------------------------------------------------------------------------------


@torch.library.custom_op("peftkern::lora_embedding", mutates_args=())
def _operator(
    input: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    padding_idx: int,
    path: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, S)."""
    return _forward(input, weight, lora_A, lora_B, scaling, padding_idx, path)


@_operator.register_fake
def _(input, weight, lora_A, lora_B, scaling, padding_idx, path):
    return weight.new_empty(*input.shape, weight.shape[1]), weight.new_empty(input.numel(), lora_A.shape[0])


@torch.library.custom_op("peftkern::lora_embedding_backward", mutates_args=())
def _operator_backward(
    dy: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    s: torch.Tensor,
    scaling: float,
    padding_idx: int,
    path: str,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of (weight, lora_A, lora_B), empty where not asked for."""
    wanted: Any = tuple(needs)
    grads = _backward(dy, input, weight, lora_A, lora_B, s, scaling, padding_idx, path, wanted)
    dw, da, db = (dy.new_empty(0) if g is None else g.contiguous() for g in grads)
    return dw, da, db


@_operator_backward.register_fake
def _(dy, input, weight, lora_A, lora_B, s, scaling, padding_idx, path, needs):
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) if need else dy.new_empty(0)
        for need, t in zip(needs, (weight, lora_A, lora_B), strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    input, weight, lora_A, lora_B, *numbers = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(input, weight, lora_A, lora_B, output[1])
    ctx.numbers = numbers


def _operator_autograd(ctx: Any, dy: torch.Tensor | None, *_: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    refuse_double_backward("lora_embedding")
    needs = list(ctx.needs_input_grad[1:4])
    if dy is None:
        return (None,) * 7
    grads = _operator_backward(dy, *ctx.saved_tensors, *ctx.numbers, needs)
    return (None, *(g if need else None for g, need in zip(grads, needs, strict=True)), None, None, None)


_operator.register_autograd(_operator_autograd, setup_context=_setup_context)
