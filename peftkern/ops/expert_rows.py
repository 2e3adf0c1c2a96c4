"""Rows by expert: the tokens of a mixture sorted by the experts that its router chose, and their outputs summed again.

    x_sorted[i] = x[order[i] // k]
    y[t] = sum over j of weights[t, j] * y_sorted[inverse[t * k + j]]

A gather there and a gather back, in backward too: each of a token's k rows has a place of its own, so nothing is added
by atomics (as the backward of `index_add` and of an index with repeats is on a GPU), and two runs give the same bits.
Nothing waits for the device. What a token's k rows add up to is summed in float32 and rounded once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class ExpertOrder(NamedTuple):
    """Where each pair of a token and a choice (number t * k + j) stands among the rows sorted by expert.

    Attributes:
        order: [T * k] int64, the pair that row i holds.
        inverse: [T * k] int64, the row that holds pair i.
        offsets: [E] int32, the end of each expert's rows; rows from the last on belong to no expert.
        top_k: k, choices of a token.
    """

    order: torch.Tensor
    inverse: torch.Tensor
    offsets: torch.Tensor
    top_k: int


def expert_order(top_k_index: torch.Tensor, num_experts: int) -> ExpertOrder:
    """Sorts pairs of tokens and choices by expert, those of one expert in the order of the tokens.

    Args:
        top_k_index: [T, k] integers: the experts of each token. A number from `num_experts` on is no expert.
        num_experts: E, at least 1.

    Raises:
        TypeError, ValueError: `top_k_index` is no matrix of integers.
    """
    if not isinstance(top_k_index, torch.Tensor) or top_k_index.is_floating_point() or top_k_index.is_complex():
        got = top_k_index.dtype if isinstance(top_k_index, torch.Tensor) else type(top_k_index).__name__
        raise TypeError(f"top_k_index: expected a tensor of integers [tokens, choices], got {got}")
    if top_k_index.dim() != 2:
        raise ValueError(f"top_k_index: expected shape [tokens, choices], got {list(top_k_index.shape)}")
    experts, order = torch.sort(top_k_index.reshape(-1), stable=True)
    numbers = torch.arange(num_experts, dtype=experts.dtype, device=experts.device)
    offsets = torch.searchsorted(experts, numbers, right=True, out_int32=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
    return ExpertOrder(order, inverse, offsets, top_k_index.shape[1])


def rows_by_expert(x: torch.Tensor, by_expert: ExpertOrder) -> torch.Tensor:
    """x [T, K] -> [T * k, K]: each token once for each of its choices, sorted by expert; differentiable."""
    return _Sorted.apply(x, by_expert.order, by_expert.inverse, by_expert.top_k)


def sum_by_token(y: torch.Tensor, weights: torch.Tensor, by_expert: ExpertOrder) -> torch.Tensor:
    """y [T * k, N], sorted by expert, and the router's weights [T, k] -> [T, N], the weighted sum of each token's rows.

    In the wider dtype of the two; differentiable in both. y is kept for the gradient of the weights.
    """
    return _Summed.apply(y, weights, by_expert.order, by_expert.inverse)


class _Sorted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor, top_k: int) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        ctx.top_k = top_k
        return x.index_select(0, order.div(top_k, rounding_mode="floor"))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (inverse,) = ctx.saved_tensors
        (dy,) = gradients
        dx = dy.index_select(0, inverse).view(-1, ctx.top_k, dy.shape[1]).sum(1)
        return dx, None, None, None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: torch.Tensor, weights: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(y if ctx.needs_input_grad[1] else None, weights, order, inverse)
        ctx.dtype = y.dtype
        return (y.index_select(0, inverse).view(*weights.shape, y.shape[1]) * weights.unsqueeze(-1)).sum(1)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        y, weights, order, inverse = ctx.saved_tensors
        rows = gradients[0].index_select(0, order.div(weights.shape[1], rounding_mode="floor"))
        dy = dweights = None
        if ctx.needs_input_grad[0]:
            dy = (rows * weights.reshape(-1).index_select(0, order).unsqueeze(-1)).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            dots = (rows * y).sum(-1)
            dweights = dots.index_select(0, inverse).view(weights.shape).to(weights.dtype)
        return dy, dweights, None, None
