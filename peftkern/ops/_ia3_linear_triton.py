"""`ia3_linear` as a list of launches, forward and backward: Triton kernels for what IA3 adds, cuBLAS for the rest.

Each `*_calls` function allocates its outputs and returns them with the calls that fill them; nothing runs there. The
operation runs the list; the static check compiles it from meta tensors for every architecture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from peftkern.backend import device_info
from peftkern.ops._lora_linear_triton import add_base, precision, write_base
from peftkern.ops._weight_calls import Calls, Part, is_whole_on, parts_of, stored
from peftkern_kernels import replay
from peftkern_kernels.ia3_gemm import ia3_gemm_calls
from peftkern_kernels.ia3_scale import scale_calls
from peftkern_kernels.ia3_scale_sum import Route, route, scale_sum_calls
from peftkern_kernels.launch import scratch

Kept = Any  # a tensor that forward kept, or None where no gradient asks for it


def forward_calls(
    x: torch.Tensor,
    weight: Any,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    ids: torch.Tensor | None,
    is_feedforward: bool,
    path: str,
    arch: int,
    keep_z: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, Calls]:
    """x [M, K] -> y [M, N], z [M, N] if it is kept, and the launches; the weight [N, K] is dense or quantized."""
    M, N = x.shape[0], weight.shape[0]
    y = x.new_empty(M, N)
    parts = list(parts_of(weight, path, x, arch))
    if is_feedforward:
        # l rides on whichever operand is smaller; columns must run along memory to be scaled fast.
        if ids is None and M > N and all(part.weight.stride(1) == 1 for part in parts):
            return y, None, _by_scaled_weight(x, parts, scale, y, bias, arch)
        scaled = scratch(*x.shape, dtype=x.dtype, device=x.device)
        return y, None, [*scale_calls(x, scale, scaled, ids=ids, arch=arch), *_products(scaled, parts, y, bias)]
    z = x.new_empty(M, N) if keep_z else None
    if is_whole_on(parts, "triton") and ids is None:
        options: dict[str, Any] = {"bias": bias, "z": z, "arch": arch, "precision": precision()}
        return y, z, [*parts[0].calls, *ia3_gemm_calls(x, parts[0].weight, scale, y, **options)]
    product = y if z is None else z
    return y, z, [*_products(x, parts, product, bias), *scale_calls(product, scale, y, ids=ids, arch=arch)]


def _products(x: torch.Tensor, parts: Sequence[Part], out: torch.Tensor, bias: torch.Tensor | None) -> Calls:
    """`out = x W^T + bias` by cuBLAS, part after part of W."""
    calls: Calls = []
    for part in parts:
        calls += [*part.calls, write_base(x, part.weight, part.of_columns(out), part.of_rows(bias))]
    return calls


def _by_scaled_weight(
    x: torch.Tensor, parts: Sequence[Part], scale: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None, arch: int
) -> Calls:
    """`y = x (l * W)^T + bias`, part after part of W. One that was written out for this is scaled where it lies: a
    second one would take as much memory again."""
    calls: Calls = []
    for part in parts:
        scaled = part.weight
        if not part.calls:
            scaled = scratch(*part.weight.shape, dtype=x.dtype, device=x.device)
        calls += [*part.calls, *scale_calls(part.weight, scale, scaled, arch=arch)]
        calls.append(write_base(x, scaled, part.of_columns(y), part.of_rows(bias)))
    return calls


def _products_back(dy: torch.Tensor, parts: Sequence[Part], dx: torch.Tensor) -> Calls:
    """`dx = dY W` by cuBLAS, part after part of W."""
    calls: Calls = []
    for i, part in enumerate(parts):
        product = add_base if i else write_base
        calls += [*part.calls, product(part.of_columns(dy), part.weight.t(), dx)]
    return calls


def backward_calls(
    dy: torch.Tensor,
    x: Kept,
    weight: Any,
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
    needs_weight = needs_x or (is_feedforward and needs_scale)
    parts = list(parts_of(weight, path, dy, arch)) if needs_weight else []
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
            calls += _products_back(g, parts, dx)
        return dx, dscale, g, calls
    g = dy if needs_g else None
    if not needs_weight:
        return None, None, g, []
    if is_whole_on(parts, "triton") and ids is None and dscale is not None:
        dx = dy.new_empty(M, K) if needs_x else None
        options: dict[str, Any] = {"x": x, "sums": dscale, "arch": arch, "precision": precision()}
        return dx, dscale, g, [*parts[0].calls, *ia3_gemm_calls(dy, parts[0].weight.t(), scale, dx, **options)]
    h = dy.new_empty(M, K) if needs_x else scratch(M, K, dtype=dy.dtype, device=dy.device)
    calls = _products_back(dy, parts, h)
    if dscale is not None:
        calls += scale_sum_calls(h, x, scale, h if needs_x else None, dscale, **by_rows)
    else:
        calls += scale_calls(h, scale, h, ids=ids, arch=arch)
    return h if needs_x else None, dscale, g, calls


def forward(
    x: torch.Tensor,
    weight: Any,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    ids: torch.Tensor | None,
    is_feedforward: bool,
    path: str,
    keep_z: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `_ia3_linear_torch.forward`, on kernels, of a weight that may be quantized."""
    arch = device_info(x.device).arch

    def build() -> Any:
        *results, calls = forward_calls(x, weight, scale, bias, ids, is_feedforward, path, arch, keep_z)
        return results, calls

    frozen = stored(weight)
    key = ("ia3_linear", is_feedforward, path, keep_z, precision(), frozen.key)
    y, z = replay.produce(key, (x, *frozen.seen, scale, bias, ids), build, x.device, frozen.told)
    return y, z


def backward(
    dy: torch.Tensor,
    x: Kept,
    weight: Any,
    scale: torch.Tensor,
    z: Kept,
    ids: torch.Tensor | None,
    is_feedforward: bool,
    path: str,
    needs: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """As `_ia3_linear_torch.backward`, on kernels, likewise."""
    by_slot = route(ids, scale.shape[0]) if ids is not None and needs[1] else None
    arch = device_info(dy.device).arch

    def build() -> Any:
        *results, calls = backward_calls(dy, x, weight, scale, z, ids, by_slot, is_feedforward, path, arch, needs)
        return results, calls

    frozen = stored(weight)
    key = ("ia3_linear backward", is_feedforward, path, needs, precision(), frozen.key)
    routed = () if by_slot is None else (by_slot.order, by_slot.starts)
    dx, dscale, g = replay.produce(key, (dy, x, *frozen.seen, scale, z, ids, *routed), build, dy.device, frozen.told)
    return dx, dscale, g
