"""One pass over dY for dS = scaling * dY B and dB = dY^T S, against fp64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from numerics import arch_of, assert_rounded, padded_randn  # noqa: E402
from peftkern_kernels.launch import run_all  # noqa: E402
from peftkern_kernels.lora_dy_pass import dy_pass_calls  # noqa: E402
from peftkern_kernels.reduction_tables import Tile  # noqa: E402

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SMALL = Tile(16, 32, 16, 4, 2)  # several blocks of columns and shares of rows even in a small test


def framed(rows, columns, dtype, device):
    """(storage full of NaN, the [rows, columns] view of it that a kernel may write)."""
    storage = torch.full((rows + 1, columns + 3), float("nan"), dtype=dtype, device=device)
    return storage, storage[:rows, :columns]


def check(dy, b, s, *, scaling=0.75, out_dtype=None, arch=None, **options):
    """Run into NaN-filled larger matrices, compare both outputs with fp64, and see that nothing was stored outside."""
    (M, N), R, dtype = dy.shape, b.shape[1], out_dtype or dy.dtype
    ds_storage, ds = framed(M, R, dtype, dy.device)
    db_storage, db = framed(N, R, dtype, dy.device)
    arch = arch_of(dy.device.type) if arch is None else arch
    run_all(dy_pass_calls(dy, b, s, ds, db, scaling=scaling, arch=arch, **options))
    dy64, b64, s64 = dy.double(), b.to(dy.dtype).double(), s.to(dy.dtype).double()
    assert_rounded(ds, scaling * dy64 @ b64, scaling * dy64.abs() @ b64.abs(), terms=N + 2)
    assert_rounded(db, dy64.T @ s64, dy64.abs().T @ s64.abs(), terms=M + 2)
    for storage, out in ((ds_storage, ds), (db_storage, db)):
        rows, columns = out.shape
        assert storage[rows].isnan().all() and storage[:, columns:].isnan().all(), "stored outside the output"
    return ds, db


def operands(M, N, R, dtype, device):
    shapes = [(M, N), (N, R), (M, R)]  # dy, b, s
    return [padded_randn(*shape, pad=i + 1, dtype=dtype, device=device) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M, N, R", [(1, 1, 1), (17, 130, 3), (65, 17, 12), (17, 33, 16), (17, 130, 40)])
def test_matches_fp64(M, N, R, dtype, device):
    """Bugs: planes of dS and dB mixed up, an edge of rows or columns forgotten, the scaling on dB."""
    check(*operands(M, N, R, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shares", [1, 3])
def test_many_blocks(dtype, shares, device):
    """Bugs: rows at a share's boundary counted twice or never; dS summed over the wrong planes."""
    check(*operands(65, 130, 12, dtype, device), tile=SMALL, shares=shares)
    check(*operands(65, 130, 40, dtype, device), tile=SMALL, shares=shares)  # three blocks along the rank


@pytest.mark.parametrize("arch", [80, 0])
def test_both_ways_of_reading_the_tile(arch):
    """Bug: the copy that sm_80's variant loads transposed has other masks than the first."""
    check(*operands(65, 130, 12, torch.bfloat16, "cpu"), arch=arch, tile=SMALL, shares=2)
    check(*operands(17, 32, 12, torch.float32, "cpu"), arch=arch, tile=SMALL, shares=1)


def test_fp32_masters(device):
    """Bug: gradients of fp32 adapters rounded to bf16 on the way, or B multiplied unrounded."""
    dy, _, s = operands(17, 130, 12, torch.bfloat16, device)
    check(dy, padded_randn(130, 12, pad=1, dtype=torch.float32, device=device), s, out_dtype=torch.float32)


def test_any_strides(device):
    """Bug: columns taken for contiguous."""
    dy, b, s = operands(34, 66, 12, torch.float32, device)
    check(dy[:, ::2], b[::2], s)
    check(dy.t().contiguous().t(), b.t().contiguous().t(), s.t().contiguous().t())


def test_same_bits_twice(device):
    """Bug: a reduction whose order depends on scheduling."""
    tensors = operands(65, 130, 12, torch.bfloat16, device)
    first, second = (check(*tensors, tile=SMALL, shares=3) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_no_rows_and_refused(device):
    """Bugs: an empty batch leaves dB as the allocator found it; disagreeing shapes read out of bounds."""
    dy, b, s = operands(0, 17, 4, torch.float32, device)
    db = torch.full((17, 4), float("nan"), device=device)
    run_all(dy_pass_calls(dy, b, s, torch.empty(0, 4, device=device), db, scaling=1.0, arch=arch_of(device)))
    assert (db == 0).all()
    with pytest.raises(ValueError, match=r"s, ds_out: expected \[0, 4\]"):
        dy_pass_calls(dy, b, torch.empty(1, 4), torch.empty(0, 4), db, scaling=1.0, arch=0)


@pytest.mark.parametrize("R", [8, 16, 32])
def test_pays_at_s1(R):
    """Bug: planes so many that a second reading of dY would have cost less (compared with that reading alone)."""
    M, N = 8192, 4096
    dy, b, s, ds, db = (
        torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in [(M, N), (N, R), (M, R), (M, R), (N, R)]
    )
    one_pass = sum(c.bytes for c in dy_pass_calls(dy, b, s, ds, db, scaling=1.0, arch=90))
    assert one_pass < 2 * dy.numel() * dy.element_size()
