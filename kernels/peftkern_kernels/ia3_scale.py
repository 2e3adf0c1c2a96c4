"""`out[m, c] = round(a[m, c] * l[c])`, or each row by its own vector `l[ids[m], c]`: IA3 as one elementwise pass; and
with `bias[c]` and `rest[m, c]` added before the rounding, DoRA's.

Products in fp32, one rounding, whatever dtype l has: torch's `a * l` with an fp32 l writes and reads an fp32 copy of a.
What stands beside a GEMM of cuBLAS: y = z * l in forward (z is still in the L2 cache for the k and v projections),
x * l or W * l before it. `out` may be `a`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .ia3_tables import scale_tile
from .launch import Call, cdiv, nbytes, strides
from .overlap import begin, overlap_options, overlaps


@triton.jit(do_not_specialize=["M", "slots"])
def _ia3_scale_kernel(
    a_ptr, l_ptr, ids_ptr, bias_ptr, rest_ptr, out_ptr,  # [M, C] [slots, C], [M] [C] [M, C] or None -> [M, C]
    M, C, slots, stride_am, stride_ac, stride_ls, stride_lc, stride_ids, stride_bias, stride_rm, stride_rc,
    stride_om, stride_oc,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    begin(OVERLAP)
    programs_c = tl.cdiv(C, BLOCK_C)
    offs_m = (tl.program_id(0) // programs_c).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = (tl.program_id(0) % programs_c).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_m, mask_c = offs_m < M, offs_c < C
    mask = mask_m[:, None] & mask_c[None, :]
    a = tl.load(a_ptr + offs_m[:, None] * stride_am + offs_c[None, :] * stride_ac, mask=mask, other=0.0)
    if ids_ptr is not None:
        ids = tl.load(ids_ptr + offs_m * stride_ids, mask=mask_m, other=-1).to(tl.int64)
        known = (ids >= 0) & (ids < slots)
        rows = tl.where(known, ids, 0)
        l_ptrs = l_ptr + rows[:, None] * stride_ls + offs_c[None, :] * stride_lc
        scale = tl.load(l_ptrs, mask=known[:, None] & mask_c[None, :], other=1.0)  # [BLOCK_M, BLOCK_C]
    else:
        scale = tl.load(l_ptr + offs_c * stride_lc, mask=mask_c, other=0.0)[None, :]  # [1, BLOCK_C]
    out = a.to(tl.float32) * scale.to(tl.float32)
    if bias_ptr is not None:
        out += tl.load(bias_ptr + offs_c * stride_bias, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    if rest_ptr is not None:
        rest_ptrs = rest_ptr + offs_m[:, None] * stride_rm + offs_c[None, :] * stride_rc
        out += tl.load(rest_ptrs, mask=mask, other=0.0).to(tl.float32)
    out_ptrs = out_ptr + offs_m[:, None] * stride_om + offs_c[None, :] * stride_oc
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)


def scale_calls(
    a: torch.Tensor,
    scale: torch.Tensor,
    out: torch.Tensor,
    *,
    ids: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    rest: torch.Tensor | None = None,
    arch: int,
) -> list[Call]:
    """The launch that writes `out = round(a * scale + bias + rest)`.

    Args:
        a: [M, C] fp32, fp16 or bf16; any strides.
        scale: [C] of any float dtype; with `ids`, [slots, C].
        out: [M, C]; written; may be `a` or `rest`.
        bias: [C]. rest: [M, C]; any strides.
        ids: [M] int32 or int64: the row of `scale` for each row of a; what is no row of it scales by 1.
        arch: see `gemm_tables`.

    Raises:
        ValueError: shapes that do not agree.
    """
    M, C = a.shape
    if out.shape != a.shape or scale.shape[-1] != C or scale.dim() != (1 if ids is None else 2):
        raise ValueError(f"scale, out: expected [{C}] and {[M, C]}, got {list(scale.shape)} and {list(out.shape)}")
    if (bias is not None and bias.shape != (C,)) or (rest is not None and rest.shape != a.shape):
        shapes = [None if t is None else list(t.shape) for t in (bias, rest)]
        raise ValueError(f"bias, rest: expected [{C}] and {[M, C]}, got {shapes[0]} and {shapes[1]}")
    if M == 0:
        return []
    tile = scale_tile(arch=arch, dtype=a.dtype)
    return [
        Call(
            name="scale",
            kernel=_ia3_scale_kernel,
            grid=(cdiv(M, tile.block_m) * cdiv(C, tile.block_c), 1, 1),
            args={
                "a_ptr": a,
                "l_ptr": scale,
                "ids_ptr": ids,
                "bias_ptr": bias,
                "rest_ptr": rest,
                "out_ptr": out,
                "M": M,
                "C": C,
                "slots": 0 if ids is None else scale.shape[0],
                **strides(a, "am", "ac"),
                "stride_ls": 0 if ids is None else scale.stride(0),
                "stride_lc": scale.stride(-1),
                **strides(ids, "ids"),
                **strides(bias, "bias"),
                **strides(rest, "rm", "rc"),
                **strides(out, "om", "oc"),
            },
            constants={"BLOCK_M": tile.block_m, "BLOCK_C": tile.block_c, "OVERLAP": overlaps(arch)},
            num_warps=tile.num_warps,
            num_stages=1,
            options=overlap_options(arch),
            bytes=nbytes(a, scale, ids, bias, rest, out),
            flops=M * C * (1 + (bias is not None) + (rest is not None)),
        )
    ]
