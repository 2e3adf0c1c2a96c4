"""`lora_linear` in plain PyTorch: the default on a CPU, and any device's path where kernels cannot run.

Written for speed: x and y are not copied, nor widened but where there are few rows (`multiplies_wide`), the
low-rank product is accumulated into y in place, and what is kept for backward is x by reference, S [M, R] and, with
dropout, a mask of one byte an element.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.nn.functional import linear

from peftkern.ops._common import Later, adapters_for

# Up to so many rows the factor scaling / (1 - p) rides in products as `alpha`: one more operation would cost more.
# Beyond, S and dS are multiplied by it: some BLAS libraries take twice as long for a product with `alpha`.
FEW_ROWS = 32
WIDE_ELEMENTS = 2**15  # of x in 16 bits, up to which the adapter multiplies in fp32 on more rows than that
Kept = Any  # a tensor that forward kept, or None where no gradient asks for it


@functools.cache
def _reads_past_rows() -> bool:
    return torch.cpu._is_amx_tile_supported()


def dense_rows(x: torch.Tensor) -> torch.Tensor:
    """x [M, K] as a product's left operand: itself, or a copy without gaps between rows where a CPU's kernels need one.

    oneDNN's bfloat16 kernels for AMX read a left operand to the end of a tile, past a row's own, and multiply what is
    there by 0: NaN where the gap holds a NaN or an infinity.
    """
    if x.dtype is torch.bfloat16 and x.stride(0) > x.shape[1] and x.stride(1) == 1 and x.is_cpu and _reads_past_rows():
        return x.contiguous()
    return x


def keep_mask(seed: torch.Tensor, M: int, K: int, p: float) -> torch.Tensor:
    """bool [M, K], True where an element of x is kept; a pure function of its arguments on one device type.

    16 bits an element out of 64-bit words (p is rounded to 2^-16, and for p under 1/64 to 2^-32). On a CPU torch's
    generator draws them, seeded with `seed`, which is several times faster there than `bernoulli_`. Elsewhere that
    would wait for the device, and they are a hash: the Philox that kernels draw, made of torch's operations, took an
    H200 5 ms for 8192 x 4096 elements (bench/results/nvidia-h200/stopped-runs.txt).
    """
    bits, lane = (16, torch.int16) if p >= 1 / 64 else (32, torch.int32)
    count = -(-M * K * bits // 64)
    if seed.device.type == "cpu":
        generator = torch.Generator("cpu").manual_seed(int(seed))
        words = torch.empty(count, dtype=torch.int64, device="cpu").random_(-(2**63), None, generator=generator)
    else:
        words = _hashed_words(seed, count)
    half = 2 ** (bits - 1)
    return (words.view(lane)[: M * K] >= min(round(p * 2**bits) - half, half - 1)).view(M, K)


def _hashed_words(seed: torch.Tensor, count: int) -> torch.Tensor:
    """int64 [count]: the first numbers of splitmix64 (Steele, Lea and Flood, OOPSLA 2014) from the mixed seed on."""
    steps = torch.arange(1, count + 1, device=seed.device)
    start = _mix(seed.reshape(()).to(torch.int64, copy=True))  # mixed, for seeds of slots are a step apart
    return _mix(steps.mul_(_signed(0x9E3779B97F4A7C15)).add_(start))


def _mix(z: torch.Tensor) -> torch.Tensor:
    """splitmix64's function of 64 bits, in place."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        z ^= (z >> shift).bitwise_and_(2 ** (64 - shift) - 1)  # torch's shift repeats the sign
        if factor != 1:
            z *= _signed(factor)
    return z


def _signed(word: int) -> int:
    """The int64 with the bits of an unsigned word."""
    return word - 2**64 if word >= 2**63 else word


def _as_number(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """1 and 0 in `dtype`. Through uint8, since torch converts that several times faster than bool on a CPU."""
    return mask.view(torch.uint8).to(dtype)


def apply_mask(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A new tensor: x where mask is True, else 0."""
    return _as_number(mask, x.dtype).mul_(x)


def multiplies_wide(x: torch.Tensor, lora_A: torch.Tensor) -> bool:
    """Whether x [M, K], of 16 bits, meets A [R, K] and B in fp32: where widening x and dy costs less than rounding fp32
    masters, or than oneDNN's products in bfloat16, of which each takes 20 us however small it is.

    Given dy [M, N] in x's place it says the same."""
    M, (R, K) = x.shape[0], lora_A.shape
    if M > FEW_ROWS and M > R and M * K > WIDE_ELEMENTS:
        return False
    return lora_A.dtype is torch.float32 or (x.is_cpu and M > 1)  # of one row torch makes no such product


def adapters_to_multiply(
    x: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B as `forward` and `backward` take them: both in x's dtype, or both in fp32."""
    dtype = x.dtype
    if dtype.itemsize == 2 and lora_A.dtype is lora_B.dtype and multiplies_wide(x, lora_A):
        dtype = torch.float32
    return adapters_for(dtype, lora_A, lora_B)


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None,
    dropout_p: float,
    seed: torch.Tensor | None,
    later: Later = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """x [M, K], weight and bias in one dtype -> y [M, N], S [M, R] in the adapters' dtype, mask [M, K] or None.

    S is (keep * x) A^T, times scaling / (1 - p) where there are more than `FEW_ROWS`. `later`: see `apply_in_two`.
    """
    x = dense_rows(x)
    if seed is None and later is None and x.shape[0] <= FEW_ROWS and lora_A.dtype is x.dtype:
        # What follows comes to this, by calls that take as long as such products.
        s = linear(x, lora_A)
        return linear(x, weight, bias).addmm_(s, lora_B.t(), alpha=scaling), s, None
    s, mask, alpha = shrink(x, lora_A, scaling, dropout_p, seed)
    if later is None:
        return product(x, weight, s, lora_B, bias, alpha), s, mask
    y = x.new_empty(x.shape[0], weight.shape[0])
    later.append(lambda: y.copy_(product(x, weight, s, lora_B, bias, alpha)))
    return y, s, mask


def shrink(
    x: torch.Tensor, lora_A: torch.Tensor, scaling: float, dropout_p: float, seed: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None, float]:
    """(S, mask) of `forward`, and by what S B^T is to be multiplied."""
    mask = None
    dropped = x
    if seed is not None:
        mask = keep_mask(seed, x.shape[0], x.shape[1], dropout_p)
        dropped = apply_mask(x, mask)
        scaling = scaling / (1.0 - dropout_p)
    s = linear(dropped.to(lora_A.dtype) if lora_A.dtype is not x.dtype else dropped, lora_A)
    alpha = scaling if x.shape[0] <= FEW_ROWS else 1.0
    if alpha != scaling:
        s.mul_(scaling)
    return s, mask, alpha


def product(
    x: torch.Tensor,
    weight: torch.Tensor,
    s: torch.Tensor,
    lora_B: torch.Tensor,
    bias: torch.Tensor | None,
    alpha: float,
) -> torch.Tensor:
    """`x W^T + bias + alpha S B^T`."""
    y = linear(x, weight, bias)
    if s.dtype is not x.dtype:
        return y.add_(s.mm(lora_B.t()), alpha=alpha)
    return y.addmm_(s, lora_B.t(), alpha=alpha)


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
    """dy [M, N] -> (dX [M, K], dA [R, K], dB [N, R]), each only if `needs` asks for it; see `forward` for S."""
    needs_x, needs_a, needs_b = needs
    dx = da = db = None
    if mask is not None:
        scaling = scaling / (1.0 - dropout_p)
    dy = dense_rows(dy)
    widened = lora_A.dtype is not dy.dtype
    wide = dy.to(lora_A.dtype) if widened else dy
    alpha = scaling if dy.shape[0] <= FEW_ROWS else 1.0
    if needs_x or needs_a:
        ds = wide.mm(lora_B)
        if alpha != scaling:
            ds.mul_(scaling)
        if needs_x:
            dx = dy.mm(weight)
            if mask is not None:
                dx.addcmul_(ds.mm(lora_A), _as_number(mask, dx.dtype), value=alpha)
            elif widened:
                dx.add_(ds.mm(lora_A), alpha=alpha)
            else:
                dx.addmm_(ds, lora_A, alpha=alpha)
        if needs_a:
            dropped = x if mask is None else apply_mask(x, mask)
            da = _scaled_product(ds.t(), dropped.to(ds.dtype) if widened else dropped, alpha, lora_A)
    if needs_b:
        # The operator keeps S in x's dtype.
        db = gradient_of_b(wide, s.to(lora_B.dtype) if widened else s, alpha, lora_B)
    return dx, da, db


def gradient_of_b(dy: torch.Tensor, s: torch.Tensor, alpha: float, lora_B: torch.Tensor) -> torch.Tensor:
    """alpha * dY^T S [N, R]; of lora_B only shape and dtype are looked at."""
    M, R = s.shape
    if alpha == 1.0 and M >= 32 * R and dy.is_cpu and dy.dtype is torch.float32:
        # Of many rows its transpose takes 0.3 to 0.9 of the time (two cores of a Xeon, M 128 to 2048, R 4 to 64).
        return s.t().mm(dy).t().contiguous()
    return _scaled_product(dy.t(), s, alpha, lora_B)


def _scaled_product(a: torch.Tensor, b: torch.Tensor, alpha: float, like: torch.Tensor) -> torch.Tensor:
    """alpha * a b, of the shape of `like`, whose values are not read."""
    return a.mm(b) if alpha == 1.0 else torch.addmm(like, a, b, beta=0, alpha=alpha)
