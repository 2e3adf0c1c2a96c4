"""Decoding over a 4-bit weight (at most 16 rows, two launches) against fp64, on W's exact dequantized values."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from compiled_4bit import instructions_of
from numerics import arch_of, assert_rounded, padded_randn
from peftkern import reference
from peftkern_kernels.dropout import Dropout
from peftkern_kernels.launch import run_all
from peftkern_kernels.lora_decode_4bit import decode_4bit_calls
from quantized_data import as_packed, guarded, random_4bit

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def run(M, N, K, R, dtype, device, *, adapter_dtype=None, bias=False, p=0.0, scaling=1.75, before=0, **weight_options):
    """Returns (y with a canary row, S with a canary row)."""
    adapter_dtype = adapter_dtype or dtype
    x = padded_randn(M, K, pad=1, dtype=dtype, device=device)
    weight = guarded(random_4bit(N, K, device=device, **weight_options), before)
    a = padded_randn(R, K, pad=3, dtype=adapter_dtype, device=device)
    b = padded_randn(N, R, pad=4, dtype=adapter_dtype, device=device)
    vector = padded_randn(1, N, pad=1, dtype=dtype, device=device)[0] if bias else None
    dropout = Dropout(torch.tensor([-(5 << 33) - 9], dtype=torch.int64, device=device), p) if p else None
    out = torch.full((M + 1, N + 1), float("nan"), dtype=dtype, device=device)
    s = torch.full((M + 1, R + 1), float("nan"), dtype=dtype, device=device)
    options = {"bias": vector, "dropout": dropout, "arch": arch_of(device)}
    run_all(decode_4bit_calls(x, as_packed(weight), a, b, scaling, out[:M, :N], s[:M, :R], **options))

    keep = reference.dropout_mask(dropout.seed, M, K, p).double() / (1 - p) if p else 1.0
    dropped, factor = x.double() * keep, abs(scaling)
    # fp32 masters are cast to dtype in registers: eps/2 of the magnitude each.
    cast = 1.0 if adapter_dtype != dtype else 0.0
    s_truth = scaling * dropped @ a.double().T
    assert_rounded(s[:M, :R], s_truth, factor * dropped.abs() @ a.double().abs().T, terms=K + 4, rounded=cast)
    low_rank = s[:M, :R].double()  # S as rounded and kept: y must use exactly that
    dense = reference.dequantize_4bit(weight, dtype).double()  # and W's exact values, so nothing is allowed for them
    truth = x.double() @ dense.T + low_rank @ b.double().T
    magnitude = x.double().abs() @ dense.abs().T + low_rank.abs() @ b.double().abs().T
    if vector is not None:
        truth, magnitude = truth + vector.double(), magnitude + vector.double().abs()
    assert_rounded(out[:M, :N], truth, magnitude, terms=K + R + 4, rounded=cast)
    assert out[M].isnan().all() and out[:M, N:].isnan().all(), "stored past the edge of y"
    assert s[M].isnan().all() and s[:M, R:].isnan().all(), "stored past the edge of S"
    return out, s


@pytest.mark.parametrize("nested", [False, True], ids=["fp32 scales", "nested"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "M, N, K, R",
    # K 2 and 34 are read by bytes, 200, 264 and 1032 by words; 64 and 512 are whole steps; 200, 264 and 1032 are no
    # multiple of the blocksize, so blocks straddle rows; 512, 1032 are split.
    [(1, 1, 2, 1), (1, 17, 34, 3), (16, 130, 200, 12), (7, 130, 64, 17), (3, 70, 1032, 40), (2, 65, 512, 70)],
)
def test_decode_matches_fp64(M, N, K, R, dtype, nested, device):
    """Catches even and odd columns exchanged, a scale of a neighbouring block or row, a part of K read twice or left
    out, weights rounded before they are scaled, and a y that uses another S than the one it keeps."""
    run(M, N, K, R, dtype, device, nested=nested)


@pytest.mark.parametrize("blocksize", [32, 128, 256, 1024, 4096])
def test_every_blocksize(blocksize, device):
    """Blocks narrower and wider than a step and than a row; K 96 and 130 put their edges inside rows."""
    run(2, 40, 256, 5, torch.float16, device, blocksize=blocksize, quant_type="fp4")
    run(3, 33, 96, 5, torch.float32, device, blocksize=blocksize)
    run(1, 35, 130, 5, torch.bfloat16, device, blocksize=blocksize, nested=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias_dropout_and_masters(dtype, device):
    """Dropout falls on A's x alone: catches a mask of x W^T, and columns of a split K that draw another part's mask."""
    run(5, 70, 544, 13, dtype, device, bias=True, p=0.1, adapter_dtype=torch.float32)
    run(16, 33, 70, 3, dtype, device, p=0.9, scaling=-0.3)


@pytest.mark.parametrize("before", [1, 2, 4, 8])
def test_bytes_that_start_anywhere(before, device):
    """Catches words that are read from an address which is no multiple of four."""
    run(2, 20, 72, 3, torch.bfloat16, device, before=before)


def test_strided_x_and_transposed_results(device):
    """Catches a last stride of x, out or S that is taken for 1."""
    x = torch.randn(3, 128, device=device)[:, ::2]
    weight = random_4bit(20, 64, device=device)
    a, b = torch.randn(64, 5, device=device).t(), torch.randn(5, 20, device=device).t()
    out, s = torch.empty(20, 3, device=device).t(), torch.empty(5, 3, device=device).t()
    run_all(decode_4bit_calls(x, as_packed(weight), a, b, 0.5, out, s, arch=arch_of(device)))
    x, a, b = (t.double() for t in (x, a, b))
    dense = reference.dequantize_4bit(weight, torch.float32).double()
    assert_rounded(s, 0.5 * x @ a.T, 0.5 * x.abs() @ a.abs().T, terms=68)
    magnitude = x.abs() @ dense.abs().T + s.double().abs() @ b.abs().T
    assert_rounded(out, x @ dense.T + s.double() @ b.T, magnitude, terms=73)


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
def test_an_infinite_scale_stays_in_its_row(device):
    """A row's end takes no scale from the next row: catches 0 * inf where columns past K are multiplied."""
    weight = random_4bit(2, 96, blocksize=32, nested=False, device=device)
    weight.absmax[3] = float("inf")  # the first block of row 1
    x, a, b = (torch.randn(shape, device=device) for shape in ((1, 96), (1, 96), (2, 1)))
    out, s = torch.empty(1, 2, device=device), torch.empty(1, 1, device=device)
    run_all(decode_4bit_calls(x, as_packed(weight), a, b, 1.0, out, s, arch=arch_of(device)))
    assert out[0, 0].isfinite() and not out[0, 1].isfinite()


def test_same_bits_twice(device):
    """Catches planes that are added in order of arrival."""
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        results.append(run(3, 70, 1032, 12, torch.float32, device))
    assert torch.equal(results[0][0][:3, :70], results[1][0][:3, :70])
    assert torch.equal(results[0][1][:3, :12], results[1][1][:3, :12])


def test_limits_and_no_rows(device):
    """More than 16 rows would be dropped in silence, and an odd K's bytes hold two rows; no rows are no programs."""
    x, a, b = (torch.randn(shape, device=device) for shape in ((17, 8), (2, 8), (6, 2)))
    out, s = torch.empty(17, 6, device=device), torch.empty(17, 2, device=device)
    weight = as_packed(random_4bit(6, 8, device=device))
    with pytest.raises(ValueError, match="x: expected at most 16 rows.*got 17"):
        decode_4bit_calls(x, weight, a, b, 1.0, out, s, arch=0)
    odd = as_packed(random_4bit(6, 7, device=device))
    with pytest.raises(ValueError, match="weight: expected an even K.*got 7"):
        decode_4bit_calls(x[:1, :7], odd, a[:, :7], b, 1.0, out[:1], s[:1], arch=0)
    assert decode_4bit_calls(x[:0], weight, a, b, 1.0, out[:0], s[:0], arch=0) == []


def test_bytes_are_the_weights_and_little_else(device):
    """Catches a launch that counts a dense weight, or planes that outweigh the weight's codes."""
    weight = random_4bit(4096, 4096, device=device)
    for M in (1, 16):
        x = torch.empty(M, 4096, dtype=torch.bfloat16, device="meta")
        a, b, out, s = x.new_empty(16, 4096), x.new_empty(4096, 16), x.new_empty(M, 4096), x.new_empty(M, 16)
        for arch in (89, 90):
            planes, finish = decode_4bit_calls(x, as_packed(weight), a, b, 1.0, out, s, arch=arch)
            assert weight.nbytes < planes.bytes < 1.5 * weight.nbytes
            assert planes.flops == 2 * M * (4096 + 16) * 4096
            assert finish.bytes < 0.5 * weight.nbytes


@pytest.mark.parametrize("arch, matrix", [(89, "HMMA"), (90, "HGMMA")])
def test_compiled_loop_stays_short(arch, matrix, tmp_path):
    """The main loop's instructions an element outside the matrix product, at N K 4096, blocksize 64, nested, bf16.

    12 is what the arithmetic bears; 7.2 is just above what the compilers of 3.6 to 3.9 make of it (6.5 to 6.9). Catches
    bytes that are unpacked one by one, 16-bit stores to shared memory, a scale for each element, spilled registers.
    """
    found = instructions_of("decode", arch, tmp_path)
    assert matrix in found["matrix"] and found["spills"] == 0
    assert found["per_element"] < 7.2, found
    assert found["opcodes"].get("LDGSTS", 0) > 0, "W's words are not loaded ahead"
