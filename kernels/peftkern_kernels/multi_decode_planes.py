"""The first launch of decoding with many adapters and the base: fp32 planes of x W^T and of x A^T, for at most 16 rows.

As that of one adapter (lora_decode.py), W's programs beside A's, but each of A's has the rows of one adapter. Up to
four projections of one x are served (projections.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from .adapters import Adapters
from .gemm_tables import choose_decode_tile, rank_block
from .launch import Call, cdiv, nbytes, scratch, strides
from .lora_decode import MAX_ROWS, rows_times_tokens
from .multi_group import table_pointers
from .multi_tile import shrink_part
from .projections import block_of_projection, blocks_of, columns, numbered, of_projection, sum_of
from .reduction_tables import vectorizes
from .routing import Routing


@triton.jit
def shrink_beside_base(
    x_ptr, index, a_ptr, a1_ptr, a2_ptr, a3_ptr, s_planes_ptr, s_planes1_ptr, s_planes2_ptr, s_planes3_ptr,
    row_offset_ptr, row_offset1_ptr, row_offset2_ptr, row_offset3_ptr, rank_ptr, rank1_ptr, rank2_ptr, rank3_ptr,
    R, R1, R2, R3, perm_ptr, blocks_ptr, B, k_start, k_stop, M, stride_xm, stride_xk, stride_ar,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The part of A's program `index`: a block of rows and of the ranks, a part of K."""
    blocks_r = blocks_of(R, R1, R2, R3, BLOCK_R)
    which, block_r = block_of_projection(index % blocks_r, R, R1, R2, R3, BLOCK_R)
    # The two loops' buffers do not overlap in shared memory, so A's few programs do without a pipeline.
    shrink_part(
        x_ptr, of_projection(which, a_ptr, a1_ptr, a2_ptr, a3_ptr),
        of_projection(which, s_planes_ptr, s_planes1_ptr, s_planes2_ptr, s_planes3_ptr), perm_ptr, blocks_ptr,
        of_projection(which, row_offset_ptr, row_offset1_ptr, row_offset2_ptr, row_offset3_ptr),
        of_projection(which, rank_ptr, rank1_ptr, rank2_ptr, rank3_ptr), B, index // blocks_r, 0, block_r * BLOCK_R,
        tl.program_id(1), k_start, k_stop, M, sum_of(R, R1, R2, R3), stride_xm, stride_xk, stride_ar,
        BLOCK_M, BLOCK_R, BLOCK_K, EVEN_K, 1, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M", "B"])
def _multi_decode_planes_kernel(
    x_ptr, w_ptr, w1_ptr, w2_ptr, w3_ptr, a_ptr, a1_ptr, a2_ptr, a3_ptr,
    y_planes_ptr, y_planes1_ptr, y_planes2_ptr, y_planes3_ptr,  # [SPLIT, M, sum of N], and of R
    s_planes_ptr, s_planes1_ptr, s_planes2_ptr, s_planes3_ptr,
    row_offset_ptr, row_offset1_ptr, row_offset2_ptr, row_offset3_ptr, rank_ptr, rank1_ptr, rank2_ptr, rank3_ptr,
    N, N1, N2, N3, R, R1, R2, R3, perm_ptr, blocks_ptr, B,
    M, K, k_part, stride_xm, stride_xk, stride_wn, stride_wk, stride_ar,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, EVEN_K: tl.constexpr,
    NUM_STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    programs_r = B * blocks_of(R, R1, R2, R3, BLOCK_R)  # A's come first: a straggler would be all of the last wave
    k_start = tl.program_id(1) * k_part
    k_stop = tl.minimum(k_start + k_part, K)
    if tl.program_id(0) < programs_r:
        shrink_beside_base(
            x_ptr, tl.program_id(0), a_ptr, a1_ptr, a2_ptr, a3_ptr, s_planes_ptr, s_planes1_ptr, s_planes2_ptr,
            s_planes3_ptr, row_offset_ptr, row_offset1_ptr, row_offset2_ptr, row_offset3_ptr, rank_ptr, rank1_ptr,
            rank2_ptr, rank3_ptr, R, R1, R2, R3, perm_ptr, blocks_ptr, B, k_start, k_stop, M, stride_xm, stride_xk,
            stride_ar, BLOCK_M, BLOCK_R, BLOCK_K, EVEN_K, PRECISION,
        )  # fmt: skip
    else:
        which, block_n = block_of_projection(tl.program_id(0) - programs_r, N, N1, N2, N3, BLOCK_N)
        own_N = of_projection(which, N, N1, N2, N3)
        offs_m = tl.arange(0, BLOCK_M).to(tl.int64)
        offs_n = block_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = rows_times_tokens(
            of_projection(which, w_ptr, w1_ptr, w2_ptr, w3_ptr), x_ptr, None, offs_n % own_N, offs_m, M,
            k_start, k_stop, stride_wn, stride_wk, stride_xm, stride_xk, 0, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K,
            NUM_STAGES, PRECISION,
        )  # fmt: skip
        y_ptrs = of_projection(which, y_planes_ptr, y_planes1_ptr, y_planes2_ptr, y_planes3_ptr)
        y_ptrs += (tl.program_id(1) * M + offs_m)[None, :] * sum_of(N, N1, N2, N3) + offs_n[:, None]
        tl.store(y_ptrs, acc, mask=(offs_m < M)[None, :] & (offs_n < own_N)[:, None])


@dataclass(frozen=True, slots=True)
class Planes:
    """What the first launch fills: fp32 [split, M, sum of N] and [split, M, sum of max_rank].

    Columns of the latter past an adapter's rank are not written.
    """

    y: torch.Tensor
    s: torch.Tensor

    @classmethod
    def empty(cls, split: int, x: torch.Tensor, group: Sequence[Adapters]) -> Planes:
        """Memory for them."""
        widths = (sum(a.N for a in group), sum(a.max_rank for a in group))
        return cls(*(scratch(split, x.shape[0], w, dtype=torch.float32, device=x.device) for w in widths))


def shrink_arguments(x: torch.Tensor, group: Sequence[Adapters], routing: Routing, planes: Planes) -> dict[str, Any]:
    """The run-time arguments, by name, of the first launch but for W's own."""
    ranks, sizes = [a.max_rank for a in group], [a.N for a in group]
    return {
        "x_ptr": x,
        **numbered("a{}_ptr", [a.pool_a for a in group]),
        **numbered("y_planes{}_ptr", columns(planes.y, sizes)),
        **numbered("s_planes{}_ptr", columns(planes.s, ranks)),
        **table_pointers(group),
        **numbered("N{}", sizes),
        **numbered("R{}", ranks),
        "perm_ptr": routing.perm,
        "blocks_ptr": routing.blocks,
        "B": routing.blocks.shape[1],
        "M": x.shape[0],
        "K": x.shape[1],
        **strides(x, "xm", "xk"),
        "stride_ar": group[0].pool_a.stride(0),
    }


def programs(group: Sequence[Adapters], routing: Routing, block_n: int, block_r: int) -> int:
    """Programs of the first launch for each part of K: A's and W's."""
    of_a = routing.blocks.shape[1] * sum(cdiv(a.max_rank, block_r) for a in group)
    return of_a + sum(cdiv(a.N, block_n) for a in group)


def factor_bytes(group: Sequence[Adapters], M: int) -> int:
    """Bytes of A that M rows can ask for."""
    return sum(min(a.slots, M) * a.max_rank * a.K * a.pool_a.element_size() for a in group)


def group_planes_call(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    group: Sequence[Adapters],
    routing: Routing,
    *,
    arch: int,
    precision: str,
) -> tuple[Planes, Call]:
    """The first launch over dense weights, and what it fills."""
    M, K = x.shape
    R, N = max(a.max_rank for a in group), sum(a.N for a in group)
    aligned = vectorizes(x) and all(vectorizes(w) or vectorizes(w.t()) for w in weights)
    tile = choose_decode_tile(arch, x.dtype, N=N, K=K, R=R, aligned=aligned)
    k_part = cdiv(cdiv(K, tile.block_k), tile.split_k) * tile.block_k
    split, block_r = cdiv(K, k_part), rank_block(R, x.dtype)
    planes = Planes.empty(split, x, group)
    call = Call(
        name="decode with many adapters: planes",
        kernel=_multi_decode_planes_kernel,
        grid=(programs(group, routing, tile.block_n, block_r), split, 1),
        args={
            **shrink_arguments(x, group, routing, planes),
            **numbered("w{}_ptr", weights),
            "k_part": k_part,
            **strides(weights[0], "wn", "wk"),
        },
        constants={
            "BLOCK_M": MAX_ROWS,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": tile.block_k,
            "BLOCK_R": block_r,
            "EVEN_K": K % tile.block_k == 0,
            "NUM_STAGES": tile.num_stages,
            "PRECISION": precision,
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        bytes=nbytes(x, *weights, planes.y, planes.s) + factor_bytes(group, M),
        flops=2 * M * K * (N + sum(a.max_rank for a in group)),
    )
    return planes, call
