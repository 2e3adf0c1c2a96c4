"""Sums of fp32 partial planes: the deterministic second stage of every reduction that is split across programs.

    out[c, r] = round(scale * (planes[0, c, r] + planes[1, c, r] + ... ))        planes [P, C, R] fp32, contiguous

Planes are added in their order, so two runs give the same bits; `out` has any float dtype and any strides (pass a
transposed view for a transposed store). Two sums that share R (dS and dB, or dA and dB) ride in one launch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from .launch import Call, cdiv, nbytes, strides
from .overlap import begin, overlap_options, overlaps
from .reduction_tables import next_power_of_2


@triton.jit
def _sum_planes(
    planes_ptr, out_ptr, P, C, R, stride_oc, stride_or, scale, block_c, block_r,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    offs_c = block_c.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_r = block_r.to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = (offs_r < R)[None, :]
    plane = offs_c[:, None] * R + offs_r[None, :]
    stride_p = tl.cast(C, tl.int64) * R
    total = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    for p in range(0, P, UNROLL):
        for u in tl.static_range(UNROLL):  # independent loads, added in order
            rows = tl.where(p + u < P, C, 0)  # no rows past the last plane
            part_ptrs = planes_ptr + (p + u) * stride_p + plane
            total += tl.load(part_ptrs, mask=(offs_c < rows)[:, None] & mask_r, other=0.0)  # [BLOCK_C, BLOCK_R]
    out_ptrs = out_ptr + offs_c[:, None] * stride_oc + offs_r[None, :] * stride_or
    tl.store(out_ptrs, (total * scale).to(out_ptr.dtype.element_ty), mask=(offs_c < C)[:, None] & mask_r)


@triton.jit(do_not_specialize=["P0", "P1", "C0", "C1", "blocks0"])
def _reduce_planes_kernel(
    planes0_ptr, out0_ptr, P0, C0, stride_oc0, stride_or0, scale0,
    planes1_ptr, out1_ptr, P1, C1, stride_oc1, stride_or1, scale1,
    R, blocks0,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, UNROLL: tl.constexpr, TWO: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    begin(OVERLAP)
    block_c = tl.program_id(0)
    block_r = tl.program_id(1)
    if block_c < blocks0:
        _sum_planes(planes0_ptr, out0_ptr, P0, C0, R, stride_oc0, stride_or0, scale0, block_c, block_r,
                    BLOCK_C, BLOCK_R, UNROLL)  # fmt: skip
    elif TWO:
        _sum_planes(planes1_ptr, out1_ptr, P1, C1, R, stride_oc1, stride_or1, scale1, block_c - blocks0, block_r,
                    BLOCK_C, BLOCK_R, UNROLL)  # fmt: skip


@dataclass(frozen=True, slots=True)
class PlaneSum:
    """One sum: `planes` fp32 [P, C, R] contiguous, `out` [C, R] of any strides and float dtype, an fp32 `scale`."""

    planes: torch.Tensor
    out: torch.Tensor
    scale: float = 1.0


def reduce_calls(sums: list[PlaneSum], *, arch: int, name: str = "sum of planes") -> list[Call]:
    """Launch for one or two sums over planes with the same last axis.

    Args:
        sums: one or two; none gives no launch.
        arch: as everywhere. name: what the launch is called in reports.

    Raises:
        ValueError: more than two sums, shapes that do not agree, or planes that are not contiguous fp32.
    """
    sums = [s for s in sums if s.out.numel()]
    if not sums:
        return []
    if len(sums) > 2:
        raise ValueError(f"sums: expected one or two, got {len(sums)}")
    R = sums[0].planes.shape[2]
    for s in sums:
        if s.planes.dtype != torch.float32 or not s.planes.is_contiguous():
            raise ValueError(f"planes: expected contiguous float32, got {s.planes.dtype} strides {s.planes.stride()}")
        if s.planes.shape[1:] != s.out.shape or s.planes.shape[2] != R:
            raise ValueError(f"out: expected [C, {R}] like {tuple(s.planes.shape)}, got {tuple(s.out.shape)}")
    first, second = sums[0], sums[1] if len(sums) == 2 else None
    BLOCK_R = min(128, next_power_of_2(R))
    BLOCK_C = max(1, 512 // BLOCK_R)
    blocks = [cdiv(s.out.shape[0], BLOCK_C) for s in sums]
    args: dict[str, Any] = {"R": R, "blocks0": blocks[0]}
    for i, part in enumerate((first, second)):
        out = None if part is None else part.out
        args |= {
            f"planes{i}_ptr": None if part is None else part.planes,
            f"out{i}_ptr": out,
            f"P{i}": 0 if part is None else part.planes.shape[0],
            f"C{i}": 0 if out is None else out.shape[0],
            **strides(out, f"oc{i}", f"or{i}"),
            f"scale{i}": 1.0 if part is None else float(part.scale),
        }
    return [
        Call(
            name=name,
            kernel=_reduce_planes_kernel,
            grid=(sum(blocks), cdiv(R, BLOCK_R), 1),
            args=args,
            constants={
                "BLOCK_C": BLOCK_C,
                "BLOCK_R": BLOCK_R,
                "UNROLL": 8,
                "TWO": second is not None,
                "OVERLAP": overlaps(arch),
            },
            num_warps=4,
            num_stages=1,
            options=overlap_options(arch),
            bytes=sum(nbytes(s.planes, s.out) for s in sums),
            flops=sum(s.planes.numel() for s in sums),
        )
    ]
