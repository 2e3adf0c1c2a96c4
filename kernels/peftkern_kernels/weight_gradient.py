"""Gradients of both adapter matrices in one launch and, where rows are split, one reduction.

    dA[R, K] = dS^T (keep * x / (1 - p))        dS [M, R], x [M, K]
    dB[N, R] = dY^T S                           dY [M, N], S [M, R]

Both are a tall matrix transposed times a thin one, bound by reading x and dY once. A program owns BLOCK_C columns of x
or of dY and walks down its share of the rows; the programs beyond K's blocks take N's blocks. With more than one share,
fp32 planes [splits, columns, R] are added in order by one launch for both (`reduce.py`), which stores dA transposed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .dropout import Dropout, drop_tile
from .gemm_tables import MULTIPROCESSORS
from .launch import Call, cdiv, compile_options, nbytes, scratch, strides
from .overlap import begin, overlap_options, overlaps
from .reduce import PlaneSum, reduce_calls
from .reduction_tables import Tile, best_splits, by_elements, vectorizes, weight_gradient_tile


@triton.jit
def _columns_times_thin(
    wide_ptr, thin_ptr, out_ptr, seed_ptr, block_c, block_r, split,
    M, C, R, stride_wm, stride_wc, stride_tm, stride_tr, stride_os, stride_oc, stride_or, m_chunk, scale, threshold,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, EVEN_C: tl.constexpr, DROPOUT: tl.constexpr,
    TURNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[split, c, r] = scale * sum over the split's rows m of keep[m, c] * wide[m, c] * thin[m, r]."""
    c_start = block_c.to(tl.int64) * BLOCK_C
    offs_c = c_start + tl.arange(0, BLOCK_C)
    offs_r = block_r.to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_c, mask_r = offs_c < C, offs_r < R
    m_start = split.to(tl.int64) * m_chunk
    offs_m = m_start + tl.arange(0, BLOCK_M)
    # Loaded transposed: the product's first operand, for which tensor cores read shared memory either way round.
    wide_ptrs = wide_ptr + offs_m[None, :] * stride_wm + offs_c[:, None] * stride_wc
    thin_ptrs = thin_ptr + offs_m[:, None] * stride_tm + offs_r[None, :] * stride_tr
    step_wide = tl.cast(stride_wm, tl.int64) * BLOCK_M
    step_thin = tl.cast(stride_tm, tl.int64) * BLOCK_M
    if DROPOUT:
        seed = tl.load(seed_ptr)

    acc = tl.zeros((BLOCK_R, BLOCK_C) if TURNED else (BLOCK_C, BLOCK_R), tl.float32)
    for m in range(m_start, tl.minimum(m_start + m_chunk, M), BLOCK_M):
        rows = m + tl.arange(0, BLOCK_M)
        mask_m = rows < M
        if EVEN_C:
            wide = tl.load(wide_ptrs, mask=mask_m[None, :], other=0.0)  # [BLOCK_C, BLOCK_M]
        else:
            wide = tl.load(wide_ptrs, mask=mask_m[None, :] & mask_c[:, None], other=0.0)
        thin = tl.load(thin_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0)  # [BLOCK_M, BLOCK_R]
        if DROPOUT:
            wide = drop_tile(tl.trans(wide), seed, rows, c_start, threshold, DROPOUT, BLOCK_M, BLOCK_C).T
        if TURNED:
            acc = tl.dot(thin.to(wide.dtype).T, wide.T, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(wide, thin.to(wide.dtype), acc, input_precision=PRECISION)
        wide_ptrs += step_wide
        thin_ptrs += step_thin
    if TURNED:
        acc = acc.T
    out_ptrs = out_ptr + split.to(tl.int64) * stride_os + offs_c[:, None] * stride_oc + offs_r[None, :] * stride_or
    tl.store(out_ptrs, (acc * scale).to(out_ptr.dtype.element_ty), mask=mask_c[:, None] & mask_r[None, :])


@triton.jit(do_not_specialize=["M", "blocks_k", "m_chunk", "threshold"])
def _weight_gradient_kernel(
    ds_ptr, x_ptr, da_ptr, s_ptr, dy_ptr, db_ptr, seed_ptr,
    M, K, N, R, stride_dsm, stride_dsr, stride_xm, stride_xk, stride_das, stride_dak, stride_dar,
    stride_sm, stride_sr, stride_dym, stride_dyn, stride_dbs, stride_dbn, stride_dbr,
    blocks_k, m_chunk, scale, threshold,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr,
    HAS_DA: tl.constexpr, HAS_DB: tl.constexpr, DROPOUT: tl.constexpr, TURNED: tl.constexpr, PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    begin(OVERLAP)
    blocks_r = tl.cdiv(R, BLOCK_R)
    block_c = tl.program_id(0) // blocks_r
    block_r = tl.program_id(0) % blocks_r  # neighbours share their columns, so only the first reads device memory
    split = tl.program_id(1)
    if HAS_DA:  # noqa: SIM102 - a test of its own, static: an absent half's null pointers must not be compiled
        if block_c < blocks_k:
            _columns_times_thin(
                x_ptr, ds_ptr, da_ptr, seed_ptr, block_c, block_r, split,
                M, K, R, stride_xm, stride_xk, stride_dsm, stride_dsr, stride_das, stride_dak, stride_dar,
                m_chunk, scale, threshold, BLOCK_M, BLOCK_C, BLOCK_R, EVEN_K, DROPOUT, TURNED, PRECISION,
            )  # fmt: skip
    if HAS_DB:  # noqa: SIM102
        if block_c >= blocks_k:
            _columns_times_thin(
                dy_ptr, s_ptr, db_ptr, None, block_c - blocks_k, block_r, split,
                M, N, R, stride_dym, stride_dyn, stride_sm, stride_sr, stride_dbs, stride_dbn, stride_dbr,
                m_chunk, 1.0, 0, BLOCK_M, BLOCK_C, BLOCK_R, EVEN_N, 0, False, PRECISION,
            )  # fmt: skip


def _check(
    ds: torch.Tensor | None,
    x: torch.Tensor | None,
    s: torch.Tensor | None,
    dy: torch.Tensor | None,
    da_out: torch.Tensor | None,
    db_out: torch.Tensor | None,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The (wide, thin) pairs of the halves that are asked for; ValueError where they do not fit together."""
    for text, half in (("ds, x, da_out", (ds, x, da_out)), ("s, dy, db_out", (s, dy, db_out))):
        if len({t is None for t in half}) != 1:
            raise ValueError(f"{text}: expected all three or none, got {[t is not None for t in half]}")
    pairs = [(wide, thin) for wide, thin in ((x, ds), (dy, s)) if wide is not None and thin is not None]
    for wide, thin in pairs:
        M, R = pairs[0][1].shape
        if wide.shape[0] != M or thin.shape != (M, R):
            raise ValueError(f"expected {M} rows and rank {R}, got {tuple(wide.shape)} and {tuple(thin.shape)}")
    if x is not None and da_out is not None and da_out.shape != (pairs[0][1].shape[1], x.shape[1]):
        raise ValueError(f"da_out: expected [{pairs[0][1].shape[1]}, {x.shape[1]}], got {tuple(da_out.shape)}")
    if dy is not None and db_out is not None and db_out.shape != (dy.shape[1], pairs[0][1].shape[1]):
        raise ValueError(f"db_out: expected [{dy.shape[1]}, {pairs[0][1].shape[1]}], got {tuple(db_out.shape)}")
    return pairs


def weight_gradient_calls(
    ds: torch.Tensor | None,
    x: torch.Tensor | None,
    s: torch.Tensor | None,
    dy: torch.Tensor | None,
    da_out: torch.Tensor | None,
    db_out: torch.Tensor | None,
    *,
    dropout: Dropout | None = None,
    arch: int,
    precision: str = "ieee",
    tile: Tile | None = None,
    splits: int | None = None,
) -> list[Call]:
    """Launches of `da_out = ds^T (keep * x / (1 - p))` and `db_out = dy^T s`: one, or two where rows are split.

    Either half may be absent (its three tensors None). Any strides.

    Args:
        ds: [M, R] float; rounded to x's dtype in registers if wider.
        x: [M, K] fp32, fp16 or bf16.
        s: [M, R], carries the scaling.
        dy: [M, N] fp32, fp16 or bf16.
        da_out: [R, K] any float dtype; written.
        db_out: [N, R] any float dtype; written.
        dropout: the mask that the forward drew over x; None for no dropout.
        arch, precision, tile, splits: as in `lora_shrink.shrink_calls`.

    Raises:
        ValueError: half of a half given, or shapes that do not agree.
    """
    pairs = _check(ds, x, s, dy, da_out, db_out)
    if not pairs:
        return []
    has_da, has_db = da_out is not None, db_out is not None
    M, R = pairs[0][1].shape
    K, N = 0 if x is None else x.shape[1], 0 if dy is None else dy.shape[1]
    device, dtype = pairs[0][0].device, pairs[0][0].dtype
    if tile is None:
        kind = {"aligned": all(vectorizes(t) for t, _ in pairs), "dropout": dropout is not None and has_da}
        kind["scattered"] = by_elements(*(t for _, t in pairs))
        tile = weight_gradient_tile(arch=arch, dtype=dtype, M=M, R=R, **kind)
    blocks_k, blocks_n, blocks_r = cdiv(K, tile.block_c), cdiv(N, tile.block_c), cdiv(R, tile.block_r)
    if (blocks_k + blocks_n) * blocks_r == 0:
        return []
    steps = max(1, cdiv(M, tile.block_m))
    if splits is None:
        splits = best_splits(
            blocks=(blocks_k + blocks_n) * blocks_r,
            steps=steps,
            arch=arch,
            operand_bytes=sum(nbytes(t) for t, _ in pairs),
            plane_bytes=4 * (K + N) * R,
        )
        if arch == 90 and dropout is not None and has_da:
            # Bound by drawing the mask, in one of two halves if there are two: more programs on each multiprocessor.
            programs = (4 if has_db else 2) * MULTIPROCESSORS[arch]
            splits = min(steps, max(splits, programs // ((blocks_k + blocks_n) * blocks_r)))
    m_chunk = cdiv(steps, splits) * tile.block_m
    splits = max(1, cdiv(M, m_chunk))

    scale = 1.0 if dropout is None else dropout.keep_scale
    da = None if da_out is None else da_out.t()  # [K, R], as the planes are
    db = db_out
    sums = []
    if splits > 1:
        planes = scratch(splits * (K + N) * R, dtype=torch.float32, device=device)
        if da is not None:
            sums.append(PlaneSum(planes[: splits * K * R].view(splits, K, R), da, scale))
        if db is not None:
            sums.append(PlaneSum(planes[splits * K * R :].view(splits, N, R), db))
        scale = 1.0
        da = sums[0].planes if has_da else None
        db = sums[-1].planes if has_db else None
    call = _gradient_call(ds, x, da, s, dy, db, scale, dropout, tile, m_chunk, splits, precision, arch)
    call.bytes = nbytes(ds, x, s, dy) + (4 * splits * (K + N) * R if splits > 1 else nbytes(da_out, db_out))
    return [call, *reduce_calls(sums, name="weight gradient: sum over rows", arch=arch)]


def _gradient_call(
    ds: torch.Tensor | None,
    x: torch.Tensor | None,
    da: torch.Tensor | None,
    s: torch.Tensor | None,
    dy: torch.Tensor | None,
    db: torch.Tensor | None,
    scale: float,
    dropout: Dropout | None,
    tile: Tile,
    m_chunk: int,
    splits: int,
    precision: str,
    arch: int,
) -> Call:
    """The launch over both halves; `da` [K, R] and `db` [N, R] are the outputs or, with splits, planes of that."""
    has_da, has_db = da is not None, db is not None
    K, N = 0 if x is None else x.shape[1], 0 if dy is None else dy.shape[1]
    thin = s if ds is None else ds
    # What is masked in registers goes back to shared memory as a product's second operand only. As the first it stays
    # in registers, and Hopper's matrix instructions wait for one another. The first takes 64 rows or more. Where all
    # operands are in registers there is nothing to gain, and the thin one's loads would no longer be asynchronous.
    turned = (arch == 0 or 90 <= arch < 120) and tile.block_r >= 64
    M, R = (0, 0) if thin is None else thin.shape
    blocks_k, blocks_n, blocks_r = cdiv(K, tile.block_c), cdiv(N, tile.block_c), cdiv(R, tile.block_r)
    return Call(
        name="weight gradient",
        kernel=_weight_gradient_kernel,
        grid=((blocks_k + blocks_n) * blocks_r, splits, 1),
        args={
            "ds_ptr": ds,
            "x_ptr": x,
            "da_ptr": da,
            "s_ptr": s,
            "dy_ptr": dy,
            "db_ptr": db,
            "seed_ptr": None if dropout is None or not has_da else dropout.seed,
            "M": M,
            "K": K,
            "N": N,
            "R": R,
            **strides(ds, "dsm", "dsr"),
            **strides(x, "xm", "xk"),
            **strides(da if splits == 1 or da is None else da[0], "dak", "dar"),
            **strides(s, "sm", "sr"),
            **strides(dy, "dym", "dyn"),
            **strides(db if splits == 1 or db is None else db[0], "dbn", "dbr"),
            "stride_das": K * R,
            "stride_dbs": N * R,
            "blocks_k": blocks_k,
            "m_chunk": m_chunk,
            "scale": float(scale),
            "threshold": 0 if dropout is None else dropout.threshold,
        },
        constants={
            "BLOCK_M": tile.block_m,
            "BLOCK_C": tile.block_c,
            "BLOCK_R": tile.block_r,
            "EVEN_K": K % tile.block_c == 0,
            "EVEN_N": N % tile.block_c == 0,
            "HAS_DA": has_da,
            "HAS_DB": has_db,
            "DROPOUT": dropout.kind if dropout is not None and has_da else 0,
            "TURNED": turned and dropout is not None and has_da,
            "PRECISION": precision,
            "OVERLAP": overlaps(arch),
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        options=compile_options(arch) | overlap_options(arch),
        flops=2 * M * R * (K + N),
    )
