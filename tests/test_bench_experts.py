"""The benchmark over stacks of experts and its cases of the static check: that they run, and measure what they say."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from bench import check, experts, limits, records  # noqa: E402
from bench.static_cases import all_cases, quick_cases  # noqa: E402
from bench.static_cases_experts import Experts, all_cases_experts, quick_cases_experts  # noqa: E402


def test_smoke_run_writes_a_valid_result(tmp_path, capsys):
    """Catches a program that no longer runs, an implementation that is wrong, and a file without its rows."""
    assert experts.main(["--smoke", "--out", str(tmp_path), "--minutes", "5"]) == 0
    result = records.read(tmp_path / "experts.json")
    assert result["kind"] == "experts" and not result["missing"]
    (case,) = experts.cases(True)
    by_name = {row["implementation"]: row for row in result["rows"]}
    assert by_name.keys() == experts.IMPLEMENTATIONS.keys()
    for name, row in by_name.items():
        assert row["status"] == "ok" and row["problem"] == case.key, row
        assert len(row["errors"]) == (2 if name in experts.WITHOUT_ADAPTERS else 6)
    assert by_name["frozen"]["ratio"] == 1.0 and by_name["peftkern"]["path"] == "triton"
    assert case.key in capsys.readouterr().out


def test_wrong_results_are_caught():
    """Catches a check that lets an adapter without its scaling pass, or experts that are exchanged."""
    work = experts.Work(experts.cases(True)[0], torch.device("cpu"))
    truth = work.truth(True)
    assert max(work.check(work.step(experts.as_peft), truth).values()) < 1e-4
    with pytest.raises(check.WrongResultError, match="y: error"):
        work.check(work.step(lambda x, w, a, b, offsets: experts.as_peft(x, w, a, b / 2, offsets)), truth)
    with pytest.raises(check.WrongResultError, match="y: error"):
        work.check(work.step(lambda x, w, a, b, offsets: experts.as_peft(x, w.flip(0), a, b, offsets)), truth)


def test_nothing_is_measured_without_a_gpu_or_kept_from_a_smoke_run(monkeypatch):
    """Catches numbers of an interpreter under bench/results."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert experts.main([]) == 2
    assert experts.main(["--smoke"]) == 2


def test_the_limit_is_that_of_the_work():
    """Catches a limit that leaves out a stack or a pass, or counts experts that no row goes to."""
    ceilings = limits.Ceilings({"bfloat16": 1e15}, 4e12)
    case = experts.cases(False)[0]
    found = experts.limit_microseconds(case, ceilings, torch.bfloat16)
    products = 2 * case.rows * 3 * case.hidden * case.intermediate  # of the frozen experts, one pass
    assert 2e6 * products / 1e15 < found < 2.2e6 * products / 1e15
    one = experts.Case("one", 1, 128, 1, 2048, 768)
    weights = 2 * 3 * 2048 * 768  # bytes of the one expert that is wanted
    assert 2e6 * weights / 4e12 < experts.limit_microseconds(one, ceilings, torch.bfloat16) < 2.2e6 * weights / 4e12


def test_the_grid_is_part_of_the_static_check():
    """Catches a stack that is measured and whose kernels are never compiled beforehand, or two cases of one name."""
    found = all_cases_experts()
    shapes = {(case.E, case.K, case.N) for case in found}
    assert {(case.experts, K, N) for case in experts.cases(False) for K, N in case.stacks} <= shapes
    assert set(found) <= set(all_cases()) and set(quick_cases_experts()) <= set(quick_cases())
    assert len({case.label() for case in found}) == len(found)


@pytest.mark.parametrize("arch, gemm", [(80, "_grouped_gemm_kernel"), (90, "_grouped_gemm_tma_kernel")])
def test_cases_launch_what_an_operation_launches(arch, gemm):
    """Catches a launch that crept in, and grids past what a launch allows."""
    names = [call.kernel.fn.__name__ for call in quick_cases_experts()[0].launches(arch)]
    forward = ["_grouped_route_kernel", "_multi_shrink_kernel", gemm]
    assert names == [*forward, *forward, "_multi_weight_gradient_kernel", "_multi_sum_kernel"]
    for case in all_cases_experts():
        for call in case.launches(arch):
            assert all(0 < n <= most for n, most in zip(call.grid, (2**31 - 1, 65535, 65535), strict=True))


def test_bytes_of_a_launch_count_only_experts_with_rows():
    """Catches a share of the limit that is flattered by weights that nobody reads."""
    few = Experts(4, 128, 2048, 1536).launches(90)[2]
    all_of_them = Experts(65536, 128, 2048, 1536).launches(90)[2]
    assert few.name == all_of_them.name == "base + expand of experts"
    assert 4 * 2048 * 1536 * 2 < few.bytes < 4.2 * 2048 * 1536 * 2 < all_of_them.bytes
