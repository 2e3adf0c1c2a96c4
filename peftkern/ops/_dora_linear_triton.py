"""`dora_linear` as a list of launches, forward and backward: those of `lora_linear`, and what DoRA has around them.

    forward     norms and c (dora_norm.py); u = x' W^T + S B^T as `lora_linear` without a bias; y = c * u + bias
    backward    g = c * dy and dc in one pass over dy and u; `lora_linear`'s backward on g

Where the product is the persistent GEMM's, y leaves from its accumulator too (dora_output.py); elsewhere it is a pass
over u.

With dropout a pass over x makes x' and its rest, whose product with W (cuBLAS) the last pass adds to y; in backward
dY W, by cuBLAS too, is mixed with the other product's result by the mask.
"""

from __future__ import annotations

from typing import Any

import torch

from peftkern.ops import _lora_linear_triton
from peftkern.ops._lora_linear_triton import dropout, precision, write_base
from peftkern.ops._rank_rows import new_s
from peftkern.ops._weight_calls import stored
from peftkern_kernels import replay
from peftkern_kernels.dora_dropout import dropout_calls
from peftkern_kernels.dora_norm import factor_calls, norm_calls
from peftkern_kernels.dora_output import dora_output_calls
from peftkern_kernels.dropout import Dropout
from peftkern_kernels.ia3_scale import scale_calls
from peftkern_kernels.ia3_scale_sum import scale_sum_calls
from peftkern_kernels.launch import Call, TorchCall, scratch
from peftkern_kernels.lora_shrink import shrink_calls

__all__ = ["backward", "backward_calls", "dropout", "dropped", "forward", "forward_calls", "norm"]
Calls = list[Call | TorchCall]
Kept = Any  # a tensor that forward kept, or None where no gradient asks for it


def norm(weight: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float, arch: int) -> torch.Tensor:
    """The row lengths of W + scaling * B A, [N] fp32."""

    def build() -> Any:
        out = weight.new_empty(weight.shape[0], dtype=torch.float32)
        options: dict[str, Any] = {"scaling": scaling, "norm": out, "arch": arch, "precision": precision()}
        return (out,), norm_calls(weight, lora_A, lora_B, **options)

    key = ("dora_norm", scaling, precision())
    return replay.produce(key, (weight, lora_A, lora_B), build, weight.device)[0]


def dropped(x: torch.Tensor, drop: Dropout, arch: int) -> torch.Tensor:
    """x' = keep * x / (1 - p), as forward took it."""

    def build() -> Any:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        return (out,), dropout_calls(x, out, drop, arch=arch)

    return replay.produce(("dora dropout", drop.p), (x, drop.seed), build, x.device)[0]


def forward_calls(
    x: torch.Tensor,
    weight: Any,
    norm_weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    magnitude: torch.Tensor,
    bias: torch.Tensor | None,
    norm: torch.Tensor | None,
    scaling: float,
    drop: Dropout | None,
    path: str,
    arch: int,
    keep_u: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, Calls]:
    """x [M, K] -> y [M, N], S [M, R], u [M, N] if it is kept, c and 1 / norm [N], and the launches.

    `norm_weight` is the weight before it was rounded to x's dtype, and not read where `norm` [N] is given.
    """
    (M, K), N = x.shape, weight.shape[0]
    y, s = x.new_empty(M, N), new_s(x, M, lora_A.shape[0], path, arch)
    u = x.new_empty(M, N) if keep_u else None
    c, inverse = (x.new_empty(N, dtype=torch.float32) for _ in range(2))
    if norm is None:
        outputs: dict[str, Any] = {"magnitude": magnitude, "c": c, "inverse": inverse}
        options: dict[str, Any] = {"scaling": scaling, "arch": arch, "precision": precision()}
        calls: Calls = [*norm_calls(norm_weight, lora_A, lora_B, **outputs, **options)]
    else:
        calls = [*factor_calls(norm, magnitude, c, inverse)]
    inner, rest = x, None
    product = u
    if drop is not None:
        inner, left = (scratch(M, K, dtype=x.dtype, device=x.device) for _ in range(2))
        calls += [*dropout_calls(x, inner, drop, rest=left, arch=arch), write_base(left, weight, y)]
        rest = y
        product = scratch(M, N, dtype=x.dtype, device=x.device) if u is None else u
    product = y if product is None else product
    if drop is None and path == "triton":
        common: dict[str, Any] = {"arch": arch, "precision": precision()}
        calls += shrink_calls(x, lora_A, s, scaling=scaling, **common)
        calls += dora_output_calls(x, weight, s, lora_B, c, y, u=u, bias=bias, **common)
        return y, s, u, c, inverse, calls
    adapter = (lora_A, lora_B, scaling, None, None, path, arch)
    calls += _lora_linear_triton.forward_calls(inner, weight, *adapter, (product, s))[2]
    calls += scale_calls(product, c, y, bias=bias, rest=rest, arch=arch)
    return y, s, u, c, inverse, calls


def backward_calls(
    dy: torch.Tensor,
    x: Kept,
    weight: Any,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    s: Kept,
    u: Kept,
    c: Kept,
    scaling: float,
    drop: Dropout | None,
    path: str,
    arch: int,
    needs: tuple[bool, bool, bool, bool],
    makes_g: bool,
) -> tuple[Kept, Kept, Kept, Kept, Kept, Calls]:
    """dy [M, N] -> (dX [M, K], dA [R, K], dB [N, R], dc [N], g [M, N], launches), each only if `needs` asks for it.

    `x` is x', `u` may be None if dc is not asked for, and so may `x` for dA and `s` for dB.
    """
    needs_x, needs_a, needs_b, needs_m = needs
    calls: Calls = []
    dc = dy.new_empty(dy.shape[1], dtype=torch.float32) if needs_m else None
    g = torch.empty_like(dy, memory_format=torch.contiguous_format) if makes_g else None
    if dc is not None:
        calls += scale_sum_calls(dy, u, dc if c is None else c, g, dc, arch=arch)  # c is not read where g is not made
    elif g is not None:
        calls += scale_calls(dy, c, g, arch=arch)
    if g is None or not (needs_x or needs_a or needs_b):
        return None, None, None, dc, g, calls
    adapter = (lora_A, lora_B, s, scaling, None, path, arch, (needs_x, needs_a, needs_b))
    dx, da, db, more = _lora_linear_triton.backward_calls(g, x, weight, *adapter)
    calls += more
    if drop is not None and dx is not None:
        through = scratch(*dx.shape, dtype=dx.dtype, device=dx.device)  # dY W
        calls += [write_base(dy, weight.t(), through), *dropout_calls(dx, dx, drop, b=through, arch=arch)]
    return dx, da, db, dc, g, calls


def forward(
    x: torch.Tensor,
    weight: Any,
    norm_weight: Any,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    magnitude: torch.Tensor,
    bias: torch.Tensor | None,
    norm: torch.Tensor | None,
    scaling: float,
    drop: Dropout | None,
    path: str,
    arch: int,
    keep_u: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Run the launches of `forward_calls`; (y, S, u or None, c, 1 / norm)."""

    def build() -> Any:
        tensors = (x, weight, norm_weight, lora_A, lora_B, magnitude, bias, norm)
        *results, calls = forward_calls(*tensors, scaling, drop, path, arch, keep_u)
        return results, calls

    frozen = stored(weight)
    seed, p = (None, 0.0) if drop is None else (drop.seed, drop.p)
    key = ("dora_linear", scaling, p, path, keep_u, precision(), frozen.key)
    others = () if norm is not None or norm_weight is weight else (norm_weight,)
    tensors = (x, *frozen.seen, *others, lora_A, lora_B, magnitude, bias, norm, seed)
    y, s, u, c, inverse = replay.produce(key, tensors, build, x.device, frozen.told)
    return y, s, u, c, inverse


def backward(
    dy: torch.Tensor,
    x: Kept,
    weight: Any,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    s: Kept,
    u: Kept,
    c: Kept,
    scaling: float,
    drop: Dropout | None,
    path: str,
    arch: int,
    needs: tuple[bool, bool, bool, bool],
    makes_g: bool,
) -> tuple[Kept, Kept, Kept, Kept, Kept]:
    """Run the launches of `backward_calls`; (dX, dA, dB, dc, g), None where not asked for."""

    def build() -> Any:
        saved = (x, weight, lora_A, lora_B, s, u, c)
        *results, calls = backward_calls(dy, *saved, scaling, drop, path, arch, needs, makes_g)
        return results, calls

    frozen = stored(weight)
    seed, p = (None, 0.0) if drop is None else (drop.seed, drop.p)
    key = ("dora_linear backward", scaling, p, path, needs, makes_g, precision(), frozen.key)
    tensors = (dy, x, *frozen.seen, lora_A, lora_B, s, u, c, seed)
    dx, da, db, dc, g = replay.produce(key, tensors, build, dy.device, frozen.told)
    return dx, da, db, dc, g
