"""What the fused GEMMs over a 4-bit weight share: decoding a tile of W for a matrix product, summing split planes.

K is counted in units of `UNIT` elements (64 or 32), chosen so that none straddles two of the format's blocks: one scale
serves a row's unit, wherever blocks begin. A tile of W's bytes becomes two tiles, W's even and W's odd columns. They
are multiplied apart and never interleaved, which would cost a shuffle for each element, and which Triton 3.6 cannot
compile before Hopper's matrix instruction.

With double quantization scales are loaded ahead by hand, in registers: absmax two steps, the nested code that it points
to one. Left to Triton's pipeline the two dependent loads stand in one iteration, which waits for the memory, and the
8-bit absmax makes it load the product's other operand in an order that costs more moves than the decoding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from .dropout import Dropout
from .format_4bit import Packed4bit
from .launch import Call, cdiv, compile_options, light_options, scratch
from .lora_expand import expand_arguments, takes_narrow_ranks
from .lora_linear_split import sum_of_planes_call
from .multi_tile import MixedFactor


@triton.jit
def start_scales(
    units, next_units, absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, SHIFT: tl.constexpr
):  # fmt: skip
    """What `step_scales` carries, before the first step: its scales, and the second step's absmax and nested absmax."""
    if nested_absmax_ptr is not None:
        blocks = units >> SHIFT
        codes = tl.load(absmax_ptr + blocks).to(tl.int32)
        scales = tl.load(nested_code_ptr + codes) * tl.load(nested_absmax_ptr + (blocks >> 8)) + tl.load(offset_ptr)
        blocks = next_units >> SHIFT
        return scales, tl.load(absmax_ptr + blocks).to(tl.int32), tl.load(nested_absmax_ptr + (blocks >> 8))
    else:
        return 0.0, 0, 0.0


@triton.jit
def step_scales(
    units, units_ahead, scales, absmax, nested_absmax, absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr,
    SHIFT: tl.constexpr,
):  # fmt: skip
    """(fp32 scales of this step, and the three values to carry to the next one).

    `units`, `units_ahead` (two steps on): flat indices of units inside W (row * units of a row + unit), any one shape;
    a block is 2^SHIFT of them. The values are those of `format_4bit.block_scales`.
    """
    if nested_absmax_ptr is not None:
        next_scales = tl.load(nested_code_ptr + absmax) * nested_absmax + tl.load(offset_ptr)
        blocks = units_ahead >> SHIFT
        absmax = tl.load(absmax_ptr + blocks).to(tl.int32)
        return scales, next_scales, absmax, tl.load(nested_absmax_ptr + (blocks >> 8))
    else:  # one load, which Triton's pipeline takes care of
        return tl.load(absmax_ptr + (units >> SHIFT)), scales, absmax, nested_absmax


@triton.jit
def decode_tile(packed, scales, codes, BYTES: tl.constexpr, DTYPE: tl.constexpr):
    """W's even and odd columns under a tile of its bytes, each DTYPE [ROWS, BYTES], rounded once as the format says.

    packed: uint8 [ROWS, BYTES], or the same in words: int32 [ROWS, BYTES / 4] (little-endian), from whose registers
    a nibble is cut with one instruction fewer. scales: fp32 [ROWS, UNITS]. codes: fp32 [16].
    """
    ROWS: tl.constexpr = packed.shape[0]
    UNITS: tl.constexpr = scales.shape[1]
    if packed.dtype == tl.int32:
        # [ROWS, WORDS, 2, 2]: joined so that the last two axes flatten to byte 0..3.
        bits = tl.join(tl.join(packed, packed >> 16), tl.join(packed >> 8, packed >> 24))
    else:
        bits = packed.to(tl.int32)
    nibbles = tl.join(bits >> 4, bits) & 15  # the high nibble is the even column
    values = tl.gather(codes, tl.reshape(nibbles, (ROWS * BYTES * 2,)), 0)
    even, odd = tl.split(tl.reshape(values, (ROWS, UNITS, BYTES // UNITS, 2)))
    even = (even * scales[:, :, None]).to(DTYPE)
    odd = (odd * scales[:, :, None]).to(DTYPE)
    return tl.reshape(even, (ROWS, BYTES)), tl.reshape(odd, (ROWS, BYTES))


def weight_arguments(weight: Packed4bit, unit: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(run-time arguments, constants) by name that both kernels take for W."""
    word, word_bytes = (tl.int32, 4) if weight.word_aligned else (tl.uint8, 1)
    arguments = {
        **weight.arguments(),
        "N": weight.N,
        "K": weight.K,
        "row_words": weight.K // (2 * word_bytes),
        "row_units": weight.K // unit,
    }
    shift = (weight.blocksize // unit).bit_length() - 1
    return arguments, {"WORD": word, "WORD_BYTES": word_bytes, "UNIT": unit, "SHIFT": shift}


def base_calls(
    call_of: Callable[[torch.Tensor, dict[str, Any], int, int], Call],
    s: torch.Tensor,
    b: torch.Tensor | MixedFactor,
    out: torch.Tensor,
    *,
    steps: int,
    split: int,
    bias: torch.Tensor | None,
    dropout: Dropout | None,
    dtype: torch.dtype,
    arch: int,
    precision: str,
) -> list[Call]:
    """One launch that starts from the expand and writes `out`, or with `split` > 1 fp32 planes and their sum.

    `call_of(out, expand arguments, steps of a part, parts)` makes the launch over the weight; without pointers in the
    expand arguments it starts from zero. The contraction has `steps` steps.
    """
    expand = expand_arguments(s, b, bias, dropout)
    part = cdiv(steps, split)
    split = cdiv(steps, part)
    if split == 1:
        return [call_of(out, expand, steps, 1)]
    planes = scratch(split, *out.shape, dtype=torch.float32, device=out.device)
    base = call_of(planes, {**expand, **dict.fromkeys(("s_ptr", "b_ptr", "bias_ptr", "seed_ptr"))}, part, split)
    # A mask beside each row's own adapter: a scalar or two more than the assembler gives by itself.
    crowded = arch in (86, 89) and dropout is not None and isinstance(b, MixedFactor)
    total = sum_of_planes_call(
        planes, s, b, out, expand, dtype=dtype, precision=precision, narrow=takes_narrow_ranks(s, b, arch),
        options=compile_options(arch) if crowded else light_options(arch),
    )  # fmt: skip
    return [base, total]
