"""`ops.lora_linear_shared`: projections of one x as one operation, on every path, against float64 and `lora_linear`."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from held_paths import GEMM_PATHS, by_parity, hold_lora_linear
from numerics import assert_rounded, padded_randn
from peftkern import reference, use_backend
from peftkern.ops import dequantize, lora_linear, lora_linear_shared, quantize_4bit, quantize_8bit
from peftkern.ops import plan as plans
from peftkern.ops._lora_linear_torch import keep_mask
from peftkern.ops.lora_linear_shared import shared_plan_for

MODULE = importlib.import_module("peftkern.ops.lora_linear_shared")
# tokens, in features, [out features, rank] of each projection
SIZES = [
    (65, 40, [(70, 12), (17, 3)]),
    (33, 130, [(17, 40), (48, 8), (5, 1)]),
    (40, 33, [(24, 7)]),
    (20, 16, [(9, 2), (1, 5), (12, 16), (31, 4)]),
    (200, 24, [(17, 5), (30, 6)]),
]
SCALINGS = (0.75, 0.75, 0.75, 0.75)


@pytest.fixture(autouse=True)
def joined_at_any_size(monkeypatch):
    """Small sizes are tied together too, which in plain PyTorch does not pay."""
    monkeypatch.setattr(plans, "JOINED_ELEMENTS", 0)


def nf4(w):
    return quantize_4bit(w, "nf4", 64, True)


class Projections:
    """Random projections of one x, with NaN-padded rows, and a dy for each."""

    def __init__(self, M, K, outs, dtype=torch.float32, masters=False, bias=True, device="cpu", quantize=None):
        kind = torch.float32 if masters else dtype
        self.x = padded_randn(M, K, pad=1, dtype=dtype, device=device).requires_grad_()
        self.dense = [padded_randn(N, K, pad=2, dtype=dtype, device=device) for N, _ in outs]
        self.weights = [w if quantize is None else quantize(w.contiguous()) for w in self.dense]
        if quantize is not None:
            self.dense = [dequantize(w, dtype) for w in self.weights]
        self.As = [padded_randn(r, K, pad=3, dtype=kind, device=device).requires_grad_() for _, r in outs]
        self.Bs = [padded_randn(N, r, pad=4, dtype=kind, device=device).requires_grad_() for N, r in outs]
        self.biases = [torch.randn(N, device=device).to(dtype) if bias else None for N, _ in outs]
        self.dys = [padded_randn(M, N, pad=5, dtype=dtype, device=device) for N, _ in outs]

    @property
    def leaves(self):
        return [self.x, *self.As, *self.Bs]

    def plan(self, backend):
        return shared_plan_for(self.x, self.weights, self.As, self.Bs, self.biases, backend)

    def run(self, scalings=SCALINGS, which=None, **options):
        """[each y], [dX, each dA, each dB]; backward from the outputs `which` alone, if given."""
        n = len(self.weights)
        ys = lora_linear_shared(self.x, self.weights, self.As, self.Bs, scalings[:n], self.biases, **options)
        chosen = range(n) if which is None else which
        grads = torch.autograd.grad(
            [ys[i] for i in chosen], self.leaves, [self.dys[i] for i in chosen], allow_unused=True
        )
        return [y.detach() for y in ys], grads

    def truth(self, scalings=SCALINGS, keep=None, p=0.0, which=None):
        """The results of `run` in fp64, of the tensors and of their absolute values."""
        found = []
        for transform, number in ((lambda t: t.detach().double(), float), (lambda t: t.detach().double().abs(), abs)):
            x, *rest = [transform(t).requires_grad_() for t in self.leaves]
            n = len(self.weights)
            biases = [None if bias is None else transform(bias) for bias in self.biases]
            ys = [
                reference.lora_linear(
                    x, transform(w), a, b, number(s), None if bias is None else transform(bias), keep, p
                )
                for w, a, b, s, bias in zip(self.dense, rest[:n], rest[n:], scalings[:n], biases, strict=True)
            ]
            chosen = range(n) if which is None else which
            total = sum((ys[i] * transform(self.dys[i])).sum() for i in chosen)
            found.append(([y.detach() for y in ys], torch.autograd.grad(total, [x, *rest], allow_unused=True)))
        return found


def check(projections, got, truth, *, roundings, dtype):
    """Every output and gradient within the bound of its arithmetic.

    `roundings`: how often intermediates of (y, dX, dA, dB) are rounded to `dtype` on the way.
    """
    (ys, grads), ((true_ys, true_grads), (size_ys, size_grads)) = got, truth
    n = len(projections.weights)
    kinds = [1] + [2] * n + [3] * n
    terms = (
        sum(projections.x.shape) + sum(w.shape[0] for w in projections.dense) + sum(a.shape[0] for a in projections.As)
    )
    outputs = [(y, t, s, 0) for y, t, s in zip(ys, true_ys, size_ys, strict=True)]
    outputs += list(zip(grads, true_grads, size_grads, kinds, strict=True))
    for out, exact, magnitude, kind in outputs:
        factor = torch.finfo(dtype).eps / torch.finfo(out.dtype).eps
        assert_rounded(out, exact, magnitude, terms=terms, rounded=roundings[kind] * factor)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize(
    "dtype, masters",
    [(torch.float32, False), (torch.float16, False), (torch.bfloat16, False), (torch.bfloat16, True)],
)
@pytest.mark.parametrize("M, K, outs", SIZES)
def test_plain_path_matches_fp64(M, K, outs, dtype, masters, dropout_p):
    """Would catch one projection's S, dS or gradients in another's place, a dX that lacks a projection or counts its
    low-rank part twice, a lost scaling or mask."""
    projections = Projections(M, K, outs, dtype, masters)
    seed = torch.tensor([1234])
    keep = keep_mask(seed, M, K, dropout_p) if dropout_p else None
    with use_backend("torch"):
        got = projections.run(dropout_p=dropout_p, seed=seed)
    # y: S, the base and what masters add; dX: each projection's running sum besides; dA: dS, and once more where it is
    # widened; dB likewise. One more where x is masked.
    n, extra = len(outs), (2 if masters else 0) + (1 if dropout_p else 0)
    roundings = (3 + extra, 3 + n + extra, 2 + extra, 2 + extra)
    check(projections, got, projections.truth(keep=keep, p=dropout_p), roundings=roundings, dtype=dtype)


@pytest.fixture(params=[*GEMM_PATHS, by_parity])
def path(request, monkeypatch):
    """A path of `lora_linear` that the plan is held to, or one for each projection."""
    return hold_lora_linear(monkeypatch, request.param)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("dtype, masters", [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)])
@pytest.mark.parametrize("M, K, outs", [SIZES[0], SIZES[1]])
def test_kernels_match_fp64(M, K, outs, dtype, masters, dropout_p, path, device):
    """Would catch a kernel that takes another projection's columns of S, and a mask that backward draws differently."""
    projections = Projections(M, K, outs, dtype, masters, device=device)
    seed = torch.tensor([1234], device=device)
    keep = reference.dropout_mask(seed, M, K, dropout_p) if dropout_p else None
    with use_backend("triton"):
        wanted = path if isinstance(path, str) else ",".join(path(N) for N, _ in outs)
        assert projections.plan("triton").path == wanted
        got = projections.run(dropout_p=dropout_p, seed=seed)
    casts, n = 2 if masters else 0, len(outs)
    roundings = (2 + casts, 2 + n + casts, 1 + casts, 1 + casts)
    check(projections, got, projections.truth(keep=keep, p=dropout_p), roundings=roundings, dtype=dtype)


@pytest.mark.parametrize("first", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_masters_beside_others(backend, first, device):
    """Would catch a gradient of fp32 masters that was rounded to the dtype of another projection's A, and the rounding
    of all of A to that of the first."""
    projections = Projections(*SIZES[1], torch.bfloat16, device=device)
    for i, dtype in enumerate((first, torch.float32, torch.bfloat16)):
        for factors in (projections.As, projections.Bs):
            factors[i] = factors[i].detach().to(dtype).requires_grad_()
    with use_backend(backend):
        got = projections.run()
    assert [g.dtype for g in got[1][1:4]] == [first, torch.float32, torch.bfloat16]
    dA = got[1][2]
    # In plain PyTorch its products are bfloat16's.
    assert torch.equal(dA, dA.bfloat16().float()) == (backend == "torch")
    check(projections, got, projections.truth(), roundings=(5, 8, 4, 4), dtype=torch.bfloat16)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_scalings_may_differ(backend, device):
    """Would catch one projection's scaling applied to all columns of S or dS."""
    projections = Projections(*SIZES[1], device=device)
    scalings = (0.5, 2.0, -1.25)
    with use_backend(backend):
        got = projections.run(scalings)
    check(projections, got, projections.truth(scalings), roundings=(3, 6, 2, 2), dtype=torch.float32)


@pytest.mark.parametrize("backend", ["torch", "triton", "triton, paths of their own"])
@pytest.mark.parametrize("which", [[0], [2], [0, 2], [1, 2]])
def test_outputs_that_nobody_uses(which, backend, device, monkeypatch):
    """Would catch gradients for an adapter whose output did not take part, dS columns in the wrong place, or a path
    that backward takes from another projection."""
    backend, _, own = backend.partition(",")
    if own:
        hold_lora_linear(monkeypatch, by_parity)
    projections = Projections(*SIZES[1], device=device)
    with use_backend(backend):
        ys, grads = projections.run(which=which)
    truth = projections.truth(which=which)
    used = [0] + [1 + i for i in which] + [4 + i for i in which]
    assert [i for i, g in enumerate(grads) if g is not None] == used
    for i in used:
        assert_rounded(grads[i], truth[0][1][i], truth[1][1][i], terms=300, rounded=8)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_only_the_gradients_asked_for(backend, device):
    """Would catch an adapter that is frozen and gets a gradient all the same, or x's gradient being needed for it."""
    projections = Projections(*SIZES[1], device=device)
    learns = [projections.As[1], projections.Bs[2]]
    for t in projections.leaves:
        t.requires_grad_(any(t is wanted for wanted in learns))
    with use_backend(backend):
        ys = lora_linear_shared(
            projections.x, projections.weights, projections.As, projections.Bs, SCALINGS[:3], projections.biases
        )
        torch.autograd.backward(ys[1:], projections.dys[1:])
    assert [y.requires_grad for y in ys] == [False, True, True]
    truth = projections.truth()
    for t, index in ((projections.As[1], 2), (projections.Bs[2], 6)):
        assert_rounded(t.grad, truth[0][1][index], truth[1][1][index], terms=300, rounded=4)
    assert all(t.grad is None for t in projections.leaves if all(t is not wanted for wanted in learns))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("quantize", [nf4, quantize_8bit], ids=["nf4", "int8"])
@pytest.mark.parametrize("M", [20, 300])
def test_quantized_weights(M, quantize, backend, device):
    """Would catch a buffer that a later projection writes while an earlier one's product still reads it."""
    projections = Projections(M, 64, [(48, 8), (80, 4)], torch.bfloat16, device=device, quantize=quantize)
    with use_backend(backend):
        plan = projections.plan(backend)
        got = projections.run()
    fused = backend == "triton" and quantize is nf4 and M == 20
    assert plan.path.partition(":")[0] == ("fused_4bit" if fused else "dequantize")
    check(projections, got, projections.truth(), roundings=(3, 6, 2, 2), dtype=torch.bfloat16)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_large_quantized_weight_goes_by_blocks(backend, monkeypatch, device):
    """Would catch a block of rows that misses its columns of y, its rows of B, or its part of dX."""
    monkeypatch.setattr(importlib.import_module("peftkern.ops._dense_blocks"), "BUFFER_BYTES", 64 * 64 * 4)
    projections = Projections(300, 64, [(160, 8), (80, 4)], device=device, quantize=nf4)
    with use_backend(backend):
        got = projections.run()
    check(projections, got, projections.truth(), roundings=(3, 8, 2, 2), dtype=torch.float32)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("tokens", [1, 8])
def test_few_tokens(tokens, backend, device):
    """Would catch a scaling that is applied twice, or not at all, where it rides in products."""
    projections = Projections(tokens, 64, [(48, 8), (80, 4)], device=device)
    with use_backend(backend):
        got = projections.run()
    check(projections, got, projections.truth(), roundings=(3, 6, 2, 2), dtype=torch.float32)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_empty_input(backend, device):
    """Would catch a launch over no rows, or gradients of another shape than the parameters'."""
    projections = Projections(0, 64, [(48, 8), (80, 4)], device=device)
    with use_backend(backend):
        ys, grads = projections.run()
    assert [y.shape for y in ys] == [(0, 48), (0, 80)]
    for leaf, grad in zip(projections.leaves, grads, strict=True):
        assert grad.shape == leaf.shape and not grad.any()


def test_same_bits_twice_and_three_dimensions():
    """Would catch an order of sums that depends on anything but the input, and outputs that lose a dimension."""
    projections = Projections(24, 33, [(24, 7), (12, 2)])
    x = projections.x.detach().reshape(2, 3, 4, 33).requires_grad_()
    results = []
    for _ in range(2):
        ys = lora_linear_shared(
            x, projections.weights, projections.As, projections.Bs, (1.0, 2.0), dropout_p=0.5, seed=torch.tensor([3])
        )
        assert [y.shape for y in ys] == [(2, 3, 4, 24), (2, 3, 4, 12)]
        results.append([*ys, *torch.autograd.grad(sum(y.square().sum() for y in ys), [x, *projections.As])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradcheck():
    """Would catch any gradient formula that is only nearly right."""
    x, a, b, c, d = (
        torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((6, 7), (3, 7), (5, 3), (2, 7), (4, 2))
    )
    w, v = torch.randn(5, 7, dtype=torch.float64), torch.randn(4, 7, dtype=torch.float64)

    def run(x, a, b, c, d):
        return lora_linear_shared(x, (w, v), (a, c), (b, d), (0.5, 2.0), dropout_p=0.3, seed=torch.tensor([5]))

    assert torch.autograd.gradcheck(run, (x, a, b, c, d))


def one_by_one(p, scalings=SCALINGS, **options):
    parts = zip(p.weights, p.As, p.Bs, scalings, p.biases, strict=False)
    return [lora_linear(p.x, w, a, b, s, bias, **options) for w, a, b, s, bias in parts]


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_compiled_and_checkpointed_mean_the_same(dropout_p):
    """Would catch a route under torch.compile with another mask, and a graph break; a checkpoint that draws anew."""
    projections = Projections(33, 40, [(24, 7), (12, 2)])
    seed = torch.tensor([9])

    def run(x):
        return lora_linear_shared(
            x,
            projections.weights,
            projections.As,
            projections.Bs,
            (0.75, 0.75),
            projections.biases,
            dropout_p=dropout_p,
            seed=seed,
        )

    expected = one_by_one(projections, dropout_p=dropout_p, seed=seed)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    wanted = torch.autograd.grad(expected, projections.leaves, projections.dys)
    routes = {
        "eager": run,
        "compiled": compiled,
        "checkpointed": lambda x: checkpoint(run, x, use_reentrant=False),
    }
    for name, route in routes.items():
        ys = route(projections.x)
        grads = torch.autograd.grad(ys, projections.leaves, projections.dys)
        for got, want in zip([*ys, *grads], [*expected, *wanted], strict=True):
            torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5, msg=name)


@pytest.mark.parametrize("learns", ["weight", "bias"])
def test_a_base_that_learns_goes_one_by_one(learns):
    """Would catch a gradient of a base weight or bias that the shared route does not make."""
    projections = Projections(33, 40, [(24, 7), (12, 2)])
    learned = (projections.weights if learns == "weight" else projections.biases)[1]
    learned.requires_grad_()
    ys = lora_linear_shared(
        projections.x, projections.weights, projections.As, projections.Bs, (0.75, 0.75), projections.biases
    )
    grads = torch.autograd.grad(ys, [*projections.leaves, learned], projections.dys)
    wanted = torch.autograd.grad(one_by_one(projections), [*projections.leaves, learned], projections.dys)
    for got, want in zip(grads, wanted, strict=True):
        assert torch.equal(got, want)


def test_autocast():
    """Would catch a base weight that is not cast, outputs that are not autocast's, or a cast copy kept for backward."""
    projections = Projections(40, 64, [(48, 8), (80, 4)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ys, grads = projections.run()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            lora_linear_shared(
                projections.x, projections.weights, projections.As, projections.Bs, (0.75, 0.75), projections.biases
            )
    assert {y.dtype for y in ys} == {torch.bfloat16} and {g.dtype for g in grads} == {torch.float32}
    check(projections, (ys, grads), projections.truth(), roundings=(8, 12, 8, 8), dtype=torch.bfloat16)
    parameters = {t.data_ptr() for t in (*projections.weights, *projections.As, *projections.Bs)}
    activations = sorted(t.nbytes for t in kept if t.data_ptr() not in parameters)
    assert activations == [40 * 12 * 2, 40 * 64 * 2]  # S of both, and x in bfloat16


@pytest.mark.parametrize("quantize, p", [(None, 0.0), (nf4, 0.0), (None, 0.5)])
def test_keeps_x_by_reference_and_s(quantize, p):
    """Would catch a saved copy of x, a mask for each projection, or a dense copy of a quantized weight."""
    projections = Projections(40, 64, [(48, 8), (80, 4)], quantize=quantize)
    known = {t.data_ptr() for t in (*projections.leaves, *projections.dense)}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lora_linear_shared(
            projections.x, projections.weights, projections.As, projections.Bs, (0.75, 0.75), dropout_p=p
        )
    extra = sorted(t.nbytes for t in kept if t.data_ptr() not in known)
    assert extra == [40 * 12 * 4, *([40 * 64] if p else [])]


def test_plan_says_why_not():
    """Would catch a group that silently runs one by one."""
    single = plans.Plan("triton", "many tokens")
    assert plans.plan_shared([single, single], 10**6).path == "triton"
    other = plans.Plan("cublas", "odd rows")
    beside = plans.plan_shared([single, other, single], 10**6)
    assert beside.path == "triton,cublas,triton" and "one shrink" in beside.reason
    assert plans.path_of_each(beside.path, 3) == ["triton", "cublas", "triton"]
    decoded = plans.Plan("fused_4bit", "few tokens")
    assert "different paths: cublas, fused_4bit" in plans.plan_shared([other, decoded], 10**6).reason
    written = plans.Plan("dequantize:triton", "4 bits")
    assert plans.plan_shared([single, written], 10**6).path == plans.APART, "one of them is no 4-bit weight"
    plain = plans.Plan("torch", "on a CPU")
    assert plans.plan_shared([plain, plain], 10**6).path == "torch"
    assert plans.plan_shared([plain, plain], 0).path == plans.APART
    assert "x so small" in plans.plan_shared([plain, plain], 0).reason
    for path in ("torch_fp32", "dequantize:torch_fp32"):
        plan = plans.plan_shared([plans.Plan(path, "because"), plans.Plan(path, "because")], 10**6)
        assert plan.path == plans.APART and plan.reason.startswith("because")
    for path in plans.DECODE_PATHS:
        few = plans.plan_shared([plans.Plan(path, "because")] * 4, 1)
        assert few.path == path and few.reason == "because; two launches for 4 projections, one dX and one dA"
        many = plans.plan_shared([plans.Plan(path, "because")] * 5, 1)
        assert many.path == plans.APART and "5 are more than the 4 that a launch takes" in many.reason
        unlike = plans.plan_shared([plans.Plan(path, "because")] * 2, 1, "they quarrel")
        assert unlike.path == plans.APART
        assert unlike.reason == "because; two launches a projection: they quarrel"


def test_errors_name_the_argument():
    """Would catch a mistake that surfaces as torch's complaint about shapes, or not at all."""
    p = Projections(8, 16, [(9, 2), (5, 3)])
    good = (p.x, p.weights, p.As, p.Bs, (1.0, 1.0))
    with pytest.raises(ValueError, match=r"scalings: expected 2, one for each weight, got 1"):
        lora_linear_shared(*good[:4], (1.0,))
    with pytest.raises(ValueError, match=r"biases: expected 2"):
        lora_linear_shared(*good, [None])
    with pytest.raises(ValueError, match="at least one"):
        lora_linear_shared(p.x, [], [], [], [])
    with pytest.raises(ValueError, match=r"lora_B: expected shape \[5, 3\]"):
        lora_linear_shared(p.x, p.weights, p.As, [p.Bs[0], p.Bs[0]], (1.0, 1.0))
    with pytest.raises(ValueError, match="dropout_p"):
        lora_linear_shared(*good, dropout_p=1.0)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(lora_linear_shared(*good)[0].sum(), p.x, create_graph=True)
