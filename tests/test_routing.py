"""The routing of a batch over adapters: in plain PyTorch against Python's own sort, and the kernel against that."""

from __future__ import annotations

import pytest
import torch

from peftkern_kernels.routing import (
    Routing,
    block_rows,
    build_routing,
    chunk_rows,
    empty_routing,
    plane_count,
    slot_seed,
)

CASES = [(1, 1), (16, 64), (37, 5), (64, 64), (300, 2), (700, 3), (1025, 40), (3000, 4)]  # M, slots


def some_ids(M: int, slots: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """Ids that leave some slots empty, with -1 and numbers that are no slot among them."""
    generator = torch.Generator().manual_seed(M + slots)
    ids = torch.randint(-2, slots + 2, (M,), generator=generator)
    return torch.where(ids % 5 == 3, -1, ids).to(dtype)


def check_tables(r: Routing, own: list[int]) -> None:
    """Every row in one block of its slot, every row of a slot in one chunk, every plane in one sum."""
    M = len(own)
    perm = r.perm.tolist()
    covered: list[int] = []
    for slot, first, length in r.blocks.t().tolist():
        assert 0 <= length <= block_rows(M)
        assert all(own[perm[at]] == slot for at in range(first, first + length))
        covered += range(first, first + length)
    assert covered == list(range(M)), "blocks do not cover the rows once"
    in_chunks, planes = 0, {}
    for slot, first, length, plane in r.chunks.t().tolist():
        assert 0 <= length <= chunk_rows(M) and (length == 0 or slot >= 0)
        assert all(own[perm[at]] == slot for at in range(first, first + length))
        in_chunks += length
        if plane >= 0:
            planes.setdefault(slot, []).append(plane)
    assert in_chunks == sum(slot >= 0 for slot in own)
    for slot, first, number in r.sums.t().tolist():
        assert (slot >= 0) == (number > 0)
        if number:
            assert planes.pop(slot) == list(range(first, first + number)) and first + number <= plane_count(M)
    assert not planes, "a plane that nobody adds"


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("M, slots", CASES)
def test_plain_routing(M, slots, dtype):
    """Bugs: an unstable sort, -1 not last, an id past the slots kept, a segment's last short block left out."""
    ids = some_ids(M, slots, dtype)
    r = build_routing(ids, slots)
    assert all(t.dtype == torch.int32 for t in r.tensors)
    assert [t.shape for t in r.tensors] == [t.shape for t in empty_routing(M, slots, "cpu").tensors]
    own = [int(i) if 0 <= i < slots else -1 for i in ids]
    assert r.ids.tolist() == own and (r.M, r.slots) == (M, slots)
    order = sorted(range(M), key=lambda i: (own[i] % (slots + 1), i))
    assert r.perm.tolist() == order
    assert r.seg_start.tolist() == [sum(0 <= o < s for o in own) for s in range(slots + 1)]
    assert r.row_in_adapter.tolist() == [own[:i].count(own[i]) for i in range(M)]
    check_tables(r, own)


@pytest.mark.parametrize("ids", [[-1] * 40, [2] * 700, [3, 0] * 300, list(range(-1, 3)) * 10])
def test_lopsided_batches(ids):
    """Bugs: tables that overflow where all rows are of one slot, or of none."""
    r = build_routing(torch.tensor(ids), 4)
    check_tables(r, ids)


def test_no_rows_and_refused():
    """Bugs: a sort of nothing that fails; ids of two axes, or floats, taken for one row."""
    assert [t.numel() for t in build_routing(torch.empty(0, dtype=torch.int64), 3).tensors] == [0, 0, 0, 4, 0, 0, 0]
    for wrong in (torch.zeros(2, 2, dtype=torch.int64), torch.zeros(3)):
        with pytest.raises(ValueError, match=r"ids: expected int32 or int64 \[M\]"):
            build_routing(wrong, 3)
    with pytest.raises(ValueError, match="slots: expected at least 1"):
        build_routing(torch.zeros(3, dtype=torch.int64), 0)


def test_slot_seeds_differ_and_wrap():
    """Bugs: slots that share a mask; a seed near the end of int64 that overflows into an error."""
    seed = torch.tensor([2**63 - 5])
    seeds = {int(slot_seed(seed, slot)) for slot in range(1000)}
    assert len(seeds) == 1000 and slot_seed(seed, 0).equal(seed)


@pytest.mark.parametrize("M, slots", [*CASES, (130, 1024)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_kernel_agrees(M, slots, dtype, device):
    """Bugs: ties in another order, unused entries left as they were, a tile's rest counted as rows."""
    pytest.importorskip("triton")
    from peftkern_kernels.launch import run_all
    from peftkern_kernels.route_kernel import route_calls

    ids = some_ids(M, slots, dtype)
    expected = build_routing(ids, slots)
    got = Routing(*(torch.full_like(t, -77).to(device) for t in expected.tensors))
    run_all(route_calls(ids.to(device), got))
    for name, a, b in zip(Routing.__slots__, got.tensors, expected.tensors, strict=True):
        assert torch.equal(a.cpu(), b), name


def test_the_door_agrees(device):
    """Bugs: a large batch left to a kernel that cannot take it; strided ids read as if they were contiguous."""
    pytest.importorskip("triton")
    from peftkern.ops._route_triton import route

    for M in (0, 33, 5000):
        ids = some_ids(2 * M, 7)[::2]
        for a, b in zip(route(ids.to(device), 7).tensors, build_routing(ids, 7).tensors, strict=True):
            assert torch.equal(a.cpu(), b)


def test_a_captured_graph_makes_its_own_tables(monkeypatch):
    """Bugs: a graph that replays with the tables of the ids before its capture, whose memory may be another's by then;
    tables taken out of a capture, where nothing has been computed."""
    from peftkern.ops import adapter_route

    ids, x = torch.tensor([1, 0, 3]), torch.zeros(3, 2, 4)
    outside = adapter_route.AdapterBatch(ids, 4)
    kept, places = outside.routing(6), outside.places_of_rows(x)
    monkeypatch.setattr(adapter_route, "is_capturing", lambda t: True)
    ids.fill_(2)
    inside = adapter_route.AdapterBatch(ids, 4)
    for batch in (outside, inside):
        assert batch.routing(6).ids.tolist() == [2] * 6
    assert outside.places_of_rows(x).tolist() == [[2, 2]] * 3
    assert inside.routing(6) is inside.routing(6), "layers of one capture share the launch"
    monkeypatch.undo()
    assert outside.routing(6) is kept and outside.places_of_rows(x) is places
    assert inside.routing(6) is not inside.routing(6)


def test_each_stream_makes_its_own_tables(monkeypatch):
    """Bug: tables that are read on a CUDA stream which does not wait for the one that they are made on."""
    from peftkern.adapter_pool import Layout
    from peftkern.ops import adapter_route

    stream, x, layout = [1], torch.zeros(3, 2, 4), Layout([(0, 2), (2, 2)])
    monkeypatch.setattr(adapter_route, "stream_of", lambda _: stream[0])
    batch = adapter_route.AdapterBatch(torch.tensor([1, 0, 1]), 2)

    def made():
        return batch.routing(6), batch.places_of_rows(x), batch.in_order(6, layout)

    first = made()
    stream[0] = 2
    other = made()
    assert all(a is not b for a, b in zip(first, other, strict=True)) and torch.equal(first[0].perm, other[0].perm)
    stream[0] = 1
    assert all(a is b for a, b in zip(first, made(), strict=True))
