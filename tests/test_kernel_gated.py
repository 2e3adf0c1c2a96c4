"""The kernels of `act(gate) * up` and of its gradients against fp64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from gated_data import ACTIVATIONS, bounds
from numerics import arch_of, assert_rounded, canvas, padded_randn, untouched
from peftkern import reference
from peftkern_kernels.gated_activation import gated_backward_calls, gated_forward_calls
from peftkern_kernels.launch import run_all


def make(M, C, dtype, device):
    gate, up, dh = (padded_randn(M, C, pad=i + 1, dtype=dtype, device=device) for i in range(3))
    gate[:, ::2] *= 8
    gate[:, ::5] = 0.0
    gate[0, 0], gate[-1, -1] = -30.0, 30.0  # where exp is at its ends
    return gate, up, dh


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("M, C", [(1, 1), (17, 33), (65, 130), (40, 64)])
def test_values_and_gradients_match_fp64(M, C, dtype, activation, device):
    """Would catch a derivative of another activation, columns read past C, an overflow for a large gate."""
    gate, up, dh = make(M, C, dtype, device)
    h, dgate, dup = (canvas(M, C, dtype, device) for _ in range(3))
    options = {"activation": activation, "arch": arch_of(device)}
    run_all(gated_forward_calls(gate, up, h[:M, :C], **options))
    run_all(gated_backward_calls(dh, gate, up, dgate[:M, :C], dup[:M, :C], **options))
    g, u, d = (t.double().requires_grad_() for t in (gate, up, dh))
    truth = reference.gated(g, u, activation)
    true_dgate, true_dup = torch.autograd.grad(truth, (g, u), d.detach())
    act, slope = bounds(g.detach(), activation, torch.float32)
    d, u = d.detach().abs(), u.detach().abs()
    for out, exact, size in (
        (h, truth.detach(), act * u),
        (dgate, true_dgate, d * u * slope),
        (dup, true_dup, d * act),
    ):
        assert_rounded(out[:M, :C], exact, size, terms=16)
        assert untouched(out, M, C)


def test_outputs_may_be_inputs_and_columns(device):
    """Would catch an element that is read after it was written, and strides taken for one another."""
    gate, up, dh = make(33, 70, torch.float32, device)
    options = {"activation": "silu", "arch": arch_of(device)}
    dgate, dup = torch.empty(33, 70, device=device), torch.empty(33, 70, device=device)
    run_all(gated_backward_calls(dh, gate, up, dgate, dup, **options))
    a, b, c = (t.t().contiguous().t() for t in (dh, gate, up))  # columns run along memory
    run_all(gated_backward_calls(a, b, c, a, c, **options))
    assert torch.equal(a, dgate) and torch.equal(c, dup)
    h = torch.empty_like(gate)
    run_all(gated_forward_calls(gate, up, h, **options))
    run_all(gated_forward_calls(b, up, b, **options))
    assert torch.equal(b, h)


def test_no_rows_no_launch_and_wrong_shapes(device):
    """Would catch a grid of no programs, and operands that do not fit together."""
    a = torch.randn(4, 8, device=device)
    assert gated_forward_calls(a[:0], a[:0], a[:0], activation="silu", arch=0) == []
    with pytest.raises(ValueError, match=r"up: expected \[4, 8\], got \[4, 7\]"):
        gated_forward_calls(a, a[:, :7], a, activation="silu", arch=0)
    with pytest.raises(ValueError, match="dgate"):
        gated_backward_calls(a, a, a, a[:3], a, activation="silu", arch=0)
