"""`LayerAdapters`: parameters that are views into a pool, and what happens when they leave it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from peftkern.adapter_pool import LayerAdapters, Layout
from peftkern.ops import lora_linear, multi_lora_linear

K, N = 7, 5


def adapter(rank, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(*shape, generator=generator)) for shape in ((rank, K), (N, rank))]


def filled(ranks=(3, 2)):
    pool = LayerAdapters(K, N, 4, 3)
    held = [adapter(rank, seed) for seed, rank in enumerate(ranks)]
    for slot, (A, B) in enumerate(held):
        pool.put(slot, A, B, 1.0 + slot)
    return pool, held


def test_put_keeps_values_and_makes_views():
    """Would catch values lost on the way into the pool, or a factor laid out so that safetensors cannot save it."""
    pool = LayerAdapters(K, N, 2, 4)
    A, B = adapter(3)
    values = [A.detach().clone(), B.detach().clone()]
    pool.put(1, A, B, 0.5)
    assert torch.equal(A, values[0]) and torch.equal(B, values[1])
    assert A.data_ptr() == pool.pool_a[4].data_ptr() and B.data_ptr() == pool.pool_b[4 * N :].data_ptr()
    assert A.is_contiguous() and B.is_contiguous() and A.is_leaf and A.requires_grad
    assert pool.rank.tolist() == [0, 3] and pool.row_offset.tolist() == [0, 4] and pool.scaling.tolist() == [0.0, 0.5]
    assert pool.layout == Layout([(0, 0), (4, 3)])


def test_a_step_of_an_optimizer_is_seen():
    """Would catch a pool that is a copy of the parameters."""
    pool, held = filled()
    x, weight, ids = torch.randn(2, K), torch.randn(N, K), torch.tensor([0, 1])
    optimizer = torch.optim.SGD([t for pair in held for t in pair], lr=0.1)
    multi_lora_linear(x, weight, pool, ids).square().sum().backward()
    optimizer.step()
    assert not pool.settle()
    want = torch.stack([lora_linear(x[i], weight, *held[i], 1.0 + i) for i in range(2)])
    torch.testing.assert_close(multi_lora_linear(x, weight, pool, ids), want)


@pytest.mark.parametrize("move", [lambda p: p.data.clone(), lambda p: p.data.double(), lambda p: p.data.half()])
def test_parameters_that_moved_are_brought_back(move):
    """Would catch old values, or the old dtype, being used after `.to()`, `.half()` or an optimizer that swaps data."""
    pool, held = filled()
    for pair in held:
        for p in pair:
            p.data = move(p)
            p.data.add_(1)
    values = [[p.detach().clone() for p in pair] for pair in held]
    assert pool.settle() and not pool.settle()
    assert pool.pool_a.dtype == held[0][0].dtype
    for slot, (pair, old) in enumerate(zip(held, values, strict=True)):
        for p, value in zip(pair, old, strict=True):
            assert torch.equal(p, value)
        assert pool.pool_a[slot * 3].data_ptr() == pair[0].data_ptr()
    assert pool.rank.tolist() == [3, 2, 0, 0] and pool.scaling.tolist() == [1.0, 2.0, 0.0, 0.0]


def test_moving_one_of_two_to_another_dtype_is_named():
    """Would catch half of a layer computed from stale rows."""
    pool, held = filled()
    held[0][0].data = held[0][0].data.double()
    with pytest.raises(TypeError, match="one dtype and device"):
        pool.settle()


def test_tables_are_written_in_place():
    """Would catch a table that is made anew, which a captured CUDA graph would not see."""
    pool, held = filled()
    tensors = [pool.pool_a, pool.pool_b, pool.row_offset, pool.rank, pool.scaling]
    addresses = [t.data_ptr() for t in tensors]
    pool.drop(0)
    pool.put(0, *adapter(2, 9), 4.0)
    pool.put(3, *adapter(1, 8), 5.0)
    pool.rescale(1, 7.0)
    assert [t.data_ptr() for t in (pool.pool_a, pool.pool_b, pool.row_offset, pool.rank, pool.scaling)] == addresses
    assert pool.rank.tolist() == [2, 2, 0, 1] and pool.scaling.tolist() == [4.0, 7.0, 0.0, 5.0]
    assert pool.scalings == (4.0, 7.0, 0.0, 5.0)


@pytest.mark.parametrize("leave", [lambda pool: pool.drop(0), lambda pool: None])
def test_who_leaves_takes_its_values_along(leave):
    """Would catch tensors of an adapter that left, dropped or displaced, reading and writing the next one's rows."""
    pool, held = filled()
    values = [t.detach().clone() for t in held[0]]
    next_one = adapter(3, 9)
    leave(pool)
    pool.put(0, *next_one, 1.0)
    assert all(torch.equal(t, value) for t, value in zip(held[0], values, strict=True))
    kept = [t.detach().clone() for t in next_one]
    for t in held[0]:
        t.data.zero_()
    assert all(torch.equal(t, value) for t, value in zip(next_one, kept, strict=True))
    assert torch.equal(pool.pool_a[:3], kept[0]) and not pool.settle()


def test_a_factor_that_stays_is_not_moved():
    """Would catch an adapter with one new factor whose other one leaves the pool, which is then laid out anew."""
    pool, held = filled()
    B = nn.Parameter(held[0][1].detach().clone() + 1)
    addresses = pool.pool_a.data_ptr(), held[0][0].data_ptr()
    pool.put(0, held[0][0], B, 1.0)
    assert (pool.pool_a.data_ptr(), held[0][0].data_ptr()) == addresses and not pool.settle()
    assert held[0][1].data_ptr() != B.data_ptr() and torch.equal(held[0][1] + 1, B)


def test_a_copy_has_a_pool_of_its_own():
    """Would catch a copied model whose parameters still lie in the first one's pool."""
    pool, held = filled()
    both = {"pool": pool, "held": held}
    twin = copy.deepcopy(both)
    twin["held"][0][0].data.zero_()
    assert twin["pool"].settle() or twin["held"][0][0].data_ptr() == twin["pool"].pool_a.data_ptr()
    assert held[0][0].abs().sum() > 0 and twin["pool"].pool_a[0].abs().sum() == 0


BAD = [
    (lambda A, B: (A.data.double(), B), TypeError, "lora_A: expected the pool's dtype"),
    (lambda A, B: (A.data[:, :-1], B), ValueError, r"lora_A: expected shape \[r, 7\]"),
    (lambda A, B: (A, B.data[:-1]), ValueError, r"lora_B: expected shape \[5, 3\]"),
    (lambda A, B: tuple(adapter(4)), ValueError, "rank of at most 3, got 4"),
    (lambda A, B: (A.data.to("meta"), B), ValueError, "the pool's device"),
    (lambda A, B: ([1.0], B), TypeError, "lora_A: expected a plain tensor, got a list"),
]


@pytest.mark.parametrize("damage, error, message", BAD)
def test_what_does_not_fit_changes_nothing(damage, error, message):
    """Would catch an adapter that is half in the pool when its second factor is refused."""
    pool, held = filled()
    before = pool.pool_a.clone()
    with pytest.raises(error, match=message):
        pool.put(0, *damage(*adapter(3, 5)), 1.0)
    assert torch.equal(pool.pool_a, before) and pool.entries[0].lora_A is held[0][0]


def test_wrong_sizes_are_named():
    """Would catch a pool of no slots, or a slot past the end."""
    with pytest.raises(ValueError, match="slots: expected an int of at least 1"):
        LayerAdapters(K, N, 0, 3)
    with pytest.raises(ValueError, match="max_rank"):
        LayerAdapters(K, N, 1, True)
    with pytest.raises(IndexError, match="slot: expected 0 to 3, got 4"):
        filled()[0].put(4, *adapter(1), 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_addresses_are_those_of_the_views(dtype):
    """Would catch an address that is worked out wrongly: the pool would be laid out anew at each forward, or not at all
    when a parameter has left it."""
    pool = LayerAdapters(5, 7, 3, 4, dtype)
    for slot, rank in ((2, 3), (0, 4), (1, 1)):
        pool.put(slot, torch.randn(rank, 5).to(dtype), torch.randn(7, rank).to(dtype), 1.0)
    views = [pool._places(slot, rank) for slot, rank in enumerate((4, 1, 3))]
    assert pool._addresses == tuple((a.data_ptr(), b.data_ptr()) for a, b in views)
    assert not pool.settle()
    entry = pool.entries[1]
    entry.lora_B.data = entry.lora_B.data.clone()
    assert pool.settle() and not pool.settle()
