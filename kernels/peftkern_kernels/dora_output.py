"""`u = x W^T + S B^T` and `y = c * u + bias`: DoRA's two outputs of one product.

Where the product is the persistent GEMM's (lora_linear_persistent.py), y leaves from its accumulator, beside u or,
where nothing will be differentiated, in its place: there are registers for c and a second store beside a 128 x 256 tile
(191 to 255 are used, without a spill, on Triton 3.6 and 3.9), and c is known before the product begins. That is 2 M N
bytes of u not read again, or with u itself 6 M N not moved, in 16 bits. Other tiles give u to a pass of its own
(ia3_scale.py): those with K split have no whole sum, the rest are for few rows or awkward strides.
"""

from __future__ import annotations

import torch

from .ia3_scale import scale_calls
from .launch import Call, compile_options, is_aligned
from .lora_linear import base_plus_expand_calls, tile_of
from .lora_linear_persistent import persistent_calls


def dora_output_calls(
    x: torch.Tensor,
    weight: torch.Tensor,
    s: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    y: torch.Tensor,
    *,
    u: torch.Tensor | None,
    bias: torch.Tensor | None,
    arch: int,
    precision: str = "ieee",
) -> list[Call]:
    """Launches that write `u = x[M, K] weight[N, K]^T + s[M, R] b[N, R]^T` and `y = c * u + bias`.

    Args:
        x, weight, s, b, arch, precision: as for `lora_linear.base_plus_expand_calls`.
        c: [N] contiguous fp32. bias: [N] or None.
        y: [M, N] of x's dtype, written; any strides.
        u: likewise, or None where it is not wanted.
    """
    if y.shape[0] == 0:
        return []
    product = y if u is None else u
    tile = tile_of(x, weight, s, b, product, None, arch)
    if tile.persistent and is_aligned(y):
        calls = persistent_calls(
            x, weight, s, b, u, bias=bias, precision=precision, tile=tile, arch=arch, c=c, scaled=y
        )
        for call in calls:
            call.options |= compile_options(arch)
        return calls
    calls = base_plus_expand_calls(x, weight, s, b, product, arch=arch, precision=precision)
    return [*calls, *scale_calls(product, c, y, bias=bias, arch=arch)]
