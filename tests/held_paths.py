"""Holding `lora_linear` to a path of its kernels, whatever its plan would choose for so few tokens."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from peftkern.ops.plan import Plan, plan_lora_linear

# Between these the plan's own choice needs a GPU's measurements.
GEMM_PATHS = ("triton", "cublas")


def by_parity(N: int) -> str:
    """A path for a weight of N rows, such that projections of one x have different ones."""
    return GEMM_PATHS[N % 2]


def hold_lora_linear(monkeypatch, path: str | Callable[[int], str]) -> str | Callable[[int], str]:
    """Until the test ends `lora_linear`, and what plans by it, takes `path` where it would take one of `GEMM_PATHS`:
    one of them, or a function of a weight's rows."""
    choose = plan_lora_linear.__wrapped__

    def forced(*arguments):
        plan = choose(*arguments)
        held = path if isinstance(path, str) else path(arguments[1])
        return Plan(held, "forced by a test") if plan.path in GEMM_PATHS else plan

    forced.__wrapped__ = forced
    # The package exports the function under its module's name.
    monkeypatch.setattr(importlib.import_module("peftkern.ops.lora_linear"), "plan_lora_linear", forced)
    return path
