"""The second launch of decoding with many adapters: `y[m] = base[m] + bias + S[m] B_s^T`, S from its planes.

The first launch (multi_decode.py, multi_decode_planes.py) left fp32 planes of x A^T, which are added in a fixed order,
scaled and rounded to S here, as many times as there are blocks of columns: they are few and small.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .adapters import Adapters
from .launch import Call, cdiv, compile_options, nbytes, strides
from .lora_expand import triton_dtype
from .multi_group import Projection, check_group, table_pointers
from .multi_tables import DecodeTile
from .multi_tile import adapter_of, check_rows, piece_of
from .projections import block_of_projection, columns, numbered, of_projection, sum_of
from .routing import Routing

BLOCK_ROWS = 16  # routing.block_rows of so few


@triton.jit
def _sum_times_factor(
    planes_ptr, b_ptr, s_out_ptr, block_n, rows, mask_m, offs_n, mask_n, rank, stride_b, scale, M, width,
    stride_sm, stride_sr,
    SPLIT: tl.constexpr, DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    OVERLAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """fp32 [BLOCK_N, BLOCK_M] = B[offs_n] (scale * sum of planes)[rows]^T; the first columns' program keeps S.

    `width` is a plane's row: the ranks of all projections.
    """
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    stride_p = tl.cast(M, tl.int64) * width
    for r in tl.range(0, rank, BLOCK_R, num_stages=1):
        offs_r = r + tl.arange(0, BLOCK_R).to(tl.int64)
        mask_r = offs_r < rank
        b_ptrs = b_ptr + offs_n[:, None] * stride_b + offs_r[None, :]
        b = tl.load(b_ptrs, mask=mask_n[:, None] & mask_r[None, :], other=0.0)  # [BLOCK_N, BLOCK_R]
        if OVERLAP:
            tl.extra.cuda.gdc_wait()  # B is under way; the planes are not there before this
        mask_s = mask_r[:, None] & mask_m[None, :]
        s = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
        for plane in tl.static_range(SPLIT):  # unrolled, so that all loads are under way together
            plane_ptrs = planes_ptr + plane * stride_p + rows[None, :] * width + offs_r[:, None]
            s += tl.load(plane_ptrs, mask=mask_s, other=0.0)
        s = (s * scale).to(DTYPE)  # scaled in fp32, then rounded once
        if s_out_ptr is not None:  # noqa: SIM102 - a static test of its own
            if block_n == 0:
                s_ptrs = s_out_ptr + rows[None, :] * stride_sm + offs_r[:, None] * stride_sr
                tl.store(s_ptrs, s.to(s_out_ptr.dtype.element_ty), mask=mask_s)
        acc = tl.dot(b.to(DTYPE), s, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _finish_columns(
    planes_ptr, b_ptr, base_ptr, bias_ptr, out_ptr, s_out_ptr, block_n, rows, mask_m, rank, scale, N, M, width,
    stride_b, stride_base_p, stride_base_m, stride_base_n, stride_bias, stride_om, stride_on, stride_sm, stride_sr,
    SPLIT: tl.constexpr, BASE_PLANES: tl.constexpr, EARLY_BASE: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, OVERLAP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out[rows, BLOCK_N columns] = base + bias + S B^T."""
    offs_n = block_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    mask = mask_n[:, None] & mask_m[None, :]
    if base_ptr is not None:
        base_ptrs = base_ptr + rows[None, :] * stride_base_m + offs_n[:, None] * stride_base_n
    if EARLY_BASE:  # under way beside B
        base = tl.load(base_ptrs, mask=mask, other=0.0)
    acc = _sum_times_factor(
        planes_ptr, b_ptr, s_out_ptr, block_n, rows, mask_m, offs_n, mask_n, rank, stride_b, scale, M, width,
        stride_sm, stride_sr, SPLIT, DTYPE, BLOCK_M, BLOCK_N, BLOCK_R, OVERLAP, PRECISION,
    )  # fmt: skip
    if OVERLAP:  # of rank 0 nothing has waited yet
        tl.extra.cuda.gdc_wait()
    if EARLY_BASE:
        acc += base.to(tl.float32)
    elif base_ptr is not None:
        for plane in tl.static_range(BASE_PLANES):
            plane_ptrs = base_ptrs + plane * tl.cast(stride_base_p, tl.int64)
            acc += tl.load(plane_ptrs, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n * stride_bias, mask=mask_n, other=0.0).to(tl.float32)[:, None]
    out_ptrs = out_ptr + rows[None, :] * stride_om + offs_n[:, None] * stride_on
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _zero_past_rank(
    s_out_ptr, rows, mask_m, rank, max_rank, stride_sm, stride_sr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr
):
    for r in range(rank // BLOCK_R * BLOCK_R, max_rank, BLOCK_R):
        offs_r = r + tl.arange(0, BLOCK_R).to(tl.int64)
        mask = ((offs_r >= rank) & (offs_r < max_rank))[:, None] & mask_m[None, :]
        s_ptrs = s_out_ptr + rows[None, :] * stride_sm + offs_r[:, None] * stride_sr
        tl.store(s_ptrs, tl.zeros((BLOCK_R, BLOCK_M), s_out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["B", "M"])
def _multi_decode_expand_kernel(
    perm_ptr, blocks_ptr,
    planes_ptr, planes1_ptr, planes2_ptr, planes3_ptr, pool_ptr, pool1_ptr, pool2_ptr, pool3_ptr,
    row_offset_ptr, row_offset1_ptr, row_offset2_ptr, row_offset3_ptr, rank_ptr, rank1_ptr, rank2_ptr, rank3_ptr,
    scaling_ptr, scaling1_ptr, scaling2_ptr, scaling3_ptr, base_ptr, base1_ptr, base2_ptr, base3_ptr,
    bias_ptr, bias1_ptr, bias2_ptr, bias3_ptr, out_ptr, out1_ptr, out2_ptr, out3_ptr,
    s_out_ptr, s_out1_ptr, s_out2_ptr, s_out3_ptr,
    N, N1, N2, N3, max_rank, max_rank1, max_rank2, max_rank3,
    stride_base_m, stride_base_m1, stride_base_m2, stride_base_m3, stride_om, stride_om1, stride_om2, stride_om3,
    B, M, stride_base_p, stride_base_n, stride_bias, stride_on, stride_sm, stride_sr,
    SPLIT: tl.constexpr, BASE_PLANES: tl.constexpr, EARLY_BASE: tl.constexpr, IN_PLACE: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, ODD_N: tl.constexpr,
    OVERLAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    which, block_n = block_of_projection(tl.program_id(0), N, N1, N2, N3, BLOCK_N)
    width = sum_of(max_rank, max_rank1, max_rank2, max_rank3)
    own_N = of_projection(which, N, N1, N2, N3)
    slot, first, length = piece_of(blocks_ptr, B, tl.program_id(1))
    first, length = first + tl.program_id(2) * BLOCK_M, length - tl.program_id(2) * BLOCK_M
    row_offset, rank = adapter_of(
        slot, of_projection(which, row_offset_ptr, row_offset1_ptr, row_offset2_ptr, row_offset3_ptr),
        of_projection(which, rank_ptr, rank1_ptr, rank2_ptr, rank3_ptr),
    )  # fmt: skip
    if length > 0:
        offs_m = tl.arange(0, BLOCK_M)
        mask_m = offs_m < length
        rows = tl.load(perm_ptr + first + offs_m, mask=mask_m, other=0).to(tl.int64)
        own_s = None
        if s_out_ptr is not None:
            own_s = of_projection(which, s_out_ptr, s_out1_ptr, s_out2_ptr, s_out3_ptr)
        if (rank > 0) | (not IN_PLACE):  # in place, rows of no adapter are right already
            own_planes = of_projection(which, planes_ptr, planes1_ptr, planes2_ptr, planes3_ptr)
            own_scaling = of_projection(which, scaling_ptr, scaling1_ptr, scaling2_ptr, scaling3_ptr)
            scale = tl.load(own_scaling + tl.maximum(slot, 0))
            b_ptr = of_projection(which, pool_ptr, pool1_ptr, pool2_ptr, pool3_ptr) + row_offset * own_N
            own_base, own_bias = None, None
            if base_ptr is not None:
                own_base = of_projection(which, base_ptr, base1_ptr, base2_ptr, base3_ptr)
            if bias_ptr is not None:
                own_bias = of_projection(which, bias_ptr, bias1_ptr, bias2_ptr, bias3_ptr)
            stride_bm = of_projection(which, stride_base_m, stride_base_m1, stride_base_m2, stride_base_m3)
            own_out = of_projection(which, out_ptr, out1_ptr, out2_ptr, out3_ptr)
            stride_m = of_projection(which, stride_om, stride_om1, stride_om2, stride_om3)
            if rank % 8 == 0:  # a stride that the compiler knows to be a multiple of 8: loads of 16 bytes
                even_rank = rank // 8 * 8
                _finish_columns(
                    own_planes, b_ptr, own_base, own_bias, own_out, own_s, block_n, rows, mask_m, even_rank, scale,
                    own_N, M, width, even_rank, stride_base_p, stride_bm, stride_base_n, stride_bias, stride_m,
                    stride_on, stride_sm, stride_sr, SPLIT, BASE_PLANES, EARLY_BASE, DTYPE, BLOCK_M, BLOCK_N, BLOCK_R,
                    OVERLAP, PRECISION,
                )  # fmt: skip
            else:  # element by element, whose addresses leave registers for fewer columns
                for part in range(BLOCK_N // ODD_N):
                    _finish_columns(
                        own_planes, b_ptr, own_base, own_bias, own_out, own_s, block_n * (BLOCK_N // ODD_N) + part,
                        rows, mask_m, rank, scale, own_N, M, width, rank, stride_base_p, stride_bm, stride_base_n,
                        stride_bias, stride_m, stride_on, stride_sm, stride_sr, SPLIT, BASE_PLANES, EARLY_BASE, DTYPE,
                        BLOCK_M, ODD_N, 16, OVERLAP, PRECISION,
                    )  # fmt: skip
        if s_out_ptr is not None:  # noqa: SIM102 - a static test of its own
            if block_n == 0:
                if OVERLAP:
                    tl.extra.cuda.gdc_wait()
                own_max = of_projection(which, max_rank, max_rank1, max_rank2, max_rank3)
                _zero_past_rank(own_s, rows, mask_m, rank, own_max, stride_sm, stride_sr, BLOCK_M, BLOCK_R)
    if OVERLAP:  # no program may end before the first launch has: what follows waits for this launch only
        tl.extra.cuda.gdc_wait()


def check_projections(x: torch.Tensor, group: Sequence[Projection], routing: Routing) -> None:
    """ValueError where x and the projections do not fit together, or cannot share a launch."""
    check_group([each.adapters for each in group], routing, x=x)
    M, K = x.shape
    for each in group:
        adapters, out, base, s_out = each.adapters, each.out, each.base, each.s_out
        check_rows(adapters, routing, out=out)
        N, R = adapters.N, adapters.max_rank
        if adapters.K != K or out.shape[1] != N or (s_out is not None and s_out.shape != (M, R)):
            raise ValueError(f"x, out, s_out: expected widths {adapters.K}, {N} and {R}")
        if base is not None and base.shape[-2:] != (M, N):
            raise ValueError(f"base: expected [{M}, {N}] or planes of that, got {list(base.shape)}")
    for name in ("out", "base", "bias", "s_out"):
        tensors = [getattr(each, name) for each in group]
        if all(t is None for t in tensors):
            continue
        if any(t is None for t in tensors) or len({(t.dtype, t.dim(), t.stride(-1)) for t in tensors}) > 1:
            raise ValueError(f"{name}: expected one of a kind for each projection, or for none")
    if len({each.base is each.out for each in group}) > 1:
        raise ValueError("base: expected to be `out` itself for all projections or for none")


def expand_planes_call(
    planes: torch.Tensor,
    group: Sequence[Projection],
    routing: Routing,
    arch: int,
    precision: str,
    tile: DecodeTile,
    dtype: torch.dtype,
) -> Call:
    """The second launch: planes [split, M, sum of max_rank] of x A^T -> outs and s_outs.

    S and B are rounded to `dtype`.
    """
    split, M, width = planes.shape
    held, first = [each.adapters for each in group], group[0]
    outs, s_outs, biases = ([getattr(each, name) for each in group] for name in ("out", "s_out", "bias"))
    bases = [each.base[None] if each.base is not None and each.base.dim() == 2 else each.base for each in group]
    sizes = [adapters.N for adapters in held]
    factors = min(routing.slots, M) * sum(a.max_rank * a.N * a.pool_b.element_size() for a in held)
    base = bases[0]
    return Call(
        name="decode with many adapters: sum of planes + expand",
        kernel=_multi_decode_expand_kernel,
        grid=(sum(cdiv(N, tile.block_n) for N in sizes), routing.blocks.shape[1], programs_a_block(M, tile)),
        args={
            **tables(held, routing),
            **numbered("planes{}_ptr", columns(planes, [a.max_rank for a in held])),
            **numbered("pool{}_ptr", [a.pool_b for a in held]),
            **numbered("scaling{}_ptr", [a.scaling for a in held]),
            **numbered("base{}_ptr", bases),
            **numbered("bias{}_ptr", biases),
            **numbered("out{}_ptr", outs),
            **numbered("s_out{}_ptr", s_outs),
            **numbered("N{}", sizes),
            **numbered("max_rank{}", [a.max_rank for a in held]),
            **numbered("stride_base_m{}", [0 if t is None else t.stride(1) for t in bases]),
            **numbered("stride_om{}", [t.stride(0) for t in outs]),
            "M": M,
            "stride_base_p": 0 if base is None else base.stride(0),
            "stride_base_n": 0 if base is None else base.stride(2),
            **strides(first.bias, "bias"),
            "stride_on": first.out.stride(1),
            **strides(first.s_out, "sm", "sr"),
        },
        constants={
            "SPLIT": split,
            "BASE_PLANES": 0 if base is None else base.shape[0],
            # Planes of the base may be the first launch's own work, which is not there early.
            "EARLY_BASE": tile.early_base and base is not None and base.shape[0] == 1,
            "IN_PLACE": first.base is first.out and first.bias is None,
            "DTYPE": triton_dtype(dtype),
            "BLOCK_M": tile.rows,
            "BLOCK_N": tile.block_n,
            "BLOCK_R": tile.expand_r or tile.block_r,
            "ODD_N": min(tile.block_n, 32 * tile.expand_warps),
            "OVERLAP": tile.overlap,
            "PRECISION": precision,
        },
        num_warps=tile.expand_warps,
        num_stages=1,
        options=compile_options(arch) | ({"launch_pdl": True} if tile.overlap else {}),
        bytes=nbytes(planes, *(each.base for each in group), *biases, *outs, *s_outs) + factors,
        flops=2 * M * sum(a.N * a.max_rank for a in held) + split * M * width,
    )


def programs_a_block(M: int, tile: DecodeTile) -> int:
    """Programs that share a block of the routing, whose rows may be more than a program's."""
    return cdiv(min(M, BLOCK_ROWS), tile.rows)


def tables(group: Sequence[Adapters], routing: Routing) -> dict[str, object]:
    return {
        **table_pointers(group),
        "perm_ptr": routing.perm,
        "blocks_ptr": routing.blocks,
        "B": routing.blocks.shape[1],
    }
