"""`ia3_linear` as a list of launches, forward and backward: Triton kernels for what IA3 adds, cuBLAS for the rest.

Each `*_calls` function allocates its outputs and returns them with the calls that fill them; nothing runs there. The
operation runs the list; the static check compiles it from meta tensors for every architecture.
"""

from __future__ import annotations

from typing import Any

import torch

from peftkern.backend import device_info
from peftkern.ops._lora_linear_triton import precision, write_base
from peftkern_kernels import replay
from peftkern_kernels.ia3_gemm import ia3_gemm_calls
from peftkern_kernels.ia3_scale import scale_calls
from peftkern_kernels.ia3_scale_sum import Route, route, scale_sum_calls
from peftkern_kernels.launch import Call, TorchCall, scratch

Calls = list[Call | TorchCall]
Kept = Any  # a tensor that forward kept, or None where no gradient asks for it


def forward_calls(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    ids: torch.Tensor | None,
    is_feedforward: bool,
    path: str,
    arch: int,
    keep_z: bool,
    *,
    spends_weight: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None, Calls]:
    """x [M, K] -> y [M, N], z [M, N] if it is kept, and the launches. `spends_weight`: it is nobody else's, and may be
    scaled in place."""
    M, N = x.shape[0], weight.shape[0]
    y = x.new_empty(M, N)
    if is_feedforward:
        # l rides on whichever operand is smaller; columns must run along memory to be scaled fast.
        if ids is None and M > N and weight.stride(1) == 1:
            scaled = weight
            if not spends_weight:
                scaled = scratch(*weight.shape, dtype=weight.dtype, device=weight.device)
            return y, None, [*scale_calls(weight, scale, scaled, arch=arch), write_base(x, scaled, y, bias)]
        scaled = scratch(*x.shape, dtype=x.dtype, device=x.device)
        return y, None, [*scale_calls(x, scale, scaled, ids=ids, arch=arch), write_base(scaled, weight, y, bias)]
    z = x.new_empty(M, N) if keep_z else None
    if path == "triton" and ids is None:
        options: dict[str, Any] = {"bias": bias, "z": z, "arch": arch, "precision": precision()}
        return y, z, [*ia3_gemm_calls(x, weight, scale, y, **options)]
    product = y if z is None else z
    return y, z, [write_base(x, weight, product, bias), *scale_calls(product, scale, y, ids=ids, arch=arch)]


def backward_calls(
    dy: torch.Tensor,
    x: Kept,
    weight: torch.Tensor,
    scale: torch.Tensor,
    z: Kept,
    ids: torch.Tensor | None,
    by_slot: Route | None,
    is_feedforward: bool,
    path: str,
    arch: int,
    needs: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, Calls]:
    """dy [M, N] -> (dX [M, K], dl like scale, g [M, N], launches); see `_ia3_linear_torch.backward` for g."""
    needs_x, needs_scale, needs_g = needs
    M, K = dy.shape[0], weight.shape[1]
    dscale = torch.empty_like(scale, memory_format=torch.contiguous_format) if needs_scale else None
    by_rows: dict[str, Any] = {"by_slot": by_slot, "arch": arch}
    if not is_feedforward:
        # l on W's rows in place of dy's columns would spare g, [M, N], for a scaled weight that is written and read: no
        # less is moved up to 2 K rows.
        g = torch.empty_like(dy, memory_format=torch.contiguous_format) if needs_x or needs_g else None
        calls: Calls = []
        if dscale is not None:
            calls += scale_sum_calls(dy, z, scale, g, dscale, **by_rows)
        elif g is not None:
            calls += scale_calls(dy, scale, g, ids=ids, arch=arch)
        dx = None
        if needs_x and g is not None:
            dx = dy.new_empty(M, K)
            calls.append(write_base(g, weight.t(), dx))
        return dx, dscale, g, calls
    g = dy if needs_g else None
    if not needs_x and not needs_scale:
        return None, None, g, []
    if path == "triton" and ids is None and dscale is not None:
        dx = dy.new_empty(M, K) if needs_x else None
        options: dict[str, Any] = {"x": x, "sums": dscale, "arch": arch, "precision": precision()}
        return dx, dscale, g, [*ia3_gemm_calls(dy, weight.t(), scale, dx, **options)]
    h = dy.new_empty(M, K) if needs_x else scratch(M, K, dtype=dy.dtype, device=dy.device)
    calls = [write_base(dy, weight.t(), h)]
    if dscale is not None:
        calls += scale_sum_calls(h, x, scale, h if needs_x else None, dscale, **by_rows)
    else:
        calls += scale_calls(h, scale, h, ids=ids, arch=arch)
    return h if needs_x else None, dscale, g, calls


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    ids: torch.Tensor | None,
    is_feedforward: bool,
    path: str,
    keep_z: bool,
    *,
    spends_weight: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `_ia3_linear_torch.forward`, on kernels; `spends_weight` as in `forward_calls`."""
    arch = device_info(x.device).arch

    def build() -> Any:
        numbers = (is_feedforward, path, arch, keep_z)
        *results, calls = forward_calls(x, weight, scale, bias, ids, *numbers, spends_weight=spends_weight)
        return results, calls

    key = ("ia3_linear", is_feedforward, path, keep_z, spends_weight, precision())
    y, z = replay.produce(key, (x, weight, scale, bias, ids), build, x.device)
    return y, z


def backward(
    dy: torch.Tensor,
    x: Kept,
    weight: torch.Tensor,
    scale: torch.Tensor,
    z: Kept,
    ids: torch.Tensor | None,
    is_feedforward: bool,
    path: str,
    needs: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """As `_ia3_linear_torch.backward`, on kernels."""
    by_slot = route(ids, scale.shape[0]) if ids is not None and needs[1] else None
    arch = device_info(dy.device).arch

    def build() -> Any:
        *results, calls = backward_calls(dy, x, weight, scale, z, ids, by_slot, is_feedforward, path, arch, needs)
        return results, calls

    key = ("ia3_linear backward", is_feedforward, path, needs, precision())
    routed = () if by_slot is None else (by_slot.order, by_slot.starts)
    dx, dscale, g = replay.produce(key, (dy, x, weight, scale, z, ids, *routed), build, dy.device)
    return dx, dscale, g
