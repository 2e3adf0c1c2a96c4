"""What tied projections decide is remembered for operands that are alike, and for no others."""

from __future__ import annotations

import pytest
import torch

from peftkern.ops import plan as plans
from test_shared_input import MODULE, alone, layers


def _with_another_rank(a, b):
    b.lora_A["default"].weight.data = torch.randn(2, 16)
    b.lora_B["default"].weight.data = torch.randn(12, 2)


def _with_16_bits(a, b):
    a.bfloat16(), b.bfloat16()


def _with_masters(a, b):
    for layer in (a, b):
        layer.base_layer.bfloat16()


def _with_a_base_that_learns(a, b):
    a.base_layer.weight.requires_grad_(True)


def _with_a_bias_that_learns(a, b):
    b.base_layer.bias.requires_grad_(True)


def _with_weights_of_another_layout(a, b):
    a.base_layer.weight.data = a.base_layer.weight.data.t().contiguous().t()


@pytest.mark.parametrize("under_autocast", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        _with_another_rank,
        _with_16_bits,
        _with_masters,
        _with_a_base_that_learns,
        _with_a_bias_that_learns,
        _with_weights_of_another_layout,
        lambda a, b: None,
    ],
)
def test_what_was_decided_is_decided_anew_for_changed_layers(change, under_autocast, monkeypatch):
    """Would catch a path, ranks or a dtype that are remembered from before a change that keeps modules and parameters:
    `model.bfloat16()`, a base that is to learn, `parameter.data = ...`."""
    monkeypatch.setattr(MODULE, "JOINED_ELEMENTS", 0)
    monkeypatch.setattr(plans, "JOINED_ELEMENTS", 0)
    a, b = layers(8, 12)
    x = torch.randn(3, 11, 16)
    for _ in range(2):
        a(x), b(x)
    assert a._shared_input._decided is not None
    change(a, b)
    x = x.to(a.base_layer.weight.dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=under_autocast):
        ys = a(x), b(x)
        expected = alone(a, x), alone(b, x)
    assert a._shared_input._left is None and a._shared_input._misses == 0, "made together"
    learned = [x, *(p for layer in (a, b) for p in layer.parameters() if p.requires_grad)]
    grads = [torch.autograd.grad([y.float().square().sum() for y in each], learned) for each in (ys, expected)]
    tolerance = 1e-4 if ys[0].dtype == torch.float32 else 3e-2
    for got, want in ((ys, expected), grads):
        for one, other in zip(got, want, strict=True):
            assert one.dtype == other.dtype
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


def test_nothing_is_decided_where_something_looks_at_operators(monkeypatch):
    """Would catch a call that goes to an operator the first time and around it the next."""
    monkeypatch.setattr(MODULE, "JOINED_ELEMENTS", 0)
    monkeypatch.setattr(plans, "JOINED_ELEMENTS", 0)
    monkeypatch.setattr(MODULE, "is_looked_at", lambda *_: True)
    a, b = layers(8, 12)
    x = torch.randn(3, 11, 16)
    for _ in range(2):
        torch.testing.assert_close(a(x), alone(a, x))
        torch.testing.assert_close(b(x), alone(b, x))
    assert a._shared_input._decided is None
