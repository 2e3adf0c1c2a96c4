"""Many adapters on a GPU: real tiles, every path, tensor descriptors, CUDA graphs. `python -m pytest -m gpu`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from adapter_batches import factors, make_adapters, rows_of  # noqa: E402
from numerics import arch_of, assert_rounded  # noqa: E402
from peftkern import reference  # noqa: E402
from peftkern.ops._multi_lora_linear_triton import backward_calls, forward_calls, multi_calls  # noqa: E402
from peftkern.ops._route_triton import route  # noqa: E402
from peftkern_kernels.dropout import Dropout  # noqa: E402
from peftkern_kernels.launch import run_all  # noqa: E402
from peftkern_kernels.multi_tables import multi_decode_tile  # noqa: E402
from peftkern_kernels.routing import build_routing, slot_seed  # noqa: E402

pytestmark = pytest.mark.gpu
RANKS = (3, 0, 16, 1, 64, 8, 16, 32)


def layer_of(M, N, K, dtype, masters=False):
    adapters = make_adapters(N, K, torch.float32 if masters else dtype, "cuda", RANKS)
    x, dy = torch.randn(M, K, device="cuda").to(dtype), torch.randn(M, N, device="cuda").to(dtype)
    weight = (torch.randn(N, K, device="cuda") / K**0.5).to(dtype)
    return x, weight, dy, adapters


def check(layer, routing, dropout, y, dx, da, db):
    """Every slot's rows against fp64, as if they were alone."""
    x, weight, dy, adapters = layer
    M, (N, K), dtype = x.shape[0], weight.shape, x.dtype
    eps = torch.finfo(dtype).eps
    for slot in range(-1, adapters.slots):
        rows = rows_of(routing, slot)
        if len(rows) == 0:
            continue
        rank = int(adapters.rank[slot]) if slot >= 0 else 0
        results = []
        for transform in (lambda t: t, lambda t: t.abs()):
            x64, w64, dy64 = (transform(t.double()) for t in (x[rows], weight, dy[rows]))
            if rank == 0:
                results.append([x64 @ w64.T, dy64 @ w64])
                continue
            x64.requires_grad_()
            a, b = (transform(t).requires_grad_() for t in factors(adapters, slot, dtype))
            keep = None
            if dropout is not None:
                keep = reference.dropout_mask(slot_seed(dropout.seed, slot), len(rows), K, dropout.p)
            p = 0.0 if dropout is None else dropout.p
            truth = reference.lora_linear(x64, w64, a, b, float(adapters.scaling[slot]), None, keep, p)
            truth.backward(dy64)
            results.append([truth.detach(), x64.grad, a.grad, b.grad])
        got = [y[rows], dx[rows]]
        if rank:
            offset = int(adapters.row_offset[slot])
            got += [da[offset : offset + rank], db[offset * N : (offset + rank) * N].view(N, rank)]
        for out, truth, magnitude in zip(got, *results, strict=True):
            rounded = 3 * eps / torch.finfo(out.dtype).eps
            assert_rounded(out, truth, magnitude, terms=M + N + K + 64, rounded=rounded)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("path", ["triton", "cublas"])
@pytest.mark.parametrize("M, N, K", [(4096, 2048, 1024), (1500, 1000, 4095), (300, 512, 2048)])
def test_training_in_bfloat16(M, N, K, path, masters, p):
    """Bugs: a tile, a descriptor or an alignment that the interpreter does not have."""
    layer = layer_of(M, N, K, torch.bfloat16, masters)
    x, weight, dy, adapters = layer
    routing = route(torch.randint(-1, len(RANKS), (M,), device="cuda").sort().values.roll(M // 3), len(RANKS))
    dropout = Dropout(torch.tensor([99], device="cuda"), p) if p else None
    arch = arch_of("cuda")
    y, s, calls = forward_calls(x, weight, adapters, routing, None, dropout, path, arch)
    run_all(calls)
    *gradients, calls = backward_calls(dy, x, weight, adapters, s, routing, dropout, path, arch, (True, True, True))
    run_all(calls)
    check(layer, routing, dropout, y, *gradients)


@pytest.mark.parametrize("ranks", [(16,), (8, 12, 64, 16, 32)])
@pytest.mark.parametrize("overlap, early", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("M", [1, 16, 64])
def test_decoding(M, overlap, early, ranks):
    """Bugs: planes read before they are written where launches overlap; a base of before the last pair, loaded early;
    a tile that the interpreter does not have."""
    arch = arch_of("cuda")
    if overlap and arch < 90:
        pytest.skip("launches overlap from sm_90 on")
    adapters = make_adapters(4096, 2048, torch.bfloat16, "cuda", (ranks * 64)[:64])
    x, before = torch.randn(M, 2048, device="cuda").bfloat16(), torch.randn(M, 4096, device="cuda").bfloat16()
    routing = route(torch.randperm(64, device="cuda")[:M], 64)
    tile = multi_decode_tile(arch=arch, dtype=x.dtype, M=M, N=4096, K=2048, R=max(ranks), aligned=True)
    tile = replace(tile, overlap=overlap, early_base=early)
    for _ in range(50):
        y = before.clone()
        run_all(multi_calls(x, adapters, routing, y, arch=arch, tile=tile))
    twice = before.clone()
    calls = multi_calls(x, adapters, routing, twice, arch=arch, tile=tile)
    run_all([*calls, *calls])  # the second pair adds to what the first has left, in the same planes
    for m, slot in enumerate(routing.ids.tolist()):
        a, b = factors(adapters, slot, x.dtype)
        scale, x64 = float(adapters.scaling[slot]), x[m : m + 1].double()
        truth = before[m : m + 1].double() + scale * x64 @ a.T @ b.T
        magnitude = before[m : m + 1].double().abs() + scale * x64.abs() @ a.abs().T @ b.abs().T
        assert_rounded(y[m : m + 1], truth, magnitude, terms=2100, rounded=1)
        again = y[m : m + 1].double() + truth - before[m : m + 1].double()
        assert_rounded(twice[m : m + 1], again, 2 * magnitude, terms=2100, rounded=1)


@pytest.mark.parametrize("path, M", [("decode", 16), ("decode", 64), ("cublas", 200)])
def test_a_captured_graph_follows_ids_and_adapters(path, M):
    """Bugs: a size, an id or a rank read on the host while the graph was captured."""
    layer = layer_of(M, 512, 1024, torch.float16)
    x, weight, _, adapters = layer
    ids, arch = torch.zeros(M, dtype=torch.int64, device="cuda"), arch_of("cuda")

    def step():
        routing = route(ids, len(RANKS))
        y, _, calls = forward_calls(x, weight, adapters, routing, None, None, path, arch)
        run_all(calls)
        return y

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        ids.copy_(torch.randint(-1, len(RANKS), (M,)))
        adapters.scaling.add_(0.125)
        adapters.rank[2] = 8  # another adapter in slot 2's rows, of another rank
        graph.replay()
        assert torch.equal(captured, step())


@pytest.mark.parametrize("M, slots", [(1, 1), (64, 64), (1024, 1024), (4096, 8), (65536, 1024)])
def test_routing(M, slots):
    """Bugs: a compiled histogram or scan that differs from PyTorch's sort."""
    ids = torch.randint(-2, slots + 2, (M,), device="cuda")
    for a, b in zip(route(ids, slots).tensors, build_routing(ids.cpu(), slots).tensors, strict=True):
        assert torch.equal(a.cpu(), b)
