"""Decoding with many adapters and the base in two launches: `y[m] = x[m] W^T + bias + scaling[s] * x[m] A_s^T B_s^T`.

For at most 16 rows. The first launch is that of one adapter (lora_decode.py; over a 4-bit weight lora_decode_4bit.py):
W's programs beside A's, of which here each has the rows of one adapter. The second is multi_decode.py's, with the
planes of x W^T for its base, so that y is rounded once.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from .adapters import Adapters
from .format_4bit import Packed4bit
from .launch import Call
from .lora_decode import MAX_ROWS, planes_call
from .lora_decode_4bit import planes_4bit_call
from .multi_decode import expand_planes_call
from .multi_tables import multi_decode_tile, pools_vectorize
from .multi_tile import MixedFactor, check_rows
from .routing import Routing

__all__ = ["MAX_ROWS", "multi_linear_decode_calls"]


def multi_linear_decode_calls(
    x: torch.Tensor,
    weight: torch.Tensor | Packed4bit,
    adapters: Adapters,
    routing: Routing,
    out: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    s_out: torch.Tensor | None = None,
    arch: int,
    precision: str = "ieee",
) -> list[Call]:
    """The two launches that write `out`, and S into `s_out` if it is there.

    Args:
        x: [M, K], M at most 16; any strides. weight: [N, K] of x's dtype, any strides; or 4-bit, K even.
        adapters, routing, out, bias, s_out, arch, precision: as in `multi_decode.multi_decode_calls`.

    Raises:
        ValueError: more than 16 rows, an odd K over a 4-bit weight, or shapes that do not agree.
    """
    check_rows(adapters, routing, x=x, out=out)
    M, K, N = x.shape[0], x.shape[1], out.shape[1]
    stored = (weight.N, weight.K) if isinstance(weight, Packed4bit) else tuple(weight.shape)
    if stored != (N, K) or (adapters.N, adapters.K) != (N, K):
        raise ValueError(f"weight, adapters: expected [{N}, {K}], got {stored} and {(adapters.N, adapters.K)}")
    if M == 0:
        return []
    factor, common = MixedFactor(adapters, routing, "a"), {"arch": arch, "precision": precision}
    options: dict[str, Any] = {"dropout": None, **common}
    if isinstance(weight, Packed4bit):
        y_planes, s_planes, planes = planes_4bit_call(x, weight, factor, **options)
    else:
        y_planes, s_planes, planes = planes_call(x, weight, factor, **options)
    sizes: dict[str, Any] = {"M": M, "N": N, "K": K, "R": adapters.max_rank}
    tile = multi_decode_tile(arch=arch, dtype=x.dtype, **sizes, aligned=pools_vectorize(adapters))
    tile = replace(tile, block_n=64)  # the loads of up to 16 planes of the base are under way together
    return [
        planes,
        expand_planes_call(
            s_planes, adapters, routing, out, y_planes, bias, s_out, arch, precision, tile, x.dtype
        ),
    ]  # fmt: skip
