"""`lora_linear_shared` on a GPU: real tiles, CUDA graphs, replayed launches, memory. `python -m pytest -m gpu`."""

from __future__ import annotations

import importlib

import pytest
import torch

from numerics import assert_rounded
from peftkern import reference
from peftkern.nn import LoraLinear, share_input
from peftkern.ops import dequantize, lora_linear_shared, quantize_4bit
from peftkern.ops.plan import Plan
from peftkern_kernels import replay

pytestmark = pytest.mark.gpu
SHARED = importlib.import_module("peftkern.ops.lora_linear_shared")
QKV, GATE_UP = (2048, 512, 512), (3072, 3072)
SCALINGS = (2.0, 2.0, 2.0, 2.0)


def make(M, K, outs, R, adapter_dtype=torch.bfloat16, quantized=False):
    """(x, weights, As, Bs, dys), bfloat16 but for the adapters; x, As and Bs learn."""
    x = torch.randn(M, K, device="cuda").bfloat16().requires_grad_()
    weights = [(torch.randn(N, K, device="cuda") / K**0.5).bfloat16() for N in outs]
    As = [(torch.randn(R, K, device="cuda") / K**0.5).to(adapter_dtype).requires_grad_() for _ in outs]
    Bs = [torch.randn(N, R, device="cuda").to(adapter_dtype).requires_grad_() for N in outs]
    dys = [torch.randn(M, N, device="cuda").bfloat16() for N in outs]
    if quantized:
        weights = [quantize_4bit(w, "nf4", 64, True) for w in weights]
    return x, weights, As, Bs, dys


def run(x, weights, As, Bs, dys, **options):
    ys = lora_linear_shared(x, weights, As, Bs, SCALINGS[: len(weights)], **options)
    return [*ys, *torch.autograd.grad(ys, [x, *As, *Bs], dys)]


def assert_matches_fp64(x, weights, As, Bs, dys, p):
    """Outputs and gradients within their bounds."""
    seed = torch.tensor([99], device="cuda")
    got = run(x, weights, As, Bs, dys, dropout_p=p, seed=seed)
    (M, K), outs = x.shape, [dy.shape[1] for dy in dys]
    keep = reference.dropout_mask(seed, M, K, p) if p else None
    results = []
    for transform in (lambda t: t.detach().double(), lambda t: t.detach().double().abs()):
        wide = [transform(t).requires_grad_() for t in (x, *As, *Bs)]
        n = len(outs)
        dense = [transform(dequantize(w, torch.bfloat16)) for w in weights]
        each = zip(dense, wide[1 : 1 + n], wide[1 + n :], strict=True)
        ys = [reference.lora_linear(wide[0], w, a, b, 2.0, None, keep, p) for w, a, b in each]
        results.append([*(y.detach() for y in ys), *torch.autograd.grad(ys, wide, [transform(dy) for dy in dys])])
    eps = torch.finfo(torch.bfloat16).eps
    for i, (out, truth, magnitude) in enumerate(zip(got, *results, strict=True)):
        # S or dS, masters, the expand on cuBLAS; of dX each projection's sum besides.
        rounded = 4 + (n if i == n else 0)
        factor = eps / torch.finfo(out.dtype).eps
        assert_rounded(out.detach(), truth, magnitude, terms=M + sum(outs) + K, rounded=rounded * factor)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("path", ["triton", "cublas", "nf4"])
@pytest.mark.parametrize("outs, R", [(QKV, 16), (QKV, 64), (GATE_UP, 16), ((1000, 130), 12)])
@pytest.mark.parametrize("M", [2048, 200])
def test_real_tiles_match_fp64(M, outs, R, path, adapter_dtype, p, monkeypatch):
    """Would catch a compiled tile that reads S beside other projections' wrongly, or dX that is added to too early."""
    if path != "nf4":
        monkeypatch.setattr(SHARED, "plan_for_dense", lambda *_: Plan(path, "forced by a test"))
    x, weights, As, Bs, dys = make(M, 1024, outs, R, adapter_dtype, path == "nf4")
    assert_matches_fp64(x, weights, As, Bs, dys, p)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("outs, R", [(QKV, 16), (QKV, 64), (GATE_UP, 16), ((1000, 130), 12), ((512, 512, 256, 1), 3)])
@pytest.mark.parametrize("M", [1, 3, 16])
def test_few_tokens_match_fp64(M, outs, R, quantized, adapter_dtype, p):
    """Would catch a compiled program of the decode launches that takes another projection's pointers or sizes."""
    x, weights, As, Bs, dys = make(M, 1024, outs, R, adapter_dtype, quantized)
    plan = SHARED.shared_plan_for(x, weights, As, Bs, [None] * len(outs), "auto")
    assert plan.path == ("decode_4bit" if quantized else "decode")
    assert_matches_fp64(x, weights, As, Bs, dys, p)


@pytest.mark.parametrize("M", [1, 16, 1024])
def test_same_bits_and_replays(M):
    """Would catch an atomic, a replay with a stale address, or launches that are never kept."""
    for quantized in (False, True):
        seed = torch.tensor([7], device="cuda")
        operands = make(M, 1024, QKV, 16, torch.float32, quantized)
        first = run(*operands, dropout_p=0.1, seed=seed)
        kept = len(replay._kept)
        again = run(*operands, dropout_p=0.1, seed=seed)
        assert len(replay._kept) == kept > 0
        other = make(M, 1024, QKV, 16, torch.float32, quantized)
        run(*other, dropout_p=0.1, seed=seed)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def tied_layers():
    layers = [LoraLinear(1024, N, r=16, lora_alpha=32, device="cuda", dtype=torch.bfloat16) for N in QKV]
    for layer in layers:
        torch.nn.init.normal_(layer.lora_B["default"].weight)
    share_input(*layers)
    return layers


def test_tied_layers_on_streams_of_their_own():
    """Would catch an output that is read on a stream which does not wait for the one that it is computed on."""
    layers, x = tied_layers(), torch.randn(512, 1024, device="cuda").bfloat16()
    streams = [torch.cuda.Stream() for _ in range(2)]
    with torch.no_grad():
        want = layers[1](x)
        torch.cuda.synchronize()
        with torch.cuda.stream(streams[0]):
            torch.cuda._sleep(10**8)  # some 50 ms
            layers[0](x)
        with torch.cuda.stream(streams[1]):
            got = layers[1](x).clone()
        torch.cuda.synchronize()
    assert torch.equal(got, want)


@pytest.mark.parametrize("tokens", [512, 3])
def test_cuda_graph_of_tied_layers(tokens):
    """Would catch a host synchronisation, an allocation that capture forbids, or outputs left from before capture."""
    layers = tied_layers()
    x = torch.randn(tokens, 1024, device="cuda").bfloat16().requires_grad_()
    wanted = [x, *(layer.lora_A["default"].weight for layer in layers)]

    def step():
        ys = [layer(x) for layer in layers]
        return [*ys, *torch.autograd.grad(sum(y.float().square().sum() for y in ys), wanted)]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


def test_one_dequantized_weight_at_a_time():
    """Would catch dense copies of all projections' weights at the same time."""
    x, weights, As, Bs, dys = make(2048, 4096, (14336, 14336), 16, quantized=True)
    run(x, weights, As, Bs, dys)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = run(x, weights, As, Bs, dys)
    peak = torch.cuda.max_memory_allocated() - before
    dense = 14336 * 4096 * 2
    assert peak <= sum(t.numel() * t.element_size() for t in results) + dense + (1 << 26)
