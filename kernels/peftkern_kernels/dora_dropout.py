"""DoRA's two uses of a dropout mask by itself: beside it, the product with the frozen weight is a sum of two.

    forward    x' = keep / (1 - p) * x,  rest = x - x'         y = c * (x' W^T + S B^T) + rest W^T + bias
    backward   dX = keep / (1 - p) * h + (1 - keep / (1 - p)) * t       h = g W + dS A,  t = dY W

Both are linear in two matrices with the mask's weights, so they are one elementwise kernel: x is read once for x' and
its rest, and dX is made in t's memory. The mask is `dropout.keep_tile`'s, as everywhere.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .dropout import Dropout, keep_tile
from .ia3_tables import scale_tile
from .launch import Call, cdiv, compile_options, nbytes, strides


@triton.jit(do_not_specialize=["M", "threshold"])
def _dora_dropout_kernel(
    a_ptr, b_ptr, seed_ptr, out_ptr, rest_ptr,  # [M, C] [M, C] or None [1] -> [M, C], [M, C] or None
    M, C, stride_am, stride_ac, stride_bm, stride_bc, stride_om, stride_oc, stride_rm, stride_rc, threshold, keep_scale,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    programs_c = tl.cdiv(C, BLOCK_C)
    start_c = (tl.program_id(0) % programs_c).to(tl.int64) * BLOCK_C
    offs_m = (tl.program_id(0) // programs_c).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = start_c + tl.arange(0, BLOCK_C)
    mask = (offs_m < M)[:, None] & (offs_c < C)[None, :]
    keep = keep_tile(tl.load(seed_ptr), offs_m, start_c, threshold, BLOCK_M, BLOCK_C)
    share = tl.where(keep, keep_scale, 0.0)  # [BLOCK_M, BLOCK_C]
    a = tl.load(a_ptr + offs_m[:, None] * stride_am + offs_c[None, :] * stride_ac, mask=mask, other=0.0)
    out = share * a.to(tl.float32)
    if b_ptr is not None:
        b = tl.load(b_ptr + offs_m[:, None] * stride_bm + offs_c[None, :] * stride_bc, mask=mask, other=0.0)
        out += (1.0 - share) * b.to(tl.float32)
    if rest_ptr is not None:
        rest = (1.0 - share) * a.to(tl.float32)
        rest_ptrs = rest_ptr + offs_m[:, None] * stride_rm + offs_c[None, :] * stride_rc
        tl.store(rest_ptrs, rest.to(rest_ptr.dtype.element_ty), mask=mask)
    out_ptrs = out_ptr + offs_m[:, None] * stride_om + offs_c[None, :] * stride_oc
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)


def dropout_calls(
    a: torch.Tensor,
    out: torch.Tensor,
    dropout: Dropout,
    *,
    b: torch.Tensor | None = None,
    rest: torch.Tensor | None = None,
    arch: int,
) -> list[Call]:
    """The launch that writes `out = share * a + (1 - share) * b` and `rest = (1 - share) * a`, share = keep / (1 - p).

    Args:
        a: [M, C] fp32, fp16 or bf16; any strides.
        out: [M, C]; written; may be `a` or `b`.
        dropout: the mask, by (row, column).
        b: [M, C] or None for zeros. rest: [M, C], written too.
        arch: see `gemm_tables`.

    Raises:
        ValueError: shapes that do not agree.
    """
    M, C = a.shape
    for name, t in (("out", out), ("b", b), ("rest", rest)):
        if t is not None and t.shape != a.shape:
            raise ValueError(f"{name}: expected shape {[M, C]}, got {list(t.shape)}")
    if M == 0:
        return []
    tile = scale_tile(arch=arch, dtype=a.dtype)
    return [
        Call(
            name="dropout",
            kernel=_dora_dropout_kernel,
            grid=(cdiv(M, tile.block_m) * cdiv(C, tile.block_c), 1, 1),
            args={
                "a_ptr": a,
                "b_ptr": b,
                "seed_ptr": dropout.seed,
                "out_ptr": out,
                "rest_ptr": rest,
                "M": M,
                "C": C,
                **strides(a, "am", "ac"),
                **strides(b, "bm", "bc"),
                **strides(out, "om", "oc"),
                **strides(rest, "rm", "rc"),
                "threshold": dropout.threshold,
                "keep_scale": dropout.keep_scale,
            },
            constants={"BLOCK_M": tile.block_m, "BLOCK_C": tile.block_c},
            num_warps=tile.num_warps,
            num_stages=1,
            options=compile_options(arch),
            bytes=nbytes(a, b, out, rest),
            flops=3 * M * C,
        )
    ]
