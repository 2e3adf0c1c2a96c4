"""Launches that are set up while the one before them runs: CUDA's programmatic dependent launch, on sm_90 and later.

Between two launches of a stream lie one or two microseconds, in which nothing runs; a layer has five to eight launches.
A kernel that begins with `begin` may be placed on multiprocessors while its predecessor still runs, and waits there
until that one has ended and all it wrote can be read. So the order of all reads and writes is a stream's own: no load
and no store stands before `begin`, and no program leaves without it (a launch of which one has left counts as ended,
and with it all before).
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


@triton.jit
def begin(OVERLAP: tl.constexpr, LET_NEXT: tl.constexpr = True):
    """Let the next launch be set up, and wait for the one before.

    Not LET_NEXT in kernels whose programs end at different times: the next launch's would all be put where the first of
    them end, and stay there.
    """
    if OVERLAP:
        if LET_NEXT:
            tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


def overlaps(arch: int) -> bool:
    """Whether the architecture has it."""
    return 90 <= arch < 900


def overlap_options(arch: int) -> dict[str, Any]:
    """The launch option of a kernel that begins with `begin(OVERLAP)`, OVERLAP being `overlaps(arch)`."""
    return {"launch_pdl": True} if overlaps(arch) else {}
