"""The frozen GEMM with the low-rank part in its accumulator: pointer, descriptor and split-K kernels against fp64."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from numerics import assert_rounded, padded_randn
from peftkern import reference
from peftkern_kernels.dropout import Dropout
from peftkern_kernels.gemm_tables import SHARED_MEMORY, Tile, choose_tile
from peftkern_kernels.launch import is_aligned, run_all
from peftkern_kernels.lora_factor import as_weight
from peftkern_kernels.lora_linear import base_plus_expand_calls, pointer_calls
from peftkern_kernels.lora_linear_persistent import multiprocessors, persistent_calls
from peftkern_kernels.lora_linear_split import split_calls
from peftkern_kernels.lora_linear_tma import tma_calls

ROOT = Path(__file__).resolve().parent.parent
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def problem(M, N, K, R, dtype, device, *, adapter_dtype=None, transposed=False, bias=False, p=0.0, pad=1):
    """(arguments, keywords, fp64 truth, magnitude, out with a canary row). S is in dtype, B in adapter_dtype."""
    adapter_dtype = adapter_dtype or dtype
    x = padded_randn(M, K, pad=pad, dtype=dtype, device=device)
    shape = (K, N) if transposed else (N, K)
    weight = padded_randn(*shape, pad=2 * pad, dtype=dtype, device=device)
    b_shape = (R, N) if transposed else (N, R)
    b = padded_randn(*b_shape, pad=3 * pad, dtype=adapter_dtype, device=device)
    weight, b = (weight.t(), b.t()) if transposed else (weight, b)
    s = padded_randn(M, R, pad=4 * pad + (-R % 8 if pad == 8 else 0), dtype=dtype, device=device)
    vector = padded_randn(1, N, pad=1, dtype=dtype, device=device)[0] if bias else None
    dropout = Dropout(torch.tensor([20240517 << 20], dtype=torch.int64, device=device), p) if p else None
    out = torch.full((M + 1, N + pad), float("nan"), dtype=dtype, device=device)

    keep = reference.dropout_mask(dropout.seed, M, N, p).double() / (1 - p) if p else 1.0
    f64 = [t.double() for t in (x, weight, s, b)]
    truth = f64[0] @ f64[1].T + keep * (f64[2] @ f64[3].T)
    a64 = [t.abs() for t in f64]
    magnitude = a64[0] @ a64[1].T + keep * (a64[2] @ a64[3].T)
    if vector is not None:
        truth, magnitude = truth + vector.double(), magnitude + vector.double().abs()
    return (x, weight, s, b), {"bias": vector, "dropout": dropout}, truth, magnitude, out


def check(calls_of, *case, **keywords):
    """Run the calls of `calls_of(x, weight, s, b, out, bias=, dropout=)` on a problem and compare."""
    M, N, K, R, dtype, device = case
    arguments, options, truth, magnitude, out = problem(*case, **keywords)
    run_all(calls_of(*arguments, out[:M, :N], **options))
    # B in fp32 is rounded to dtype in registers: eps/2 of the low-rank part's magnitude, itself at most all of it.
    cast = 1.0 if keywords.get("adapter_dtype", dtype) != dtype else 0.0
    # keep/(1-p) and the bias are one multiplication and one addition more.
    assert_rounded(out[:M, :N], truth, magnitude, terms=K + R + 2, rounded=cast)
    assert out[M].isnan().all(), "stored past the last row"
    assert out[:M, N:].isnan().all(), "stored past the last column"


def small(block_m=32, block_n=32, block_k=32, **keywords):
    return Tile(block_m, block_n, block_k, num_warps=4, num_stages=2, group_m=2, **keywords)


def by(builder, tile):
    return lambda *tensors, **options: builder(*tensors, **options, precision="ieee", tile=tile)


def by_pointer(tile):
    return by(pointer_calls, tile)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "M, N, K, R",
    [(1, 1, 1, 1), (1, 17, 33, 1), (17, 130, 200, 12), (65, 17, 33, 40), (65, 130, 200, 3), (64, 64, 64, 16)],
)
def test_pointer_matches_fp64(M, N, K, R, transposed, dtype, device):
    """Catches a wrong stride or mask at an edge, a wrapped row that is stored, and an expand that misses ranks."""
    check(by_pointer(small()), M, N, K, R, dtype, device, transposed=transposed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rank_beyond_one_block(dtype, device):
    """R 70 and 130 need two and three steps of the expand: catches a loop that runs once, or an unmasked last step."""
    check(by_pointer(small()), 17, 33, 40, 70, dtype, device)
    check(by_pointer(small()), 17, 33, 40, 130, dtype, device, transposed=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_fp32_masters_are_cast_in_registers(dtype, transposed, device):
    """A and B in fp32 beside 16-bit x: catches a dot of mixed dtypes, and a pointer read as the wrong width."""
    check(by_pointer(small()), 33, 50, 70, 12, dtype, device, adapter_dtype=torch.float32, transposed=transposed)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("bias", [False, True])
def test_bias_and_dropout(p, bias, device):
    """The mask falls on the low-rank part alone and is that of (row, column) of out: catches a mask of x W^T or of the
    bias, a tile that draws another tile's mask, and a missing 1/(1-p)."""
    check(by_pointer(small()), 65, 130, 40, 12, torch.float32, device, p=p, bias=bias)
    check(by_pointer(small(64, 16)), 65, 70, 40, 12, torch.bfloat16, device, p=p, bias=bias, transposed=True)


@pytest.mark.parametrize("tile", [small(16, 64, 16), small(64, 16, 64), small(16, 16, 16)], ids=str)
def test_result_does_not_depend_on_a_divisible_edge(tile, device):
    """Each tile of a grouped grid is visited once: catches an order that repeats or skips tiles."""
    check(by_pointer(tile), 100, 90, 48, 16, torch.float32, device)


def test_contraction_dimension_may_be_the_strided_one_of_x(device):
    """x = z.t() is neither copied nor misread: catches a hard-coded inner stride of 1."""
    M, N, K, R = 33, 20, 50, 4
    x = padded_randn(K, M, pad=3, dtype=torch.float32, device=device).t()
    weight, s, b = (torch.randn(shape, device=device) for shape in ((N, K), (M, R), (N, R)))
    out = torch.empty(N, M, device=device).t()
    run_all(pointer_calls(x, weight, s, b, out, bias=None, dropout=None, precision="ieee", tile=small()))
    f64 = [t.double() for t in (x, weight, s, b)]
    magnitude = f64[0].abs() @ f64[1].abs().T + f64[2].abs() @ f64[3].abs().T
    assert_rounded(out, f64[0] @ f64[1].T + f64[2] @ f64[3].T, magnitude, terms=K + R)


def test_infinity_in_an_unrelated_row_stays_there(device):
    """Rows past the edge are wrapped onto real rows: catches a wrapped row that leaks into a stored one."""
    M, N, K, R = 33, 20, 32, 4
    x, weight, s, b = (torch.randn(shape, device=device) for shape in ((M, K), (N, K), (M, R), (N, R)))
    x[0] = float("inf")
    weight[0] = float("nan")
    out = torch.empty(M, N, device=device)
    run_all(base_plus_expand_calls(x, weight, s, b, out, arch=0))
    assert out[1:, 1:].isfinite().all()
    assert not out[0].isfinite().any() and out[:, 0].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("M, N, K, R", [(1, 16, 32, 1), (17, 136, 200, 12), (65, 24, 40, 70)])
def test_descriptors_match_fp64(M, N, K, R, transposed, dtype, device):
    """TMA path; rows padded to stay 16-byte aligned. Catches tiles read past K (NaN padding), swapped
    coordinates of the transposed weight, and a store that runs over the edge."""
    check(by(tma_calls, small()), M, N, K, R, dtype, device, transposed=transposed, pad=8)


def test_descriptors_with_bias_dropout_masters_and_an_unaligned_output(device):
    """Catches a mask or bias lost on this path, and a descriptor built for an output that cannot have one."""
    options = {"bias": True, "p": 0.1, "adapter_dtype": torch.float32}
    check(by(tma_calls, small(64, 32)), 65, 72, 40, 12, torch.bfloat16, device, **options, pad=8)
    arguments, options, truth, magnitude, _ = problem(33, 40, 64, 5, torch.float16, device, bias=True, p=0.1, pad=8)
    out = padded_randn(33, 40, pad=1, dtype=torch.float16, device=device)
    calls = tma_calls(*arguments, out, **options, precision="ieee", tile=small())
    assert calls[0].args["out_desc"] is None
    run_all(calls)
    assert_rounded(out, truth, magnitude, terms=64 + 5 + 2)


def by_staying(tile):
    """Programs that walk several tiles each: 4 of them in the interpreter's table of multiprocessors."""

    def calls(*tensors, **options):
        return persistent_calls(*tensors, **options, precision="ieee", tile=tile, arch=0)

    return calls


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "M, N, K, R", [(1, 16, 32, 1), (17, 136, 200, 12), (65, 24, 40, 70), (130, 72, 32, 16), (33, 264, 24, 3)]
)
def test_programs_that_stay_match_fp64(M, N, K, R, transposed, dtype, device):
    """1 to 27 tiles for at most 4 programs, one or many steps of K and of the rank: catches an accumulator that keeps
    the last tile's sum, a tile that is skipped, a step of the next tile at this one's coordinates, a step of the rank
    that is left out or loads x, and a store over the edge."""
    check(by_staying(small()), M, N, K, R, dtype, device, transposed=transposed, pad=8)


def test_programs_that_stay_with_bias_and_masters(device):
    """Catches a bias of the wrong columns, and fp32 factors multiplied beside 16-bit ones."""
    options = {"bias": True, "adapter_dtype": torch.float32}
    check(by_staying(small(64, 32)), 130, 136, 40, 40, torch.bfloat16, device, **options, pad=8)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("M, N, K, R", [(65, 72, 40, 3), (33, 264, 24, 16)])
def test_programs_that_stay_mask_the_low_rank_part(M, N, K, R, transposed, device):
    """Catches a mask of another tile's place, of one half for both, or over the base; and a next tile's start that is
    added to this one."""
    options = {"adapter_dtype": torch.float32, "p": 0.3, "transposed": transposed}
    check(by_staying(small(block_n=64)), M, N, K, R, torch.bfloat16, device, **options, pad=8)


def test_programs_that_stay_are_compiled_once_for_all_lengths():
    """Catches a constant of the kernel that follows M: a compilation in the middle of training for each new length."""
    calls = [base_plus_expand_calls(*on_meta(M, 4096, 4096, 16, torch.bfloat16), arch=90)[0] for M in (896, 1024, 8192)]
    assert {call.kernel.__name__ for call in calls} == {"_lora_linear_persistent_kernel"}
    assert calls[0].constants == calls[1].constants == calls[2].constants
    assert [call.grid[0] for call in calls] == [112, 128, 132]


def test_programs_that_stay_only_with_few_masked_ranks_and_an_aligned_output():
    """Catches a mask beside more ranks than there is shared memory for, and a descriptor of rows that are not 16-byte
    aligned."""
    tensors = on_meta(8192, 4096, 4096, 16, torch.bfloat16)
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    unaligned = torch.empty(8192, 4097, dtype=torch.bfloat16, device="meta")[:, :4096]
    more = on_meta(8192, 4096, 4096, 24, torch.bfloat16)
    kernels = [
        base_plus_expand_calls(*tensors, arch=90),
        base_plus_expand_calls(*tensors, arch=90, dropout=Dropout(seed, 0.1)),
        base_plus_expand_calls(*more, arch=90),
        base_plus_expand_calls(*more, arch=90, dropout=Dropout(seed, 0.1)),
        base_plus_expand_calls(*tensors[:4], unaligned, arch=90),
    ]
    stays = ["persistent" in calls[0].kernel.__name__ for calls in kernels]
    assert stays == [True, True, True, False, False]


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("N, R, dtype", [(70, 12, torch.float16), (65, 3, torch.float32), (130, 80, torch.float32)])
def test_a_factor_is_turned_and_cast_for_the_gemm(N, R, dtype, across, device):
    """Catches a factor whose transpose is copied as it lay, a rank or row that is left out, rows that no descriptor can
    describe, and a copy where none is needed."""
    b = padded_randn(N, R, pad=3, dtype=dtype, device=device)
    made, calls = as_weight(b, torch.float16, across, arch=0)
    run_all(calls)
    assert torch.equal(made, b.half()) and is_aligned(made.t() if across else made)
    assert as_weight(made, torch.float16, across, arch=0) == (made, [])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("split, M, N, K, R", [(2, 1, 17, 65, 1), (4, 17, 130, 200, 12), (8, 33, 20, 100, 70)])
def test_split_matches_fp64(split, M, N, K, R, transposed, dtype, device):
    """K is not a multiple of the parts, and 8 parts of 100 leave some empty: catches a part read twice, an unwritten
    plane that is summed, and planes rounded before they are added."""
    tile = small(32, 64, 16, split_k=split)
    check(by(split_calls, tile), M, N, K, R, dtype, device, transposed=transposed, bias=True, p=0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [1, 17, 65])
def test_builder_default(M, dtype, device):
    """What operations call, with the interpreter's tiles (arch 0)."""
    check(lambda *t, **o: base_plus_expand_calls(*t, **o, arch=0), M, 130, 200, 12, dtype, device, bias=True, p=0.1)


def test_no_rows_no_launch(device):
    """M = 0 (an expert without tokens): catches a grid of no programs, which CUDA refuses."""
    x, weight, s, b = (torch.randn(shape, device=device) for shape in ((0, 8), (6, 8), (0, 2), (6, 2)))
    assert base_plus_expand_calls(x, weight, s, b, torch.empty(0, 6, device=device), arch=0) == []


def test_same_bits_twice(device):
    """Catches anything that depends on the order in which programs run."""
    arguments, options, _, _, out = problem(65, 130, 200, 12, torch.bfloat16, device, bias=True, p=0.1)
    results = []
    for _ in range(2):
        run_all(base_plus_expand_calls(*arguments, out[:65, :130], **options, arch=0))
        results.append(out[:65, :130].clone())
    assert torch.equal(*results)


def test_same_bits_twice_with_split(device):
    """Planes are added in a fixed order; catches an atomic or a reduction in order of arrival."""
    arguments, options, _, _, out = problem(17, 130, 200, 12, torch.float32, device)
    results = []
    for _ in range(2):
        run_all(by(split_calls, small(32, 64, 16, split_k=4))(*arguments, out[:17, :130], **options))
        results.append(out[:17, :130].clone())
    assert torch.equal(*results)


def on_meta(M, N, K, R, dtype, *, transposed=False, pad=0):
    """x, weight, s, b, out on the meta device."""
    weight = torch.empty((K, N + pad) if transposed else (N, K + pad), dtype=dtype, device="meta")
    weight = weight[:, :N].t() if transposed else weight[:, :K]
    x, out = torch.empty(M, K + pad, dtype=dtype, device="meta")[:, :K], torch.empty(M, N, dtype=dtype, device="meta")
    b = torch.empty((R, N) if transposed else (N, R), dtype=dtype, device="meta")
    return x, weight, torch.empty(M, R, dtype=dtype, device="meta"), b.t() if transposed else b, out


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("M, N, K, R", [(8192, 4096, 4096, 16), (4096, 14336, 4096, 64), (4096, 4096, 14336, 64)])
def test_headline_shapes_take_the_large_descriptor_tile_on_hopper(M, N, K, R, transposed, dtype):
    """Catches a table edit that halves the tile of the shapes that this library is judged by."""
    (call,) = base_plus_expand_calls(*on_meta(M, N, K, R, dtype, transposed=transposed), arch=90)
    tile = [call.constants[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")]
    assert call.num_warps == 8 and all(a >= b for a, b in zip(tile, (128, 256, 64), strict=True))
    assert "x_desc" in call.args
    assert call.flops == 2 * M * N * (K + R)
    assert call.bytes == 2 * (M * K + N * K + M * R + N * R + M * N)


def test_the_registers_of_sm_80_hold_what_stands_beside_the_sums():
    """Catches 64 ranks beside 128 sums a thread, a mask that changes nothing, 64 sums stored by elements: spills."""
    operands = on_meta(8192, 4096, 4096, 64, torch.bfloat16)
    (plain,) = base_plus_expand_calls(*operands, arch=80)
    dropout = Dropout(torch.empty(1, dtype=torch.int64, device="meta"), 0.1)
    (masked,) = base_plus_expand_calls(*operands, dropout=dropout, arch=80)
    assert [call.constants["BLOCK_R"] for call in (plain, masked)] == [32, 32]
    assert [call.constants["BLOCK_N"] for call in (plain, masked)] == [256, 128]
    for N in (4095, 4104):  # 4104: rows at 16 bytes, of which Triton knows nothing
        (odd,) = base_plus_expand_calls(*on_meta(512, N, 4096, 16, torch.bfloat16), arch=80)
        assert odd.constants["BLOCK_M"] * odd.constants["BLOCK_N"] == 128 * 32 * odd.num_warps


def test_unaligned_operands_take_no_descriptor():
    """A descriptor over rows that are not 16-byte aligned is an error at launch: catches a plan that builds one."""
    (call,) = base_plus_expand_calls(*on_meta(4096, 4096, 4096, 16, torch.bfloat16, pad=1), arch=90)
    assert "x_desc" not in call.args and call.constants["BLOCK_M"] * call.constants["BLOCK_N"] <= 128 * 128


def test_rows_that_lie_on_each_other_take_no_descriptor():
    """The gradient of a sum over rows has stride 0, which a descriptor may not have: catches one that is given it."""
    x, *rest = on_meta(4096, 4096, 4096, 16, torch.bfloat16)
    for rows in (x, x[:1].expand(4096, 4096), x.as_strided((4096, 4096), (64, 1))):
        (call,) = base_plus_expand_calls(rows, *rest, arch=100)
        assert ("x_desc" in call.args) is (rows is x)


def test_persistent_programs_are_as_many_as_the_card_runs_at_once(monkeypatch):
    """Catches 132 programs on a Hopper card of 114 multiprocessors: the last 18 would take as long as all others."""
    properties = types.SimpleNamespace(multi_processor_count=114)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    multiprocessors.cache_clear()
    try:
        assert multiprocessors(torch.device("cuda", 0), 90) == 114
        assert multiprocessors(torch.device("meta"), 90) == 132
    finally:
        multiprocessors.cache_clear()


@pytest.mark.parametrize("arch", [*SHARED_MEMORY])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_fill_the_device_and_fit_shared_memory(arch, dtype):
    """Catches a table row whose pipeline cannot be launched, and few rows that leave the device idle."""
    for M in (1, 16, 17, 64, 65, 128, 512, 4096):
        for aligned in (True, False):
            tile = choose_tile(arch, dtype, M=M, N=4096, K=4096, aligned=aligned)
            stages = tile.num_stages if tile.tma or arch >= 90 else tile.num_stages - 1
            assert (tile.block_m + tile.block_n) * tile.block_k * dtype.itemsize * stages <= SHARED_MEMORY[arch]
            programs = -(-M // tile.block_m) * -(-4096 // tile.block_n) * tile.split_k
            assert programs >= 64, f"{programs} programs at M {M}"


OFFSETS = """
import re, sys, torch, triton
from bench.static_compile import specialise, target_of
from peftkern_kernels.gemm_tables import Tile
from peftkern_kernels.lora_linear import pointer_calls
from peftkern_kernels.lora_linear_persistent import persistent_calls
from peftkern_kernels.lora_linear_split import split_calls
from peftkern_kernels.lora_decode import decode_calls

def empty(*shape):
    return torch.empty(shape, dtype=torch.float16, device="meta")

M, N, K, R = 1 << 20, 64, 4096, 16
tensors = empty(M, K), empty(N, K), empty(M, R), empty(N, R), empty(M, N)
options = dict(bias=empty(N), dropout=None, precision="ieee", tile=Tile(32, 32, 32, 4, 2, split_k=2))
calls = pointer_calls(*tensors, **options) + split_calls(*tensors, **options)
calls += decode_calls(empty(4, K), empty(N, K), empty(R, K), empty(N, R), 1.0, empty(4, N), empty(4, R), arch=80)
for call in calls:
    source, options, _ = specialise(call, 80)
    text = triton.compile(source, target=target_of(80), options=options).asm["ttir"]
    narrow = re.findall(r"arith\\.muli [^:]*: tensor<[^>]*xi32>", text)
    wide = re.findall(r"arith\\.muli [^:]*: tensor<[^>]*xi64>", text)
    assert wide and not narrow, (call.name, narrow)
print(len(calls), "kernels")
"""


def test_offsets_are_64_bit_before_they_are_multiplied():
    """M * K passes 2^31 at long context, more than a test can allocate; so the compiled code is read: no 32-bit product
    of tensors. Catches an `arange` times a stride in int32."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run([sys.executable, "-c", OFFSETS], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "5"
