"""IA3 on a GPU: real sizes and tiles, CUDA graphs, memory. `python -m pytest -m gpu`."""

from __future__ import annotations

import importlib

import pytest
import torch

from ia3_data import ROUNDED, truth_and_magnitude
from numerics import assert_rounded
from peftkern.ops import ia3_linear, multi_ia3_linear, quantize_4bit
from peftkern.ops.plan import Plan

pytestmark = pytest.mark.gpu
MODULE = importlib.import_module("peftkern.ops.ia3_linear")
BOTH = pytest.mark.parametrize("is_feedforward", [False, True], ids=["output", "feedforward"])


def make(M, N, K, is_feedforward, dtype=torch.bfloat16, slots=0):
    """x, weight (frozen), fp32 scale with zeros, bias."""
    x = torch.randn(M, K, device="cuda").to(dtype)
    weight = (torch.randn(N, K, device="cuda") / K**0.5).to(dtype)
    C = K if is_feedforward else N
    scale = torch.randn(*([slots] if slots else []), C, device="cuda")
    scale[..., ::5] = 0.0
    bias = torch.randn(N, device="cuda").to(dtype)
    return [t.requires_grad_(i != 1) for i, t in enumerate((x, weight, scale, bias))]


def run(tensors, dy, is_feedforward, ids=None):
    x, w, scale, bias = tensors
    if ids is None:
        y = ia3_linear(x, w, scale, bias, is_feedforward=is_feedforward)
    else:
        y = multi_ia3_linear(x, w, scale, ids, bias, is_feedforward=is_feedforward)
    return [y, *torch.autograd.grad(y, (x, scale, bias), dy)]


@BOTH
@pytest.mark.parametrize("slots", [0, 7])
@pytest.mark.parametrize("path", ["triton", "cublas"])
@pytest.mark.parametrize(
    "M, N, K",
    [
        (4096, 1024, 2048),
        (4200, 1296, 1040),  # on Hopper several tiles a program, with an edge on each side
        (2048, 512, 4096),
        (512, 1024, 1024),
        (300, 1000, 4104),
        (130, 1001, 4095),
        (3, 64, 96),
    ],
)
def test_real_tiles_match_fp64(M, N, K, path, slots, is_feedforward, monkeypatch):
    """Would catch what the interpreter cannot: a compiled tile that is wrong, TMA coordinates, rows in another sum."""
    monkeypatch.setattr(MODULE, "plan_for", lambda *_, **__: Plan(path, "forced by a test"))
    tensors = make(M, N, K, is_feedforward, slots=slots)
    dy = torch.randn(M, N, device="cuda").bfloat16()
    ids = torch.randint(-1, slots, (M,), device="cuda") if slots else None
    outputs = run(tensors, dy, is_feedforward, ids)
    truths = truth_and_magnitude(tensors, dy, is_feedforward, ids)
    kept = (0, 1, 3, 4)  # no gradient of the weight
    for out, i in zip(outputs, kept, strict=True):
        factor = torch.finfo(torch.bfloat16).eps / torch.finfo(out.dtype).eps
        rounded = ROUNDED[is_feedforward][i] * factor
        assert_rounded(out.detach(), truths[0][i], truths[1][i], terms=M + N + K, rounded=rounded)


@BOTH
@pytest.mark.parametrize("slots", [0, 4])
def test_cuda_graph_replays_with_new_inputs(slots, is_feedforward):
    """Would catch a host synchronisation in the routing of rows, or an allocation that capture forbids."""
    M, N, K = 640, 512, 1024
    tensors = make(M, N, K, is_feedforward, slots=slots)
    dy = torch.randn(M, N, device="cuda").bfloat16()
    ids = torch.randint(-1, slots, (M,), device="cuda") if slots else None
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(tensors, dy, is_feedforward, ids)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(tensors, dy, is_feedforward, ids)
    with torch.no_grad():
        tensors[0].copy_(torch.randn_like(tensors[0]))
        if ids is not None:
            ids.copy_(ids.flip(0))
    graph.replay()
    for got, want in zip(captured, run(tensors, dy, is_feedforward, ids), strict=True):
        assert torch.equal(got, want)


@BOTH
def test_same_bits_on_two_runs(is_feedforward):
    """Would catch an atomic, or a reduction in order of arrival."""
    tensors = make(4096, 1024, 2048, is_feedforward)
    dy = torch.randn(4096, 1024, device="cuda").bfloat16()
    runs = [run(tensors, dy, is_feedforward) for _ in range(2)]
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_what_is_held_until_backward():
    """Would catch a scaled copy of x or of the weight, or a dense copy of a 4-bit one, that lives until backward."""
    M, N, K = 4096, 1024, 4096
    for is_feedforward in (False, True):
        x, weight, scale, bias = make(M, N, K, is_feedforward)
        for held in (weight, quantize_4bit(weight)):
            ia3_linear(x, held, scale, bias, is_feedforward=is_feedforward)
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            y = ia3_linear(x, held, scale, bias, is_feedforward=is_feedforward)
            kept = torch.cuda.memory_allocated() - before
            assert kept <= y.nbytes * (1 if is_feedforward else 2) + (1 << 16)
            del y
