"""The kernels under `grouped_lora_linear`: the table of tiles, and the GEMM over all experts on pointers and on
descriptors. The shrink and the weight gradient are those of test_kernel_multi.py."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from grouped_data import COUNTS, offsets_of, peft_b  # noqa: E402
from numerics import arch_of, assert_rounded, padded_randn  # noqa: E402
from peftkern import reference  # noqa: E402
from peftkern_kernels.gemm_tables import SHARED_MEMORY, Tile  # noqa: E402
from peftkern_kernels.grouped_gemm import gemm_tile, grouped_gemm_calls  # noqa: E402
from peftkern_kernels.grouped_gemm_tma import _grouped_gemm_tma_kernel  # noqa: E402
from peftkern_kernels.grouped_route import empty_grouping, grouped_route_calls  # noqa: E402
from peftkern_kernels.grouped_tables import grouped_tile  # noqa: E402
from peftkern_kernels.launch import run_all  # noqa: E402
from peftkern_kernels.routing import build_routing  # noqa: E402

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ON_DESCRIPTORS = Tile(16, 32, 32, 4, 1, tma=True)


def tables(offsets, T, block_m, *, adapters=True):
    found = empty_grouping(T, offsets.shape[0], block_m, offsets.device, adapters=adapters)
    held = [found.tiles, *([] if found.routing is None else found.routing.tensors)]
    for t in held:
        t.fill_(-77)  # what is left unwritten shows
    run_all(grouped_route_calls(offsets, found, T, block_m, R=4, scaling=0.5, arch=arch_of(offsets.device.type)))
    return found


@pytest.mark.parametrize("block_m", [16, 64])
@pytest.mark.parametrize(
    "counts, rest", [*COUNTS.values(), ((300, 0, 700, 2), 5), ((0, 0, 2600, 1), 0), ((1,) * 40, 0), ((0,) * 70, 1)]
)
def test_tables_are_those_of_the_sorted_batch(counts, rest, block_m, device):
    """Bugs: a piece that belongs to a neighbour, planes numbered twice, entries past the last left unwritten."""
    T, E = sum(counts) + rest, len(counts)
    if T == 0:
        return
    found = tables(offsets_of(counts, device), T, block_m)
    ids = torch.arange(E + 1, device=device).repeat_interleave(torch.tensor([*counts, rest], device=device))
    want = build_routing(torch.where(ids < E, ids, -1), E)
    for name in ("perm", "seg_start", "blocks", "chunks", "sums"):
        assert torch.equal(getattr(found.routing, name), getattr(want, name)), name
    assert found.row_offset.tolist() == [4 * e for e in range(E)] and found.rank.tolist() == [4] * E
    assert found.scaling.tolist() == [0.5] * E
    row, owner = 0, torch.where(ids < E, ids, -1)
    for expert, first, length in found.tiles.t().tolist():
        if length:
            assert first == row and length <= block_m and set(owner[row : row + length].tolist()) == {expert}
            row += length
        else:
            assert row == T and expert == -1, "tiles that are not used come last"
    assert row == T
    alone = tables(offsets_of(counts, device), T, block_m, adapters=False)
    assert torch.equal(alone.tiles, found.tiles) and alone.routing is None


@pytest.mark.parametrize("ends", [(9, 4, 30, 2), (-5, 3, 3, 20), (100, 7, 100, 8)])
def test_ends_that_make_no_sense_stay_inside(ends, device):
    """Bugs: a table, or a row, written or pointed at outside: nobody waits for the device to check its offsets."""
    found = tables(torch.tensor(ends, dtype=torch.int32, device=device), 20, 16)
    for table in (found.tiles, found.routing.blocks, found.routing.chunks):
        slot, first, length = table[:3].cpu()
        assert ((slot >= -1) & (slot < 4) & (first >= 0) & (length >= 0) & (first + length <= 20)).all()


def check(kind, N, K, R, dtype, device, *, tile=None, back=False, bias=False, masters=False, strided=False, pad=1):
    """One product against fp64: y of all experts, or with `back` dX; out has a canary row and NaN beside its rows."""
    counts, rest = COUNTS[kind]
    E, T = len(counts), sum(counts) + rest
    offsets = offsets_of(counts, device)
    x = padded_randn(T, N if back else K, pad=pad, dtype=dtype, device=device)
    weight = padded_randn(E, N, K, pad=2 * pad, dtype=dtype, device=device)
    own = torch.float32 if masters else dtype
    if back:  # dX = dY W + dS A
        weight, b = weight.transpose(1, 2), padded_randn(E, R, K, pad=3, dtype=own, device=device).transpose(1, 2)
    else:
        b = peft_b(E, N, R, own, device)
    columns = K if back else N
    s = padded_randn(T, R, pad=4, dtype=dtype, device=device) if R else None
    b = b if R else None
    bias = torch.randn(E, 2 * columns, device=device).to(dtype)[:, ::2] if bias else None
    if strided:
        x = x.t().contiguous().t()
    storage = torch.full((T + 1, columns + 1), float("nan"), dtype=dtype, device=device)
    out = storage[:T, :columns]
    arch = arch_of(device)
    tile = tile or gemm_tile(x, weight, out, arch)
    grouping = tables(offsets, T, tile.block_m, adapters=False)
    calls = grouped_gemm_calls(x, weight, s, b, grouping.tiles, out, bias=bias, arch=arch, tile=tile)
    run_all(calls)
    results = []
    for transform in (lambda t: t.double(), lambda t: t.double().abs()):
        wide = [transform(t) for t in (x, weight)]
        wide_bias = None if bias is None else transform(bias)
        truth = reference.grouped_lora_linear(*wide, None, None, 0.0, offsets, wide_bias)
        start = 0
        for expert, stop in enumerate(offsets.tolist()):
            if s is not None:
                truth[start:stop] += transform(s[start:stop]) @ transform(b[expert].to(dtype)).T
            start = stop
        results.append(truth)
    assert_rounded(out, *results, terms=K + N + R + 3)
    assert (out[int(offsets[-1]) :] == 0).all()
    assert storage[T].isnan().all() and storage[:, columns].isnan().all(), "stored outside"
    return calls


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["mixed", "one expert", "none"])
def test_gemm(kind, dtype, back, device):
    """Bugs: a tile that reads or stores a neighbour's rows, an expert's weight taken for another's, a tail not 0."""
    check(kind, 33, 70, 5, dtype, device, back=back)


@pytest.mark.parametrize("back", [False, True])
def test_gemm_of_more_ranks_with_masters_and_a_bias(back, device):
    """Bugs: a second step of the rank, masters multiplied as they are, a strided bias, bias on rows of no expert."""
    check("mixed", 20, 17, 70, torch.bfloat16, device, back=back, masters=True, bias=True)


def test_gemm_without_adapters_or_with_columns_of_x_apart(device):
    """Bugs: a null pointer of S read; a stride of x that is taken to be 1; one column, one row of the contraction."""
    check("mixed", 33, 20, 0, torch.float32, device, bias=True)
    check("mixed", 1, 1, 1, torch.float32, device)
    check("one of many", 33, 20, 3, torch.float32, device, strided=True)


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("kind, R", [("mixed", 5), ("one of many", 40), ("none", 0)])
def test_gemm_on_descriptors(kind, R, back, device):
    """Bugs: a stack's axes in the wrong order, the next expert (here NaN past each row) read where K or N ends."""
    if device == "cuda" and arch_of(device) < 90:
        pytest.skip("descriptors are loaded by hardware from sm_90 on")
    (call,) = check(kind, 56, 72, R, torch.float16, device, tile=ON_DESCRIPTORS, back=back, bias=not back, pad=8)
    assert call.kernel is _grouped_gemm_tma_kernel


def test_a_neighbour_that_is_nan_stays_where_it_is(device):
    """Bugs: rows or weights of the next expert that reach this one's sums through a tile's edge, by 0 * NaN."""
    for tile in (None, ON_DESCRIPTORS if device == "cpu" else None):
        x, weight = torch.randn(24, 40, device=device).half(), torch.randn(3, 24, 40, device=device).half()
        x[10:] = float("nan")
        weight[1:] = float("nan")
        offsets, out = offsets_of((10, 9, 5), device), torch.empty(24, 24, device=device).half()
        arch = arch_of(device)
        used = tile or gemm_tile(x, weight, out, arch)
        found = tables(offsets, 24, used.block_m, adapters=False)
        run_all(grouped_gemm_calls(x, weight, None, None, found.tiles, out, arch=arch, tile=used))
        assert out[:10].isfinite().all() and out[10:].isnan().all()


def test_a_stack_of_one_matrix_for_all_takes_no_descriptor(device):
    """Bugs: a stride of 0 between experts given to a descriptor, or such a stack refused."""
    x, one = torch.randn(24, 32, device=device), torch.randn(16, 32, device=device)
    weight, out, offsets = one.expand(3, 16, 32), torch.empty(24, 16, device=device), offsets_of((10, 9, 5), device)
    assert not gemm_tile(x.half(), weight.half()[:1].expand(3, 16, 32), out.half(), 90).tma
    tile = gemm_tile(x, weight, out, arch_of(device))
    found = tables(offsets, 24, tile.block_m, adapters=False)
    run_all(grouped_gemm_calls(x, weight, None, None, found.tiles, out, arch=arch_of(device), tile=tile))
    torch.testing.assert_close(out, x @ one.T, rtol=1e-5, atol=1e-5)


def test_refused(device):
    """Bugs: operands of other experts or widths read out of bounds."""
    x, weight, out = (torch.zeros(*shape, device=device) for shape in ((6, 8), (2, 4, 8), (6, 4)))
    found = tables(offsets_of((2, 4), device), 6, 16, adapters=False)
    options = {"arch": 0, "tile": grouped_tile(arch=0, dtype=x.dtype, T=6, E=2, aligned=False)}
    with pytest.raises(ValueError, match=r"x, weight, out: expected \[T, K\], \[E, N, K\]"):
        grouped_gemm_calls(x[:, :7], weight, None, None, found.tiles, out, **options)
    with pytest.raises(ValueError, match="s, b: expected"):
        grouped_gemm_calls(x, weight, out, None, found.tiles, out, **options)
    with pytest.raises(ValueError, match="s, b: expected"):
        grouped_gemm_calls(x, weight, out, torch.zeros(1, 4, 4), found.tiles, out, **options)
    for offsets in (torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int32)[::2]):
        with pytest.raises(ValueError, match="offsets: expected contiguous int32"):
            grouped_route_calls(offsets, found, 6, 16, arch=0)


@pytest.mark.parametrize("arch", [0, *SHARED_MEMORY])
def test_every_tile_fits_its_architecture(arch):
    """Bugs: a row without a size, a tile higher than 16 rows for a stack with a token an expert."""
    for T, aligned, dtype in [(T, a, d) for T in (8, 4096, 65536) for a in (True, False) for d in DTYPES]:
        tile = grouped_tile(arch=arch, dtype=dtype, T=T, E=128, aligned=aligned)
        assert tile.split_k == 1 and not tile.persistent
        if arch:
            moved = (tile.block_m + tile.block_n) * tile.block_k * dtype.itemsize * tile.num_stages
            assert moved <= SHARED_MEMORY[arch]
    few = grouped_tile(arch=arch, dtype=torch.bfloat16, T=128, E=128, aligned=True).block_m
    assert few == (64 if arch in (90, 100) else 16)
