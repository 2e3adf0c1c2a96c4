"""`lora_linear` on the CPU under pytest-benchmark: `make bench` where there is no GPU.

    python -m pytest bench/test_lora_linear_cpu.py [--benchmark-json FILE]

Each implementation is checked against float64 first. `extra_info` holds what a reader of the time needs: operations and
bytes that cannot be avoided, the share of the physical limit, bytes saved for backward, versions and the device.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import check, environment, limits, measure
from bench.adapters import Rival
from bench.cases import PASSES, Problem
from bench.rivals import frozen, peft_rivals, peftkern_rivals
from bench.workload import LinearWorkload

CPU = torch.device("cpu")
# A small Llama's projections over 512 tokens, as in bench.cpu_step.
SHAPES = (("512x512", 512, 512, 512), ("512x1376", 512, 512, 1376))
DTYPES = (torch.float32, torch.bfloat16)
RIVALS = [
    frozen(),
    *(r for r in [*peft_rivals(), *peftkern_rivals()] if r.group in ("peft", "peftkern") and ": " not in r.name),
]


@pytest.fixture(scope="module")
def ceilings() -> limits.Ceilings:
    """What this processor multiplies and copies, measured once."""
    return limits.measure_ceilings(CPU, set(DTYPES), n=512, copied=1 << 25)


@pytest.mark.parametrize("rival", RIVALS, ids=lambda r: r.name)
@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s[0])
def test_lora_linear(
    benchmark: Any,
    ceilings: limits.Ceilings,
    shape: tuple[str, int, int, int],
    dtype: torch.dtype,
    dropout: float,
    passes: str,
    rival: Rival,
) -> None:
    """Times one implementation after checking it: a fast wrong answer is no result."""
    name, M, K, N = shape
    problem = Problem(name, M, K, N, 16, dropout, dtype)
    why_not = rival.why_not(problem, CPU)
    if why_not:
        pytest.skip(f"{rival.name}: {why_not}")
    work = LinearWorkload(problem, CPU)
    subject = work.subject(rival)
    errors = check.check(work, check.truth_of(work), subject)
    adapter = rival.name != "frozen"
    works = [limits.forward_work(problem, adapter), limits.backward_work(problem, adapter)]
    limit = limits.limit_microseconds(problem, passes, ceilings, adapter)
    call = subject.forward if passes == "forward" else subject.forward_backward
    benchmark.group = f"{problem.key}, {passes}"
    benchmark.extra_info |= {
        "implementation": rival.name,
        "version": rival.version,
        "device": environment.device_name(CPU),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "flops": sum(w.flops for w in works[: 1 + (passes != "forward")]),
        "bytes": sum(w.bytes for w in works[: 1 + (passes != "forward")]),
        "saved_bytes": measure.saved_bytes(subject.forward, subject.parameters()),
        "errors": errors,
        "limit_us": limit,
    }
    benchmark.pedantic(call, rounds=15, warmup_rounds=2)
    if benchmark.stats is not None and limit is not None:  # None under --benchmark-disable
        benchmark.extra_info["share_of_limit"] = limit * 1e-6 / benchmark.stats.stats.median
