"""The dropout mask as kernels draw it: one pure function of (seed, row, column), whoever asks."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

pytest.importorskip("triton")

from numerics import arch_of  # noqa: E402
from peftkern import reference  # noqa: E402
from peftkern_kernels.dropout import Dropout  # noqa: E402
from peftkern_kernels.launch import run_all  # noqa: E402
from peftkern_kernels.lora_expand import expand_calls  # noqa: E402
from peftkern_kernels.lora_shrink import shrink_calls  # noqa: E402
from peftkern_kernels.reduction_tables import Tile  # noqa: E402
from peftkern_kernels.weight_gradient import weight_gradient_calls  # noqa: E402


def mask_of_shrink(dropout, M, K, device, tile, splits=1, dtype=torch.float32):
    """The mask that the shrink draws: it maps ones through the identity."""
    out = torch.empty(M, K, device=device)
    x, eye = torch.ones(M, K, device=device, dtype=dtype), torch.eye(K, device=device, dtype=dtype)
    options = {"arch": arch_of(device), "tile": tile, "splits": splits}
    run_all(shrink_calls(x, eye, out, scaling=1 - dropout.p, dropout=dropout, **options))
    return out > 0.5


def mask_of_weight_gradient(dropout, M, K, device, tile, dtype=torch.float32):
    """The mask that the weight gradient draws over x: the identity in dS's place."""
    da = torch.empty(M, K, device=device)
    x, eye = torch.ones(M, K, device=device, dtype=dtype), torch.eye(M, device=device, dtype=dtype)
    run_all(weight_gradient_calls(eye, x, None, None, da, None, dropout=dropout, arch=arch_of(device), tile=tile))
    return da > 0.5


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, -1, -(2**63), 2**40 + 3])
def test_kernels_agree_with_each_other_and_the_reference(seed, device):
    """Bugs: mask tied to a tile's shape, seed cut to 32 bits or read as signed, a group of eight in the wrong order."""
    M, K = 37, 70
    dropout = Dropout(torch.tensor([seed], device=device), 0.4)
    expected = reference.dropout_mask(dropout.seed, M, K, dropout.p)
    assert torch.equal(mask_of_shrink(dropout, M, K, device, Tile(16, 32, 128, 4, 2)), expected)
    assert torch.equal(mask_of_shrink(dropout, M, K, device, Tile(64, 16, 32, 4, 2), splits=3), expected)
    assert torch.equal(mask_of_weight_gradient(dropout, M, K, device, Tile(16, 64, 64, 4, 2)), expected)
    assert torch.equal(mask_of_weight_gradient(dropout, M, K, device, Tile(32, 16, 16, 4, 2)), expected)


def mask_of_expand(dropout, M, N, device, dtype=torch.float32):
    """The mask that the expand draws over its output: a product of ones, or of what 1 - p leaves of them."""
    s, b = torch.ones(M, 1, device=device, dtype=dtype), torch.ones(N, 1, device=device, dtype=dtype)
    out = torch.empty(M, N, device=device, dtype=dtype)
    run_all(expand_calls(s, b, out, dropout=dropout, arch=arch_of(device)))
    return out > 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threshold", [1, 2**15 - 1, 2**15, 2**15 + 1, 2**16 - 1, 2**16])
def test_every_bit_of_the_threshold_counts(threshold, dtype, device):
    """Bugs: 16-bit numbers compared two at a time borrow from each other, or misjudge a threshold whose upper bit is
    set; less than or equal for less than."""
    M, K = 128, 256
    p = threshold / 2**16 if threshold < 2**16 else 1 - 2.0**-40

    def tells_neighbours_apart(seed):
        nearby = [t / 2**16 for t in range(threshold - 1, threshold + 2) if t < 2**16]
        masks = [reference.dropout_mask(seed, M, K, p) for p in nearby]
        return all((one != next_one).any() for one, next_one in pairwise(masks))

    seeds = (torch.tensor([seed], device=device) for seed in range(1000))
    dropout = Dropout(next(filter(tells_neighbours_apart, seeds)), p)
    assert dropout.threshold == threshold
    expected = reference.dropout_mask(dropout.seed, M, K, p)
    tile = Tile(64, 128, 128, 4, 2)
    assert torch.equal(mask_of_shrink(dropout, M, K, device, tile, dtype=dtype), expected)
    assert torch.equal(mask_of_weight_gradient(dropout, M, K, device, tile, dtype=dtype), expected)
    assert torch.equal(mask_of_expand(dropout, M, K, device, dtype=dtype), expected)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_frequency(p, device):
    """Bug: a threshold compared with signed or 32-bit words drops twice as many, or none. Bound: 5 sigma."""
    M, K = 64, 128
    dropout = Dropout(torch.tensor([12345], device=device), p)
    dropped = 1 - mask_of_shrink(dropout, M, K, device, Tile(64, 64, 128, 4, 2)).double().mean().item()
    assert abs(dropped - p) < 5 * (p * (1 - p) / (M * K)) ** 0.5


def test_boundaries(device):
    """Bugs: p = 0 drops the words that are 0; with a p next to 1 a few are kept, and scaled by 2^40."""
    tile = Tile(16, 32, 64, 4, 2)
    seed = torch.tensor([3], device=device)
    assert mask_of_shrink(Dropout(seed, 0.0), 16, 64, device, tile).all()
    assert reference.dropout_mask(seed, 64, 4096, 0.0).all()
    assert not reference.dropout_mask(seed, 64, 4096, 1 - 2.0**-40).any()
    nearly_one = Dropout(seed, 1 - 2.0**-40)
    assert nearly_one.threshold == 2**16
    assert not mask_of_weight_gradient(nearly_one, 16, 64, device, Tile(16, 64, 16, 4, 2)).any()


def test_different_seeds_and_rows_differ(device):
    """Bug: a constant counter, so that every row, or every seed, drops the same columns."""
    tile = Tile(16, 64, 64, 4, 2)
    seeds = [torch.tensor([s], device=device) for s in (1, 2, 2**32 + 1)]
    masks = [mask_of_shrink(Dropout(seed, 0.5), 16, 64, device, tile) for seed in seeds]
    for other in masks[1:]:
        assert 0.3 < (masks[0] != other).double().mean() < 0.7
    assert len({tuple(row.tolist()) for row in masks[0]}) == 16
