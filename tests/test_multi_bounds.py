"""Kernels over many adapters with nothing but what the launches before have written: no wild address, no leftovers.

Uninitialised memory is filled with NaN and the largest integers, so that a table that is read before it is written, or
past what was written, is a wild address, which the interpreter refuses (bounds.py).
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from adapter_batches import RANKS, ids_for, make_adapters, wide  # noqa: E402
from numerics import arch_of  # noqa: E402
from peftkern.ops._multi_lora_linear_triton import backward_calls, forward_calls, multi_calls  # noqa: E402
from peftkern_kernels.launch import run_all  # noqa: E402
from peftkern_kernels.route_kernel import route_calls  # noqa: E402
from peftkern_kernels.routing import build_routing, empty_routing  # noqa: E402

SLOTS = len(RANKS)
LAYERS = [*((path, M) for path in ("triton", "cublas") for M in (1, 17, 70)), ("decode", 1), ("decode", 17)]


@pytest.fixture(autouse=True)
def _poisoned_memory():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert (torch.empty(3, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def far_ids(M: int) -> torch.Tensor:
    """Ids of which some are far outside of the slots, also beyond int32."""
    ids = ids_for(M, SLOTS)
    ids[::3] = torch.tensor([2**40, -(2**40), 2**31 - 1, SLOTS])[torch.arange(len(ids[::3])) % 4]
    return ids


@pytest.mark.parametrize("kind", ["mixed", "none", "one", "far"])
@pytest.mark.parametrize("M", [1, 17, 64])
def test_a_pair_right_behind_its_routing(M, kind, device):
    """Bugs: a block table with entries that nobody wrote; planes that are read where no program wrote, because the
    adapter's rank ends before; an id that is no slot and is looked up all the same."""
    N, K = 33, 70
    adapters = make_adapters(N, K, torch.float16, device)
    ids = (far_ids(M) if kind == "far" else ids_for(M, SLOTS, kind)).to(device)
    x, start = wide(M, K, torch.float16, device), torch.randn(M, N, device=device).half()
    for decode in (True, False):
        routing, y = empty_routing(M, SLOTS, device), start.clone()
        calls = multi_calls(x, adapters, routing, y, arch=arch_of(device), decode=decode)
        run_all([*route_calls(ids, routing), *calls])
        for made, truth in zip(routing.tensors, build_routing(ids, SLOTS).tensors, strict=True):
            assert torch.equal(made, truth)
        assert y.isfinite().all() and torch.equal(y[routing.ids < 0], start[routing.ids < 0])


@pytest.mark.parametrize("path, M", LAYERS)
def test_forward_and_backward_right_behind_the_routing(path, M, device):
    """Bugs: as above in a layer's launches; gradients of chunks that no slot has."""
    N, K = 33, 70
    adapters, weight = make_adapters(N, K, torch.float16, device), torch.randn(N, K, device=device).half()
    x, dy = wide(M, K, torch.float16, device), wide(M, N, torch.float16, device)
    ids, routing, arch = far_ids(M).to(device), empty_routing(M, SLOTS, device), arch_of(device)
    y, s, calls = forward_calls(x, weight, adapters, routing, None, None, path, arch)
    run_all([*route_calls(ids, routing), *calls])
    *gradients, calls = backward_calls(dy, x, weight, adapters, s, routing, None, path, arch, (True, True, True))
    run_all(calls)
    assert all(t.isfinite().all() for t in (y, s, *gradients))
