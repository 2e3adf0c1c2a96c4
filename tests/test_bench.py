"""The benchmark's arithmetic, its result files, its pictures, and that its programs run from end to end."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import check, cpu_program, cpu_step, limits, measure, records, report, tune
from bench.adapters import Rival, by_hand
from bench.cases import Problem, full, headline
from bench.environment import RESULTS, slug
from bench.rivals import definitions, peftkern_rivals
from bench.workload import LinearWorkload

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
S1 = Problem("S1", 8192, 4096, 4096, 16, 0.0, torch.bfloat16)


def test_work_of_the_design_shape_by_hand():
    """Catches a forgotten operand or a factor of two: S1's numbers, counted by hand."""
    forward, backward = limits.forward_work(S1), limits.backward_work(S1)
    assert forward.flops == 2 * 8192 * 4096 * 4096 + 2 * 8192 * 16 * 8192
    assert forward.bytes == 2 * (8192 * 4096 + 4096 * 4096 + 8192 * 4096 + 16 * 8192)
    assert backward.flops == 2 * 8192 * 4096 * 4096 + 4 * 8192 * 16 * 8192
    assert backward.bytes == 2 * (3 * 8192 * 4096 + 4096 * 4096 + 2 * 16 * 8192 + 2 * 8192 * 16)
    frozen = limits.forward_work(S1, adapter=False), limits.backward_work(S1, adapter=False)
    assert [w.flops for w in frozen] == [2 * 8192 * 4096 * 4096] * 2


def test_limit_is_the_larger_of_both_times_in_each_pass():
    """Catches adding bytes to operations, or taking one maximum over two passes that bind differently."""
    slow_memory = limits.Ceilings({"bfloat16": 1e30}, 1e12)
    slow_arithmetic = limits.Ceilings({"bfloat16": 1e15}, 1e30)
    moved = limits.forward_work(S1).bytes + limits.backward_work(S1).bytes
    flops = limits.forward_work(S1).flops
    assert limits.limit_microseconds(S1, "forward+backward", slow_memory) == pytest.approx(moved / 1e6)
    assert limits.limit_microseconds(S1, "forward", slow_arithmetic) == pytest.approx(flops / 1e9)


def test_overhead_is_relative_to_the_frozen_layer():
    """Catches the inverse ratio, and a division by a time that was never measured."""
    assert records.overhead(112.0, 100.0) == pytest.approx(0.12)
    with pytest.raises(ValueError, match="positive"):
        records.overhead(1.0, 0.0)


def test_headline_is_the_24_cases_and_a_decoder_layer():
    """Catches a shape, rank or dropout that falls out of the headline."""
    linear = [p for p in headline() if not p.decoder]
    expected = itertools.product(("S1", "S2", "M512"), (16, 64), (0.0, 0.1))
    assert {(p.name, p.R, p.dropout) for p in linear} == set(expected)
    assert sum(p.decoder for p in headline()) == 1
    assert len({p.key for p in full()}) == len(full())


PLAIN = [r for r in peftkern_rivals() if r.name in ("peftkern", "peftkern: torch")]


@pytest.mark.parametrize("rival", PLAIN, ids=lambda r: r.name)
def test_a_right_implementation_passes(rival):
    """Catches bounds that real rounding crosses."""
    for dtype, dropout in ((torch.float32, 0.0), (torch.bfloat16, 0.1)):
        work = LinearWorkload(Problem("t", 96, 80, 72, 8, dropout, dtype), CPU)
        check.check(work, check.truth_of(work), work.subject(rival))


def lora(x, w, a, b, s):
    return x @ w.T + s * (x @ a.T) @ b.T


def dropped(x, p):
    return torch.nn.functional.dropout(x, p)


def one_wrong_element(x, w, a, b, s, p):
    at = torch.tensor(3), torch.tensor(5)
    return lora(x, w, a, b, s).index_put(at, torch.tensor(9.0))


def another_mask_for_the_gradient_of_a(x, w, a, b, s, p):
    other = dropped(x.detach(), p) @ (a - a.detach()).T  # zero, but for its gradient
    return x @ w.T + s * (dropped(x, p) @ a.detach().T + other) @ b.T


WRONG = {
    "no scaling": lambda x, w, a, b, s, p: lora(x, w, a, b, 1.0),
    "one element": one_wrong_element,
    "half the gradient of B": lambda x, w, a, b, s, p: lora(x, w, a, 0.5 * b + 0.5 * b.detach(), s),
}
WRONG_DROPOUT = {
    "not dropped": lambda x, w, a, b, s, p: lora(x, w, a, b, s),
    "not scaled up": lambda x, w, a, b, s, p: x @ w.T + (1 - p) * s * (dropped(x, p) @ a.T) @ b.T,
    "another mask in dA": another_mask_for_the_gradient_of_a,
}


@pytest.mark.parametrize("name", [*WRONG, *WRONG_DROPOUT])
def test_a_wrong_implementation_is_caught(name):
    """Catches a check that lets a rival, or peftkern, win by computing something else."""
    dropout = 0.1 if name in WRONG_DROPOUT else 0.0
    function = (WRONG_DROPOUT | WRONG)[name]

    def honest_in_eval(x, w, a, b, s, p):
        return function(x, w, a, b, s, p) if p or not dropout else lora(x, w, a, b, s)

    work = LinearWorkload(Problem("t", 96, 80, 72, 8, dropout, torch.float32), CPU)
    subject = work.subject(Rival(name, "others", by_hand(honest_in_eval)))
    with pytest.raises(check.WrongResultError):
        check.check(work, check.truth_of(work), subject)


def test_saved_bytes_counts_each_storage_once_and_no_parameter():
    """Catches counting a view twice, or a weight as an activation."""
    weight = torch.nn.Parameter(torch.randn(8, 8))
    x = torch.randn(4, 8, requires_grad=True)
    total = measure.saved_bytes(lambda: (x * x.view(4, 8)).sum() + (x @ weight).sum(), [weight])
    assert total == x.numel() * 4


def test_definitions_come_from_the_file_without_the_rest(tmp_path):
    """Catches importing another project's dependencies for one function."""
    source = tmp_path / "module.py"
    source.write_text("import no_such_package\ndef f(x):\n    return g(x)\n")
    assert definitions(source, {"f"}, {"g": lambda x: x + 1})["f"](1) == 2
    with pytest.raises(ImportError, match="does not define"):
        definitions(source, {"h"}, {})


def made_up_headline() -> dict:
    """A result that nobody measured, for tests only."""
    rows = []
    for problem in (S1, Problem("M512", 512, 4096, 4096, 64, 0.1, torch.bfloat16)):
        for name, time in (("frozen", 100.0), ("peftkern", 110.0), ("peft fp32 adapters", 163.0), ("unsloth", None)):
            row = dict.fromkeys(records.ROW_FIELDS) | {
                "problem": problem.key, "passes": "forward+backward", "group": "peftkern", "implementation": name,
                "status": "not run", "reason": "not installed", "M": problem.M, "K": 1, "N": 1, "R": 16,
                "dtype": "bfloat16", "dropout": problem.dropout, "errors": {},
            }  # fmt: skip
            if time is not None:
                micros = measure.Micros.of([time, time, time]).as_dict()
                row |= {"status": "ok", "reason": "", "gpu_us": micros, "wall_us": micros}
                row["overhead"] = records.overhead(time, 100.0)
            rows.append(row)
    environment = {"device": "Made Up 1", "date": "2000-01-01 00:00 UTC", "versions": {"torch": "0"}}
    missing = [{"group": "others", "problem": "S2", "reason": "time"}]
    made_up = {"schema": 1, "kind": "headline", "environment": environment, "ceilings": {}}
    return made_up | {"rows": rows, "missing": missing}


def test_report_draws_and_prints_a_result(tmp_path, capsys):
    """Catches a table without overheads or reasons, and an empty picture."""
    path = records.write(made_up_headline(), tmp_path / "made-up-1" / "headline.json")
    assert report.main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for wanted in ("Made Up 1", "+10.0 %", "+63.0 %", "unsloth not run", "not installed", "missing: others, S2: time"):
        assert wanted in printed
    assert path.with_suffix(".png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda r: r.update(schema=2), "schema"),
        (lambda r: r["environment"].pop("device"), "device"),
        (lambda r: r["rows"][0].pop("path"), r"rows\[0\].*path"),
        (lambda r: r["rows"][0].update(M="8192"), r"rows\[0\]\.M"),
        (lambda r: r["rows"][3].update(wall_us={"median": 1.0}), "does not fit"),
        (lambda r: r["rows"].append(r["rows"][0]), "twice"),
    ],
)
def test_a_result_that_is_not_of_the_schema_is_refused(tmp_path, damage, message):
    """Catches a number beside a status that says it was not measured, among other damage."""
    result = made_up_headline()
    damage(result)
    path = tmp_path / "r.json"
    path.write_text(json.dumps(result))
    with pytest.raises(ValueError, match=message):
        records.read(path)
    with pytest.raises(ValueError, match=message):
        records.write(result, tmp_path / "w.json")
    assert not (tmp_path / "w.json").exists()


def test_committed_results_are_of_the_schema_and_in_their_devices_folder():
    """Catches a result edited by hand, or filed under another device."""
    for path in records.find(RESULTS):
        name = slug(records.read(path)["environment"]["device"])
        assert path.parent.name in (name, f"cpu-{name}"), path


def run_program(*arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the program itself is the test")
def test_the_headline_runs_end_to_end_in_the_interpreter(tmp_path):
    """Catches a benchmark that would fail on the first GPU it meets: every path, checked and timed, on tiny sizes."""
    pytest.importorskip("triton")
    pytest.importorskip("transformers")
    run_program("bench.run", "--smoke", "--groups", "peftkern", "--out", str(tmp_path))
    result = records.read(tmp_path / "headline.json")
    ran = {row["implementation"] for row in result["rows"] if row["status"] == "ok"}
    assert {"frozen", "peftkern", "peftkern: triton", "peftkern: cublas", "peftkern: torch"} <= ran
    assert not result["missing"]


def test_pairs_of_a_step_are_split_and_pooled():
    """Catches pairs lost or measured twice, and a median of medians in place of that of all pairs."""
    split = cpu_step.shares(8, 90.0, 3)
    assert [s.pairs for s in split] == [3, 3, 2] and [s.check for s in split] == [True, False, False]
    assert sum(s.seconds for s in split) == 90.0 and sum(s.least for s in split) == 3
    assert [s.pairs for s in cpu_step.shares(2, 1.0, 3)] == [1, 1]
    times = [
        {"peftkern": [1.0, 1.0, 1.0], "peft": [2.0, 2.0, 2.0], "frozen": [0.8, 0.8, 0.8]},
        {"peftkern": [9.0], "peft": [10.0], "frozen": [4.0]},
    ]
    row = cpu_step.row_of(cpu_step.MODES[0], times, {"errors": {}})
    assert (row["ratio"], row["pairs"], row["frozen_ratio"]) == (0.5, 4, 0.4)
    assert row["ratio_by_process"] == [0.5, 0.9] and row["peftkern_ms"] == 1000.0


@pytest.fixture(autouse=True)
def _threads():
    """As many threads after a test as before."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_what_is_timed_runs_in_a_process_of_its_own():
    """Catches figures of a process in which others ran before, and an error there that nobody hears of."""
    here = os.getpid()
    assert cpu_program.caller(False)(os.getpid) != here == cpu_program.caller(True)(os.getpid)
    with pytest.raises(ValueError, match="math domain"):
        cpu_program.in_fresh_process(math.sqrt, -1.0)


def test_the_cpu_step_runs_end_to_end(tmp_path):
    """Catches a step whose loss or gradients differ from PEFT's: it compares them before it times."""
    pytest.importorskip("peft")
    assert cpu_step.main(["--smoke", "--out", str(tmp_path)]) == 0
    result = records.read(tmp_path / "step.json")
    assert all(row["ratio"] > 0 for row in result["rows"])
    assert [row["checkpointed"] for row in result["rows"]] == ["saved_bytes" not in row for row in result["rows"]]
    assert [row["checkpointed"] for row in result["rows"]] == [False, False, True]
    assert [row["masters"] for row in result["rows"]] == [True, True, False]
    assert [row["shape"] for row in result["calls"]] == [[1, 64]] * 3 + [[1, 1, 64]] * 3
    assert all(row["frozen_ms"] > 0 and row["frozen_ratio"] > 0 for row in result["rows"])
    assert report.main([str(tmp_path)]) == 0 and (tmp_path / "step.png").exists()


def test_the_cpu_step_with_dora_runs_end_to_end(tmp_path):
    """Catches a step with DoRA whose loss or gradients differ from PEFT's, and magnitudes that are left out of them."""
    pytest.importorskip("peft")
    from bench import cpu_dora

    assert cpu_dora.main(["--smoke", "--out", str(tmp_path)]) == 0
    assert cpu_dora.main(["--smoke"]) == 2
    result = records.read(tmp_path / "dora.json")
    assert [row["mode"][:4] for row in result["rows"]] == ["DoRA", "DoRA"]
    assert all(row["ratio"] > 0 and row["over_lora"]["ratio"] > 0 for row in result["rows"])
    assert all(row["errors"]["gradients, peftkern"] < 0.05 for row in result["rows"])


def test_tuning_lists_and_tries_candidates(tmp_path, capsys):
    """Catches candidates that the builders refuse, and a tuner that times wrong results."""
    pytest.importorskip("triton")
    assert tune.main(["--dry-run", "--arch", "90", "--problems", "S1"]) == 0
    listed = capsys.readouterr().out
    assert "base + expand, dX" in listed and "candidates for architecture 90" in listed
    if not torch.cuda.is_available():
        kernels = ["shrink", "weight gradient"]
        assert tune.main(["--smoke", "--kernels", *kernels, "--out", str(tmp_path)]) == 0
        for row in records.read(tmp_path / "tune.json")["rows"]:
            assert row["best"] is not None and row["best"]["us"]["median"] > 0, row


def test_report_reads_every_result_that_is_shipped(capsys):
    """Catches a file under bench/results that the report takes for one of its own and stumbles over."""
    assert report.main(["--no-plots"]) == 0
    assert "training" in capsys.readouterr().out


def test_many_adapters_run_end_to_end(tmp_path, capsys):
    """Bug: a benchmark of a mixed batch that times a wrong result, or no longer runs."""
    pytest.importorskip("peft")
    from bench import cpu_many

    assert cpu_many.main(["--smoke", "--out", str(tmp_path)]) == 0
    result = records.read(tmp_path / "mixed.json")
    assert [row["training"] for row in result["rows"]] == [False, True]
    assert all(row["speedup"] > 0 and row["errors"]["logits"] < 1e-4 for row in result["rows"])
    assert report.main([str(tmp_path)]) == 0 and "8 rows of 2 tokens, training" in capsys.readouterr().out
    assert cpu_many.main(["--smoke"]) == 2


def test_a_few_tokens_run_end_to_end(tmp_path, capsys):
    """Bug: a benchmark of small batches that times a wrong result, or no longer runs."""
    pytest.importorskip("peft")
    from bench import cpu_tokens

    assert cpu_tokens.main(["--smoke", "--out", str(tmp_path)]) == 0
    rows = records.read(tmp_path / "tokens.json")["rows"]
    assert [(row["method"], row["training"]) for row in rows] == [("LoRA", True), ("IA3", False)]
    assert all(row["ratio"] > 0 and row["frozen_ms"] > 0 for row in rows)
    assert report.main([str(tmp_path)]) == 0 and "LoRA, float32, 1 tokens, training" in capsys.readouterr().out
    assert cpu_tokens.main(["--smoke"]) == 2


def test_adapters_run_end_to_end(tmp_path, capsys):
    """Bug: a benchmark of loading and merging that no longer runs, or whose result the report leaves out."""
    pytest.importorskip("peft")
    from bench import cpu_adapters

    assert cpu_adapters.main(["--smoke", "--out", str(tmp_path)]) == 0
    rows = records.read(tmp_path / "adapters.json")["rows"]
    assert {"get_peft_model", "load_adapter", "merge_and_unload", "from_pretrained"} <= {r["operation"] for r in rows}
    assert all(row["ratio"] > 0 and row["peft_ms"] > 0 for row in rows)
    assert report.main([str(tmp_path)]) == 0 and "merge_and_unload" in capsys.readouterr().out
    assert cpu_adapters.main(["--smoke"]) == 2


def test_adapters_that_are_loaded_wrong_are_seen(tmp_path, monkeypatch):
    """Bug: a benchmark that times how fast a file is not loaded."""
    pytest.importorskip("peft")
    from bench import cpu_adapters

    size = cpu_adapters.Size(hidden=64, intermediate=96, layers=1, heads=2, vocabulary=128, batch=1, tokens=4)
    made = iter(range(9))
    monkeypatch.setattr(cpu_adapters, "logits", lambda *_: torch.full((2, 2), float(next(made))))
    with pytest.raises(cpu_adapters.WrongResultError, match="loaded by peftkern differs"):
        cpu_adapters.check(size, tmp_path)


def test_experts_run_end_to_end(tmp_path, capsys):
    """Bug: a benchmark of stacked experts that times a wrong result, or no longer runs."""
    pytest.importorskip("peft")
    from bench import cpu_experts

    assert cpu_experts.main(["--smoke", "--out", str(tmp_path)]) == 0
    result = records.read(tmp_path / "experts.json")
    assert [row["experts"] for row in result["rows"]] == ["grouped_mm", "eager"]
    assert all(row["ratio"] > 0 and row["paths"] == ["torch"] for row in result["rows"])
    assert all(row["errors"]["gradients, peftkern"] < 1e-4 for row in result["rows"])
    assert report.main([str(tmp_path)]) == 0 and "experts by grouped_mm" in capsys.readouterr().out
    assert cpu_experts.main(["--smoke"]) == 2
