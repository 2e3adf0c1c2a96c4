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


STAYING = {
    "small": Tile(16, 64, 32, 4, 2, persistent=True),
    "groups": Tile(32, 64, 16, 4, 2, group_m=2, persistent=True),
}


def aligned_canvas(M, N, dtype, device):
    """NaN [M + 1, N + 8], whose rows a descriptor takes where N is a multiple of 8."""
    return torch.full((M + 1, N + 8), float("nan"), dtype=dtype, device=device)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kept", ["y", "z", "both"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "M, N, K, tile",
    [
        (1, 16, 32, "small"),
        (17, 136, 200, "small"),
        (65, 24, 40, "small"),
        (130, 72, 32, "groups"),
        (33, 264, 24, "groups"),
    ],
)
def test_programs_that_stay_scale_the_output(M, N, K, tile, dtype, kept, bias, device):
    """1 to 18 tiles for at most 4 programs, one or many steps: catches an accumulator that keeps the last tile's sum, a
    tile that is skipped, a half with the other's columns of l or bias, z that carries l, a store over the edge."""
    a, w = (padded_randn(*s, pad=8, dtype=dtype, device=device) for s in ((M, K), (N, K)))
    scale = vectors(1, N, torch.float32, device)[0]
    b = torch.randn(N, device=device).to(dtype) if bias else None
    out, z = (aligned_canvas(M, N, dtype, device) for _ in range(2))
    given = {"out": None if kept == "z" else out[:M, :N], "z": None if kept == "y" else z[:M, :N]}
    calls = ia3_gemm_calls(a, w, scale, **given, bias=b, arch=arch_of(device), tile=STAYING[tile])
    assert [call.kernel.__name__ for call in calls] == ["_ia3_gemm_persistent_kernel"]
    run_all(calls)
    truth, magnitude = a.double() @ w.double().T, a.double().abs() @ w.double().abs().T
    if b is not None:
        truth, magnitude = truth + b.double(), magnitude + b.double().abs()
    if kept != "y":
        assert_rounded(z[:M, :N], truth, magnitude, terms=K + 1)
    if kept != "z":
        assert_rounded(out[:M, :N], truth * scale.double(), magnitude * scale.double().abs(), terms=K + 2)
    assert untouched(out, M if kept != "z" else 0, N) and untouched(z, M if kept != "y" else 0, N)


@pytest.mark.parametrize("dx", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "M, N, K, tile",
    [
        (1, 16, 32, "small"),
        (17, 136, 200, "small"),
        (65, 24, 40, "small"),
        (130, 72, 32, "groups"),
        (33, 264, 24, "groups"),
    ],
)
def test_programs_that_stay_sum_on_the_way(M, N, K, tile, dtype, dx, device):
    """Catches a quarter of x beside another's sums, rows past M in them, a row tile's sums in another's plane, and
    sums of the scaled product."""
    a, w = (padded_randn(*s, pad=8, dtype=dtype, device=device) for s in ((M, K), (K, N)))
    x = padded_randn(M, N, pad=8, dtype=dtype, device=device)
    scale, sums = vectors(1, N, torch.float32, device)[0], torch.full((N,), float("nan"), device=device)
    out = aligned_canvas(M, N, dtype, device)
    given = {"out": out[:M, :N] if dx else None, "x": x, "sums": sums}
    calls = ia3_gemm_calls(a, w.t(), scale, **given, arch=arch_of(device), tile=STAYING[tile])
    assert calls[0].kernel.__name__ == "_ia3_gemm_persistent_kernel"
    run_all(calls)
    truth, magnitude = a.double() @ w.double(), a.double().abs() @ w.double().abs()
    total, bound = (truth * x.double()).sum(0), (magnitude * x.double().abs()).sum(0)
    assert_rounded(sums, total, bound, terms=M + K + 2)
    if dx:
        assert_rounded(out[:M, :N], truth * scale.double(), magnitude * scale.double().abs(), terms=K + 2)
    assert untouched(out, M if dx else 0, N)


def test_programs_that_stay_keep_z_beside_sums_and_an_infinite_weight_in_its_column(device):
    """Catches z or a bias lost where there is x too, and rows past M, 0 times infinity, in the sums."""
    M, N, K = 19, 72, 40
    a, w, x = (torch.rand(s, device=device).half() + 0.5 for s in ((M, K), (N, K), (M, N)))
    w[3] = float("inf")
    scale, bias, sums = (
        torch.ones(N, device=device),
        torch.randn(N, device=device).half(),
        torch.empty(N, device=device),
    )
    out, z = (torch.empty(M, N, device=device).half() for _ in range(2))
    run_all(
        ia3_gemm_calls(a, w, scale, out, bias=bias, z=z, x=x, sums=sums, arch=arch_of(device), tile=STAYING["small"])
    )
    assert torch.equal(out, z) and z[:, 3].isposinf().all() and sums[3] == float("inf")
    wide = [t.double() for t in (a, w, x, bias)]
    wide[1][3] = 0.0
    truth, magnitude = wide[0] @ wide[1].T + wide[3], wide[0] @ wide[1].abs().T + wide[3].abs()
    there = torch.arange(N, device=device) != 3
    assert_rounded(z[:, there], truth[:, there], magnitude[:, there], terms=K + 1)
    products = [(t * wide[2]).sum(0)[there] for t in (truth, magnitude)]
    assert_rounded(sums[there], *products, terms=M + K + 2)


def on_meta(M, N, K, *, backward, pad=0, out_dtype=torch.bfloat16):
    """The launches of a layer's GEMM with an epilogue on sm_90."""
    half = {"dtype": torch.bfloat16, "device": "meta"}
    a, w = torch.empty(M, K, **half), torch.empty(*((K, N) if backward else (N, K)), **half)
    out, x = torch.empty(M, N + pad, device="meta", dtype=out_dtype)[:, :N], torch.empty(M, N, **half)
    scale = torch.empty(N, device="meta")
    if backward:
        return ia3_gemm_calls(a, w.t(), scale, out, x=x, sums=torch.empty_like(scale), arch=90)
    return ia3_gemm_calls(a, w, scale, out, z=x, arch=90)


def test_hopper_takes_programs_that_stay_where_they_can():
    """Catches a table edit that gives the shapes that count another kernel, a kernel that is compiled anew for each
    length, and a descriptor of what cannot have one."""
    for backward, N, K, group in ((False, 1024, 4096, 16), (True, 14336, 4096, 4)):
        calls = [on_meta(M, N, K, backward=backward)[0] for M in (4096, 8192, 8200)]
        assert {call.kernel.__name__ for call in calls} == {"_ia3_gemm_persistent_kernel"}
        assert calls[0].constants == calls[1].constants == calls[2].constants
        assert calls[1].grid[0] == 132 and calls[1].constants["GROUP_M"] == group
        assert all(call.options["launch_pdl"] for call in calls)
    for backward, N, K in ((False, 1296, 1040), (True, 1040, 1296)):  # as in test_gpu_ia3.py
        call = on_meta(4200, N, K, backward=backward)[0]
        assert call.kernel.__name__ == "_ia3_gemm_persistent_kernel" and call.grid[0] == 132
    names = [
        on_meta(*sizes, backward=backward, **options)[0].kernel.__name__.removeprefix("_ia3_gemm_")
        for sizes, backward, options in (
            ((512, 1024, 4096), False, {}),
            ((8192, 1024, 4096), False, {"out_dtype": torch.float32}),
            ((8192, 1024, 4096), False, {"pad": 1}),
            ((8192, 14336, 4096), True, {"pad": 8}),
        )
    ]
    assert names == ["tma_kernel", "tma_kernel", "kernel", "kernel"]


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
