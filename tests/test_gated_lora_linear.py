"""`ops.gated_lora_linear` and `ops.lora_mlp`: the end of a gated MLP on every path against float64, what it keeps, and
torch's machinery."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from gated_data import ACTIVATIONS, GatedProjection
from held_paths import GEMM_PATHS, hold_lora_linear
from numerics import padded_randn
from peftkern import reference, use_backend
from peftkern.ops import (
    Projection,
    gated_lora_linear,
    lora_linear,
    lora_mlp,
    quantize_4bit,
    quantize_8bit,
)
from peftkern.ops._lora_linear_shared_operator import flatten_all
from peftkern.ops._lora_linear_torch import keep_mask

MODULE = importlib.import_module("peftkern.ops.gated_lora_linear")
SIZES = [(65, 70, 40, 12), (1, 17, 33, 3), (33, 48, 64, 16)]
DTYPES = [(torch.float32, False), (torch.float16, False), (torch.bfloat16, False), (torch.bfloat16, True)]


def nf4(w):
    return quantize_4bit(w, "nf4", 64, True)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype, masters", DTYPES)
@pytest.mark.parametrize("M, N, K, R", SIZES)
def test_plain_path_matches_fp64(M, N, K, R, dtype, masters, activation, dropout_p):
    """Would catch a gradient of the wrong factor, an h that backward makes differently, buffers that overlap."""
    operands = GatedProjection(M, N, K, R, dtype, masters)
    seed = torch.tensor([1234])
    keep = keep_mask(seed, M, K, dropout_p) if dropout_p else None
    with use_backend("torch"):
        got = operands.run(activation, dropout_p=dropout_p, seed=seed)
    operands.check(got, operands.truth(activation, keep, dropout_p))


@pytest.mark.parametrize("quantize", [nf4, quantize_8bit], ids=["nf4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_quantized_weights_match_fp64(dtype, quantize):
    """Would catch a weight that loses its blocks on the way through the operation."""
    operands = GatedProjection(20, 24, 64, 5, dtype, quantize=quantize)
    with use_backend("torch"):
        operands.check(operands.run("silu"), operands.truth("silu"))


@pytest.fixture(params=GEMM_PATHS)
def path(request, monkeypatch):
    """A path of `lora_linear` that the plan is held to."""
    return hold_lora_linear(monkeypatch, request.param)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype, masters", [(torch.float32, False), (torch.bfloat16, True)])
def test_kernels_match_fp64(dtype, masters, activation, dropout_p, path, device):
    """Would catch an activation that only one of the paths has right, and masks that differ between the passes."""
    pytest.importorskip("triton")
    operands = GatedProjection(33, 48, 40, 12, dtype, masters, device=device)
    seed = torch.tensor([1234], device=device)
    keep = reference.dropout_mask(seed, 33, 40, dropout_p) if dropout_p else None
    with use_backend("triton"):
        got = operands.run(activation, dropout_p=dropout_p, seed=seed)
        again = operands.run(activation, dropout_p=dropout_p, seed=seed)
    operands.check(got, operands.truth(activation, keep, dropout_p))
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True)), "other bits on the second run"


@pytest.mark.parametrize("M, quantize", [(3, None), (5, nf4), (40, nf4)], ids=["decode", "decode 4-bit", "fused 4-bit"])
def test_few_rows_and_4_bits_on_kernels(M, quantize, device):
    """Would catch a path of the projection that the activation's kernels do not go with."""
    pytest.importorskip("triton")
    operands = GatedProjection(M, 48, 64, 12, torch.float16, device=device, quantize=quantize)
    with use_backend("triton"):
        operands.check(operands.run("silu"), operands.truth("silu"))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    """Would catch any gradient formula that is only nearly right; some gates are 0."""
    operands = GatedProjection(6, 5, 7, 3)
    gate, up, A, B = (t.detach().double().requires_grad_() for t in operands.leaves)
    gate, up = (t.detach().reshape(2, 3, 7).requires_grad_() for t in (gate, up))
    W, bias = operands.dense.double(), operands.bias.double()

    def run(gate, up, A, B):
        return gated_lora_linear(gate, up, W, A, B, 0.5, bias, activation=activation)

    assert torch.autograd.gradcheck(run, (gate, up, A, B))


@pytest.mark.parametrize("asked", ["gate", "up", "lora_A", "lora_B"])
def test_only_what_is_asked_for(asked):
    """Would catch a gradient that depends on which others are wanted, or one that nobody asked for."""
    operands = GatedProjection(9, 5, 7, 3)
    names = ["gate", "up", "lora_A", "lora_B"]
    whole = operands.run("silu")[1:]
    for name, leaf in zip(names, operands.leaves, strict=True):
        leaf.requires_grad_(name == asked)
    y = gated_lora_linear(operands.gate, operands.up, operands.weight, operands.A, operands.B, 0.75, operands.bias)
    y.backward(operands.dy)
    for name, leaf, grad in zip(names, operands.leaves, whole, strict=True):
        assert torch.equal(leaf.grad, grad) if name == asked else leaf.grad is None


def test_keeps_gate_and_up_and_no_product_of_them():
    """Would catch h or act(gate) being kept, which the operation exists to avoid, and anything under no_grad."""
    operands = GatedProjection(64, 8, 256, 4)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        operands.run("silu")
    wide = [t for t in kept if t.numel() >= 64 * 256]
    assert len(wide) == 2 and {t.data_ptr() for t in wide} == {operands.gate.data_ptr(), operands.up.data_ptr()}
    kept.clear()
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        gated_lora_linear(operands.gate, operands.up, operands.weight, operands.A, operands.B, 0.75)
    assert not kept


def test_neither_input_is_changed_and_backward_can_be_repeated():
    """Would catch gradients written over what was kept, which a second backward through the graph needs."""
    operands = GatedProjection(9, 5, 7, 3)
    before = [operands.gate.detach().clone(), operands.up.detach().clone()]
    y = gated_lora_linear(operands.gate, operands.up, operands.weight, operands.A, operands.B, 0.75)
    first = torch.autograd.grad(y, operands.leaves, operands.dy, retain_graph=True)
    second = torch.autograd.grad(y, operands.leaves, operands.dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(before[0], operands.gate.detach()) and torch.equal(before[1], operands.up.detach())


def test_a_weight_that_learns_gets_its_gradient():
    """Would catch a weight or a bias whose gradient is lost because the operation takes them to be frozen."""
    operands = GatedProjection(9, 5, 7, 3)
    weight = operands.weight.detach().clone().requires_grad_()
    bias = operands.bias.clone().requires_grad_()
    y = gated_lora_linear(operands.gate, operands.up, weight, operands.A, operands.B, 0.75, bias)
    h = reference.gated(operands.gate, operands.up, "silu")
    expected = reference.lora_linear(h, weight, operands.A, operands.B, 0.75, bias)
    leaves = [*operands.leaves, weight, bias]
    grads = torch.autograd.grad(y, leaves, operands.dy)
    for a, b in zip(grads, torch.autograd.grad(expected, leaves, operands.dy), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["dense", "nf4", "int8", "dropout"])
def test_operator_passes_opcheck(kind):
    """Would catch a fake that lies about shapes, or an autograd formula that tracing does not see."""
    quantize = {"nf4": nf4, "int8": quantize_8bit}.get(kind)
    operands = GatedProjection(6, 8, 64, 3, quantize=quantize)
    tensors, numbers = flatten_all([operands.weight])
    seed = torch.tensor([7]) if kind == "dropout" else None
    path = "dequantize:torch" if quantize else "torch"
    gate, up, A, B = operands.leaves
    p = 0.0 if seed is None else 0.25
    arguments = (gate, up, tensors, A, B, operands.bias, seed, numbers, 0.75, p, "silu", path)
    assert set(torch.library.opcheck(MODULE._operator, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("quantize", [None, nf4], ids=["dense", "nf4"])
def test_compiles_without_a_graph_break(quantize):
    """Would catch a check or a plan that Dynamo cannot trace, and another result under the compiler."""
    operands = GatedProjection(6, 8, 64, 3, quantize=quantize)

    def run(gate, up, A, B):
        return gated_lora_linear(gate, up, operands.weight, A, B, 0.75, operands.bias, activation="gelu")

    results = []
    for function in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        y = function(*operands.leaves)
        results.append([y.detach(), *torch.autograd.grad(y, operands.leaves, operands.dy)])
    assert all(torch.equal(eager, traced) for eager, traced in zip(*results, strict=True))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_repeats_the_mask(use_reentrant):
    """Would catch a mask that the second forward draws anew."""
    operands = GatedProjection(9, 5, 7, 3)

    def run(gate, up):
        return gated_lora_linear(gate, up, operands.weight, operands.A, operands.B, 0.75, dropout_p=0.5)

    results = []
    for function in (run, lambda *args: checkpoint(run, *args, use_reentrant=use_reentrant)):
        torch.manual_seed(3)
        for leaf in operands.leaves:
            leaf.grad = None
        function(operands.gate, operands.up).backward(operands.dy)
        results.append([leaf.grad for leaf in operands.leaves])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_autocast_computes_in_its_dtype():
    """Would catch a product in fp32 under autocast, or operands that are cast apart from one another."""
    operands = GatedProjection(9, 5, 7, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = gated_lora_linear(operands.gate, operands.up, operands.weight, operands.A, operands.B, 0.75)
    low = [t.detach().bfloat16() for t in (operands.gate, operands.up, operands.weight)]
    masters = operands.A.detach(), operands.B.detach()  # few rows meet these as they are
    assert got.dtype == torch.bfloat16 and torch.equal(got, gated_lora_linear(*low, *masters, 0.75))
    got.backward(operands.dy.bfloat16())
    assert [leaf.grad.dtype for leaf in operands.leaves] == [torch.float32] * 4


@pytest.mark.parametrize("shape", [(0, 7), (2, 0, 7), (7,)])
def test_empty_and_single_rows(shape):
    """Would catch an empty batch that raises, or gradients that are missing for it."""
    operands = GatedProjection(6, 5, 7, 3)
    gate, up = (torch.randn(shape, requires_grad=True) for _ in range(2))
    y = gated_lora_linear(gate, up, operands.weight, operands.A, operands.B, 0.75, operands.bias)
    assert y.shape == (*shape[:-1], 5)
    y.sum().backward()
    assert gate.grad.shape == gate.shape and up.grad.shape == up.shape and operands.A.grad.isfinite().all()


def test_output_may_be_changed_in_place():
    """Would catch an output that is a view to autograd, which torch refuses to change."""
    operands = GatedProjection(6, 5, 7, 3)
    gate, up = (t.detach().reshape(2, 3, 7).requires_grad_() for t in (operands.gate, operands.up))
    y = gated_lora_linear(gate, up, operands.weight, operands.A, operands.B, 0.75)
    y.clamp_(-1, 1).sum().backward()
    assert gate.grad.isfinite().all()


def test_wrong_arguments_are_named():
    """Would catch an error from deep inside, that does not say which argument is wrong."""
    good = GatedProjection(6, 5, 7, 3)
    parts = (good.weight, good.A, good.B, 0.75)
    with pytest.raises(ValueError, match="activation: expected one of .*'silu'.* got 'relu'"):
        gated_lora_linear(good.gate, good.up, *parts, activation="relu")
    with pytest.raises(ValueError, match=r"up: expected \[6, 7\] on cpu as gate, got \[5, 7\]"):
        gated_lora_linear(good.gate, good.up[:5], *parts)
    with pytest.raises(TypeError, match=r"up: expected a tensor, got float"):
        gated_lora_linear(good.gate, 1.0, *parts)
    with pytest.raises(TypeError, match="up: expected gate's dtype torch.float32, got torch.float16"):
        gated_lora_linear(good.gate, good.up.half(), *parts)
    with pytest.raises(ValueError, match="lora_A: expected shape"):
        gated_lora_linear(good.gate, good.up, good.weight, good.A[:, :5], good.B, 0.75)
    with pytest.raises(RuntimeError, match="double backward"):
        y = gated_lora_linear(good.gate, good.up, *parts)
        torch.autograd.grad(y.sum(), good.gate, create_graph=True)


def _block(dtype=torch.float64):
    x = torch.randn(2, 9, 6, dtype=dtype, requires_grad=True)
    sizes = {"gate": (6, 10, 3), "up": (6, 10, 2), "down": (10, 6, 4)}
    parts = {
        name: Projection(
            torch.randn(N, K, dtype=dtype),
            torch.randn(R, K, dtype=dtype, requires_grad=True),
            torch.randn(N, R, dtype=dtype, requires_grad=True),
            0.5,
            torch.randn(N, dtype=dtype),
        )
        for name, (K, N, R) in sizes.items()
    }
    leaves = [x, *(t for part in parts.values() for t in (part.lora_A, part.lora_B))]
    return x, parts, leaves


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_lora_mlp_is_its_three_projections(activation):
    """Would catch gate and up in each other's place, or an adapter of one in another."""
    x, parts, leaves = _block()
    y = lora_mlp(x, **parts, activation=activation)
    gate, up = (reference.lora_linear(x, *parts[name]) for name in ("gate", "up"))
    expected = reference.lora_linear(reference.gated(gate, up, activation), *parts["down"])
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    grads = torch.autograd.grad(y, leaves, dy)
    for a, b in zip(grads, torch.autograd.grad(expected, leaves, dy), strict=True):
        torch.testing.assert_close(a, b)


def test_lora_mlp_with_dropout_is_its_projections_on_their_seeds():
    """Would catch down dropping the elements that gate and up drop, and a seed that fixes only one of the masks."""
    x, parts, _ = _block()
    seed = torch.tensor([5])
    y = lora_mlp(x, **parts, dropout_p=0.5, seed=seed)
    options = {"dropout_p": 0.5, "seed": seed}
    gate, up = (lora_linear(x, *parts[name], **options) for name in ("gate", "up"))
    expected = lora_linear(F.silu(gate) * up, *parts["down"], dropout_p=0.5, seed=seed + 1)
    torch.testing.assert_close(y, expected)
    assert torch.equal(lora_mlp(x, **parts, dropout_p=0.5, training=False), lora_mlp(x, **parts))
    with pytest.raises(TypeError, match="lora_mlp: up: expected a Projection"):
        lora_mlp(x, parts["gate"], padded_randn(3, 3, pad=1, dtype=torch.float32), parts["down"])
