"""The benchmark over 4-bit weights: its arithmetic, what it refuses, its pictures, and that its programs run."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from bench import environment, limits, qlora_step, quantized, records, report, tune
from bench.adapters import Rival, by_hand
from bench.cases import PASSES, Problem
from bench.qlora_model import TINY, make_model, random_weight
from bench.report_quantized import backward_times
from peftkern import reference
from peftkern.utils.quantized_modules import weight_of

CPU = torch.device("cpu")
TINY_PROBLEM = Problem("tiny M3", 3, 64, 96, 4, 0.0, torch.float16)
BIG = Problem("q,o M64", 64, 4096, 4096, 16, 0.0, torch.bfloat16)
CEILINGS = limits.Ceilings({"float16": 1e12, "bfloat16": 1e15}, 1e12)


def options(*arguments: str) -> Any:
    return quantized.parse_arguments(list(arguments))


def test_the_grid_is_what_was_asked_for():
    """Catches a number of tokens or a shape that falls out of the measurement."""
    found = quantized.problems(options(), on_gpu=True)
    assert [(p.M, p.K, p.N, p.R) for p in found] == [(M, 4096, 4096, 16) for M in (1, 16, 128, 512, 2048, 8192)]
    assert {(p.K, p.N) for p in quantized.problems(options("--full"), True)} == {(4096, 4096), (4096, 14336)}
    assert all(p.K * p.N <= 2**20 for p in quantized.problems(options(), on_gpu=False)), "a CPU's are small"


def test_limit_reads_four_bits():
    """Catches a limit that lets the layer read a dense weight, or counts the weight in one pass only."""
    weight_bytes = 4096 * 4096 * 4.127 // 8
    slow_memory = limits.Ceilings({"bfloat16": 1e30}, 1e12)
    dense, packed = (
        limits.limit_microseconds(BIG, PASSES[1], slow_memory, weight_bytes=b) for b in (None, weight_bytes)
    )
    assert dense - packed == pytest.approx(2 * (2 * 4096 * 4096 - weight_bytes) / 1e6)


def test_a_fused_layer_may_hold_its_partial_sums_and_no_weight():
    """Catches an allowance that a dense weight fits into, and one that forgets the planes of a split product."""
    pytest.importorskip("triton")
    dense = 2 * 4096 * 4096
    assert quantized.allowed_bytes(BIG, "dequantize:triton", 90) == dense + quantized.ALLOCATOR
    fused = quantized.allowed_bytes(BIG, "fused_4bit", 90)
    planes = 64 * 4096 * 4
    assert quantized.ALLOCATOR + 2 * planes <= fused < quantized.ALLOCATOR + dense
    row = {"implementation": "peftkern", "problem": BIG.key, "passes": "forward", "path": "fused_4bit"}
    row |= {"extra_bytes": fused + 1, "allowed_bytes": fused}
    assert len(quantized.memory_faults([row])) == 1 and "fused_4bit" in quantized.memory_faults([row])[0]
    assert quantized.memory_faults([row | {"extra_bytes": fused}, row | {"allowed_bytes": None}]) == []


def measured(monkeypatch: pytest.MonkeyPatch, *rivals: Rival) -> quantized.QuantizedBench:
    """A run of one tiny problem on the CPU, of `rivals` where given in place of peftkern's and others'."""
    if rivals:
        monkeypatch.setattr("bench.quantized_rivals.other_rivals", lambda *_: list(rivals))
    bench = quantized.QuantizedBench(CPU, CEILINGS, quick=True)
    bench.measure_quantized(TINY_PROBLEM)
    return bench


def test_every_implementation_is_right_on_a_tiny_problem(monkeypatch, tmp_path):
    """Catches a rival that is put together wrongly, and a path that fails on the first GPU it meets."""
    pytest.importorskip("triton")
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft")
    monkeypatch.setattr("bench.quantized_rivals.PATHS", ("fused_4bit", "decode_4bit"))  # the interpreter is slow
    rows = measured(monkeypatch).rows
    assert {row["implementation"] for row in rows} >= {"frozen", "peftkern dense", "peftkern", "peftkern: decode_4bit"}
    assert {row["status"] for row in rows} == {"ok"}, [(r["implementation"], r["reason"]) for r in rows]
    names = {row["implementation"] for row in rows if row["path"] is None}
    assert names >= {"bitsandbytes", "peft on bitsandbytes", "peft on bitsandbytes fp32 adapters"}
    assert all("dX" in row["errors"] for row in rows if row["implementation"].startswith("bitsandbytes"))
    bits = {8 * row["weight_bytes"] / (64 * 96) for row in rows}
    assert len(bits) == 1 and 4.0 < bits.pop() < 6.0, "4 bits, their scales, and tables that a large weight hides"
    result = made_up(rows)
    records.write(result, tmp_path / "made-up-1" / "quantized.json")
    rows[0].pop("weight_bytes")
    with pytest.raises(ValueError, match="weight_bytes"):
        records.validate(result)


def test_another_weight_is_not_timed(monkeypatch):
    """Catches a check against the weight before quantization, or one that looks at y alone."""
    pytest.importorskip("triton")

    def other_weight(x, weight, A, B, scaling, p):
        return reference.lora_linear(x, weight * 1.02, A, B, scaling)

    class HalfRight(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.weight = weight
            return x @ weight.t()

        @staticmethod
        def backward(ctx, dy):
            return dy @ (ctx.weight * 1.05), None

    def wrong_backward(x, weight, A, B, scaling, p):
        return HalfRight.apply(x, weight) + scaling * (x @ A.t()) @ B.t()

    monkeypatch.setattr("bench.quantized_rivals.PATHS", ())
    rivals = [Rival(f.__name__, "others", by_hand(f)) for f in (other_weight, wrong_backward)]
    found = {row["implementation"]: row for row in measured(monkeypatch, *rivals).rows}
    for name, where in (("other_weight", "y"), ("wrong_backward", "dX")):
        assert found[name]["status"] == "wrong" and found[name]["reason"].startswith(where), found[name]
        assert found[name]["wall_us"] is None


def test_a_wrong_dequantization_is_a_fault(monkeypatch):
    """Catches a dequantization that is timed though a single element is off."""
    true = quantized.dequantize_4bit

    def off_by_one(weight, out):
        true(weight, out=out)[0, 0] += 1
        return out

    right = quantized.measure_dequantization(32, 64, torch.float16, CPU, quick=True)
    rows = right["implementations"]
    assert rows["peftkern"]["status"] == "ok" and rows["copy"]["share_of_copy"] == 1.0
    assert right["bytes"] == pytest.approx(32 * 64 * 2.5, rel=0.6)
    assert rows["peftkern"]["GB_per_s"] == pytest.approx(right["bytes"] / rows["peftkern"]["us"]["median"] / 1e3)
    monkeypatch.setattr(quantized, "dequantize_4bit", off_by_one)
    wrong = quantized.measure_dequantization(32, 64, torch.float16, CPU, quick=True)
    assert wrong["implementations"]["peftkern"]["status"] == "wrong"
    assert wrong["implementations"]["peftkern"]["us"] is None
    assert quantized.faults_of({"rows": [], "dequantization": [right]}) == []
    assert len(quantized.faults_of({"rows": [], "dequantization": [wrong]})) == 1


def test_a_busy_cpu_is_not_measured(monkeypatch, capsys):
    """Catches times of a busy machine being filed as this processor's."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(environment.os, "getloadavg", lambda: (64.0, 64.0, 64.0))
    assert quantized.main([]) == 2 and "busy" in capsys.readouterr().err
    assert quantized.main(["--smoke"]) == 2 and qlora_step.main(["--smoke"]) == 2
    assert qlora_step.main(["--vram", "16"]) == 2 and "no GPU" in capsys.readouterr().err


def made_up(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A result of bench.quantized with these rows."""
    conditions = {"device": "Made Up 1", "date": "2000-01-01 00:00 UTC", "versions": {"torch": "0"}}
    us = {"median": 10.0, "least": 9.0, "p10": 9.0, "p90": 11.0, "samples": 3}
    ok = {"status": "ok", "reason": "", "us": us, "GB_per_s": 100.0, "share_of_copy": 0.93}
    missing = {"status": "not run", "reason": "no bitsandbytes", "us": None, "GB_per_s": None, "share_of_copy": None}
    shape = {"N": 4096, "K": 4096, "dtype": "bfloat16", "nested": True, "clock": "gpu", "bytes": 1}
    shape["implementations"] = {"copy": ok | {"share_of_copy": 1.0}, "peftkern": ok, "bitsandbytes": missing}
    result = {"schema": 1, "kind": "quantized", "environment": conditions, "ceilings": {}, "rows": rows}
    return result | {"dequantization": [shape], "missing": [{"group": "4-bit", "problem": "late", "reason": "time"}]}


def made_up_rows() -> list[dict[str, Any]]:
    """Rows as bench.quantized writes them: forward takes 100 us of the frozen layer, backward as long again."""
    rows = []
    for M in (1, 128, 8192):
        problem = Problem(f"q,o M{M}", M, 4096, 4096, 16, 0.0, torch.bfloat16)
        for passes, frozen in zip(PASSES, (100.0, 200.0), strict=True):
            for name, times in (
                ("frozen", 1.0),
                ("peftkern", 1.25),
                ("bitsandbytes", 2.0),
                ("peft on bitsandbytes", 3.0),
            ):
                row = dict.fromkeys(records.ROW_FIELDS) | {
                    "problem": problem.key, "passes": passes, "group": "4-bit", "implementation": name,
                    "status": "ok", "reason": "", "M": M, "K": 4096, "N": 4096, "R": 16,
                    "dtype": "bfloat16", "dropout": 0.0, "errors": {},
                    "overhead": times - 1, "weight_bytes": 8_650_000, "saved_weight_bytes": 24_900_000,
                    "extra_bytes": None, "allowed_bytes": None,
                    "wall_us": {"median": frozen * times, "least": 1.0, "p10": 1.0, "p90": 1.0, "samples": 3},
                }  # fmt: skip
                rows.append(row)
    return rows


def test_report_draws_and_prints_it(tmp_path, capsys):
    """Catches a table without overheads, ratios or reasons, and an empty picture."""
    path = records.write(made_up(made_up_rows()), tmp_path / "made-up-1" / "quantized.json")
    assert report.main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for wanted in ("Made Up 1", "93%", "no bitsandbytes", "+25.0 %", "| 1.60 |", "24.9", "missing: late: time"):
        assert wanted in printed, wanted
    assert path.with_suffix(".png").stat().st_size > 10_000


def test_backward_is_what_forward_leaves_of_both():
    """Catches a ratio of forward + backward that is given for backward's."""
    times = backward_times(made_up_rows())
    assert times["q,o M128 r16 bfloat16", "peftkern"] == pytest.approx(125.0)
    assert times["q,o M128 r16 bfloat16", "bitsandbytes"] == pytest.approx(200.0)


# -- the step -----------------------------------------------------------------------------------------------------


def test_the_model_is_in_four_bits_and_the_same_for_both():
    """Catches a dense linear layer, a parameter without data, and weights that depend on who holds them."""
    pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    ours, theirs = (make_model(TINY, CPU, torch.bfloat16, modules) for modules in ("peftkern", "bitsandbytes"))
    names = [name for name, m in ours.named_modules() if name.endswith("_proj")]
    assert len(names) == 7 * TINY.layers
    for name in names:
        a, b = (weight_of(model.get_submodule(name)) for model in (ours, theirs))
        dense = reference.dequantize_4bit(a, torch.bfloat16)
        assert torch.equal(dense, reference.dequantize_4bit(b, torch.bfloat16))
        assert dense.float().std().item() == pytest.approx(0.02, rel=0.2)
    others = {name: p for name, p in ours.named_parameters() if p.is_floating_point()}
    assert all(torch.equal(p, dict(theirs.named_parameters())[name]) for name, p in others.items())
    assert not any(t.is_meta for t in (*ours.parameters(), *ours.buffers()))


def test_random_weights_repeat():
    """Catches a weight whose scales are not of the seed, or zero."""
    a, b = (random_weight(64, 128, torch.Generator().manual_seed(3), torch.bfloat16) for _ in range(2))
    assert all(torch.equal(s, t) for s, t in zip(a.tensors(), b.tensors(), strict=True))
    assert a.nested and (reference.dequantize_4bit(a, torch.float32) != 0).float().mean() > 0.8


def test_a_cap_leaves_room_for_the_context():
    """Catches a cap in which a real card's CUDA context would not fit, and an unlabelled one."""
    from peftkern.estimate import CONTEXT

    assert qlora_step.cap_bytes(None) is None and qlora_step.cap_bytes(16) == 2**34 - CONTEXT
    assert qlora_step.label("H", 16.0) == "H under a cap of 16 GB" and qlora_step.label("H", None) == "H"


def test_the_estimate_beside_a_measurement_is_of_the_same_step():
    """Catches an estimate for another optimizer or model than the one that is measured."""
    pytest.importorskip("transformers")
    shape = replace(TINY, hidden=512)  # factors of 4096 values and more: bitsandbytes keeps smaller ones in 32 bits
    eight, full = (qlora_step.estimated_bytes(shape, 32, name) for name in ("bitsandbytes AdamW8bit", "torch AdamW"))
    assert 4 * 384 * 512 < eight < full < 2**27


def test_a_peer_that_trains_something_else_is_told_apart():
    """Catches steps of two different models being compared."""
    ours = {"loss": 10.0, "gradient_norm": 1.0}
    assert qlora_step.disagreement({"loss": 10.1, "gradient_norm": 1.04}, ours) == ""
    assert "loss" in qlora_step.disagreement({"loss": 10.3, "gradient_norm": 1.0}, ours)
    assert "gradient_norm" in qlora_step.disagreement({"loss": 10.0, "gradient_norm": 0.9}, ours)
    assert "gradient_norm" in qlora_step.disagreement({"loss": 10.0, "gradient_norm": math.nan}, ours)


def test_processes_wait_for_their_turn_and_one_that_dies_is_a_row_with_its_last_words():
    """Catches a process that measures beside another or never begins, one that outlives the program that started it,
    and a crash of one implementation that ends the whole run, or is recorded as a number."""
    pytest.importorskip("transformers")
    told = {"implementation": "peftkern", "shape": asdict(TINY), "seq": 8, "steps": 1, "cap_bytes": None}
    right, wrong, left = (qlora_step.started(each) for each in (told, told | {"shape": {"depth": 2}}, told))
    left.communicate()  # its standard input ends without a word
    assert left.returncode == 1 and right.poll() is None
    dead = qlora_step.in_own_process(wrong)
    assert dead["status"] == "failed" and "TypeError" in dead["reason"], dead
    row = qlora_step.in_own_process(right)
    assert row["status"] == "ok" and row["tokens_per_second"] > 0, row


def test_the_step_runs_end_to_end(tmp_path, capsys):
    """Catches a step whose loss or gradients differ from PEFT's on the same bytes, and a table that cannot print it."""
    for package in ("transformers", "peft", "bitsandbytes"):
        pytest.importorskip(package)
    assert qlora_step.main(["--smoke", "--rivals", "--steps", "1", "--out", str(tmp_path)]) == 0
    rows = records.read(tmp_path / "qlora.json")["rows"]
    assert [row["implementation"] for row in rows] == list(qlora_step.IMPLEMENTATIONS)
    for row in rows:
        assert row["status"] == "ok" and row["tokens_per_second"] > 0, row
        assert row["trained"] == rows[0]["trained"] > 0
    assert report.main([str(tmp_path)]) == 0
    assert "peft, its own settings" in capsys.readouterr().out


def test_tuning_4bit_kernels_lists_and_tries_candidates(tmp_path, capsys):
    """Catches candidates that the builders refuse, a table that is not put back, and wrong results that are timed."""
    pytest.importorskip("triton")
    from peftkern_kernels import lora_decode_4bit

    before = lora_decode_4bit.choose_decode_4bit
    assert tune.main(["--weights", "4bit", "--dry-run", "--arch", "90", "--problems", "8B q,o M1", "8B q,o M64"]) == 0
    listed = capsys.readouterr().out
    for kernel in ("dequantize, 8B q,o M1", "4-bit decode", "4-bit base + expand", "4-bit base^T + expand"):
        assert kernel in listed, kernel
    assert lora_decode_4bit.choose_decode_4bit is before
    if not torch.cuda.is_available():
        kernels = ["dequantize", "4-bit decode"]
        assert tune.main(["--weights", "4bit", "--smoke", "--kernels", *kernels, "--out", str(tmp_path)]) == 0
        rows = records.read(tmp_path / "tune-4bit.json")["rows"]
        assert {row["kernel"] for row in rows} == set(kernels)
        assert all(row["best"]["us"]["median"] > 0 for row in rows)
