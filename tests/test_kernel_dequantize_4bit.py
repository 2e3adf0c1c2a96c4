"""The one-launch dequantization, bit for bit against the format's formula."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from compiled_4bit import instructions_of
from numerics import arch_of
from peftkern import reference
from peftkern.weights import BLOCKSIZES, Weight4bit
from peftkern_kernels.dequantize_4bit import dequantize_4bit_calls
from peftkern_kernels.launch import run_all
from quantized_data import as_packed, guarded, random_4bit

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# One element; one row; odd K with blocks that straddle rows; odd N K, whose last low nibble is padding; more than one
# program's tile with a ragged end; rows of whole blocks.
SHAPES = [(1, 1), (1, 7), (3, 33), (17, 129), (37, 130), (33, 256)]


def dequantize(weight: Weight4bit, dtype: torch.dtype) -> torch.Tensor:
    """The kernel's result, with a canary before and after it."""
    N, K = weight.shape
    storage = torch.full((N * K + 32,), float("nan"), dtype=dtype, device=weight.device)
    out = storage[16 : 16 + N * K].view(N, K)
    arch = arch_of(str(weight.device))
    run_all(dequantize_4bit_calls(as_packed(weight), out, arch=arch))
    assert storage[:16].isnan().all() and storage[16 + N * K :].isnan().all(), "stored outside the weight"
    return out


def assert_same_bits(out: torch.Tensor, truth: torch.Tensor) -> None:
    integer = torch.int32 if out.dtype == torch.float32 else torch.int16
    differ = out.view(integer) != truth.view(integer)
    assert not differ.any(), f"{int(differ.sum())} of {out.numel()} differ, the first at {differ.nonzero()[0].tolist()}"


@pytest.mark.parametrize("nested", [False, True], ids=["fp32 scales", "nested"])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_bits_are_the_formulas(quant_type, dtype, blocksize, nested, device):
    """Catches nibbles in the wrong order, a block index taken from the row, a padding nibble that is stored, a scale
    with one rounding in place of two, values rounded before they are scaled."""
    for N, K in SHAPES:
        weight = guarded(random_4bit(N, K, blocksize=blocksize, quant_type=quant_type, nested=nested, device=device))
        assert_same_bits(dequantize(weight, dtype), reference.dequantize_4bit(weight, dtype))


def test_data_shows_a_missing_rounding():
    """The scales that these tests draw differ under one FMA for many blocks, so the bits above would tell."""
    weight = random_4bit(64, 64, blocksize=32)
    code = weight.nested_code[weight.absmax.long()]
    group = weight.nested_absmax[torch.arange(code.numel()) // 256]
    twice = code * group + weight.offset
    once = (code.double() * group.double() + weight.offset.double()).float()
    assert (twice != once).float().mean() > 0.05


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("before", [1, 2, 4, 8])
def test_bytes_that_start_anywhere(before, dtype, device):
    """Catches words that are read from an address which is no multiple of their size, and the tail of such a weight."""
    for N, K in [(5, 31), (9, 64)]:
        weight = guarded(random_4bit(N, K, device=device), before)
        (call,) = dequantize_4bit_calls(as_packed(weight), weight.packed.new_empty(N, K, dtype=dtype), arch=0)
        assert weight.packed.data_ptr() % (call.constants["WORD_CODES"] // 2) == 0
        assert_same_bits(dequantize(weight, dtype), reference.dequantize_4bit(weight, dtype))


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_scales(dtype, device):
    """Subnormal, infinite and overflowing products round as the formula does: catches flushing and saturation."""
    weight = random_4bit(8, 64, blocksize=32, nested=False, device=device)
    weight.absmax.copy_(torch.logspace(-44, 38, weight.absmax.numel(), dtype=torch.float64).float())
    weight.absmax[-1] = float("inf")
    assert_same_bits(dequantize(weight, dtype), reference.dequantize_4bit(weight, dtype))


def test_more_than_one_group_of_scales(device):
    """More than 256 blocks: catches a nested absmax that is always the first, or counted in elements."""
    weight = guarded(random_4bit(67, 300, blocksize=32, device=device))
    assert weight.nested_absmax.numel() == 3
    assert_same_bits(dequantize(weight, torch.bfloat16), reference.dequantize_4bit(weight, torch.bfloat16))


def test_one_launch_that_counts_its_bytes(device):
    """Catches scales that are written out on the way, and a benchmark that divides by the wrong number of bytes."""
    weight = random_4bit(64, 128, device=device)
    out = torch.empty(64, 128, dtype=torch.bfloat16, device=device)
    (call,) = dequantize_4bit_calls(as_packed(weight), out, arch=0)
    assert call.bytes == weight.nbytes + out.nbytes
    assert call.options["enable_fp_fusion"] is False, "a contracted scale misses a rounding"
    assert {id(t) for t in call.args.values() if isinstance(t, torch.Tensor)} == {
        id(t) for t in (*weight.tensors(), out)
    }


def test_a_buffer_that_does_not_fit_is_refused(device):
    """Catches a transposed or padded buffer that would be filled in the wrong order."""
    weight = as_packed(random_4bit(6, 8, device=device))
    for out in (torch.empty(8, 6, device=device), torch.empty(6, 9, device=device)[:, :8]):
        with pytest.raises(ValueError, match=r"out: expected a contiguous tensor \[6, 8\], got"):
            dequantize_4bit_calls(weight, out, arch=0)


@pytest.mark.parametrize("arch", [89, 90])
def test_compiled_kernel_is_short_and_wide(arch, tmp_path):
    """Instructions an element of the whole kernel at 4096 x 4096, blocksize 64, nested, bf16; 7.6 to 8.3 with Triton
    3.6 to 3.9. Catches narrow loads and stores, bytes that are unpacked one by one, and a scale for each element."""
    found = instructions_of("dequantize", arch, tmp_path)
    assert found["per_element"] < 8.6 and found["spills"] == 0, found
    assert set(found["stores"]) == {"STG.E.128"} and "LDG.E.128" in found["loads"], found
