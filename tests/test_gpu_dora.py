"""DoRA on a GPU: real sizes and tiles, CUDA graphs, memory. `python -m pytest -m gpu`."""

from __future__ import annotations

import importlib

import pytest
import torch

from dora_data import SCALING, check, run
from numerics import assert_rounded
from peftkern import reference
from peftkern.ops import dora_linear, dora_norm, quantize_4bit
from peftkern.ops.plan import Plan

pytestmark = pytest.mark.gpu
MODULE = importlib.import_module("peftkern.ops.dora_linear")


def make(M, N, K, R, dtype=torch.bfloat16, adapter=torch.float32):
    """x, weight (frozen), A, B, magnitude with zeros, bias."""
    x = torch.randn(M, K, device="cuda").to(dtype)
    weight = (torch.randn(N, K, device="cuda") / K**0.5).to(dtype)
    a = (torch.randn(R, K, device="cuda") / K**0.5).to(adapter)
    b, magnitude = torch.randn(N, R, device="cuda").to(adapter), torch.randn(N, device="cuda").to(adapter)
    magnitude[::5] = 0.0
    bias = torch.randn(N, device="cuda").to(dtype)
    return [t.requires_grad_(i != 1) for i, t in enumerate((x, weight, a, b, magnitude, bias))]


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("path", ["triton", "cublas", "mixed"])
@pytest.mark.parametrize(
    "M, N, K, R",
    [
        (4096, 2048, 2048, 16),
        (2048, 4096, 1024, 64),
        (512, 1024, 4096, 128),
        (130, 1001, 4095, 12),
        (300, 512, 520, 200),
    ],
)
def test_real_tiles_match_fp64(M, N, K, R, path, p, monkeypatch):
    """Would catch what the interpreter cannot: a compiled tile that is wrong, a race between planes."""
    monkeypatch.setattr(MODULE, "plan_for", lambda *_, **__: Plan(path, "forced by a test"))
    tensors, seed = make(M, N, K, R), torch.tensor([99], device="cuda")
    dy = torch.randn(M, N, device="cuda").bfloat16()
    outputs = run(tensors, dy, dropout_p=p, seed=seed)
    keep = reference.dropout_mask(seed, M, K, p) if p else None
    check([t for t in outputs if t is not None], tensors, dy, keep, p, extra=2, which=(0, 1, 3, 4, 5, 6))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("M", [1, 16, 17, 300])
def test_planned_path_matches_fp64(M, dtype):
    """Would catch a plan that sends a size to a path that is wrong there; M 1 and 16 decode."""
    tensors = make(M, 1024, 2048, 16, dtype, dtype)
    dy = torch.randn(M, 1024, device="cuda").to(dtype)
    check([t for t in run(tensors, dy) if t is not None], tensors, dy, extra=2, which=(0, 1, 3, 4, 5, 6))


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "N, K, R", [(4096, 4096, 16), (1024, 4096, 64), (4096, 1024, 128), (1001, 4095, 12), (512, 512, 300)]
)
def test_norms_match_fp64(N, K, R, adapter):
    """Would catch a compiled norm that is wrong for a rank of one step, of more, or for a weight stored as [K, N]."""
    _, weight, a, b, *_ = (t.detach() for t in make(1, N, K, R, adapter=adapter))
    for w in (weight, weight.t().contiguous().t()):
        norm = dora_norm(w, a, b, SCALING)
        wide = [t.double() for t in (w, a, b)]
        truth = reference.dora_norm(*wide, SCALING)
        magnitude = reference.dora_norm(*(t.abs() for t in wide), SCALING)
        rounded = 2 * torch.finfo(torch.bfloat16).eps / torch.finfo(torch.float32).eps
        assert_rounded(norm, truth, magnitude, terms=K + R + 3, rounded=rounded if adapter == torch.float32 else 0)
        assert torch.equal(norm, dora_norm(w, a, b, SCALING))


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_cuda_graph_replays_with_new_inputs_and_the_norm_of_the_new_adapter(p):
    """Would catch a host synchronisation, an allocation that capture forbids, a norm that was kept from a step
    before."""
    M, N, K = 640, 512, 1024
    tensors, seed = make(M, N, K, 16), torch.tensor([7], device="cuda")
    dy = torch.randn(M, N, device="cuda").bfloat16()
    learn = [t for t in tensors if t.requires_grad]

    def step():
        y = dora_linear(*tensors[:5], SCALING, tensors[5], dropout_p=p, seed=seed)
        return [y, *torch.autograd.grad(y, learn, dy)]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for t in (*tensors[:1], *tensors[2:5]):
            t.copy_(torch.randn_like(t))
        seed.fill_(8)
    graph.replay()
    assert all(torch.equal(got, want) for got, want in zip(captured, step(), strict=True))


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_same_bits_on_two_runs(p):
    """Would catch an atomic, or a reduction in order of arrival."""
    tensors, seed = make(4096, 1024, 2048, 16), torch.tensor([7], device="cuda")
    dy = torch.randn(4096, 1024, device="cuda").bfloat16()
    runs = [[t for t in run(tensors, dy, dropout_p=p, seed=seed) if t is not None] for _ in range(2)]
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_what_is_held_until_backward_and_the_most_at_once():
    """Would catch V or B A of [N, K], a dense copy of a 4-bit weight that lives until backward, a dropped x that is
    kept."""
    M, N, K = 2048, 4096, 4096
    x, weight, *rest = make(M, N, K, 16)
    for held in (weight, quantize_4bit(weight.detach())):
        for p in (0.0, 0.1):
            dora_linear(x, held, *rest[:3], SCALING, rest[3], dropout_p=p)
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            y = dora_linear(x, held, *rest[:3], SCALING, rest[3], dropout_p=p)
            kept = torch.cuda.memory_allocated() - before
            most = torch.cuda.max_memory_allocated() - before
            assert kept <= 2 * y.nbytes + M * 16 * 2 + (1 << 17)  # y, u, S, a few vectors
            dense = 0 if held is weight else weight.nbytes
            dropped = 3 * x.nbytes if p else 0
            assert most <= 2 * y.nbytes + dense + dropped + (1 << 21)
            del y
