"""`ops.ia3_linear` and `multi_ia3_linear` on the plain path: meaning, gradients, what they keep, torch's machinery."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch
import torch._dynamo.testing
from torch.utils.checkpoint import checkpoint

from ia3_data import ROUNDED, make, truth_and_magnitude
from numerics import assert_rounded, padded_randn
from peftkern import reference, use_backend
from peftkern.ops import dequantize, ia3_linear, multi_ia3_linear, quantize_4bit, quantize_8bit
from peftkern.ops.ia3_linear import _flatten, _operator
from peftkern.ops.plan import Plan

MODULE = importlib.import_module("peftkern.ops.ia3_linear")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(64, 64, 64), (1, 17, 33), (65, 130, 200), (7, 1, 1), (33, 48, 40)]
BOTH = pytest.mark.parametrize("is_feedforward", [False, True], ids=["output", "feedforward"])


def check(outputs, tensors, dy, is_feedforward, ids=None, extra=0):
    M, N = dy.shape
    rounded = ROUNDED[is_feedforward]
    for out, truth, magnitude, count in zip(
        outputs, *truth_and_magnitude(tensors, dy, is_feedforward, ids), rounded, strict=True
    ):
        factor = torch.finfo(dy.dtype).eps / torch.finfo(out.dtype).eps
        terms = M + N + tensors[0].shape[1]
        assert_rounded(out, truth, magnitude, terms=terms, rounded=(count + extra) * factor)


@BOTH
@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M, N, K", SHAPES)
def test_output_and_gradients_match_fp64(M, N, K, dtype, masters, is_feedforward):
    """Would catch a scale on the wrong side, y / l where l is 0, a read past a row's end (the padding is NaN)."""
    tensors = make(M, N, K, is_feedforward, dtype, masters=masters)
    dy = padded_randn(M, N, pad=5, dtype=dtype)
    y = ia3_linear(*tensors, is_feedforward=is_feedforward)
    y.backward(dy)
    assert y.dtype == dtype and tensors[2].grad.dtype == tensors[2].dtype
    check([y.detach(), *(t.grad for t in tensors)], tensors, dy, is_feedforward)


@BOTH
@pytest.mark.parametrize("short", [True, False])
@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M, N, K", SHAPES)
def test_a_frozen_layer_matches_fp64(M, N, K, dtype, masters, short, is_feedforward, monkeypatch):
    """Would catch torch's own operations, which few rows take, multiplying or summing in 16 bits."""
    if not short:
        monkeypatch.setattr(MODULE, "SHORT_ROWS", 0)
    x, weight, scale, bias = make(M, N, K, is_feedforward, dtype, masters=masters)
    x = x.detach().contiguous().requires_grad_()
    tensors = (x, weight.requires_grad_(False), scale, bias.requires_grad_(False))
    called, function = [], MODULE._IA3Linear.forward
    monkeypatch.setattr(MODULE._IA3Linear, "forward", lambda *args: (called.append(1), function(*args))[1])
    dy = padded_randn(M, N, pad=5, dtype=dtype)
    y = ia3_linear(*tensors, is_feedforward=is_feedforward)
    y.backward(dy)
    assert bool(called) is not (short and scale.dtype is torch.float32)
    with torch.no_grad():
        without = ia3_linear(*tensors, is_feedforward=is_feedforward)
    assert torch.equal(without, y)
    truths, magnitudes = truth_and_magnitude(tensors, dy, is_feedforward)
    for i, out in ((0, y.detach()), (1, x.grad), (3, scale.grad)):
        rounded = ROUNDED[is_feedforward][i] * torch.finfo(dtype).eps / torch.finfo(out.dtype).eps
        assert_rounded(out, truths[i], magnitudes[i], terms=M + N + K, rounded=rounded)


@BOTH
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M, N, K, slots", [(65, 33, 40, 4), (9, 17, 5, 1), (33, 48, 70, 9)])
def test_a_vector_for_each_row_matches_fp64(M, N, K, slots, dtype, ids_dtype, is_feedforward):
    """Would catch a row that takes another's vector, an unscaled row that is scaled, a gradient in another slot."""
    tensors = make(M, N, K, is_feedforward, dtype, slots=slots)
    dy = padded_randn(M, N, pad=5, dtype=dtype)
    ids = torch.randint(-1, slots, (M,)).to(ids_dtype)
    y = multi_ia3_linear(*tensors[:3], ids, tensors[3], is_feedforward=is_feedforward)
    y.backward(dy)
    check([y.detach(), *(t.grad for t in tensors)], tensors, dy, is_feedforward, ids)


@BOTH
def test_a_slots_gradient_is_that_of_its_rows_alone(is_feedforward):
    """Would catch sums that leak between slots, and an absent slot's gradient that is missing in place of zero."""
    x, w, scales, bias = make(20, 7, 9, is_feedforward, slots=4)
    ids = torch.tensor([0, 3, -1, 0, 7] * 4)  # 7 is no slot
    y = multi_ia3_linear(x, w, scales, ids, bias, is_feedforward=is_feedforward)
    y.square().sum().backward()
    for slot in range(4):
        mine = x.detach()[ids == slot]
        scale = scales.detach()[slot].clone().requires_grad_()
        part = ia3_linear(mine, w.detach(), scale, bias.detach(), is_feedforward=is_feedforward)
        torch.testing.assert_close(y[ids == slot], part)
        part.square().sum().backward()
        torch.testing.assert_close(scales.grad[slot], scale.grad)
    plain = torch.nn.functional.linear(x, w, bias)
    torch.testing.assert_close(y[ids == 7], plain[ids == 7])
    assert not scales.grad[1].any() and not scales.grad[2].any()


@BOTH
@pytest.mark.parametrize("multi", [False, True])
def test_gradcheck(multi, is_feedforward):
    """Would catch any gradient formula that is only nearly right; some scales are 0."""
    tensors = make(6, 5, 7, is_feedforward, slots=3 if multi else 0)
    x, w, scale, bias = (t.detach().double().requires_grad_() for t in tensors)
    x = x.detach().reshape(2, 3, 7).requires_grad_()
    ids = torch.tensor([[0, -1, 2], [2, 2, 0]])

    def run(x, w, scale, bias):
        if multi:
            return multi_ia3_linear(x, w, scale, ids, bias, is_feedforward=is_feedforward)
        return ia3_linear(x, w, scale, bias, is_feedforward=is_feedforward)

    assert torch.autograd.gradcheck(run, (x, w, scale, bias))


@BOTH
@pytest.mark.parametrize("kind", ["dense", "multi", "nf4", "int8"])
def test_operator_passes_opcheck(kind, is_feedforward):
    """Would catch a fake that lies about shapes, or an autograd formula that tracing does not see."""
    x, w, scale, bias = make(6, 64, 64, is_feedforward, slots=2 if kind == "multi" else 0)
    weight = {"nf4": quantize_4bit, "int8": quantize_8bit}.get(kind, lambda w: w)(w.detach() if "4" in kind else w)
    tensors, numbers = _flatten(weight)
    ids = torch.tensor([0, 1, 0, -1, 1, 1]) if kind == "multi" else None
    path = "dequantize:torch" if len(tensors) > 1 else "torch"
    arguments = (x, tensors, scale, bias, ids, numbers, is_feedforward, path, True, not is_feedforward)
    assert set(torch.library.opcheck(_operator, arguments).values()) == {"SUCCESS"}


@BOTH
@pytest.mark.parametrize("multi", [False, True])
def test_compiles_without_a_graph_break(multi, is_feedforward):
    """Would catch a check or a plan that Dynamo cannot trace, and another result under the compiler."""
    tensors = make(6, 5, 7, is_feedforward, slots=3 if multi else 0)
    ids = torch.tensor([0, -1, 2, 2, 2, 0])

    def run(x, w, scale, bias):
        if multi:
            return multi_ia3_linear(x, w, scale, ids, bias, is_feedforward=is_feedforward)
        return ia3_linear(x, w, scale, bias, is_feedforward=is_feedforward)

    results = []
    for function in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        for t in tensors:
            t.grad = None
        y = function(*tensors)
        y.square().sum().backward()
        results.append([y.detach(), *(t.grad for t in tensors)])
    assert all(torch.equal(eager, traced) for eager, traced in zip(*results, strict=True))


def test_compiles_with_dynamic_tokens():
    """Would catch a plan that turns the number of tokens into a constant and recompiles at each length."""
    _, w, scale, bias = make(6, 5, 7, False)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    run = torch.compile(lambda x: ia3_linear(x, w, scale, bias), backend=counter, fullgraph=True, dynamic=True)
    compilations = []
    for M in (40, 50, 60):
        x = torch.randn(M, 7)
        assert torch.equal(run(x), ia3_linear(x, w, scale, bias))
        compilations.append(counter.frame_count)
    assert compilations[0] == compilations[-1] > 0


@BOTH
@pytest.mark.parametrize("use_reentrant, compiled", [(False, False), (True, False), (False, True)])
def test_checkpointing(use_reentrant, compiled, is_feedforward):
    """Would catch something kept in forward that the recomputation does not make again."""
    tensors = make(12, 5, 7, is_feedforward)

    def run(x):
        return ia3_linear(x, *tensors[1:], is_feedforward=is_feedforward)

    def step(function):
        for t in tensors:
            t.grad = None
        function(tensors[0]).square().sum().backward()
        return [t.grad for t in tensors]

    def checkpointed(x):
        return checkpoint(run, x, use_reentrant=use_reentrant)

    target = torch.compile(checkpointed, backend="aot_eager") if compiled else checkpointed
    for plain, again in zip(step(run), step(target), strict=True):
        assert torch.equal(plain, again)


@BOTH
def test_autocast(is_feedforward):
    """Would catch a result in the wrong dtype, a master scale rounded, gradients not in their parameter's dtype."""
    tensors = make(9, 5, 7, is_feedforward)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ia3_linear(*tensors, is_feedforward=is_feedforward)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert {t.grad.dtype for t in tensors} == {torch.float32}
    (truth, *_), (magnitude, *_) = truth_and_magnitude(tensors, torch.ones(9, 5), is_feedforward)
    # x, W, bias, one intermediate and the result are rounded to bf16, scale is not.
    assert ((y.double() - truth).abs() <= 5 * torch.finfo(torch.bfloat16).eps / 2 * magnitude).all()


def kept(tensors, is_feedforward):
    """y, and the tensors that it kept for backward."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        return ia3_linear(*tensors, is_feedforward=is_feedforward), saved


@BOTH
def test_every_combination_of_gradients_and_what_is_kept(is_feedforward):
    """Would catch work done, or activations kept, for gradients that nobody wants."""
    everything = make(8, 5, 7, is_feedforward)
    ia3_linear(*everything, is_feedforward=is_feedforward).square().sum().backward()
    for wanted in itertools.product((False, True), repeat=4):
        if not any(wanted):
            continue
        tensors = [t.detach().requires_grad_(want) for t, want in zip(everything, wanted, strict=True)]
        y, saved = kept(tensors, is_feedforward)
        y.square().sum().backward()
        for t, full, want in zip(tensors, everything, wanted, strict=True):
            assert (t.grad is not None) == want and (not want or torch.equal(t.grad, full.grad))
        _, weight_learns, scale_learns, _ = wanted
        parameters = {t.data_ptr() for t in tensors[1:]}
        activations = [t for t in saved if t.data_ptr() not in parameters]
        x_kept = weight_learns or (is_feedforward and scale_learns)
        z_kept = scale_learns and not is_feedforward
        assert sum(t.numel() for t in activations) == x_kept * 8 * 7 + z_kept * 8 * 5
        assert any(t.data_ptr() == tensors[0].data_ptr() for t in activations) == x_kept, "x is kept by reference"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_kept_without_gradients(mode):
    """Would catch activations kept alive under no_grad."""
    tensors = make(8, 5, 7, False)
    with mode():
        y = ia3_linear(*tensors)
    assert y.grad_fn is None and not y.requires_grad


@BOTH
@pytest.mark.parametrize("shape", [(0, 7), (2, 0, 7)])
def test_empty_input(shape, is_feedforward):
    """Would catch a crash, or gradients that are missing in place of zero, on an empty batch."""
    _, w, scale, bias = make(1, 5, 7, is_feedforward)
    x = torch.empty(shape, requires_grad=True)
    y = ia3_linear(x, w, scale, bias, is_feedforward=is_feedforward)
    y.sum().backward()
    assert y.shape == (*shape[:-1], 5) and x.grad.shape == shape
    assert torch.equal(scale.grad, torch.zeros_like(scale))


@BOTH
def test_strided_input_of_any_rank(is_feedforward):
    """Would catch a wrong flattening of transposed activations, of a weight like Conv1D's, of a strided scale."""
    _, w, scale, bias = make(1, 5, 7, is_feedforward, grad=False)
    options = {"is_feedforward": is_feedforward}
    for x in (torch.randn(7, 4, 3).permute(1, 2, 0), torch.randn(7), torch.randn(2, 3, 4, 7)[:, ::2]):
        torch.testing.assert_close(
            ia3_linear(x, w, scale, bias, **options), reference.ia3_linear(x, w, scale, bias, **options)
        )
    transposed, spread, x = torch.randn(7, 5).t(), scale.repeat_interleave(2)[::2], torch.randn(4, 7)
    torch.testing.assert_close(
        ia3_linear(x, transposed, spread, **options), reference.ia3_linear(x, transposed, spread, **options)
    )


@BOTH
@pytest.mark.parametrize("path", ["torch", "torch_fp32"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_both_plain_paths_match_fp64_over_blocks_of_rows(dtype, path, is_feedforward, monkeypatch):
    """Would catch a fault in the path that this machine's CPU does not take, and in sums over several row blocks."""
    monkeypatch.setattr("peftkern.ops._ia3_linear_torch.BLOCK_ROWS", 16)
    monkeypatch.setattr(MODULE, "plan_for", lambda *_, **__: Plan(path, "forced by a test"))
    for slots in (0, 3):
        tensors = make(50, 24, 40, is_feedforward, dtype, masters=True, slots=slots)
        dy = padded_randn(50, 24, pad=3, dtype=dtype)
        ids = torch.randint(-1, 3, (50,)) if slots else None
        x, w, scale, bias = tensors
        if ids is None:
            y = ia3_linear(x, w, scale, bias, is_feedforward=is_feedforward)
        else:
            y = multi_ia3_linear(x, w, scale, ids, bias, is_feedforward=is_feedforward)
        y.backward(dy)
        check([y.detach(), *(t.grad for t in tensors)], tensors, dy, is_feedforward, ids)


@BOTH
@pytest.mark.parametrize("buffer_rows", [None, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantize", [lambda w: quantize_4bit(w, blocksize=32, double_quant=False), quantize_8bit])
def test_quantized_weights(quantize, dtype, buffer_rows, is_feedforward, monkeypatch):
    """Would catch a block's scales or gradients that land in another's columns, and a weight decoded in another dtype.

    With the weight whole, results have the bits of the dequantized weight's."""
    M, N, K = 9, 200, 64
    if buffer_rows:
        shared = importlib.import_module("peftkern.ops._dense_blocks")
        monkeypatch.setattr(shared, "BUFFER_BYTES", buffer_rows * K * dtype.itemsize)
    tensors = make(M, N, K, is_feedforward, dtype)
    x, w, scale, bias = tensors
    weight = quantize(w.detach())
    dense = dequantize(weight, dtype)
    dy = torch.randn(M, N).to(dtype)
    results = []
    for held in (weight, dense):
        for t in tensors:
            t.grad = None
        y = ia3_linear(x, held, scale, bias, is_feedforward=is_feedforward)
        y.backward(dy)
        results.append([y.detach(), x.grad, scale.grad, bias.grad])
    if not buffer_rows:
        assert all(torch.equal(got, want) for got, want in zip(*results, strict=True))
    truths = truth_and_magnitude([x, dense, scale, bias], dy, is_feedforward)
    blocks = 4 if buffer_rows else 0  # each block's part of dX (and dl) is rounded
    for out, truth, magnitude in zip(results[0], *([t[i] for i in (0, 1, 3, 4)] for t in truths), strict=True):
        assert_rounded(out, truth, magnitude, terms=M + N + K, rounded=1 + blocks)


@BOTH
def test_nothing_of_a_quantized_weight_is_decoded_without_need(is_feedforward, monkeypatch):
    """Would catch a backward that decodes the weight for the scale's gradient alone where z is kept."""
    x, w, scale, bias = make(9, 64, 64, is_feedforward)
    weight = quantize_4bit(w.detach())
    x = x.detach()
    y = ia3_linear(x, weight, scale, bias, is_feedforward=is_feedforward)
    decoded = []
    blocks = MODULE.dense_blocks
    monkeypatch.setattr(MODULE, "dense_blocks", lambda *args: decoded.append(1) or blocks(*args))
    y.sum().backward()
    assert len(decoded) == (1 if is_feedforward else 0)


def test_same_bits_on_two_runs_and_backward_keeps_its_path():
    """Would catch a reduction whose order is not fixed, or a backward that looks up the backend again."""
    runs = []
    tensors = make(65, 34, 70, False)
    for _ in range(2):
        for t in tensors:
            t.grad = None
        with use_backend("torch"):
            y = ia3_linear(*tensors)
        with use_backend("triton"):
            y.square().sum().backward()
        runs.append([y.detach(), *(t.grad for t in tensors)])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_used_twice_in_one_graph_and_double_backward_is_refused():
    """Would catch a backward that writes into what it saved, and second derivatives that are silently wrong."""
    tensors = make(8, 7, 7, False)
    x, w, scale, bias = tensors
    y = ia3_linear(ia3_linear(x, w, scale, bias), w, scale, bias)
    y.sum().backward()
    wide = [t.detach().double().requires_grad_() for t in tensors]
    reference.ia3_linear(reference.ia3_linear(*wide), *wide[1:]).sum().backward()
    for got, want in zip(tensors, wide, strict=True):
        torch.testing.assert_close(got.grad.double(), want.grad, rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(ia3_linear(*tensors).square().sum(), x, create_graph=True)


BAD = [
    (0, lambda t: t.int(), TypeError, "x: expected float32"),
    (0, lambda t: t[:, :-1], ValueError, r"x: expected shape \[\.\.\., 7\]"),
    (0, lambda t: t.tolist(), TypeError, "x: expected a tensor"),
    (1, lambda t: t.bfloat16(), TypeError, "x in torch.float32 and weight in torch.bfloat16: cast x, or"),
    (1, lambda t: t[0], ValueError, "weight: expected shape"),
    (1, lambda t: None, TypeError, "weight: expected a tensor, a Weight4bit"),
    (2, lambda t: t[:-1], ValueError, r"scale: expected shape \[5\]"),
    (2, lambda t: t[:, None], ValueError, r"scale: expected shape \[5\]"),
    (2, lambda t: t.half(), TypeError, "scale: expected x's dtype"),
    (2, lambda t: None, TypeError, "scale: expected a tensor"),
    (3, lambda t: t[:-1], ValueError, "bias: expected shape"),
    (3, lambda t: 3.0, TypeError, "bias: expected a tensor"),
]


@pytest.mark.parametrize("index, damage, error, message", BAD)
def test_wrong_arguments_are_named(index, damage, error, message):
    """Would catch an error from deep inside torch in place of one that names the argument."""
    tensors = make(4, 5, 7, False, grad=False)
    tensors[index] = damage(tensors[index])
    with pytest.raises(error, match=message):
        ia3_linear(*tensors)


@pytest.mark.parametrize(
    "ids, scales, error, message",
    [
        (torch.zeros(4), torch.ones(2, 5), TypeError, "ids: expected int32 or int64"),
        (torch.zeros(3, dtype=torch.int64), torch.ones(2, 5), ValueError, r"ids: expected shape \[4\]"),
        ([0] * 4, torch.ones(2, 5), TypeError, "ids: expected a tensor"),
        (torch.zeros(4, dtype=torch.int64), torch.ones(5), ValueError, "scales: expected shape"),
        (torch.zeros(4, dtype=torch.int64), torch.ones(0, 5), ValueError, "at least one slot"),
    ],
)
def test_wrong_slots_are_named(ids, scales, error, message):
    """Would catch ids of the wrong shape that broadcast."""
    x, w, _, bias = make(4, 5, 7, False, grad=False)
    with pytest.raises(error, match=message):
        multi_ia3_linear(x, w, scales, ids, bias)
