"""`out = round(a * l)` and `dl[c] = sum over rows of a[m, c] * b[m, c]` in one pass: IA3's backward beside cuBLAS.

    output scaling     a = dy, b = z:        out = g, which then makes dX = g W
    feed-forward       a = h = dY W, b = x:  out = dX, in h's own memory

a and b are read once. A program owns BLOCK_C columns and its share of the rows, sums them in fp32 registers and stores
one partial row; partial rows are added in order by a second launch (reduce.py), so two runs give the same bits. With a
vector for each row, rows come in the order of their slots (`route`), and a program's share is cut from one slot: its
bounds are read on the device, so that no routing is ever seen by the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .ia3_tables import scale_sum_splits, scale_sum_tile
from .launch import Call, cdiv, nbytes, scratch, strides
from .overlap import begin, overlap_options, overlaps
from .reduce import PlaneSum, reduce_calls
from .reduction_tables import vectorizes


@dataclass(frozen=True, slots=True)
class Route:
    """Rows by slot: `order` [M] lists them slot by slot, `starts` [slots + 2] says where in it each slot begins.

    The last slot holds the rows that have none. Both int64.
    """

    order: torch.Tensor
    starts: torch.Tensor


def route(ids: torch.Tensor, slots: int) -> Route:
    """The route of `ids` [M], worked out on its device; rows of a slot keep their order."""
    known = torch.where((ids >= 0) & (ids < slots), ids, slots)
    in_order, order = known.sort(stable=True)
    bounds = torch.arange(slots + 2, device=ids.device, dtype=ids.dtype)
    return Route(order, torch.searchsorted(in_order, bounds))


@triton.jit(do_not_specialize=["M", "slots", "splits"])
def _ia3_scale_sum_kernel(
    a_ptr, b_ptr, l_ptr, order_ptr, starts_ptr, out_ptr, planes_ptr,  # [M, C] [M, C] [slots, C] -> [M, C] and planes
    M, C, slots, splits, stride_am, stride_ac, stride_bm, stride_bc, stride_ls, stride_lc, stride_om, stride_oc,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    begin(OVERLAP)
    slot, split = tl.program_id(1), tl.program_id(2)
    offs_c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    mask_slot = offs_c < tl.where(slot < slots, C, 0)  # nothing for rows without a slot: they are copied
    if order_ptr is not None:
        first = tl.load(starts_ptr + slot)
        last = tl.load(starts_ptr + slot + 1)
    else:
        first = tl.cast(0, tl.int64)
        last = tl.cast(M, tl.int64)
    share = tl.cdiv(tl.cdiv(last - first, splits), BLOCK_M) * BLOCK_M
    start = first + split * share
    stop = tl.minimum(start + share, last)
    if out_ptr is not None:
        l_ptrs = l_ptr + tl.cast(slot, tl.int64) * stride_ls + offs_c * stride_lc
        scale = tl.load(l_ptrs, mask=mask_slot, other=1.0).to(tl.float32)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for m in range(start, stop, BLOCK_M):
        rows = m + tl.arange(0, BLOCK_M)
        mask_m = rows < stop
        if order_ptr is not None:
            rows = tl.load(order_ptr + rows, mask=mask_m, other=0)
        mask = mask_m[:, None] & mask_c[None, :]
        a_ptrs = a_ptr + rows[:, None] * stride_am + offs_c[None, :] * stride_ac
        b_ptrs = b_ptr + rows[:, None] * stride_bm + offs_c[None, :] * stride_bc
        a = tl.load(a_ptrs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_C]
        b = tl.load(b_ptrs, mask=mask, other=0.0).to(tl.float32)
        acc += a * b
        if out_ptr is not None:
            out_ptrs = out_ptr + rows[:, None] * stride_om + offs_c[None, :] * stride_oc
            tl.store(out_ptrs, (a * scale).to(out_ptr.dtype.element_ty), mask=mask)
    plane = (tl.cast(split, tl.int64) * slots + slot) * C
    tl.store(planes_ptr + plane + offs_c, tl.sum(acc, 0), mask=mask_slot)


def scale_sum_calls(
    a: torch.Tensor,
    b: torch.Tensor,
    scale: torch.Tensor,
    out: torch.Tensor | None,
    sums: torch.Tensor,
    *,
    by_slot: Route | None = None,
    arch: int,
) -> list[Call]:
    """Launches of `out = round(a * scale)` and `sums = sum over rows of a * b`: one pass, one addition of its parts.

    Args:
        a, b: [M, C] fp32, fp16 or bf16; any strides.
        scale: [C] of any float dtype; with `by_slot`, [slots, C].
        out: [M, C]; written; may be `a`; or None.
        sums: of `scale`'s shape, any float dtype; written.
        by_slot: where each row's vector is one of several; see `route`.
        arch: see `gemm_tables`.

    Raises:
        ValueError: shapes that do not agree.
    """
    M, C = a.shape
    if b.shape != a.shape or scale.shape[-1] != C or sums.shape != scale.shape:
        raise ValueError(
            f"b, scale, sums: expected {[M, C]}, [{C}] and that again, got {list(b.shape)}, {list(scale.shape)}, "
            f"{list(sums.shape)}"
        )
    table, total = (t.view(-1, C) if t.dim() == 1 else t for t in (scale, sums))
    slots = table.shape[0]
    groups = slots if by_slot is None else slots + 1
    tile = scale_sum_tile(arch=arch, dtype=a.dtype, aligned=all(vectorizes(t) for t in (a, b)))
    blocks_c = cdiv(C, tile.block_c)
    splits = scale_sum_splits(blocks=blocks_c * groups, steps=max(1, cdiv(M, tile.block_m)), arch=arch)
    planes = scratch(splits, slots, C, dtype=torch.float32, device=a.device)
    call = Call(
        name="scale and sum",
        kernel=_ia3_scale_sum_kernel,
        grid=(blocks_c, groups, splits),
        args={
            "a_ptr": a,
            "b_ptr": b,
            "l_ptr": table,
            "order_ptr": None if by_slot is None else by_slot.order,
            "starts_ptr": None if by_slot is None else by_slot.starts,
            "out_ptr": out,
            "planes_ptr": planes,
            "M": M,
            "C": C,
            "slots": slots,
            "splits": splits,
            **strides(a, "am", "ac"),
            **strides(b, "bm", "bc"),
            **strides(table, "ls", "lc"),
            **strides(out, "om", "oc"),
        },
        constants={"BLOCK_M": tile.block_m, "BLOCK_C": tile.block_c, "OVERLAP": overlaps(arch)},
        num_warps=tile.num_warps,
        num_stages=1,
        options=overlap_options(arch),
        bytes=nbytes(a, b, scale, out, planes),
        flops=3 * M * C,
    )
    return [call, *reduce_calls([PlaneSum(planes, total)], name="dl: sum over rows", arch=arch)]
