"""LoRA on an embedding: the gather and the deterministic scatter, against fp64 and PyTorch's own embedding."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from numerics import arch_of, assert_rounded, padded_randn  # noqa: E402
from peftkern import reference  # noqa: E402
from peftkern_kernels.launch import run_all  # noqa: E402
from peftkern_kernels.lora_embedding import embedding_backward_calls, embedding_forward_calls  # noqa: E402

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def forward(ids, weight, a, b, scaling):
    T, E, R, device = ids.numel(), weight.shape[1], a.shape[0], ids.device
    y = torch.full((T + 1, E + 2), float("nan"), dtype=weight.dtype, device=device)
    s = torch.full((T + 1, R + 1), float("nan"), dtype=weight.dtype, device=device)
    calls = embedding_forward_calls(ids, weight, a, b, y[:T, :E], s[:T, :R], scaling=scaling, arch=arch_of(device.type))
    run_all(calls)
    assert y[T].isnan().all() and y[:, E:].isnan().all() and s[T].isnan().all() and s[:, R:].isnan().all()
    return y[:T, :E], s[:T, :R]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T, V, E, R", [(1, 5, 1, 1), (17, 40, 130, 12), (65, 9, 33, 40), (3, 7, 33, 70)])
def test_forward_matches_fp64(T, V, E, R, dtype, device):
    """Bugs: A read as [V, R], S stored by no or by the wrong program, ranks past R padded with neighbours."""
    weight = padded_randn(V, E, pad=1, dtype=dtype, device=device)
    a = padded_randn(R, V, pad=2, dtype=torch.float32 if R == 12 else dtype, device=device)
    b = padded_randn(E, R, pad=3, dtype=dtype, device=device)
    ids = torch.randint(V, (T,), device=device, dtype=torch.int32 if R == 12 else torch.int64)
    y, s = forward(ids, weight, a, b, 0.75)
    s_truth = 0.75 * a.double().T[ids]
    assert_rounded(s, s_truth, s_truth.abs(), terms=2)
    truth = reference.lora_embedding(ids, weight.double(), a.double(), b.double(), 0.75)
    low_rank = s_truth.abs() @ b.double().abs().T
    magnitude = weight.double().abs()[ids] + low_rank
    # S is rounded once on the way, and only the low-rank part passes through it.
    share = (low_rank / magnitude).max().item()
    assert_rounded(y, truth, magnitude, terms=R + 3, rounded=share)


def test_id_outside_the_table(device):
    """Bug: an id outside the table reads memory of others; here its row is NaN and the rest is right."""
    weight, a, b = torch.randn(5, 8, device=device), torch.randn(2, 5, device=device), torch.randn(8, 2, device=device)
    y, _ = forward(torch.tensor([1, 5, -1, 4, 2**31 - 1], device=device), weight, a, b, 1.0)
    assert y[[1, 2, 4]].isnan().all() and y[[0, 3]].isfinite().all()


def backward(dy, ids, b, s, V, scaling, out_dtype, padding_idx=-1):
    (_, E), R, device = dy.shape, b.shape[1], dy.device
    da = torch.full((R + 1, V + 2), float("nan"), dtype=out_dtype, device=device)
    db = torch.full((E + 1, R), float("nan"), dtype=out_dtype, device=device)
    calls = embedding_backward_calls(
        dy, ids, b, s, da[:R, :V], db[:E], scaling=scaling, padding_idx=padding_idx, arch=arch_of(device.type)
    )
    run_all(calls)
    assert da[R].isnan().all() and da[:, V:].isnan().all() and db[E].isnan().all()
    return da[:R, :V], db[:E]


def many_ids(kind: str, T: int, V: int) -> torch.Tensor:
    if kind == "one id":
        return torch.full((T,), 3)
    if kind == "all different":
        return torch.randperm(max(T, V))[:T]
    if kind == "half one id":  # as the padding of a batch
        return torch.where(torch.rand(T) < 0.5, torch.tensor(2), torch.randint(V, (T,)))
    return torch.randint(V, (T,))


@pytest.mark.parametrize(
    "kind, T, V, R, dtype",
    [
        ("random", 65, 9, 12, torch.bfloat16),
        ("random", 1, 9, 1, torch.float32),
        ("one id", 300, 9, 12, torch.float32),  # one run over many blocks and two long steps
        ("one id", 16, 9, 12, torch.float32),  # a run that ends with its block
        ("one id", 144, 9, 12, torch.float32),  # a run that ends with its long step
        ("half one id", 200, 40, 16, torch.float16),
        ("all different", 65, 70, 40, torch.bfloat16),
        ("random", 65, 9, 70, torch.float32),
    ],
)
def test_backward_matches_fp64(kind, T, V, R, dtype, device):
    """Bugs: a run that crosses blocks cut or counted twice, columns without tokens left as they were."""
    E = 33
    dy = padded_randn(T, E, pad=1, dtype=dtype, device=device)
    b = padded_randn(E, R, pad=2, dtype=dtype, device=device)
    s = padded_randn(T, R, pad=3, dtype=dtype, device=device)
    ids = many_ids(kind, T, V).to(device)
    da, db = backward(dy, ids, b, s, V, 0.75, torch.float32)
    dy64, b64, s64 = dy.double(), b.double(), s.double()
    ds64, ds_magnitude = 0.75 * dy64 @ b64, 0.75 * dy64.abs() @ b64.abs()
    truth = torch.zeros(V, R, dtype=torch.float64, device=device).index_add_(0, ids, ds64)
    magnitude = torch.zeros_like(truth).index_add_(0, ids, ds_magnitude)
    assert_rounded(da, truth.T, magnitude.T, terms=E + T + 3)
    assert_rounded(db, dy64.T @ s64, dy64.abs().T @ s64.abs(), terms=T + 2)


def test_backward_equals_autograd_of_embedding(device):
    """Bug: another meaning of padding_idx than torch.nn.functional.embedding's, on which PEFT's layer stands."""
    T, V, E, R, scaling, padding_idx = 65, 9, 33, 3, 2.0, 4
    a = torch.randn(R, V, device=device, dtype=torch.float64, requires_grad=True)
    b = torch.randn(E, R, device=device, dtype=torch.float64, requires_grad=True)
    ids, dy = torch.randint(V, (T,), device=device), torch.randn(T, E, device=device)
    embedded = torch.nn.functional.embedding(ids, a.T, padding_idx) @ b.T * scaling
    embedded.backward(dy.double())
    s = (scaling * a.detach().T[ids]).float()
    da, db = backward(dy, ids.int(), b.detach().float(), s, V, scaling, torch.float32, padding_idx)
    torch.testing.assert_close(da.double(), a.grad, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(db.double(), b.grad, rtol=1e-5, atol=1e-4)
    assert (da[:, padding_idx] == 0).all() and a.grad[:, padding_idx].abs().sum() == 0


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # inf times the padding of the rank, never stored
def test_scatter_is_deterministic_and_keeps_inf_in_place(device):
    """Bugs: float atomics; a product with zeros that turns one token's inf into NaN for other words."""
    T, V, R = 65, 9, 12
    b, s, dy = (torch.randn(*shape, device=device) for shape in ((33, R), (T, R), (T, 33)))
    ids = torch.randint(V, (T,), device=device)
    first, second = (backward(dy, ids, b, s, V, 1.0, torch.float32)[0] for _ in range(2))
    assert torch.equal(first, second)
    dy[0, 0] = float("inf")
    da, _ = backward(dy, ids, b, s, V, 1.0, torch.float32)
    others = torch.arange(V, device=device) != ids[0]
    assert da[:, ids[0]].isinf().all()
    assert torch.equal(da[:, others], first[:, others])


def test_one_gradient_alone_and_no_tokens(device):
    """Bugs: the other gradient's launches run on None; an empty batch leaves garbage in the gradients."""
    T, V, E, R = 17, 9, 33, 3
    dy, b, s = (torch.randn(*shape, device=device) for shape in ((T, E), (E, R), (T, R)))
    ids, arch = torch.randint(V, (T,), device=device), arch_of(device)
    both_a, both_b = backward(dy, ids, b, s, V, 1.0, torch.float32)
    da, db = torch.empty(R, V, device=device), torch.empty(E, R, device=device)
    run_all(embedding_backward_calls(dy, ids, b, None, da, None, scaling=1.0, arch=arch))
    run_all(embedding_backward_calls(dy, ids, b, s, None, db, scaling=1.0, arch=arch))
    torch.testing.assert_close(da, both_a)
    torch.testing.assert_close(db, both_b)
    with pytest.raises(ValueError, match="s: expected the forward's"):
        embedding_backward_calls(dy, ids, b, None, da, db, scaling=1.0, arch=arch)
    run_all(embedding_backward_calls(dy[:0], ids[:0], b, s[:0], da, db, scaling=1.0, arch=arch))
    assert (da == 0).all() and (db == 0).all()


def test_many_ids_outside_the_table_end(device):
    """Bug: a run of ids -1 that is followed past the end of the list, where masked loads read -1 too, never ends."""
    T, V, E, R = 40, 9, 8, 3
    dy, b, s = (torch.randn(shape, device=device) for shape in ((T, E), (E, R), (T, R)))
    da, _ = backward(dy, torch.full((T,), -1, device=device), b, s, V, 1.0, torch.float32, padding_idx=3)
    assert torch.equal(da, torch.zeros_like(da))
