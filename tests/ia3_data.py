"""Tensors and truths that the tests of IA3's operations share."""

from __future__ import annotations

import torch

from numerics import padded_randn
from peftkern import reference


def make(
    M: int,
    N: int,
    K: int,
    is_feedforward: bool,
    dtype: torch.dtype = torch.float32,
    *,
    masters: bool = False,
    slots: int = 0,
    grad: bool = True,
    device: str = "cpu",
) -> list[torch.Tensor]:
    """x, weight, scale, bias as leaves; x, weight and slots' scales with NaN-padded rows, some scales exactly 0."""
    C = K if is_feedforward else N
    x, w = (padded_randn(*s, pad=i + 1, dtype=dtype, device=device) for i, s in enumerate(((M, K), (N, K))))
    scale_dtype = torch.float32 if masters else dtype
    scale = padded_randn(max(slots, 1), C, pad=3, dtype=scale_dtype, device=device)
    scale[:, ::5] = 0.0
    scale = scale if slots else scale[0]
    bias = torch.randn(N, device=device).to(dtype)
    return [t.detach().requires_grad_(grad) for t in (x, w, scale, bias)]


def truth_and_magnitude(
    tensors: list[torch.Tensor], dy: torch.Tensor, is_feedforward: bool, ids: torch.Tensor | None = None
) -> list[list[torch.Tensor]]:
    """[y, dX, dW, dl, dbias] in fp64, of the tensors and of their absolute values."""
    results = []
    for transform in (lambda t: t.detach().double(), lambda t: t.detach().double().abs()):
        x, w, scale, bias = (transform(t).requires_grad_() for t in tensors)
        if ids is None:
            y = reference.ia3_linear(x, w, scale, bias, is_feedforward=is_feedforward)
        else:
            y = reference.multi_ia3_linear(x, w, scale, ids, bias, is_feedforward=is_feedforward)
        y.backward(transform(dy))
        results.append([y.detach(), x.grad, w.grad, scale.grad, bias.grad])
    return results


# How many intermediates are rounded to the dtype on the way to y, dX, dW, dl, dbias. Output scaling: z; g; g; z; g.
# Feed-forward: u; h; u; h; none. A kernel that has one of them in its accumulator rounds less.
ROUNDED = {False: (1, 1, 1, 1, 1), True: (1, 1, 1, 1, 0)}
