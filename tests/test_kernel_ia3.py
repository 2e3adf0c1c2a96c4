"""IA3's kernels by themselves (scale, scale and sum, GEMM with epilogue) against fp64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from numerics import arch_of, assert_rounded, canvas, padded_randn, untouched
from peftkern_kernels.gemm_tables import Tile
from peftkern_kernels.ia3_gemm import ia3_gemm_calls
from peftkern_kernels.ia3_scale import scale_calls
from peftkern_kernels.ia3_scale_sum import route, scale_sum_calls
from peftkern_kernels.launch import Call, run_all

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [(1, 1), (17, 33), (65, 130), (40, 64)]


def vectors(slots: int, C: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    scale = padded_randn(slots, C, pad=2, dtype=dtype, device=device)
    scale[:, ::5] = 0.0
    return scale


@pytest.mark.parametrize("slots", [0, 1, 5])
@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M, C", SIZES)
def test_scale_matches_fp64(M, C, dtype, masters, slots, device):
    """Catches columns read past C, a row scaled by another's vector, a row without a slot that is scaled."""
    a = padded_randn(M, C, pad=1, dtype=dtype, device=device)
    scale = vectors(max(slots, 1), C, torch.float32 if masters else dtype, device)
    ids = torch.randint(-1, slots + 2, (M,), device=device) if slots else None
    out = canvas(M, C, dtype, device)
    run_all(scale_calls(a, scale if slots else scale[0], out[:M, :C], ids=ids, arch=arch_of(device)))
    factor = scale[0].double() if ids is None else torch.ones(M, C, dtype=torch.float64, device=device)
    if ids is not None:
        known = (ids >= 0) & (ids < slots)
        factor[known] = scale.double()[ids[known]]
    truth = a.double() * factor
    assert_rounded(out[:M, :C], truth, truth.abs(), terms=1)
    assert untouched(out, M, C)
    again = a.clone()
    run_all(scale_calls(again, scale if slots else scale[0], again, ids=ids, arch=arch_of(device)))
    assert torch.equal(again, out[:M, :C]), "in place"


@pytest.mark.parametrize("with_out", [False, True])
@pytest.mark.parametrize("slots", [0, 1, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M, C", [*SIZES, (300, 70)])
def test_scale_and_sum_matches_fp64(M, C, dtype, slots, with_out, device):
    """Catches a split that overlaps the next or leaves rows out, rows in another slot's sum, an empty slot's NaN."""
    a, b = (padded_randn(M, C, pad=i + 1, dtype=dtype, device=device) for i in range(2))
    scale = vectors(max(slots, 1), C, torch.float32, device)
    ids = torch.randint(-1, max(slots - 1, 1), (M,), device=device) if slots else None  # the last slot has no rows
    held = scale if slots else scale[0]
    out, sums = canvas(M, C, dtype, device), torch.full_like(held, float("nan"), dtype=torch.float32)
    by_slot = None if ids is None else route(ids, slots)
    given = out[:M, :C] if with_out else None
    calls = scale_sum_calls(a, b, held, given, sums, by_slot=by_slot, arch=arch_of(device))
    run_all(calls)
    products = a.double() * b.double()
    if ids is None:
        truth, magnitude, factor = products.sum(0), products.abs().sum(0), scale[0].double()
    else:
        rows = [ids == slot for slot in range(slots)]
        truth = torch.stack([products[r].sum(0) for r in rows])
        magnitude = torch.stack([products[r].abs().sum(0) for r in rows])
        factor = torch.cat([scale.double(), torch.ones_like(scale[:1]).double()])[ids]
    assert_rounded(sums, truth, magnitude, terms=M)
    if with_out:
        assert_rounded(out[:M, :C], a.double() * factor, (a.double() * factor).abs(), terms=1)
    assert untouched(out, M, C)
    again = torch.empty_like(sums)
    run_all(scale_sum_calls(a, b, held, None, again, by_slot=by_slot, arch=arch_of(device)))
    assert torch.equal(sums, again), "another order"


TILES = {"table": None, "two parts": Tile(32, 256, 32, 4, 2), "descriptors": Tile(64, 128, 64, 4, 2, tma=True)}


GEMMS = [(1, 1, 1), (33, 17, 40), (70, 264, 48), (65, 130, 100)]


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "M, N, K, tile",
    # Descriptors take 16-byte aligned rows only.
    [(*sizes, tile) for sizes in GEMMS for tile in TILES if tile != "descriptors" or sizes[1] % 8 == sizes[2] % 8 == 0],
)
def test_gemm_with_epilogue_matches_fp64(M, N, K, dtype, backward, tile, device):
    """Catches rows past M in the sums, an epilogue half that lands in the other's columns, z that carries the scale."""
    pads = (8, 8) if tile == "descriptors" else (1, 2)
    a = padded_randn(M, K, pad=pads[0], dtype=dtype, device=device)
    w = padded_randn(*((K, N) if backward else (N, K)), pad=pads[1], dtype=dtype, device=device)
    w = w.t() if backward else w
    scale = vectors(1, N, torch.float32, device)[0]
    x = padded_randn(M, N, pad=3, dtype=dtype, device=device) if backward else None
    bias = None if backward else torch.randn(N, device=device).to(dtype)
    out, z = canvas(M, N, dtype, device), canvas(M, N, dtype, device)
    sums = torch.full((N,), float("nan"), device=device) if backward else None
    options = {"bias": bias, "x": x, "sums": sums, "z": None if backward else z[:M, :N]}
    calls = ia3_gemm_calls(a, w, scale, out[:M, :N], **options, arch=arch_of(device), tile=TILES[tile])
    run_all(calls)
    truth, magnitude = a.double() @ w.double().T, a.double().abs() @ w.double().abs().T
    if bias is not None:
        truth, magnitude = truth + bias.double(), magnitude + bias.double().abs()
        assert_rounded(z[:M, :N], truth, magnitude, terms=K + 1)
    assert_rounded(out[:M, :N], truth * scale.double(), magnitude * scale.double().abs(), terms=K + 2)
    assert untouched(out, M, N) and untouched(z, M, N)
    if x is not None:
        total, bound = (truth * x.double()).sum(0), (magnitude * x.double().abs()).sum(0)
        assert_rounded(sums, total, bound, terms=M + K + 2)
        again = torch.empty_like(sums)
        run_all(ia3_gemm_calls(a, w, scale, None, x=x, sums=again, arch=arch_of(device), tile=TILES[tile]))
        assert torch.equal(sums, again), "another order, or other sums where dX is not asked for"


def test_no_rows_no_launch_and_wrong_shapes(device):
    """Catches a grid of no programs, and operands that do not fit together."""
    a, scale = torch.randn(4, 8, device=device), torch.ones(8, device=device)
    assert scale_calls(a[:0], scale, a[:0], arch=0) == []
    assert ia3_gemm_calls(a[:0], a, torch.ones(4, device=device), None, arch=0) == []
    with pytest.raises(ValueError, match="scale, out"):
        scale_calls(a, scale[:-1], a, arch=0)
    with pytest.raises(ValueError, match="b, scale, sums"):
        scale_sum_calls(a, a[:-1], scale, None, scale, arch=0)
    with pytest.raises(ValueError, match="x, sums"):
        ia3_gemm_calls(a, a, torch.ones(4, device=device), None, x=a, arch=0)


def test_bytes_and_operations_are_counted(device):
    """Catches a benchmark's share of the limit computed from nothing."""
    a, scale = torch.randn(64, 32, device=device), torch.ones(32, device=device)
    calls = scale_sum_calls(a, a, scale, a, torch.empty_like(scale), arch=0)
    assert all(isinstance(call, Call) and call.bytes > 0 and call.flops > 0 for call in calls)
