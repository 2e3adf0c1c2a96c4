"""Launch lists of layers, single and with others of the same x, over dense and 4-bit weights: each can be recorded, and
has one dense weight at most."""

from __future__ import annotations

import pytest
import torch

from peftkern.ops import _dense_blocks, _lora_linear_torch, quantize_4bit, quantize_8bit
from peftkern.ops._projection_group import Group
from peftkern.ops._rank_rows import columns_of_s, new_s

pytest.importorskip("triton")
from peftkern.ops import _lora_linear_shared_triton as shared
from peftkern.ops import _lora_linear_triton as single
from peftkern.ops._weight_calls import stored
from peftkern_kernels import replay
from peftkern_kernels.dropout import Dropout
from peftkern_kernels.launch import Call, recorded_scratch

M, K, OUTS, SCALING = 300, 64, (96, 32, 48), 0.75
PATHS = ["triton", "cublas", "fused_4bit", "dequantize:triton", "dequantize:cublas"]
BESIDE = ["triton,cublas,cublas", "dequantize:cublas,dequantize:triton,dequantize:triton"]
HALF = torch.bfloat16


class Compiled:
    """A compiled kernel, as far as a recording asks."""

    def __init__(self, call):
        self.call = call


@pytest.fixture(autouse=True)
def nothing_is_launched(monkeypatch):
    monkeypatch.setattr(Call, "run", lambda call: Compiled(call))


def weight_for(path, N):
    weight = torch.randn(N, K, dtype=HALF)
    return quantize_4bit(weight, "nf4", 64, True) if "4bit" in path or path.startswith("dequantize:") else weight


def dense_places(calls):
    """Where the calls that write a weight out put it, one after the other."""
    writes = [call.args for call in calls if call.name in ("dequantize", "cast W")]
    return [(args["out_ptr"] if isinstance(args, dict) else written(*args)).data_ptr() for args in writes]


def written(*args):
    """The result among a library call's arguments."""
    return args[-1] if len(args) == 3 else args[0]  # of dequantize_8bit, of copy_


def held_by(*weights):
    """The tensors of weights."""
    _, seen, told = stored(*weights)
    return [*seen, *told]


def check(build, tensors):
    """The list can be recorded, with `tensors`, its results and scratch, and has one place for dense weights."""
    with recorded_scratch() as taken:
        results, calls = build()
    assert replay.record(calls, [*tensors, *results], taken) is not None
    places = dense_places(calls)
    return len(set(places)), len(places)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("R", [4, 16])
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("path", PATHS)
def test_a_layer(path, p, R, arch):
    """Would catch an address that a recording cannot account for, by which each call would be built anew, in Python."""
    weight, N = weight_for(path, OUTS[0]), OUTS[0]
    A, B, bias = torch.randn(R, K), torch.randn(N, R), torch.randn(N, dtype=HALF)
    x, dy = torch.randn(M, K, dtype=HALF), torch.randn(M, N, dtype=HALF)
    drop = Dropout(torch.tensor([3]), p) if p else None
    seed = None if drop is None else drop.seed
    s = new_s(x, M, R, path, arch)
    held = held_by(weight)
    is_written = path.startswith("dequantize:")

    def forward():
        *results, calls = single.forward_calls(x, weight, A, B, SCALING, bias, drop, path, arch)
        return results, calls

    def begun():
        *results, calls = single.begun_calls(x, weight, A, B, SCALING, bias, drop, path, arch)
        return results, calls

    assert check(forward, [x, *held, A, B, bias, seed]) == (is_written, is_written)
    if "decode" not in path:
        assert check(begun, [x, *held, A, B, bias, seed]) == (0, 0)
    for needs in ((True, True, True), (True, False, False), (False, True, True)):

        def backward(needs=needs):
            *results, calls = single.backward_calls(dy, x, weight, A, B, s, SCALING, drop, path, arch, needs)
            return results, calls

        writes = is_written and needs[0]
        assert check(backward, [dy, x, *held, A, B, s, seed]) == (writes, writes)


FORMATS = {
    "int8": quantize_8bit,
    "nf4": lambda w: quantize_4bit(w, "nf4", 64, double_quant=False),
    "float32": torch.Tensor.float,
    "float32, transposed": lambda w: w.float().t().contiguous().t(),
}


@pytest.mark.parametrize("path", ["triton", "cublas"])
@pytest.mark.parametrize(
    "kind, blocks", [("int8", 1), ("int8", 3), ("nf4", 3), ("float32", 1), ("float32, transposed", 1)]
)
def test_weights_that_are_written_out_in_another_way(kind, blocks, path, monkeypatch):
    """Would catch a copy of a weight that lies in nobody's memory, blocks that are not in one place, and rows of a bias
    that two projections have in common."""
    N, R = 96, 16
    monkeypatch.setattr(_dense_blocks, "BUFFER_BYTES", N * K * 2 // blocks)
    monkeypatch.setattr(_lora_linear_torch, "_reads_past_rows", lambda: False)  # as on a GPU: a CPU with AMX copies dY
    weights = tuple(FORMATS[kind](torch.randn(N, K, dtype=HALF)) for _ in range(2))
    path = path if isinstance(weights[0], torch.Tensor) else f"dequantize:{path}"
    As, Bs = [torch.randn(R, K) for _ in range(2)], [torch.randn(N, R) for _ in range(2)]
    x, dys, held = (
        torch.randn(M, K, dtype=HALF),
        [torch.randn(M, N, dtype=HALF) for _ in range(2)],
        held_by(*weights),
    )
    group = Group(weights, (SCALING,) * 2, columns_of_s((R, R), HALF, path, 90), 0.0, path)
    s, biases = new_s(x, M, 2 * R, path, 90), [torch.randn(N).to(HALF)] * 2

    def forward():
        ys, s, calls = shared.forward_calls(x, group, As, Bs, biases, None, 90)
        return [*ys, s], calls

    def backward():
        (dx, da, dbs), calls = shared.backward_calls(dys, x, group, As, Bs, s, None, 90, (True, True, [True] * 2))
        return [dx, da, *dbs], calls

    assert check(forward, [x, *held, *As, *Bs, *biases]) == (1, 2 * blocks)
    assert check(backward, [*dys, x, *held, *As, *Bs, s]) == (1, 2 * blocks)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("ranks", [(16, 16, 16), (4, 12, 3)])
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("path", [*PATHS, *BESIDE])
def test_layers_of_one_x(path, p, ranks, arch):
    """Would catch the same, and a dense weight for each projection in a recording's scratch memory."""
    weights = tuple(weight_for(path, N) for N in OUTS)
    As = [torch.randn(R, K) for R in ranks]
    Bs = [torch.randn(N, R) for N, R in zip(OUTS, ranks, strict=True)]
    biases = [None, torch.randn(OUTS[1], dtype=HALF), None]
    x, dys = torch.randn(M, K, dtype=HALF), [torch.randn(M, N, dtype=HALF) for N in OUTS]
    drop = Dropout(torch.tensor([3]), p) if p else None
    seed = None if drop is None else drop.seed
    group = Group(weights, (SCALING,) * 3, columns_of_s(ranks, HALF, path, arch), p, path)
    s = new_s(x, M, group.columns[-1].stop, path, arch)
    held = held_by(*weights)
    written = 3 if path.startswith("dequantize:") else 0

    def forward():
        ys, s, calls = shared.forward_calls(x, group, As, Bs, biases, drop, arch)
        return [*ys, s], calls

    assert check(forward, [x, *held, *As, *Bs, *biases, seed]) == (min(written, 1), written)

    def backward():
        (dx, da, dbs), calls = shared.backward_calls(dys, x, group, As, Bs, s, drop, arch, (True, True, [True] * 3))
        return [dx, da, *dbs], calls

    tensors = [*dys, x, *held, *As, *Bs, s, seed]
    assert check(backward, tensors) == (min(written, 1), written)


def test_sums_in_parts_take_turns():
    """Would catch the parts of all projections' dB in memory at a time, which is the most that backward takes."""
    M, K, N, R = 4096, 512, 1024, 16
    made = {"device": "meta", "dtype": HALF}
    x, weights, dys = torch.empty(M, K, **made), [torch.empty(N, K, **made)] * 3, [torch.empty(M, N, **made)] * 3
    As, Bs = [torch.empty(R, K, **made)] * 3, [torch.empty(N, R, **made)] * 3
    taken = []
    for n in (1, 3):
        group = Group(tuple(weights[:n]), (SCALING,) * n, columns_of_s([R] * n, HALF, "triton", 90), 0.0, "triton")
        s, needs = new_s(x, M, n * R, "triton", 90), (True, True, [True] * n)
        with recorded_scratch() as found:
            shared.backward_calls(dys[:n], x, group, As[:n], Bs[:n], s, None, 90, needs)
        taken.append(max(t.nbytes for t in found))
        sums = [t for t in found if t.dtype is torch.float32]
        assert len(sums) <= 3, "of dB and of dS by one projection, of dA"
    assert taken[0] == taken[1]


@pytest.mark.parametrize("path", ["triton", "dequantize:cublas"])
def test_layers_that_have_tensors_in_common(path):
    """Would catch a list that cannot be recorded since a bias, a code book, a weight or dY is two projections'."""
    weight, bias, x, dy = (weight_for(path, K), torch.randn(K), torch.randn(M, K), torch.randn(M, K))
    x, dy, bias = x.to(HALF), dy.to(HALF), bias.to(HALF)
    As, Bs = [torch.randn(16, K) for _ in range(2)], [torch.randn(K, 16) for _ in range(2)]
    group = Group((weight,) * 2, (SCALING,) * 2, columns_of_s((16, 16), HALF, path, 90), 0.0, path)
    s = new_s(x, M, group.columns[-1].stop, path, 90)
    held = held_by(*group.weights)
    written = 2 if path.startswith("dequantize:") else 0

    def forward():
        ys, s, calls = shared.forward_calls(x, group, As, Bs, [bias, bias], None, 90)
        return [*ys, s], calls

    assert check(forward, [x, *held, *As, *Bs, bias, bias]) == (min(written, 1), written)

    def backward():
        (dx, da, dbs), calls = shared.backward_calls([dy, dy], x, group, As, Bs, s, None, 90, (True, True, [True] * 2))
        return [dx, da, *dbs], calls

    assert check(backward, [dy, dy, x, *held, *As, *Bs, s]) == (min(written, 1), written)
