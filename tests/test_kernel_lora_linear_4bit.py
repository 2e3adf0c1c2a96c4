"""The fused GEMMs over a 4-bit weight, forward and backward, against fp64 on the exactly decoded weight."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from numerics import arch_of, assert_rounded, padded_randn
from peftkern import reference
from peftkern_kernels.dropout import Dropout
from peftkern_kernels.gemm_tables import MULTIPROCESSORS, Tile
from peftkern_kernels.gemm_tables_4bit import choose_tile_4bit, choose_transposed_tile_4bit, unit_of
from peftkern_kernels.gemm_tile_4bit import weight_arguments
from peftkern_kernels.launch import cdiv, run_all
from peftkern_kernels.lora_linear_4bit import (
    base_4bit_plus_expand_calls,
    base_4bit_transposed_plus_expand_calls,
    fused_4bit_fits,
)
from quantized_data import as_packed, guarded, random_4bit

DTYPES = [torch.float16, torch.bfloat16]
# One row and one column; K of one unit of 32; units of 32 whose blocks of 64 straddle rows; several steps and tiles.
SHAPES = [(1, 1, 32, 1), (17, 33, 96, 3), (3, 70, 160, 40), (33, 37, 192, 16)]


def tile(block_m=16, block_n=32, block_k=32, **keywords):
    return Tile(block_m, block_n, block_k, num_warps=4, num_stages=2, group_m=2, **keywords)


def canaried(M, columns, dtype, device):
    """`out` [M, columns] inside NaN, and the storage that must stay NaN around it."""
    storage = torch.full((M + 1, columns + 3), float("nan"), dtype=dtype, device=device)
    return storage[:M, :columns], storage


def check(backward, M, N, K, R, dtype, device, *, bias=False, p=0.0, factors=None, before=0, cut=None, **kind):
    """Run one of the two directions on padded operands and compare; returns `out`.

    factors: dtype of the adapter's factor. before: bytes that the packed bytes are off a 16-byte boundary. cut: a tile.
    """
    weight = random_4bit(N, K, device=device, **kind)
    w = reference.dequantize_4bit(weight, dtype)
    weight = as_packed(guarded(weight, before))
    w, columns = (w, K) if backward else (w.t(), N)  # [contraction, columns]
    x = padded_randn(M, w.shape[0], pad=3, dtype=dtype, device=device)
    s = padded_randn(M, R, pad=1, dtype=dtype, device=device)
    factor = padded_randn(*((R, columns) if backward else (columns, R)), pad=2, dtype=factors or dtype, device=device)
    right = factor if backward else factor.t()
    vector = padded_randn(1, columns, pad=1, dtype=dtype, device=device)[0] if bias else None
    dropout = Dropout(torch.tensor([20240517 << 20], dtype=torch.int64, device=device), p) if p else None
    out, storage = canaried(M, columns, dtype, device)

    options = {"dropout": dropout} if backward else {"bias": vector}
    build = base_4bit_transposed_plus_expand_calls if backward else base_4bit_plus_expand_calls
    run_all(build(x, weight, s, factor, out, **options, arch=arch_of(device), tile=cut))

    keep = reference.dropout_mask(dropout.seed, M, columns, p).double() / (1 - p) if p else 1.0
    added = vector.double() if bias else torch.zeros((), dtype=torch.float64, device=device)
    truth = x.double() @ w.double() + keep * (s.double() @ right.double()) + added
    magnitude = x.double().abs() @ w.double().abs() + keep * (s.double().abs() @ right.double().abs()) + added.abs()
    # keep / (1 - p) and the bias are one operation more; a factor in fp32 is rounded in registers.
    assert_rounded(out, truth, magnitude, terms=w.shape[0] + R + 2, rounded=1.0 if factors else 0.0)
    assert storage[M].isnan().all() and storage[:, columns:].isnan().all(), "stored outside of out"
    return out


@pytest.mark.parametrize("nested", [False, True], ids=["fp32 scales", "nested"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_fp64(dtype, backward, nested, device):
    """Catches even and odd columns swapped between x and W (or in the interleaved result), a scale of another row's or
    unit's block, one loaded a step early or late, a wrong mask at an edge, and ranks that the expand misses."""
    for M, N, K, R in SHAPES:
        check(backward, M, N, K, R, dtype, device, nested=nested)


@pytest.mark.parametrize(
    "K, blocksize, quant_type",
    [(96, 32, "nf4"), (96, 64, "fp4"), (96, 4096, "nf4"), (192, 64, "nf4"), (192, 128, "fp4")],
)
def test_decoded_bits_are_those_of_dequantize(K, blocksize, quant_type, device):
    """x = 1 (the identity) picks out single values of W, which no sum blurs: catches a missing rounding of a nested
    scale, a value rounded before it is scaled, and a block index that restarts in each row (K % blocksize != 0)."""
    N = 34
    weight = random_4bit(N, K, blocksize=blocksize, quant_type=quant_type, device=device)
    w = reference.dequantize_4bit(weight, torch.bfloat16)
    zero = {"dtype": torch.bfloat16, "device": device}
    one = torch.eye(K, **zero)
    out = torch.empty(K, N, **zero)
    nothing = torch.zeros(K, 1, **zero), torch.zeros(N, 1, **zero)
    run_all(base_4bit_plus_expand_calls(one, as_packed(weight), *nothing, out, arch=arch_of(device)))
    assert torch.equal(out.t(), w)
    one, out = torch.eye(N, **zero), torch.empty(N, K, **zero)
    nothing = torch.zeros(N, 1, **zero), torch.zeros(1, K, **zero)
    run_all(base_4bit_transposed_plus_expand_calls(one, as_packed(weight), *nothing, out, arch=arch_of(device)))
    assert torch.equal(out, w)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("split", [2, 4, 16])
def test_split_contraction(split, backward, device):
    """Parts of unequal length, and more parts asked for than there are steps: catches a part that reads past its end
    or starts with another's scales, a plane that is not summed, and a bias, mask or expand applied in every part."""
    cut = tile(32, 64, 32, split_k=split)
    check(backward, 17, 70, 160, 12, torch.bfloat16, device, cut=cut, p=0.3 * backward, bias=not backward)
    cut = tile(16, 128, 64, split_k=split)
    check(backward, 9, 130, 192, 3, torch.float16, device, cut=cut, nested=False, blocksize=128)


@pytest.mark.parametrize("units, split", [(2, 1), (2, 2), (4, 1)])
def test_several_units_in_a_step(units, split, device):
    """Catches scales spread over a tile in the wrong order, and a ragged last tile of columns (backward)."""
    check(False, 9, 40, 512, 5, torch.bfloat16, device, cut=tile(16, 64, 64 * units, split_k=split), bias=True)
    check(True, 9, 75, 64 * 7, 5, torch.bfloat16, device, cut=tile(16, 64 * units, 32, split_k=split), p=0.1)


@pytest.mark.parametrize("before", [1, 8])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_bytes_off_a_word_boundary(backward, before, device):
    """A view into a larger tensor is read in bytes: catches words read from bytes that start between them, which the
    interpreter forgives and a GPU does not."""
    weight = random_4bit(33, 192, blocksize=32, device=device)
    assert weight_arguments(as_packed(weight), 32)[1]["WORD_BYTES"] == 4
    assert weight_arguments(as_packed(guarded(weight, before)), 32)[1]["WORD_BYTES"] == 1
    check(backward, 17, 33, 192, 4, torch.bfloat16, device, before=before, blocksize=32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fp32_factors_are_cast_in_registers(dtype, device):
    """fp32 masters beside 16-bit x, ranks past one block: catches a dot of mixed dtypes and a last block unmasked."""
    check(False, 17, 40, 64, 70, dtype, device, factors=torch.float32)
    check(True, 17, 40, 64, 70, dtype, device, factors=torch.float32)


@pytest.mark.parametrize("p", [0.1, 0.9])
def test_dropout_falls_on_the_expand_alone(p, device):
    """The mask is that of the dense kernels, by (row, column) of out: catches halves of a mask given to the wrong
    accumulator, another tile's mask, a masked dy W, and a missing 1 / (1 - p)."""
    check(True, 33, 20, 192, 12, torch.bfloat16, device, p=p)
    check(True, 33, 20, 192, 12, torch.float16, device, p=p, cut=tile(16, 128, 16))


def test_strides_that_are_not_one(device):
    """x, dy and out as transposed views: catches a hard-coded inner stride."""
    M, N, K, R, dtype = 18, 40, 128, 4, torch.float16
    weight = random_4bit(N, K, device=device)
    w = reference.dequantize_4bit(weight, dtype).double()
    for backward, build in ((False, base_4bit_plus_expand_calls), (True, base_4bit_transposed_plus_expand_calls)):
        inner, columns = (N, K) if backward else (K, N)
        x = padded_randn(inner, M, pad=3, dtype=dtype, device=device).t()
        s = padded_randn(R, M, pad=1, dtype=dtype, device=device).t()
        factor = padded_randn(*((columns, R) if backward else (R, columns)), pad=1, dtype=dtype, device=device).t()
        out = torch.empty(columns, M, dtype=dtype, device=device).t()
        run_all(build(x, as_packed(weight), s, factor, out, arch=arch_of(device)))
        pairs = (x.double(), w if backward else w.t()), (s.double(), (factor if backward else factor.t()).double())
        truth = sum(left @ right for left, right in pairs)
        magnitude = sum(left.abs() @ right.abs() for left, right in pairs)
        assert_rounded(out, truth, magnitude, terms=inner + R)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_same_bits_twice(backward, device):
    """Catches sums in an order that depends on which program is first."""
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(check(backward, 20, 40, 320, 4, torch.bfloat16, device, cut=tile(16, 64, 64, split_k=4)))
    assert torch.equal(*results)


def test_a_bad_value_stays_where_it_is(device):
    """Inf in x's first row and NaN in the first block of W: catches a wrapped row or a clamped scale that leaks."""
    M, N, K = 18, 40, 128
    weight = random_4bit(N, K, nested=False, device=device)
    weight.absmax[0] = float("nan")  # row 0, columns 0 to 63
    x = torch.randn(M, K, device=device).bfloat16()
    x[0] = float("inf")
    nothing = torch.zeros(M, 1, device=device).bfloat16(), torch.zeros(N, 1, device=device).bfloat16()
    out = torch.empty(M, N, device=device).bfloat16()
    run_all(base_4bit_plus_expand_calls(x, as_packed(weight), *nothing, out, arch=arch_of(device)))
    assert out[1:, 1:].isfinite().all() and out[:, 0].isnan().all() and not out[0].isfinite().any()
    dy, dx = torch.randn(M, N, device=device).bfloat16(), torch.empty(M, K, device=device).bfloat16()
    nothing = torch.zeros(M, 1, device=device).bfloat16(), torch.zeros(1, K, device=device).bfloat16()
    run_all(base_4bit_transposed_plus_expand_calls(dy, as_packed(weight), *nothing, dx, arch=arch_of(device)))
    assert dx[:, :64].isnan().all() and dx[:, 64:].isfinite().all()


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120, 942, 1100])
@pytest.mark.parametrize("K", [4096, 14336, 2880, 4128])
def test_tables_fit_every_shape(K, arch):
    """Catches a step that does not divide K or straddles a unit, and few rows left to few programs."""
    N = 4096
    for M in (1, 17, 64, 128, 512, 1024):
        for aligned in (True, False):
            for blocksize in (32, 64, 4096):
                unit = unit_of(K, blocksize)
                forward = choose_tile_4bit(arch, M, N, K, unit=unit, aligned=aligned)
                assert K % forward.block_k == 0 and forward.block_k % unit == 0
                dropout = blocksize == 64
                transposed = choose_transposed_tile_4bit(arch, M, N, K, aligned=aligned, dropout=dropout)
                assert transposed.block_n % unit == 0
                for cut, columns in ((forward, N), (transposed, K)):
                    programs = cdiv(M, cut.block_m) * cdiv(columns, cut.block_n) * cut.split_k
                    # 16 parts at most, each of 8 steps or more
                    steps = (K if columns == N else N) // cut.block_k
                    few = cut.split_k == 16 or steps < 16 * cut.split_k
                    assert programs * cut.num_warps >= 0.6 * 8 * MULTIPROCESSORS[arch] or few


def test_no_rows_no_launch(device):
    """M 0 (an expert that no token chose): catches a grid of no programs."""
    weight, empty = as_packed(random_4bit(8, 64, device=device)), torch.empty(0, 64, device=device).half()
    s, b, out = empty[:, :2], torch.empty(8, 2, device=device).half(), torch.empty(0, 8, device=device).half()
    assert base_4bit_plus_expand_calls(empty, weight, s, b, out, arch=90) == []
    assert base_4bit_transposed_plus_expand_calls(out, weight, s, empty[:2].new_empty(2, 64), empty, arch=90) == []


def test_what_does_not_fit_is_refused_with_the_reason(device):
    """Catches a weight whose units straddle blocks, or whose last byte holds two rows, being computed wrongly."""
    assert fused_4bit_fits(5, 96, 64, torch.float16) == ""
    assert fused_4bit_fits(14336, 4096, 4096, torch.bfloat16) == ""
    assert "multiples of 32" in fused_4bit_fits(5, 33, 64, torch.float16)
    assert "multiples of 32" in fused_4bit_fits(5, 80, 64, torch.float16)
    assert "float32" in fused_4bit_fits(5, 64, 64, torch.float32)
    assert "2^36" in fused_4bit_fits(2**20, 2**16, 64, torch.float16)
    weight = as_packed(random_4bit(5, 33, device=device))
    x, out = torch.zeros(2, 33, device=device).half(), torch.zeros(2, 5, device=device).half()
    s = torch.zeros(2, 1, device=device).half()
    with pytest.raises(ValueError, match="weight: .* got K 33"):
        base_4bit_plus_expand_calls(x, weight, s, s.new_zeros(5, 1), out, arch=0)
    with pytest.raises(ValueError, match="weight: .* got K 33"):
        base_4bit_transposed_plus_expand_calls(out, weight, s, s.new_zeros(1, 33), x, arch=0)
