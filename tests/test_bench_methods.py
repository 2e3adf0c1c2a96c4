"""`bench.cpu_methods`: the program runs through, and refuses to time what is wrong."""

from __future__ import annotations

import copy

import pytest
import torch

from bench import cpu_methods, records
from bench.check import WrongResultError

pytest.importorskip("peft")


def test_every_case_is_compared_and_timed(tmp_path):
    """Would catch a method that one of the libraries has not, and a case that is left out of the result."""
    assert cpu_methods.main(["--smoke", "--out", str(tmp_path)]) == 0
    result = records.read(tmp_path / "methods.json")
    assert [row["case"] for row in result["rows"]] == [case.key for case in cpu_methods.CASES]
    for row in result["rows"]:
        assert row["ratio"] > 0 and row["frozen_ms"] > 0 and row["errors"].keys() == {"loss", "gradients"}
    assert cpu_methods.main(["--smoke"]) == 2  # a tiny model's figures have no place among results


def test_wrong_gradients_are_not_timed():
    """Would catch a comparison that lets other values pass."""
    import peftkern

    case = cpu_methods.Case("prompt tuning")
    base = cpu_methods.llama(cpu_methods.SMOKE, torch.float32)
    ours, other = (cpu_methods.Trainee(peftkern, copy.deepcopy(base), cpu_methods.SMOKE, case) for _ in range(2))
    cpu_methods.check(ours, other, torch.float32)
    with torch.no_grad():
        other.parameters[0].mul_(1.5)
    with pytest.raises(WrongResultError, match="differ from PEFT's by"):
        cpu_methods.check(ours, other, torch.float32)
