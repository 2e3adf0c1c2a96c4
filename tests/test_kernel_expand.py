"""The low-rank part by itself (the route on which cuBLAS then accumulates x W^T) against fp64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from numerics import assert_rounded, padded_randn
from peftkern import reference
from peftkern_kernels.dropout import Dropout
from peftkern_kernels.launch import run_all
from peftkern_kernels.lora_expand import expand_calls

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def check(M, N, R, dtype, device, *, adapter_dtype=None, transposed=False, bias=False, p=0.0):
    s = padded_randn(M, R, pad=1, dtype=dtype, device=device)
    b = padded_randn(*((R, N) if transposed else (N, R)), pad=2, dtype=adapter_dtype or dtype, device=device)
    b = b.t() if transposed else b
    vector = padded_randn(1, N, pad=1, dtype=dtype, device=device)[0] if bias else None
    dropout = Dropout(torch.tensor([7 << 40 | 3], dtype=torch.int64, device=device), p) if p else None
    out = torch.full((M + 1, N + 3), float("nan"), dtype=dtype, device=device)
    run_all(expand_calls(s, b, out[:M, :N], bias=vector, dropout=dropout, arch=0))

    keep = reference.dropout_mask(dropout.seed, M, N, p).double() / (1 - p) if p else 1.0
    truth = keep * (s.double() @ b.double().T)
    magnitude = keep * (s.double().abs() @ b.double().abs().T)
    if vector is not None:
        truth, magnitude = truth + vector.double(), magnitude + vector.double().abs()
    # One more rounding where fp32 masters are cast in registers.
    cast = 1.0 if adapter_dtype not in (None, dtype) else 0.0
    assert_rounded(out[:M, :N], truth, magnitude, terms=R + 2, rounded=cast)
    assert out[M].isnan().all() and out[:M, N:].isnan().all(), "stored past the edge"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("M, N, R", [(1, 1, 1), (17, 17, 3), (65, 130, 12), (33, 40, 70), (64, 64, 16), (5, 9, 130)])
def test_expand_matches_fp64(M, N, R, transposed, dtype, device):
    """Catches ranks read past R (NaN padding), a missing last step, and a wrong stride of a transposed factor."""
    check(M, N, R, dtype, device, transposed=transposed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.1, 0.9])
def test_bias_dropout_and_fp32_masters(dtype, p, device):
    """Catches a mask on the bias, a mask of another tile's coordinates, and a dot of mixed dtypes."""
    check(65, 130, 12, dtype, device, p=p, bias=True, adapter_dtype=torch.float32)
    check(65, 130, 12, dtype, device, p=p, transposed=True)


def test_then_accumulating_in_place_gives_the_layer(device):
    """The route with cuBLAS: `out.addmm_(x, W^T)` on the expand's result. Two roundings of y, so one more eps/2."""
    M, N, K, R = 33, 20, 50, 4
    x, w, s, b, bias = (torch.randn(shape, device=device) for shape in ((M, K), (N, K), (M, R), (N, R), (N,)))
    out = torch.empty(M, N, device=device)
    run_all(expand_calls(s, b, out, bias=bias, arch=0))
    out.addmm_(x, w.t())
    f64 = [t.double() for t in (x, w, s, b, bias)]
    magnitude = f64[0].abs() @ f64[1].abs().T + f64[2].abs() @ f64[3].abs().T + f64[4].abs()
    assert_rounded(out, f64[0] @ f64[1].T + f64[2] @ f64[3].T + f64[4], magnitude, terms=K + R + 1, rounded=1)


def test_no_rows_no_launch_and_same_bits_twice(device):
    """Catches a grid of no programs, and a result that depends on the order of programs."""
    s, b = torch.randn(65, 12, device=device), torch.randn(70, 12, device=device)
    assert expand_calls(s[:0], b, torch.empty(0, 70, device=device), arch=0) == []
    first, second = (torch.empty(65, 70, device=device) for _ in range(2))
    run_all(expand_calls(s, b, first, arch=0))
    run_all(expand_calls(s, b, second, arch=0))
    assert torch.equal(first, second)
