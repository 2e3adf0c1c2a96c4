"""`ops.multi_lora_linear` on Triton kernels, through the public operation: forward, every gradient, both doors.

On a GPU the kernels run compiled, elsewhere in Triton's interpreter, which is slow: so sizes are small and odd.
"""

from __future__ import annotations

import importlib

import pytest
import torch

pytest.importorskip("triton")

from multi_data import leaves, make, truth_and_magnitude  # noqa: E402
from numerics import assert_rounded  # noqa: E402
from peftkern import reference, use_backend  # noqa: E402
from peftkern.backend import device_info  # noqa: E402
from peftkern.ops import dequantize, multi_lora_linear, quantize_4bit  # noqa: E402
from peftkern.ops.adapter_route import AdapterBatch  # noqa: E402
from peftkern.ops.plan import Plan, plan_multi_lora_linear  # noqa: E402

# The package exports the function under its module's name.
MODULE = importlib.import_module("peftkern.ops.multi_lora_linear")

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or bool(device_info(torch.device("cpu")).triton), reason="runs in Triton's interpreter"
)


def run(x, weight, bias, adapters, ids, dy, **options):
    tensors = leaves(x, weight if isinstance(weight, torch.Tensor) else torch.zeros(0), bias, adapters)
    for t in tensors:
        t.grad = None
    with use_backend("triton"):
        y = multi_lora_linear(x, weight, adapters, ids, bias, **options)
        y.backward(dy)
    return [y.detach(), *(torch.zeros_like(t) if t.grad is None else t.grad for t in tensors)]


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("M, N, K, path", [(70, 33, 40, "cublas"), (70, 33, 40, "triton"), (5, 17, 24, None)])
def test_kernels_match_fp64(M, N, K, path, dropout_p, monkeypatch):
    """Would catch a parameter that gets another's slice of the pool's gradient, and a mask that differs."""
    if path is not None:  # the plan's own choice between the two needs a GPU's measurements
        monkeypatch.setattr(MODULE, "plan_for", lambda *_: Plan(path, "forced by a test"))
    x, weight, bias, adapters, ids = make(M, N, K)
    dy, seed = torch.randn(M, N), torch.tensor([1234])
    known = torch.where((ids >= 0) & (ids < adapters.slots), ids, -1)
    keep = reference.multi_dropout_mask(seed, known, K, dropout_p) if dropout_p else None
    got = run(x, weight, bias, adapters, ids, dy, dropout_p=dropout_p, seed=seed)
    truths = truth_and_magnitude(x, weight, bias, adapters, ids, dy, keep, dropout_p)
    for out, (truth, magnitude) in zip(got, truths, strict=True):
        assert_rounded(out, truth, magnitude, terms=M + N + K + 64, rounded=6)


def test_an_id_for_each_sequence_and_fp32_masters():
    """Would catch ids that are repeated in the wrong order, or pools of another dtype than x."""
    x, weight, bias, adapters, _ = make(12, 16, 24, torch.float16, torch.float32)
    ids, dy = torch.tensor([3, 0, -1]), torch.randn(12, 16).half()
    rows = ids.repeat_interleave(4)
    want = run(x, weight, bias, adapters, rows, dy)
    got = run(x.detach().view(3, 4, 24).requires_grad_(), weight, bias, adapters, ids, dy.view(3, 4, 16))
    assert torch.equal(got[0].view(12, 16), want[0]) and torch.equal(got[1].view(12, 24), want[1])
    assert all(torch.equal(a, b) for a, b in zip(got[2:], want[2:], strict=True))


@pytest.mark.parametrize("path", ["dequantize:cublas", "fused_4bit", "decode_4bit"])
def test_a_quantized_weight(path, monkeypatch):
    """Would catch a base that is decoded into another shape or dtype than the kernels take, either way."""
    monkeypatch.setattr(MODULE, "plan_for", lambda *_: Plan(path, "forced by a test"))
    x, weight, bias, adapters, ids = make(10, 64, 64, torch.float16)
    packed = quantize_4bit(weight.detach().contiguous())
    dy = torch.randn(10, 64).half()
    got = run(x, packed, bias, adapters, ids, dy)
    monkeypatch.setattr(MODULE, "plan_for", lambda *_: Plan("torch", "forced by a test"))
    dense = dequantize(packed, torch.float16).requires_grad_()
    want = run(x, dense, bias, adapters, ids, dy)
    for i, (first, second) in enumerate(zip(got, want, strict=True)):
        if i != 2:  # of the weight, which is frozen
            torch.testing.assert_close(first, second, rtol=2e-2, atol=0.15)


def test_compiled_kernels_and_routing():
    """Would catch a routing that is made of constants, or an operator that does not take its tables."""
    x, weight, bias, adapters, ids = make(9, 16, 24, grad=False)

    def step(x, ids):
        batch = AdapterBatch(ids, adapters.slots)
        return multi_lora_linear(
            multi_lora_linear(x, weight, adapters, batch, bias)[:, :1] * x, weight, adapters, batch
        )

    with use_backend("triton"):
        compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
        for each in (ids, ids.flip(0)):
            torch.testing.assert_close(compiled(x, each), step(x, each))


def test_the_plan_and_its_words():
    """Would catch a path that nobody explains."""
    device = device_info(torch.device("cpu"))
    few = plan_multi_lora_linear(8, 64, 64, 16, None, torch.float32, device, True, "triton")
    many = plan_multi_lora_linear(80, 64, 64, 16, 64, torch.float16, device, True, "triton")
    assert (few.path, many.path) == ("decode", "fused_4bit")
    eight = plan_multi_lora_linear(80, 64, 64, 16, 0, torch.float32, device, True, "triton")
    large = plan_multi_lora_linear(8000, 64, 64, 16, 64, torch.float16, device, True, "triton")
    assert (eight.path, large.path) == ("dequantize:triton",) * 2 and "8-bit" in eight.reason
    plain = plan_multi_lora_linear(8, 64, 64, 16, None, torch.float32, device)
    assert plain.path == "torch" and "grouped by adapter" in plain.reason
