"""Random weights in bitsandbytes' 4-bit format for tests of kernels: a byte is any two codes, a scale any number."""

from __future__ import annotations

import torch

from peftkern.weights import Weight4bit
from peftkern_kernels.format_4bit import Packed4bit

# The magnitudes of the eight codes of FP4; code 8 + i is their negative.
FP4 = (0.0, 0.0052083333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25)


def random_codes(quant_type: str) -> torch.Tensor:
    """fp32 [16]: FP4's, or 16 numbers with all their bits in use, as NF4's are, and sorted from -1 to 1 like them."""
    if quant_type == "fp4":
        return torch.tensor([*FP4, *(-value for value in FP4)])
    inner = torch.rand(14, dtype=torch.float64).mul(2).sub(1)
    return torch.cat([inner.new_tensor([-1.0]), inner, inner.new_tensor([1.0])]).sort().values.float()


def random_4bit(
    N: int,
    K: int,
    *,
    blocksize: int = 64,
    quant_type: str = "nf4",
    nested: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    scale: float = 1.0,
) -> Weight4bit:
    """A weight of random bytes whose block scales are about `scale`, double-quantized if `nested`.

    Scales and the offset have all their bits in use, so that a missing rounding shows.
    """
    numel = N * K
    blocks = -(-numel // blocksize)
    packed = torch.randint(256, (-(-numel // 2),), dtype=torch.uint8)
    if nested:
        absmax = torch.randint(256, (blocks,), dtype=torch.uint8)
        nested_absmax = scale * (0.2 + torch.rand(-(-blocks // 256)))
        nested_code = torch.rand(256).mul(2).sub(1).sort().values
        extra = [nested_absmax, nested_code, torch.tensor([1.1 * scale])]
    else:
        absmax, extra = scale * (0.5 + torch.rand(blocks)), []
    tensors = [t.to(device) for t in (packed, absmax, random_codes(quant_type), *extra)]
    names = ("packed", "absmax", "code", "nested_absmax", "nested_code", "offset")
    fields = dict(zip(names, tensors, strict=False))
    return Weight4bit(**fields, shape=torch.Size((N, K)), blocksize=blocksize, quant_type=quant_type, dtype=dtype)


def as_packed(weight: Weight4bit) -> Packed4bit:
    """The weight as the kernels' launchers take it."""
    N, K = weight.shape
    codes = (weight.packed, weight.absmax, weight.code)
    return Packed4bit(*codes, weight.nested_absmax, weight.nested_code, weight.offset, N, K, weight.blocksize)


def guarded(weight: Weight4bit, before: int = 0) -> Weight4bit:
    """The same weight with its bytes and scales inside larger tensors of 255 and NaN, `before` bytes from the start.

    What is read past an end, or taken for aligned, then shows in the result.
    """
    packed = torch.full((before + weight.packed.numel() + 16,), 255, dtype=torch.uint8, device=weight.device)
    packed = packed[before : before + weight.packed.numel()].copy_(weight.packed)
    if weight.nested_absmax is None:
        absmax = torch.full((weight.absmax.numel() + 16,), float("nan"), device=weight.device)
        absmax = absmax[: weight.absmax.numel()].copy_(weight.absmax)
        return Weight4bit(packed, absmax, weight.code, weight.shape, weight.blocksize, weight.quant_type, weight.dtype)
    nested = torch.full((weight.nested_absmax.numel() + 16,), float("nan"), device=weight.device)
    nested = nested[: weight.nested_absmax.numel()].copy_(weight.nested_absmax)
    tensors = (packed, weight.absmax, weight.code)
    rest = (weight.nested_code, weight.offset)
    return Weight4bit(*tensors, weight.shape, weight.blocksize, weight.quant_type, weight.dtype, nested, *rest)
