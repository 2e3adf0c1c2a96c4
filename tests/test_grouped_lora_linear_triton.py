"""`ops.grouped_lora_linear` on Triton kernels, through the public operation: forward, every gradient, both doors.

On a GPU the kernels run compiled, elsewhere in Triton's interpreter, which is slow: so sizes are small and odd.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from grouped_data import COUNTS, SCALING, make, truth_and_magnitude  # noqa: E402
from numerics import assert_rounded, padded_randn  # noqa: E402
from peftkern import use_backend  # noqa: E402
from peftkern.ops import _grouped_lora_linear_triton as kernels  # noqa: E402
from peftkern.ops import grouped_linear, grouped_lora_linear  # noqa: E402
from peftkern.ops.grouped_lora_linear import _operator  # noqa: E402
from peftkern_kernels import replay  # noqa: E402
from peftkern_kernels.launch import Call, recorded_scratch  # noqa: E402

# Roundings on the way: S and dS, once each; fp32 masters are rounded too, and B once more where it is packed.
ROUNDED = {False: [1, 1, 0, 1, 1, 0], True: [3, 3, 0, 2, 2, 0]}


def run(tensors, offsets, dy, scaling=SCALING):
    for t in tensors:
        t.grad = None
    with use_backend("triton"):
        y = grouped_lora_linear(*tensors[:4], scaling, offsets, tensors[4])
        y.backward(dy)
    return [y.detach(), *(t.grad for t in tensors)]


def check(kind, N, K, R, dtype, device, *, masters=False, change=None, **options):
    tensors, offsets = make(kind, N, K, R, dtype, torch.float32 if masters else None, device=device, **options)
    if change is not None:
        tensors = [t.detach().requires_grad_() for t in change(*tensors)]
    dy = padded_randn(tensors[0].shape[0], N, pad=5, dtype=dtype, device=device)
    results = run(tensors, offsets, dy)
    truths = truth_and_magnitude(tensors, offsets, dy)
    for out, (truth, magnitude), rounded in zip(results, truths, ROUNDED[masters], strict=True):
        wider = torch.finfo(dtype).eps / torch.finfo(out.dtype).eps
        assert_rounded(out, truth, magnitude, terms=N + K + R + tensors[0].shape[0] + 8, rounded=rounded * wider)
    return results, offsets


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", [kind for kind in COUNTS if kind != "no rows"])
def test_kernels_match_fp64(kind, dtype, device):
    """Would catch rows of a neighbour's expert in a tile, a gradient left unwritten where an expert has no rows, NaN
    between rows, a tail that is not 0; in PEFT's layout of B, whose experts lie innermost."""
    results, offsets = check(kind, 33, 20, 5, dtype, device)
    tail = int(offsets[-1])
    assert (results[0][tail:] == 0).all() and (results[1][tail:] == 0).all()


def test_a_transposed_stack_with_masters(device):
    """Would catch strides of a stack taken in the wrong order, and masters whose bits are taken for 16-bit ones."""
    check("mixed", 40, 70, 17, torch.bfloat16, device, masters=True, transposed=True)


@pytest.mark.parametrize("R", [1, 8])
def test_factors_that_lie_otherwise(R, device):
    """Would catch a factor read as if it were packed: A with its experts innermost, B contiguous or transposed."""

    def contiguous_b(x, weight, a, b, bias):
        return x, weight, a.permute(1, 2, 0).contiguous().permute(2, 0, 1), b.contiguous(), bias

    def transposed_b(x, weight, a, b, bias):
        return x, weight, a.contiguous(), b.transpose(1, 2).contiguous().transpose(1, 2), bias

    check("mixed", 33, 20, R, torch.float32, device, change=contiguous_b)
    check("mixed", 33, 20, R, torch.float32, device, change=transposed_b)


def test_many_rows_of_one_expert(device):
    """Would catch several chunks of an expert's rows that are added up wrongly, or into a neighbour's gradient."""
    check(((3, 600, 2), 1), 17, 16, 3, torch.float32, device)


def test_strided_x_and_an_expanded_gradient(device):
    """Would catch rows of x, or of dY, taken where they do not lie."""
    tensors, offsets = make("mixed", 18, 20, 3, device=device)
    x = tensors[0].detach()
    dy = torch.randn(1, 1, device=device).expand(x.shape[0], 18)
    want = run(tensors, offsets, dy.contiguous())
    tensors[0] = x.t().contiguous().t().requires_grad_()
    for got, expected in zip(run(tensors, offsets, dy), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("asked", range(5))
def test_only_the_gradients_asked_for(asked, device):
    """Would catch a kernel that needs an operand which was not kept."""
    tensors, offsets = make("mixed", 18, 20, 3, device=device)
    dy = torch.randn(tensors[0].shape[0], 18, device=device)
    want = run(tensors, offsets, dy)[1 + asked]
    alone = [t.detach().requires_grad_(i == asked) for i, t in enumerate(tensors)]
    got = run(alone, offsets, dy)[1:]
    assert [g is not None for g in got] == [i == asked for i in range(5)]
    torch.testing.assert_close(got[asked], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["mixed", "none"])
def test_experts_without_adapters(kind, device):
    """Would catch tables that are missing where there are no adapters, and a zero S that is read all the same."""
    (x, weight, _, _, bias), offsets = make(kind, 33, 20, 1, device=device)
    results = []
    for backend in ("triton", "torch"):
        x.grad = None
        with use_backend(backend):
            y = grouped_linear(x, weight.detach(), offsets, bias.detach())
        y.square().sum().backward()
        results.append((y.detach(), x.grad))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


def test_same_bits_on_two_runs_and_compiled(device):
    """Would catch a reduction in no fixed order, and an operator that falls back under torch.compile."""
    tensors, offsets = make(((300, 0, 7), 2), 18, 20, 3, device=device)
    dy = torch.randn(tensors[0].shape[0], 18, device=device)
    runs = [run(tensors, offsets, dy) for _ in range(2)]

    def step(x, weight, a, b, bias, offsets):
        return grouped_lora_linear(x, weight, a, b, SCALING, offsets, bias)

    for t in tensors:
        t.grad = None
    with use_backend("triton"):
        y = torch.compile(step, backend="aot_eager", fullgraph=True)(*tensors, offsets)
    y.backward(dy)
    runs.append([y.detach(), *(t.grad for t in tensors)])
    assert all(torch.equal(first, other) for later in runs[1:] for first, other in zip(runs[0], later, strict=True))


def test_operator_passes_opcheck(device):
    """Would catch a fake that lies about the shapes or strides that the kernels' outputs have."""
    (x, weight, a, b, bias), offsets = make(((3, 0, 4), 1), 5, 7, 2, device=device)
    results = torch.library.opcheck(_operator, (x, weight, a, b, bias, offsets, SCALING, "triton"))
    assert set(results.values()) == {"SUCCESS"}


def test_a_forward_that_is_computed_again_on_another_path_is_refused(device):
    """Would catch S of kernels, in which is the scaling, taken by plain PyTorch or the other way round."""
    tensors, offsets = make("mixed", 5, 7, 2, device=device)
    backends = iter(("triton", "torch"))

    def step(*held):
        with use_backend(next(backends)):
            return grouped_lora_linear(*held[:4], SCALING, offsets, held[4])

    y = torch.utils.checkpoint.checkpoint(step, *tensors, use_reentrant=False)
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        y.sum().backward()


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("R", [1, 16])
def test_every_launch_can_be_replayed(R, arch, monkeypatch):
    """Would catch an address that a recording cannot account for: each call would then be built anew, in Python."""
    monkeypatch.setattr(Call, "run", lambda call: {call.grid: call})  # a compiled kernel, as far as a recording asks
    (x, weight, a, b, bias), offsets = make("mixed", 32, 48, R, torch.float16, torch.float32, grad=False)
    x, weight = x.contiguous(), weight.contiguous()
    dy = torch.randn(x.shape[0], 32).half()
    for needs in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
        with recorded_scratch() as taken:
            y, s, calls = kernels.forward_calls(x, weight, a, b, SCALING, bias, offsets, arch)
        assert replay.record(calls, [x, weight, a, b, bias, offsets, y, s], taken) is not None
        with recorded_scratch() as taken:
            *grads, calls = kernels.backward_calls(dy, x, weight, a, b, s, SCALING, offsets, arch, needs)
        found = [dy, x if needs[1] else None, weight, a, b, s, offsets, *grads]
        assert replay.record(calls, found, taken) is not None
        assert [g is not None for g in grads] == list(needs)
