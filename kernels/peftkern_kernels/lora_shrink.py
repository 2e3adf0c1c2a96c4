"""The shrink: from K features (or N outputs) down to the rank, scaled.

    out[M, R] = scaling * (keep * x / (1 - p)) a^T            x [M, K], a [R, K]

Forward this is S, from x and A; backward it is dS, from dY and B's transpose. R is small, so the kernel lives from the
bandwidth with which it reads x: once, never widened or copied, its dropout mask drawn in the tile. The scaling and the
mask's 1 / (1 - p) are applied to the fp32 sum, before the one rounding. Where M gives too few programs to fill the
device, K is split: fp32 planes, added in order by a second launch (`reduce.py`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .dropout import Dropout, drop_tile
from .launch import Call, cdiv, compile_options, nbytes, scratch, strides
from .overlap import begin, overlap_options, overlaps
from .reduce import PlaneSum, reduce_calls
from .reduction_tables import Tile, best_splits, by_elements, shrink_beside_tile, shrink_tile, vectorizes


@triton.jit(do_not_specialize=["M", "threshold"])
def _lora_shrink_kernel(
    x_ptr, a_ptr, out_ptr, seed_ptr,  # [M, K] [R, K] -> [splits, M, R]
    M, K, R, stride_xm, stride_xk, stride_ar, stride_ak, stride_os, stride_om, stride_or,
    k_chunk, scale, threshold,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    EVEN_K: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
    WAIT_FIRST: tl.constexpr,
):  # fmt: skip
    begin(OVERLAP, WAIT_FIRST=WAIT_FIRST)
    # Blocks of R are neighbours in launch order, so that only the first of them reads x from device memory.
    blocks_r = tl.cdiv(R, BLOCK_R)
    block_m = tl.program_id(0) // blocks_r
    block_r = tl.program_id(0) % blocks_r
    split = tl.program_id(1).to(tl.int64)
    offs_m = block_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = block_r.to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    mask_m, mask_r = (offs_m < M)[:, None], (offs_r < R)[None, :]
    k_start = split * k_chunk
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + (k_start + offs_k)[None, :] * stride_xk
    a_ptrs = a_ptr + offs_r[None, :] * stride_ar + (k_start + offs_k)[:, None] * stride_ak
    step_x = tl.cast(stride_xk, tl.int64) * BLOCK_K
    step_a = tl.cast(stride_ak, tl.int64) * BLOCK_K
    if DROPOUT:
        seed = tl.load(seed_ptr)

    # What is masked in registers goes back to shared memory as a product's second operand only. As the first it stays
    # in registers, and Hopper's matrix instructions wait for one another. The first takes 64 rows or more.
    TURNED: tl.constexpr = DROPOUT and BLOCK_R >= 64
    acc = tl.zeros((BLOCK_R, BLOCK_M) if TURNED else (BLOCK_M, BLOCK_R), tl.float32)
    for k in range(k_start, tl.minimum(k_start + k_chunk, K), BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs, mask=mask_m, other=0.0)  # [BLOCK_M, BLOCK_K]
            a = tl.load(a_ptrs, mask=mask_r, other=0.0)  # [BLOCK_K, BLOCK_R]
        else:
            mask_k = k + offs_k < K
            x = tl.load(x_ptrs, mask=mask_m & mask_k[None, :], other=0.0)
            a = tl.load(a_ptrs, mask=mask_r & mask_k[:, None], other=0.0)
        if DROPOUT:
            x = drop_tile(x, seed, offs_m, tl.cast(k, tl.int64), threshold, DROPOUT, BLOCK_M, BLOCK_K)
        if TURNED:
            acc = tl.dot(a.to(x.dtype).T, x.T, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(x, a.to(x.dtype), acc, input_precision=PRECISION)
        x_ptrs += step_x
        a_ptrs += step_a
    if TURNED:
        acc = acc.T
    out_ptrs = out_ptr + split * stride_os + offs_m[:, None] * stride_om + offs_r[None, :] * stride_or
    tl.store(out_ptrs, (acc * scale).to(out_ptr.dtype.element_ty), mask=mask_m & mask_r)


def shrink_calls(
    x: torch.Tensor,
    a: torch.Tensor,
    out: torch.Tensor,
    *,
    scaling: float,
    dropout: Dropout | None = None,
    arch: int,
    precision: str = "ieee",
    tile: Tile | None = None,
    splits: int | None = None,
    beside: bool = False,
) -> list[Call]:
    """Launches of `out = scaling * (keep * x / (1 - p)) a^T`: one, or two where K is split.

    Args:
        x: [M, K] fp32, fp16 or bf16, any strides.
        a: [R, K] of x's dtype or fp32 (rounded to x's dtype in registers), any strides.
        out: [M, R] any float dtype, any strides; written.
        scaling: applied in fp32 before rounding.
        dropout: mask over x's rows and columns; None for no dropout.
        arch: architecture number (`reduction_tables.PROCESSORS`).
        precision: "ieee" or "tf32", of fp32 products.
        tile, splits: override the table (tuning and tests).
        beside: for a GEMM behind it that waits late (overlap.py), where `reduction_tables.shrink_beside_tile` has a
            tile: few programs, so that most multiprocessors are the GEMM's.

    Raises:
        ValueError: shapes that do not agree.
    """
    (M, K), R = x.shape, a.shape[0]
    if a.shape != (R, K) or out.shape != (M, R):
        raise ValueError(f"a, out: expected [R, {K}] and [{M}, R], got {tuple(a.shape)} and {tuple(out.shape)}")
    if out.numel() == 0:
        return []
    if tile is None and beside:
        tile, splits = shrink_beside_tile(R), 1
    elif tile is None:
        kind = {"aligned": vectorizes(x), "dropout": dropout is not None, "scattered": by_elements(a)}
        tile = shrink_tile(arch=arch, dtype=x.dtype, M=M, R=R, **kind)
    blocks_m, blocks_r, steps = cdiv(M, tile.block_m), cdiv(R, tile.block_r), cdiv(K, tile.block_c)
    if splits is None:
        splits = best_splits(
            blocks=blocks_m * blocks_r,
            steps=steps,
            arch=arch,
            operand_bytes=nbytes(x),
            plane_bytes=4 * M * R,
        )
    k_chunk = cdiv(steps, splits) * tile.block_c
    splits = cdiv(K, k_chunk)
    scale = scaling * (1.0 if dropout is None else dropout.keep_scale)
    target, stride_os = out, 0
    if splits > 1:
        target = scratch(splits, M, R, dtype=torch.float32, device=x.device)
        stride_os = M * R
    call = Call(
        name="shrink",
        kernel=_lora_shrink_kernel,
        grid=(blocks_m * blocks_r, splits, 1),
        args={
            "x_ptr": x,
            "a_ptr": a,
            "out_ptr": target,
            "seed_ptr": None if dropout is None else dropout.seed,
            "M": M,
            "K": K,
            "R": R,
            **strides(x, "xm", "xk"),
            **strides(a, "ar", "ak"),
            "stride_os": stride_os,
            "stride_om": target.stride(-2),
            "stride_or": target.stride(-1),
            "k_chunk": k_chunk,
            "scale": float(scale) if splits == 1 else 1.0,
            "threshold": 0 if dropout is None else dropout.threshold,
        },
        constants={
            "BLOCK_M": tile.block_m,
            "BLOCK_K": tile.block_c,
            "BLOCK_R": tile.block_r,
            "EVEN_K": K % tile.block_c == 0,
            "DROPOUT": 0 if dropout is None else dropout.kind,
            "PRECISION": precision,
            "OVERLAP": overlaps(arch),
            "WAIT_FIRST": beside,
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        options=compile_options(arch) | overlap_options(arch),
        bytes=nbytes(x, a, target),
        flops=2 * M * K * R,
    )
    if splits == 1:
        return [call]
    return [call, *reduce_calls([PlaneSum(target, out, scale)], name="shrink: sum over K", arch=arch)]
