"""The static check over many adapters: its cases build launches, and its judge knows what a gathered kernel loads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from bench.static_cases_multi import MultiLoraLinear, MultiLoraLinearShared, all_cases_multi  # noqa: E402
from bench.static_judge import Code, Dot, Loop, Record, judge  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


def record(loop: Loop, *, gathers: bool) -> Record:
    signature = {"x_ptr": "*bf16"} | ({"perm_ptr": "*i32"} if gathers else {})
    code = Code(128, 0, 0, 4096, {"HMMA": 8}, {"LDGSTS": 9}, [loop])
    dots = [Dot(128, 16, 64, "bf16")]
    return Record(89, "_kernel", "", ["case"], {}, signature, 4, 3, (1, 1, 1), True, True, dots=dots, code=code)


def test_row_numbers_may_be_loaded_in_the_main_loop():
    """Bugs: a gathered kernel refused for its row numbers; a whole tile loaded synchronously let pass beside them."""
    assert judge(record(Loop(9, 9, 0), gathers=True)) == []
    assert "synchronous loads: 2" in judge(record(Loop(9, 9, 2), gathers=True))[0]
    assert "synchronous loads: 9" in judge(record(Loop(9, 9, 0), gathers=False))[0]


@pytest.mark.parametrize("arch", [86, 90, 942])
def test_every_case_has_launches_and_a_name_of_its_own(arch):
    """Bugs: a builder that needs data, a grid past what a launch allows, two cases under one name."""
    cases = all_cases_multi()
    assert len({case.label() for case in cases}) == len(cases)
    for case in cases:
        calls = case.launches(arch)
        assert calls, case.label()
        for call in calls:
            assert all(0 < n <= most for n, most in zip(call.grid, (2**31 - 1, 65535, 65535), strict=True))


@pytest.mark.parametrize("M, kernels", [(1, 2), (16, 2), (64, 2)])
def test_a_decode_step_is_two_launches_and_the_route(M, kernels):
    """Bug: launches that crept in; at 64 rows cuBLAS's is the third, and not counted here."""
    calls = MultiLoraLinear(M, 4096, 4096, 16, "decode", training=False).launches(90)
    assert [call.name for call in calls].count("route") == 1 and len(calls) == kernels + 1


def test_traffic_of_a_decode_step_is_near_its_floor():
    """Bug: planes that cost more than the adapters, at 64 tokens of 64 adapters, or too few programs to read them."""
    shrink, expand = MultiLoraLinear(64, 4096, 4096, 16, "decode", training=False).launches(90)[1:]
    floor = 64 * 2 * 16 * 4096 * torch.bfloat16.itemsize
    assert floor < shrink.bytes + expand.bytes < 1.35 * floor
    for call in (shrink, expand):
        assert call.grid[0] * call.grid[1] >= 3.8 * 132


@pytest.mark.parametrize("path, M", [("decode", 1), ("decode", 16), ("decode", 64), ("decode_4bit", 16)])
def test_a_decode_step_of_three_projections_is_two_launches(path, M):
    """Bug: launches that crept in for each projection; at 64 rows cuBLAS's three come beside them."""
    case = MultiLoraLinearShared(M, 4096, (4096, 1024, 1024), 16, path, training=False)
    shrink, expand = case.launches(90)
    alone = [call for N in case.Ns for call in MultiLoraLinear(M, 4096, N, 16, path, training=False).launches(90)]
    moved = sum(call.bytes for call in alone if call.name != "route")
    assert shrink.bytes + expand.bytes <= moved
    assert shrink.args["pool2_ptr" if M == 64 else "a2_ptr"] is not None and expand.args["out3_ptr"] is None


@pytest.mark.slow
def test_adapters_of_rank_one_compile(tmp_path):
    """Bug: a number that is 1 is a constant to Triton and no tensor, which the interpreter does not tell."""
    command = [sys.executable, "-m", "bench.static", "--arch", "90", "--dtype", "bf16", "--kernel", "_multi_sum_kernel"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " r1 " in done.stdout
