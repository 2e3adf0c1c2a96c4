"""The second launch of decoding: planes added up, `y = x W^T + bias + S B^T`; for dense and for 4-bit weights.

Planes of x W^T and of x A^T are added in a fixed order; S is scaled, rounded and kept for the caller. Up to four
projections of one x are served, each with its adapter (projections.py); one is a group of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from .dropout import Dropout
from .gemm_tables import rank_block
from .launch import MOST_PROJECTIONS, Call, cdiv, compile_options, nbytes, scratch, strides
from .lora_expand import triton_dtype
from .projections import block_of_projection, numbered, of_projection

MAX_ROWS = 16


@dataclass(frozen=True, slots=True)
class Projection:
    """What a projection has by itself in the two launches, beside its weight [N, K].

    Attributes:
        a: [R, K], b: [N, R]: x's dtype or fp32 masters. scaling: applied in fp32 before S is rounded.
        out: [M, N] and s_out: [M, R], written; any strides. bias: [N] or None.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    out: torch.Tensor
    s_out: torch.Tensor
    bias: torch.Tensor | None = None


@triton.jit(do_not_specialize=["M", "factor", "factor1", "factor2", "factor3"])
def _decode_finish_kernel(
    y_planes_ptr, y_planes1_ptr, y_planes2_ptr, y_planes3_ptr,  # each [SPLIT, M, N]
    s_planes_ptr, s_planes1_ptr, s_planes2_ptr, s_planes3_ptr,  # each [SPLIT, M, R]
    b_ptr, b1_ptr, b2_ptr, b3_ptr, bias_ptr, bias1_ptr, bias2_ptr, bias3_ptr,  # [N, R] [N]
    out_ptr, out1_ptr, out2_ptr, out3_ptr, s_out_ptr, s_out1_ptr, s_out2_ptr, s_out3_ptr,  # -> [M, N] [M, R]
    M, N, N1, N2, N3, R, R1, R2, R3, factor, factor1, factor2, factor3,
    stride_bn, stride_bn1, stride_bn2, stride_bn3, stride_br, stride_bias,
    stride_om, stride_om1, stride_om2, stride_om3, stride_on, stride_sm, stride_sr,
    DTYPE: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    OVERLAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    which, block_n = block_of_projection(tl.program_id(0), N, N1, N2, N3, BLOCK_N)
    own_N, own_R = of_projection(which, N, N1, N2, N3), of_projection(which, R, R1, R2, R3)
    own_factor = of_projection(which, factor, factor1, factor2, factor3)
    own_y = of_projection(which, y_planes_ptr, y_planes1_ptr, y_planes2_ptr, y_planes3_ptr)
    own_s = of_projection(which, s_planes_ptr, s_planes1_ptr, s_planes2_ptr, s_planes3_ptr)
    own_b = of_projection(which, b_ptr, b1_ptr, b2_ptr, b3_ptr)
    own_out = of_projection(which, out_ptr, out1_ptr, out2_ptr, out3_ptr)
    own_s_out = of_projection(which, s_out_ptr, s_out1_ptr, s_out2_ptr, s_out3_ptr)
    stride_n = of_projection(which, stride_bn, stride_bn1, stride_bn2, stride_bn3)
    stride_m = of_projection(which, stride_om, stride_om1, stride_om2, stride_om3)
    offs_m = tl.arange(0, BLOCK_M).to(tl.int64)
    offs_n = block_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = (offs_m < M)[None, :]
    mask = (offs_n < own_N)[:, None] & mask_m
    if OVERLAP:  # all of the first launch's planes are there after this; every program ends behind it, too
        tl.extra.cuda.gdc_wait()
    base = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for plane in tl.static_range(SPLIT):
        base += tl.load(own_y + (plane * M + offs_m)[None, :] * own_N + offs_n[:, None], mask=mask, other=0.0)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for r in tl.range(0, own_R, BLOCK_R, num_stages=1):
        offs_r = r + tl.arange(0, BLOCK_R).to(tl.int64)
        mask_s = (offs_r < own_R)[:, None] & mask_m
        s = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
        for plane in tl.static_range(SPLIT):
            s += tl.load(own_s + (plane * M + offs_m)[None, :] * own_R + offs_r[:, None], mask=mask_s, other=0.0)
        s = (s * own_factor).to(s_out_ptr.dtype.element_ty)  # scaled in fp32, then rounded once
        if block_n == 0:
            tl.store(own_s_out + offs_m[None, :] * stride_sm + offs_r[:, None] * stride_sr, s, mask=mask_s)
        b_ptrs = own_b + (offs_n % own_N)[:, None] * stride_n + offs_r[None, :] * stride_br
        b = tl.load(b_ptrs, mask=(offs_r < own_R)[None, :], other=0.0)  # [BLOCK_N, BLOCK_R]
        acc = tl.dot(b.to(DTYPE), s.to(DTYPE), acc, input_precision=PRECISION)
    acc += base
    if bias_ptr is not None:
        own_bias = of_projection(which, bias_ptr, bias1_ptr, bias2_ptr, bias3_ptr)
        acc += tl.load(own_bias + (offs_n % own_N) * stride_bias).to(tl.float32)[:, None]
    out_ptrs = own_out + offs_m[None, :] * stride_m + offs_n[:, None] * stride_on
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True, slots=True)
class Planes:
    """What the first launch fills, for each projection: fp32 [split, M, N] of x W^T and [split, M, R] of x A^T."""

    y: tuple[torch.Tensor, ...]
    s: tuple[torch.Tensor, ...]

    @classmethod
    def empty(cls, split: int, x: torch.Tensor, sizes: Sequence[int], ranks: Sequence[int]) -> Planes:
        """Memory for them."""

        def each(widths: Sequence[int]) -> tuple[torch.Tensor, ...]:
            return tuple(scratch(split, x.shape[0], w, dtype=torch.float32, device=x.device) for w in widths)

        return cls(each(sizes), each(ranks))


def check_group(x: torch.Tensor, weights: Sequence[Any], group: Sequence[Projection]) -> None:
    """ValueError where x has too many rows, or the projections (their dense weights too) cannot share a launch."""
    if x.shape[0] > MAX_ROWS:
        raise ValueError(f"x: expected at most {MAX_ROWS} rows on the decode path, got {x.shape[0]}")
    if not 1 <= len(group) <= MOST_PROJECTIONS:
        raise ValueError(f"projections: expected 1 to {MOST_PROJECTIONS}, got {len(group)}")
    if len(weights) != len(group):
        raise ValueError(f"weights: expected one for each of {len(group)} projections, got {len(weights)}")
    if len(group) == 1:
        return
    kinds: dict[str, set[Any]] = {
        "weight": {(w.dtype, w.stride()) for w in weights if isinstance(w, torch.Tensor)},
        "a": {(each.a.dtype, each.a.stride()) for each in group},
        "b": {(each.b.dtype, each.b.stride(1)) for each in group},
        "bias": {None if each.bias is None else (each.bias.dtype, each.bias.stride(0)) for each in group},
        "out": {(each.out.dtype, each.out.stride(1)) for each in group},
        "s_out": {(each.s_out.dtype, each.s_out.stride()) for each in group},
    }
    for name, found in kinds.items():
        if len(found) > 1:
            raise ValueError(f"{name}: expected one dtype and one order of strides in all projections, got {found}")


def finish_call(
    planes: Planes,
    group: Sequence[Projection],
    dropout: Dropout | None,
    dtype: torch.dtype,
    arch: int,
    precision: str,
    *,
    overlap: bool,
) -> Call:
    """The second launch: planes -> outs and s_outs. S and B are rounded to `dtype`, x's.

    `overlap`: whether it starts while the first, which must allow it, runs (sm_90 and later).
    """
    split, M, _ = planes.y[0].shape
    ranks, sizes, block_n = [s.shape[2] for s in planes.s], [y.shape[2] for y in planes.y], 64
    keep_scale = 1.0 if dropout is None else dropout.keep_scale
    outs, s_outs, bs, biases = ([getattr(each, k) for each in group] for k in ("out", "s_out", "b", "bias"))
    first = group[0]
    return Call(
        name="decode: sum of planes + expand",
        kernel=_decode_finish_kernel,
        grid=(sum(cdiv(N, block_n) for N in sizes), 1, 1),
        args={
            **numbered("y_planes{}_ptr", planes.y),
            **numbered("s_planes{}_ptr", planes.s),
            **numbered("b{}_ptr", bs),
            **numbered("bias{}_ptr", biases),
            **numbered("out{}_ptr", outs),
            **numbered("s_out{}_ptr", s_outs),
            **numbered("N{}", sizes),
            **numbered("R{}", ranks),
            **numbered("factor{}", [float(each.scaling) * keep_scale for each in group]),
            **numbered("stride_bn{}", [b.stride(0) for b in bs]),
            **numbered("stride_om{}", [out.stride(0) for out in outs]),
            "M": M,
            "stride_br": first.b.stride(1),
            **strides(first.bias, "bias"),
            "stride_on": first.out.stride(1),
            **strides(first.s_out, "sm", "sr"),
        },
        constants={
            "DTYPE": triton_dtype(dtype),
            "SPLIT": split,
            "BLOCK_M": MAX_ROWS,
            "BLOCK_N": block_n,
            "BLOCK_R": rank_block(max(ranks), dtype),
            "OVERLAP": overlap,
            "PRECISION": precision,
        },
        num_warps=4,
        num_stages=1,
        options=compile_options(arch) | ({"launch_pdl": True} if overlap else {}),
        bytes=nbytes(*planes.y, *planes.s, *bs, *biases, *outs, *s_outs),
        flops=sum(2 * M * N * R + split * M * (N + R) for N, R in zip(sizes, ranks, strict=True)),
    )
