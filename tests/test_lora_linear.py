"""`ops.lora_linear` on the plain path: meaning, gradients, what it keeps, and how it behaves in torch's machinery."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch
import torch._dynamo.testing
from torch.utils.checkpoint import checkpoint

from numerics import assert_rounded, padded_randn
from peftkern import reference, use_backend
from peftkern.backend import current_backend
from peftkern.ops import dequantize_4bit, lora_linear, quantize_4bit
from peftkern.ops._lora_linear_torch import WIDE_ELEMENTS, _hashed_words, keep_mask
from peftkern.ops.lora_linear import _LoraLinear, _operator
from peftkern.ops.plan import Plan

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(64, 64, 64, 16), (1, 17, 33, 1), (65, 130, 200, 12), (7, 1, 1, 3), (33, 48, 40, 70), (520, 34, 66, 5)]
SCALING = 0.75
# The package exports the function under its module's name.
MODULE = importlib.import_module("peftkern.ops.lora_linear")


def make(M, N, K, R, dtype=torch.float32, adapter_dtype=None, grad=True):
    """x, weight, A, B, bias with NaN-padded rows; every one a leaf that requires grad."""
    adapter_dtype = adapter_dtype or dtype
    shapes = [((M, K), dtype), ((N, K), dtype), ((R, K), adapter_dtype), ((N, R), adapter_dtype)]
    tensors = [padded_randn(*shape, pad=i + 1, dtype=kind) for i, (shape, kind) in enumerate(shapes)]
    tensors.append(torch.randn(N).to(dtype))
    return [t.detach().requires_grad_(grad) for t in tensors]


def truth_and_magnitude(tensors, dy, keep=None, p=0.0):
    """Output and all gradients in fp64, of the tensors and of their absolute values."""
    results = []
    for transform in (lambda t: t.detach().double(), lambda t: t.detach().double().abs()):
        x, w, a, b, bias = (transform(t).requires_grad_() for t in tensors)
        y = reference.lora_linear(x, w, a, b, SCALING, bias, keep, p)
        y.backward(transform(dy))
        results.append([y.detach(), x.grad, w.grad, a.grad, b.grad, bias.grad])
    return list(zip(*results, strict=True))


# For y, dX, dW, dA, dB and dbias: how many intermediates are rounded to the dtype on the way (S and its product; dS and
# its product; none; dS and the result before it is widened to a master's dtype; S likewise; none).
ROUNDED = (4, 4, 0, 2, 2, 0)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M, N, K, R", SHAPES)
def test_output_and_gradients_match_fp64(M, N, K, R, dtype, dropout_p):
    """Would catch a wrong scaling, transpose, mask or a read past a row's end (the padding is NaN)."""
    tensors = make(M, N, K, R, dtype)
    dy = padded_randn(M, N, pad=5, dtype=dtype)
    seed = torch.tensor([1234])
    keep = keep_mask(seed, M, K, dropout_p) if dropout_p else None
    y = lora_linear(*tensors[:4], SCALING, tensors[4], dropout_p=dropout_p, seed=seed)
    y.backward(dy)
    outputs = [y.detach(), *(t.grad for t in tensors)]
    extra = 0 if dropout_p == 0 else 1
    for out, (truth, magnitude), rounded in zip(
        outputs, truth_and_magnitude(tensors, dy, keep, dropout_p), ROUNDED, strict=True
    ):
        assert_rounded(out, truth, magnitude, terms=M + N + K + R, rounded=rounded + extra)


@pytest.mark.parametrize("M", [600, 40, 8, 1])  # of the first masters are rounded, beside the others used as they are
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fp32_master_adapters(dtype, M):
    """Would catch gradients of masters that come back in 16 bits, or y widened to the masters' dtype."""
    tensors = make(M, 24, 56, 8, dtype, torch.float32)
    dy = torch.randn(M, 24).to(dtype)
    y = lora_linear(*tensors[:4], SCALING, tensors[4])
    y.backward(dy)
    assert y.dtype == dtype
    assert tensors[2].grad.dtype == tensors[3].grad.dtype == torch.float32
    eps = torch.finfo(dtype).eps
    for out, (truth, magnitude) in zip(
        [y.detach(), *(t.grad for t in tensors)], truth_and_magnitude(tensors, dy), strict=True
    ):
        # A and B are rounded too: one more for each, in units of the 16-bit dtype whatever the result's dtype.
        assert ((out.double() - truth).abs() <= 4 * eps * magnitude + 1e-7).all()


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight", ["dense", "by all cases' way", "quantized"])
@pytest.mark.parametrize("N, K", [(2000, 64), (64, 2000)])
def test_forward_and_backward_are_of_one_mind_about_few_rows(N, K, weight, adapter_dtype):
    """Would catch products in fp32 that are decided by x in forward and by dy in backward, which is of another size."""
    M, R = 40, 4
    assert min(N, K) * M <= WIDE_ELEMENTS < max(N, K) * M
    x, w, a, b, _ = make(M, N, K, R, torch.bfloat16, adapter_dtype)
    w = w.detach() if weight != "quantized" else quantize_4bit(w.detach().contiguous())
    if weight == "by all cases' way":
        y = _LoraLinear.apply(x, w, a, b, None, None, SCALING, 0.0, "torch", None)
    else:
        y = lora_linear(x, w, a, b, SCALING)
    dy = torch.randn(M, N).bfloat16()
    y.backward(dy)
    dense = (w if weight != "quantized" else dequantize_4bit(w, torch.bfloat16)).double()
    xd, ad, bd = (t.detach().double().requires_grad_() for t in (x, a, b))
    reference.lora_linear(xd, dense, ad, bd, SCALING).backward(dy.double())
    for t, truth in ((x, xd.grad), (a, ad.grad), (b, bd.grad)):
        assert t.grad.dtype == t.dtype
        assert ((t.grad.double() - truth).norm() / truth.norm()) < 1e-2


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gradcheck(dropout_p):
    """Would catch any gradient formula that is only nearly right."""
    x, w, a, b, bias = (t.detach().double().requires_grad_() for t in make(6, 5, 7, 3))
    x = x.detach().reshape(2, 3, 7).requires_grad_()
    seed = torch.tensor([5])

    def run(x, w, a, b, bias):
        return lora_linear(x, w, a, b, SCALING, bias, dropout_p=dropout_p, seed=seed)

    assert torch.autograd.gradcheck(run, (x, w, a, b, bias))


def test_operator_passes_opcheck():
    """Would catch a fake that lies about shapes, or an autograd formula that tracing does not see."""
    x, w, a, b, bias = make(6, 5, 7, 3)
    for seed, p in ((None, 0.0), (torch.tensor([9]), 0.2)):
        results = torch.library.opcheck(_operator, (x, w, a, b, bias, seed, SCALING, p, "torch"))
        assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_compiles_without_a_graph_break(dropout_p):
    """Would catch a check or a plan that Dynamo cannot trace, and a seed that is frozen into the graph."""
    tensors = make(6, 5, 7, 3)

    def run(x, w, a, b, bias):
        return lora_linear(x, w, a, b, SCALING, bias, dropout_p=dropout_p)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    grads = []
    for function in (run, compiled):
        torch.manual_seed(3)
        for t in tensors:
            t.grad = None
        y = function(*tensors)
        y.square().sum().backward()
        grads.append([y.detach(), *(t.grad for t in tensors)])
    for eager, traced in zip(*grads, strict=True):
        assert torch.equal(eager, traced)
    if dropout_p:
        first, second = compiled(*tensors), compiled(*tensors)
        assert not torch.equal(first, second)


def test_compiles_with_dynamic_tokens():
    """Would catch a plan that turns the number of tokens into a constant and recompiles at each length."""
    _, w, a, b, bias = make(6, 5, 7, 3)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    run = torch.compile(lambda x: lora_linear(x, w, a, b, SCALING, bias), backend=counter, fullgraph=True, dynamic=True)
    compilations = []
    for M in (40, 50, 60):
        x = torch.randn(M, 7)
        assert torch.equal(run(x), lora_linear(x, w, a, b, SCALING, bias))
        compilations.append(counter.frame_count)
    assert compilations[0] == compilations[-1] > 0


# torch.compile traces the non-reentrant kind only.
@pytest.mark.parametrize("use_reentrant, compiled", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_checkpointing_repeats_the_dropout(use_reentrant, dropout_p, compiled):
    """Would catch a mask drawn anew in the recomputation."""
    tensors = make(12, 5, 7, 3)

    def run(x):
        return lora_linear(x, *tensors[1:4], SCALING, tensors[4], dropout_p=dropout_p)

    def step(function):
        torch.manual_seed(11)
        for t in tensors:
            t.grad = None
        function(tensors[0]).square().sum().backward()
        return [t.grad for t in tensors]

    def checkpointed(x):
        return checkpoint(run, x, use_reentrant=use_reentrant)

    target = torch.compile(checkpointed, backend="aot_eager") if compiled else checkpointed
    for plain, again in zip(step(run), step(target), strict=True):
        assert torch.equal(plain, again)


def test_autocast():
    """Would catch a result in the wrong dtype, or gradients that do not come back in their parameter's dtype."""
    x, w, a, b, bias = make(9, 5, 7, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = lora_linear(x, w, a, b, SCALING, bias)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert {t.grad.dtype for t in (x, w, a, b, bias)} == {torch.float32}
    truth = reference.lora_linear(*(t.detach().double() for t in (x, w, a, b)), SCALING, bias.detach().double())
    magnitude = reference.lora_linear(
        *(t.detach().double().abs() for t in (x, w, a, b)), SCALING, bias.detach().double().abs()
    )
    # x, W, bias, A, B, S, the base product: each rounded to bf16 once.
    assert ((y.double() - truth).abs() <= 7 * torch.finfo(torch.bfloat16).eps / 2 * magnitude).all()


def test_used_twice_in_one_graph():
    """Would catch a backward that writes into what it saved."""
    x, w, a, b, bias = make(8, 7, 7, 3)
    y = lora_linear(lora_linear(x, w, a, b, SCALING, bias), w, a, b, SCALING, bias)
    y.sum().backward()
    xd, wd, ad, bd, biasd = (t.detach().double().requires_grad_() for t in (x, w, a, b, bias))
    once = reference.lora_linear(xd, wd, ad, bd, SCALING, biasd)
    reference.lora_linear(once, wd, ad, bd, SCALING, biasd).sum().backward()
    for got, want in zip((x, w, a, b, bias), (xd, wd, ad, bd, biasd), strict=True):
        torch.testing.assert_close(got.grad.double(), want.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype, adapter_dtype", [(torch.float32, None), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("M", [5, 33])  # factors in the products, and in S and dS
@pytest.mark.parametrize("with_bias", [False, True])
def test_every_combination_of_gradients_of_a_frozen_base(M, with_bias, dtype, adapter_dtype):
    """Would catch a short way for frozen weights that returns a gradient in another's place, or differs from the way
    that serves all cases."""
    x, w, a, b, bias = make(M, 9, 12, 6, dtype, adapter_dtype, grad=False)
    bias = bias if with_bias else None
    dy = torch.randn(M, 9).to(dtype)
    for wanted in itertools.product((False, True), repeat=3):
        results = []
        for shape, short in (((M, 12), True), ((1, M, 12), True), ((1, M, 12), False)):
            for t, want in zip((x, a, b), wanted, strict=True):
                t.requires_grad_(want).grad = None
            if short:
                y = lora_linear(x.view(shape), w, a, b, SCALING, bias)
            else:
                y = _LoraLinear.apply(x.view(shape), w, a, b, bias, None, SCALING, 0.0, "torch", None)
            assert y.shape == (*shape[:-1], 9)
            assert y.requires_grad == any(wanted)
            if any(wanted):
                assert type(y.grad_fn).__name__ == ("_ProductsBackward" if short else "_LoraLinearBackward")
                y.backward(dy.view(y.shape))
            results.append([y.detach().view(M, 9), x.grad, a.grad, b.grad])
        assert [g is not None for g in results[0][1:]] == list(wanted)
        for flat, short, general in zip(*results, strict=True):
            assert flat is short is general is None or (torch.equal(flat, general) and torch.equal(short, general))


def test_masters_beside_few_rows_under_compile_and_opcheck():
    """Would catch an operator whose S is not in the dtype that its fake says."""
    x, w, a, b, bias = make(3, 5, 7, 4, torch.bfloat16, torch.float32)
    results = torch.library.opcheck(_operator, (x, w, a, b, bias, None, SCALING, 0.0, "torch"))
    assert set(results.values()) == {"SUCCESS"}
    compiled = torch.compile(lambda *t: lora_linear(*t[:4], SCALING, t[4]), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, w, a, b, bias), lora_linear(x, w, a, b, SCALING, bias))


def test_functorch_transforms_are_refused_by_name():
    """Would catch the direct call of the autograd function computing something under a transform that it cannot, and
    torch's message, which tells an author of autograd functions what to do and no user."""
    x, w, a, b, _ = make(4, 5, 7, 3)
    with pytest.raises(RuntimeError, match="functorch.*Call the layers"):
        torch.func.grad(lambda a: lora_linear(x, w, a, b, SCALING).sum())(a)


@pytest.mark.parametrize("asked", range(5))
def test_only_the_gradients_asked_for(asked):
    """Would catch work done, or activations kept, for gradients that nobody wants."""
    tensors = make(8, 5, 7, 3, grad=False)
    everything = make(8, 5, 7, 3)
    for t, u in zip(everything, tensors, strict=True):
        u.copy_(t.detach())
    tensors[asked].requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        y = lora_linear(*tensors[:4], SCALING, tensors[4])
    y.sum().backward()
    lora_linear(*everything[:4], SCALING, everything[4]).sum().backward()
    assert torch.equal(tensors[asked].grad, everything[asked].grad)
    given = {t.data_ptr() for t in tensors[1:4]}
    activations = [t for t in saved if t.data_ptr() not in given]
    # dW and dA need x, dB needs S, the others need no activation.
    expected = {0: 0, 1: tensors[0].numel(), 2: tensors[0].numel(), 3: 8 * 3, 4: 0}[asked]
    assert sum(t.numel() for t in activations) == expected


def test_nothing_is_kept_without_gradients():
    """Would catch activations kept alive under no_grad."""
    tensors = make(8, 5, 7, 3)
    with torch.no_grad():
        y = lora_linear(*tensors[:4], SCALING, tensors[4])
    assert y.grad_fn is None and not y.requires_grad


def test_x_is_kept_by_reference():
    """Would catch a copy of x for each projection, which is what makes LoRA's memory grow."""
    x, w, a, b, bias = make(16, 5, 24, 2)
    w.requires_grad_(False)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        lora_linear(x, w, a, b, SCALING, bias, dropout_p=0.1)
    activations = [t for t in saved if t.data_ptr() not in {w.data_ptr(), a.data_ptr(), b.data_ptr()}]
    assert sum(t.data_ptr() == x.data_ptr() for t in activations) == 1
    rest = sum(t.numel() * t.element_size() for t in activations if t.data_ptr() != x.data_ptr())
    assert rest == 16 * 2 * 4 + 16 * 24, "S and a mask of one byte an element"


@pytest.mark.parametrize("shape", [(0, 7), (2, 0, 7)])
def test_empty_input(shape):
    """Would catch a crash, or gradients that are missing in place of zero, on an empty batch."""
    _, w, a, b, bias = make(1, 5, 7, 3)
    x = torch.empty(shape, requires_grad=True)
    y = lora_linear(x, w, a, b, SCALING, bias, dropout_p=0.1)
    y.sum().backward()
    assert y.shape == (*shape[:-1], 5)
    assert x.grad.shape == shape
    assert torch.equal(a.grad, torch.zeros_like(a)) and torch.equal(b.grad, torch.zeros_like(b))


def test_strided_input_of_any_rank():
    """Would catch a wrong flattening of transposed activations."""
    _, w, a, b, bias = make(1, 5, 7, 3)
    for x in (torch.randn(7, 4, 3).permute(1, 2, 0), torch.randn(7), torch.randn(2, 3, 4, 7)[:, ::2]):
        truth = reference.lora_linear(x, w, a, b, SCALING, bias)
        torch.testing.assert_close(lora_linear(x, w, a, b, SCALING, bias), truth, rtol=1e-5, atol=1e-5)
    transposed = torch.randn(7, 5).t()  # Conv1D keeps its weight like this
    x = torch.randn(4, 7)
    truth = reference.lora_linear(x, transposed, a, b, SCALING)
    torch.testing.assert_close(lora_linear(x, transposed, a, b, SCALING), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_same_bits_on_two_runs(dropout_p):
    """Would catch a reduction whose order is not fixed, or a mask that ignores the seed."""
    runs = []
    tensors = make(65, 34, 70, 12)
    for _ in range(2):
        for t in tensors:
            t.grad = None
        y = lora_linear(*tensors[:4], SCALING, tensors[4], dropout_p=dropout_p, seed=torch.tensor([7]))
        y.square().sum().backward()
        runs.append([y.detach(), *(t.grad for t in tensors)])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_dropout_is_off_in_evaluation_and_frequent_enough_in_training():
    """Would catch dropout in eval mode, a wrong rate, and a wrong scale of what is kept."""
    x, w, a, b, _ = make(256, 5, 96, 3, grad=False)
    plain = lora_linear(x, w, a, b, SCALING)
    assert torch.equal(plain, lora_linear(x, w, a, b, SCALING, dropout_p=0.5, training=False))
    for p in (0.005, 0.1, 0.5, 0.9):
        share = keep_mask(torch.tensor([1]), 1024, 1024, p).double().mean().item()
        assert abs(share - (1 - p)) < 5 * (p * (1 - p)) ** 0.5 / 1024  # five standard deviations


def test_backward_keeps_the_path_of_its_forward():
    """Would catch a backward that looks up the backend again: it may run outside the block, in another thread."""
    tensors = make(8, 5, 7, 3)
    with use_backend("torch"):
        y = lora_linear(*tensors[:4], SCALING, tensors[4], dropout_p=0.5, seed=torch.tensor([3]))
    with use_backend("triton"):
        y.sum().backward()
    keep = keep_mask(torch.tensor([3]), 8, 7, 0.5)
    (truth, _) = truth_and_magnitude(tensors, torch.ones(8, 5), keep, 0.5)[3]
    torch.testing.assert_close(tensors[2].grad.double(), truth, rtol=1e-5, atol=1e-5)


def test_double_backward_is_refused():
    """Would catch second derivatives that are silently wrong (S has no history)."""
    tensors = make(4, 5, 7, 3)
    y = lora_linear(*tensors[:4], SCALING, tensors[4])
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(y.square().sum(), tensors[0], create_graph=True)


BAD = [
    (0, lambda t: t.int(), TypeError, "x: expected float32"),
    (0, lambda t: t[:, :-1], ValueError, r"x: expected shape \[\.\.\., 7\]"),
    (0, lambda t: t.tolist(), TypeError, "x: expected a tensor"),
    (1, lambda t: t.bfloat16(), TypeError, "x in torch.float32 and weight in torch.bfloat16: cast x, or"),
    (1, lambda t: t[0], ValueError, "weight: expected shape"),
    (2, lambda t: t[:, :-1], ValueError, "lora_A: expected shape"),
    (2, lambda t: t.half(), TypeError, "lora_A: expected x's dtype"),
    (2, lambda t: t[:0], ValueError, "lora_B|at least 1"),
    (3, lambda t: t[:-1], ValueError, "lora_B: expected shape"),
    (4, lambda t: t[:-1], ValueError, "bias: expected shape"),
    (4, lambda t: 3.0, TypeError, "bias: expected a tensor"),
]


@pytest.mark.parametrize("index, damage, error, message", BAD)
def test_wrong_arguments_are_named(index, damage, error, message):
    """Would catch an error from deep inside torch in place of one that names the argument."""
    tensors = make(4, 5, 7, 3, grad=False)
    tensors[index] = damage(tensors[index])
    with pytest.raises(error, match=message):
        lora_linear(*tensors[:4], SCALING, tensors[4])


@pytest.mark.parametrize("options, message", [({"dropout_p": 1.0}, "dropout_p"), ({"dropout_p": -0.1}, "dropout_p")])
def test_wrong_dropout_is_named(options, message):
    """Would catch a division by zero at p = 1."""
    tensors = make(4, 5, 7, 3, grad=False)
    with pytest.raises(ValueError, match=message):
        lora_linear(*tensors[:4], SCALING, **options)
    with pytest.raises(ValueError, match="seed"):
        lora_linear(*tensors[:4], SCALING, dropout_p=0.1, seed=torch.tensor([1, 2]))


def test_words_that_other_devices_draw_are_random_and_repeat():
    """Would catch a hash of (seed, index) with dead bits, runs that one seed shares with the next, or a mask that is
    not the same twice."""
    seeds = [torch.tensor([value]) for value in (0, 1, 2, -7, 2**62)]
    drawn = [_hashed_words(seed, 2**14) for seed in seeds]
    assert all(torch.equal(words, _hashed_words(seed, 2**14)) for words, seed in zip(drawn, seeds, strict=True))
    # Splitmix64 as published (Steele, Lea, Flood 2014), in Python's whole numbers.
    state = _mixed(0)
    for i in (0, 1, 77):
        expected = _mixed((state + (i + 1) * 0x9E3779B97F4A7C15) % 2**64)
        assert int(drawn[0][i]) % 2**64 == expected
    bits = torch.stack([(words[:, None] >> torch.arange(64)) & 1 for words in drawn]).double()
    deviation = 0.5 / 2**7  # of a mean over 2^14 fair bits
    assert ((bits.mean(1) - 0.5).abs() < 5.5 * deviation).all()  # each bit of each seed
    signs = (2 * bits - 1).reshape(len(seeds), -1)
    correlations = signs @ signs.t() / signs.shape[1]
    assert ((correlations - torch.eye(len(seeds))).abs() < 5.5 / 2**10).all()  # of different seeds
    together = (signs[:, 1:] * signs[:, :-1]).mean(1)
    assert (together.abs() < 5.5 / 2**10).all()  # of neighbours
    assert torch.cat(drawn).unique().numel() == len(seeds) * 2**14


def _mixed(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"dropout_p": "0.1"}, TypeError, "dropout_p: expected a number"),
        ({"dropout_p": None}, TypeError, "dropout_p: expected a number"),
        ({"dropout_p": 0.1, "seed": 3}, TypeError, "seed: expected an int64 tensor"),
        ({"scaling": "2"}, TypeError, "scaling: expected a number, got str"),
        ({"scaling": None}, TypeError, "scaling: expected a number, got NoneType"),
        ({"scaling": torch.ones(2)}, TypeError, "scaling: expected a number, got Tensor"),
        ({"scaling": torch.tensor(2.0, requires_grad=True)}, ValueError, "scaling: no gradient flows to it"),
    ],
)
def test_wrong_numbers_are_named(options, error, message):
    """Would catch an int as a seed that fails for want of an attribute, and a learned scaling that never learns."""
    tensors = make(4, 5, 7, 3, grad=False)
    with pytest.raises(error, match=message):
        lora_linear(*tensors[:4], **({"scaling": SCALING} | options))


def test_scaling_may_be_any_number():
    """Would catch a scaling of another type of number that is refused."""
    tensors = make(4, 5, 7, 3, grad=False)
    for scaling in (2, torch.tensor(2.0), torch.tensor([2]), torch.ones(1).numpy()[0] * 2):
        assert torch.equal(lora_linear(*tensors[:4], scaling), lora_linear(*tensors[:4], 2.0))


def test_backend_names_are_checked():
    """Would catch a misspelt backend that is ignored."""
    with pytest.raises(ValueError, match="expected one of auto, triton, torch"):
        use_backend("cuda")


def test_backend_as_statement_block_and_decorator():
    """Would catch a call that stands alone and does nothing, and one that outlasts its block or function."""

    @use_backend("triton")
    def decorated(depth: int) -> list[str]:
        return [current_backend(), *(decorated(depth - 1) if depth else [])]

    assert current_backend() == "auto"
    try:
        with use_backend("torch"):
            assert current_backend() == "torch"
            use_backend("triton")
            assert current_backend() == "triton"
        assert current_backend() == "auto"
        use_backend("torch")
        assert current_backend() == "torch"
        assert decorated(1) == ["triton", "triton"]
        with pytest.raises(ZeroDivisionError), use_backend("triton"):
            _ = 1 / 0
        assert current_backend() == "torch"
    finally:
        use_backend("auto")


@pytest.mark.parametrize("path", ["torch", "torch_fp32"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_both_plain_paths_match_fp64(dtype, dropout_p, path, monkeypatch):
    """Would catch a fault in the path that this machine's CPU does not take, and in sums over several row blocks."""
    monkeypatch.setattr("peftkern.ops._lora_linear_fp32.BLOCK_ROWS", 16)
    monkeypatch.setattr("peftkern.ops._lora_linear_torch.WIDE_ELEMENTS", 0)
    monkeypatch.setattr(MODULE, "plan_for", lambda *_: Plan(path, "forced by a test"))
    tensors = make(50, 24, 40, 6, dtype, torch.float32)
    dy = torch.randn(50, 24).to(dtype)
    seed = torch.tensor([77])
    keep = keep_mask(seed, 50, 40, dropout_p) if dropout_p else None
    y = lora_linear(*tensors[:4], SCALING, tensors[4], dropout_p=dropout_p, seed=seed)
    y.backward(dy)
    eps = torch.finfo(dtype).eps
    # Masters and S (dS) rounded on "torch", S alone on "torch_fp32", whose forward rounds nothing on the way.
    for out, (truth, magnitude), rounded in zip(
        [y.detach(), *(t.grad for t in tensors)],
        truth_and_magnitude(tensors, dy, keep, dropout_p),
        (6, 6, 0, 4, 4, 0) if path == "torch" else (0, 0, 0, 0, 1, 0),
        strict=True,
    ):
        factor = eps / torch.finfo(out.dtype).eps
        assert_rounded(out, truth, magnitude, terms=130, rounded=rounded * factor)
