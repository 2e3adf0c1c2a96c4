"""`lora_linear` in plain PyTorch: the default on a CPU, and any device's path where kernels cannot run.

Written for speed: x and y are never widened or copied, the low-rank product is accumulated into y in place, and what
is kept for backward is x by reference, S [M, R] and, with dropout, a mask of one byte an element.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import linear

from peftkern import reference

Kept = Any  # a tensor that forward kept, or None where no gradient asks for it


def keep_mask(seed: torch.Tensor, M: int, K: int, p: float) -> torch.Tensor:
    """bool [M, K], True where an element of x is kept; a pure function of its arguments on one device type.

    On a CPU the bits come from torch's generator, seeded with `seed`: 16 bits an element out of 64-bit draws, which is
    several times faster there than `bernoulli_` and than the Philox that the kernels draw (p is rounded to 2^-16, and
    for p under 1/64 to 2^-32). Elsewhere it is the kernels' mask.
    """
    if seed.device.type != "cpu":
        return reference.dropout_mask(seed, M, K, p)
    bits, lane = (16, torch.int16) if p >= 1 / 64 else (32, torch.int32)
    lanes = 64 // bits
    generator = torch.Generator().manual_seed(int(seed))
    words = torch.empty(-(-M * K // lanes), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    half = 2 ** (bits - 1)
    return (words.view(lane)[: M * K] >= min(round(p * 2**bits) - half, half - 1)).view(M, K)


def _as_number(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """1 and 0 in `dtype`. Through uint8, since torch converts that several times faster than bool on a CPU."""
    return mask.view(torch.uint8).to(dtype)


def apply_mask(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A new tensor: x where mask is True, else 0."""
    return _as_number(mask, x.dtype).mul_(x)


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None,
    dropout_p: float,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """x [M, K], all in one dtype -> y [M, N], S = (keep * x) A^T [M, R], mask [M, K] or None.

    Unlike the kernels' S this one carries no factor: here scaling / (1 - p) rides in the products as `alpha`.
    """
    mask = None
    dropped = x
    if seed is not None:
        mask = keep_mask(seed, x.shape[0], x.shape[1], dropout_p)
        dropped = apply_mask(x, mask)
        scaling = scaling / (1.0 - dropout_p)
    s = linear(dropped, lora_A)
    y = linear(x, weight, bias)
    return y.addmm_(s, lora_B.t(), alpha=scaling), s, mask


def backward(
    dy: torch.Tensor,
    x: Kept,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    s: Kept,
    mask: Kept,
    scaling: float,
    dropout_p: float,
    needs: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """dy [M, N] -> (dX [M, K], dA [R, K], dB [N, R]), each only if `needs` asks for it."""
    needs_x, needs_a, needs_b = needs
    dx = da = db = None
    if mask is not None:
        scaling = scaling / (1.0 - dropout_p)
    if needs_x or needs_a:
        ds = dy.mm(lora_B)
        if needs_x:
            dx = dy.mm(weight)
            if mask is None:
                dx.addmm_(ds, lora_A, alpha=scaling)
            else:
                dx.addcmul_(ds.mm(lora_A), _as_number(mask, dx.dtype), value=scaling)
        if needs_a:
            dropped = x if mask is None else apply_mask(x, mask)
            # beta = 0: A only lends its shape.
            da = torch.addmm(lora_A, ds.t(), dropped, beta=0, alpha=scaling)
    if needs_b:
        db = torch.addmm(lora_B, dy.t(), s, beta=0, alpha=scaling)
    return dx, da, db
