"""Decoding with many adapters: `y[m] = base[m] + bias + scaling[s] * x[m] A_s^T B_s^T` for at most 64 rows.

With a token or two for each adapter the time is that of reading the adapters once, 262 kB each at K = N = 4096 and rank
16. Two launches: the first splits K and leaves fp32 planes of x A^T; the second adds them in a fixed order, scales and
rounds S, multiplies it with B and adds what the base gave. A program has rows of one adapter (a block of the routing),
so that tokens that share one share its loads; the adapter's rank is the dot's M, tokens its N, and one token wastes
nothing but idle lanes of the matrix instruction. Work follows each adapter's own rank.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .adapters import Adapters
from .launch import Call, cdiv, compile_options, nbytes, scratch, strides
from .lora_expand import triton_dtype
from .multi_tables import DecodeTile, multi_decode_tile, pools_vectorize
from .multi_tile import adapter_of, check_rows, piece_of, shrink_part
from .reduction_tables import vectorizes
from .routing import Routing

MAX_ROWS = 64
BLOCK_ROWS = 16  # routing.block_rows of so few


@triton.jit(do_not_specialize=["B", "M"])
def _multi_decode_shrink_kernel(
    x_ptr, pool_ptr, planes_ptr, perm_ptr, blocks_ptr, row_offset_ptr, rank_ptr,
    B, M, K, max_rank, k_part, stride_xm, stride_xk, stride_pool,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    NUM_STAGES: tl.constexpr, OVERLAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    blocks_r = tl.cdiv(max_rank, BLOCK_R)
    split = tl.program_id(0) // blocks_r
    k_start = split * k_part
    shrink_part(
        x_ptr, pool_ptr, planes_ptr, perm_ptr, blocks_ptr, row_offset_ptr, rank_ptr, B, tl.program_id(1),
        tl.program_id(0) % blocks_r * BLOCK_R, split, k_start, tl.minimum(k_start + k_part, K), M, max_rank,
        stride_xm, stride_xk, stride_pool, BLOCK_M, BLOCK_R, BLOCK_K, EVEN_K, NUM_STAGES, PRECISION,
    )  # fmt: skip


@triton.jit
def _sum_times_factor(
    planes_ptr, b_ptr, s_out_ptr, rows, mask_m, offs_n, mask_n, rank, stride_b, scale, M, max_rank,
    stride_sm, stride_sr,
    SPLIT: tl.constexpr, DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    OVERLAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """fp32 [BLOCK_N, BLOCK_M] = B[offs_n] (scale * sum of planes)[rows]^T; the first columns' program keeps S."""
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    stride_p = tl.cast(M, tl.int64) * max_rank
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
            plane_ptrs = planes_ptr + plane * stride_p + rows[None, :] * max_rank + offs_r[:, None]
            s += tl.load(plane_ptrs, mask=mask_s, other=0.0)
        s = (s * scale).to(DTYPE)  # scaled in fp32, then rounded once
        if s_out_ptr is not None:  # noqa: SIM102 - a static test of its own
            if tl.program_id(0) == 0:
                s_ptrs = s_out_ptr + rows[None, :] * stride_sm + offs_r[:, None] * stride_sr
                tl.store(s_ptrs, s.to(s_out_ptr.dtype.element_ty), mask=mask_s)
        acc = tl.dot(b.to(DTYPE), s, acc, input_precision=PRECISION)
    return acc


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
    planes_ptr, pool_ptr, scaling_ptr, base_ptr, bias_ptr, out_ptr, s_out_ptr,
    perm_ptr, blocks_ptr, row_offset_ptr, rank_ptr,
    B, M, N, max_rank, stride_base_p, stride_base_m, stride_base_n, stride_bias, stride_om, stride_on,
    stride_sm, stride_sr,
    SPLIT: tl.constexpr, BASE_PLANES: tl.constexpr, IN_PLACE: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, OVERLAP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    slot, first, length = piece_of(blocks_ptr, B, tl.program_id(1))
    row_offset, rank = adapter_of(slot, row_offset_ptr, rank_ptr)
    if length > 0:
        offs_m = tl.arange(0, BLOCK_M)
        mask_m = offs_m < length
        rows = tl.load(perm_ptr + first + offs_m, mask=mask_m, other=0).to(tl.int64)
        offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        if s_out_ptr is not None:  # noqa: SIM102
            if tl.program_id(0) == 0:
                _zero_past_rank(s_out_ptr, rows, mask_m, rank, max_rank, stride_sm, stride_sr, BLOCK_M, BLOCK_R)
        if (rank > 0) | (not IN_PLACE):  # in place, rows of no adapter are right already
            scale = tl.load(scaling_ptr + tl.maximum(slot, 0))
            b_ptr = pool_ptr + row_offset * N
            if rank % 8 == 0:  # a stride that the compiler knows to be a multiple of 8: loads of 16 bytes
                even_rank = rank // 8 * 8
                acc = _sum_times_factor(
                    planes_ptr, b_ptr, s_out_ptr, rows, mask_m, offs_n, mask_n, even_rank, even_rank, scale, M,
                    max_rank, stride_sm, stride_sr, SPLIT, DTYPE, BLOCK_M, BLOCK_N, BLOCK_R, OVERLAP, PRECISION,
                )  # fmt: skip
            else:
                acc = _sum_times_factor(
                    planes_ptr, b_ptr, s_out_ptr, rows, mask_m, offs_n, mask_n, rank, rank, scale, M,
                    max_rank, stride_sm, stride_sr, SPLIT, DTYPE, BLOCK_M, BLOCK_N, BLOCK_R, OVERLAP, PRECISION,
                )  # fmt: skip
            mask = mask_n[:, None] & mask_m[None, :]
            for plane in tl.static_range(BASE_PLANES):
                base_ptrs = base_ptr + plane * tl.cast(stride_base_p, tl.int64)
                base_ptrs += rows[None, :] * stride_base_m + offs_n[:, None] * stride_base_n
                acc += tl.load(base_ptrs, mask=mask, other=0.0).to(tl.float32)
            if bias_ptr is not None:
                acc += tl.load(bias_ptr + offs_n * stride_bias, mask=mask_n, other=0.0).to(tl.float32)[:, None]
            out_ptrs = out_ptr + rows[None, :] * stride_om + offs_n[:, None] * stride_on
            tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)
    if OVERLAP:  # no program may end before the first launch has: what follows waits for this launch only
        tl.extra.cuda.gdc_wait()


def multi_decode_calls(
    x: torch.Tensor,
    adapters: Adapters,
    routing: Routing,
    out: torch.Tensor,
    *,
    base: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    s_out: torch.Tensor | None = None,
    arch: int,
    precision: str = "ieee",
    tile: DecodeTile | None = None,
) -> list[Call]:
    """The two launches that write `out[m] = base[m] + bias + scaling[s] * x[m] A_s^T B_s^T`, s = ids[m].

    Args:
        x: [M, K], M at most 64; fp32, fp16 or bf16, any strides.
        adapters: of x's dtype or fp32 (rounded to x's dtype in registers). routing: of the batch.
        out: [M, N] any float dtype, any strides; every row is written.
        base: x W^T: [M, N], which may be `out` itself, or fp32 [planes, M, N], added in order. None for zeros.
        bias: [N]. s_out: [M, max_rank], written with S if it is there.
        arch: see `gemm_tables`. precision: `input_precision` of fp32 dots. tile: overrides the table.

    Raises:
        ValueError: more than 64 rows, or shapes that do not agree.
    """
    check_rows(adapters, routing, x=x, out=out)
    (M, K), N, R = x.shape, adapters.N, adapters.max_rank
    if M > MAX_ROWS:
        raise ValueError(f"x: expected at most {MAX_ROWS} rows on the decode path, got {M}")
    if adapters.K != K or out.shape[1] != N or (s_out is not None and s_out.shape != (M, R)):
        raise ValueError(f"x, out, s_out: expected widths {adapters.K}, {N} and {R}")
    if base is not None and base.shape[-2:] != (M, N):
        raise ValueError(f"base: expected [{M}, {N}] or planes of that, got {list(base.shape)}")
    if M == 0:
        return []
    if tile is None:
        aligned = vectorizes(x) and pools_vectorize(adapters)
        masters = adapters.pool_a.dtype != x.dtype
        tile = multi_decode_tile(arch=arch, dtype=x.dtype, M=M, N=N, K=K, R=R, aligned=aligned, masters=masters)
    k_part = cdiv(cdiv(K, tile.block_k), tile.split_k) * tile.block_k
    split = cdiv(K, k_part)
    planes = scratch(split, M, R, dtype=torch.float32, device=x.device)
    shrink = Call(
        name="decode with many adapters: shrink",
        kernel=_multi_decode_shrink_kernel,
        grid=(split * cdiv(R, tile.block_r), routing.blocks.shape[1], 1),
        args={
            **_tables(adapters, routing),
            "x_ptr": x,
            "pool_ptr": adapters.pool_a,
            "planes_ptr": planes,
            "M": M,
            "K": K,
            "max_rank": R,
            "k_part": k_part,
            **strides(x, "xm", "xk"),
            "stride_pool": adapters.pool_a.stride(0),
        },
        constants={
            "BLOCK_M": BLOCK_ROWS,
            "BLOCK_R": tile.block_r,
            "BLOCK_K": tile.block_k,
            "EVEN_K": K % tile.block_k == 0,
            "NUM_STAGES": tile.num_stages,
            "OVERLAP": tile.overlap,
            "PRECISION": precision,
        },
        num_warps=tile.shrink_warps,
        num_stages=tile.num_stages,
        options=compile_options(arch),
        bytes=nbytes(x, planes) + min(routing.slots, M) * R * K * adapters.pool_a.element_size(),
        flops=2 * M * K * R,
    )
    return [
        shrink,
        expand_planes_call(planes, adapters, routing, out, base, bias, s_out, arch, precision, tile, x.dtype),
    ]


def expand_planes_call(
    planes: torch.Tensor,
    adapters: Adapters,
    routing: Routing,
    out: torch.Tensor,
    base: torch.Tensor | None,
    bias: torch.Tensor | None,
    s_out: torch.Tensor | None,
    arch: int,
    precision: str,
    tile: DecodeTile,
    dtype: torch.dtype,
) -> Call:
    """The second launch: planes [split, M, max_rank] of x A^T -> out and s_out. S and B are rounded to `dtype`."""
    split, M, R = planes.shape
    N = adapters.N
    base_planes = 0 if base is None else 1 if base.dim() == 2 else base.shape[0]
    stacked = base[None] if base is not None and base.dim() == 2 else base
    return Call(
        name="decode with many adapters: sum of planes + expand",
        kernel=_multi_decode_expand_kernel,
        grid=(cdiv(N, tile.block_n), routing.blocks.shape[1], 1),
        args={
            **_tables(adapters, routing),
            "planes_ptr": planes,
            "pool_ptr": adapters.pool_b,
            "scaling_ptr": adapters.scaling,
            "base_ptr": base,
            "bias_ptr": bias,
            "out_ptr": out,
            "s_out_ptr": s_out,
            "M": M,
            "N": N,
            "max_rank": R,
            **strides(stacked, "base_p", "base_m", "base_n"),
            **strides(bias, "bias"),
            **strides(out, "om", "on"),
            **strides(s_out, "sm", "sr"),
        },
        constants={
            "SPLIT": split,
            "BASE_PLANES": base_planes,
            "IN_PLACE": base is out and bias is None,
            "DTYPE": triton_dtype(dtype),
            "BLOCK_M": BLOCK_ROWS,
            "BLOCK_N": tile.block_n,
            "BLOCK_R": tile.block_r,
            "OVERLAP": tile.overlap,
            "PRECISION": precision,
        },
        num_warps=tile.expand_warps,
        num_stages=1,
        options=compile_options(arch) | ({"launch_pdl": True} if tile.overlap else {}),
        bytes=nbytes(planes, base, bias, out, s_out) + min(routing.slots, M) * R * N * adapters.pool_b.element_size(),
        flops=2 * M * N * R + split * M * R,
    )


def _tables(adapters: Adapters, routing: Routing) -> dict[str, object]:
    return {
        "perm_ptr": routing.perm,
        "blocks_ptr": routing.blocks,
        "row_offset_ptr": adapters.row_offset,
        "rank_ptr": adapters.rank,
        "B": routing.blocks.shape[1],
    }
