"""`h = act(gate) * up`, the middle of a gated MLP (SwiGLU, GeGLU), and its gradients, each as one elementwise pass.

Forward reads gate and up and writes h; by torch's operations act(gate) is written and read once more. Backward makes
`dup = dh * act(gate)` and `dgate = dh * up * act'(gate)` from what is kept anyway, so act(gate) is never kept. In fp32,
with one rounding at the store. Outputs may be inputs: an element is read before it is written, by the same thread.

Activations: SiLU (Ramachandran et al. 2017, arXiv:1710.05941), GELU exactly and by tanh (Hendrycks and Gimpel 2016,
arXiv:1606.08415); the gating is Shazeer 2020, arXiv:2002.05202.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .ia3_tables import scale_tile
from .launch import Call, cdiv, nbytes, strides

ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}


@triton.jit
def _value_and_slope(g, ACTIVATION: tl.constexpr):
    """act(g) and its derivative there, g in fp32."""
    if ACTIVATION == 0:
        s = tl.sigmoid(g)
        return g * s, s * (1.0 + g * (1.0 - s))
    if ACTIVATION == 1:
        phi = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
        return g * phi, phi + g * tl.exp(-0.5 * g * g) * 0.3989422804014327
    # tanh(z) = 2 sigmoid(2 z) - 1, so 0.5 (1 + tanh(z)) is sigmoid(2 z); z = sqrt(2 / pi) (g + 0.044715 g^3).
    s = tl.sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))
    return g * s, s + g * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * g * g)


@triton.jit(do_not_specialize=["M"])
def _gated_fwd_kernel(
    gate_ptr, up_ptr, h_ptr,  # [M, C] each
    M, C, stride_gm, stride_gc, stride_um, stride_uc, stride_hm, stride_hc,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    programs_c = tl.cdiv(C, BLOCK_C)
    offs_m = (tl.program_id(0) // programs_c).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    offs_c = (tl.program_id(0) % programs_c).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    mask = (offs_m < M) & (offs_c < C)
    gate = tl.load(gate_ptr + offs_m * stride_gm + offs_c * stride_gc, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + offs_m * stride_um + offs_c * stride_uc, mask=mask, other=0.0).to(tl.float32)
    value, _ = _value_and_slope(gate, ACTIVATION)
    tl.store(h_ptr + offs_m * stride_hm + offs_c * stride_hc, (value * up).to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def _gated_bwd_kernel(
    dh_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr,  # [M, C] each
    M, C, stride_dm, stride_dc, stride_gm, stride_gc, stride_um, stride_uc, stride_em, stride_ec, stride_vm, stride_vc,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    programs_c = tl.cdiv(C, BLOCK_C)
    offs_m = (tl.program_id(0) // programs_c).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    offs_c = (tl.program_id(0) % programs_c).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    mask = (offs_m < M) & (offs_c < C)
    dh = tl.load(dh_ptr + offs_m * stride_dm + offs_c * stride_dc, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + offs_m * stride_gm + offs_c * stride_gc, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + offs_m * stride_um + offs_c * stride_uc, mask=mask, other=0.0).to(tl.float32)
    value, slope = _value_and_slope(gate, ACTIVATION)
    dgate, dup = dh * up * slope, dh * value
    tl.store(dgate_ptr + offs_m * stride_em + offs_c * stride_ec, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
    tl.store(dup_ptr + offs_m * stride_vm + offs_c * stride_vc, dup.to(dup_ptr.dtype.element_ty), mask=mask)


def gated_forward_calls(
    gate: torch.Tensor, up: torch.Tensor, h: torch.Tensor, *, activation: str, arch: int
) -> list[Call]:
    """The launch that writes `h = act(gate) * up`.

    Args:
        gate, up: [M, C] fp32, fp16 or bf16; any strides.
        h: [M, C]; written; may be gate or up.
        activation: a key of `ACTIVATIONS`.
        arch: see `gemm_tables`.

    Raises:
        ValueError: shapes that do not agree.
    """
    _check(gate, up=up, h=h)
    named = {"gate_ptr": gate, "up_ptr": up, "h_ptr": h}
    steps = {**strides(gate, "gm", "gc"), **strides(up, "um", "uc"), **strides(h, "hm", "hc")}
    return _calls("gated activation", _gated_fwd_kernel, named, steps, activation, arch, (gate, up, h))


def gated_backward_calls(
    dh: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    dgate: torch.Tensor,
    dup: torch.Tensor,
    *,
    activation: str,
    arch: int,
) -> list[Call]:
    """The launch that writes `dup = dh * act(gate)` and `dgate = dh * up * act'(gate)`.

    Args:
        dh, gate, up: [M, C] fp32, fp16 or bf16; any strides.
        dgate, dup: [M, C]; written; each may be any one of the three.
        activation, arch: as for `gated_forward_calls`.

    Raises:
        ValueError: shapes that do not agree.
    """
    _check(dh, gate=gate, up=up, dgate=dgate, dup=dup)
    named = {"dh_ptr": dh, "gate_ptr": gate, "up_ptr": up, "dgate_ptr": dgate, "dup_ptr": dup}
    steps = {**strides(dh, "dm", "dc"), **strides(gate, "gm", "gc"), **strides(up, "um", "uc")}
    steps |= {**strides(dgate, "em", "ec"), **strides(dup, "vm", "vc")}
    read_and_written = (dh, gate, up, dgate, dup)
    return _calls("gated gradients", _gated_bwd_kernel, named, steps, activation, arch, read_and_written)


def _check(first: torch.Tensor, **others: torch.Tensor) -> None:
    for name, t in others.items():
        if t.shape != first.shape or t.dim() != 2:
            raise ValueError(f"{name}: expected {list(first.shape)}, got {list(t.shape)}")


def _calls(
    name: str,
    kernel: Any,
    named: dict[str, torch.Tensor],
    steps: dict[str, int],
    activation: str,
    arch: int,
    moved: tuple[torch.Tensor, ...],
) -> list[Call]:
    M, C = moved[0].shape
    if M == 0:
        return []
    tile = scale_tile(arch=arch, dtype=moved[0].dtype)  # as much in flight for each thread as in IA3's pass
    return [
        Call(
            name=name,
            kernel=kernel,
            grid=(cdiv(M, tile.block_m) * cdiv(C, tile.block_c), 1, 1),
            args={**named, "M": M, "C": C, **steps},
            constants={"ACTIVATION": ACTIVATIONS[activation], "BLOCK_M": tile.block_m, "BLOCK_C": tile.block_c},
            num_warps=tile.num_warps,
            num_stages=1,
            bytes=nbytes(*moved),
            flops=8 * M * C,
        )
    ]
