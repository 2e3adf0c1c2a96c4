"""Kernels over a 4-bit weight, read off their machine code: instructions for a decoded element, and how loads are made.

Decoding is paid in instructions beside the matrix instruction's: shift, mask, look-up, scale, round, store. The figure
is those of one turn of the main loop (all opcodes but the matrix instruction and its fences), over the elements of W
that a thread decodes in a turn. For the dequantization it is those of the whole program, which has no loop.

The main loop is the shortest that multiplies by scales as often as a turn has elements. A compiler may put several
turns into one: both the matrix instructions and those multiplications then stand there as many times.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.static_judge import ASYNCHRONOUS_LOADS, SYNCHRONOUS_LOADS, WIDE_LOADS, Decode, Instruction

# What the matrix instruction comes with: its own opcode, and the fences of Hopper's.
_MATRIX = r"\w*MMA\b|WARPGROUP\b"
_NO_WORK = r"NOP\b"


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a program's main loop.

    Attributes:
        elements: of W that are decoded. scales: that are worked out. products: multiply-adds.
        threads: of the program.
        loop: False for a program that does it all in one go.
    """

    elements: int
    scales: int
    products: int
    threads: int
    loop: bool = True


def turn_of(kernel: str, constants: Mapping[str, str], num_warps: int) -> Turn | None:
    """What a turn of a kernel is, from its compile-time arguments; None for one that decodes nothing."""

    def size(*names: str) -> int:
        product = 1
        for name in names:
            product *= int(constants[name])
        return product

    threads = 32 * num_warps
    if kernel == "_dequantize_4bit_kernel":
        return Turn(size("BLOCK_WORDS", "WORD_CODES"), size("BLOCK_WORDS"), 0, threads, loop=False)
    if kernel in ("_decode_4bit_planes_kernel", "_multi_decode_4bit_planes_kernel"):
        elements = size("BLOCK_N", "BLOCK_K")
        return Turn(elements, elements // size("GROUP"), elements * size("BLOCK_M"), threads)
    if kernel in ("_base_4bit_kernel", "_base_4bit_transposed_kernel"):
        elements = size("BLOCK_N", "UNITS", "UNIT")
        return Turn(elements, size("BLOCK_N", "UNITS"), elements * size("BLOCK_M"), threads)
    return None


def _count(code: Sequence[Instruction], pattern: str | re.Pattern[str]) -> int:
    return sum(re.match(pattern, i.opcode) is not None for i in code)


def _products(code: Sequence[Instruction], threads: int) -> int:
    """Multiply-adds that a program's warps do in their matrix instructions."""
    total = 0
    for i in code:
        if found := re.match(r"HMMA\.16(8)(16|8)\b", i.opcode):
            total += 16 * int(found[1]) * int(found[2]) * threads // 32
        elif found := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)\b", i.opcode):
            m, n, k = (int(number) for number in found.groups())
            total += m * n * k * threads // 128  # four warps share one
    return total


def _main_loop(code: Sequence[Instruction], each: float) -> list[Instruction]:
    spans = {(i.target, i.address) for i in code if i.target is not None and i.target < i.address}
    loops = [[i for i in code if start <= i.address <= stop] for start, stop in spans]
    return min((loop for loop in loops if _scalings(loop) >= each), key=len, default=[])


def _scalings(code: Sequence[Instruction]) -> int:
    """Multiplications by a scale: one an element, or one instruction for two where the architecture has it."""
    return _count(code, r"FMUL\b") + 2 * _count(code, r"FMUL2\b")


def read_decode(code: Sequence[Instruction], turn: Turn) -> Decode | None:
    """The figures of a kernel; None if no loop decodes what a turn must."""
    each = turn.elements / turn.threads
    body = _main_loop(code, each) if turn.loop else list(code)
    if not body:
        return None
    repeats = [int(_scalings(body) // each)]
    if products := _products(body, turn.threads):
        repeats.append(round(products / turn.products))
    turns = max(1, min(repeats)) if turn.loop else 1
    outside = len(body) - _count(body, _MATRIX) - _count(body, _NO_WORK)
    wide = _count(body, WIDE_LOADS)  # of codes, or of the other operand: a scale is one byte or one float32
    return Decode(
        per_element=round(outside / (each * turns), 2),
        elements=each * turns,
        scales=max(1.0, turn.scales / turn.threads) * turns,
        asynchronous=_count(body, ASYNCHRONOUS_LOADS),
        wide_loads=wide,
        narrow_loads=_count(body, SYNCHRONOUS_LOADS) - wide,
    )
