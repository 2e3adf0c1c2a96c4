"""DoRA's kernels by themselves: row norms, the scaling that adds a bias and a rest, dropout's two mixtures."""

from __future__ import annotations

import pytest
import torch

from numerics import arch_of, assert_rounded, padded_randn
from peftkern import reference
from peftkern_kernels import dora_output, gemm_tables
from peftkern_kernels.dora_dropout import dropout_calls
from peftkern_kernels.dora_norm import factor_calls, norm_calls
from peftkern_kernels.dropout import Dropout
from peftkern_kernels.ia3_scale import scale_calls
from peftkern_kernels.launch import run_all
from peftkern_kernels.reduction_tables import Tile

SCALING = 0.7
NAN = float("nan")


def canaried(N, device):
    """A vector of N to be written, and the element behind it, which must stay NaN."""
    whole = torch.full((N + 1,), NAN, device=device)
    return whole[:N], whole[N:]


def matrices(N, K, R, dtype, adapter, device):
    """W, A and B with NaN-padded rows; B A works against W."""
    a, b = (padded_randn(*s, pad=i, dtype=adapter, device=device) for s, i in (((R, K), 3), ((N, R), 1)))
    w = padded_randn(N, K, pad=5, dtype=dtype, device=device)
    w.copy_(0.1 * w.float() - SCALING * 0.9 * (b.double() @ a.double()))
    return w, a, b


def truths(w, a, b):
    """The norms in fp64, and those of absolute values."""
    wide = [t.double() for t in (w, a, b)]
    return reference.dora_norm(*wide, SCALING), reference.dora_norm(*(t.abs() for t in wide), SCALING)


@pytest.mark.parametrize("splits", [None, 1, 3])
@pytest.mark.parametrize(
    "dtype, adapter",
    [
        (torch.float32, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("N, K, R", [(64, 64, 16), (1, 1, 1), (37, 130, 5), (33, 200, 70)])
def test_norms_match_fp64(N, K, R, dtype, adapter, splits, device):
    """Would catch a tail of K or of the rank that is read, or left out; a plane too few; the scaling in B's dtype,
    norms of rounded V."""
    w, a, b = matrices(N, K, R, dtype, adapter, device)
    norm, canary = canaried(N, device)
    options = {"scaling": SCALING, "arch": arch_of(device), "splits": splits}
    run_all(norm_calls(w, a, b, norm=norm, **options))
    truth, magnitude = truths(w, a, b)
    # Masters are rounded to the weight's dtype, A and B one each; to fp32 nothing is.
    rounded = 2 * torch.finfo(dtype).eps / torch.finfo(torch.float32).eps if adapter != dtype else 0
    assert_rounded(norm, truth, magnitude, terms=K + R + 3, rounded=rounded)
    assert canary.isnan().all(), "stored past N"
    again = torch.empty_like(norm)
    run_all(norm_calls(w, a, b, norm=again, **options))
    assert torch.equal(norm, again)


@pytest.mark.parametrize("block_r", [16, 32, 128])
def test_norms_of_any_tile_and_of_a_transposed_weight(block_r, device):
    """Would catch a rank in one step or several that gives other norms, and rows that are taken for columns."""
    w, a, b = matrices(70, 90, 40, torch.float32, torch.float32, device)
    w = w.t().contiguous().t()
    assert w.stride() == (1, 70)
    norm, canary = canaried(70, device)
    tile = Tile(32, 64, block_r, 4, 2)
    run_all(norm_calls(w, a, b.t().contiguous().t(), scaling=SCALING, norm=norm, arch=arch_of(device), tile=tile))
    truth, magnitude = truths(w, a, b)
    assert_rounded(norm, truth, magnitude, terms=90 + 40 + 3)
    assert canary.isnan().all()


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_are_0_where_the_norm_is(dtype, splits, device):
    """Would catch 0 / 0, a strided magnitude read as if it were not, and a given norm that is squared."""
    N, K, R = 37, 70, 3
    w, a, b = matrices(N, K, R, torch.float32, torch.float32, device)
    w[5], b[5] = 0.0, 0.0
    magnitude = torch.full((N, 2), NAN, device=device, dtype=dtype)[:, 0]
    magnitude.copy_(torch.randn(N))
    norm, c, inverse = (canaried(N, device)[0] for _ in range(3))
    options = {"scaling": SCALING, "magnitude": magnitude, "c": c, "inverse": inverse, "arch": arch_of(device)}
    run_all(norm_calls(w, a, b, norm=norm, splits=splits, **options))
    truth, bound = truths(w, a, b)
    nowhere = truth == 0
    assert nowhere.nonzero().flatten().tolist() == [5] and norm[5] == c[5] == inverse[5] == 0
    truth, bound = truth.clamp(min=1e-9), torch.where(nowhere, 0, bound / truth.clamp(min=1e-9).square())
    share = torch.where(nowhere, 0, 1 / truth)
    assert_rounded(inverse, share, bound, terms=K + R + 6)
    assert_rounded(c, share * magnitude.double(), bound * magnitude.double().abs(), terms=K + R + 7)
    c_again, inverse_again = torch.empty_like(c), torch.empty_like(inverse)
    spread = torch.stack([norm, norm], 1)[:, 0]
    run_all(factor_calls(spread, magnitude, c_again, inverse_again))
    assert torch.equal(c, c_again) and torch.equal(inverse, inverse_again)


def test_a_nan_in_the_weight_stays_one(device):
    """Would catch a broken weight that is taken for a row that points nowhere."""
    w, a, b = matrices(4, 8, 2, torch.float32, torch.float32, device)
    w[1, 3] = NAN
    c, inverse = torch.empty(4, device=device), torch.empty(4, device=device)
    options = {"magnitude": torch.ones(4, device=device), "c": c, "inverse": inverse}
    run_all(norm_calls(w, a, b, scaling=1.0, arch=arch_of(device), **options))
    assert c.isnan().tolist() == inverse.isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_scaling_adds_a_bias_and_a_rest_before_it_rounds(dtype, in_place, device):
    """Would catch two roundings, a bias along rows, a rest that is overwritten before it is read."""
    M, N = 21, 70
    u, rest = (padded_randn(M, N, pad=i + 1, dtype=dtype, device=device) for i in range(2))
    c, bias = torch.randn(N, device=device), torch.randn(N, device=device).to(dtype)
    canary = torch.full((M + 1, N), NAN, dtype=dtype, device=device)
    out = rest.clone() if in_place else canary[:M]
    run_all(scale_calls(u, c, out, bias=bias, rest=out if in_place else rest, arch=arch_of(device)))
    wide = [t.double() for t in (u, c, bias, rest)]
    truth, magnitude = (u * c + b + r for u, c, b, r in (wide, [t.abs() for t in wide]))
    assert_rounded(out, truth, magnitude, terms=3)
    assert canary[M].isnan().all()


@pytest.mark.parametrize("keeps_u", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("arch", [0, 90])
def test_both_outputs_of_one_product(arch, has_bias, keeps_u, device, monkeypatch):
    """Would catch a bias in u, c of another tile's columns, u that is stored where nobody asked for it; arch 90 stands
    for the persistent GEMM, whose tile here has edges in both directions."""
    M, N, K, R = 40, 72, 32, 8
    x, w, s, b = (torch.randn(*shape, device=device).bfloat16() for shape in ((M, K), (N, K), (M, R), (N, R)))
    c, bias = torch.randn(N, device=device), torch.randn(N, device=device).bfloat16() if has_bias else None
    y, u = (torch.full((M + 1, N), NAN, dtype=torch.bfloat16, device=device) for _ in range(2))
    tile = gemm_tables.Tile(32, 64, 32, 4, 2, tma=True, persistent=arch == 90)
    monkeypatch.setattr(dora_output, "tile_of", lambda *_: tile)
    calls = dora_output.dora_output_calls(x, w, s, b, c, y[:M], u=u[:M] if keeps_u else None, bias=bias, arch=0)
    assert len(calls) == (1 if arch == 90 else 2)
    run_all(calls)
    wide = [t.double() for t in (x, w, s, b, c)]
    truth, magnitude = (x @ w.T + s @ b.T for x, w, s, b, _ in (wide, [t.abs() for t in wide]))
    if keeps_u:
        assert_rounded(u[:M], truth, magnitude, terms=K + R)
    added = 0 if bias is None else bias.double()
    bound = magnitude * wide[4].abs() + (0 if bias is None else added.abs())
    # Where y is a pass of its own, u is rounded before it.
    assert_rounded(y[:M], wide[4] * truth + added, bound, terms=K + R + 2, rounded=arch == 0)
    assert y[M].isnan().all() and (u[M] if keeps_u else u).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_mixes_by_the_mask_that_all_kernels_draw(dtype, device):
    """Would catch another mask than `reference.dropout_mask`, a share of the wrong matrix, a tail of columns that is
    drawn anew."""
    M, C, p = 21, 300, 0.3
    x, t = (padded_randn(M, C, pad=i + 1, dtype=dtype, device=device) for i in range(2))
    drop = Dropout(torch.tensor([2**40 + 3], device=device), p)
    share = reference.dropout_mask(drop.seed, M, C, p).double() / (1 - p)
    whole = torch.full((2, M + 1, C), NAN, dtype=dtype, device=device)
    inner, rest = whole[0, :M], whole[1, :M]
    run_all(dropout_calls(x, inner, drop, rest=rest, arch=arch_of(device)))
    mixed = t.clone()
    run_all(dropout_calls(x, mixed, drop, b=mixed, arch=arch_of(device)))
    assert_rounded(inner, x.double() * share, x.double().abs() * share, terms=2)
    assert_rounded(rest, x.double() * (1 - share), x.double().abs() * (1 + share), terms=3)
    truth = share * x.double() + (1 - share) * t.double()
    assert_rounded(mixed, truth, share * x.double().abs() + (1 + share) * t.double().abs(), terms=4)
    assert whole[:, M].isnan().all()


def test_no_rows_no_launch_and_wrong_shapes_are_named(device):
    """Would catch a grid of no programs, and operands that do not fit together."""
    w, a, b = matrices(4, 8, 2, torch.float32, torch.float32, device)
    drop, one = Dropout(torch.tensor([3], device=device), 0.5), torch.ones(4, device=device)
    assert dropout_calls(w[:0], w[:0], drop, arch=0) == []
    with pytest.raises(ValueError, match="out: expected shape"):
        dropout_calls(w, w[:-1], drop, arch=0)
    with pytest.raises(ValueError, match="a, b: expected"):
        norm_calls(w, a[:, 1:], b, scaling=1.0, norm=one, arch=0)
    with pytest.raises(ValueError, match="norm: expected shape"):
        norm_calls(w, a, b, scaling=1.0, norm=one[1:], arch=0)
    with pytest.raises(ValueError, match="norm: expected contiguous float32"):
        norm_calls(w, a, b, scaling=1.0, norm=one.double(), arch=0)
    with pytest.raises(ValueError, match="magnitude, c, inverse: expected all or none"):
        norm_calls(w, a, b, scaling=1.0, c=one, arch=0)
    with pytest.raises(ValueError, match="bias, rest: expected"):
        scale_calls(w.t(), one, w.t(), bias=one[1:], arch=0)


def test_bytes_and_operations_are_counted(device):
    """Would catch a benchmark's share of the limit computed from nothing."""
    w, a, b = matrices(64, 256, 4, torch.float32, torch.float32, device)
    calls = norm_calls(w, a, b, scaling=1.0, norm=torch.empty(64, device=device), arch=0, splits=2)
    calls += dropout_calls(w, w, Dropout(torch.tensor([3], device=device), 0.5), arch=0)
    assert len(calls) == 3 and all(call.bytes > 0 and call.flops > 0 for call in calls)
