"""The benchmark of IA3 and its cases of the static check: that they run, and measure what they say."""

from __future__ import annotations

import json

import pytest
import torch

from bench import check, ia3, records, tune
from bench.static_cases import all_cases, quick_cases
from bench.static_cases_ia3 import DOWN, KV, IA3Linear, all_cases_ia3, quick_cases_ia3
from peftkern.backend import DeviceInfo
from peftkern.ops.plan import plan_ia3_linear


def test_smoke_run_writes_a_valid_result(tmp_path, capsys):
    """Catches a program that no longer runs, a path that is wrong, and a file without its table."""
    assert ia3.main(["--smoke", "--out", str(tmp_path), "--minutes", "5"]) == 0
    result = records.read(tmp_path / "ia3.json")
    assert result["kind"] == "ia3" and not result["missing"]
    by_name = {(row["problem"], row["implementation"]): row for row in result["rows"]}
    for case in ia3.cases(True):
        assert by_name[case.key, "frozen"]["ratio"] == 1.0
        row = by_name[case.key, "peftkern"]
        assert row["status"] == "ok" and row["path"] and set(row["errors"]) == {"y", "dx", "dl"}
        assert by_name[case.key, "eager, as PEFT"]["status"] == "ok"
    assert "aimed for: 1.08" in capsys.readouterr().out
    json.dumps(result)


def test_time_that_is_used_up_is_said(tmp_path):
    """Catches a result that looks whole though problems were left out."""
    assert ia3.main(["--smoke", "--out", str(tmp_path), "--minutes", "-1"]) == 0
    result = records.read(tmp_path / "ia3.json")
    assert not result["rows"] and len(result["missing"]) == 2


def test_wrong_results_are_caught():
    """Catches a check that lets y / l pass, or a gradient of the wrong operand."""
    work = ia3.Work(ia3.cases(True)[0], torch.device("cpu"))
    assert max(work.check(ia3.as_peft(False)).values()) < 1e-5

    class Divides(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, scale):
            y = x @ weight.T * scale
            ctx.save_for_backward(weight, scale, y)
            return y

        @staticmethod
        def backward(ctx, dy):
            weight, scale, y = ctx.saved_tensors
            return (dy * scale) @ weight, None, (dy * y / scale).nan_to_num().sum(0)

    with pytest.raises(check.WrongResultError, match="dl"):
        work.check(Divides.apply)


def test_nothing_is_measured_without_a_gpu_or_kept_from_a_smoke_run(monkeypatch, tmp_path):
    """Catches numbers of an interpreter under bench/results."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ia3.main([]) == 2
    assert ia3.main(["--smoke"]) == 2


def test_the_grid_is_what_was_asked_for():
    """Catches a layer or a number of tokens that falls out of the measurement or the static check."""
    found = {(case.M, case.K, case.N, case.feedforward) for case in ia3.cases(False)}
    assert found == {
        (M, *sizes, feedforward) for sizes, feedforward in ((KV, False), (DOWN, True)) for M in (512, 2048, 8192)
    }
    assert found <= {(c.M, c.K, c.N, c.feedforward) for c in all_cases_ia3()}
    assert set(all_cases_ia3()) <= set(all_cases()) and set(quick_cases_ia3()) <= set(quick_cases())


def test_cases_launch_what_their_path_says():
    """Catches a case that compiles nothing, or another path's kernels."""
    pytest.importorskip("triton")

    def kernels(*sizes, **options):
        return [call.kernel.fn.__name__ for call in IA3Linear(*sizes, **options).launches(90)]

    assert kernels(8192, *DOWN, True) == ["_ia3_scale_kernel", "_ia3_gemm_persistent_kernel", "_reduce_planes_kernel"]
    scale_sum = ["_ia3_scale_sum_kernel", "_reduce_planes_kernel"]
    assert kernels(8192, *DOWN, True, path="cublas") == ["_ia3_scale_kernel", *scale_sum]
    assert kernels(8192, *KV, False, path="cublas") == ["_ia3_scale_kernel", *scale_sum]
    assert kernels(8192, *KV, False, path="triton") == ["_ia3_gemm_persistent_kernel", *scale_sum]
    assert kernels(8192, *KV, False, slots=4) == ["_ia3_scale_kernel", *scale_sum]
    assert len({case.label() for case in all_cases_ia3()}) == len(all_cases_ia3())


def test_tuning_builds_and_checks_every_kernel(tmp_path, capsys):
    """Catches candidates that the builders refuse, and a tuner that times wrong results."""
    pytest.importorskip("triton")
    assert tune.main(["--weights", "ia3", "--dry-run", "--arch", "90", "--problems", "k,v M8192", "down M512"]) == 0
    listed = capsys.readouterr().out
    assert all(f"\n{listed}".count(f"\n{kernel}, ") == 2 for kernel in ("GEMM + scale", "scale", "scale and sum"))
    assert tune.main(["--weights", "ia3", "--smoke", "--out", str(tmp_path)]) == 0
    rows = records.read(tmp_path / "tune-ia3.json")["rows"]
    assert len(rows) == 6
    for row in rows:
        assert row["best"]["us"] and not any(tried["reason"] for tried in row["candidates"]), row


HOPPER, AMPERE = DeviceInfo("cuda", 90), DeviceInfo("cuda", 80)
NATIVE_CPU = DeviceInfo("cpu", 0, "no CPU backend")


@pytest.mark.parametrize(
    "changes, path",
    [
        ({}, "triton"),
        ({"M": 255}, "cublas"),
        ({"M": 256}, "triton"),
        ({"M": 16, "K": 28672}, "cublas"),
        ({"M": 8192, "N": 1024, "K": 4096, "is_feedforward": False}, "triton"),
        ({"M": 25 * 128 - 1, "N": 1024, "K": 4096, "is_feedforward": False}, "cublas"),
        ({"M": 25 * 128, "N": 1024, "K": 4096, "is_feedforward": False}, "triton"),
        ({"is_feedforward": False, "gathers": True}, "cublas"),
        ({"M": 511, "device": AMPERE}, "cublas"),
        ({"M": 512, "device": AMPERE}, "triton"),
        ({"is_feedforward": False, "device": AMPERE}, "cublas"),
        ({"M": 0}, "torch"),
        ({"gathers": True}, "cublas"),
        ({"dtype": torch.float32}, "cublas"),
        ({"dtype": torch.float64}, "torch"),
        ({"aligned": False}, "cublas"),
        ({"quantized": True}, "dequantize:triton"),
        ({"device": NATIVE_CPU}, "torch"),
        ({"device": DeviceInfo("cpu", 0, "no CPU backend", (torch.bfloat16,))}, "torch_fp32"),
        ({"backend": "torch", "quantized": True}, "dequantize:torch"),
        ({"device": DeviceInfo("cuda", 75, "sm_75 is older than sm_80")}, "torch"),
    ],
)
def test_the_plan(changes, path):
    """Catches a silent fallback, and a GEMM of ours where cuBLAS has better kernels; and a plan without a reason."""
    sizes = {"M": 8192, "N": 4096, "K": 14336, "is_feedforward": True, "gathers": False, "quantized": False}
    plan = plan_ia3_linear(**(sizes | {"dtype": torch.bfloat16, "device": HOPPER} | changes))
    assert plan.path == path and plan.reason
