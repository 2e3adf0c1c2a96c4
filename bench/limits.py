"""The physical limit: the work that cannot be avoided, over the rates that this device was measured to reach.

A pass needs its floating-point operations and must move each operand once; the device multiplies matrices at some rate
and copies memory at another. The larger of the two times is a floor. Both rates are measured in the same run, on random
data (a GPU clocks higher on zeros). A forward and a backward pass follow one another, so their floors add up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.cases import Problem
from bench.measure import gpu_microseconds, wall_microseconds


@dataclass(frozen=True, slots=True)
class Work:
    """Floating-point operations (2 for each multiply-add) and bytes across device memory of one pass."""

    flops: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Measured rates: of a large matrix product by dtype, and of a copy (bytes read + written)."""

    flops_per_second: dict[str, float]
    bytes_per_second: float


def forward_work(p: Problem, adapter: bool = True, weight_bytes: int | None = None) -> Work:
    """`y = x W^T (+ scaling x A^T B^T)`: x, W, A and B read once, y written once; W of `weight_bytes` if not dense."""
    size = p.dtype.itemsize
    flops = 2 * p.M * p.N * p.K
    moved = size * (p.M * p.K + p.M * p.N) + (size * p.N * p.K if weight_bytes is None else weight_bytes)
    if adapter:
        flops += 2 * p.M * p.R * (p.K + p.N)
        moved += size * p.R * (p.K + p.N)
    return Work(flops, moved)


def backward_work(p: Problem, adapter: bool = True, weight_bytes: int | None = None) -> Work:
    """dX, dA and dB from dY: dY, W, A and B read once; x read again for dA; S kept by forward, so written and read."""
    size = p.dtype.itemsize
    flops = 2 * p.M * p.N * p.K
    moved = size * (p.M * p.N + p.M * p.K) + (size * p.N * p.K if weight_bytes is None else weight_bytes)
    if adapter:
        flops += 4 * p.M * p.R * (p.K + p.N)  # dS and dB from dY; dX's part and dA from dS
        moved += size * (p.M * p.K + 2 * p.R * (p.K + p.N) + 2 * p.M * p.R)
    return Work(flops, moved)


def limit_microseconds(
    p: Problem, passes: str, ceilings: Ceilings, adapter: bool = True, weight_bytes: int | None = None
) -> float | None:
    """The floor of `passes` ("forward" or "forward+backward") in microseconds; None for a decoder layer."""
    if p.decoder:
        return None
    rate = ceilings.flops_per_second[str(p.dtype).removeprefix("torch.")]
    works = [forward_work(p, adapter, weight_bytes)]
    if passes == "forward+backward":
        works.append(backward_work(p, adapter, weight_bytes))
    return 1e6 * sum(max(w.flops / rate, w.bytes / ceilings.bytes_per_second) for w in works)


def measure_ceilings(
    device: torch.device, dtypes: set[torch.dtype], *, n: int = 8192, copied: int = 1 << 30
) -> Ceilings:
    """Rates of this device now: an n x n matrix product in each dtype, and a copy of `copied` bytes."""
    times = gpu_microseconds if device.type == "cuda" else wall_microseconds
    rates = {}
    for dtype in dtypes:
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
        micros = times({"mm": lambda a=a, b=b, out=out: torch.mm(a, b, out=out)}, device, reps=10, rounds=3)["mm"]
        rates[str(dtype).removeprefix("torch.")] = 2 * n**3 / (micros.median * 1e-6)
    source = torch.randint(-128, 127, (copied,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    micros = times({"copy": lambda: target.copy_(source)}, device, reps=10, rounds=3)["copy"]
    return Ceilings(rates, 2 * copied / (micros.median * 1e-6))
