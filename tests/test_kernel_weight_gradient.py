"""dA = dS^T drop(x) and dB = dY^T S in one launch, against fp64; and the sum of planes by itself."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from numerics import arch_of, assert_rounded, padded_randn  # noqa: E402
from peftkern import reference  # noqa: E402
from peftkern_kernels.dropout import Dropout  # noqa: E402
from peftkern_kernels.launch import run_all  # noqa: E402
from peftkern_kernels.reduce import PlaneSum, reduce_calls  # noqa: E402
from peftkern_kernels.reduction_tables import Tile  # noqa: E402
from peftkern_kernels.weight_gradient import weight_gradient_calls  # noqa: E402

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [(1, 1, 1, 1), (17, 17, 33, 3), (65, 130, 200, 12), (65, 17, 33, 16), (17, 130, 33, 40), (17, 17, 200, 70)]


def framed(rows, columns, dtype, device):
    """(storage full of NaN, the [rows, columns] view of it that a kernel may write)."""
    storage = torch.full((rows + 1, columns + 3), float("nan"), dtype=dtype, device=device)
    return storage, storage[:rows, :columns]


def check(ds, x, s, dy, *, out_dtype=None, dropout=None, splits=None, tile=None, arch=None):
    """Run into NaN-filled larger matrices, compare both outputs with fp64, and see that nothing was stored outside."""
    M, R = ds.shape
    K, N, dtype, device = x.shape[1], dy.shape[1], out_dtype or x.dtype, x.device
    da_storage, da = framed(R, K, dtype, device)
    db_storage, db = framed(N, R, dtype, device)
    arch = arch_of(device.type) if arch is None else arch
    calls = weight_gradient_calls(ds, x, s, dy, da, db, dropout=dropout, arch=arch, splits=splits, tile=tile)
    run_all(calls)
    x64, ds64 = x.double(), ds.to(x.dtype).double()
    dy64, s64 = dy.double(), s.to(dy.dtype).double()
    if dropout is not None:
        x64 = x64 * reference.dropout_mask(dropout.seed, M, K, dropout.p) * dropout.keep_scale
    assert_rounded(da, ds64.T @ x64, ds64.abs().T @ x64.abs(), terms=M + 2)
    assert_rounded(db, dy64.T @ s64, dy64.abs().T @ s64.abs(), terms=M + 2)
    for storage, out in ((da_storage, da), (db_storage, db)):
        rows, columns = out.shape
        assert storage[rows].isnan().all() and storage[:, columns:].isnan().all(), "stored outside the output"
    return da, db, calls


def operands(M, N, K, R, dtype, device):
    shapes = [(M, R), (M, K), (M, R), (M, N)]  # ds, x, s, dy
    return [padded_randn(*shape, pad=i + 1, dtype=dtype, device=device) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M, N, K, R", SIZES)
def test_matches_fp64(M, N, K, R, dtype, device):
    """Bugs: N's programs reading x, edges of one half masked by the other's size, dA stored untransposed."""
    check(*operands(M, N, K, R, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES)
def test_split_over_rows(dtype, device):
    """Bugs: rows at a share's boundary counted twice or never; planes of one half read as the other's."""
    for splits in (2, 4, 64):  # 5 steps of 16 rows: uneven shares, and more shares than steps
        _, _, calls = check(*operands(65, 130, 33, 12, dtype, device), splits=splits, tile=Tile(16, 32, 16, 4, 2))
        assert len(calls) == 2


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout(dtype, splits, device):
    """Bugs: dY masked too, mask transposed, 1 / (1 - p) lost in the split route."""
    dropout = Dropout(torch.tensor([2**62 + 7], device=device), 0.3)
    check(*operands(65, 17, 200, 12, dtype, device), dropout=dropout, splits=splits, tile=Tile(16, 64, 16, 4, 2))


@pytest.mark.parametrize("arch", [80, None])
def test_dropout_of_many_ranks(arch, device):
    """Bugs: the product that is turned, so that the masked tile is its second operand, stored as it comes; the one that
    is not, where all operands are in registers, stored transposed."""
    dropout = Dropout(torch.tensor([2**62 + 7], device=device), 0.3)
    tile = Tile(16, 64, 64, 4, 2)
    *_, calls = check(*operands(33, 17, 70, 40, torch.bfloat16, device), dropout=dropout, tile=tile, arch=arch)
    assert calls[0].constants["TURNED"] is (arch is None)


@pytest.mark.parametrize("splits", [1, 3])
def test_wider_and_narrower_dtypes(splits, device):
    """Bugs: fp32 dS reinterpreted as bf16; gradients of fp32 masters rounded to bf16 on the way."""
    ds, x, s, dy = operands(65, 17, 33, 12, torch.bfloat16, device)
    tile = Tile(16, 32, 16, 4, 2)
    check(ds, x, s, dy, out_dtype=torch.float32, splits=splits, tile=tile)
    check(ds.float() * 1.001, x, s.float() * 1.001, dy, out_dtype=torch.float32, splits=splits, tile=tile)


def test_any_strides(device):
    """Bug: columns taken for contiguous."""
    ds, x, s, dy = operands(65, 34, 66, 12, torch.float32, device)
    check(ds[:, ::2], x[:, ::2], s[:, 1::2], dy[:, ::2])
    check(ds.t().contiguous().t(), x.t().contiguous().t(), s, dy.t().contiguous().t())


@pytest.mark.parametrize("splits", [1, 2])
def test_either_half_alone(splits, device):
    """Bugs: the absent half's programs launched on null pointers; the present half shifted by its blocks."""
    ds, x, s, dy = operands(65, 130, 33, 12, torch.float32, device)
    both_da, both_db, _ = check(ds, x, s, dy, splits=splits, tile=Tile(16, 32, 16, 4, 2))
    da, db = torch.full_like(both_da, float("nan")), torch.full_like(both_db, float("nan"))
    keywords = {"arch": arch_of(device), "splits": splits, "tile": Tile(16, 32, 16, 4, 2)}
    run_all(weight_gradient_calls(ds, x, None, None, da, None, **keywords))
    run_all(weight_gradient_calls(None, None, s, dy, None, db, **keywords))
    assert torch.equal(da, both_da) and torch.equal(db, both_db)
    assert weight_gradient_calls(None, None, None, None, None, None, arch=0) == []
    with pytest.raises(ValueError, match="s, dy, db_out: expected all three or none"):
        weight_gradient_calls(ds, x, s, None, da, None, arch=0)


def test_no_rows_give_zeros(device):
    """Bug: an empty batch leaves the gradients as the allocator found them."""
    ds, x, s, dy = operands(0, 17, 33, 4, torch.float32, device)
    da, db = torch.full((4, 33), float("nan"), device=device), torch.full((17, 4), float("nan"), device=device)
    run_all(weight_gradient_calls(ds, x, s, dy, da, db, arch=arch_of(device)))
    assert (da == 0).all() and (db == 0).all()


def test_same_bits_twice(device):
    """Bug: a reduction whose order depends on scheduling."""
    tensors = operands(65, 130, 200, 12, torch.bfloat16, device)
    first = check(*tensors, splits=3, tile=Tile(16, 64, 16, 4, 2))
    second = check(*tensors, splits=3, tile=Tile(16, 64, 16, 4, 2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.parametrize("P, J", [(1, 1), (3, 12), (4, 16), (9, 130)])
def test_sum_of_planes(P, J, device):
    """Bugs: the last planes of an unrolled loop skipped or read past; a transposed store; a wrong scale."""
    first, second = torch.randn(P + 1, 17, J, device=device), torch.randn(P + 3, 65, J, device=device)
    first[P:], second[P + 2 :] = float("nan"), float("nan")  # what lies behind the planes must not be read
    first_storage, out = framed(17, J, torch.bfloat16, device)
    second_storage, transposed = framed(J, 65, torch.float32, device)
    run_all(reduce_calls([PlaneSum(first[:P], out, 0.5), PlaneSum(second[: P + 2], transposed.t(), 3.0)], arch=0))
    for o, planes, scale in ((out, first[:P], 0.5), (transposed.t(), second[: P + 2], 3.0)):
        assert_rounded(o, scale * planes.double().sum(0), scale * planes.double().abs().sum(0), terms=P + 2)
    assert first_storage[17].isnan().all() and second_storage[J].isnan().all()


def test_traffic_at_s1():
    """Bug: planes left out of the traffic, or so many that they cost over a twentieth of reading x and dY."""
    M, N, K, R = 8192, 4096, 4096, 16
    shapes = [(M, R), (M, K), (M, R), (M, N), (R, K), (N, R)]
    calls = weight_gradient_calls(*(torch.empty(s, dtype=torch.bfloat16, device="meta") for s in shapes), arch=90)
    splits = calls[0].grid[1]
    assert calls[0].bytes == 2 * (M * K + M * N + 2 * M * R) + 4 * splits * (K + N) * R
    assert sum(c.bytes for c in calls) < 1.05 * 2 * M * (K + N)
