"""`ops.lora_embedding` on the plain path, and in Triton's interpreter where a parameter says so."""

from __future__ import annotations

import pytest
import torch

from numerics import assert_rounded, padded_randn
from peftkern import reference, use_backend
from peftkern.ops import lora_embedding
from peftkern.ops.lora_embedding import _operator

SCALING = 0.75


def make(V, E, R, dtype=torch.float32, adapter_dtype=None):
    adapter_dtype = adapter_dtype or dtype
    shapes = [((V, E), dtype), ((R, V), adapter_dtype), ((E, R), adapter_dtype)]
    return [
        padded_randn(*shape, pad=i + 1, dtype=kind).detach().requires_grad_() for i, (shape, kind) in enumerate(shapes)
    ]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "shape, V, E, R, padding_idx", [((7, 9), 40, 33, 5, 3), ((1,), 5, 1, 1, None), ((70,), 9, 64, 16, -1)]
)
def test_output_and_gradients_match_fp64(shape, V, E, R, padding_idx, dtype, backend, device):
    """Would catch a lost repeat of an id, a padding row that trains, and a wrong scaling or transpose."""
    w, a, b = (t.detach().to(device).requires_grad_() for t in make(V, E, R, dtype))
    ids = torch.randint(0, V, shape, device=device)
    dy = torch.randn(*shape, E).to(dtype).to(device)
    with use_backend(backend):
        y = lora_embedding(ids, w, a, b, SCALING, padding_idx=padding_idx)
        y.backward(dy)
    results = []
    for transform in (lambda t: t.detach().double(), lambda t: t.detach().double().abs()):
        wd, ad, bd = (transform(t).requires_grad_() for t in (w, a, b))
        truth = reference.lora_embedding(ids, wd, ad, bd, SCALING)
        truth.backward(transform(dy))
        if padding_idx is not None:
            wd.grad[padding_idx] = 0
            ad.grad[:, padding_idx] = 0
        results.append([truth.detach(), wd.grad, ad.grad, bd.grad])
    tokens = ids.numel()
    outputs = [y.detach(), w.grad, a.grad, b.grad]
    # Rounded on the way: S's product; each step of dW's and dA's sums over a repeated id, dS; S.
    for out, truth, magnitude, rounded in zip(outputs, *results, (3, tokens, tokens + 2, 2), strict=True):
        assert_rounded(out, truth, magnitude, terms=tokens + E + R, rounded=rounded)


def test_gradcheck():
    """Would catch any gradient formula that is only nearly right."""
    w, a, b = (t.detach().double().requires_grad_() for t in make(6, 5, 3))
    ids = torch.tensor([[0, 5, 5], [2, 0, 5]])
    assert torch.autograd.gradcheck(lambda w, a, b: lora_embedding(ids, w, a, b, SCALING), (w, a, b))


def test_operator_passes_opcheck():
    """Would catch a fake that lies about shapes, or an autograd formula that tracing does not see."""
    w, a, b = (t.detach().contiguous().requires_grad_() for t in make(6, 5, 3))
    results = torch.library.opcheck(_operator, (torch.tensor([[0, 5, 5]]), w, a, b, SCALING, -1, "torch"))
    assert set(results.values()) == {"SUCCESS"}


def test_compiles_without_a_graph_break():
    """Would catch a check that Dynamo cannot trace."""
    w, a, b = make(6, 5, 3)
    ids = torch.tensor([[0, 5, 5]])
    compiled = torch.compile(
        lambda i: lora_embedding(i, w, a, b, SCALING, padding_idx=5), backend="aot_eager", fullgraph=True
    )
    grads = []
    for function in (compiled, lambda i: lora_embedding(i, w, a, b, SCALING, padding_idx=5)):
        a.grad = None
        function(ids).sum().backward()
        grads.append(a.grad)
    assert torch.equal(*grads) and not grads[0][:, 5].any() and grads[0][:, 0].any()


def test_masters_keep_their_dtype_and_empty_input_works():
    """Would catch a gradient of an fp32 master that comes back in 16 bits, and a crash without tokens."""
    w, a, b = make(6, 5, 3, torch.bfloat16, torch.float32)
    y = lora_embedding(torch.tensor([1, 2]), w, a, b, SCALING)
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and a.grad.dtype == b.grad.dtype == torch.float32
    empty = lora_embedding(torch.empty(0, 3, dtype=torch.int64), w, a, b, SCALING)
    empty.sum().backward()
    assert empty.shape == (0, 3, 5)


@pytest.mark.parametrize(
    "damage, error, message",
    [
        (lambda i, w, a, b: (i.float(), w, a, b), TypeError, "input: expected int32 or int64"),
        (lambda i, w, a, b: (i, w.int(), a, b), TypeError, "weight: expected float32"),
        (lambda i, w, a, b: (i, w, a.half(), b), TypeError, "lora_A: expected weight's dtype"),
        (lambda i, w, a, b: (i, w, a[:, :-1], b), ValueError, "lora_A: expected shape"),
        (lambda i, w, a, b: (i, w, a, b[:-1]), ValueError, "lora_B: expected shape"),
        (lambda i, w, a, b: ([1], w, a, b), TypeError, "input: expected a tensor"),
    ],
)
def test_wrong_arguments_are_named(damage, error, message):
    """Would catch an error from deep inside torch in place of one that names the argument."""
    tensors = [t.detach() for t in make(6, 5, 3)]
    with pytest.raises(error, match=message):
        lora_embedding(*damage(torch.tensor([1]), *tensors), SCALING)


def test_wrong_padding_and_ids_are_refused():
    """Would catch a padding index that silently trains another row."""
    w, a, b = make(6, 5, 3)
    with pytest.raises(ValueError, match="padding_idx"):
        lora_embedding(torch.tensor([1]), w, a, b, SCALING, padding_idx=6)
    with pytest.raises(IndexError):
        lora_embedding(torch.tensor([6]), w, a, b, SCALING)
