"""A layer under several adapters, for tests: pools with gaps, ids with gaps, and the truth in fp64."""

from __future__ import annotations

import torch

from numerics import padded_randn
from peftkern import reference
from peftkern.adapter_pool import LayerAdapters

RANKS = (4, 0, 3, 4, 1)  # a slot is empty, one rank is shared
SCALINGS = (0.75, 0.0, 1.5, 2.0, -0.5)


def layer(N, K, dtype=torch.float32, adapter_dtype=None, ranks=RANKS, max_rank=None, grad=True):
    """A `LayerAdapters` whose slots have `ranks`, 0 for an empty one; NaN where no adapter lies in the pool."""
    adapters = LayerAdapters(K, N, len(ranks), max_rank or max(ranks) + 1, adapter_dtype or dtype)
    adapters.pool_a.fill_(float("nan"))
    adapters.pool_b.fill_(float("nan"))
    for slot, rank in enumerate(ranks):
        if rank:
            A = torch.nn.Parameter(torch.randn(rank, K).to(adapters.pool_a.dtype), requires_grad=grad)
            B = torch.nn.Parameter(torch.randn(N, rank).to(adapters.pool_a.dtype), requires_grad=grad)
            adapters.put(slot, A, B, SCALINGS[slot % len(SCALINGS)])
    return adapters


def make(M, N, K, dtype=torch.float32, adapter_dtype=None, ranks=RANKS, grad=True):
    """x, weight, bias, adapters and ids; ids name every slot, an empty one, none at all, and one that is not there."""
    x = padded_randn(M, K, pad=1, dtype=dtype).detach().requires_grad_(grad)
    weight = padded_randn(N, K, pad=2, dtype=dtype).detach().requires_grad_(grad)
    bias = torch.randn(N).to(dtype).requires_grad_(grad)
    ids = torch.randint(-1, len(ranks) + 1, (M,), generator=torch.Generator().manual_seed(M))
    return x, weight, bias, layer(N, K, dtype, adapter_dtype, ranks, grad=grad), ids


def leaves(x, weight, bias, adapters):
    """Everything that can have a gradient: x, weight, bias, then A and B of each slot that is not empty."""
    found = [x, weight, bias]
    return found + [t for entry in adapters.entries if entry is not None for t in entry[:2]]


def truth_and_magnitude(x, weight, bias, adapters, ids, dy, keep=None, p=0.0):
    """Output and all gradients in fp64 in the order of `leaves`, of the tensors and of their absolute values."""
    results = []
    for transform in (lambda t: t.detach().double(), lambda t: t.detach().double().abs()):
        xs, w, b = (transform(t).requires_grad_() for t in (x, weight, bias))
        held = []
        for entry in adapters.entries:
            if entry is None:
                held.append(None)
                continue
            scaling = entry.scaling if not results else abs(entry.scaling)
            held.append((*(transform(t).requires_grad_() for t in entry[:2]), scaling))
        y = reference.multi_lora_linear(xs, w, held, ids, b, keep, p)
        y.backward(transform(dy))
        grads = [t.grad for entry in held if entry is not None for t in entry[:2]]
        results.append([y.detach(), xs.grad, w.grad, b.grad, *grads])
    return list(zip(*results, strict=True))


def mask_of(adapters, ids, K, seed, p):
    """The plain path's dropout mask [M, K] on a CPU: each slot's rows draw from a seed of its own."""
    from peftkern.ops._lora_linear_torch import keep_mask
    from peftkern_kernels.routing import slot_seed

    keep = torch.ones(ids.numel(), K, dtype=torch.bool)
    for slot in range(adapters.slots):
        rows = ids == slot
        if rows.any():
            keep[rows] = keep_mask(slot_seed(seed, slot), int(rows.sum()), K, p)
    return keep
