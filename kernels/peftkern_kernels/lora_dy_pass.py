"""One pass over dY for small ranks: both of its products with thin matrices while its tile is on the chip.

    dS[M, R] = scaling * dY B           dY [M, N], B [N, R]
    dB[N, R] = dY^T S                   S [M, R], carries the scaling

Reading dY once in place of twice saves M N elements and costs fp32 planes: a program owns BLOCK_N columns, walks down
its share of the rows, keeps dB's tile in registers, and stores its part of each dS tile. So dS has a plane for each
block of columns and dB one for each share of rows; one launch adds both, in order (`reduce.py`). With bf16 at
8192 x 4096 the planes cost about 0.6 MB * R each way against 67 MB: it pays to about R 32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import Call, cdiv, compile_options, nbytes, scratch, strides
from .overlap import begin, overlap_options, overlaps
from .reduce import PlaneSum, reduce_calls
from .reduction_tables import Tile, best_splits, by_elements, dy_pass_tile, vectorizes

# Up to this rank one pass over dY is cheaper than two (predicted: the planes cost 0.79 MB * R written and read at
# 8192 x 4096, against 67 MB for reading dY again; the two meet near R = 50).
ONE_PASS_RANK = 32


@triton.jit(do_not_specialize=["M", "m_chunk"])
def _lora_dy_pass_kernel(
    dy_ptr, b_ptr, s_ptr, ds_ptr, db_ptr,  # [M, N] [N, R] [M, R] -> fp32 [column blocks, M, R], [row shares, N, R]
    M, N, R, stride_dym, stride_dyn, stride_bn, stride_br, stride_sm, stride_sr, m_chunk,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, EVEN_N: tl.constexpr,
    LOAD_TWICE: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr, WAIT_FIRST: tl.constexpr,
):  # fmt: skip
    begin(OVERLAP, WAIT_FIRST=WAIT_FIRST)
    blocks_r = tl.cdiv(R, BLOCK_R)
    block_n = (tl.program_id(0) // blocks_r).to(tl.int64)
    block_r = (tl.program_id(0) % blocks_r).to(tl.int64)
    share = tl.program_id(1).to(tl.int64)
    m_start = share * m_chunk
    offs_m = m_start + tl.arange(0, BLOCK_M)
    offs_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = block_r * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_n, mask_r = offs_n < N, (offs_r < R)[None, :]
    dy_ptrs = dy_ptr + offs_m[:, None] * stride_dym + offs_n[None, :] * stride_dyn
    # Two products read the tile, one of them transposed. Hopper and Blackwell do so from one copy in shared memory; for
    # others the compiler gives up asynchronous loads then, so the tile is loaded twice, the second time from cache.
    if LOAD_TWICE:
        dyt_ptrs = dy_ptr + offs_m[None, :] * stride_dym + offs_n[:, None] * stride_dyn
    s_ptrs = s_ptr + offs_m[:, None] * stride_sm + offs_r[None, :] * stride_sr
    step_dy = tl.cast(stride_dym, tl.int64) * BLOCK_M
    step_s = tl.cast(stride_sm, tl.int64) * BLOCK_M
    # Planes are contiguous, so that a tile's store is one run of BLOCK_M * R floats.
    ds_plane = ds_ptr + block_n * M * R + offs_r[None, :]
    db_plane = db_ptr + share * N * R + offs_r[None, :]

    b_ptrs = b_ptr + offs_n[:, None] * stride_bn + offs_r[None, :] * stride_br
    b = tl.load(b_ptrs, mask=mask_n[:, None] & mask_r, other=0.0).to(dy_ptr.dtype.element_ty)  # [BLOCK_N, BLOCK_R]
    db = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for m in range(m_start, tl.minimum(m_start + m_chunk, M), BLOCK_M):
        rows = m + tl.arange(0, BLOCK_M)
        mask_m = (rows < M)[:, None]
        if EVEN_N:
            dy = tl.load(dy_ptrs, mask=mask_m, other=0.0)  # [BLOCK_M, BLOCK_N]
        else:
            dy = tl.load(dy_ptrs, mask=mask_m & mask_n[None, :], other=0.0)
        s = tl.load(s_ptrs, mask=mask_m & mask_r, other=0.0).to(dy.dtype)  # [BLOCK_M, BLOCK_R]
        if LOAD_TWICE:
            if EVEN_N:
                dyt = tl.load(dyt_ptrs, mask=(rows < M)[None, :], other=0.0)  # [BLOCK_N, BLOCK_M]
            else:
                dyt = tl.load(dyt_ptrs, mask=(rows < M)[None, :] & mask_n[:, None], other=0.0)
            dyt_ptrs += step_dy
        else:
            dyt = tl.trans(dy)
        db = tl.dot(dyt, s, db, input_precision=PRECISION)
        ds = tl.dot(dy, b, input_precision=PRECISION)  # [BLOCK_M, BLOCK_R]
        tl.store(ds_plane + rows[:, None] * R, ds, mask=mask_m & mask_r)
        dy_ptrs += step_dy
        s_ptrs += step_s
    tl.store(db_plane + offs_n[:, None] * R, db, mask=mask_n[:, None] & mask_r)


def dy_pass_calls(
    dy: torch.Tensor,
    b: torch.Tensor,
    s: torch.Tensor,
    ds_out: torch.Tensor,
    db_out: torch.Tensor,
    *,
    scaling: float,
    arch: int,
    precision: str = "ieee",
    tile: Tile | None = None,
    shares: int | None = None,
    beside: bool = False,
) -> list[Call]:
    """Launches of `ds_out = scaling * dy b` and `db_out = dy^T s`: the pass and one reduction. Any strides.

    Args:
        dy: [M, N] fp32, fp16 or bf16.
        b: [N, R] of dy's dtype or fp32 (rounded to dy's dtype in registers).
        s: [M, R], carries the scaling.
        ds_out: [M, R] any float dtype; written.
        db_out: [N, R] any float dtype; written.
        scaling: applied to dS in fp32 before rounding.
        arch, precision: as in `lora_shrink.shrink_calls`.
        tile, shares: override the table; `shares` is the number of parts that the rows are cut into.
        beside: for a GEMM behind it that waits late (overlap.py).

    Raises:
        ValueError: shapes that do not agree.
    """
    (M, N), R = dy.shape, b.shape[1]
    if b.shape != (N, R) or db_out.shape != (N, R):
        raise ValueError(f"b, db_out: expected [{N}, {R}], got {tuple(b.shape)} and {tuple(db_out.shape)}")
    if s.shape != (M, R) or ds_out.shape != (M, R):
        raise ValueError(f"s, ds_out: expected [{M}, {R}], got {tuple(s.shape)} and {tuple(ds_out.shape)}")
    if N * R == 0:
        return []
    if tile is None:
        kind = {"aligned": vectorizes(dy), "scattered": by_elements(b, s)}
        tile = dy_pass_tile(arch=arch, dtype=dy.dtype, M=M, R=R, **kind)
    blocks_n, blocks_r, steps = cdiv(N, tile.block_c), cdiv(R, tile.block_r), max(1, cdiv(M, tile.block_m))
    if shares is None:
        shares = best_splits(
            blocks=blocks_n * blocks_r, steps=steps, arch=arch, operand_bytes=nbytes(dy), plane_bytes=4 * N * R
        )
    m_chunk = cdiv(steps, shares) * tile.block_m
    shares = max(1, cdiv(M, m_chunk))
    ds_planes = scratch(blocks_n, M, R, dtype=torch.float32, device=dy.device)
    db_planes = scratch(shares, N, R, dtype=torch.float32, device=dy.device)
    call = Call(
        name="dY pass",
        kernel=_lora_dy_pass_kernel,
        grid=(blocks_n * blocks_r, shares, 1),
        args={
            "dy_ptr": dy,
            "b_ptr": b,
            "s_ptr": s,
            "ds_ptr": ds_planes,
            "db_ptr": db_planes,
            "M": M,
            "N": N,
            "R": R,
            **strides(dy, "dym", "dyn"),
            **strides(b, "bn", "br"),
            **strides(s, "sm", "sr"),
            "m_chunk": m_chunk,
        },
        constants={
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_c,
            "BLOCK_R": tile.block_r,
            "EVEN_N": N % tile.block_c == 0,
            "LOAD_TWICE": arch in (80, 86, 89, 120),
            "PRECISION": precision,
            "OVERLAP": overlaps(arch),
            "WAIT_FIRST": beside,
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        options=compile_options(arch) | overlap_options(arch),
        bytes=nbytes(dy, b, s, ds_planes, db_planes),
        flops=4 * M * N * R,
    )
    sums = [PlaneSum(ds_planes, ds_out, scaling), PlaneSum(db_planes, db_out)]
    return [call, *reduce_calls(sums, name="dY pass: sums over columns and rows", arch=arch)]
