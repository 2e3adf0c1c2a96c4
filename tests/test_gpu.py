"""What only a GPU can show: real sizes and tiles, CUDA graphs, memory. `python -m pytest -m gpu`."""

from __future__ import annotations

import importlib

import pytest
import torch

from numerics import assert_rounded
from peftkern import reference, use_backend
from peftkern.backend import device_info
from peftkern.ops import lora_embedding, lora_linear
from peftkern.ops._lora_linear_torch import _hashed_words, keep_mask
from peftkern.ops.plan import Plan
from peftkern_kernels import replay

pytestmark = pytest.mark.gpu
MODULE = importlib.import_module("peftkern.ops.lora_linear")
SCALING = 2.0


def make(M, N, K, R, dtype, adapter_dtype):
    x = torch.randn(M, K, device="cuda").to(dtype)
    weight = (torch.randn(N, K, device="cuda") / K**0.5).to(dtype)
    a = (torch.randn(R, K, device="cuda") / K**0.5).to(adapter_dtype)
    b = torch.randn(N, R, device="cuda").to(adapter_dtype)
    bias = torch.randn(N, device="cuda").to(dtype)
    return [t.requires_grad_(i != 1) for i, t in enumerate((x, weight, a, b, bias))]


def check(tensors, dtype, p, path):
    """y and all gradients against fp64 on the same device."""
    M, K = tensors[0].shape
    N, R = tensors[3].shape
    dy = torch.randn(M, N, device="cuda").to(dtype)
    seed = torch.tensor([99], device="cuda")
    y = lora_linear(*tensors[:4], SCALING, tensors[4], dropout_p=p, seed=seed)
    y.backward(dy)
    draw = keep_mask if path == "torch" else reference.dropout_mask
    keep = draw(seed, M, K, p) if p else None
    results = []
    for transform in (lambda t: t.detach().double(), lambda t: t.detach().double().abs()):
        wide = [transform(t).requires_grad_(i != 1) for i, t in enumerate(tensors)]
        truth = reference.lora_linear(*wide[:4], SCALING, wide[4], keep, p)
        truth.backward(transform(dy))
        results.append([truth.detach(), *(wide[i].grad for i in (0, 2, 3, 4))])
    eps = torch.finfo(dtype).eps
    outputs = [y.detach(), *(tensors[i].grad for i in (0, 2, 3, 4))]
    # S (dS) and masters are rounded to the dtype; on cuBLAS the expand is too.
    rounded = (3 + (path in ("cublas", "torch")), 3 + (path in ("cublas", "torch")), 3, 3, 1)
    for out, truth, magnitude, count in zip(outputs, *results, rounded, strict=True):
        factor = eps / torch.finfo(out.dtype).eps
        assert_rounded(out, truth, magnitude, terms=M + N + K + R, rounded=count * factor)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("path", ["triton", "cublas"])
@pytest.mark.parametrize(
    "M, N, K, R",  # the last three are persistent on Hopper, S with gaps between its rows
    [
        (4096, 2048, 2048, 16),
        (2048, 4096, 1024, 64),
        (512, 1024, 4096, 128),
        (130, 1000, 4095, 12),
        (64, 256, 512, 8),
        (4096, 2048, 2048, 4),
        (4096, 2048, 2048, 1),
        (2048, 4096, 2048, 20),
    ],
)
def test_real_tiles_match_fp64(M, N, K, R, path, masters, p, monkeypatch):
    """Would catch what the interpreter cannot: a compiled tile that is wrong, TMA coordinates, a race."""
    monkeypatch.setattr(MODULE, "plan_for", lambda *_: Plan(path, "forced by a test"))
    check(make(M, N, K, R, torch.bfloat16, torch.float32 if masters else torch.bfloat16), torch.bfloat16, p, path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("M", [1, 3, 16, 17, 300])
def test_planned_path_matches_fp64(M, dtype):
    """Would catch a plan that sends a size to a path that is wrong there; M 1 to 16 decodes."""
    tensors = make(M, 1024, 2048, 16, dtype, dtype)
    check(tensors, dtype, 0.0, MODULE.plan_for(tensors[0], tensors[1], 16, "auto").path)


@pytest.mark.parametrize("p", [0.005, 0.1])
def test_plain_path_with_dropout_waits_for_nothing(p):
    """Would catch a mask whose seed is read on the host, or that is another one than a CPU would work out."""
    tensors = make(300, 256, 512, 16, torch.bfloat16, torch.float32)
    torch.cuda.set_sync_debug_mode("error")
    try:
        mask = keep_mask(torch.full((1,), 99, device="cuda"), 300, 512, p)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    bits, lane = (16, torch.int16) if p > 0.01 else (32, torch.int32)
    words = _hashed_words(torch.tensor([99]), 300 * 512 * bits // 64)
    assert torch.equal(mask.cpu().flatten(), words.view(lane) >= round(p * 2**bits) - 2 ** (bits - 1))
    with use_backend("torch"):
        check(tensors, torch.bfloat16, p, "torch")


@pytest.mark.parametrize("M", [8, 512])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_cuda_graph_replays_with_new_inputs_and_a_new_mask(M, p):
    """Would catch a host synchronisation, an allocation that capture forbids, and a mask frozen into the graph."""
    tensors = make(M, 512, 1024, 16, torch.bfloat16, torch.float32)
    seed = torch.tensor([1], device="cuda")
    dy = torch.randn(M, 512, device="cuda").bfloat16()
    inputs = [tensors[i] for i in (0, 2, 3)]

    def step():
        y = lora_linear(*tensors[:4], SCALING, tensors[4], dropout_p=p, seed=seed)
        return y, *torch.autograd.grad(y, inputs, dy)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        tensors[0].copy_(torch.randn_like(tensors[0]))
        seed.fill_(2)
    graph.replay()
    for got, want in zip(captured, step(), strict=True):
        assert torch.equal(got, want)


def test_same_bits_on_two_runs():
    """Would catch an atomic, or a reduction in order of arrival."""
    tensors = make(4096, 2048, 2048, 16, torch.bfloat16, torch.float32)
    dy = torch.randn(4096, 2048, device="cuda").bfloat16()
    runs = []
    for _ in range(2):
        y = lora_linear(*tensors[:4], SCALING, tensors[4], dropout_p=0.1, seed=torch.tensor([7], device="cuda"))
        runs.append([y, *torch.autograd.grad(y, [tensors[i] for i in (0, 2, 3, 4)], dy)])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_backward_keeps_no_copy_of_x():
    """Would catch a widened or dropped copy of x: what a call holds until backward is y and S."""
    x, weight, a, b, bias = make(4096, 1024, 4096, 16, torch.bfloat16, torch.float32)
    lora_linear(x, weight, a, b, SCALING, bias, dropout_p=0.1)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = lora_linear(x, weight, a, b, SCALING, bias, dropout_p=0.1)
    held = torch.cuda.memory_allocated() - before
    assert held <= y.numel() * 2 + 4096 * 16 * 2 + (1 << 16)


@pytest.mark.parametrize("path", ["triton", "cublas", "decode"])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_replayed_launches_give_the_bits_of_new_ones(path, p, monkeypatch):
    """Would catch a replay with a stale address, scratch that is too small, or another stream's."""
    monkeypatch.setattr(MODULE, "plan_for", lambda *_: Plan(path, "forced by a test"))
    M = 16 if path == "decode" else 512
    seed = torch.tensor([5], device="cuda")
    for K in (1024, 1032):
        for _ in range(3):
            tensors = make(M, 768, K, 16, torch.bfloat16, torch.float32)
            dy = torch.randn(M, 768, device="cuda").bfloat16()
            wanted = [tensors[i] for i in (0, 2, 3)]

            def step(tensors=tensors, wanted=wanted, dy=dy):
                y = lora_linear(*tensors[:4], SCALING, tensors[4], dropout_p=p, seed=seed)
                return y.detach(), *torch.autograd.grad(y, wanted, dy)

            replayed = step()
            with monkeypatch.context() as m:
                m.setattr(replay, "_kept", {})
                anew = step()
            assert all(torch.equal(a, b) for a, b in zip(replayed, anew, strict=True))


def test_a_step_is_replayed():
    """Would catch launches that are never kept, so that every step pays for building them."""
    tensors = make(512, 768, 1024, 16, torch.bfloat16, torch.bfloat16)
    for _ in range(2):
        before = len(replay._kept)
        lora_linear(*tensors[:4], SCALING).backward(torch.ones(512, 768, device="cuda").bfloat16())
        kept = len(replay._kept) - before
    assert kept == 0 and len(replay._kept) >= 2


def test_embedding_matches_fp64():
    """Would catch a scatter that loses a repeated id under real concurrency."""
    V, E, R = 5000, 1024, 16
    weight, a, b = (torch.randn(s, device="cuda").bfloat16() for s in ((V, E), (R, V), (E, R)))
    a, b = a.float().requires_grad_(), b.float().requires_grad_()
    ids = torch.randint(0, 300, (8, 512), device="cuda")
    dy = torch.randn(8, 512, E, device="cuda").bfloat16()
    y = lora_embedding(ids, weight, a, b, SCALING)
    y.backward(dy)
    ad, bd = (t.detach().double().requires_grad_() for t in (a, b))
    truth = reference.lora_embedding(ids, weight.double(), ad, bd, SCALING)
    truth.backward(dy.double())
    eps = torch.finfo(torch.bfloat16).eps
    for got, want in ((y.detach(), truth.detach()), (a.grad, ad.grad), (b.grad, bd.grad)):
        assert (got.double() - want).norm() <= 2 * eps * want.norm()


def test_this_device_takes_kernels():
    """Would catch a GPU run that silently measures plain PyTorch."""
    assert device_info(torch.device("cuda", 0)).triton == ""
