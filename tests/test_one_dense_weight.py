"""Over quantized weights that are written out dense, every operation has one dense weight at a time, and keeps none."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import importlib.util
import weakref

import pytest
import torch

from peftkern import use_backend
from peftkern.adapter_pool import LayerAdapters
from peftkern.ops import (
    _quantize_torch,
    dequantize,
    dora_linear,
    gated_lora_linear,
    ia3_linear,
    lora_linear,
    lora_linear_shared,
    lora_mlp,
    multi_ia3_linear,
    multi_lora_linear,
    multi_lora_linear_shared,
    quantize_4bit,
    quantize_8bit,
)
from peftkern.ops import plan as plans
from peftkern.ops.linear_quantized import linear_quantized
from peftkern.utils.live_bytes import LiveBytes

BLOCKS = importlib.import_module("peftkern.ops._dense_blocks")
QUANTIZE = importlib.import_module("peftkern.ops.quantize")
MULTI = [importlib.import_module(f"peftkern.ops.multi_lora_linear{name}") for name in ("", "_shared")]
M, K, N, R, SCALING = 300, 64, 96, 8, 0.75  # so many rows that kernels do not decode within the product
# Scales that are not quantized again, for else rows could not be cut but by 256.
FORMATS = {"nf4": lambda w: quantize_4bit(w, "nf4", 64, double_quant=False), "int8": quantize_8bit}


class DenseWeights:
    """Counts the buffers of dense weights that are alive, at each time that one is written.

    `cycles`: what Triton's interpreter runs is held by cycles of its own, which are to be collected before.
    """

    def __init__(self, monkeypatch, cycles):
        self.cycles = cycles
        self.made: list[weakref.ref] = []
        self.counts: list[int] = []
        # What every way to a dense weight ends in, that of `ops.dequantize` too.
        ends = [(BLOCKS, "write_4bit"), (QUANTIZE, "write_4bit"), (_quantize_torch, "dequantize_8bit")]
        if importlib.util.find_spec("triton") is not None:
            ends.append((importlib.import_module("peftkern.ops._weight_calls"), "dequantize_4bit_calls"))
        for module, name in ends:
            monkeypatch.setattr(module, name, functools.partial(self._counted, getattr(module, name)))

    def _counted(self, write, *arguments, **options):
        storage = arguments[-1].untyped_storage()  # its Python object lives as long as its memory
        if all(seen() is not storage for seen in self.made):
            self.made.append(weakref.ref(storage))
        self.counts.append(self.alive)
        return write(*arguments, **options)

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
    if route == "linear_quantized":
        return [linear_quantized(x, first.weight)]
    if route.startswith("multi_lora_linear"):
        return mixed(route, x, [first.weight, second.weight, third.weight], device)
    if route.startswith("shared"):
        dropout_p = 0.1 if "dropout" in route else 0.0
        parts = zip(first.lora, second.lora, third.lora, strict=True)
        return lora_linear_shared(x, *map(list, parts), dropout_p=dropout_p)
    if route == "dora_linear":
        magnitude = torch.rand(N, device=device).requires_grad_()
        return [dora_linear(x, first.weight, first.A, first.B, magnitude, SCALING)]
    if "ia3" in route:
        feed_forward = "feed-forward" in route
        size = K if feed_forward else N
        if route.startswith("multi"):
            scales, ids = torch.rand(5, size, device=device).requires_grad_(), torch.arange(M, device=device) % 6
            return [multi_ia3_linear(x, first.weight, scales, ids, is_feedforward=feed_forward)]
        scale = torch.rand(size, device=device).requires_grad_()
        return [ia3_linear(x, first.weight, scale, is_feedforward=feed_forward)]
    if route == "gated_lora_linear":
        return [gated_lora_linear(x, other, *first.lora)]
    return [lora_mlp(x, first.lora, second.lora, Operands(quantize, device, K, N).lora)]


def pool(device):
    """Five slots of a layer, the second one empty."""
    adapters = LayerAdapters(K, N, 5, R, torch.float32, device)
    for slot in (0, 2, 3, 4):
        factors = (torch.randn(slot + 1, K, device=device), torch.randn(N, slot + 1, device=device))
        adapters.put(slot, *map(torch.nn.Parameter, factors), SCALING)
    return adapters


def mixed(route, x, weights, device):
    """The outputs of `multi_lora_linear`, or of its shared form, for rows that want five slots' adapters or none."""
    ids, dropout_p = torch.arange(M, device=device) % 6 - 1, 0.1 if "dropout" in route else 0.0
    if not route.startswith("multi_lora_linear_shared"):
        return [multi_lora_linear(x, weights[0], pool(device), ids, dropout_p=dropout_p)]
    pools = [pool(device) for _ in weights]
    return multi_lora_linear_shared(x, weights, pools, ids, dropout_p=dropout_p)


ROUTES = ["lora_linear", "shared", "shared, dropout", "dora_linear", "ia3_linear", "ia3_linear, feed-forward"]
ROUTES += ["multi_ia3_linear", "multi_ia3_linear, feed-forward", "gated_lora_linear", "lora_mlp", "linear_quantized"]
ROUTES += ["multi_lora_linear", "multi_lora_linear, dropout", "multi_lora_linear_shared"]


@pytest.mark.parametrize(
    "format, door, blocks",
    [("nf4", "eager", 1), ("nf4", "eager", 2), ("int8", "eager", 1), ("int8", "eager", 2), ("nf4", "operator", 1)],
)
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("route", ROUTES)
def test_one_at_a_time_and_none_that_is_kept(route, format, backend, door, blocks, monkeypatch, frozen, device):
    """Would catch the dense weight of one projection in a loop's variable, a closure or a recording while that of the
    next is written, and one that is kept for backward."""
    run_and_count(route, format, backend, door, blocks, monkeypatch, device)


def run_and_count(route, format, backend, door, blocks, monkeypatch, device):
    """Forward and backward of a route, with one dense weight at a time and none between."""
    monkeypatch.setattr(plans, "JOINED_ELEMENTS", 0)
    if blocks > 1:
        monkeypatch.setattr(BLOCKS, "BUFFER_BYTES", K * N * 4 // blocks)
    dense = DenseWeights(monkeypatch, cycles=backend == "triton" and device == "cpu")
    quantize = FORMATS[format]
    x, other = (torch.randn(M, K, device=device).requires_grad_() for _ in range(2))
    with use_backend(backend), LiveBytes() if door == "operator" else contextlib.nullcontext():
        counts: list[int] = []
        for replayed in (False,) if device == "cpu" else (False, True):
            dense.counts.clear()
            outputs = call(route, x, other, quantize, device)
            forward = len(dense.counts)
            assert dense.alive == 0
            torch.autograd.backward(outputs, [torch.randn_like(y) for y in outputs])
            assert dense.alive == 0
            if replayed:  # what a recording writes out is seen where it is made (test_replayable_calls.py)
                assert set(dense.counts) <= {1}
                continue
            assert 0 < forward < len(dense.counts), "written neither in forward nor in backward: not what is tested"
            assert set(dense.counts) == {1}
            counts = list(dense.counts)
    return counts


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("path", ["cublas", "decode", "triton"])
@pytest.mark.parametrize("route", ["multi_lora_linear", "multi_lora_linear_shared"])
def test_mixed_batches_on_kernels(route, path, format, blocks, monkeypatch, frozen, device):
    """Would catch the weights of all projections made dense before the first launch, and a weight larger than the
    buffer written out whole, on the paths that a plan takes on some GPUs only."""
    pytest.importorskip("triton")
    monkeypatch.setattr(f"{__name__}.M", 20 if path == "decode" else 70)
    for module in MULTI:
        monkeypatch.setattr(module, "plan_for", lambda *_: plans.Plan(f"dequantize:{path}", "forced by a test"))
    counts = run_and_count(route, format, "triton", "eager", blocks, monkeypatch, device)
    projections = 3 if "shared" in route else 1
    assert len(counts) == 2 * projections * blocks


def test_ia3_scales_a_dequantized_weight_where_it_lies(monkeypatch, device):
    """Would catch a second dense weight beside the first: the scaled one, of more rows than features."""
    pytest.importorskip("triton")
    from peftkern.ops import _ia3_linear_triton as kernels

    taken = []
    scratch = kernels.scratch
    monkeypatch.setattr(kernels, "scratch", lambda *shape, **rest: (taken.append(shape), scratch(*shape, **rest))[1])
    x, scale, weight = torch.randn(M, K, device=device), torch.rand(K, device=device), torch.randn(N, K, device=device)
    stored = quantize_8bit(weight)
    dense = dequantize(stored)
    with use_backend("triton"):
        kept = ia3_linear(x, dense, scale, is_feedforward=True)
        assert taken == [(N, K)] and torch.equal(dense, dequantize(stored)), "a caller's weight is not to be scaled"
        spent = ia3_linear(x, stored, scale, is_feedforward=True)
    assert taken == [(N, K)] and torch.equal(kept, spent)
