"""LoRA on an embedding: gather forward, deterministic scatter backward.

    s[t] = scaling * A[:, ids[t]]        A [R, V] (PEFT's lora_embedding_A), ids [T]
    y[t] = W[ids[t]] + s[t] B^T          W [V, E], B [E, R]
    dB = dY^T s,   dA[:, v] = scaling * sum over tokens t with ids[t] = v of dY[t] B,   dA[:, padding_idx] = 0

Forward is one launch: a program gathers its tokens' columns of A once and walks along their rows of W. Backward sorts
the ids (stable), then each run of equal ids is summed in the tokens' order by the program that holds the run's first
token: no atomics, no host synchronisation, the same bits on every run. An id outside [0, V) gives a row of NaN and no
gradient; it reads and writes nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .launch import Call, TorchCall, cdiv, compile_options, light_options, nbytes, strides
from .lora_dy_pass import ONE_PASS_RANK, dy_pass_calls
from .lora_shrink import shrink_calls
from .reduction_tables import DEVICES, OTHER_DEVICE, embedding_tile, next_power_of_2
from .weight_gradient import weight_gradient_calls


@triton.jit
def _gather_s(a_ptr, ids, valid, r, R, stride_ar, stride_av, scaling, dtype: tl.constexpr, BLOCK_R: tl.constexpr):
    """scaling * A[r : r + BLOCK_R, ids]^T rounded to dtype: [tokens, BLOCK_R]; NaN where the id is not valid."""
    offs_r = r + tl.arange(0, BLOCK_R).to(tl.int64)
    a_ptrs = a_ptr + ids[:, None] * stride_av + offs_r[None, :] * stride_ar
    a = tl.load(a_ptrs, mask=valid[:, None] & (offs_r < R)[None, :], other=0.0).to(tl.float32)
    return (a * scaling).to(dtype)


@triton.jit(do_not_specialize=["T"])
def _lora_embedding_kernel(
    ids_ptr, w_ptr, a_ptr, b_ptr, y_ptr, s_ptr,  # [T] [V, E] [R, V] [E, R] -> [T, E] [T, R]
    T, V, E, R, stride_i, stride_wv, stride_we, stride_ar, stride_av, stride_be, stride_br, stride_yt, stride_ye,
    stride_st, stride_sr, e_chunk, scaling,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr, ONE_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    e_start = tl.program_id(1).to(tl.int64) * e_chunk
    mask_t = offs_t < T
    ids = tl.load(ids_ptr + offs_t * stride_i, mask=mask_t, other=-1).to(tl.int64)
    valid = (ids >= 0) & (ids < V)
    dtype: tl.constexpr = w_ptr.dtype.element_ty

    s = _gather_s(a_ptr, ids, valid, 0, R, stride_ar, stride_av, scaling, dtype, BLOCK_R)  # [BLOCK_T, BLOCK_R]
    if e_start == 0:
        for r in range(0, R, BLOCK_R):
            part = _gather_s(a_ptr, ids, valid, r, R, stride_ar, stride_av, scaling, dtype, BLOCK_R)
            offs_r = r + tl.arange(0, BLOCK_R)
            s_ptrs = s_ptr + offs_t[:, None] * stride_st + offs_r[None, :] * stride_sr
            tl.store(s_ptrs, part.to(s_ptr.dtype.element_ty), mask=mask_t[:, None] & (offs_r < R)[None, :])
    for e in range(e_start, tl.minimum(e_start + e_chunk, E), BLOCK_E):
        offs_e = e + tl.arange(0, BLOCK_E).to(tl.int64)
        mask_e = offs_e < E
        acc = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
        for r in range(0, R, BLOCK_R):
            offs_r = r + tl.arange(0, BLOCK_R).to(tl.int64)
            b_ptrs = b_ptr + offs_e[None, :] * stride_be + offs_r[:, None] * stride_br
            b = tl.load(b_ptrs, mask=mask_e[None, :] & (offs_r < R)[:, None], other=0.0).to(dtype)  # [BLOCK_R, BLOCK_E]
            if not ONE_R:
                s = _gather_s(a_ptr, ids, valid, r, R, stride_ar, stride_av, scaling, dtype, BLOCK_R)
            acc = tl.dot(s, b, acc, input_precision=PRECISION)
        w_ptrs = w_ptr + ids[:, None] * stride_wv + offs_e[None, :] * stride_we
        w = tl.load(w_ptrs, mask=valid[:, None] & mask_e[None, :], other=float("nan"))  # [BLOCK_T, BLOCK_E]
        y_ptrs = y_ptr + offs_t[:, None] * stride_yt + offs_e[None, :] * stride_ye
        tl.store(y_ptrs, (w.to(tl.float32) + acc).to(y_ptr.dtype.element_ty), mask=mask_t[:, None] & mask_e[None, :])


@triton.jit(do_not_specialize=["T", "padding_idx"])
def _scatter_runs_kernel(
    ids_ptr, order_ptr, ds_ptr, da_ptr,  # sorted ids [T], tokens in that order [T], fp32 [T, R] -> [R, V]
    T, V, R, stride_ar, stride_av, padding_idx,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_LONG: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK_T
    offs = start + tl.arange(0, BLOCK_T)
    offs_r = tl.program_id(1).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask, mask_r = offs < T, (offs_r < R)[None, :]
    ids = tl.load(ids_ptr + offs, mask=mask, other=-1).to(tl.int64)
    before = tl.load(ids_ptr + offs - 1, mask=mask & (offs > 0), other=-1).to(tl.int64)
    tokens = tl.load(order_ptr + offs, mask=mask, other=0)
    rows = tl.load(ds_ptr + tokens[:, None] * R + offs_r[None, :], mask=mask[:, None] & mask_r, other=0.0)
    same = ids[:, None] == ids[None, :]  # [BLOCK_T, BLOCK_T]
    # Sums of runs, as far as they lie in this block, [BLOCK_T, BLOCK_R]. By selection, not by a product with zeros: one
    # token's inf stays in its own column of dA.
    totals = tl.sum(tl.where(same[:, :, None], rows[None, :, :], 0.0), axis=1)

    # The block's last run may go on: whoever holds its first token follows it to its end.
    end = tl.minimum(start + BLOCK_T, T)
    last = tl.load(ids_ptr + end - 1).to(tl.int64)
    ahead = tl.load(ids_ptr + end, mask=end < T, other=-1).to(tl.int64)
    behind = tl.load(ids_ptr + start - 1, mask=start > 0, other=-1).to(tl.int64)
    more = (end < T) & (ahead == last) & (behind != last) & (last != padding_idx)  # end < T: an id may be -1
    # First how far, by single ids: Triton 3.6 cannot compile a `while` that carries a tile.
    stop = end
    while more:
        stop += BLOCK_LONG
        more = (stop < T) & (tl.load(ids_ptr + stop, mask=stop < T, other=-1).to(tl.int64) == last)
    rest = tl.zeros((BLOCK_R,), tl.float32)
    for position in range(end, stop, BLOCK_LONG):
        offs_long = position + tl.arange(0, BLOCK_LONG)
        inside = offs_long < T
        inside = inside & (tl.load(ids_ptr + offs_long, mask=inside, other=-1).to(tl.int64) == last)
        tokens_long = tl.load(order_ptr + offs_long, mask=inside, other=0)
        long_ptrs = ds_ptr + tokens_long[:, None] * R + offs_r[None, :]
        rest += tl.sum(tl.load(long_ptrs, mask=inside[:, None] & mask_r, other=0.0), axis=0)
    totals += tl.where((ids == last)[:, None], rest[None, :], 0.0)

    first = mask & (ids != before) & (ids >= 0) & (ids < V) & (ids != padding_idx)
    da_ptrs = da_ptr + ids[:, None] * stride_av + offs_r[None, :] * stride_ar
    tl.store(da_ptrs, totals.to(da_ptr.dtype.element_ty), mask=first[:, None] & mask_r)


def embedding_forward_calls(
    ids: torch.Tensor,
    weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    out: torch.Tensor,
    s_out: torch.Tensor,
    *,
    scaling: float,
    arch: int,
    precision: str = "ieee",
) -> list[Call]:
    """Launch of `out[t] = weight[ids[t]] + s_out[t] b^T`, `s_out[t] = scaling * a[:, ids[t]]`. Any strides.

    Args:
        ids: [T] int32 or int64 in [0, V); another id gives a row of NaN.
        weight: [V, E] fp32, fp16 or bf16.
        a: [R, V], b: [E, R] of weight's dtype or fp32.
        out: [T, E] any float dtype; written.
        s_out: [T, R] any float dtype; written. The product with b uses s rounded to weight's dtype.
        scaling: applied to s in fp32 before rounding.
        arch, precision: as in `lora_shrink.shrink_calls`.

    Raises:
        ValueError: shapes that do not agree.
    """
    (V, E), R, T = weight.shape, a.shape[0], ids.numel()
    if ids.dim() != 1 or a.shape != (R, V) or b.shape != (E, R):
        raise ValueError(
            f"ids, a, b: expected [T], [R, {V}], [{E}, R], got {tuple(ids.shape)}, {tuple(a.shape)}, {tuple(b.shape)}"
        )
    if out.shape != (T, E) or s_out.shape != (T, R):
        raise ValueError(f"out, s_out: expected [{T}, {E}], [{T}, {R}], got {tuple(out.shape)}, {tuple(s_out.shape)}")
    if T == 0:
        return []
    tile = embedding_tile(arch=arch, dtype=weight.dtype, T=T, R=R)
    blocks_t, blocks_e = cdiv(T, tile.block_m), cdiv(E, tile.block_c)
    # Enough programs for four on each multiprocessor; fewer, longer ones read A's scattered columns less often.
    wanted = cdiv(4 * DEVICES.get(arch, OTHER_DEVICE)[0], blocks_t)
    e_chunk = cdiv(blocks_e, min(blocks_e, wanted)) * tile.block_c
    return [
        Call(
            name="embedding gather + expand",
            kernel=_lora_embedding_kernel,
            grid=(blocks_t, cdiv(E, e_chunk), 1),
            args={
                "ids_ptr": ids,
                "w_ptr": weight,
                "a_ptr": a,
                "b_ptr": b,
                "y_ptr": out,
                "s_ptr": s_out,
                "T": T,
                "V": V,
                "E": E,
                "R": R,
                "stride_i": ids.stride(0),
                **strides(weight, "wv", "we"),
                **strides(a, "ar", "av"),
                **strides(b, "be", "br"),
                **strides(out, "yt", "ye"),
                **strides(s_out, "st", "sr"),
                "e_chunk": e_chunk,
                "scaling": float(scaling),
            },
            constants={
                "BLOCK_T": tile.block_m,
                "BLOCK_E": tile.block_c,
                "BLOCK_R": tile.block_r,
                "ONE_R": tile.block_r >= R,
                "PRECISION": precision,
            },
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            options=compile_options(arch),
            bytes=T * (E * weight.element_size() + R * a.element_size()) + nbytes(ids, b, out, s_out),
            flops=2 * T * E * R,
        )
    ]


def _sort(ids: torch.Tensor, sorted_ids: torch.Tensor, order: torch.Tensor) -> None:
    torch.sort(ids, dim=0, stable=True, out=(sorted_ids, order))


def _scatter_calls(
    ids: torch.Tensor, ds: torch.Tensor, da_out: torch.Tensor, padding_idx: int, arch: int
) -> list[Call | TorchCall]:
    """da_out[:, v] = sum of the rows ds[t] (fp32, contiguous) with ids[t] = v, in order; zero where there is none."""
    T, (R, V) = ids.numel(), da_out.shape
    sorted_ids = torch.empty((T,), dtype=ids.dtype, device=ids.device)
    order = torch.empty((T,), dtype=torch.int64, device=ids.device)
    BLOCK_T, BLOCK_R = 16, min(16, next_power_of_2(R))
    scatter = Call(
        name="embedding scatter",
        kernel=_scatter_runs_kernel,
        grid=(cdiv(T, BLOCK_T), cdiv(R, BLOCK_R), 1),
        args={
            "ids_ptr": sorted_ids,
            "order_ptr": order,
            "ds_ptr": ds,
            "da_ptr": da_out,
            "T": T,
            "V": V,
            "R": R,
            **strides(da_out, "ar", "av"),
            "padding_idx": padding_idx,
        },
        constants={"BLOCK_T": BLOCK_T, "BLOCK_R": BLOCK_R, "BLOCK_LONG": 128},
        num_warps=4,
        num_stages=1,
        options=light_options(arch),
        bytes=nbytes(sorted_ids, order, ds) + min(T, V) * R * da_out.element_size(),
        flops=T * R,
    )
    return [
        TorchCall("sort ids", _sort, (ids, sorted_ids, order), bytes=2 * nbytes(ids, order)),
        TorchCall("zero dA", da_out.zero_, (), bytes=nbytes(da_out)),
        scatter,
    ]


def embedding_backward_calls(
    dy: torch.Tensor,
    ids: torch.Tensor,
    b: torch.Tensor,
    s: torch.Tensor | None,
    da_out: torch.Tensor | None,
    db_out: torch.Tensor | None,
    *,
    scaling: float,
    padding_idx: int = -1,
    arch: int,
    precision: str = "ieee",
) -> list[Call | TorchCall]:
    """Launches of the adapter's gradients; the frozen table gets none. Either output may be None.

    Args:
        dy: [T, E] fp32, fp16 or bf16, any strides.
        ids: [T] int32 or int64.
        b: [E, R] of dy's dtype or fp32.
        s: [T, R] as the forward stored it; may be None without db_out.
        da_out: [R, V] any float dtype, any strides; wholly written.
        db_out: [E, R] any float dtype; written.
        scaling: applied to dA in fp32.
        padding_idx: an id that gets no gradient, negative for none.
        arch, precision: as in `lora_shrink.shrink_calls`.

    Raises:
        ValueError: s missing for db_out, or shapes that do not agree.
    """
    (T, _), R = dy.shape, b.shape[1]
    if ids.shape != (T,):
        raise ValueError(f"ids: expected [{T}], got {tuple(ids.shape)}")
    if da_out is not None and (da_out.dim() != 2 or da_out.shape[0] != R):
        raise ValueError(f"da_out: expected [{R}, V], got {tuple(da_out.shape)}")
    if db_out is not None and s is None:
        raise ValueError("s: expected the forward's [T, R] for db_out, got None")
    common: dict[str, Any] = {"arch": arch, "precision": precision}
    calls: list[Call | TorchCall] = []
    if T == 0:
        return [TorchCall("zero gradient", out.zero_, ()) for out in (da_out, db_out) if out is not None]
    ds = torch.empty((T, R), dtype=torch.float32, device=dy.device)  # not rounded before the sum over tokens
    if da_out is not None and db_out is not None and s is not None and R <= ONE_PASS_RANK:
        calls += dy_pass_calls(dy, b, s, ds, db_out, scaling=scaling, **common)
    else:
        if da_out is not None:
            calls += shrink_calls(dy, b.t(), ds, scaling=scaling, **common)
        if db_out is not None:
            calls += weight_gradient_calls(None, None, s, dy, None, db_out, **common)
    if da_out is not None:
        calls += _scatter_calls(ids, ds, da_out, padding_idx, arch)
    return calls
