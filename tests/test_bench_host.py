"""`python -m bench.host`: the host's time of a call, on a GPU that does nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from bench import host, null_device, records

pytest.importorskip("triton")


@pytest.mark.skipif(null_device.compiler() is None, reason="Triton's launcher is built with a C compiler")
def test_launches_are_replayed_on_a_gpu_that_does_nothing(tmp_path):
    """Would catch a list of launches that is built anew at every call (no launch is then a replayed one), and a change
    of Triton's launcher that replays do not know of."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.host", "--smoke", "--out", str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "host.json").read_text())
    assert result["schema"] == records.SCHEMA and result["launched_on"] == null_device.NAME
    forward, both, decoder, checkpointed = result["rows"]
    assert (forward["launches"], forward["passes"]) == (2, "forward")
    assert both["launches"] > 2 and both["host_us"] > forward["host_us"] > 0
    assert decoder["launches"] > 10 and checkpointed["launches"] > 2 * decoder["launches"]


def test_its_numbers_are_not_kept_by_accident(capsys):
    """Would catch figures of a smoke run among the measured ones."""
    assert host.main(["--smoke"]) == 2
    assert "--out" in capsys.readouterr().err
