"""The shrink kernel, S = scaling * drop(x) A^T, against fp64: any strides, any sizes, split or not, with its mask."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from numerics import arch_of, assert_rounded, padded_randn  # noqa: E402
from peftkern import reference  # noqa: E402
from peftkern_kernels.dropout import Dropout  # noqa: E402
from peftkern_kernels.launch import run_all  # noqa: E402
from peftkern_kernels.lora_shrink import shrink_calls  # noqa: E402
from peftkern_kernels.reduction_tables import Tile  # noqa: E402

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [(1, 1, 1), (17, 33, 3), (65, 200, 12), (65, 33, 16), (17, 200, 40), (17, 33, 70)]  # M, K, R


def check(x, a, *, scaling=0.75, dropout=None, out_dtype=None, splits=None, tile=None):
    """Run into a NaN-filled larger matrix, compare with fp64, and see that nothing was stored outside."""
    (M, K), R = x.shape, a.shape[0]
    storage = torch.full((M + 1, R + 3), float("nan"), dtype=out_dtype or x.dtype, device=x.device)
    out = storage[:M, :R]
    calls = shrink_calls(
        x, a, out, scaling=scaling, dropout=dropout, arch=arch_of(x.device.type), splits=splits, tile=tile
    )
    run_all(calls)
    x64, a64 = x.double(), a.to(x.dtype).double()  # masters are rounded to x's dtype, by contract
    if dropout is not None:
        x64 = x64 * reference.dropout_mask(dropout.seed, M, K, dropout.p) * dropout.keep_scale
    truth, magnitude = scaling * x64 @ a64.T, abs(scaling) * x64.abs() @ a64.abs().T
    assert_rounded(out, truth, magnitude, terms=K + 2)  # K products, and the scale's own two roundings
    assert storage[M].isnan().all() and storage[:, R:].isnan().all(), "stored outside [M, R]"
    return out, calls


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M, K, R", SIZES)
def test_matches_fp64(M, K, R, dtype, device):
    """Bugs: a mask that forgets an edge (NaN beside the matrices), a rank padded with neighbours, a wrong scale."""
    x = padded_randn(M, K, pad=3, dtype=dtype, device=device)
    a = padded_randn(R, K, pad=5, dtype=dtype, device=device)
    check(x, a)


@pytest.mark.parametrize("dtype", DTYPES)
def test_split_over_k(dtype, device):
    """Bugs: a chunk boundary counted twice or never, planes mixed up, the scale applied in both stages."""
    x = padded_randn(17, 200, pad=1, dtype=dtype, device=device)
    a = padded_randn(12, 200, pad=2, dtype=dtype, device=device)
    tile = Tile(16, 32, 16, 4, 2)
    for splits in (2, 5, 64):  # 7 steps of 32: uneven shares, and more shares than steps
        _, calls = check(x, a, splits=splits, tile=tile)
        assert len(calls) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fp32_masters(dtype, device):
    """Bug: fp32 adapters multiplied in fp32 (slow) or reinterpreted, in place of rounded to x's dtype in registers."""
    x = padded_randn(17, 130, pad=3, dtype=dtype, device=device)
    check(x, padded_randn(12, 130, pad=1, dtype=torch.float32, device=device))
    check(x, padded_randn(12, 130, pad=1, dtype=torch.float32, device=device), out_dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transposed_operands(dtype, device):
    """Bugs: strides swapped (dS passes B transposed), or a stride of 1 taken for granted."""
    b = padded_randn(130, 12, pad=3, dtype=dtype, device=device)  # B [N, R]; its transpose is a [R, N]
    dy = padded_randn(65, 130, pad=2, dtype=dtype, device=device)
    check(dy, b.t())
    check(padded_randn(130, 17, pad=2, dtype=dtype, device=device).t(), b.t())
    check(padded_randn(17, 260, pad=2, dtype=dtype, device=device)[:, ::2], b.t())  # neither stride is 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("splits", [1, 3])
def test_dropout(dtype, splits, device):
    """Bugs: mask drawn for the tile's rather than the matrix's rows or columns, 1 / (1 - p) missing or doubled."""
    x = padded_randn(65, 200, pad=3, dtype=dtype, device=device)
    a = padded_randn(12, 200, pad=1, dtype=dtype, device=device)
    seed = torch.tensor([-(2**62) + 12345], device=device)
    check(x, a, dropout=Dropout(seed, 0.3), splits=splits, tile=Tile(32, 32, 16, 4, 2))


def test_same_bits_twice(device):
    """Bug: a reduction whose order depends on scheduling."""
    x = padded_randn(65, 200, pad=0, dtype=torch.bfloat16, device=device)
    a = padded_randn(12, 200, pad=0, dtype=torch.bfloat16, device=device)
    first, _ = check(x, a, splits=4, tile=Tile(32, 32, 16, 4, 2))
    second, _ = check(x, a, splits=4, tile=Tile(32, 32, 16, 4, 2))
    assert torch.equal(first, second)


def test_empty_and_refused(device):
    """Bugs: a grid of zero programs launched; shapes that disagree read out of bounds."""
    out = torch.empty(0, 4, device=device)
    x, a = torch.empty(0, 8, device=device), torch.empty(4, 8, device=device)
    assert shrink_calls(x, a, out, scaling=1.0, arch=arch_of(device)) == []
    with pytest.raises(ValueError, match=r"a, out: expected \[R, 8\]"):
        shrink_calls(torch.empty(3, 8), torch.empty(4, 9), torch.empty(3, 4), scaling=1.0, arch=0)


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120, 942, 1100])
def test_launches_at_real_shapes(arch):
    """Bugs: a second launch where rows alone fill the device; a device left idle at M 512; traffic miscounted."""

    def calls(M, K, R):
        x, a, out = (torch.empty(s, dtype=torch.bfloat16, device="meta") for s in ((M, K), (R, K), (M, R)))
        return shrink_calls(x, a, out, scaling=1.0, arch=arch)

    s1 = calls(8192, 4096, 16)
    assert s1[0].bytes >= 2 * (8192 * 4096 + 16 * 4096) and s1[0].flops == 2 * 8192 * 4096 * 16
    assert sum(c.bytes for c in s1) < 1.10 * 2 * 8192 * 4096, "planes cost more than a tenth of reading x"
    if arch in (86, 89, 90, 100, 120):  # 128 programs: about one wave
        assert len(s1) == 1
        assert s1[0].bytes == 2 * (8192 * 4096 + 16 * 4096 + 8192 * 16)
    if arch == 90:
        small = calls(512, 4096, 16)
        assert len(small) == 2 and small[0].grid[0] * small[0].grid[1] >= 64
