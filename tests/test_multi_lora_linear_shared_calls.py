"""The launches of projections that share one x: every path against the single operation's, and how many there are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from adapter_batches import make_adapters, rows_of, wide  # noqa: E402
from numerics import arch_of, assert_rounded  # noqa: E402
from peftkern.ops import quantize_4bit  # noqa: E402
from peftkern.ops._multi_lora_linear_triton import (  # noqa: E402
    Layer,
    _stored,
    backward_calls,
    forward_calls,
    shared_backward_calls,
    shared_forward_calls,
)
from peftkern.reference import dequantize_4bit  # noqa: E402
from peftkern_kernels import replay  # noqa: E402
from peftkern_kernels.dropout import Dropout  # noqa: E402
from peftkern_kernels.launch import Call, recorded_scratch, run_all  # noqa: E402
from peftkern_kernels.projections import columns  # noqa: E402
from peftkern_kernels.routing import build_routing  # noqa: E402
from quantized_data import random_4bit  # noqa: E402
from test_multi_lora_linear_calls import alone  # noqa: E402

NEEDS = (True, True)
SIZES = (33, 48, 17, 70)  # out_features
RANKS = ((3, 0, 16, 1, 20, 8), (1, 5, 0, 8, 2, 0), (3, 0, 16, 1, 20, 8), (16, 16, 16, 16, 16, 16))
PATHS = ["triton", "cublas", "decode"]


def make(M, K, dtype, device, *, count=3, kind="mixed", masters=False, bias=True, transposed=False):
    """x, dYs, the projections, and a routing; ids on the device, some of no slot."""
    layers = []
    for N, ranks in zip(SIZES[:count], RANKS, strict=False):
        adapters = make_adapters(N, K, torch.float32 if masters else dtype, device, ranks)
        offset = torch.randn(N, device=device).to(dtype) if bias else None
        layers.append(Layer(wide(N, K, dtype, device), adapters, offset))
    if kind == "none":
        ids = torch.full((M,), -1)
    else:
        ids = torch.randint(-1, 7, (M,), generator=torch.Generator().manual_seed(M)) if M != 1 else torch.tensor([2])
    dys = [wide(M, layer.weight.shape[0], dtype, device) for layer in layers]
    return wide(M, K, dtype, device, transposed=transposed), dys, layers, build_routing(ids.to(device), 6)


def run_shared(x, dys, layers, routing, dropout, path, *, needs=None, live=None):
    arch = arch_of(x.device.type)
    ys, s, calls = shared_forward_calls(x, layers, routing, dropout, path, arch)
    run_all(calls)
    parts = list(s.split([layer.adapters.max_rank for layer in layers], 1))
    live = range(len(layers)) if live is None else live
    needs = (True, [NEEDS] * len(live)) if needs is None else needs
    chosen = [[each[i] for i in live] for each in (dys, layers, parts)]
    dx, pairs, more = shared_backward_calls(chosen[0], x, chosen[1], chosen[2], routing, dropout, path, arch, needs)
    run_all(more)
    return ys, parts, dx, pairs, (calls, more)


def run_singly(x, dys, layers, routing, dropout, path):
    arch, found = arch_of(x.device.type), []
    for dy, layer in zip(dys, layers, strict=True):
        y, s, calls = forward_calls(x, layer.weight, layer.adapters, routing, layer.bias, dropout, path, arch)
        run_all(calls)
        *gradients, calls = backward_calls(
            dy, x, layer.weight, layer.adapters, s, routing, dropout, path, arch, (True, True, True)
        )
        run_all(calls)
        found.append((y, s, *gradients))
    return found


def check_dx(dx, x, dys, layers, routing, dropout):
    """dX, the sum over the projections, against fp64: each adapter's rows as if alone."""
    for slot in range(-1, routing.slots):
        rows = rows_of(routing, slot)
        if len(rows) == 0:
            continue
        truth = size = 0.0
        for dy, layer in zip(dys, layers, strict=True):
            operands = (x, layer.weight, layer.bias, dy, layer.adapters)
            truth = truth + alone(operands, slot, rows, dropout, lambda t: t)[1]
            size = size + alone(operands, slot, rows, dropout, lambda t: t.abs())[1]
        # dS of each, and what is stored and read again before the last product is added.
        assert_rounded(dx[rows], truth, size, terms=400, rounded=2 + len(layers))


@pytest.mark.parametrize("M, K, count, dtype, dropout_p", [
    (1, 33, 3, torch.float32, 0.0), (1, 33, 3, torch.float32, 0.4), (7, 64, 4, torch.bfloat16, 0.0),
    (20, 70, 2, torch.float16, 0.4), (40, 33, 3, torch.float32, 0.4),
])  # fmt: skip
@pytest.mark.parametrize("path", PATHS)
def test_each_projection_is_as_if_alone(M, K, count, dtype, dropout_p, path, device):
    """Bugs: a program that takes another projection's pool, rank, scaling, bias or plane; S side by side in the wrong
    order; dX written where it is to be added to, or its mask laid over the base. One tile and split serve both here,
    so that forward's bits are the single operation's."""
    x, dys, layers, routing = make(M, K, dtype, device, count=count)
    dropout = Dropout(torch.tensor([1234], device=device), dropout_p) if dropout_p else None
    ys, parts, dx, pairs, _ = run_shared(x, dys, layers, routing, dropout, path)
    want = run_singly(x, dys, layers, routing, dropout, path)
    for y, s, pair, layer, (y_one, s_one, _, *grads_one) in zip(ys, parts, pairs, layers, want, strict=True):
        assert torch.equal(y, y_one) and torch.equal(s, s_one), layer.weight.shape
        assert all(torch.equal(a, b) for a, b in zip(pair, grads_one, strict=True))
    check_dx(dx, x, dys, layers, routing, dropout)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "masters, transposed, kind", [(True, False, "mixed"), (False, True, "mixed"), (False, False, "none")]
)
def test_masters_strides_and_nobody(path, masters, transposed, kind, device):
    """Bugs: fp32 pools reinterpreted, x's strides swapped, rows of -1 left unwritten in one of the outputs."""
    x, dys, layers, routing = make(
        10, 40, torch.bfloat16, device, masters=masters, transposed=transposed, kind=kind, bias=kind == "mixed"
    )
    ys, parts, dx, _, _ = run_shared(x, dys, layers, routing, None, path)
    want = run_singly(x, dys, layers, routing, None, path)
    assert all(torch.equal(y, one[0]) and torch.equal(s, one[1]) for y, s, one in zip(ys, parts, want, strict=True))
    check_dx(dx, x, dys, layers, routing, None)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("M, launches", [(1, 2), (16, 2), (17, 2), (64, 2)])
def test_launches_of_a_decode_step(M, launches, count, device):
    """Bug: more launches than the operation promises, which is what it is for: two, whatever the projections."""
    x, _, layers, routing = make(M, 40, torch.float32, device, count=count)
    ys, s, calls = shared_forward_calls(x, layers, routing, None, "decode", arch_of(device), keep_s=False)
    assert sum(isinstance(call, Call) for call in calls) == launches and s is None
    assert len(calls) == (launches if M <= 16 else launches + count)
    run_all(calls)
    for y, layer in zip(ys, layers, strict=True):
        one, _, calls = forward_calls(
            x, layer.weight, layer.adapters, routing, layer.bias, None, "decode", arch_of(device), keep_s=False
        )
        run_all(calls)
        assert torch.equal(y, one)


@pytest.mark.parametrize("path, expected", [("cublas", (1, 3, 3)), ("triton", (1, 3, 3))])
def test_launches_of_a_training_step(path, expected, device):
    """Bugs: a shrink or an expand of dX for each projection."""
    x, dys, layers, routing = make(70, 40, torch.float32, device)
    *_, (forward, backward) = run_shared(x, dys, layers, routing, None, path)
    names = [call.name for call in (*forward, *backward)]
    assert sum(call.name == "shrink of many adapters" for call in forward) == expected[0]
    assert sum(call.name == "shrink of many adapters" for call in backward) == expected[1]
    # Of dX one for all (on "triton" for all but the first, which is in its GEMM).
    assert sum(name == "expand of many adapters" for name in names) == (4 if path == "cublas" else 1)
    assert sum(name == "weight gradient of many adapters" for name in names) == expected[2]


@pytest.mark.parametrize("path, M", [("decode_4bit", 1), ("decode_4bit", 7), ("fused_4bit", 24)])
def test_over_4bit_weights(path, M, device):
    """Bugs: another projection's codes, scales or nested scales; dX's second buffer not added."""
    K, dtype = 128, torch.float16
    x, _, _, routing = make(M, K, dtype, device)
    layers, dense, dys = [], [], []
    for N, ranks in zip((64, 32, 96), RANKS, strict=False):
        stored, adapters = random_4bit(N, K, dtype=dtype, device=device), make_adapters(N, K, dtype, device, ranks)
        bias = torch.randn(N, device=device).to(dtype)
        layers.append(Layer(stored, adapters, bias))
        dense.append(Layer(dequantize_4bit(stored, dtype), adapters, bias))
        dys.append(wide(M, N, dtype, device))
    ys, parts, dx, pairs, (calls, _) = run_shared(x, dys, layers, routing, None, path)
    want = run_singly(x, dys, layers, routing, None, path)
    for y, s, pair, (y_one, s_one, _, *grads_one) in zip(ys, parts, pairs, want, strict=True):
        assert torch.equal(y, y_one) and torch.equal(s, s_one)
        assert all(torch.equal(a, b) for a, b in zip(pair, grads_one, strict=True))
    assert len(calls) == 2 or path == "fused_4bit"
    check_dx(dx, x, dys, dense, routing, None)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("live", [(0,), (2,), (1, 2)])
def test_some_outputs_and_some_gradients(live, path, device):
    """Bugs: the first projection taken for the one that writes dX though it has no dY; an operand that was not kept."""
    x, dys, layers, routing = make(20, 24, torch.float32, device, bias=False)
    _, _, dx, pairs, _ = run_shared(x, dys, layers, routing, None, path, live=live)
    check_dx(dx, x, [dys[i] for i in live], [layers[i] for i in live], routing, None)
    needs = (False, [(False, True), *[(False, False)] * (len(live) - 1)])
    _, _, none, some, _ = run_shared(x, dys, layers, routing, None, path, live=live, needs=needs)
    assert none is None and torch.equal(some[0][1], pairs[0][1])
    assert [t is None for pair in some for t in pair] == [True, False, *[True] * (2 * len(live) - 2)]


@pytest.mark.parametrize("path", PATHS)
def test_no_rows(path, device):
    """Bugs: a launch of an empty grid; gradients of nothing that are not zeros."""
    x, dys, layers, routing = make(0, 33, torch.bfloat16, device)
    ys, _, dx, pairs, _ = run_shared(x, dys, layers, routing, None, path)
    assert [y.shape for y in ys] == [(0, N) for N in SIZES[:3]] and dx.shape == (0, 33)
    assert not any(t.any() for pair in pairs for t in pair)


@pytest.mark.parametrize("M", [7, 20])
def test_what_one_launch_cannot_serve(M, device):
    """Bugs: pools of two dtypes, a bias that only some have, or weights that lie differently, read as the first's."""
    x, _, layers, routing = make(M, 40, torch.float16, device)
    arch, first = arch_of(device), layers[0]
    five = [*layers, first, first]
    no_bias = [first, Layer(layers[1].weight, layers[1].adapters)]
    masters = [first, Layer(layers[1].weight, make_adapters(48, 40, torch.float32, device, RANKS[1]), layers[1].bias)]
    for bad, message in ((five, "expected 1 to 4"), (no_bias, "bias: expected one"), (masters, "pools of one width")):
        with pytest.raises(ValueError, match=message):
            shared_forward_calls(x, bad, routing, None, "decode", arch)
    if M <= 16:
        other = [first, Layer(layers[1].weight.contiguous(), layers[1].adapters, layers[1].bias)]
        with pytest.raises(ValueError, match="weights: expected one dtype and one set of strides"):
            shared_forward_calls(x, other, routing, None, "decode", arch)


def accounted_for(calls, sources):
    """Whether each launch could be recorded: all that it takes lies in one of the sources."""
    for call in calls:
        if isinstance(call, Call):
            taken = [t for t in call.args.values() if isinstance(t, torch.Tensor) and t.numel()]
            if any(replay._source_of(t, sources) is None for t in taken):
                return False
        elif replay._library_step(call, sources, len(sources)) is None:
            return False
    return True


PATHS = [("decode", 7), ("decode", 20), ("cublas", 70), ("triton", 70), ("dequantize:cublas", 70)]


@pytest.mark.parametrize("path, M", PATHS)
def test_every_address_lies_in_a_named_tensor_or_in_scratch(path, M, device):
    """Bug: a copy made on the way to a launch, by which the whole list is built anew in every step; or a weight that is
    written out to somewhere else."""
    x, dys, layers, routing = make(M, 40, torch.float32, device)
    if path.startswith("dequantize:"):
        layers = [replace(layer, weight=quantize_4bit(layer.weight.contiguous())) for layer in layers]
    dropout = Dropout(torch.tensor([5], device=device), 0.2) if M == 70 else None
    seed, arch = None if dropout is None else dropout.seed, arch_of(device)
    _, seen, told = _stored(layers, routing)
    tensors = [*seen, *told]
    with recorded_scratch() as taken:
        ys, s, calls = shared_forward_calls(x, layers, routing, dropout, path, arch)
    assert accounted_for(calls, [x, *tensors, seed, *ys, s, *taken])
    parts = columns(s, [layer.adapters.max_rank for layer in layers])
    with recorded_scratch() as taken:
        needs = (True, [NEEDS] * 3)
        dx, pairs, calls = shared_backward_calls(dys, x, layers, parts, routing, dropout, path, arch, needs)
    made = [t for pair in pairs for t in pair]
    assert accounted_for(calls, [*dys, x, *tensors, *parts, seed, dx, *made, *taken])
    assert not accounted_for(calls, [*dys, x, *tensors, *parts, seed, dx, *made]), "the check checks"
