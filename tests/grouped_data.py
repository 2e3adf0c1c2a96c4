"""A stack of experts and their adapters, for tests: rows sorted by expert, NaN between rows, and the truth in fp64."""

from __future__ import annotations

import torch

from numerics import padded_randn
from peftkern import reference

SCALING = 0.75
# Rows of each expert, and how many rows after them belong to none.
COUNTS = {
    "mixed": ((5, 0, 17, 1, 40), 3),
    "one expert": ((19,), 0),
    "one of many": ((0, 0, 21, 0), 0),
    "none": ((0, 0), 6),
    "no rows": ((0, 0, 0), 0),
}


def offsets_of(counts, device="cpu"):
    return torch.tensor(counts, device=device).cumsum(0, dtype=torch.int32)


def peft_b(E, N, R, dtype, device="cpu"):
    """lora_B [E, N, R] as PEFT holds it: a view of [N, R * E]."""
    stored = torch.randn(N, R * E, device=device).to(dtype)
    return stored.reshape(N, R, E).permute(2, 0, 1)


def make(kind, N, K, R, dtype=torch.float32, adapter_dtype=None, *, transposed=False, device="cpu", grad=True):
    """x, weight, A, B and bias, and the experts' ends; `transposed` for a stack stored as [E, K, N]."""
    counts, rest = COUNTS[kind] if isinstance(kind, str) else kind
    E, T, own = len(counts), sum(counts) + rest, adapter_dtype or dtype
    x = padded_randn(T, K, pad=1, dtype=dtype, device=device)
    if transposed:
        weight = padded_randn(E, K, N, pad=2, dtype=dtype, device=device).transpose(1, 2)
    else:
        weight = padded_randn(E, N, K, pad=2, dtype=dtype, device=device)
    a = padded_randn(E, R, K, pad=3, dtype=own, device=device)
    tensors = [x, weight, a, peft_b(E, N, R, own, device), torch.randn(E, N, device=device).to(dtype)]
    return [t.detach().requires_grad_(grad) for t in tensors], offsets_of(counts, device)


def truth_and_magnitude(tensors, offsets, dy, scaling=SCALING):
    """y and the gradients of x, weight, A, B and bias in fp64, of the tensors and of their absolute values."""
    results = []
    for transform in (lambda t: t.detach().double(), lambda t: t.detach().double().abs()):
        wide = [transform(t).requires_grad_() for t in tensors]
        y = reference.grouped_lora_linear(*wide[:4], abs(scaling), offsets, wide[4])
        y.backward(transform(dy))
        results.append([y.detach(), *(torch.zeros_like(t) if t.grad is None else t.grad for t in wide)])
    return list(zip(*results, strict=True))
