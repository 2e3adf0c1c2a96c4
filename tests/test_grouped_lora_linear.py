"""`ops.grouped_lora_linear`, experts in a stack, on the plain paths: meaning, gradients, torch around it."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from grouped_data import COUNTS, SCALING, make, truth_and_magnitude
from numerics import assert_rounded, padded_randn
from peftkern.backend import DeviceInfo
from peftkern.ops import grouped_linear, grouped_lora_linear
from peftkern.ops.grouped_lora_linear import _operator
from peftkern.ops.plan import Plan, plan_grouped_lora_linear

# The package exports the function under its module's name.
MODULE = importlib.import_module("peftkern.ops.grouped_lora_linear")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Roundings on the way. y and dX: S, its scaling, the base, the sum; dW: none; dA and dB: dS or S, its scaling.
ROUNDED = [4, 4, 0, 2, 2, 0]


def run(tensors, offsets, dy, scaling=SCALING):
    for t in tensors:
        t.grad = None
    y = grouped_lora_linear(*tensors[:4], scaling, offsets, tensors[4])
    y.backward(dy)
    return [y.detach(), *(t.grad for t in tensors)]


def check(results, truths, *, terms, rounded=ROUNDED, dtype=None):
    for out, (truth, magnitude), count in zip(results, truths, rounded, strict=True):
        wider = 1.0 if dtype is None else torch.finfo(dtype).eps / torch.finfo(out.dtype).eps
        if truth.numel():
            assert_rounded(out, truth, magnitude, terms=terms, rounded=count * wider)
        assert out.shape == truth.shape


@pytest.fixture
def path(request, monkeypatch):
    """A plain path, whichever this machine's CPU takes."""
    monkeypatch.setattr(MODULE, "plan_for", lambda *_: Plan(request.param, "forced by a test"))
    return request.param


def on_paths(*names):
    return pytest.mark.parametrize("path", names, indirect=True)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind, N, K, R", [*((kind, 33, 20, 5) for kind in COUNTS), ("mixed", 1, 1, 1)])
def test_output_and_gradients_match_fp64(kind, N, K, R, dtype, transposed):
    """Would catch rows of a neighbour's expert, a gradient left unwritten where an expert has no rows, NaN between
    rows, and a tail that is not 0; in PEFT's layout of B, whose experts lie innermost."""
    tensors, offsets = make(kind, N, K, R, dtype, transposed=transposed)
    dy = padded_randn(tensors[0].shape[0], N, pad=5, dtype=dtype)
    results = run(tensors, offsets, dy)
    check(results, truth_and_magnitude(tensors, offsets, dy), terms=N + K + R + 70)
    tail = int(offsets[-1])
    assert (results[0][tail:] == 0).all() and (results[1][tail:] == 0).all()
    assert [g.dtype for g in results] == [dtype] * 6


@on_paths("torch", "torch_fp32", "grouped_mm:torch")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["mixed", "one of many"])
def test_every_plain_path(kind, dtype, path, monkeypatch):
    """Would catch a fault in a path that this machine does not take, S scaled twice, sums over several row blocks."""
    monkeypatch.setattr("peftkern.ops._lora_linear_fp32.BLOCK_ROWS", 16)
    tensors, offsets = make(kind, 24, 16, 8, dtype)  # rows of 16 bytes, which grouped_mm asks for
    tensors[0], tensors[1] = (t.detach().contiguous().requires_grad_() for t in tensors[:2])
    dy = torch.randn(tensors[0].shape[0], 24).to(dtype)
    check(run(tensors, offsets, dy), truth_and_magnitude(tensors, offsets, dy), terms=130, rounded=[5, 5, 0, 3, 3, 0])


@on_paths("torch", "torch_fp32")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fp32_masters(dtype, path):
    """Would catch gradients of masters that come back in 16 bits, or y widened to the masters' dtype."""
    tensors, offsets = make("mixed", 24, 16, 8, dtype, torch.float32)
    dy = torch.randn(tensors[0].shape[0], 24).to(dtype)
    results = run(tensors, offsets, dy)
    assert [g.dtype for g in results] == [dtype, dtype, dtype, torch.float32, torch.float32, dtype]
    truths = truth_and_magnitude(tensors, offsets, dy)
    # A and B are rounded too: one more for each; and gradients pass through the 16-bit dtype.
    check(results, truths, terms=130, rounded=[6, 6, 0, 4, 4, 0], dtype=dtype)


def test_float64_is_float64_throughout():
    """Would catch a scaling, or an intermediate, that passes through float32."""
    tensors, offsets = make("mixed", 6, 8, 3, torch.float64)
    dy = torch.randn(tensors[0].shape[0], 6, dtype=torch.float64)
    results = run(tensors, offsets, dy, 0.1)
    check(results, truth_and_magnitude(tensors, offsets, dy, 0.1), terms=90, rounded=[0] * 6)


@on_paths("torch", "torch_fp32", "grouped_mm:torch")
@pytest.mark.parametrize("kind", ["mixed", "none"])
def test_experts_without_adapters(kind, path):
    """Would catch a base product that differs from the experts' own, or an empty S taken for one."""
    (x, weight, _, _, bias), offsets = make(kind, 24, 16, 1)
    x, weight = (t.detach().contiguous().requires_grad_() for t in (x, weight))
    y = grouped_linear(x, weight, offsets, bias)
    dy = torch.randn_like(y)
    y.backward(dy)
    start = 0
    want = torch.zeros_like(y)
    for expert, stop in enumerate(offsets.tolist()):
        want[start:stop] = linear(x[start:stop], weight[expert], bias[expert])
        start = stop
    grads = [x.grad, weight.grad, bias.grad]
    x.grad = weight.grad = bias.grad = None
    want.backward(dy)
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    for got, t in zip(grads, (x, weight, bias), strict=True):
        torch.testing.assert_close(got, torch.zeros_like(t) if t.grad is None else t.grad, rtol=1e-5, atol=1e-5)


def test_gradcheck():
    """Would catch any gradient formula that is only nearly right."""
    tensors, offsets = make(((2, 0, 3), 1), 4, 5, 2, torch.float64)

    def function(x, weight, a, b, bias):
        return grouped_lora_linear(x, weight, a, b, 0.7, offsets, bias)

    assert torch.autograd.gradcheck(function, tensors)


@pytest.mark.parametrize("kind", ["mixed", "no rows", "none"])
@pytest.mark.parametrize("adapters", [True, False])
def test_operator_passes_opcheck(kind, adapters):
    """Would catch a fake that lies about shapes, or an autograd formula that tracing does not see."""
    (x, weight, a, b, bias), offsets = make(kind, 5, 7, 2)
    if not adapters:
        a = b = None
    results = torch.library.opcheck(_operator, (x, weight, a, b, bias, offsets, SCALING, "torch"))
    assert set(results.values()) == {"SUCCESS"}


def test_compiles_without_a_graph_break():
    """Would catch a check or a plan that Dynamo cannot trace, and counts that are frozen into the graph."""
    tensors, offsets = make("mixed", 5, 7, 2)

    def step(x, weight, a, b, bias, offsets):
        y = grouped_lora_linear(x, weight, a, b, SCALING, offsets, bias)
        return y + grouped_linear(x, weight, offsets)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for ends in (offsets, torch.tensor([0, 9, 9, 30, 60], dtype=torch.int32)):
        results = []
        for function in (step, compiled):
            for t in tensors:
                t.grad = None
            y = function(*tensors, ends)
            y.square().sum().backward()
            results.append([y.detach(), *(t.grad for t in tensors)])
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(eager, traced, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant):
    """Would catch something kept that a forward computed again does not make."""
    tensors, offsets = make("mixed", 5, 7, 2)
    dy = torch.randn(tensors[0].shape[0], 5)
    want = run(tensors, offsets, dy)[1:]
    for t in tensors:
        t.grad = None
    checkpoint(
        lambda *held: grouped_lora_linear(*held[:4], SCALING, offsets, held[4]), *tensors, use_reentrant=use_reentrant
    ).backward(dy)
    assert all(torch.equal(t.grad, g) for t, g in zip(tensors, want, strict=True))


def test_autocast():
    """Would catch a result in the wrong dtype, or gradients that do not come back in their parameter's dtype."""
    tensors, offsets = make("mixed", 5, 7, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = grouped_lora_linear(*tensors[:4], SCALING, offsets, tensors[4])
    dy = torch.randn_like(y)
    y.backward(dy)
    assert y.dtype == torch.bfloat16 and {t.grad.dtype for t in tensors} == {torch.float32}
    results = [y.detach(), *(t.grad for t in tensors)]
    # Every operand is rounded too: x, W, bias, A, B.
    check(results, truth_and_magnitude(tensors, offsets, dy), terms=90, rounded=[7, 7, 2, 5, 5, 1], dtype=y.dtype)


def test_what_is_kept_for_backward():
    """Would catch a copy of x, a dense W + B A, or activations kept under no_grad."""
    tensors, offsets = make("mixed", 5, 24, 3)
    x, weight, a, b, bias = tensors
    weight.requires_grad_(False)
    known = {t.data_ptr() for t in (weight, a, b)}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        grouped_lora_linear(x, weight, a, b, SCALING, offsets)
    activations = [t for t in saved if t.data_ptr() not in known]
    assert sorted(t.numel() for t in activations) == [5, 66 * 3, 66 * 24], "the ends, S and x"
    assert any(t.data_ptr() == x.data_ptr() for t in activations)
    with torch.no_grad():
        assert grouped_lora_linear(x, weight, a, b, SCALING, offsets, bias).grad_fn is None


@on_paths("torch", "torch_fp32", "grouped_mm:torch")
@pytest.mark.parametrize("asked", range(5))
def test_only_the_gradients_asked_for(asked, path):
    """Would catch work that needs an operand which was not kept."""
    tensors, offsets = make("mixed", 8, 16, 8, torch.bfloat16)
    tensors[0], tensors[1] = (t.detach().contiguous().requires_grad_() for t in tensors[:2])
    dy = torch.randn(tensors[0].shape[0], 8).bfloat16()
    want = run(tensors, offsets, dy)[1 + asked]
    alone = [t.detach().requires_grad_(i == asked) for i, t in enumerate(tensors)]
    got = run(alone, offsets, dy)[1:]
    assert [g is not None for g in got] == [i == asked for i in range(5)] and torch.equal(got[asked], want)


def test_same_bits_on_two_runs():
    """Would catch a reduction whose order is not fixed."""
    tensors, offsets = make("mixed", 33, 20, 5)
    dy = torch.randn(tensors[0].shape[0], 33)
    assert all(torch.equal(*pair) for pair in zip(*(run(tensors, offsets, dy) for _ in range(2)), strict=True))


def test_the_output_may_be_changed_in_place():
    """Would catch an output that is a view to autograd: gates are clamped in place, as in gpt-oss."""
    tensors, offsets = make("mixed", 5, 7, 2)
    y = grouped_lora_linear(*tensors[:4], SCALING, offsets, tensors[4])
    y.clamp_(max=0.5)
    y.sum().backward()
    got, want = tensors[0].grad, None
    tensors[0].grad = None
    grouped_lora_linear(*tensors[:4], SCALING, offsets, tensors[4]).clamp(max=0.5).sum().backward()
    want = tensors[0].grad
    assert torch.equal(got, want)


def test_strided_x():
    """Would catch rows or columns of x taken where they do not lie."""
    (x, *rest), offsets = make("mixed", 5, 7, 2, grad=False)
    want = grouped_lora_linear(x, *rest[:3], SCALING, offsets, rest[3])
    wide = torch.full((2 * x.shape[0], 21), float("nan"))
    wide[::2, ::3] = x
    for held in (wide[::2, ::3], x.t().contiguous().t()):
        got = grouped_lora_linear(held, *rest[:3], SCALING, offsets, rest[3])
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_double_backward_is_refused():
    """Would catch second derivatives that are silently wrong (S has no history)."""
    tensors, offsets = make("mixed", 5, 7, 2)
    y = grouped_lora_linear(*tensors[:4], SCALING, offsets)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(y.square().sum(), tensors[0], create_graph=True)


BAD = [
    (lambda c: c.update(x=c["x"].int()), TypeError, "x: expected float32"),
    (lambda c: c.update(x=c["x"].tolist()), TypeError, "x: expected a tensor"),
    (lambda c: c.update(x=c["x"][:, :-1]), ValueError, r"x: expected shape \[T, 7\]"),
    (lambda c: c.update(x=c["x"][None]), ValueError, r"x: expected shape \[T, 7\]"),
    (lambda c: c.update(weight="w"), TypeError, "weight: expected a tensor"),
    (lambda c: c.update(weight=c["weight"][0]), ValueError, r"weight: expected shape \[experts, out_features"),
    (lambda c: c.update(weight=c["weight"].bfloat16()), TypeError, "x in torch.float32 and weight in torch.bfloat16"),
    (lambda c: c.update(lora_A=None), TypeError, "lora_A: expected a tensor, got NoneType"),
    (lambda c: c.update(lora_A=c["lora_A"].flatten(0, 1)), ValueError, r"lora_A: expected shape \[5, r, 7\]"),
    (lambda c: c.update(lora_A=c["lora_A"][:, :0]), ValueError, "r at least 1"),
    (lambda c: c.update(lora_A=c["lora_A"].half()), TypeError, "lora_A: expected x's dtype"),
    (lambda c: c.update(lora_B=[1]), TypeError, "lora_B: expected a tensor"),
    (lambda c: c.update(lora_B=c["lora_B"].transpose(1, 2)), ValueError, r"lora_B: expected shape \[5, 5, 2\]"),
    (lambda c: c.update(lora_B=c["lora_B"].to("meta")), ValueError, "lora_B: expected device cpu"),
    (lambda c: c.update(bias=1.0), TypeError, "bias: expected a tensor or None"),
    (lambda c: c.update(bias=c["bias"][0]), ValueError, r"bias: expected shape \[5, 5\]"),
    (lambda c: c.update(offsets=c["offsets"].long()), TypeError, "offsets: expected int32"),
    (lambda c: c.update(offsets=c["offsets"].tolist()), TypeError, "offsets: expected a tensor"),
    (lambda c: c.update(offsets=c["offsets"][:-1]), ValueError, r"offsets: expected shape \[5\]"),
    (lambda c: c.update(offsets=c["offsets"] + 9), ValueError, "offsets: expected non-decreasing ends of at most 66"),
    (lambda c: c.update(offsets=c["offsets"].flip(0)), ValueError, "offsets: expected non-decreasing"),
    (lambda c: c.update(offsets=-c["offsets"]), ValueError, "offsets: expected non-decreasing"),
    (lambda c: c.update(scaling="2"), TypeError, "scaling: expected a number"),
    (lambda c: c.update(scaling=float("nan")), ValueError, "scaling: expected a number"),
]


@pytest.mark.parametrize("damage, error, message", BAD)
def test_wrong_arguments_are_named(damage, error, message):
    """Would catch an error from deep inside torch in place of one that names the argument."""
    (x, weight, a, b, bias), offsets = make("mixed", 5, 7, 2, grad=False)
    call = {"x": x, "weight": weight, "lora_A": a, "lora_B": b, "scaling": 1.0, "offsets": offsets, "bias": bias}
    damage(call)
    with pytest.raises(error, match=message):
        grouped_lora_linear(**call)


HOPPER, NATIVE_CPU = DeviceInfo("cuda", 90), DeviceInfo("cpu", 0, "no CPU backend")
WITHOUT = DeviceInfo("cuda", 90, "triton is not installed")


@pytest.mark.parametrize(
    "changes, path",
    [
        ({}, "triton"),
        ({"dtype": torch.float16, "aligned": False}, "triton"),
        ({"dtype": torch.float32}, "torch"),
        ({"dtype": torch.float32, "backend": "triton"}, "triton"),
        ({"T": 0}, "torch"),
        ({"backend": "torch"}, "grouped_mm:torch"),
        ({"device": WITHOUT}, "grouped_mm:torch"),
        ({"device": WITHOUT, "dtype": torch.float16}, "torch"),
        ({"device": WITHOUT, "aligned": False}, "torch"),
        ({"device": DeviceInfo("cuda", 75, "sm_75 is older than sm_80")}, "torch"),
        ({"device": NATIVE_CPU}, "torch"),
        ({"device": DeviceInfo("cpu", 0, "no CPU backend", (torch.bfloat16,))}, "torch_fp32"),
    ],
)
def test_the_plan(changes, path):
    """Would catch a silent fallback, kernels where they do not run, and a plan without a reason."""
    plan = plan_grouped_lora_linear(
        **({"T": 4096, "N": 768, "K": 2048, "dtype": torch.bfloat16, "device": HOPPER} | changes)
    )
    assert plan.path == path and plan.reason


@pytest.mark.parametrize(
    "x, weight, path",
    [
        (lambda t: t[: 6 * 16].view(6, 16), 0, "grouped_mm:torch"),
        (lambda t: t[1 : 1 + 6 * 16].view(6, 16), 0, "torch"),
        (lambda t: t[:16].expand(6, 16), 0, "torch"),
        (lambda t: t[: 6 * 16].view(6, 16), 4, "torch"),
    ],
)
def test_grouped_mm_is_given_what_it_takes_on_a_gpu(x, weight, path, monkeypatch):
    """Would catch rows on rows, or an x or a stack that begins between two multiples of 16 bytes, which it refuses."""
    monkeypatch.setattr(MODULE, "device_info", lambda _: WITHOUT)
    memory = torch.empty(1000, dtype=torch.bfloat16, device="meta")
    stack = memory[weight : weight + 3 * 8 * 16].view(3, 8, 16)
    assert MODULE.plan_for(x(memory), stack, "auto").path == path
