"""The arithmetic of merging (`peftkern.utils.merge_utils`) beside PEFT's functions of the same names, and fp64."""

from __future__ import annotations

import warnings

import pytest
import torch

from numerics import padded_randn
from peftkern.tuners.lora.weighted import _quantile
from peftkern.utils import merge_utils

theirs = pytest.importorskip("peft.utils.merge_utils")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
METHODS = ["task_arithmetic", "magnitude_prune", "ties", "dare_linear", "dare_ties"]


def tasks(dtype: torch.dtype, transposed: bool = False) -> list[torch.Tensor]:
    """Three matrices with rows in NaN-padded memory, some elements zero or of equal magnitude."""
    made = [padded_randn(13, 9, pad=3 + i, dtype=dtype, seed=i) for i in range(3)]
    made[0][:, 4] = 0
    made[1][2] = made[0][2]
    return [t.T for t in made] if transposed else made


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("name", METHODS)
def test_methods_are_those_of_peft(name, sign, dtype, transposed):
    """Catches another mask, another order of draws (also of turned tensors), another majority where a sum is zero."""
    weights = torch.tensor([0.7, -1.3, 0.4])
    options = [] if name == "task_arithmetic" else [0.6]
    options += [sign] if "ties" in name else []
    results = []
    for module in (merge_utils, theirs):
        torch.manual_seed(3)
        results.append(getattr(module, name)(tasks(dtype, transposed), weights, *options))
    got, want = results
    assert got.dtype == torch.float32 and got.shape == want.shape
    # PEFT rounds each product and quotient to the tasks' dtype where that is narrow; ours are wide until the end.
    eps = torch.finfo(dtype).eps if name.startswith("dare") or name == "ties" else torch.finfo(torch.float32).eps
    assert ((got - want).abs() <= 4 * eps * (want.abs() + sum(t.float().abs() for t in tasks(dtype, transposed)))).all()


@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_prune_keeps_the_share(method):
    """Catches a share that is rounded up, a mask of another shape, and density 1 that draws from the generator."""
    tensor = tasks(torch.float32)[2]
    for density in (0.0, 0.3, 1.0):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pruned = []
            for module in (merge_utils, theirs):
                torch.manual_seed(4)
                pruned.append(module.prune(tensor, density, method))
                state = torch.get_rng_state()
        assert torch.equal(*pruned)
        assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="method must be"):
        merge_utils.prune(tensor, 0.5, "largest")
    for density in (-0.1, 1.1, None, True):
        with pytest.raises(ValueError, match="density must be a number"):
            merge_utils.prune(tensor, density, method)
    with pytest.raises(ValueError, match="above 0"):
        merge_utils.prune(tensor, 0, "random", rescale=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_dare_keeps_is_rescaled_in_float32(dtype):
    """Catches a quotient that is rounded to the adapter's 16 bits before it is added up."""
    tensor = tasks(dtype)[0]
    torch.manual_seed(4)
    kept = merge_utils.random_pruning(tensor, 0.7, rescale=False)
    torch.manual_seed(4)
    scaled = merge_utils.random_pruning(tensor, 0.7, rescale=True)
    assert kept.dtype == dtype and scaled.dtype == torch.float32
    assert torch.equal(scaled, kept.float() / 0.7)


def test_majorities_and_means_by_hand():
    """Catches a zero that votes, a tie that goes to the negative, and a mean over all tasks."""
    stacked = torch.tensor([[3.0, -1.0, 0.0, 1.0], [-1.0, -1.0, 0.0, -1.0], [-1.0, 0.0, 0.0, 0.0]])
    total = merge_utils.calculate_majority_sign_mask(stacked, "total")
    assert total.tolist() == [[True, True, False, True], [False, True, False, False], [False] * 4]
    frequency = merge_utils.calculate_majority_sign_mask(stacked, "frequency")
    assert frequency.tolist() == [[False, True, False, True], [True, True, False, False], [True, False, False, False]]
    assert merge_utils.disjoint_merge(stacked, total).tolist() == [3, -1, 0, 1]
    assert merge_utils.disjoint_merge(stacked, frequency).tolist() == [-1, -1, 0, 1]
    with pytest.raises(ValueError, match="majority_sign_method"):
        merge_utils.calculate_majority_sign_mask(stacked, "most")


def test_quantile_is_torchs():
    """Catches a place that is off by one, or not interpolated."""
    values = torch.randn(1001, generator=torch.Generator().manual_seed(0))
    for q in (0.0, 0.123, 0.5, 0.9, 0.99, 1.0):
        torch.testing.assert_close(_quantile(values, q), torch.quantile(values, q))
