"""Launches that are set up while the one before them runs: CUDA's programmatic dependent launch, on sm_90 and later.

Between two launches of a stream lie one or two microseconds, in which nothing runs; a layer has five to eight launches.
A kernel that begins with `begin` may be placed on multiprocessors while its predecessor still runs, and waits there
until that one has ended and all it wrote can be read. So the order of all reads and writes is a stream's own: no load
and no store stands before `begin`, and no program leaves without it (a launch of which one has left counts as ended,
and with it all before).

A *late wait* lets a whole launch run beside the persistent GEMM: `shrink (beside), [cast], GEMM (late)`. The GEMM reads
x and W, and writes nothing, before it waits in the first tile of each program; then S. Why nothing is read too early:
(1) a launch begins when all programs of the one before have let it, or have ended; (2) a wait returns when the one
before has ended, all it wrote visible; (3) so if every launch has a program that waits before it ends, a launch that
has ended means that all before it have.
- x and W are there: by (1) each launch begins after all programs of the one before had let it, and those of the shrink
  let only after they have waited (`WAIT_FIRST`). So when the GEMM begins, all before the shrink has ended, by (3). With
  `begin` in its usual order in the shrink, the GEMM could begin while what makes x still runs. Launches between, whose
  `begin` has the usual order, are links of the chain and need no change; of x and W they must write nothing. So where
  W is written out in between, there is no late wait.
- S and the cast factor are there: read after the wait. All programs pass it, in their first tile; a program has one.
- Memory that the allocator hands out again: before its wait the GEMM writes nothing, so nobody's reads or writes can be
  overtaken. What it reads early, x and W, is held by the caller through the launches, and of the launches that may
  still run none writes it. Whatever comes behind the GEMM begins, or passes its own wait, after the GEMM's end.
- Through which cache: x and W come by the copy engine, which reads L2; bias and c by plain loads after the wait.
- Nobody waits for a program that was not placed: a launch begins when all of the one before are placed. So no deadlock.

In a CUDA graph a recorded edge is the same programmatic one, from the launch before; nothing above asks for others.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


@triton.jit
def begin(OVERLAP: tl.constexpr, LET_NEXT: tl.constexpr = True, WAIT_FIRST: tl.constexpr = False):
    """Let the next launch be set up, and wait for the one before.

    Not LET_NEXT in kernels whose programs end at different times: the next launch's would all be put where the first of
    them end, and stay there. WAIT_FIRST lets the next launch begin only when the one before has ended: see above.
    """
    if OVERLAP:
        if LET_NEXT and not WAIT_FIRST:
            tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
        if LET_NEXT and WAIT_FIRST:
            tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_late(OVERLAP: tl.constexpr):
    """Wait for the launch before from within a pipelined loop: see above.

    The instruction by itself: of Triton's own, 3.9 knows that it orders memory, and issues no load of a loop that has
    one ahead of its time. Here the kernel's own arithmetic keeps loads of what was not written yet behind it.
    """
    if OVERLAP:
        tl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


def overlaps(arch: int) -> bool:
    """Whether the architecture has it."""
    return 90 <= arch < 900


def overlap_options(arch: int) -> dict[str, Any]:
    """The launch option of a kernel that begins with `begin(OVERLAP)`, OVERLAP being `overlaps(arch)`."""
    return {"launch_pdl": True} if overlaps(arch) else {}
