"""A low-rank factor as a GEMM's tile loads take the weight: in x's dtype, its rows or its transpose's aligned.

fp32 masters, ranks that are no multiple of 8, and factors that lie across the weight are copied once by a small launch,
a hundredth of what the GEMM reads; others are used as they are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import Call, cdiv, is_aligned, nbytes, scratch, strides
from .overlap import begin, overlap_options, overlaps


@triton.jit
def _cast_factor_kernel(
    b_ptr, out_ptr, N, R, stride_bn, stride_br, stride_on, stride_or,  # [N, R] -> [N, R]
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    begin(OVERLAP)
    offs_n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64))[:, None]
    offs_r = (tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64))[None, :]
    mask = (offs_n < N) & (offs_r < R)
    b = tl.load(b_ptr + offs_n * stride_bn + offs_r * stride_br, mask=mask)
    tl.store(out_ptr + offs_n * stride_on + offs_r * stride_or, b.to(out_ptr.dtype.element_ty), mask=mask)


def as_weight(b: torch.Tensor, dtype: torch.dtype, across: bool, arch: int) -> tuple[torch.Tensor, list[Call]]:
    """The factor `b` [N, R] in `dtype` with aligned rows, or with aligned columns if `across`, and what makes it."""
    if b.dtype == dtype and is_aligned(b.t() if across else b):
        return b, []
    N, R = b.shape
    if across:
        made = scratch(R, cdiv(N, 8) * 8, dtype=dtype, device=b.device)[:, :N].t()
    else:
        made = scratch(N, cdiv(R, 8) * 8, dtype=dtype, device=b.device)[:, :R]
    block_n, block_r = 64, min(64, max(16, 1 << (R - 1).bit_length()))
    call = Call(
        name="low-rank factor for the GEMM",
        kernel=_cast_factor_kernel,
        grid=(cdiv(N, block_n), cdiv(R, block_r), 1),
        args={"b_ptr": b, "out_ptr": made, "N": N, "R": R, **strides(b, "bn", "br"), **strides(made, "on", "or")},
        constants={"BLOCK_N": block_n, "BLOCK_R": block_r, "OVERLAP": overlaps(arch)},
        num_warps=4,
        num_stages=1,
        options=overlap_options(arch),
        bytes=nbytes(b, made),
    )
    return made, [call]
