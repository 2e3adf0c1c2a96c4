"""A benchmark's result file while it grows: what a run that is stopped leaves behind."""

from __future__ import annotations

import json
import time

import pytest

from bench.progress import Progress

CASES = [({"problem": name}, name) for name in "abc"]


def started(minutes: float = 1.0) -> tuple[Progress, list[dict], list[dict]]:
    """A run, its rows, and what it has written each time."""
    written: list[dict] = []
    rows: list[dict] = []
    progress = Progress(
        {"environment": {}, "rows": rows}, lambda result: written.append(json.loads(json.dumps(result))), minutes
    )
    return progress, rows, written


def test_a_run_that_is_stopped_keeps_what_it_has():
    """Catches a file that is written at the end alone, and one that looks whole when it is not."""
    progress, rows, written = started()
    with pytest.raises(KeyboardInterrupt):
        for case in progress.each(CASES):
            if case == "c":
                raise KeyboardInterrupt
            rows.append({"problem": case})
    assert [row["problem"] for row in written[-1]["rows"]] == ["a", "b"]
    assert written[-1]["missing"] == [{"problem": "c", "reason": "not reached"}]


def test_a_whole_run_misses_nothing():
    """Catches problems that stay under "missing" once they are measured, and clocks that are not read at the end."""
    progress, rows, written = started()
    rows += [{"problem": case} for case in progress.each(CASES)]
    result = progress.done()
    assert result["missing"] == [] and "clocks_after" in result["environment"] and written[-1]["rows"] == rows
    assert [len(result["missing"]) for result in written] == [3, 2, 1, 0, 0]


def test_minutes_and_a_reason_to_stop():
    """Catches a problem that is begun though the last one took longer than is left, or after the device was lost."""
    progress, _, _ = started(minutes=0.05 / 60)
    assert [(case, time.sleep(0.04))[0] for case in progress.each(CASES)] == ["a"]
    assert [left["reason"] for left in progress.done()["missing"]] == ["0.000833333 minutes were used up"] * 2
    progress, _, _ = started()
    assert [(case, progress.stop("a took the device"))[0] for case in progress.each(CASES)] == ["a"]
    assert {left["reason"] for left in progress.done()["missing"]} == {"a took the device"}
