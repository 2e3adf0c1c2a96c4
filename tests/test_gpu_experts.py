"""Stacks of experts on a GPU: real tiles, tensor descriptors, CUDA graphs, memory. `python -m pytest -m gpu`."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import grouped_mm

pytest.importorskip("triton")

from grouped_data import offsets_of, peft_b  # noqa: E402
from numerics import assert_rounded  # noqa: E402
from peftkern import reference, use_backend  # noqa: E402
from peftkern.ops import grouped_linear, grouped_lora_linear  # noqa: E402

pytestmark = pytest.mark.gpu
SCALING = 2.0


def counts_of(T, E, rest=0):
    """Rows of each expert, every seventh without any, uneven, T - rest together."""
    shares = torch.rand(E, generator=torch.Generator().manual_seed(E)) ** 2
    shares[::7] = 0
    counts = (shares / shares.sum() * (T - rest)).floor().long()
    counts[1] += T - rest - counts.sum()
    return counts.tolist()


def make(T, E, N, K, R, dtype=torch.bfloat16, *, masters=True, transposed=False, rest=0):
    own = torch.float32 if masters else dtype
    x = torch.randn(T, K, device="cuda").to(dtype)
    weight = torch.randn(E, *((K, N) if transposed else (N, K)), device="cuda").div_(K**0.5).to(dtype)
    a = (torch.randn(E, R, K, device="cuda") / K**0.5).to(own)
    bias = torch.randn(E, N, device="cuda").to(dtype)
    learning = [t.requires_grad_() for t in (x, a, peft_b(E, N, R, own, "cuda"))]
    weight = weight.transpose(1, 2) if transposed else weight
    return learning[0], weight, *learning[1:], bias, offsets_of(counts_of(T, E, rest), "cuda")


def step(x, weight, a, b, bias, offsets, dy):
    y = grouped_lora_linear(x, weight, a, b, SCALING, offsets, bias)
    return [y.detach(), *torch.autograd.grad(y, (x, a, b), dy)]


def check(operands, dy, results, rounded=3):
    """Every expert's rows against fp64, as if they were alone; `rounded`: S or dS, A, B, and more on the plain path."""
    x, weight, a, b, bias, offsets = operands
    eps, start = torch.finfo(x.dtype).eps, 0
    (_, N, K), R = weight.shape, a.shape[1]
    for e, stop in enumerate(offsets.tolist()):
        both = []
        for transform in (lambda t: t.detach().double(), lambda t: t.detach().double().abs()):
            wide = [transform(t).requires_grad_() for t in (x[start:stop], a[e], b[e])]
            held, one = transform(weight[e])[None], transform(bias[e])[None]
            ends = torch.tensor([stop - start])
            y = reference.grouped_lora_linear(wide[0], held, wide[1][None], wide[2][None], SCALING, ends, one)
            both.append([y.detach(), *torch.autograd.grad(y, wide, transform(dy[start:stop]))])
        got = [results[0][start:stop], results[1][start:stop], results[2][e], results[3][e]]
        for out, truth, magnitude in zip(got, *both, strict=True):
            if out.numel():
                wider = rounded * eps / torch.finfo(out.dtype).eps
                assert_rounded(out, truth, magnitude, terms=N + K + R + stop - start + 64, rounded=wider)
        start = stop
    assert (results[0][start:] == 0).all() and (results[1][start:] == 0).all()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize(
    "T, E, N, K, R",
    [
        (8192, 16, 1536, 2048, 16),
        (2048, 128, 768, 512, 8),
        (100, 64, 512, 1024, 64),
        (5000, 8, 1000, 4104, 16),
        (700, 5, 1001, 515, 3),
        (3, 9, 64, 96, 128),
    ],
)
def test_real_tiles_match_fp64(T, E, N, K, R, masters, transposed):
    """Would catch what the interpreter cannot: a compiled tile that is wrong, coordinates of a descriptor of three
    axes, a neighbour's rows overwritten by another program."""
    operands = make(T, E, N, K, R, masters=masters, transposed=transposed, rest=min(T // 3, 37))
    dy = torch.randn(T, N, device="cuda").bfloat16()
    check(operands, dy, step(*operands, dy))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes(dtype):
    """Would catch a tile of another dtype that is wrong, on the kernels and on what fp32 takes by itself."""
    operands = make(900, 6, 256, 320, 16, dtype)
    dy = torch.randn(900, 256, device="cuda").to(dtype)
    for backend, rounded in (("auto", 3), ("triton", 3), ("torch", 6)):  # the last: the base, S before its scaling
        with use_backend(backend):
            check(operands, dy, step(*operands, dy), rounded)


def test_the_path_without_kernels_matches_fp64():
    """Would catch torch's grouped_mm given another layout than it takes, or rows of no expert that it leaves unset."""
    operands = make(2048, 16, 512, 768, 16, rest=40)
    dy = torch.randn(2048, 512, device="cuda").bfloat16()
    with use_backend("torch"):
        got = step(*operands, dy)
    check(operands, dy, got, 6)
    assert (got[0][-40:] == 0).all() and (got[1][-40:] == 0).all()


def test_experts_without_adapters_are_those_of_torch():
    """Would catch a base product that is another than the one that models run."""
    x, weight, *_, offsets = make(4096, 16, 1536, 2048, 1)
    y = grouped_linear(x, weight, offsets)
    theirs = grouped_mm(x, weight.transpose(1, 2), offs=offsets)
    torch.testing.assert_close(y, theirs, rtol=0.02, atol=0.02)


def test_cuda_graph_replays_with_other_rows():
    """Would catch a count that is read on the host, or an allocation that capture forbids."""
    operands = make(2048, 16, 512, 768, 16)
    dy = torch.randn(2048, 512, device="cuda").bfloat16()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(*operands, dy)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*operands, dy)
    for seed in range(2):
        ends = torch.randint(0, 2049, (16,), generator=torch.Generator().manual_seed(seed)).sort().values
        with torch.no_grad():
            operands[-1].copy_(ends)
            operands[0].copy_(torch.randn_like(operands[0]))
        graph.replay()
        for got, want in zip(captured, step(*operands, dy), strict=True):
            assert torch.equal(got, want)


def test_same_bits_on_two_runs():
    """Would catch an atomic, or a reduction in order of arrival."""
    operands = make(8192, 16, 1536, 2048, 16)
    dy = torch.randn(8192, 1536, device="cuda").bfloat16()
    assert all(torch.equal(*pair) for pair in zip(step(*operands, dy), step(*operands, dy), strict=True))


def test_what_is_held_until_backward_and_no_wait():
    """Would catch W + B A written out, a copy of x, or the host waiting for the device."""
    x, weight, a, b, bias, offsets = make(4096, 16, 1536, 2048, 16)
    dy = torch.randn(4096, 1536, device="cuda").bfloat16()
    step(x, weight, a, b, bias, offsets, dy)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = grouped_lora_linear(x, weight, a, b, SCALING, offsets, bias)
    assert torch.cuda.memory_allocated() - before <= y.nbytes + 4096 * 16 * 2 + (1 << 16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(x, weight, a, b, bias, offsets, dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")
