"""The benchmark of DoRA and its cases of the static check: that they run, and measure what they say."""

from __future__ import annotations

import json

import pytest
import torch

from bench import check, dora, records
from bench.static_cases import all_cases, quick_cases
from bench.static_cases_dora import DOWN, DoraLinear, Q, all_cases_dora, quick_cases_dora


def test_smoke_run_writes_a_valid_result(tmp_path, capsys):
    """Catches a program that no longer runs, a path that is wrong, and a file without its table."""
    assert dora.main(["--smoke", "--out", str(tmp_path), "--minutes", "5"]) == 0
    result = records.read(tmp_path / "dora.json")
    assert result["kind"] == "dora" and not result["missing"]
    by_name = {(row["problem"], row["implementation"]): row for row in result["rows"]}
    for case in dora.cases(True):
        assert by_name[case.key, "frozen"]["ratio"] == 1.0
        row = by_name[case.key, "peftkern"]
        assert row["status"] == "ok" and row["path"] and set(row["errors"]) == {"y", "dx", "da", "db", "dm"}
        for other in ("eager, as PEFT", "lora"):
            assert by_name[case.key, other]["status"] == "ok"
        assert bool(by_name[case.key, "eager, as PEFT"]["errors"]) == (not case.dropout)
    assert capsys.readouterr().out.count("unchecked: its own mask") in (1, 2)  # PEFT's layer, where it is installed
    json.dumps(result)


def test_wrong_results_are_caught():
    """Catches a check that lets a norm with a gradient pass, or c on the low-rank part alone."""
    work = dora.Work(dora.cases(True)[0], torch.device("cpu"))
    assert max(work.check(dora.as_peft(work.case), "").values()) < 1e-5

    def with_gradient(x, weight, a, b, magnitude):
        v = weight + dora.SCALING * b @ a
        return (x @ v.T) * (magnitude / v.norm(dim=1))

    def lowrank_alone(x, weight, a, b, magnitude):
        norm = (weight + dora.SCALING * b @ a).norm(dim=1).detach()
        return x @ weight.T + magnitude / norm * dora.SCALING * (x @ a.T @ b.T)

    for wrong, name in ((with_gradient, "da"), (lowrank_alone, "y")):
        with pytest.raises(check.WrongResultError, match=name):
            work.check(wrong, "")


def test_nothing_is_measured_without_a_gpu_or_kept_from_a_smoke_run(monkeypatch):
    """Catches numbers of an interpreter under bench/results."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert dora.main([]) == 2
    assert dora.main(["--smoke"]) == 2


def test_the_grid_is_what_was_asked_for():
    """Catches a layer or a number of tokens that falls out of the measurement or the static check."""
    found = {(case.M, case.K, case.N) for case in dora.cases(False)}
    assert found == {(M, *sizes) for sizes in (Q, DOWN) for M in (512, 2048, 8192)}
    assert any(case.dropout for case in dora.cases(False))
    assert {(8192, *sizes) for sizes in (Q, DOWN)} <= {(c.M, c.K, c.N) for c in all_cases_dora()}
    assert set(all_cases_dora()) <= set(all_cases()) and set(quick_cases_dora()) <= set(quick_cases())
    assert len({case.label() for case in all_cases_dora()}) == len(all_cases_dora())


def test_cases_launch_what_their_path_says():
    """Catches a case that compiles nothing, or another path's kernels; and dropout that costs a pass more than it
    must."""
    pytest.importorskip("triton")

    def kernels(*sizes, **options):
        return [call.kernel.fn.__name__.strip("_") for call in DoraLinear(*sizes, **options).launches(90)]

    norms = ["dora_norm_kernel", "dora_factors_kernel"]
    product = ["cast_factor_kernel", "lora_linear_persistent_kernel"]  # which writes y as well
    forward = ["lora_shrink_kernel", *product]
    backward = ["ia3_scale_sum_kernel", "reduce_planes_kernel", "lora_dy_pass_kernel", "reduce_planes_kernel"]
    backward += [*product, "weight_gradient_kernel", "reduce_planes_kernel"]
    assert kernels(8192, *Q) == [*norms, *forward, *backward]
    drops = kernels(8192, *Q, dropout=True)
    assert drops == [*norms, "dora_dropout_kernel", *forward, "ia3_scale_kernel", *backward, "dora_dropout_kernel"]
    assert kernels(8192, *Q, norm=True, learns=False) == ["dora_factors_kernel", *forward]
    assert kernels(1, *Q, learns=False)[-1] == "ia3_scale_kernel"
