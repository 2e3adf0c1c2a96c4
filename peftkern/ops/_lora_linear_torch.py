"""`lora_linear` in plain PyTorch: the default on a CPU, and any device's path where kernels cannot run.

Written for speed: x and y are never widened or copied, the low-rank product is accumulated into y in place, and what
is kept for backward is x by reference, S [M, R] and, with dropout, a mask of one byte an element.
"""

from __future__ import annotations

import torch

from peftkern import reference


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


def _scaled_product(a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """`scaling * a b` with one rounding."""
    out = a.new_empty(a.shape[0], b.shape[1])
    return torch.addmm(out, a, b, beta=0, alpha=scaling, out=out)


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
    """x [M, K], all in one dtype -> y [M, N], S [M, R] (carries scaling and 1/(1-p)), mask [M, K] or None."""
    mask = None
    dropped = x
    if seed is not None:
        mask = keep_mask(seed, *x.shape, dropout_p)
        dropped = x * mask
        scaling = scaling / (1.0 - dropout_p)
    s = _scaled_product(dropped, lora_A.t(), scaling)
    y = torch.nn.functional.linear(x, weight, bias)
    return y.addmm_(s, lora_B.t()), s, mask


def backward(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor | None,
    lora_A: torch.Tensor | None,
    lora_B: torch.Tensor | None,
    s: torch.Tensor | None,
    mask: torch.Tensor | None,
    scaling: float,
    dropout_p: float,
    needs: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """dy [M, N] -> (dX [M, K], dA [R, K], dB [N, R]), each only if `needs` asks for it."""
    needs_x, needs_a, needs_b = needs
    dx = da = db = ds = None
    if mask is not None:
        scaling = scaling / (1.0 - dropout_p)
    if needs_x or needs_a:
        ds = _scaled_product(dy, lora_B, scaling)
    if needs_x:
        dx = dy @ weight
        if mask is None:
            dx.addmm_(ds, lora_A)
        else:
            dx += (ds @ lora_A).mul_(mask)
    if needs_a:
        da = ds.t() @ (x if mask is None else x * mask)
    if needs_b:
        db = dy.t() @ s
    return dx, da, db
