"""The launches of `multi_lora_linear`: every path, forward and backward, and each adapter as if its rows were alone."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from adapter_batches import factors, make_adapters, routed, rows_of, wide  # noqa: E402
from numerics import arch_of, assert_rounded  # noqa: E402
from peftkern import reference  # noqa: E402
from peftkern.ops._multi_lora_linear_triton import backward_calls, forward_calls, multi_calls  # noqa: E402
from peftkern_kernels.dropout import Dropout  # noqa: E402
from peftkern_kernels.launch import run_all  # noqa: E402
from peftkern_kernels.routing import slot_seed  # noqa: E402
from quantized_data import random_4bit  # noqa: E402

PATHS = ["triton", "cublas", "decode"]
NEEDS = (True, True, True)


def alone(layer, slot, rows, dropout, transform):
    """y, dX, dA, dB in fp64 of one slot's rows by themselves, of `transform`ed operands."""
    x, weight, bias, dy, adapters = layer
    dtype = x.dtype
    x64, w64, dy64 = (transform(t.double()) for t in (x[rows], weight, dy[rows]))
    b64 = None if bias is None else transform(bias.double())
    if slot < 0 or int(adapters.rank[slot]) == 0:
        y = x64 @ w64.T
        return [y if b64 is None else y + b64, dy64 @ w64]
    a, b = (transform(t).requires_grad_() for t in factors(adapters, slot, dtype))
    keep = None
    if dropout is not None:
        keep = reference.dropout_mask(slot_seed(dropout.seed, slot), len(rows), x.shape[1], dropout.p)
    x64.requires_grad_()
    y = reference.lora_linear(x64, w64, a, b, float(adapters.scaling[slot]), b64, keep, dropout.p if dropout else 0.0)
    y.backward(dy64)
    return [y.detach(), x64.grad, a.grad, b.grad]


def run(layer, routing, dropout, path, needs=NEEDS):
    x, weight, bias, dy, adapters = layer
    arch = arch_of(x.device.type)
    y, s, calls = forward_calls(x, weight, adapters, routing, bias, dropout, path, arch)
    run_all(calls)
    *gradients, calls = backward_calls(dy, x, weight, adapters, s, routing, dropout, path, arch, needs)
    run_all(calls)
    return y, *gradients


def make_layer(M, N, K, dtype, device, *, masters=False, bias=True):
    adapters = make_adapters(N, K, torch.float32 if masters else dtype, device)
    weight = wide(N, K, dtype, device)
    offset = torch.randn(N, device=device).to(dtype) if bias else None
    return wide(M, K, dtype, device), weight, offset, wide(M, N, dtype, device), adapters


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize(
    "dtype, masters", [(torch.float32, False), (torch.float16, False), (torch.bfloat16, False), (torch.bfloat16, True)]
)
@pytest.mark.parametrize("M, N, K", [(40, 33, 70), (7, 48, 32), (1, 17, 33)])
@pytest.mark.parametrize("path", PATHS)
def test_each_adapter_is_as_if_alone(M, N, K, dtype, masters, dropout_p, path, device):
    """Bugs: rows that see another adapter, its mask or its gradient; a scaling lost on the way back; -1 adapted."""
    layer = make_layer(M, N, K, dtype, device, masters=masters)
    routing, adapters = routed(M, 6, device), layer[-1]
    dropout = Dropout(torch.tensor([1234], device=device), dropout_p) if dropout_p else None
    y, dx, da, db = run(layer, routing, dropout, path)
    eps, owned = torch.finfo(dtype).eps, torch.zeros(len(da), dtype=torch.bool, device=device)
    for slot in range(-1, adapters.slots):
        rows = rows_of(routing, slot)
        if len(rows) == 0:
            continue
        got = [y[rows], dx[rows]]
        rank = int(adapters.rank[slot]) if slot >= 0 else 0
        if rank:
            offset = int(adapters.row_offset[slot])
            owned[offset : offset + rank] = True
            got += [da[offset : offset + rank], db[offset * N : (offset + rank) * N].view(N, rank)]
        truths = alone(layer, slot, rows, dropout, lambda t: t)
        magnitudes = alone(layer, slot, rows, dropout, lambda t: t.abs())
        for out, truth, magnitude in zip(got, truths, magnitudes, strict=True):
            rounded = 2 * eps / torch.finfo(out.dtype).eps  # S or dS, and what the base was added to
            assert_rounded(out, truth, magnitude, terms=M + N + K + 64, rounded=rounded)
    assert (da[~owned] == 0).all() and (db.view(-1, N)[~owned] == 0).all(), "a gradient for nobody"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("asked", [0, 1, 2])
def test_only_the_gradients_asked_for(asked, path, device):
    """Bugs: a kernel that needs an operand which was not kept; a gradient that depends on the others being asked."""
    layer, routing = make_layer(20, 18, 24, torch.float32, device, bias=False), routed(20, 6, device)
    x, weight, _, dy, adapters = layer
    arch = arch_of(device)
    full = run(layer, routing, None, path)[1:]
    _, s, calls = forward_calls(x, weight, adapters, routing, None, None, path, arch)
    run_all(calls)
    needs = tuple(index == asked for index in range(3))
    kept = x if asked == 1 else None, s if asked == 2 else None
    *part, calls = backward_calls(dy, kept[0], weight, adapters, kept[1], routing, None, path, arch, needs)
    run_all(calls)
    assert [t is not None for t in part] == list(needs) and torch.equal(part[asked], full[asked])


@pytest.mark.parametrize("path", PATHS)
def test_no_rows(path, device):
    """Bugs: a launch of an empty grid; gradients of nothing that are not zeros."""
    layer = make_layer(0, 17, 33, torch.bfloat16, device)
    y, dx, da, db = run(layer, routed(0, 6, device), None, path)
    assert y.shape == (0, 17) and dx.shape == (0, 33) and not da.any() and not db.any()


@pytest.mark.parametrize("path, M", [("decode_4bit", 7), ("decode_4bit", 1), ("fused_4bit", 24)])
def test_over_a_4bit_weight(path, M, device):
    """Bugs: planes of the base given to the wrong rows; a backward that takes another path's operands."""
    N, K, dtype = 64, 128, torch.float16
    x, _, bias, dy, adapters = make_layer(M, N, K, dtype, device)
    stored, routing, arch = random_4bit(N, K, dtype=dtype, device=device), routed(M, 6, device), arch_of(device)
    y, s, calls = forward_calls(x, stored, adapters, routing, bias, None, path, arch)
    run_all(calls)
    *gradients, calls = backward_calls(dy, x, stored, adapters, s, routing, None, path, arch, NEEDS)
    run_all(calls)
    dense = reference.dequantize_4bit(stored, dtype)
    layer = (x, dense, bias, dy, adapters)
    for slot in range(-1, adapters.slots):
        rows = rows_of(routing, slot)
        if len(rows) == 0:
            continue
        truths, magnitudes = (alone(layer, slot, rows, None, f) for f in (lambda t: t, lambda t: t.abs()))
        for out, truth, magnitude in zip((y, gradients[0]), truths[:2], magnitudes[:2], strict=True):
            assert_rounded(out[rows], truth, magnitude, terms=M + N + K + 64, rounded=1)


@pytest.mark.parametrize("M, launches", [(16, 2), (17, 3), (64, 3)])
def test_launches_of_a_decode_step(M, launches, device):
    """Bug: more launches than the path promises, which is what it is for."""
    layer, routing = make_layer(M, 33, 70, torch.float32, device), routed(M, 6, device)
    x, weight, bias, _, adapters = layer
    y, s, calls = forward_calls(x, weight, adapters, routing, bias, None, "decode", arch_of(device), keep_s=False)
    assert len(calls) == launches and s is None
    run_all(calls)
    for slot in range(-1, adapters.slots):
        rows = rows_of(routing, slot)
        if len(rows):
            truth, magnitude = (alone(layer, slot, rows, None, f)[0] for f in (lambda t: t, lambda t: t.abs()))
            assert_rounded(y[rows], truth, magnitude, terms=200, rounded=2)


def test_the_low_rank_part_alone(device):
    """Bug: a benchmark that times other work than the operation's."""
    x, _, _, dy, adapters = make_layer(40, 33, 70, torch.float32, device)
    routing = routed(40, 6, device)
    results = []
    for decode in (True, False):
        y = dy.clone()
        run_all(multi_calls(x, adapters, routing, y, arch=arch_of(device), decode=decode))
        results.append(y)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-4)
    assert not torch.equal(results[0], dy)
