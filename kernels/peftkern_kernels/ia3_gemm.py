"""`out = (A W^T + bias) * l` as a GEMM with IA3 in its epilogue.

    forward, output scaling     A = x: z = x W^T + b and y = z * l, both stored from one accumulator
    backward, feed-forward      A = dY, the weight seen as [K, N]: h = dY W, dX = h * l, and of dl = sum of x * h the
                                part of the tile's own rows, from an x tile read in the epilogue

For a down projection (14336 -> 4096, 8192 tokens) h written, read with x, and dX written beside a GEMM of cuBLAS is
705 MB, 6 % of forward and backward of the frozen layer; here 235 MB of x are left, under the products of the tiles
beside. Sums over row tiles are planes [row tiles, N], added in order by a second launch.

This file holds the kernel on plain pointers, which takes any strides, and `ia3_gemm_calls`, which picks between it and
those on tensor descriptors (ia3_gemm_persistent.py, ia3_gemm_tma.py).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .gemm_tables import Tile
from .gemm_tile import accumulate_base, tile_of_program
from .ia3_tables import gemm_tile
from .launch import Call, cdiv, compile_options, is_aligned, nbytes, scratch, strides
from .reduce import PlaneSum, reduce_calls
from .reduction_tables import vectorizes


@triton.jit
def _scale_columns(
    acc, l_ptr, bias_ptr, x_ptr, out_ptr, z_ptr, planes_ptr, pid_m, offs_m, offs_n, M, N,
    stride_l, stride_bias, stride_xm, stride_xn, stride_om, stride_on, stride_zm, stride_zn,
):  # fmt: skip
    """Stores of acc [BLOCK_M, columns] at rows offs_m and columns offs_n: whichever of out, z and a plane is there."""
    mask_n = offs_n < N
    mask = (offs_m < M)[:, None] & mask_n[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n * stride_bias, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if z_ptr is not None:
        z_ptrs = z_ptr + offs_m[:, None] * stride_zm + offs_n[None, :] * stride_zn
        tl.store(z_ptrs, acc.to(z_ptr.dtype.element_ty), mask=mask)
    if x_ptr is not None:
        x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_n[None, :] * stride_xn
        x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, columns]
        sums = tl.sum(tl.where(mask, acc * x, 0.0), 0)
        tl.store(planes_ptr + pid_m * N + offs_n, sums, mask=mask_n)
    if out_ptr is not None:
        scale = tl.load(l_ptr + offs_n * stride_l, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        out_ptrs = out_ptr + offs_m[:, None] * stride_om + offs_n[None, :] * stride_on
        tl.store(out_ptrs, (acc * scale).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def ia3_epilogue(
    acc, l_ptr, bias_ptr, x_ptr, out_ptr, z_ptr, planes_ptr, pid_m, pid_n, M, N,
    stride_l, stride_bias, stride_xm, stride_xn, stride_om, stride_on, stride_zm, stride_zn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """`_scale_columns` of the tile, in one or two parts: half the columns of x at a time stay within the registers."""
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    if PARTS == 1:
        offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        _scale_columns(
            acc, l_ptr, bias_ptr, x_ptr, out_ptr, z_ptr, planes_ptr, pid_m, offs_m, offs_n, M, N,
            stride_l, stride_bias, stride_xm, stride_xn, stride_om, stride_on, stride_zm, stride_zn,
        )  # fmt: skip
    else:
        HALF: tl.constexpr = BLOCK_N // 2
        low, high = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF)), (0, 2, 1)))
        offs_n = pid_n * BLOCK_N + tl.arange(0, HALF)
        _scale_columns(
            low, l_ptr, bias_ptr, x_ptr, out_ptr, z_ptr, planes_ptr, pid_m, offs_m, offs_n, M, N,
            stride_l, stride_bias, stride_xm, stride_xn, stride_om, stride_on, stride_zm, stride_zn,
        )  # fmt: skip
        _scale_columns(
            high, l_ptr, bias_ptr, x_ptr, out_ptr, z_ptr, planes_ptr, pid_m, offs_m, offs_n + HALF, M, N,
            stride_l, stride_bias, stride_xm, stride_xn, stride_om, stride_on, stride_zm, stride_zn,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def _ia3_gemm_kernel(
    a_ptr, w_ptr, l_ptr, bias_ptr, x_ptr, out_ptr, z_ptr, planes_ptr,  # [M, K] [N, K] [N] [N] [M, N] -> [M, N] ...
    M, N, K, stride_am, stride_ak, stride_wn, stride_wk, stride_l, stride_bias, stride_xm, stride_xn,
    stride_om, stride_on, stride_zm, stride_zn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid_m, pid_n = tile_of_program(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = (pid_m * BLOCK_M + tl.arange(0, BLOCK_M)) % M
    columns = (pid_n * BLOCK_N + tl.arange(0, BLOCK_N)) % N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = accumulate_base(
        acc, a_ptr, w_ptr, rows, columns, 0, K, stride_am, stride_ak, stride_wn, stride_wk, BLOCK_K, EVEN_K, PRECISION
    )
    ia3_epilogue(
        acc, l_ptr, bias_ptr, x_ptr, out_ptr, z_ptr, planes_ptr, pid_m, pid_n, M, N,
        stride_l, stride_bias, stride_xm, stride_xn, stride_om, stride_on, stride_zm, stride_zn,
        BLOCK_M, BLOCK_N, PARTS,
    )  # fmt: skip


def epilogue_arguments(
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    x: torch.Tensor | None,
    out: torch.Tensor | None,
    z: torch.Tensor | None,
    planes: torch.Tensor | None,
) -> dict[str, Any]:
    """The run-time arguments, by name, that every kernel with an `ia3_epilogue` takes for it."""
    return {
        "l_ptr": scale,
        "bias_ptr": bias,
        "x_ptr": x,
        "out_ptr": out,
        "z_ptr": z,
        "planes_ptr": planes,
        **strides(scale, "l"),
        **strides(bias, "bias"),
        **strides(x, "xm", "xn"),
        **strides(out, "om", "on"),
        **strides(z, "zm", "zn"),
    }


def pointer_calls(
    a: torch.Tensor, weight: torch.Tensor, epilogue: dict[str, Any], *, precision: str, tile: Tile
) -> list[Call]:
    """The launch on plain pointers, for a given tile; arguments as in `ia3_gemm_calls`."""
    (M, K), N = a.shape, weight.shape[0]
    return [
        Call(
            name="GEMM + scale",
            kernel=_ia3_gemm_kernel,
            grid=(cdiv(M, tile.block_m) * cdiv(N, tile.block_n), 1, 1),
            args={
                **epilogue,
                "a_ptr": a,
                "w_ptr": weight,
                "M": M,
                "N": N,
                "K": K,
                **strides(a, "am", "ak"),
                **strides(weight, "wn", "wk"),
            },
            constants={
                "BLOCK_M": tile.block_m,
                "BLOCK_N": tile.block_n,
                "BLOCK_K": tile.block_k,
                "GROUP_M": tile.group_m,
                "EVEN_K": K % tile.block_k == 0,
                "PARTS": 2 if tile.block_n >= 256 else 1,
                "PRECISION": precision,
            },
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    ]


def ia3_gemm_calls(
    a: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    out: torch.Tensor | None,
    *,
    bias: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    x: torch.Tensor | None = None,
    sums: torch.Tensor | None = None,
    arch: int,
    precision: str = "ieee",
    tile: Tile | None = None,
) -> list[Call]:
    """Launches that write `z = a[M, K] weight[N, K]^T + bias`, `out = z * scale`, `sums = sum over rows of z * x`.

    Args:
        a, weight: one dtype of fp32, fp16, bf16; any strides, fast where a stride is 1 and rows are 16-byte aligned.
        scale: [N] of any float dtype.
        out: [M, N] or None; written in its own dtype; any strides.
        bias: [N]. z: [M, N], written too. x: [M, N] beside sums: [N] of any float dtype, written by a second launch.
        arch: see `gemm_tables`. precision: `input_precision` of fp32 dots. tile: the table's by default.

    Raises:
        ValueError: only one of x and sums is given.
    """
    if (x is None) != (sums is None):
        raise ValueError(f"x, sums: expected both or none, got {[t is not None for t in (x, sums)]}")
    (M, K), N = a.shape, weight.shape[0]
    if M == 0:
        return []
    if tile is None:
        by_elements = [t for t in (out, z, x) if t is not None and not vectorizes(t)]
        aligned = not by_elements and vectorizes(a) and (vectorizes(weight) or vectorizes(weight.t()))
        can_stay = all(t is None or t.dtype == a.dtype for t in (out, z))
        options: dict[str, Any] = {"weight_is_kn": not is_aligned(weight), "persistent": can_stay, "aligned": aligned}
        tile = gemm_tile(arch=arch, dtype=a.dtype, M=M, N=N, K=K, **options)
    planes = None
    if sums is not None:
        planes = scratch(cdiv(M, tile.block_m), 1, N, dtype=torch.float32, device=a.device)
    epilogue = epilogue_arguments(scale, bias, x, out, z, planes)
    if tile.persistent:
        from .ia3_gemm_persistent import persistent_calls

        calls = persistent_calls(a, weight, epilogue, precision=precision, tile=tile, arch=arch)
    elif tile.tma:
        from .ia3_gemm_tma import tma_calls

        calls = tma_calls(a, weight, epilogue, precision=precision, tile=tile)
    else:
        calls = pointer_calls(a, weight, epilogue, precision=precision, tile=tile)
    for call in calls:
        call.options |= compile_options(arch)
        call.bytes = nbytes(a, weight, scale, bias, x, out, z, planes)
        call.flops = 2 * M * N * K
    if planes is not None and sums is not None:
        calls += reduce_calls([PlaneSum(planes, sums.view(1, N))], name="dl: sum over rows", arch=arch)
    return calls
