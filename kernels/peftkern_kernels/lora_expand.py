"""`out = keep / (1 - p) * (S B^T) + bias`: the low-rank part by itself, and as the start of a GEMM's accumulator.

S [M, R] already carries the scaling. `expand_tile` is what the base GEMMs start their accumulator from, so that y is
written once; `expand_calls` writes it to memory, for the route on which cuBLAS then accumulates x W^T in place.
`keep` is indexed by the row and column of `out` (in dX the dropped operand is x, whose shape is dX's).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .dropout import Dropout, drop_by_words, mask_words
from .gemm_tables import rank_block
from .launch import Call, cdiv, compile_options, nbytes, strides
from .multi_tile import MixedFactor, many_adapters_product, slot_key
from .overlap import begin, overlap_options, overlaps
from .reduction_tables import by_elements


@triton.jit
def low_rank_product(
    s_ptr, b_ptr, rows, columns, R, s_columns, stride_sm, stride_sr, stride_bn, stride_br,
    DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """fp32 [BLOCK_M, BLOCK_N] = s[rows] b[columns]^T, both cast to DTYPE in registers.

    Of s, `s_columns` >= R columns may be read: those past R must be finite.
    """
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # Mostly one step. As a loop even so: straight-line code holds S's and B's shared memory beside the main loop's.
    for r in tl.range(0, R, BLOCK_R, num_stages=1):
        offs_r = r + tl.arange(0, BLOCK_R).to(tl.int64)
        mask_r = offs_r < R
        s_ptrs = s_ptr + rows[:, None] * stride_sm + offs_r[None, :] * stride_sr
        b_ptrs = b_ptr + columns[None, :] * stride_bn + offs_r[:, None] * stride_br
        s = tl.load(s_ptrs, mask=(offs_r < s_columns)[None, :], other=0.0).to(DTYPE)  # [BLOCK_M, BLOCK_R]
        b = tl.load(b_ptrs, mask=mask_r[:, None], other=0.0).to(DTYPE)  # [BLOCK_R, BLOCK_N]
        acc = tl.dot(s, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def expand_mask(
    seed_ptr, offs_m, rows, column_start, ids_ptr, row_in_adapter_ptr,
    POOL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Words [BLOCK_M, BLOCK_N / 2] by (row, column) of the matrix; of many adapters by each row's slot and place."""
    if POOL != "":
        seeds = slot_key(seed_ptr, tl.load(ids_ptr + rows))[:, None]
        words = mask_words(seeds, tl.load(row_in_adapter_ptr + rows), column_start, BLOCK_M, BLOCK_N)
    else:
        words = mask_words(tl.load(seed_ptr), offs_m, column_start, BLOCK_M, BLOCK_N)
    return words


@triton.jit
def expand_tile(
    s_ptr, b_ptr, bias_ptr, seed_ptr,  # [M, R] [N, R] [N] or None, [1] or None
    offs_m, rows, column_start, columns,
    R, stride_sm, stride_sr, stride_bn, stride_br, stride_bias, threshold, keep_scale,
    ids_ptr, row_in_adapter_ptr, row_offset_ptr, rank_ptr,  # [M] [M] [slots] [slots], or None
    DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    POOL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """fp32 [BLOCK_M, BLOCK_N] = keep * keep_scale * (S B^T) + bias.

    `rows` [BLOCK_M] and `columns` [BLOCK_N] are int64 and inside the matrices (wrapped at the edges), `offs_m` and
    `column_start` are the true coordinates, which the mask is drawn from. S and B are cast to DTYPE in registers.
    POOL is "" for one adapter; else each row has its own, out of the pool `b_ptr` (`MixedFactor`).
    """
    if seed_ptr is not None:  # drawn while the accumulator does not yet hold registers: after the dots it spills
        words = expand_mask(seed_ptr, offs_m, rows, column_start, ids_ptr, row_in_adapter_ptr, POOL, BLOCK_M, BLOCK_N)
    if POOL != "":
        acc = many_adapters_product(
            s_ptr, b_ptr, ids_ptr, row_offset_ptr, rank_ptr, rows, columns, R, stride_sm, stride_sr,
            stride_br if POOL == "a" else stride_bn, POOL, DTYPE, BLOCK_M, BLOCK_N, BLOCK_R, PRECISION,
        )  # fmt: skip
    else:
        acc = low_rank_product(
            s_ptr, b_ptr, rows, columns, R, R, stride_sm, stride_sr, stride_bn, stride_br,
            DTYPE, BLOCK_M, BLOCK_N, BLOCK_R, PRECISION,
        )  # fmt: skip
    if seed_ptr is not None:
        acc = drop_by_words(acc * keep_scale, words, threshold, BLOCK_M, BLOCK_N)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + columns * stride_bias).to(tl.float32)[None, :]
    return acc


@triton.jit(do_not_specialize=["M", "threshold"])
def _expand_kernel(
    s_ptr, b_ptr, bias_ptr, seed_ptr, out_ptr,  # [M, R] [N, R] [N] [1] -> [M, N]
    M, N, R, stride_sm, stride_sr, stride_bn, stride_br, stride_bias, stride_om, stride_on, threshold, keep_scale,
    ids_ptr, row_in_adapter_ptr, row_offset_ptr, rank_ptr,
    DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    POOL: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    begin(OVERLAP)
    # Columns run fastest, so that neighbouring programs share S's rows and write neighbouring memory.
    programs_n = tl.cdiv(N, BLOCK_N)
    pid_m = (tl.program_id(0) // programs_n).to(tl.int64)
    pid_n = (tl.program_id(0) % programs_n).to(tl.int64)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = expand_tile(
        s_ptr, b_ptr, bias_ptr, seed_ptr, offs_m, offs_m % M, pid_n * BLOCK_N, offs_n % N, R, stride_sm, stride_sr,
        stride_bn, stride_br, stride_bias, threshold, keep_scale,
        ids_ptr, row_in_adapter_ptr, row_offset_ptr, rank_ptr, DTYPE, BLOCK_M, BLOCK_N, BLOCK_R, POOL, PRECISION,
    )  # fmt: skip
    out_ptrs = out_ptr + offs_m[:, None] * stride_om + offs_n[None, :] * stride_on
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])


def expand_arguments(
    s: torch.Tensor, b: torch.Tensor | MixedFactor, bias: torch.Tensor | None, dropout: Dropout | None
) -> dict[str, object]:
    """The arguments, by name, that every kernel with an `expand_tile` takes for it, POOL (compile-time) among them."""
    if isinstance(b, MixedFactor):
        columns, ranks = (b.shape[0], 1) if b.pool == "b" else (1, b.adapters.pool_a.stride(0))
        factor: dict[str, object] = {
            "POOL": b.pool,
            "stride_bn": columns,
            "stride_br": ranks,
            "b_ptr": b.tensor,
            "ids_ptr": b.routing.ids,
            "row_in_adapter_ptr": None if dropout is None else b.routing.row_in_adapter,
            "row_offset_ptr": b.adapters.row_offset,
            "rank_ptr": b.adapters.rank,
        }
    else:
        tables = dict.fromkeys(("ids_ptr", "row_in_adapter_ptr", "row_offset_ptr", "rank_ptr"))
        factor = {"POOL": "", "b_ptr": b, **strides(b, "bn", "br"), **tables}
    return {
        **factor,
        "s_ptr": s,
        "bias_ptr": bias,
        "seed_ptr": None if dropout is None else dropout.seed,
        "R": b.shape[1],
        **strides(s, "sm", "sr"),
        **strides(bias, "bias"),
        "threshold": 0 if dropout is None else dropout.threshold,
        "keep_scale": 1.0 if dropout is None else dropout.keep_scale,
    }


def expand_rank_block(
    s: torch.Tensor, b: torch.Tensor | MixedFactor, dtype: torch.dtype, dropout: Dropout | None, *, most: int = 64
) -> int:
    """BLOCK_R of an expand beside a large accumulator: `most` of the tile, halved for each other thing in registers: a
    mask, factors in fp32 or loaded element by element, each row's own adapter."""
    wide = b.dtype.itemsize > dtype.itemsize
    if isinstance(b, torch.Tensor):
        wide = wide or by_elements(s, b)
    halvings = (dropout is not None) + wide + isinstance(b, MixedFactor)
    return min(rank_block(b.shape[1], dtype), max(16, most >> halvings))


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """Triton's name for a torch dtype that the matrix kernels take."""
    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]


def takes_narrow_ranks(s: torch.Tensor, b: torch.Tensor | MixedFactor, arch: int) -> bool:
    """Whether an expand by itself has too few registers for 64 ranks: where s or b is loaded element by element it has
    the addresses too, and RDNA's are too few in any case."""
    return arch == 1100 or (isinstance(b, torch.Tensor) and by_elements(s, b))


def expand_calls(
    s: torch.Tensor,
    b: torch.Tensor,
    out: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    dropout: Dropout | None = None,
    arch: int,
    precision: str = "ieee",
) -> list[Call]:
    """Launches that write `out[M, N] = keep / (1 - p) * (s[M, R] b[N, R]^T) + bias[N]`.

    Args:
        s: S with the scaling in it. b: the second factor; fp32 masters are cast to `out`'s dtype in registers.
        out: written; any strides.
        bias: [N]. dropout: mask by (row, column) of `out`. arch: see `gemm_tables`.
        precision: `input_precision` of fp32 dots.
    """
    (M, N), R = out.shape, b.shape[1]
    if M == 0:
        return []
    wide = out.dtype.itemsize == 4
    block_m, block_n = (32, 64) if wide or arch == 0 else (64, 128)
    stored_singly = out.stride(1) != 1 or out.stride(0) % 16 != 0  # then there are the addresses of the stores
    narrow = takes_narrow_ranks(s, b, arch) or stored_singly
    # On sm_100 those of the stores are too many beside a mask at any rank.
    num_warps = 8 if stored_singly and dropout is not None and 100 <= arch < 120 else 4
    return [
        Call(
            name="expand",
            kernel=_expand_kernel,
            grid=(cdiv(M, block_m) * cdiv(N, block_n), 1, 1),
            args={
                **expand_arguments(s, b, bias, dropout),
                "out_ptr": out,
                "M": M,
                "N": N,
                **strides(out, "om", "on"),
            },
            constants={
                "BLOCK_R": rank_block(R, out.dtype, narrow=narrow),
                "DTYPE": triton_dtype(out.dtype),
                "BLOCK_M": block_m,
                "BLOCK_N": block_n,
                "PRECISION": precision,
                "OVERLAP": overlaps(arch),
            },
            num_warps=num_warps,
            num_stages=1,
            options=compile_options(arch) | overlap_options(arch),
            bytes=nbytes(s, b, bias, out),
            flops=2 * M * N * R,
        )
    ]
