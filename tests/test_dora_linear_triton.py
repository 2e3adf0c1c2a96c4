"""`ops.dora_linear` on Triton kernels: every path, forward and every gradient, through the public operation.

On a GPU the kernels run compiled, elsewhere in Triton's interpreter, which is slow: so sizes are small and odd.
"""

from __future__ import annotations

import importlib

import pytest
import torch

from dora_data import SCALING, apply, check, make, run
from numerics import padded_randn
from peftkern import reference, use_backend
from peftkern.ops import dequantize, dora_linear, dora_norm, quantize_4bit, quantize_8bit
from peftkern.ops.plan import Plan

MODULE = importlib.import_module("peftkern.ops.dora_linear")


@pytest.fixture(params=["triton", "cublas", "decode"])
def path(request, monkeypatch):
    """The path, whatever the plan would choose for so few tokens."""
    monkeypatch.setattr(MODULE, "plan_for", lambda *_, **__: Plan(request.param, "forced by a test"))
    return request.param


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype, masters", [(torch.float32, False), (torch.float16, True), (torch.bfloat16, True)])
@pytest.mark.parametrize("N, K, R", [(34, 40, 5), (5, 70, 20)])
def test_output_and_gradients_match_fp64(N, K, R, dtype, masters, p, path, device):
    """Would catch a kernel handed the wrong operand, dropout of the wrong part, c on one product of the two."""
    M = 7 if path == "decode" else 65  # it decodes at most 16 tokens
    tensors = make(M, N, K, R, dtype, masters=masters, device=device)
    dy, seed = padded_randn(M, N, pad=5, dtype=dtype, device=device), torch.tensor([11], device=device)
    outputs = run(tensors, dy, dropout_p=p, seed=seed)
    keep = reference.dropout_mask(seed, M, K, p) if p else None
    check(outputs, tensors, dy, keep, p, extra=2)  # A and B are rounded in the norm too


@pytest.mark.parametrize("asked", range(6))
def test_only_the_gradients_asked_for(asked, path, device):
    """Would catch a kernel that needs an operand which was not kept."""
    full = make(12, 18, 24, 3, device=device)
    tensors = [t.detach().requires_grad_(i == asked) for i, t in enumerate(full)]
    dy, options = torch.randn(12, 18, device=device), {"dropout_p": 0.3, "seed": torch.tensor([3], device=device)}
    alone, together = (run(t, dy, **options)[1 + asked] for t in (tensors, full))
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)


def test_same_bits_on_two_runs_and_compiled(path, device):
    """Would catch a reduction in an order that is not fixed, or an operator that falls back under torch.compile."""
    tensors, seed = make(14, 34, 24, 3, device=device), torch.tensor([3], device=device)
    dy = torch.randn(14, 34, device=device)
    for options in ({}, {"dropout_p": 0.2, "seed": seed}):
        compiled = torch.compile(apply, backend="aot_eager", fullgraph=True)
        runs = [run(tensors, dy, function, **options) for function in (apply, apply, compiled)]
        assert all(torch.equal(first, other) for run_ in runs[1:] for first, other in zip(runs[0], run_, strict=True))


@pytest.mark.parametrize("learns", [False, True])
def test_a_quantized_weight_has_the_bits_of_the_dense_one(learns, device):
    """Would catch a path that is not that of the dense weight from there on, and a y that is scaled in u's memory while
    u is kept."""
    x, w, *rest = make(20, 64, 64, 4, torch.bfloat16, masters=True, grad=learns, device=device)
    w = w.detach().contiguous()
    dy = torch.randn(20, 64, device=device).bfloat16()
    for quantize in (quantize_4bit, quantize_8bit):
        weight = quantize(w)
        dense, results = dequantize(weight, torch.bfloat16), []
        with use_backend("triton"):
            for held in (weight, dense):
                function = lambda t, held=held: apply([t[0], held, *t[1:]])  # noqa: E731
                results.append(run([x, *rest], dy, function) if learns else [function([x, *rest])])
                results[-1].append(dora_norm(held, *rest[:2], SCALING, dtype=torch.bfloat16))
        assert all(torch.equal(got, want) for got, want in zip(*results, strict=True))


@pytest.mark.parametrize("M", [3, 40])
def test_a_4bit_weight_is_decoded_by_its_product_where_the_norms_are_given(M, device):
    """Would catch norms that are worked out all the same, on a path that has no dense weight; or u read as if it had a
    bias."""
    tensors = make(M, 64, 128, 4, torch.bfloat16, masters=True, device=device)
    weight = quantize_4bit(tensors[1].detach().contiguous())
    dy = torch.randn(M, 64, device=device).bfloat16()
    with use_backend("triton"):
        norm = dora_norm(weight, *tensors[2:4], SCALING, dtype=torch.bfloat16)
        plan = MODULE.plan_for(tensors[0], weight, 4, "triton", norm_is_known=True)
        assert plan.path == ("decode_4bit" if M <= 16 else "fused_4bit")
        leaves = [tensors[0], *tensors[2:]]
        outputs = run(leaves, dy, lambda t: apply([t[0], weight, *t[1:]], norm=norm))
    dense = dequantize(weight, torch.bfloat16)
    check(outputs, [tensors[0], dense, *tensors[2:]], dy, extra=2, which=(0, 1, 3, 4, 5, 6))


def test_the_plan_takes_kernels_and_refuses_by_name(device):
    """Would catch a silent fallback: use_backend('triton') promises kernels or an error."""
    tensors = make(4, 4, 4, 2, torch.float64, grad=False, device=device)
    with use_backend("triton"), pytest.raises(RuntimeError, match="no kernel for float64"):
        apply(tensors)
    with use_backend("triton"), pytest.raises(RuntimeError, match="dora_norm"):
        dora_norm(*tensors[1:4], 1.0)


def test_autocast_takes_the_norm_of_the_weight_as_it_is(device):
    """Would catch the norm of a weight that was rounded for its product."""
    tensors = make(5, 6, 8, 2, device=device)
    kind = torch.device(device).type
    with use_backend("triton"), torch.autocast(kind, dtype=torch.bfloat16):
        y, norm = apply(tensors), dora_norm(*tensors[1:4], SCALING)
        given = dora_linear(*tensors[:5], SCALING, tensors[5], norm=norm)
    assert y.dtype == torch.bfloat16 and torch.equal(y, given)
    truth = reference.dora_norm(*(t.detach().double() for t in tensors[1:4]), SCALING)
    torch.testing.assert_close(norm.double(), truth, rtol=1e-5, atol=0)
    y.float().sum().backward()
    assert {t.grad.dtype for t in tensors} == {torch.float32}
