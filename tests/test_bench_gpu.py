"""All GPU benchmarks in one run, as far as it can be told without one: its commands, and how it deals with failures."""

from __future__ import annotations

import importlib
import os
import sys
import time

import pytest

pytest.importorskip("triton")

from bench import gpu  # noqa: E402


@pytest.mark.parametrize("part", gpu.parts(), ids=lambda part: part.name)
def test_benchmarks_know_the_options_they_are_given(part):
    """Catches an option that a benchmark lost or never had, which would cost the run its minutes on a GPU."""
    for module, *arguments in (part.command, *part.warm_up):
        parse = importlib.import_module(module).parse_arguments
        options = parse([*arguments, "--minutes", "1.5", "--out", "somewhere"])
        assert str(options.out) == "somewhere" and options.minutes == 1.5


def test_shares_are_all_of_the_time():
    """Catches a part whose share was forgotten."""
    assert sum(part.share for part in gpu.parts()) == pytest.approx(1)


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    """Catches a run that goes on a CPU for an hour; the commands can be seen anywhere."""
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--minutes", "1"]) == 2 and "needs a GPU" in capsys.readouterr().err
    assert gpu.main(["--dry-run", "--parts", "many"]) == 0
    printed = capsys.readouterr().out
    assert "bench.many" in printed and "bench.run" not in printed


def test_a_part_that_fails_or_runs_over_is_told(tmp_path, capsys, monkeypatch):
    """Catches a benchmark that broke and is reported as done, and one that takes the time of those behind it."""
    assert gpu.run_part(gpu.Part("broken", 1, ["no.such.module"], []), 60, tmp_path) == 1
    monkeypatch.setattr(gpu, "module", lambda *_: [sys.executable, "-c", "import time; time.sleep(60)"])
    assert gpu.run_part(gpu.Part("slow", 1, ["slow"], []), 0.5, tmp_path) == 124
    printed = capsys.readouterr().out
    assert "broken: exit status 1" in printed and "slow: stopped" in printed
    assert "No module named" in (tmp_path / "broken.log").read_text()


def test_parts_that_are_one_program_write_two_files(tmp_path, monkeypatch):
    """Catches the decode rows of $OUT/many.json overwritten by those of training."""
    print_out = "import os; print(os.environ['OUT'])"
    monkeypatch.setattr(gpu, "module", lambda *_: [sys.executable, "-c", print_out])
    monkeypatch.setenv("OUT", "kept")
    for name in ("many", "train"):
        assert gpu.run_part(gpu.Part(name, 1, [], []), 60, tmp_path) == 0
        assert (tmp_path / f"{name}.log").read_text().split() == [os.path.join("kept", name)]


def test_warming_up_ends_in_time(tmp_path, monkeypatch):
    """Catches a compiler that hangs, and with it the run."""
    monkeypatch.setattr(gpu, "module", lambda *_: [sys.executable, "-c", "import time; time.sleep(60)"])
    part = gpu.Part("slow", 1, ["slow"], [["a"], ["b"]])
    started = time.monotonic()
    gpu.warm_up([part], False, 0.5, tmp_path)
    assert time.monotonic() - started < 30, "the processes sleep for a minute"
