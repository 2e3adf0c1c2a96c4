"""The length of each row of V = W + scaling * B A, in one pass over W: what DoRA divides its magnitudes by.

    norm[n] = sqrt(sum over k of (w[n, k] + scaling * sum over r of b[n, r] a[r, k])^2)
    c = magnitude / norm,  inverse = 1 / norm         both 0 where the norm is, for such a row points nowhere

V of [N, K] would be written, read, squared, and written again by torch's operations; here a tile of it lives in
registers between its product and its square. So the kernel lives from the bandwidth with which it reads W: 34 MB for
4096 x 4096, under a tenth of a product with 4096 tokens. A program owns BLOCK_N rows and its share of K, keeps a sum of
squares for each of its elements and adds them up at the end. Where rows give too few programs K is split: fp32 planes
[splits, N], added in order by a second launch, so two runs give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import Call, cdiv, compile_options, nbytes, scratch, strides
from .reduction_tables import Tile, best_splits, dora_norm_tile, vectorizes


@triton.jit
def _store_factors(norm, magnitude_ptr, norm_ptr, c_ptr, inverse_ptr, offs_n, mask_n, stride_magnitude):
    """Store the norms of rows offs_n, or what is made of them."""
    if norm_ptr is not None:
        tl.store(norm_ptr + offs_n, norm, mask=mask_n)
    if c_ptr is not None:
        nowhere = norm == 0.0
        inverse = tl.where(nowhere, 0.0, 1.0 / tl.where(nowhere, 1.0, norm))
        magnitude = tl.load(magnitude_ptr + offs_n * stride_magnitude, mask=mask_n, other=0.0).to(tl.float32)
        tl.store(c_ptr + offs_n, magnitude * inverse, mask=mask_n)
        tl.store(inverse_ptr + offs_n, inverse, mask=mask_n)


@triton.jit
def _b_tile(b_ptrs, offs_r, R, stride_br, DTYPE: tl.constexpr):
    """b [BLOCK_N, BLOCK_R] of the ranks offs_r."""
    return tl.load(b_ptrs + offs_r[None, :] * stride_br, mask=(offs_r < R)[None, :], other=0.0).to(DTYPE)


@triton.jit
def _a_tile(a_ptrs, offs_r, mask_k, R, stride_ar, DTYPE: tl.constexpr):
    """a [BLOCK_R, BLOCK_K] of the ranks offs_r; mask_k is None where all of the columns are there."""
    mask = (offs_r < R)[:, None] if mask_k is None else (offs_r < R)[:, None] & mask_k
    return tl.load(a_ptrs + offs_r[:, None] * stride_ar, mask=mask, other=0.0).to(DTYPE)


@triton.jit
def _add_product(delta, b, a, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr):
    """delta + b a, or its transpose."""
    if TRANSPOSED:
        return tl.dot(tl.trans(a), tl.trans(b), delta, input_precision=PRECISION)
    else:
        return tl.dot(b, a, delta, input_precision=PRECISION)


@triton.jit
def _dora_norm_kernel(
    w_ptr, a_ptr, b_ptr, magnitude_ptr, norm_ptr, c_ptr, inverse_ptr, planes_ptr,  # [N, K] [R, K] [N, R] [N] -> [N] ...
    N, K, R, stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br, stride_magnitude, k_chunk, scaling,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, ONE_STEP: tl.constexpr,
    WEIGHT_IS_KN: tl.constexpr, EVEN_K: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = w_ptr.dtype.element_ty
    split = tl.program_id(1).to(tl.int64)
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    offs_r = tl.arange(0, BLOCK_R).to(tl.int64)
    # Rows past the last were wrapped, not masked: their norms are never stored, and loads stay unpredicated.
    rows = offs_n % N
    k_start = split * k_chunk
    # A weight that lies as [K, N] is walked as that: its tile, and V's, is then the transpose.
    if WEIGHT_IS_KN:
        w_ptrs = w_ptr + rows[None, :] * stride_wn + (k_start + offs_k)[:, None] * stride_wk
    else:
        w_ptrs = w_ptr + rows[:, None] * stride_wn + (k_start + offs_k)[None, :] * stride_wk
    a_ptrs = a_ptr + (k_start + offs_k)[None, :] * stride_ak
    b_ptrs = b_ptr + rows[:, None] * stride_bn
    step_w = tl.cast(stride_wk, tl.int64) * BLOCK_K
    step_a = tl.cast(stride_ak, tl.int64) * BLOCK_K

    if ONE_STEP:
        b = _b_tile(b_ptrs, offs_r, R, stride_br, DTYPE)
    squares = tl.zeros((BLOCK_K, BLOCK_N) if WEIGHT_IS_KN else (BLOCK_N, BLOCK_K), tl.float32)
    for k in tl.range(k_start, tl.minimum(k_start + k_chunk, K), BLOCK_K, num_stages=STAGES):
        if EVEN_K:
            mask_k = None
            w = tl.load(w_ptrs)  # [BLOCK_N, BLOCK_K], or its transpose
        else:
            mask_k = (k + offs_k < K)[None, :]
            w = tl.load(w_ptrs, mask=tl.trans(mask_k) if WEIGHT_IS_KN else mask_k, other=0.0)
        delta = tl.zeros(w.shape, tl.float32)
        if ONE_STEP:
            a = _a_tile(a_ptrs, offs_r, mask_k, R, stride_ar, DTYPE)
            delta = _add_product(delta, b, a, WEIGHT_IS_KN, PRECISION)
        else:  # which keeps the loop over K from being pipelined
            for r in range(0, R, BLOCK_R):
                b = _b_tile(b_ptrs, r + offs_r, R, stride_br, DTYPE)
                a = _a_tile(a_ptrs, r + offs_r, mask_k, R, stride_ar, DTYPE)
                delta = _add_product(delta, b, a, WEIGHT_IS_KN, PRECISION)
        v = w.to(tl.float32) + scaling * delta  # the only part of V that there ever is
        squares += v * v
        w_ptrs += step_w
        a_ptrs += step_a
    total = tl.sum(squares, 0 if WEIGHT_IS_KN else 1)
    if planes_ptr is not None:
        tl.store(planes_ptr + split * N + offs_n, total, mask=offs_n < N)
    else:
        _store_factors(
            tl.sqrt(total), magnitude_ptr, norm_ptr, c_ptr, inverse_ptr, offs_n, offs_n < N, stride_magnitude
        )


@triton.jit(do_not_specialize=["P"])
def _dora_factors_kernel(
    planes_ptr, magnitude_ptr, norm_ptr, c_ptr, inverse_ptr,  # [P, N] [N] -> [N] ...
    P, N, stride_pn, stride_magnitude,
    BLOCK_N: tl.constexpr, UNROLL: tl.constexpr, SQUARED: tl.constexpr,
):  # fmt: skip
    """The sum of planes, in their order, and its root if they are SQUARED."""
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for p in range(0, P, UNROLL):
        for u in tl.static_range(UNROLL):  # independent loads, added in order
            rows = tl.where(p + u < P, N, 0)  # no rows past the last plane
            part_ptrs = planes_ptr + tl.cast(p + u, tl.int64) * N + offs_n * stride_pn
            total += tl.load(part_ptrs, mask=offs_n < rows, other=0.0).to(tl.float32)
    norm = tl.sqrt(total) if SQUARED else total
    _store_factors(norm, magnitude_ptr, norm_ptr, c_ptr, inverse_ptr, offs_n, offs_n < N, stride_magnitude)


def _check_outputs(N: int, magnitude: torch.Tensor | None, outputs: dict[str, torch.Tensor | None]) -> None:
    if len({t is None for t in (magnitude, outputs["c"], outputs["inverse"])}) > 1:
        raise ValueError("magnitude, c, inverse: expected all or none of them")
    for name, t in (("magnitude", magnitude), *outputs.items()):
        if t is not None and t.shape != (N,):
            raise ValueError(f"{name}: expected shape [{N}], got {list(t.shape)}")
        if t is not None and name != "magnitude" and (t.dtype != torch.float32 or not t.is_contiguous()):
            raise ValueError(f"{name}: expected contiguous float32, got {t.dtype} strides {t.stride()}")


def norm_calls(
    weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    scaling: float,
    norm: torch.Tensor | None = None,
    magnitude: torch.Tensor | None = None,
    c: torch.Tensor | None = None,
    inverse: torch.Tensor | None = None,
    arch: int,
    precision: str = "ieee",
    tile: Tile | None = None,
    splits: int | None = None,
) -> list[Call]:
    """Launches that write the row lengths of `weight + scaling * b a`: one, or two where K is split.

    Args:
        weight: [N, K] fp32, fp16 or bf16; any strides.
        a, b: [R, K] and [N, R] of any float dtype (rounded to weight's in registers); any strides.
        scaling: applied in fp32 to the fp32 sum of b a.
        norm: [N] fp32, written. c, inverse: likewise, `magnitude / norm` and `1 / norm`; all three or those asked for.
        magnitude: [N] of any float dtype and stride, beside c and inverse.
        arch: see `gemm_tables`. precision: `input_precision` of fp32 dots. tile, splits: override the table.

    Raises:
        ValueError: shapes that do not agree, or an output that cannot be written.
    """
    (N, K), R = weight.shape, a.shape[0]
    if a.shape != (R, K) or b.shape != (N, R):
        raise ValueError(f"a, b: expected [R, {K}] and [{N}, R], got {list(a.shape)} and {list(b.shape)}")
    _check_outputs(N, magnitude, {"norm": norm, "c": c, "inverse": inverse})
    if tile is None:
        tile = dora_norm_tile(arch=arch, dtype=weight.dtype, R=R, aligned=vectorizes(weight) or vectorizes(weight.t()))
    blocks, steps = cdiv(N, tile.block_m), cdiv(K, tile.block_c)
    if splits is None:
        splits = best_splits(blocks=blocks, steps=steps, arch=arch, operand_bytes=nbytes(weight), plane_bytes=4 * N)
    k_chunk = cdiv(steps, splits) * tile.block_c
    splits = cdiv(K, k_chunk)
    planes = scratch(splits, N, dtype=torch.float32, device=weight.device) if splits > 1 else None
    outputs = {"magnitude_ptr": magnitude, "norm_ptr": norm, "c_ptr": c, "inverse_ptr": inverse}
    call = Call(
        name="row norms",
        kernel=_dora_norm_kernel,
        grid=(blocks, splits, 1),
        args={
            "w_ptr": weight,
            "a_ptr": a,
            "b_ptr": b,
            **(outputs if planes is None else dict.fromkeys(outputs)),
            "planes_ptr": planes,
            "N": N,
            "K": K,
            "R": R,
            **strides(weight, "wn", "wk"),
            **strides(a, "ar", "ak"),
            **strides(b, "bn", "br"),
            **strides(magnitude, "magnitude"),
            "k_chunk": k_chunk,
            "scaling": float(scaling),
        },
        constants={
            "BLOCK_N": tile.block_m,
            "BLOCK_K": tile.block_c,
            "BLOCK_R": tile.block_r,
            "ONE_STEP": tile.block_r >= R,
            "WEIGHT_IS_KN": weight.stride(0) == 1 and weight.stride(1) != 1,
            "EVEN_K": K % tile.block_c == 0,
            "STAGES": tile.num_stages,
            "PRECISION": precision,
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        options=compile_options(arch),
        bytes=nbytes(weight, a, b, planes),
        flops=2 * N * K * (R + 1),
    )
    if planes is None:
        return [call]
    return [call, _factors_call(planes, outputs, squared=True)]


def factor_calls(norm: torch.Tensor, magnitude: torch.Tensor, c: torch.Tensor, inverse: torch.Tensor) -> list[Call]:
    """The launch of `c = magnitude / norm` and `inverse = 1 / norm`, [N] each; norm and magnitude of any float dtype
    and stride, the others written, contiguous fp32.

    Raises:
        ValueError: shapes that do not agree.
    """
    _check_outputs(norm.shape[0], magnitude, {"c": c, "inverse": inverse})
    outputs: dict[str, torch.Tensor | None] = {"magnitude_ptr": magnitude, "c_ptr": c, "inverse_ptr": inverse}
    return [_factors_call(norm[None], {**outputs, "norm_ptr": None}, squared=False)]


def _factors_call(planes: torch.Tensor, outputs: dict[str, torch.Tensor | None], *, squared: bool) -> Call:
    P, N = planes.shape
    return Call(
        name="row norms: sum over K" if squared else "c = magnitude / norm",
        kernel=_dora_factors_kernel,
        grid=(cdiv(N, 128), 1, 1),
        args={
            "planes_ptr": planes,
            **outputs,
            "P": P,
            "N": N,
            "stride_pn": planes.stride(1),
            **strides(outputs["magnitude_ptr"], "magnitude"),
        },
        constants={"BLOCK_N": 128, "UNROLL": 8 if squared else 1, "SQUARED": squared},
        num_warps=4,
        num_stages=1,
        bytes=nbytes(planes, *outputs.values()),
        flops=planes.numel(),
    )
