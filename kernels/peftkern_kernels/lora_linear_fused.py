"""A LoRA layer's product in one launch: the frozen GEMM with both low-rank products inside, by persistent programs.

    s = scaling * x a^T            out = x W^T + bias + s b^T        x [M, K], W [N, K], a [R, K], b [N, R]

Forward that is S and y, backward dS and dX (x := dY, W := W^T, a := B^T, b := A^T). A shrink by itself reads all of x a
second time, for one part in N / R of the GEMM's work. Here the programs of the first column of tiles, which have x's
tiles in shared memory anyway, multiply them by `a` as well: R more columns in one of N / BLOCK_N tiles. They store
their rows of s and raise a flag; every other tile needs s at its very end only, and looks at the flag of its rows
there. The first column's tiles come first in every program, so later ones find their flags raised, and no tile waits
for one that could wait itself.

All programs must run at once: there are as many as multiprocessors. (The interpreter, which runs one program after
another, is given a single one, whose own order waits for nothing.) For ranks up to 64, and without dropout, as in
lora_linear_persistent.py. A small launch before it casts `a` and `b`, pads their ranks to a power of two, and lowers
the flags.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .gemm_tables import Tile, choose_tile
from .gemm_tile import tile_of_program
from .launch import Call, cdiv, compile_options, is_aligned, nbytes, scratch, strides
from .lora_expand import triton_dtype
from .lora_linear_persistent import MOST_RANK, finish_tile, multiprocessors
from .lora_linear_tma import descriptor, weight_descriptor

_PREPARED = 4096  # elements of `a` that a program of the small launch takes


@triton.jit
def _prepare_kernel(
    a_ptr, b_ptr, thin_ptr, wide_ptr, ready_ptr,  # [R, K] -> [BLOCK_R, K]; [N, R] -> [N, BLOCK_R]; [tiles]
    R, K, N, tiles, stride_ar, stride_ak, stride_bn, stride_br,
    BLOCK_R: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    offs = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS).to(tl.int64)
    offs_r = tl.arange(0, BLOCK_R).to(tl.int64)[:, None]
    if tl.program_id(1) == 0:
        mask = (offs < K)[None, :]
        a = tl.load(a_ptr + offs_r * stride_ar + offs[None, :] * stride_ak, mask=mask & (offs_r < R), other=0.0)
        tl.store(thin_ptr + offs_r * K + offs[None, :], a.to(thin_ptr.dtype.element_ty), mask=mask)
        tl.store(ready_ptr + offs, tl.zeros((COLUMNS,), tl.int32), mask=offs < tiles)
    else:
        mask = (offs < N)[None, :]
        b = tl.load(b_ptr + offs_r * stride_br + offs[None, :] * stride_bn, mask=mask & (offs_r < R), other=0.0)
        tl.store(wide_ptr + offs[None, :] * BLOCK_R + offs_r, b.to(wide_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _wait(flag_ptr, WAITS: tl.constexpr):
    """Zero, once the flag is raised; what is loaded from addresses that it was added to is what was stored before.

    In PTX, for a loop in Triton's own language would keep the loop around it from being pipelined.
    """
    if WAITS:
        return tl.inline_asm_elementwise(
            """{
            .reg .pred low;
            .reg .b32 flag;
            AGAIN:
            ld.acquire.gpu.global.b32 flag, [$1];
            setp.eq.s32 low, flag, 0;
            @low bra AGAIN;
            mov.b32 $0, 0;
            }""",
            "=r,l",
            [flag_ptr],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        return 0


@triton.jit(do_not_specialize=["M"])
def _lora_linear_fused_kernel(
    x_desc, w_desc, a_desc, out_desc,  # [M, K], [N, K] or [K, N], [BLOCK_R, K], [M, N]: descriptors
    s_ptr, b_ptr, bias_ptr, ready_ptr,  # [M, R] [N, BLOCK_R] [N] [M / BLOCK_M]
    M, N, K, R, scale, stride_sm, stride_sr, stride_bn, stride_br, stride_bias,
    DTYPE: tl.constexpr, WEIGHT_IS_KN: tl.constexpr, PROGRAMS: tl.constexpr, WAITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    steps = tl.cdiv(K, BLOCK_K)
    offs_r = tl.arange(0, BLOCK_R)

    # The first column's tiles, which make s.
    for tile_m in range(pid, tiles_m, PROGRAMS):
        row = tile_m * BLOCK_M
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        thin = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for step in range(0, steps):
            x = x_desc.load([row, step * BLOCK_K])  # [BLOCK_M, BLOCK_K]
            if WEIGHT_IS_KN:
                w = w_desc.load([step * BLOCK_K, 0])  # [BLOCK_K, BLOCK_N]
            else:
                w = w_desc.load([0, step * BLOCK_K]).T
            a = a_desc.load([0, step * BLOCK_K]).T  # [BLOCK_K, BLOCK_R]
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
            thin = tl.dot(x, a, thin, input_precision=PRECISION)
        offs_m = tl.cast(row, tl.int64) + tl.arange(0, BLOCK_M)
        s_ptrs = s_ptr + offs_m[:, None] * stride_sm + offs_r[None, :] * stride_sr
        tl.store(s_ptrs, (thin * scale).to(DTYPE), mask=(offs_m < M)[:, None] & (offs_r < R)[None, :])
        tl.debug_barrier()  # all threads' rows of s, then one thread's flag
        tl.atomic_xchg(ready_ptr + tile_m, 1, sem="release", scope="gpu")
        finish_tile(
            acc, s_ptr, b_ptr, bias_ptr, out_desc, row, 0, M, N, R, stride_sm, stride_sr, stride_bn, stride_br,
            stride_bias, DTYPE, BLOCK_M, BLOCK_N, BLOCK_R, PRECISION,
        )  # fmt: skip

    # The others, in one loop over all their steps of K. Numbered behind those of the first column, so that programs
    # without one of these begin with one of those.
    number = pid + tl.cdiv(tl.maximum(tiles_m - pid, 0), PROGRAMS) * PROGRAMS - tiles_m
    rest = tiles_m * (tl.cdiv(N, BLOCK_N) - 1)
    tile = number - PROGRAMS
    step = -1
    row = 0
    column = 0
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(0, tl.cdiv(tl.maximum(rest - number, 0), PROGRAMS) * steps):
        step = tl.where(step == steps - 1, 0, step + 1)
        if step == 0:
            tile += PROGRAMS
            pid_m, pid_n = tile_of_program(tile, M, N - BLOCK_N, BLOCK_M, BLOCK_N, GROUP_M)
            row, column = (pid_m * BLOCK_M).to(tl.int32), ((pid_n + 1) * BLOCK_N).to(tl.int32)
        x = x_desc.load([row, step * BLOCK_K])
        if WEIGHT_IS_KN:
            w = w_desc.load([step * BLOCK_K, column])
        else:
            w = w_desc.load([column, step * BLOCK_K]).T
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        if step == steps - 1:
            ready = _wait(ready_ptr + row // BLOCK_M, WAITS)
            finish_tile(
                acc, s_ptr + ready, b_ptr, bias_ptr, out_desc, row, column, M, N, R, stride_sm, stride_sr, stride_bn,
                stride_br, stride_bias, DTYPE, BLOCK_M, BLOCK_N, BLOCK_R, PRECISION,
            )  # fmt: skip
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)


def fused_tile(x: torch.Tensor, weight: torch.Tensor, rank: int, out: torch.Tensor, arch: int) -> Tile | None:
    """The tile of `fused_calls` for these operands, None where they take the shrink's launch and the GEMM's."""
    (M, N), K = out.shape, x.shape[1]
    weight_is_kn = not is_aligned(weight)
    stored = weight.t() if weight_is_kn else weight
    if not all(map(is_aligned, (x, stored, out))) or x.dtype.itemsize != 2 or rank > MOST_RANK:
        return None
    tile = choose_tile(arch, x.dtype, M=M, N=N, K=K, aligned=True, weight_is_kn=weight_is_kn)
    return tile if tile.persistent and tile.block_n < N else None


def fused_calls(
    x: torch.Tensor,
    weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    out: torch.Tensor,
    s: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    tile: Tile,
    arch: int,
    precision: str = "ieee",
    programs: int = 0,
) -> list[Call]:
    """Launches of `s = scaling * x a^T` (written in x's dtype) and `out = x weight^T + bias + s b^T`.

    Args:
        x, weight, out: [M, K], [N, K], [M, N] of one 16-bit dtype, as `fused_tile` asks.
        a, b: [R, K], [N, R], of x's dtype or fp32, any strides.
        s: [M, R] of x's dtype, any strides.
        tile: of `fused_tile`. arch, precision: as everywhere.
        programs: in place of the device's multiprocessors (tests).
    """
    (M, N), (R, K) = out.shape, a.shape
    w_desc, weight_is_kn = weight_descriptor(weight, tile)
    block_r = max(16, 1 << (R - 1).bit_length())
    tiles_m = cdiv(M, tile.block_m)
    interpreted = x.device.type == "cpu"
    programs = programs or (1 if interpreted else multiprocessors(x.device, arch))
    thin = scratch(block_r, K, dtype=x.dtype, device=x.device)
    wide = scratch(N, block_r, dtype=x.dtype, device=x.device)
    ready = scratch(tiles_m, dtype=torch.int32, device=x.device)
    columns = _PREPARED // block_r
    prepare = Call(
        name="low-rank factors for the GEMM",
        kernel=_prepare_kernel,
        grid=(cdiv(max(K, N, tiles_m), columns), 2, 1),
        args={
            "a_ptr": a,
            "b_ptr": b,
            "thin_ptr": thin,
            "wide_ptr": wide,
            "ready_ptr": ready,
            "R": R,
            "K": K,
            "N": N,
            "tiles": tiles_m,
            **strides(a, "ar", "ak"),
            **strides(b, "bn", "br"),
        },
        constants={"BLOCK_R": block_r, "COLUMNS": columns},
        num_warps=4,
        num_stages=1,
        bytes=nbytes(a, b, thin, wide),
    )
    product = Call(
        name="base + shrink + expand",
        kernel=_lora_linear_fused_kernel,
        grid=(min(tiles_m * cdiv(N, tile.block_n), programs), 1, 1),
        args={
            "x_desc": descriptor(x, tile.block_m, tile.block_k),
            "w_desc": w_desc,
            "a_desc": descriptor(thin, block_r, tile.block_k),
            "out_desc": descriptor(out, tile.block_m, tile.block_n // 2),
            "s_ptr": s,
            "b_ptr": wide,
            "bias_ptr": bias,
            "ready_ptr": ready,
            "M": M,
            "N": N,
            "K": K,
            "R": R,
            "scale": float(scaling),
            **strides(s, "sm", "sr"),
            **strides(wide, "bn", "br"),
            **strides(bias, "bias"),
        },
        constants={
            "DTYPE": triton_dtype(x.dtype),
            "WEIGHT_IS_KN": weight_is_kn,
            "PROGRAMS": programs,
            "WAITS": not interpreted,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": tile.block_k,
            "BLOCK_R": block_r,
            "GROUP_M": tile.group_m,
            "PRECISION": precision,
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        options=compile_options(arch),
        bytes=nbytes(x, weight, thin, s, wide, bias, out),
        flops=2 * M * (N * (K + R) + K * R),
    )
    return [prepare, product]
