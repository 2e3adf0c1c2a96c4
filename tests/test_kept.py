"""What is kept for backward: parameters by hand, everything else as saved tensors, and neither changed since."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

from peftkern.ops import gated_lora_linear, lora_linear, lora_linear_shared, quantize_4bit

M, N, K, R = 40, 24, 32, 3


def operands(by_hand):
    """x, weight, A and B; adapters and weight as parameters, or as tensors of somebody's."""
    torch.manual_seed(2)
    x = torch.randn(M, K, requires_grad=True)
    made = [torch.randn(N, K) / 8, torch.randn(R, K), torch.randn(N, R)]
    weight, a, b = (nn.Parameter(t, requires_grad=i > 0) if by_hand else t for i, t in enumerate(made))
    return x, weight, a.requires_grad_(), b.requires_grad_()


OPERATIONS = {
    "dense": lambda x, w, a, b: lora_linear(x.unsqueeze(0), w, a, b, 0.5),
    "4 bits": lambda x, w, a, b: lora_linear(x, quantize_4bit(w.detach()), a, b, 0.5),
    "shared": lambda x, w, a, b: sum(lora_linear_shared(x.unsqueeze(0), [w, w], [a, a], [b, b], [0.5, 1.0])),
    "gated": lambda x, w, a, b: gated_lora_linear(x.sin(), x, w, a, b, 0.5),
}


@pytest.mark.parametrize("by_hand", [True, False])
@pytest.mark.parametrize("kind", OPERATIONS)
def test_parameters_are_no_saved_tensors(kind, by_hand):
    """Would catch parameters that cost a checkpointed step three calls of Python each, and other tensors that a hook
    which moves activations elsewhere never sees."""
    x, *frozen = operands(by_hand)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.data_ptr()), t)[1], lambda t: t):
        y = OPERATIONS[kind](x, *frozen)
    own = {t.data_ptr() for t in frozen[1:]}
    assert own.isdisjoint(saved) if by_hand else own <= set(saved)
    y.sum().backward()
    assert all(t.grad is not None for t in (x, *frozen[1:]))


@pytest.mark.parametrize("hooks, by_hand", [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("changed", ["weight", "lora_A", "lora_B"])
@pytest.mark.parametrize("kind", OPERATIONS)
def test_a_change_before_backward_is_refused(kind, changed, hooks, by_hand):
    """Would catch gradients of adapters that an optimizer has stepped in between: wrong, and nobody would know."""
    x, *frozen = operands(by_hand)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t) if hooks else contextlib.nullcontext():
        y = OPERATIONS[kind](x, *frozen)
    with torch.no_grad():
        frozen[["weight", "lora_A", "lora_B"].index(changed)].add_(1.0)
    if changed == "weight" and kind == "4 bits":  # of which it has a copy
        y.sum().backward()
        return
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_second_backward_is_refused_as_by_torch():
    """Would catch a graph that was freed and is gone through again with what is left."""
    x, *frozen = operands(True)
    y = OPERATIONS["dense"](x, *frozen).sum()
    y.backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()
