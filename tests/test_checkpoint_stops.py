"""A checkpointed region that ends with an adapted layer: backward computes it again up to what that layer keeps."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import peftkern
from peftkern.ops import gated_lora_linear, lora_linear, quantize_4bit
from peftkern.ops.plan import Plan

PLAIN = importlib.import_module("peftkern.ops._lora_linear_torch")
KERNELS = importlib.import_module("peftkern.ops._lora_linear_triton")
QUANTIZED = importlib.import_module("peftkern.ops.lora_linear_quantized")
DENSE = importlib.import_module("peftkern.ops.lora_linear")
GATED = importlib.import_module("peftkern.ops.gated_lora_linear")
M, N, K, R = 40, 48, 64, 4
KINDS = ("dense", "4 bits", "gated", "gated, 4 bits")


def make(kind, dtype, device):
    """x, A, B that learn, and a function of them that ends with the operation."""
    torch.manual_seed(3)
    x = torch.randn(2, M // 2, K, device=device).to(dtype)
    a, b, bias = torch.randn(R, K, device=device), torch.randn(N, R, device=device), torch.randn(N, device=device)
    weight = (torch.randn(N, K, device=device) / 8).to(dtype)
    bias = bias.to(dtype)
    held = quantize_4bit(weight) if "4 bits" in kind else weight

    def end(x, a, b, p):
        h = x.tanh()
        options = {"dropout_p": p, "seed": torch.tensor([5], device=device)}
        if "gated" in kind:
            return gated_lora_linear(h, x.sin(), held, a, b, 0.5, bias, **options)
        return lora_linear(h, held, a, b, 0.5, bias, **options)

    return [x.requires_grad_(), a.requires_grad_(), b.requires_grad_()], end


class NeverFound(dict):
    """Recordings that are not found again, so that each list of launches is built anew, and seen, on a GPU too."""

    def get(self, *_):
        return None


@pytest.fixture
def products(monkeypatch):
    """Counts the products that write y, on either path."""
    made = []
    monkeypatch.setattr(importlib.import_module("peftkern_kernels.replay"), "_kept", NeverFound())

    def counted(module, name):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **kw: (made.append(name), function(*args, **kw))[1])

    counted(PLAIN, "product")
    counted(KERNELS, "product_calls")
    return made


def gradients(function, inputs, dy):
    grads = torch.autograd.grad(function(*inputs), inputs, dy)
    return [g.clone() for g in grads]


def force(monkeypatch, kind, path):
    """Have kernels run, in the interpreter, on `path`."""
    plan = Plan(f"dequantize:{path}" if "4 bits" in kind and path != "fused_4bit" else path, "forced by a test")
    for module, name in ((QUANTIZED, "plan_for"), (DENSE, "plan_for"), (GATED, "plan_for")):
        monkeypatch.setattr(module, name, lambda *_: plan)


def on_path(kind, path, monkeypatch, device):
    """`make` and a dY, with kernels forced to run on `path`, or plain PyTorch in fp32 on a CPU without one."""
    where = device if path else "cpu"
    inputs, end = make(kind, torch.bfloat16 if path else torch.float32, where)
    if path:
        force(monkeypatch, kind, path)
    return inputs, end, torch.randn(2, M // 2, N, device=where).to(inputs[0].dtype)


CASES = [(kind, path) for kind in KINDS for path in (None, "triton", "cublas")]
CASES += [(kind, "fused_4bit") for kind in KINDS if "4 bits" in kind]


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("kind", "path"), CASES)
def test_the_last_product_is_not_made_again(kind, path, p, products, monkeypatch, device):
    """Would catch a product that backward makes and throws away, and S, or a mask, that is another the second time."""
    inputs, end, dy = on_path(kind, path, monkeypatch, device)
    with peftkern.use_backend("triton" if path else "torch"):
        plain = gradients(lambda x, a, b: end(x, a, b, p), inputs, dy)
        products.clear()
        y = checkpoint(end, *inputs, p, use_reentrant=False)
        forward = len(products)
        again = torch.autograd.grad(y, inputs, dy)
    assert forward == 1 and len(products) == forward
    assert all(torch.equal(g, want) for g, want in zip(again, plain, strict=True))


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize(("kind", "path"), CASES)
def test_y_is_there_for_what_comes_after_it(kind, path, early_stop, products, monkeypatch, device):
    """Would catch an output without values where something that is kept depends on it, or nobody stops."""
    inputs, end, dy = on_path(kind, path, monkeypatch, device)

    def region(x, a, b):
        return end(x, a, b, 0.0).sin()

    with peftkern.use_backend("triton" if path else "torch"), set_checkpoint_early_stop(early_stop):
        plain = gradients(region, inputs, dy)
        for _ in range(3):  # the second time it is known to go on
            products.clear()
            y = checkpoint(region, *inputs, use_reentrant=False)
            again = torch.autograd.grad(y, inputs, dy)
            assert len(products) == 2
            assert all(torch.equal(g, want) for g, want in zip(again, plain, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_and_in_reentrant_checkpointing(kind):
    """Would catch what fills y under another autocast than the rest, and a y that a reentrant backward never has."""
    inputs, end = make(kind, torch.float32, "cpu")
    dy = torch.randn(2, M // 2, N)

    def region(x, a, b):
        with torch.autocast("cpu", torch.bfloat16):
            return end(x, a, b, 0.0).float().sin()

    def by(function):
        function(*inputs).backward(dy)
        return [t.grad for t in inputs], [setattr(t, "grad", None) for t in inputs]

    plain, _ = by(region)
    for reentrant in (False, True):
        again, _ = by(lambda *args, reentrant=reentrant: checkpoint(region, *args, use_reentrant=reentrant))
        assert all(torch.equal(g, want) for g, want in zip(again, plain, strict=True))


@pytest.mark.parametrize("kind", ["dense", "4 bits"])
@pytest.mark.parametrize("goes_on", [False, True])
def test_ia3_that_scales_its_input(goes_on, kind, monkeypatch):
    """Would catch a product of IA3's down projection that is made again for nobody, or not made for somebody."""
    module = importlib.import_module("peftkern.ops.ia3_linear")
    made, forward = [], module._forward
    monkeypatch.setattr(module, "SHORT_ROWS", 0)  # of a few rows torch makes the product by itself
    monkeypatch.setattr(module, "_forward", lambda *args: (made.append(1), forward(*args))[1])
    torch.manual_seed(4)
    weight = torch.randn(N, K) / 8
    held = quantize_4bit(weight) if kind == "4 bits" else weight
    inputs = [torch.randn(2, M // 2, K, requires_grad=True), torch.rand(K, requires_grad=True)]
    dy = torch.randn(2, M // 2, N)

    def region(x, scale):
        y = module.ia3_linear(x.tanh(), held, scale, is_feedforward=True)
        return y.sin() if goes_on else y

    plain = gradients(region, inputs, dy)
    made.clear()
    again = torch.autograd.grad(checkpoint(region, *inputs, use_reentrant=False), inputs, dy)
    assert len(made) == (2 if goes_on else 1)
    assert all(torch.equal(g, want) for g, want in zip(again, plain, strict=True))


def test_a_layer_that_goes_on_is_not_split_again(monkeypatch):
    """Would catch two lists of launches, in place of one, in every step for each layer in the middle of a region, and
    a layer that stays known when it is gone."""
    common = importlib.import_module("peftkern.ops._common")
    monkeypatch.setattr(common, "_awaited", {})
    inputs, end = make("dense", torch.float32, "cpu")
    dy, seen = torch.randn(2, M // 2, N), []
    shrink = PLAIN.forward
    monkeypatch.setattr(PLAIN, "forward", lambda *args: (seen.append(args[-1] is not None), shrink(*args))[1])
    for _ in range(3):
        y = checkpoint(lambda *args: end(*args, 0.0).sin(), *inputs, use_reentrant=False)
        y.backward(dy)
    assert seen == [False, True, False, False, False, False]
    assert len(common._awaited) == 1
    del y, inputs
    assert not common._awaited
