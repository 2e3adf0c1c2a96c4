"""Tensors and truths that the tests of DoRA's operations share."""

from __future__ import annotations

import torch

from numerics import assert_rounded, padded_randn
from peftkern import reference
from peftkern.ops import dora_linear

SCALING = 0.7


def make(
    M: int,
    N: int,
    K: int,
    R: int,
    dtype: torch.dtype = torch.float32,
    *,
    masters: bool = False,
    grad: bool = True,
    device: str = "cpu",
) -> list[torch.Tensor]:
    """x, weight, A, B, magnitude, bias as leaves, matrices with NaN-padded rows; a magnitude in five is 0, some are
    negative, and B A is as large as the weight."""
    adapter = torch.float32 if masters else dtype
    shapes = (((M, K), dtype), ((N, K), dtype), ((R, K), adapter), ((N, R), adapter), ((1, N), adapter))
    made = [padded_randn(*shape, pad=i + 1, dtype=kind, device=device) for i, (shape, kind) in enumerate(shapes)]
    made[4] = made[4][0]
    made[4][::5] = 0.0
    made.append(torch.randn(N, device=device).to(dtype))
    return [t.detach().requires_grad_(grad) for t in made]


def apply(tensors, **options):
    """The operation on x, weight, A, B, magnitude, bias."""
    return dora_linear(*tensors[:5], SCALING, tensors[5], **options)


def run(tensors, dy, function=apply, **options):
    """y and the gradients of those that have one."""
    for t in tensors:
        t.grad = None
    y = function(tensors, **options)
    y.backward(dy)
    return [y.detach(), *(t.grad for t in tensors)]


def truth_and_magnitude(
    tensors: list[torch.Tensor], dy: torch.Tensor, keep: torch.Tensor | None = None, p: float = 0.0
) -> list[list[torch.Tensor]]:
    """[y, dX, dW, dA, dB, dm, dbias] in fp64, and the magnitudes for `assert_rounded`.

    Those are of absolute values, and of the largest c that the same relative errors of V's elements lead to: as
    | |V + e| - |V| | <= |e|, c's relative error is at most theirs times the length of |W| + s |B| |A| over that of V.
    """
    wide = [t.detach().double().requires_grad_() for t in tensors]
    y = reference.dora_linear(*wide[:5], SCALING, wide[5], keep, p)
    y.backward(dy.double())
    truth = [y.detach(), *(t.grad for t in wide)]

    x, w, a, b, m, bias = (t.detach().double().abs().requires_grad_() for t in tensors)
    norm = reference.dora_norm(*(t.detach().double() for t in tensors[1:4]), SCALING)
    longest = reference.dora_norm(w.detach(), a.detach(), b.detach(), SCALING)
    share = torch.ones_like(x) if keep is None else keep.double() / (1 - p)
    c = m * torch.where(norm == 0, 0, longest / norm.square())
    y = c * reference.lora_linear(x * share, w, a, b, SCALING) + (x * (1 - share).abs()) @ w.T + bias
    y.backward(dy.double().abs())
    return [truth, [y.detach(), *(t.grad for t in (x, w, a, b, m, bias))]]


# How many intermediates are rounded to the dtype on the way to y, dX, dW, dA, dB, dm, dbias. u is (the base, its sum
# with the expand, S, cast A and B); g, dS, cast A and B, h (and the base in it); g; g, dS, B; g, S, A; u; none.
ROUNDED = (5, 6, 1, 3, 3, 5, 0)
# With dropout: x', its rest, and the rest's product; x' and dY W; x' and its rest; x'; x'; x'.
ROUNDED_BY_DROPOUT = (3, 2, 2, 1, 1, 1, 0)


def check(
    outputs: list[torch.Tensor],
    tensors: list[torch.Tensor],
    dy: torch.Tensor,
    keep: torch.Tensor | None = None,
    p: float = 0.0,
    *,
    extra: int = 0,
    which: tuple[int, ...] = tuple(range(7)),
) -> None:
    """Assert that y and the gradients are right; `extra` roundings more, `which` of the truths they are."""
    (M, N), K, R = dy.shape, tensors[0].shape[1], tensors[2].shape[0]
    truths, magnitudes = truth_and_magnitude(tensors, dy, keep, p)
    for out, i in zip(outputs, which, strict=True):
        count = ROUNDED[i] + extra + (ROUNDED_BY_DROPOUT[i] if keep is not None else 0)
        factor = torch.finfo(dy.dtype).eps / torch.finfo(out.dtype).eps
        assert_rounded(out, truths[i], magnitudes[i], terms=M + N + 2 * K + 2 * R, rounded=count * factor)
