"""`grouped_lora_linear` as a list of kernel launches, forward and backward.

An expert is a slot of the kernels over many adapters, whose shrink and weight gradient serve here as they are: lora_A
[E, R, K] is a pool of rank rows as it lies, and lora_B [E, N, R], contiguous, a pool of B. PEFT keeps the experts of
lora_B innermost, so it is copied once a pass into scratch memory: by elements, every tile would read it whole. As in
_lora_linear_triton.py nothing runs in `forward_calls` and `backward_calls`.
"""

from __future__ import annotations

from typing import Any

import torch

from peftkern.backend import device_info
from peftkern.ops._grouped_lora_linear_torch import Kept, Needs, base_gradients, groups_of
from peftkern.ops._lora_linear_triton import Calls, precision
from peftkern_kernels import replay
from peftkern_kernels.adapters import Adapters
from peftkern_kernels.grouped_gemm import gemm_tile, grouped_gemm_calls
from peftkern_kernels.grouped_route import Grouping, empty_grouping, grouped_route_calls
from peftkern_kernels.launch import TorchCall, nbytes, scratch
from peftkern_kernels.multi_shrink import multi_shrink_calls
from peftkern_kernels.multi_weight_gradient import multi_weight_gradient_calls


def _is_stack(factor: torch.Tensor) -> bool:
    """Whether a factor [E, rows, columns] is a matrix [E * rows, columns] whose rows are contiguous."""
    E, rows, _ = factor.shape
    return factor.stride(2) == 1 and (E == 1 or rows == 1 or factor.stride(0) == rows * factor.stride(1))


def _packed(factor: torch.Tensor, dtype: torch.dtype, calls: Calls) -> torch.Tensor:
    """A contiguous copy in scratch memory, in x's dtype, which a launch that is added to `calls` makes."""
    held = scratch(*factor.shape, dtype=dtype, device=factor.device)
    calls.append(TorchCall("pack a factor", torch.Tensor.copy_, (held, factor), nbytes(factor, held)))
    return held


def _adapters(a: torch.Tensor, b: Kept, grouping: Grouping, N: int) -> Adapters:
    """The experts' adapters; `a` is [E, R, K], rows contiguous, `b` contiguous."""
    E, R, K = a.shape
    tables: Any = {"row_offset": grouping.row_offset, "rank": grouping.rank, "scaling": grouping.scaling}
    row = a.stride(0) if R == 1 else a.stride(1)
    return Adapters(pool_a=a.as_strided((E * R, K), (row, 1)), pool_b=b.view(-1), **tables, max_rank=R, N=N)


def forward_calls(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: Kept,
    lora_B: Kept,
    scaling: float,
    bias: torch.Tensor | None,
    offsets: torch.Tensor,
    arch: int,
) -> tuple[torch.Tensor, Kept, Calls]:
    """x [T, K], weight [E, N, K] -> y [T, N], S [T, R] (scaling applied in fp32, then rounded; None without adapters),
    and the launches."""
    (T, _), (E, N, _) = x.shape, weight.shape
    common: dict[str, Any] = {"arch": arch, "precision": precision()}
    y = x.new_empty(T, N)
    tile = gemm_tile(x, weight, y, arch)
    grouping = empty_grouping(T, E, tile.block_m, x.device, adapters=lora_A is not None)
    if lora_A is None or grouping.routing is None:
        calls: Calls = [*grouped_route_calls(offsets, grouping, T, tile.block_m, arch=arch)]
        calls += grouped_gemm_calls(x, weight, None, None, grouping.tiles, y, bias=bias, tile=tile, **common)
        return y, None, calls
    R = lora_A.shape[1]
    s = x.new_empty(T, R)
    calls = [*grouped_route_calls(offsets, grouping, T, tile.block_m, R=R, scaling=scaling, arch=arch)]
    a = lora_A if _is_stack(lora_A) else _packed(lora_A, x.dtype, calls)
    b = lora_B if 1 in lora_B.stride()[1:] else _packed(lora_B, x.dtype, calls)
    adapters = _adapters(a, a.new_empty(0), grouping, N)  # no launch here reads the pool of B
    calls += multi_shrink_calls(x, adapters, grouping.routing, s, **common)
    calls += grouped_gemm_calls(x, weight, s, b, grouping.tiles, y, bias=bias, tile=tile, **common)
    return y, s, calls


def backward_calls(
    dy: torch.Tensor,
    x: Kept,
    weight: torch.Tensor,
    lora_A: Kept,
    lora_B: Kept,
    s: Kept,
    scaling: float,
    offsets: torch.Tensor,
    arch: int,
    needs: tuple[bool, bool, bool],
) -> tuple[Kept, Kept, Kept, Calls]:
    """dy [T, N] -> (dX [T, K], dA [E, R, K], dB [E, N, R], launches), each gradient only if `needs` asks for it.

    `x` may be None if dA is not asked for, `s` if dB is not. dA and dB are in the adapters' own dtypes, contiguous.
    """
    needs_x, needs_a, needs_b = needs
    (T, N), (E, _, K) = dy.shape, weight.shape
    common: dict[str, Any] = {"arch": arch, "precision": precision()}
    turned, dx = weight.transpose(1, 2), dy.new_empty(T, K) if needs_x else None
    tile = gemm_tile(dy, turned, dy.new_empty(0, K) if dx is None else dx, arch)
    grouping = empty_grouping(T, E, tile.block_m, dy.device, adapters=lora_A is not None)
    if lora_A is None or grouping.routing is None:
        calls: Calls = [*grouped_route_calls(offsets, grouping, T, tile.block_m, arch=arch)]
        if dx is not None:
            calls += grouped_gemm_calls(dy, turned, None, None, grouping.tiles, dx, tile=tile, **common)
        return dx, None, None, calls
    R = lora_A.shape[1]
    calls = [*grouped_route_calls(offsets, grouping, T, tile.block_m, R=R, scaling=scaling, arch=arch)]
    da = lora_A.new_empty(E, R, K) if needs_a else None
    db = lora_B.new_empty(E, N, R) if needs_b else None
    # One fill of memory: the weight gradient writes nothing for experts without rows.
    calls += [TorchCall("zero", torch.Tensor.zero_, (t,)) for t in (da, db) if t is not None]
    a = lora_A if _is_stack(lora_A) else _packed(lora_A, dy.dtype, calls)
    ds: Kept = None
    if needs_x or needs_a:
        ds = scratch(T, R, dtype=dy.dtype, device=dy.device)
        b = lora_B if lora_B.is_contiguous() else _packed(lora_B, dy.dtype, calls)
        adapters = _adapters(a, b, grouping, N)
        calls += multi_shrink_calls(dy, adapters, grouping.routing, ds, pool="b", **common)
    else:
        adapters = _adapters(a, db, grouping, N)  # of the pool of B only the shape is asked for
    if dx is not None:
        calls += grouped_gemm_calls(dy, turned, ds, a.transpose(1, 2), grouping.tiles, dx, tile=tile, **common)
    calls += multi_weight_gradient_calls(
        None if da is None else ds,
        None if da is None else x,
        None if db is None else s,
        None if db is None else dy,
        None if da is None else da.view(E * R, K),
        None if db is None else db.view(-1),
        adapters,
        grouping.routing,
        **common,
    )
    return dx, da, db, calls


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: Kept,
    lora_B: Kept,
    scaling: float,
    bias: torch.Tensor | None,
    offsets: torch.Tensor,
) -> tuple[torch.Tensor, Kept]:
    """Run the launches of `forward_calls`; y [T, N] and S [T, R], None without adapters."""
    weight, offsets = weight.to(x.dtype), offsets.contiguous()
    arch = device_info(x.device).arch

    def build() -> Any:
        y, s, calls = forward_calls(x, weight, lora_A, lora_B, scaling, bias, offsets, arch)
        return (y, s), calls

    key = ("grouped_lora_linear", scaling, precision())
    y, s = replay.produce(key, (x, weight, lora_A, lora_B, bias, offsets), build, x.device)
    return y, s


def backward(
    dy: torch.Tensor,
    x: Kept,
    weight: torch.Tensor,
    lora_A: Kept,
    lora_B: Kept,
    s: Kept,
    scaling: float,
    offsets: torch.Tensor,
    needs: Needs,
) -> tuple[Kept, Kept, Kept, Kept, Kept]:
    """Run the launches of `backward_calls`; gradients of (x, weight, lora_A, lora_B, bias), None where not asked for.

    Those of weight and bias are plain PyTorch, an expert after the other: the host waits for `offsets`.
    """
    needs_x, needs_w, needs_a, needs_b, needs_bias = needs
    dw = dbias = None
    if needs_w or needs_bias:
        groups, _ = groups_of(offsets, dy.shape[0])
        dw, dbias = base_gradients(dy, x, weight, groups, needs_w, needs_bias)
    if not (needs_x or needs_a or needs_b):
        return None, dw, None, None, dbias
    weight, offsets = weight.to(dy.dtype), offsets.contiguous()
    arch, wanted = device_info(dy.device).arch, (needs_x, needs_a, needs_b)
    x = x if needs_a else None

    def build() -> Any:
        *grads, calls = backward_calls(dy, x, weight, lora_A, lora_B, s, scaling, offsets, arch, wanted)
        return grads, calls

    key = ("grouped_lora_linear backward", scaling, wanted, precision())
    dx, da, db = replay.produce(key, (dy, x, weight, lora_A, lora_B, s, offsets), build, dy.device)
    return dx, dw, da, db, dbias
