"""`ops.ia3_linear` on Triton kernels: every path, forward and every gradient, through the public operations.

On a GPU the kernels run compiled, elsewhere in Triton's interpreter, which is slow: so sizes are small and odd.
"""

from __future__ import annotations

import importlib

import pytest
import torch

from ia3_data import ROUNDED, make, truth_and_magnitude
from numerics import assert_rounded, padded_randn
from peftkern import use_backend
from peftkern.ops import dequantize, ia3_linear, multi_ia3_linear, quantize_4bit, quantize_8bit
from peftkern.ops.plan import Plan

MODULE = importlib.import_module("peftkern.ops.ia3_linear")
BOTH = pytest.mark.parametrize("is_feedforward", [False, True], ids=["output", "feedforward"])


@pytest.fixture(params=["triton", "cublas"])
def path(request, monkeypatch):
    """The path, whatever the plan would choose for so few tokens."""
    monkeypatch.setattr(MODULE, "plan_for", lambda *_, **__: Plan(request.param, "forced by a test"))
    return request.param


def run(tensors, dy, is_feedforward, ids=None):
    for t in tensors:
        if isinstance(t, torch.Tensor):
            t.grad = None
    x, w, scale, bias = tensors
    if ids is None:
        y = ia3_linear(x, w, scale, bias, is_feedforward=is_feedforward)
    else:
        y = multi_ia3_linear(x, w, scale, ids, bias, is_feedforward=is_feedforward)
    y.backward(dy)
    return [y.detach(), *(getattr(t, "grad", None) for t in tensors)]


@BOTH
@pytest.mark.parametrize("slots", [0, 3])
@pytest.mark.parametrize(
    "dtype, masters", [(torch.float32, False), (torch.float16, False), (torch.bfloat16, False), (torch.bfloat16, True)]
)
@pytest.mark.parametrize("M, N, K", [(65, 34, 40), (33, 48, 17), (1, 64, 64), (7, 5, 70)])
def test_output_and_gradients_match_fp64(M, N, K, dtype, masters, slots, is_feedforward, path, device):
    """Would catch a kernel handed the wrong operand, l on the wrong side of a product, sums of the wrong pair."""
    tensors = make(M, N, K, is_feedforward, dtype, masters=masters, slots=slots, device=device)
    dy = padded_randn(M, N, pad=5, dtype=dtype, device=device)
    ids = torch.randint(-1, slots, (M,), device=device) if slots else None
    outputs = run(tensors, dy, is_feedforward, ids)
    truths = truth_and_magnitude(tensors, dy, is_feedforward, ids)
    for out, truth, magnitude, rounded in zip(outputs, *truths, ROUNDED[is_feedforward], strict=True):
        factor = torch.finfo(dtype).eps / torch.finfo(out.dtype).eps
        assert_rounded(out, truth, magnitude, terms=M + N + K, rounded=rounded * factor)


@BOTH
@pytest.mark.parametrize("asked", range(4))
def test_only_the_gradients_asked_for(asked, is_feedforward, path, device):
    """Would catch a kernel that needs an operand which was not kept."""
    full = make(20, 18, 24, is_feedforward, device=device)
    tensors = [t.detach().requires_grad_(i == asked) for i, t in enumerate(full)]
    dy = torch.randn(20, 18, device=device)
    alone, together = run(tensors, dy, is_feedforward)[1 + asked], run(full, dy, is_feedforward)[1 + asked]
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)


@BOTH
def test_same_bits_on_two_runs_and_compiled(is_feedforward, path, device):
    """Would catch a reduction in an order that is not fixed, or an operator that falls back under torch.compile."""
    tensors = make(40, 34, 24, is_feedforward, device=device)
    dy = torch.randn(40, 34, device=device)
    runs = [run(tensors, dy, is_feedforward) for _ in range(2)]
    compiled = torch.compile(
        lambda *t: ia3_linear(*t, is_feedforward=is_feedforward), backend="aot_eager", fullgraph=True
    )
    for t in tensors:
        t.grad = None
    y = compiled(*tensors)
    y.backward(dy)
    runs.append([y.detach(), *(t.grad for t in tensors)])
    assert all(torch.equal(first, other) for run_ in runs[1:] for first, other in zip(runs[0], run_, strict=True))


@BOTH
def test_a_quantized_weight_has_the_bits_of_the_dense_one(is_feedforward, device):
    """Would catch a path that is not that of the dense weight from there on."""
    x, w, scale, bias = make(20, 64, 64, is_feedforward, torch.bfloat16, device=device)
    weight = quantize_4bit(w.detach())
    dense = dequantize(weight, torch.bfloat16)
    dy, results = torch.randn(20, 64, device=device).bfloat16(), []
    with use_backend("triton"):
        for held in (weight, dense):
            for t in (x, scale, bias):
                t.grad = None
            y = ia3_linear(x, held, scale, bias, is_feedforward=is_feedforward)
            y.backward(dy)
            results.append([y.detach(), x.grad, scale.grad, bias.grad])
    assert all(torch.equal(got, want) for got, want in zip(*results, strict=True))


@BOTH
@pytest.mark.parametrize("M, slots", [(9, 0), (80, 0), (9, 3)])
@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_blocks_of_a_quantized_weight_match_fp64(format, M, slots, is_feedforward, path, monkeypatch, device):
    """Would catch a block's columns of y, z or dY, its bias or its part of dX amiss, and l twice on a block."""
    N, K = 70, 64
    monkeypatch.setattr("peftkern.ops._dense_blocks.BUFFER_BYTES", 30 * K * 4)
    monkeypatch.setattr(MODULE, "plan_for", lambda *_, **__: Plan(f"dequantize:{path}", "forced by a test"))
    tensors = make(M, N, K, is_feedforward, slots=slots, device=device)
    x, w, scale, bias = tensors
    w = w.detach().contiguous()
    stored = quantize_4bit(w, blocksize=32, double_quant=False) if format == "nf4" else quantize_8bit(w)
    dy, ids = torch.randn(M, N, device=device), torch.randint(-1, 3, (M,), device=device) if slots else None
    outputs = run([x, stored, scale, bias], dy, is_feedforward, ids)
    truths = truth_and_magnitude([x, dequantize(stored), scale, bias], dy, is_feedforward, ids)
    for i, rounded in ((0, 2), (1, 5), (3, 2), (4, 1)):  # dX, and dl by it, in three parts
        assert_rounded(outputs[i], truths[0][i], truths[1][i], terms=M + N + K, rounded=rounded + 3 * (i == 3))


def test_the_plan_takes_kernels_and_refuses_by_name(device):
    """Would catch a silent fallback: use_backend('triton') promises kernels or an error."""
    tensors = make(4, 4, 4, False, torch.float64, grad=False, device=device)
    with use_backend("triton"), pytest.raises(RuntimeError, match="no kernel for float64"):
        ia3_linear(*tensors)
