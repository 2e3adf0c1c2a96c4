"""Several projections of one x in one launch (q, k and v; gate and up): whose part a program has, and its arguments.

A kernel takes up to four of everything that a projection has by itself, as `name_ptr`, `name1_ptr`, `name2_ptr` and
`name3_ptr`, and likewise numbers. A projection that is not there is None, which is static: a group of one compiles to
the code of a kernel that knows of no group. A program picks its own by `of_projection`, once, before its loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from .launch import MOST_PROJECTIONS


@triton.jit
def of_projection(which, value, value1, value2, value3):
    """The value, a pointer or a number, of projection `which`; never of what is absent (Triton 3.6 returns no None)."""
    if value1 is not None:
        value = tl.where(which == 1, value1, value)
    if value2 is not None:
        value = tl.where(which == 2, value2, value)
    if value3 is not None:
        value = tl.where(which == 3, value3, value)
    return value


@triton.jit
def sum_of(value, value1, value2, value3):
    """The sum over the projections."""
    if value1 is not None:
        value += value1
    if value2 is not None:
        value += value2
    if value3 is not None:
        value += value3
    return value


@triton.jit
def blocks_of(size, size1, size2, size3, BLOCK: tl.constexpr):
    """The blocks of all projections, of sizes that are cut each by itself."""
    blocks = tl.cdiv(size, BLOCK)
    if size1 is not None:
        blocks += tl.cdiv(size1, BLOCK)
    if size2 is not None:
        blocks += tl.cdiv(size2, BLOCK)
    if size3 is not None:
        blocks += tl.cdiv(size3, BLOCK)
    return blocks


@triton.jit
def block_of_projection(index, size, size1, size2, size3, BLOCK: tl.constexpr):
    """(projection, its block) of one of `blocks_of`, which lie projection by projection."""
    which = 0
    if size1 is not None:
        blocks = tl.cdiv(size, BLOCK)
        which = (index >= blocks).to(tl.int32)
        index = tl.where(which > 0, index - blocks, index)
    if size2 is not None:
        blocks = tl.cdiv(size1, BLOCK)
        further = (which == 1) & (index >= blocks)
        which += further.to(tl.int32)
        index = tl.where(further, index - blocks, index)
    if size3 is not None:
        blocks = tl.cdiv(size2, BLOCK)
        further = (which == 2) & (index >= blocks)
        which += further.to(tl.int32)
        index = tl.where(further, index - blocks, index)
    return which, index


def numbered(name: str, values: Sequence[Any]) -> dict[str, Any]:
    """Arguments of the projections: "x{}_ptr" gives x_ptr, x1_ptr, x2_ptr, x3_ptr, None where there is none."""
    padded = [*values, *[None] * (MOST_PROJECTIONS - len(values))]
    return {name.format(i or ""): value for i, value in enumerate(padded)}


def columns(t: torch.Tensor | None, widths: Sequence[int]) -> list[Any]:
    """Views of t [..., sum of widths], side by side; None for each where there is no tensor."""
    if t is None:
        return [None] * len(widths)
    if len(widths) == 1:
        return [t]
    return [*t.split(list(widths), -1)]
