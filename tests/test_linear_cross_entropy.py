"""`ops.linear_cross_entropy`: the loss of all logits without all logits; in torch's machinery; what it holds."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch.nn.functional import cross_entropy, linear

from numerics import assert_rounded, padded_randn
from peftkern.ops import linear_cross_entropy
from peftkern.ops.linear_cross_entropy import _operator, chunk_rows
from peftkern.utils.live_bytes import LiveBytes

# The package exports the function under its module's name.
MODULE = importlib.import_module("peftkern.ops.linear_cross_entropy")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
IGNORE = -100


def make(M, V, K, dtype=torch.float32, ignored=0.3):
    """hidden, weight (NaN-padded rows), bias, all leaves that require grad; labels, some of them ignored."""
    hidden, weight = (padded_randn(n, K, pad=i + 1, dtype=dtype) for i, n in enumerate((M, V)))
    bias = torch.randn(V).to(dtype)
    labels = torch.randint(0, V, (M,)).masked_fill(torch.rand(M) < ignored, IGNORE)
    return [t.detach().requires_grad_() for t in (hidden, weight, bias)], labels


def fp64(tensors, labels, factor=1.0, reduction="mean"):
    """Loss and gradients in fp64 by torch."""
    wide = [t.detach().double().requires_grad_() for t in tensors]
    loss = cross_entropy(linear(*wide), labels, ignore_index=IGNORE, reduction=reduction)
    (loss * factor).backward()
    return loss.detach(), [t.grad for t in wide]


def grads(function, tensors):
    for t in tensors:
        t.grad = None
    loss = function(*tensors)
    loss.backward()
    return loss.detach(), [t.grad for t in tensors]


@pytest.mark.parametrize("chunk_size", [1, 7, 64, None])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M, V, K", [(1, 1, 1), (33, 17, 5), (65, 130, 40)])
def test_loss_and_gradients_match_fp64(M, V, K, dtype, chunk_size):
    """Would catch a block left out or counted twice, a wrong divisor, gradient of ignored tokens, a read past a row."""
    tensors, labels = make(M, V, K, dtype)
    labels[0] = 0  # one at least counts
    loss, found = grads(lambda h, w, b: linear_cross_entropy(h, w, labels, bias=b, chunk_size=chunk_size), tensors)
    truth, wanted = fp64(tensors, labels)
    count = int((labels != IGNORE).sum())
    h, w, b = (t.detach().double().abs() for t in tensors)
    size = linear(h, w, b)  # a bound of every logit, and of its partial sums
    eps, eps32 = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    logit_error = float(((K + 1) * eps32 * size + eps / 2 * size).max())
    # log-sum-exp and the target's logit each move by at most the logits' own error.
    assert abs(loss.double() - truth) <= 2 * logit_error + (V + M + 4) * eps32 * float(size.max() + 10)
    # A probability moves by at most twice that, relatively; then it is rounded, multiplied, rounded and scaled.
    kept = (labels != IGNORE).double().unsqueeze(1)
    p = torch.softmax(linear(*(t.detach().double() for t in tensors)), 1) * kept
    moved = p * 2 * logit_error * (1 + logit_error) + (p + kept * (labels.unsqueeze(1) == torch.arange(V))) * (
        eps + V * eps32
    )
    onehot = (labels.unsqueeze(1) == torch.arange(V)).double() + p
    blocks = -(-M // (chunk_size or M))
    for out, want, move, magnitude in (
        (found[0], wanted[0], moved @ w, onehot @ w),
        (found[1], wanted[1], moved.T @ h, onehot.T @ h),
        (found[2], wanted[2], moved.sum(0), onehot.sum(0)),
    ):
        assert out.dtype == dtype
        tiny = torch.finfo(dtype).smallest_normal * (M + V)  # what underflows in the product, in float16
        bound = (move + ((M + V) * eps32 + 2 * eps + blocks * eps / 2) * magnitude) / count + eps * want.abs() + tiny
        assert ((out.double() - want).abs() <= bound).all()


def test_float64_is_exact():
    """Would catch a softmax left in float32."""
    tensors, labels = make(20, 31, 9, torch.float64)
    loss, found = grads(lambda h, w, b: linear_cross_entropy(h, w, labels, bias=b, chunk_size=6), tensors)
    truth, wanted = fp64(tensors, labels)
    assert loss.dtype == torch.float64
    for out, want in zip([loss, *found], [truth, *wanted], strict=True):
        torch.testing.assert_close(out, want, rtol=1e-13, atol=1e-14)


def test_gradcheck():
    """Would catch any gradient formula that is only nearly right."""
    tensors, labels = make(7, 6, 4, torch.float64)

    def run(h, w, b):
        return linear_cross_entropy(h.view(1, 7, 4), w, labels.view(1, 7), bias=b, chunk_size=3, shift=True)

    assert torch.autograd.gradcheck(run, [t.detach().clone().requires_grad_() for t in tensors])


@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 2)])
def test_only_what_is_asked_for(which):
    """Would catch a frozen lm_head that costs a gradient, and a trained one whose gradient needs the others'."""
    tensors, labels = make(12, 9, 5)
    _, wanted = fp64(tensors, labels)
    for i, t in enumerate(tensors):
        t.requires_grad_(i in which)
    linear_cross_entropy(tensors[0], tensors[1], labels, bias=tensors[2]).backward()
    for i, (t, want) in enumerate(zip(tensors, wanted, strict=True)):
        assert (t.grad is not None) == (i in which)
        if i in which:
            torch.testing.assert_close(t.grad.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("M", [0, 9])
def test_no_labels(M):
    """Would catch NaN gradients where no token counts (a batch that is all prompt), and an empty batch that fails."""
    (hidden, weight, _), labels = make(M, 11, 4, ignored=1.1)
    total = linear_cross_entropy(hidden, weight, labels, reduction="sum")
    total.backward()
    assert total == 0 and not hidden.grad.any() and not weight.grad.any()
    mean = linear_cross_entropy(hidden, weight, labels)
    assert mean.isnan() and cross_entropy(linear(hidden, weight), labels).isnan(), "torch says the same"
    assert linear_cross_entropy(hidden, weight, labels, num_items_in_batch=5) == 0


def test_shift_is_that_of_transformers():
    """Would catch a label that is the token itself, or one taken from the next sequence."""
    loss_utils = pytest.importorskip("transformers.loss.loss_utils")
    (hidden, weight, _), labels = make(24, 13, 6)
    hidden, labels = hidden.view(2, 12, 6), labels.view(2, 12)
    for items in (None, torch.tensor(31), 31):
        want = loss_utils.ForCausalLMLoss(linear(hidden, weight), labels, 13, num_items_in_batch=items)
        found = linear_cross_entropy(hidden, weight, labels, shift=True, num_items_in_batch=items)
        torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-7)


def test_a_loss_scale_does_not_overflow_or_vanish_in_float16():
    """Would catch gradients divided by the number of tokens before a loss scale comes: in float16 they are zero."""
    hidden, weight = torch.randn(64, 32).half().requires_grad_(), (torch.randn(50, 32) / 1000).half()
    labels = torch.randint(0, 50, (64,))
    scale = 65536.0
    (linear_cross_entropy(hidden, weight, labels, num_items_in_batch=65536 * 100) * scale).backward()
    (found,) = [hidden.grad.double()]
    wide = hidden.detach().double().requires_grad_()
    (cross_entropy(linear(wide, weight.double()), labels, reduction="sum") / 100).backward()
    assert found.isfinite().all() and found.abs().max() > 0
    assert (found - wide.grad).abs().max() <= 4 * torch.finfo(torch.half).eps * wide.grad.abs().max()


@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, False, False)])
def test_operator_passes_opcheck(needs):
    """Would catch a fake that lies about shapes, or an autograd formula that tracing does not see."""
    tensors, labels = make(9, 8, 5)
    tensors = [t.detach().contiguous().requires_grad_(need) for t, need in zip(tensors, needs, strict=True)]
    results = torch.library.opcheck(_operator, (*tensors, labels, IGNORE, 4, list(needs)))
    assert set(results.values()) == {"SUCCESS"}


def test_compiles_without_a_graph_break():
    """Would catch a check that Dynamo cannot trace, and a backward through the operator that differs."""
    tensors, labels = make(10, 12, 6)

    def run(h, w, b):
        return 3 * linear_cross_entropy(h, w, labels, bias=b, chunk_size=4)

    eager, compiled = (grads(f, tensors) for f in (run, torch.compile(run, backend="aot_eager", fullgraph=True)))
    assert torch.equal(eager[0], compiled[0])
    for a, b in zip(eager[1], compiled[1], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_the_loss_in_that_dtype(dtype):
    """Would catch autocast that rounds the widened operands again, or gradients that come back in 16 bits."""
    tensors, labels = make(12, 9, 5)
    with torch.autocast("cpu", dtype=dtype):
        loss, found = grads(lambda h, w, b: linear_cross_entropy(h, w, labels, bias=b), tensors)
    cast = [t.detach().to(dtype).requires_grad_() for t in tensors]
    want, wanted = grads(lambda h, w, b: linear_cross_entropy(h, w, labels, bias=b), cast)
    assert torch.equal(loss, want)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b.float())


def test_keeps_one_gradient_and_holds_one_block():
    """Would catch logits of all tokens, or of two blocks at once, and more kept for backward than a gradient."""
    M, V, K, rows = 512, 4000, 16, 32
    hidden, weight = torch.randn(M, K).requires_grad_(), torch.randn(V, K)
    labels = torch.randint(0, V, (M,))
    with LiveBytes([hidden, weight, labels]) as live:
        kept = MODULE._forward(hidden.detach(), weight, None, labels, IGNORE, rows, (True, False, False))
    assert sum(t.nbytes for t in kept if t is not None) == hidden.nbytes + 4
    assert live.peak <= hidden.nbytes + 1.05 * rows * V * 4 + rows * K * 4 + 100 * rows * 8
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes), lambda t: t):
        linear_cross_entropy(hidden, weight, labels, reduction="sum")
    assert saved == [hidden.nbytes]
    with torch.no_grad(), LiveBytes([hidden, weight, labels]) as live:
        MODULE._forward(hidden, weight, None, labels, IGNORE, rows, (False, False, False))
    assert live.peak <= 1.05 * rows * V * 4 + 100 * rows * 8, "nothing of the hidden states' size without gradients"


def test_block_size_follows_the_vocabulary():
    """Would catch a block of no rows for a huge vocabulary, and one beyond its budget."""
    assert chunk_rows(128256) == 256 and chunk_rows(1 << 40) == 1
    for vocabulary in (1, 255, 32000, 151936, 262144, 10**6):
        assert 4 * chunk_rows(vocabulary) * vocabulary <= MODULE.CHUNK_BYTES


def test_double_backward_is_refused():
    """Would catch a second derivative that silently misses the softmax."""
    (hidden, weight, _), labels = make(5, 4, 3)
    loss = linear_cross_entropy(hidden, weight, labels)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_gradients_are_repeatable_bit_for_bit():
    """Would catch a reduction whose order changes, and a backward that writes into what it kept."""
    (hidden, weight, _), labels = make(40, 30, 8)
    loss = linear_cross_entropy(hidden, weight, labels, chunk_size=7)
    first, second = (torch.autograd.grad(loss, (hidden, weight), retain_graph=True) for _ in range(2))
    again = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels, chunk_size=7), (hidden, weight))
    for a, b, c in zip(first, second, again, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_unbounded_logits_stay_finite():
    """Would catch an exponential taken before the maximum is subtracted."""
    hidden, weight = torch.tensor([[1e4, 0.0]], requires_grad=True), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    loss = linear_cross_entropy(hidden, weight, torch.tensor([1]))
    loss.backward()
    assert loss == 2e4
    assert_rounded(hidden.grad, torch.tensor([[2.0, 0.0]]).double(), torch.full((1, 2), 2.0).double(), terms=2)


BAD = [
    ({"hidden": [1.0]}, TypeError, "hidden: expected a tensor"),
    ({"hidden": torch.ones(3, 4, dtype=torch.int64)}, TypeError, "hidden: expected float32"),
    ({"weight": torch.ones(5, 4, dtype=torch.float16)}, TypeError, "weight: expected hidden's dtype"),
    ({"weight": torch.ones(5, 3)}, ValueError, r"hidden: expected shape \[..., 3\]"),
    ({"weight": torch.ones(5)}, ValueError, "weight: expected"),
    ({"labels": torch.zeros(2, dtype=torch.int64)}, ValueError, r"labels: expected shape \[3\], got \[2\]"),
    ({"labels": torch.zeros(3)}, TypeError, "labels: expected int64"),
    ({"bias": torch.ones(4)}, ValueError, r"bias: expected shape \[5\]"),
    ({"reduction": "none"}, ValueError, "reduction: expected 'mean' or 'sum'"),
    ({"reduction": "sum", "num_items_in_batch": 3}, ValueError, "num_items_in_batch"),
    ({"chunk_size": 0}, ValueError, "chunk_size: expected"),
    ({"chunk_size": True}, ValueError, "chunk_size: expected"),
]


@pytest.mark.parametrize("change, error, words", BAD)
def test_wrong_arguments_are_named(change, error, words):
    """Would catch a shape that broadcasts, or a message from deep inside torch."""
    arguments = {"hidden": torch.ones(3, 4), "weight": torch.ones(5, 4), "labels": torch.tensor([0, 4, 2])} | change
    with pytest.raises(error, match=words):
        linear_cross_entropy(**arguments)


@pytest.mark.parametrize("label", [5, -1])
def test_a_label_outside_the_vocabulary_is_refused(label):
    """Would catch a loss of whatever lies at that place in memory."""
    with pytest.raises(ValueError, match="labels"):
        linear_cross_entropy(torch.ones(3, 4), torch.ones(5, 4), torch.tensor([0, label, 2]))
