"""Over quantized weights that are written out dense, every operation has one dense weight at a time, and keeps none."""

from __future__ import annotations

import contextlib
import gc
import importlib
import weakref

import pytest
import torch

from peftkern import use_backend
from peftkern.ops import (
    dora_linear,
    gated_lora_linear,
    ia3_linear,
    lora_linear,
    lora_linear_shared,
    lora_mlp,
    quantize_4bit,
    quantize_8bit,
)
from peftkern.ops import plan as plans
from peftkern.utils.live_bytes import LiveBytes

MODULE = importlib.import_module("peftkern.ops.lora_linear_quantized")
M, K, N, R, SCALING = 300, 64, 96, 8, 0.75  # so many rows that kernels do not decode within the product
FORMATS = {"nf4": lambda w: quantize_4bit(w, "nf4", 64, True), "int8": quantize_8bit}


class DenseWeights:
    """Counts the buffers of dense weights that are alive, at each time that one is written.

    `cycles`: what Triton's interpreter runs is held by cycles of its own, which are to be collected before.
    """

    def __init__(self, monkeypatch, cycles):
        self.cycles = cycles
        self.made: list[weakref.ref] = []
        self.counts: list[int] = []
        write = MODULE._write_dense

        def counted(weight, dense_path, out):
            storage = out.untyped_storage()  # its Python object lives as long as its memory
            if all(seen() is not storage for seen in self.made):
                self.made.append(weakref.ref(storage))
            self.counts.append(self.alive)
            write(weight, dense_path, out)

        monkeypatch.setattr(MODULE, "_write_dense", counted)

    @property
    def alive(self):
        if self.cycles:
            gc.collect()
        return sum(seen() is not None for seen in self.made)


class Operands:
    """Random ones of a projection from `k` to `n` features, as leaves."""

    def __init__(self, quantize, device, n=N, k=K):
        self.weight = quantize(torch.randn(n, k, device=device))
        self.A = torch.randn(R, k, device=device).requires_grad_()
        self.B = torch.randn(n, R, device=device).requires_grad_()

    @property
    def lora(self):
        return self.weight, self.A, self.B, SCALING


@pytest.fixture
def frozen():
    """Collections look at what a test makes, which is little, and at nothing that was there before."""
    gc.freeze()
    yield
    gc.unfreeze()


def call(route, x, other, quantize, device):
    """The outputs of an operation over quantized weights."""
    first, second, third = (Operands(quantize, device) for _ in range(3))
    if route == "lora_linear":
        return [lora_linear(x, *first.lora)]
    if route.startswith("shared"):
        dropout_p = 0.1 if "dropout" in route else 0.0
        parts = zip(first.lora, second.lora, third.lora, strict=True)
        return lora_linear_shared(x, *map(list, parts), dropout_p=dropout_p)
    if route == "dora_linear":
        magnitude = torch.rand(N, device=device).requires_grad_()
        return [dora_linear(x, first.weight, first.A, first.B, magnitude, SCALING)]
    if route.startswith("ia3"):
        feed_forward = "feed-forward" in route
        scale = torch.rand(K if feed_forward else N, device=device).requires_grad_()
        return [ia3_linear(x, first.weight, scale, is_feedforward=feed_forward)]
    if route == "gated_lora_linear":
        return [gated_lora_linear(x, other, *first.lora)]
    return [lora_mlp(x, first.lora, second.lora, Operands(quantize, device, K, N).lora)]


ROUTES = ["lora_linear", "shared", "shared, dropout", "dora_linear", "ia3_linear", "ia3_linear, feed-forward"]
ROUTES += ["gated_lora_linear", "lora_mlp"]


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("format, door", [("nf4", "eager"), ("int8", "eager"), ("nf4", "operator")])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("route", ROUTES)
def test_one_at_a_time_and_none_that_is_kept(route, format, backend, door, blocks, monkeypatch, frozen, device):
    """Would catch the dense weight of one projection in a loop's variable, a closure or a recording while that of the
    next is written, and one that is kept for backward."""
    monkeypatch.setattr(plans, "JOINED_ELEMENTS", 0)
    if blocks > 1:
        monkeypatch.setattr(MODULE, "BUFFER_BYTES", K * N * 4 // blocks)
    dense = DenseWeights(monkeypatch, cycles=backend == "triton" and device == "cpu")
    quantize = FORMATS[format]
    x, other = (torch.randn(M, K, device=device).requires_grad_() for _ in range(2))
    with use_backend(backend), LiveBytes() if door == "operator" else contextlib.nullcontext():
        for _ in range(1 if device == "cpu" else 2):  # the second time from a recording
            dense.counts.clear()
            outputs = call(route, x, other, quantize, device)
            forward = len(dense.counts)
            assert dense.alive == 0
            torch.autograd.backward(outputs, [torch.randn_like(y) for y in outputs])
            assert dense.alive == 0
            assert 0 < forward < len(dense.counts), "written neither in forward nor in backward: not what is tested"
            assert set(dense.counts) == {1}
