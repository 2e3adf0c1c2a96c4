"""`out = x W^T + bias + keep / (1 - p) * (S B^T)`: the frozen GEMM with the low-rank part in its accumulator.

The expand adds R steps to the K of the contraction, so y is written once and never read back: about 7 % of a frozen
layer at 8192 x 4096 x 4096, r 16, against 20 to 60 % for a separate pass. The same kernel gives
`dX = dY W + keep / (1 - p) * (dS A)` with x := dY, weight := W.t(), s := dS, b := A.t().

This file holds the kernel on plain pointers, which takes any strides, and `base_plus_expand_calls`, which picks between
it, those on tensor descriptors (lora_linear_persistent.py, lora_linear_tma.py) and the one that splits K
(lora_linear_split.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from .dropout import Dropout
from .gemm_tables import Tile, choose_tile
from .gemm_tile import accumulate_base, tile_of_program
from .launch import Call, cdiv, compile_options, is_aligned, nbytes, strides
from .lora_expand import expand_arguments, expand_rank_block, expand_tile
from .lora_linear_persistent import MOST_MASKED_RANK, persistent_calls
from .lora_linear_split import split_calls
from .lora_linear_tma import tma_calls
from .multi_tile import MixedFactor
from .reduction_tables import by_elements, fits_beside, vectorizes


@triton.jit(do_not_specialize=["M", "threshold"])
def _lora_linear_kernel(
    x_ptr, w_ptr, s_ptr, b_ptr, bias_ptr, seed_ptr, out_ptr,  # [M, K] [N, K] [M, R] [N, R] [N] [1] -> [M, N]
    M, N, K, R,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_sm, stride_sr, stride_bn, stride_br, stride_bias,
    stride_om, stride_on, threshold, keep_scale,
    ids_ptr, row_in_adapter_ptr, row_offset_ptr, rank_ptr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr, EVEN_K: tl.constexpr, POOL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid_m, pid_n = tile_of_program(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows, columns = offs_m % M, offs_n % N

    # The expand and the bias come first: their loads then wait once, before the loop, and not after it.
    acc = expand_tile(
        s_ptr, b_ptr, bias_ptr, seed_ptr, offs_m, rows, pid_n * BLOCK_N, columns, R, stride_sm, stride_sr,
        stride_bn, stride_br, stride_bias, threshold, keep_scale,
        ids_ptr, row_in_adapter_ptr, row_offset_ptr, rank_ptr, x_ptr.dtype.element_ty, BLOCK_M, BLOCK_N, BLOCK_R, POOL,
        PRECISION,
    )  # fmt: skip
    acc = accumulate_base(
        acc, x_ptr, w_ptr, rows, columns, 0, K, stride_xm, stride_xk, stride_wn, stride_wk, BLOCK_K, EVEN_K, PRECISION
    )
    out_ptrs = out_ptr + offs_m[:, None] * stride_om + offs_n[None, :] * stride_on
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])


def pointer_calls(
    x: torch.Tensor,
    weight: torch.Tensor,
    s: torch.Tensor,
    b: torch.Tensor | MixedFactor,
    out: torch.Tensor,
    *,
    bias: torch.Tensor | None,
    dropout: Dropout | None,
    precision: str,
    tile: Tile,
) -> list[Call]:
    """The launch on plain pointers, for a given tile; arguments as in `base_plus_expand_calls`."""
    (M, N), K, R = out.shape, x.shape[1], b.shape[1]
    return [
        Call(
            name="base + expand",
            kernel=_lora_linear_kernel,
            grid=(cdiv(M, tile.block_m) * cdiv(N, tile.block_n), 1, 1),
            args={
                **expand_arguments(s, b, bias, dropout),
                "x_ptr": x,
                "w_ptr": weight,
                "out_ptr": out,
                "M": M,
                "N": N,
                "K": K,
                **strides(x, "xm", "xk"),
                **strides(weight, "wn", "wk"),
                **strides(out, "om", "on"),
            },
            constants={
                "BLOCK_M": tile.block_m,
                "BLOCK_N": tile.block_n,
                "BLOCK_K": tile.block_k,
                "BLOCK_R": expand_rank_block(s, b, x.dtype, dropout, most=tile.block_r),
                "GROUP_M": tile.group_m,
                "EVEN_K": K % tile.block_k == 0,
                "PRECISION": precision,
            },
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            bytes=nbytes(x, weight, s, b, bias, out),
            flops=2 * M * N * (K + R),
        )
    ]


def _operands_are(aligned: Callable[[torch.Tensor], bool], x: torch.Tensor, weight: torch.Tensor) -> bool:
    return aligned(x) and (aligned(weight) or aligned(weight.t()))


def tile_of(
    x: torch.Tensor,
    weight: torch.Tensor,
    s: torch.Tensor,
    b: torch.Tensor | MixedFactor,
    out: torch.Tensor,
    dropout: Dropout | None,
    arch: int,
) -> Tile:
    """The tile of `base_plus_expand_calls`, whose arguments these are."""
    (M, N), K = out.shape, x.shape[1]
    can_stay = not isinstance(b, MixedFactor) and is_aligned(s)
    can_stay = can_stay and (dropout is None or b.shape[1] <= MOST_MASKED_RANK)
    can_stay = can_stay and is_aligned(out) and out.dtype == s.dtype == x.dtype
    sizes: dict[str, Any] = {"M": M, "N": N, "K": K, "weight_is_kn": not is_aligned(weight), "persistent": can_stay}
    sizes["out_aligned"] = vectorizes(out)
    # Beside a mask: a key of each row's own adapter, addresses of single elements; sm_80's sums, in registers as HMMA's
    # operands are, are too many by themselves.
    crowded = arch == 80 or isinstance(b, MixedFactor) or by_elements(b)
    sizes["crowded"] = dropout is not None and crowded
    singly = isinstance(b, torch.Tensor) and b.shape[1] > 16 and by_elements(b)
    sizes["singly"] = singly or (dropout is not None and not vectorizes(s))
    tile = choose_tile(arch, x.dtype, **sizes, aligned=_operands_are(is_aligned, x, weight))
    on_descriptors = tile.tma and tile.split_k == 1
    if not on_descriptors and not _operands_are(vectorizes, x, weight):
        # Rows at 16 bytes are enough for descriptors; behind plain pointers Triton knows multiples of 16 elements only.
        tile = choose_tile(arch, x.dtype, **sizes, aligned=False)
    return tile


def waits_late(
    x: torch.Tensor, weight: torch.Tensor, s: torch.Tensor, b: torch.Tensor, out: torch.Tensor, arch: int
) -> bool:
    """Whether `base_plus_expand_calls` makes a GEMM of these operands that is worth a late wait, for a shrink of x.

    Not of fp32 masters: beside the GEMM the cast of `b` and the shrink's loads of fp32 take longer than they save.
    """
    fits = b.dtype == x.dtype and fits_beside(x, s.shape[1], arch)
    return fits and tile_of(x, weight, s, b, out, None, arch).persistent


def base_plus_expand_calls(
    x: torch.Tensor,
    weight: torch.Tensor,
    s: torch.Tensor,
    b: torch.Tensor | MixedFactor,
    out: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    dropout: Dropout | None = None,
    arch: int,
    precision: str = "ieee",
    late: bool = False,
) -> list[Call]:
    """Launches that write `out[M, N] = x[M, K] weight[N, K]^T + bias[N] + keep / (1 - p) * (s[M, R] b[N, R]^T)`.

    Args:
        x, weight: one dtype of fp32, fp16, bf16; any strides, fast where a stride is 1 and rows are 16-byte aligned.
        s: S (or dS) with the scaling in it. b: the second factor, or of many adapters a pool's `MixedFactor` (s is then
            [M, max_rank], finite past each row's rank); fp32 masters are cast in registers.
        out: written in its own dtype; any strides.
        bias: [N]. dropout: mask by (row, column) of `out`. arch: see `gemm_tables`.
        precision: `input_precision` of fp32 dots.
        late: a persistent GEMM may wait late for what stands before it (`persistent_calls`).
    """
    if out.shape[0] == 0:
        return []
    tile = tile_of(x, weight, s, b, out, dropout, arch)
    options: dict[str, Any] = {"bias": bias, "precision": precision, "tile": tile}
    if tile.persistent and not isinstance(b, MixedFactor):
        calls = persistent_calls(x, weight, s, b, out, dropout=dropout, arch=arch, late=late, **options)
    else:
        build = split_calls if tile.split_k > 1 else tma_calls if tile.tma else pointer_calls
        calls = build(x, weight, s, b, out, dropout=dropout, **options)
    for call in calls:
        call.options |= compile_options(arch)
    return calls
