"""The decode kernels over many adapters against fp64: at most 64 rows, K split, planes summed in the expand."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import product
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from adapter_batches import RANKS, factors, make_adapters, routed, rows_of, wide  # noqa: E402
from numerics import arch_of, assert_rounded  # noqa: E402
from peftkern_kernels.launch import run_all  # noqa: E402
from peftkern_kernels.multi_decode import multi_decode_calls  # noqa: E402
from peftkern_kernels.multi_tables import DecodeTile, multi_decode_tile  # noqa: E402
from peftkern_kernels.routing import build_routing  # noqa: E402

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [(1, 17, 33), (5, 48, 64), (16, 70, 130), (64, 33, 100)]  # M, N, K


def check(x, adapters, routing, *, base=None, in_place=False, bias=None, keep_s=True, **options):
    """out and S against fp64, slot by slot; nothing stored outside them."""
    M, N, R, dtype = x.shape[0], adapters.N, adapters.max_rank, x.dtype
    storage = torch.full((M + 1, N + 3), float("nan"), dtype=dtype, device=x.device)
    out = storage[:M, :N]
    if in_place:
        base = out.copy_(torch.randn(M, N))
    start = torch.zeros(M, N, dtype=torch.float64, device=x.device)
    size = start.clone()
    if base is not None:
        planes = base.double() if base.dim() == 3 else base.double()[None]
        start, size = planes.sum(0), planes.abs().sum(0)
    if bias is not None:
        start, size = start + bias.double(), size + bias.double().abs()
    s = torch.full((M, R), float("nan"), dtype=dtype, device=x.device) if keep_s else None
    options = {"base": base, "bias": bias, "s_out": s, "arch": arch_of(x.device.type), **options}
    calls = multi_decode_calls(x, adapters, routing, out, **options)
    run_all(calls)
    for slot in range(-1, adapters.slots):
        rows = rows_of(routing, slot)
        rank = int(adapters.rank[slot]) if slot >= 0 else 0
        if len(rows) == 0:
            continue
        truth, magnitude, terms = start[rows], size[rows], 20
        if s is not None:
            assert (s[rows, rank:] == 0).all(), f"slot {slot}: S is not zero past its rank"
        if rank:
            a, b = factors(adapters, slot, dtype)
            part, scale = x[rows].double(), float(adapters.scaling[slot])
            exact, exact_size = scale * part @ a.T, scale * part.abs() @ a.abs().T
            if s is not None:
                assert_rounded(s[rows, :rank], exact, exact_size, terms=x.shape[1] + 20)
                exact, exact_size = s[rows, :rank].double(), s[rows, :rank].double().abs()
            truth, magnitude = truth + exact @ b.T, magnitude + exact_size @ b.abs().T
            terms += rank + (0 if s is not None else x.shape[1])
        assert_rounded(out[rows], truth, magnitude, terms=terms, rounded=0 if s is not None else 1)
    assert storage[M].isnan().all() and storage[:, N:].isnan().all(), "stored outside"
    return out.clone(), calls


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M, N, K", SIZES)
def test_matches_fp64(M, N, K, dtype, device):
    """Bugs: ranks read from the next adapter (NaN between them), planes mixed up, rows of -1 left unwritten."""
    check(wide(M, K, dtype, device), make_adapters(N, K, dtype, device), routed(M, 6, device))


@pytest.mark.parametrize("kind", ["mixed", "none", "one"])
def test_onto_a_base(kind, device):
    """Bugs: base or bias forgotten for the rows of -1, added twice in place, or rounded between."""
    adapters, routing = make_adapters(33, 100, torch.bfloat16, device), routed(40, 6, device, kind)
    x, bias = wide(40, 100, torch.bfloat16, device), torch.randn(66, device=device)[::2]
    check(x, adapters, routing, in_place=True)
    check(x, adapters, routing, in_place=True, bias=bias, keep_s=False)
    check(x, adapters, routing, base=wide(40, 33, torch.bfloat16, device), keep_s=False)
    check(x, adapters, routing, base=torch.randn(3, 40, 33, device=device), bias=bias)


def test_distinct_adapters_strides_and_masters(device):
    """Bugs: a block for each row of which some are dropped; strides swapped; fp32 masters reinterpreted."""
    ranks = tuple((1, 3, 8, 16)[i % 4] for i in range(64))
    adapters = make_adapters(40, 72, torch.float32, device, ranks, max_rank=20)
    ids = torch.randperm(64, generator=torch.Generator().manual_seed(1)).to(torch.int32)
    check(wide(64, 72, torch.float16, device, transposed=True), adapters, build_routing(ids.to(device), 64))


def test_other_tiles_and_the_same_bits_twice(device):
    """Bugs: more parts of K than steps, ranks in several blocks, an order of planes that depends on scheduling."""
    adapters, routing = make_adapters(100, 200, torch.bfloat16, device, max_rank=70), routed(20, 6, device)
    x = wide(20, 200, torch.bfloat16, device)
    for tile in (DecodeTile(32, 64, 2, 16, 1, 32, 2), DecodeTile(64, 3, 3, 32, 2, 128, 4)):
        first, calls = check(x, adapters, routing, tile=tile)
        assert len(calls) == 2 and torch.equal(first, check(x, adapters, routing, tile=tile)[0])


@pytest.mark.parametrize("kind", ["mixed", "one"])
@pytest.mark.parametrize("rows, expand_r, early", [(8, 0, False), (8, 64, True), (16, 16, True), (16, 32, False)])
def test_parts_of_a_block_and_ranks_of_either_launch(kind, rows, expand_r, early, device):
    """Bugs: rows of a block's second half left out or twice; planes read by another block of ranks than they have;
    a base that is loaded early and forgotten; ranks below, at and above either block, multiples of 8 and not."""
    ranks = (64, 8, 1, 33, 16, 70, 12, 40)
    adapters = make_adapters(100, 200, torch.float16, device, ranks, max_rank=72)
    routing, x = routed(37, len(ranks), device, kind), wide(37, 200, torch.float16, device)
    tile = DecodeTile(32, 3, 2, 32, 1, 128, 1, expand_r=expand_r, rows=rows, early_base=early)
    bias = torch.randn(100, device=device)
    check(x, adapters, routing, tile=tile)
    check(x, adapters, routing, tile=tile, in_place=True, keep_s=False)
    check(x, adapters, routing, tile=tile, base=wide(37, 100, torch.float16, device), bias=bias)
    check(x, adapters, routing, tile=tile, base=torch.randn(3, 37, 100, device=device))


def test_hoppers_tiles_are_those_that_were_measured():
    """Catches a row of the table that names a result file and is not in it, and a split beyond K's steps."""
    path = Path(__file__).parents[1] / "bench" / "results" / "nvidia-h200" / "tune-many.json"
    options = {"arch": 90, "dtype": torch.bfloat16, "N": 4096, "aligned": True}
    for row in json.loads(path.read_text())["rows"]:
        M = int(row["problem"].split(" M")[1].split()[0])
        tile = asdict(multi_decode_tile(M=M, K=4096, R=16, **options))
        assert {name: tile[name] for name in row["best"]["tile"]} == row["best"]["tile"], row["problem"]
    for M, K, R, projections in product((1, 3, 16, 64), (16, 128, 2000, 14336), (1, 16, 48, 256), (1, 4)):
        tile = multi_decode_tile(M=M, K=K, R=R, projections=projections, **options)
        assert 1 <= tile.split_k <= max(1, K // tile.block_k)
        assert tile.block_n >= 64 and tile.block_n * tile.expand_r <= 4096 * tile.expand_warps


def test_empty_and_refused(device):
    """Bugs: a grid of zero programs; a batch too large for the path; a base of another shape."""
    adapters = make_adapters(17, 33, torch.float32, device)
    out = torch.empty(65, 17, device=device)
    x = torch.empty(65, 33, device=device)
    assert multi_decode_calls(x[:0], adapters, routed(0, len(RANKS), device), out[:0], arch=0) == []
    with pytest.raises(ValueError, match="at most 64 rows"):
        multi_decode_calls(x, adapters, routed(65, len(RANKS), device), out, arch=0)
    with pytest.raises(ValueError, match=r"base: expected \[3, 17\]"):
        multi_decode_calls(x[:3], adapters, routed(3, 6, device), out[:3], base=out, arch=0)
    with pytest.raises(ValueError, match="expected widths 33, 17 and 64"):
        multi_decode_calls(x[:3, :9], adapters, routed(3, 6, device), out[:3], arch=0)
