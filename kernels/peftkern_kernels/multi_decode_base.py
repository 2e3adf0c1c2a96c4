"""Decoding with many adapters and the base in two launches: `y[m] = x[m] W^T + bias + scaling[s] * x[m] A_s^T B_s^T`.

For at most 16 rows. The first launch (multi_decode_planes.py; over 4-bit weights multi_decode_4bit.py) makes planes of
x W^T and x A^T. The second is multi_decode.py's, with the planes of x W^T for its base, so that y is rounded once. Up
to four projections of one x share both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from .adapters import Adapters
from .format_4bit import Packed4bit
from .launch import Call
from .lora_decode import MAX_ROWS
from .multi_decode_4bit import group_planes_4bit_call
from .multi_decode_finish import check_projections, expand_planes_call
from .multi_decode_planes import group_planes_call
from .multi_group import Projection
from .multi_tables import multi_decode_tile, pools_vectorize
from .projections import columns
from .routing import Routing

__all__ = ["MAX_ROWS", "group_linear_decode_calls", "multi_linear_decode_calls"]


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
    group = [Projection(adapters, out, None, bias, s_out)]
    return group_linear_decode_calls(x, [weight], group, routing, arch=arch, precision=precision)


def group_linear_decode_calls(
    x: torch.Tensor,
    weights: Sequence[Any],
    group: Sequence[Projection],
    routing: Routing,
    *,
    arch: int,
    precision: str = "ieee",
) -> list[Call]:
    """The same two launches for up to four projections of x.

    Args:
        weights: of each projection; all dense with one set of strides, or all 4-bit of one blocksize and kind.
        group: as in `multi_decode.group_decode_calls`, without bases.

    Raises:
        ValueError: more than 16 rows or four projections, or shapes and kinds that do not agree.
    """
    check_projections(x, group, routing)
    M, K = x.shape
    held = [each.adapters for each in group]
    for weight, adapters in zip(weights, held, strict=True):
        stored = (weight.N, weight.K) if isinstance(weight, Packed4bit) else tuple(weight.shape)
        if stored != (adapters.N, K):
            raise ValueError(f"weight, adapters: expected [{adapters.N}, {K}], got {stored}")
    if M > MAX_ROWS:
        raise ValueError(f"x: expected at most {MAX_ROWS} rows on the decode path, got {M}")
    if M == 0:
        return []
    common: dict[str, Any] = {"arch": arch, "precision": precision}
    if isinstance(weights[0], Packed4bit):
        planes, call = group_planes_4bit_call(x, weights, held, routing, **common)
    else:
        if len({(w.dtype, w.stride()) for w in weights}) > 1:
            raise ValueError("weights: expected one dtype and one set of strides")
        planes, call = group_planes_call(x, weights, held, routing, **common)
    sizes: dict[str, Any] = {"M": M, "N": held[0].N, "K": K, "R": max(a.max_rank for a in held)}
    aligned = all(map(pools_vectorize, held))
    tile = multi_decode_tile(arch=arch, dtype=x.dtype, **sizes, aligned=aligned, projections=len(group))
    # The loads of up to 16 planes of the base are under way together. Those planes are the first launch's too, which
    # lets none start before it ends: a row of no adapter would read them without waiting.
    tile = replace(tile, block_n=64, expand_warps=max(4, tile.expand_warps), rows=16, overlap=False)
    bases = columns(planes.y, [a.N for a in held])
    whole = [replace(each, base=base) for each, base in zip(group, bases, strict=True)]
    return [call, expand_planes_call(planes.s, whole, routing, arch, precision, tile, x.dtype)]
