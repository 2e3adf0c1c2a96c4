"""The grouped kernels over many adapters against fp64, slot by slot: shrink, expand and weight gradient."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from adapter_batches import factors, make_adapters, routed, rows_of, wide  # noqa: E402
from numerics import arch_of, assert_rounded  # noqa: E402
from peftkern import reference  # noqa: E402
from peftkern_kernels.dropout import Dropout  # noqa: E402
from peftkern_kernels.launch import run_all  # noqa: E402
from peftkern_kernels.multi_expand import multi_expand_calls  # noqa: E402
from peftkern_kernels.multi_shrink import multi_shrink_calls  # noqa: E402
from peftkern_kernels.multi_weight_gradient import multi_weight_gradient_calls  # noqa: E402
from peftkern_kernels.reduction_tables import Tile  # noqa: E402
from peftkern_kernels.routing import slot_seed  # noqa: E402

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [(1, 17, 33), (40, 48, 64), (70, 33, 130)]  # M, N, K
KINDS = ["mixed", "none", "one"]


def canary(M, C, dtype, device):
    """NaN [M, C] inside a larger NaN matrix, and that."""
    storage = torch.full((M + 1, C + 3), float("nan"), dtype=dtype, device=device)
    return storage[:M, :C], storage


def masked(x, rows, slot, dropout):
    """Rows of x in fp64, with the mask that their slot draws for them."""
    part = x[rows].double()
    if dropout is None:
        return part
    keep = reference.dropout_mask(slot_seed(dropout.seed, slot), len(rows), x.shape[1], dropout.p)
    return part * keep * dropout.keep_scale


def check_shrink(x, adapters, routing, *, pool="a", dropout=None, out_dtype=None, **options):
    out, storage = canary(x.shape[0], adapters.max_rank, out_dtype or x.dtype, x.device)
    calls = multi_shrink_calls(
        x, adapters, routing, out, pool=pool, dropout=dropout, arch=arch_of(x.device.type), **options
    )
    run_all(calls)
    for slot in range(-1, adapters.slots):
        rows = rows_of(routing, slot)
        rank = int(adapters.rank[slot]) if slot >= 0 else 0
        assert (out[rows, rank:] == 0).all(), f"slot {slot}: not zero past its rank"
        if rank == 0 or len(rows) == 0:
            continue
        a, b = factors(adapters, slot, x.dtype)
        factor, part, scale = (a if pool == "a" else b.T), masked(x, rows, slot, dropout), float(adapters.scaling[slot])
        truth, magnitude = scale * part @ factor.T, scale * part.abs() @ factor.abs().T
        assert_rounded(out[rows, :rank], truth, magnitude, terms=x.shape[1] + 2)
    assert storage[-1].isnan().all() and storage[:, adapters.max_rank :].isnan().all(), "stored outside"
    return out, calls


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pool", ["a", "b"])
@pytest.mark.parametrize("M, N, K", SIZES)
def test_shrink(M, N, K, pool, dtype, device):
    """Bugs: a neighbour's rank rows read (NaN between them), rows gathered for the wrong block, a slot's scaling for
    another's, an empty slot's NaN scaling in the zeros."""
    adapters = make_adapters(N, K, dtype, device)
    check_shrink(wide(M, K if pool == "a" else N, dtype, device), adapters, routed(M, 6, device), pool=pool)


@pytest.mark.parametrize("kind", KINDS)
def test_shrink_of_lopsided_batches(kind, device):
    """Bugs: rows of -1 left unwritten; a block table that runs out."""
    adapters = make_adapters(17, 33, torch.bfloat16, device)
    check_shrink(wide(40, 33, torch.bfloat16, device), adapters, routed(40, 6, device, kind))


@pytest.mark.parametrize("pool", ["a", "b"])
def test_shrink_split_strided_and_with_masters(pool, device):
    """Bugs: a split counted twice, another slot's scale on a plane, strides swapped, masters reinterpreted."""
    adapters = make_adapters(130, 200, torch.float32, device, max_rank=70)
    routing = routed(40, 6, device)
    x = wide(40, 200 if pool == "a" else 130, torch.bfloat16, device, transposed=True)
    _, calls = check_shrink(x, adapters, routing, pool=pool, splits=3, tile=Tile(16, 32, 32, 4, 2))
    assert len(calls) == 2
    check_shrink(x, adapters, routing, pool=pool, splits=1, out_dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shrink_with_dropout(dtype, device):
    """Bugs: the mask drawn for the batch's row in place of the adapter's, one mask for all slots."""
    adapters = make_adapters(17, 130, dtype, device)
    dropout = Dropout(torch.tensor([2**62 + 99], device=device), 0.3)
    x = wide(70, 130, dtype, device)
    check_shrink(x, adapters, routed(70, 6, device), dropout=dropout)
    check_shrink(x, adapters, routed(70, 6, device), dropout=dropout, splits=2, tile=Tile(16, 32, 16, 4, 2))


def check_expand(s, adapters, routing, C, *, pool="b", bias=None, dropout=None, accumulate=False, dtype=None):
    dtype, M = dtype or s.dtype, s.shape[0]
    out, storage = canary(M, C, dtype, s.device)
    if accumulate:
        out.copy_(torch.randn(M, C))
    before = out.double() if accumulate else torch.zeros(M, C, dtype=torch.float64, device=s.device)
    if bias is not None:
        before = before + bias.double()
    options = {"pool": pool, "bias": bias, "dropout": dropout, "accumulate": accumulate, "arch": arch_of(s.device.type)}
    run_all(multi_expand_calls(s, adapters, routing, out, **options))
    for slot in range(-1, adapters.slots):
        rows = rows_of(routing, slot)
        if len(rows) == 0:
            continue
        truth, magnitude = before[rows], before[rows].abs()
        rank = int(adapters.rank[slot]) if slot >= 0 else 0
        if rank:
            a, b = factors(adapters, slot, dtype)
            factor, part = (b if pool == "b" else a.T), s[rows, :rank].to(dtype).double()
            delta, size = part @ factor.T, part.abs() @ factor.abs().T
            if dropout is not None:
                keep = reference.dropout_mask(slot_seed(dropout.seed, slot), len(rows), C, dropout.p)
                delta, size = delta * keep * dropout.keep_scale, size * keep * dropout.keep_scale
            truth, magnitude = truth + delta, magnitude + size
        assert_rounded(out[rows], truth, magnitude, terms=rank + 3)
    assert storage[-1].isnan().all() and storage[:, C:].isnan().all(), "stored outside"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pool", ["a", "b"])
@pytest.mark.parametrize("M, N, K", SIZES)
def test_expand(M, N, K, pool, dtype, device):
    """Bugs: a rank's tail read from the next adapter, rows scattered to the wrong place, -1 left unwritten."""
    adapters = make_adapters(N, K, dtype, device)
    check_expand(wide(M, 64, dtype, device), adapters, routed(M, 6, device), K if pool == "a" else N, pool=pool)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("accumulate", [False, True])
def test_expand_with_bias(kind, accumulate, device):
    """Bugs: no bias for the rows of -1; what was there overwritten, or added twice."""
    adapters = make_adapters(33, 17, torch.float32, device, max_rank=70)
    s, bias = wide(40, 70, torch.bfloat16, device, transposed=True), torch.randn(66, device=device)[::2]
    check_expand(s, adapters, routed(40, 6, device, kind), 33, bias=bias, accumulate=accumulate)


@pytest.mark.parametrize("accumulate", [False, True])
def test_expand_with_dropout(accumulate, device):
    """Bugs: the mask laid over what was there before, drawn for the batch's rows, or for another slot."""
    adapters = make_adapters(17, 130, torch.bfloat16, device)
    dropout = Dropout(torch.tensor([-(2**62) + 5], device=device), 0.3)
    s = wide(70, 64, torch.bfloat16, device)
    check_expand(s, adapters, routed(70, 6, device), 130, pool="a", dropout=dropout, accumulate=accumulate)


def check_gradient(M, N, K, dtype, device, *, kind="mixed", masters=False, dropout=None, transposed=False, **options):
    adapters = make_adapters(N, K, torch.float32 if masters else dtype, device)
    routing = routed(M, 6, device, kind)
    x, dy = wide(M, K, dtype, device, transposed=transposed), wide(M, N, dtype, device, transposed=transposed)
    s, ds = wide(M, 64, dtype, device), wide(M, 64, dtype, device)
    pool_dtype = adapters.pool_a.dtype
    da = torch.full_like(adapters.pool_a, -77.0)
    db = torch.full_like(adapters.pool_b, -77.0)
    calls = multi_weight_gradient_calls(
        ds, x, s, dy, da, db, adapters, routing, dropout=dropout, arch=arch_of(device), **options
    )
    run_all(calls)
    owned = torch.zeros(len(da), dtype=torch.bool, device=device)
    for slot in range(adapters.slots):
        rows, rank = rows_of(routing, slot), int(adapters.rank[slot])
        offset = int(adapters.row_offset[slot])
        if len(rows) == 0 or rank == 0:
            continue
        owned[offset : offset + rank] = True
        part, s64, ds64, dy64 = masked(x, rows, slot, dropout), s[rows].double(), ds[rows].double(), dy[rows].double()
        truth, magnitude = ds64[:, :rank].T @ part, ds64[:, :rank].abs().T @ part.abs()
        assert_rounded(da[offset : offset + rank], truth, magnitude, terms=len(rows) + 2)
        block = db[offset * N : (offset + rank) * N].view(N, rank)
        truth, magnitude = dy64.T @ s64[:, :rank], dy64.abs().T @ s64[:, :rank].abs()
        assert_rounded(block, truth, magnitude, terms=len(rows) + 2)
    assert (da[~owned] == -77).all() and (db.view(-1, N)[~owned] == -77).all(), "stored in somebody else's rows"
    assert da.dtype == pool_dtype
    return da, db, calls


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M, N, K", SIZES)
def test_weight_gradient(M, N, K, dtype, device):
    """Bugs: a neighbour's gradient overwritten, rows of -1 counted, a last short step of rows read past its slot."""
    check_gradient(M, N, K, dtype, device)


@pytest.mark.parametrize("kind", ["mixed", "one"])
@pytest.mark.parametrize("dropout", [False, True])
def test_weight_gradient_of_several_chunks(kind, dropout, device):
    """Bugs: planes mixed up between slots, one added twice, a chunk's rows taken for the slot's in the mask."""
    mask = Dropout(torch.tensor([77], device=device), 0.3) if dropout else None
    M = 1500 if kind == "mixed" else 700
    options = {"kind": kind, "dropout": mask, "masters": True, "transposed": dropout}
    da, db, calls = check_gradient(M, 33, 20, torch.bfloat16, device, **options)
    assert len(calls) == 2


def test_weight_gradient_without_rows_or_with_one_half(device):
    """Bugs: a launch of an empty grid; an absent half's null pointer read."""
    check_gradient(40, 17, 33, torch.float32, device, kind="none")
    adapters, routing = make_adapters(17, 33, torch.float32, device), routed(40, 6, device)
    s, x, dy = (wide(40, c, torch.float32, device) for c in (64, 33, 17))
    da, db = torch.zeros_like(adapters.pool_a), torch.zeros_like(adapters.pool_b)
    both = torch.zeros_like(da), torch.zeros_like(db)
    arch = arch_of(device)
    run_all(multi_weight_gradient_calls(s, x, s, dy, *both, adapters, routing, arch=arch))
    run_all(multi_weight_gradient_calls(s, x, None, None, da, None, adapters, routing, arch=arch))
    run_all(multi_weight_gradient_calls(None, None, s, dy, None, db, adapters, routing, arch=arch))
    assert torch.equal(da, both[0]) and torch.equal(db, both[1])
    assert multi_weight_gradient_calls(None, None, None, None, None, None, adapters, routing, arch=arch) == []


def test_refused(device):
    """Bugs: tensors of another batch, rank or adapter bank read out of bounds."""
    adapters, routing = make_adapters(17, 33, torch.float32, device), routed(40, 6, device)
    x, s = torch.zeros(40, 33, device=device), torch.zeros(40, 64, device=device)
    with pytest.raises(ValueError, match=r"x: expected \[40, ...\]"):
        multi_shrink_calls(x[:5], adapters, routing, s, arch=0)
    with pytest.raises(ValueError, match="do not fit pool b"):
        multi_shrink_calls(x, adapters, routing, s, pool="b", arch=0)
    with pytest.raises(ValueError, match="do not fit pool a"):
        multi_expand_calls(s[:, :8], adapters, routing, x, pool="a", arch=0)
    with pytest.raises(ValueError, match="expected all three or none"):
        multi_weight_gradient_calls(s, x, None, None, None, None, adapters, routing, arch=0)
    with pytest.raises(ValueError, match="routing: expected 6 slots"):
        multi_shrink_calls(x, adapters, routed(40, 5, device), s, arch=0)
