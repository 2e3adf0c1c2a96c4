"""Ranks that are no multiple of 16: their tiles, and that the static check compiles them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from bench.static_cases import LoraLinear, all_cases
from bench.static_cases_shared import LoraLinearShared
from peftkern_kernels.reduction_tables import by_elements


def test_the_grid_has_them():
    """Catches a grid of multiples of 16 alone: every block of ranks had a tile that spilled with other ranks."""
    cases = all_cases()
    linear = {(case.R, case.dropout) for case in cases if isinstance(case, LoraLinear)}
    assert {(12, True), (20, True), (20, False), (36, True), (36, False)} <= linear
    sums = {case.R * len(case.outs) for case in cases if isinstance(case, LoraLinearShared)}
    assert any(R > 32 and R % 16 for R in sums), "ranks that add up to no multiple of 16"


@pytest.mark.parametrize(
    "shape, strides, expected",
    [
        ((64, 16), (16, 1), False),
        ((64, 16), (48, 1), False),  # one projection's columns of S
        ((64, 16), (36, 1), True),
        ((64, 20), (20, 1), True),
        ((64, 20), (32, 1), True),  # the mask, not the address
        ((64, 20), (1, 64), False),  # A's transpose: whole rows of A
    ],
)
def test_by_elements(shape, strides, expected):
    """Catches a factor whose rows are whole vectors that is taken for single elements, and the reverse."""
    factor = torch.empty_strided(shape, strides, dtype=torch.bfloat16, device="meta")
    assert by_elements(factor) is by_elements(factor.t()) is expected
    assert by_elements(factor, torch.empty(64, 16, dtype=torch.bfloat16, device="meta")) is expected


def test_only_ranks_that_are_loaded_by_elements_leave_the_timed_tiles():
    """Catches a rank of 20 or 36 in the tile of 32 or 64, which spills by its masks and addresses; a timed rank that
    leaves its tile; a mask beside sm_80's largest tile."""

    def call(R, name, arch=90, M=8192, **options):
        calls = LoraLinear(M, 4096, 4096, R, path="triton", **options).launches(arch)
        return [c for c in calls if c.name == name][-1]

    assert [call(R, "dY pass").num_warps for R in (32, 20)] == [4, 8]
    assert [call(R, "weight gradient").num_warps for R in (64, 36)] == [4, 8]
    # Of dY, by B's columns; of so few rows that none runs beside the GEMM, in a tile of its own.
    shrinks = [call(R, "shrink", M=2048) for R in (64, 36)]
    assert [c.constants["BLOCK_K"] for c in shrinks] == [128, 64]
    assert [call(R, "base + expand", dropout=True).constants["BLOCK_R"] for R in (32, 20)] == [32, 16]
    for R in (8, 16, 64):
        masked, plain = (call(R, "base + expand", 80, dropout=dropout) for dropout in (True, False))
        assert masked.constants["BLOCK_N"] == 128 and plain.constants["BLOCK_N"] == 256
