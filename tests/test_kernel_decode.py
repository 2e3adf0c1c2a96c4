"""Decoding (at most 16 rows, two launches) against fp64: S within its own bound, y within a bound from S as stored."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from numerics import assert_rounded, padded_randn
from peftkern import reference
from peftkern_kernels.dropout import Dropout
from peftkern_kernels.launch import run_all
from peftkern_kernels.lora_decode import decode_calls

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def run(M, N, K, R, dtype, device, *, adapter_dtype=None, transposed=False, bias=False, p=0.0, scaling=1.75):
    """Returns (y with a canary row, S with a canary row)."""
    adapter_dtype = adapter_dtype or dtype
    x = padded_randn(M, K, pad=1, dtype=dtype, device=device)
    weight = padded_randn(*((K, N) if transposed else (N, K)), pad=2, dtype=dtype, device=device)
    weight = weight.t() if transposed else weight
    a = padded_randn(R, K, pad=3, dtype=adapter_dtype, device=device)
    b = padded_randn(N, R, pad=4, dtype=adapter_dtype, device=device)
    vector = padded_randn(1, N, pad=1, dtype=dtype, device=device)[0] if bias else None
    dropout = Dropout(torch.tensor([-(5 << 33) - 9], dtype=torch.int64, device=device), p) if p else None
    out = torch.full((M + 1, N + 1), float("nan"), dtype=dtype, device=device)
    s = torch.full((M + 1, R + 1), float("nan"), dtype=dtype, device=device)
    run_all(decode_calls(x, weight, a, b, scaling, out[:M, :N], s[:M, :R], bias=vector, dropout=dropout, arch=0))

    keep = reference.dropout_mask(dropout.seed, M, K, p).double() / (1 - p) if p else 1.0
    dropped, factor = x.double() * keep, abs(scaling)
    # fp32 masters are cast to dtype in registers: eps/2 of the magnitude each.
    cast = 1.0 if adapter_dtype != dtype else 0.0
    s_truth = scaling * dropped @ a.double().T
    assert_rounded(s[:M, :R], s_truth, factor * dropped.abs() @ a.double().abs().T, terms=K + 4, rounded=cast)
    low_rank = s[:M, :R].double()  # S as rounded and kept: y must use exactly that
    truth = x.double() @ weight.double().T + low_rank @ b.double().T
    magnitude = x.double().abs() @ weight.double().abs().T + low_rank.abs() @ b.double().abs().T
    if vector is not None:
        truth, magnitude = truth + vector.double(), magnitude + vector.double().abs()
    assert_rounded(out[:M, :N], truth, magnitude, terms=K + R + 4, rounded=cast)
    assert out[M].isnan().all() and out[:M, N:].isnan().all(), "stored past the edge of y"
    assert s[M].isnan().all() and s[:M, R:].isnan().all(), "stored past the edge of S"
    return out, s


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "M, N, K, R",
    [(1, 1, 1, 1), (1, 17, 33, 3), (16, 130, 200, 12), (7, 130, 64, 16), (3, 70, 1030, 40), (2, 65, 520, 70)],
)
def test_decode_matches_fp64(M, N, K, R, dtype, device):
    """K 520 and 1030 are split. Catches a part of K read twice or left out, A's programs taken for W's, S rounded
    before it is scaled, and a y that uses another S than the one it keeps."""
    run(M, N, K, R, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias_dropout_masters_and_a_transposed_weight(dtype, device):
    """Dropout falls on A's x alone: catches a mask of x W^T, and columns of a split K that draw another part's mask."""
    run(5, 70, 530, 12, dtype, device, bias=True, p=0.1, adapter_dtype=torch.float32, transposed=True)
    run(16, 33, 70, 3, dtype, device, p=0.9, scaling=-0.3)


def test_same_bits_twice(device):
    """Catches planes that are added in order of arrival."""
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        results.append(run(3, 70, 1030, 12, torch.float32, device))
    assert torch.equal(results[0][0][:3, :70], results[1][0][:3, :70])
    assert torch.equal(results[0][1][:3, :12], results[1][1][:3, :12])


def test_row_limit_and_no_rows(device):
    """More than 16 rows would be dropped in silence; none would be a grid of no programs."""
    x, w, a, b = (torch.randn(shape, device=device) for shape in ((17, 8), (6, 8), (2, 8), (6, 2)))
    out, s = torch.empty(17, 6, device=device), torch.empty(17, 2, device=device)
    with pytest.raises(ValueError, match="x: expected at most 16 rows.*got 17"):
        decode_calls(x, w, a, b, 1.0, out, s, arch=0)
    assert decode_calls(x[:0], w, a, b, 1.0, out[:0], s[:0], arch=0) == []
