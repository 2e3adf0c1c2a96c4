"""Projections that share one x on a GPU: compiled kernels, recordings, CUDA graphs. `python -m pytest -m gpu`."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from peftkern.adapter_pool import LayerAdapters  # noqa: E402
from peftkern.ops import multi_lora_linear, multi_lora_linear_shared, quantize_4bit  # noqa: E402
from peftkern.ops.adapter_route import AdapterBatch  # noqa: E402

pytestmark = pytest.mark.gpu
RANKS = (16, 0, 3, 64, 8, 16)
SIZES = (1024, 256, 512)  # out_features


def pool_of(N, K, ranks, dtype):
    pool = LayerAdapters(K, N, len(ranks), 64, dtype, "cuda")
    for slot, rank in enumerate(ranks):
        if rank:
            factors = (torch.randn(*shape, device="cuda") / 8 for shape in ((rank, K), (N, rank)))
            pool.put(slot, *(torch.nn.Parameter(t.to(dtype)) for t in factors), 0.5 + slot)
    return pool


def make(M, K, dtype, masters=False, four_bit=False):
    x = torch.randn(M, K, device="cuda").to(dtype).requires_grad_()
    weights = [(torch.randn(N, K, device="cuda") / K**0.5).to(dtype) for N in SIZES]
    pools = [pool_of(N, K, RANKS[i:] + RANKS[:i], torch.float32 if masters else dtype) for i, N in enumerate(SIZES)]
    biases = [torch.randn(N, device="cuda").to(dtype) for N in SIZES]
    return x, [quantize_4bit(w) for w in weights] if four_bit else weights, pools, biases


def step(function, x, pools, dys, **options):
    for pool in pools:
        for t in (t for entry in pool.entries if entry is not None for t in entry[:2]):
            t.grad = None
    x.grad = None
    ys = function(**options)
    torch.autograd.backward(ys, dys)
    held = [t for pool in pools for entry in pool.entries if entry is not None for t in entry[:2]]
    return [*ys, x.grad, *(torch.zeros_like(t) if t.grad is None else t.grad for t in held)]


@pytest.mark.parametrize("M, p, masters, four_bit", [
    (1, 0.0, False, False), (16, 0.0, True, False), (64, 0.0, False, False), (300, 0.1, True, False),
    (4096, 0.1, False, False), (4096, 0.0, True, False), (8, 0.0, False, True), (200, 0.0, False, True),
])  # fmt: skip
def test_as_single_calls(M, p, masters, four_bit):
    """Bugs: a tile, an alignment or a pointer that the interpreter does not have; a recording that keeps an address."""
    x, weights, pools, biases = make(M, 2048, torch.bfloat16, masters, four_bit)
    ids = AdapterBatch(torch.randint(-1, 6, (M,), device="cuda").sort().values, 6)
    dys, options = [torch.randn(M, N, device="cuda").bfloat16() for N in SIZES], {"dropout_p": p}
    options["seed"] = torch.tensor([77], device="cuda")

    def together():
        return multi_lora_linear_shared(x, weights, pools, ids, biases, **options)

    def singly():
        each = zip(weights, pools, biases, strict=True)
        return tuple(multi_lora_linear(x, w, pool, ids, b, **options) for w, pool, b in each)

    want = step(singly, x, pools, dys)
    for _ in range(3):  # built, recorded, replayed
        got = step(together, x, pools, dys)
        for a, b in zip(got, want, strict=True):
            # Sums of other splits and, in dX, of another order, each rounded to bfloat16.
            size = b.float().abs().mean() + b.float().abs()
            assert ((a.float() - b.float()).abs() <= 0.04 * size).all()


@pytest.mark.parametrize("M", [8, 64])
def test_a_captured_graph_follows_ids(M):
    """Bug: a size, an id or an address read on the host while the graph was captured."""
    x, weights, pools, biases = make(M, 2048, torch.bfloat16)
    ids = torch.zeros(M, dtype=torch.int64, device="cuda")

    def run():
        with torch.no_grad():
            return multi_lora_linear_shared(x, weights, pools, ids, biases)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ys = run()
    for start in (0, 2):
        ids.copy_((torch.arange(M) + start) % 6)
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(ys, run(), strict=True))
