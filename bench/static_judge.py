"""What a compiled kernel must be like on each architecture, and how that is read off what the compiler wrote.

Pure functions of text and numbers, without torch or triton: resource usage and SASS as `cuobjdump` prints them, AMD's
assembly, and Triton's own IR, in which the matrix products still have their shapes. `judge` turns a `Record` into the
list of what is wrong with it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Architecture:
    """A target: `number` as in the library's tables; bytes of shared memory (AMD: LDS) that one program may use."""

    number: int
    name: str
    vendor: str
    shared_memory: int


ARCHITECTURES = {
    a.number: a
    for a in (
        Architecture(80, "sm_80", "nvidia", 166_912),
        Architecture(86, "sm_86", "nvidia", 101_376),
        Architecture(89, "sm_89", "nvidia", 101_376),
        Architecture(90, "sm_90", "nvidia", 232_448),
        Architecture(100, "sm_100", "nvidia", 232_448),
        Architecture(120, "sm_120", "nvidia", 101_376),
        Architecture(942, "gfx942", "amd", 65_536),
        Architecture(1100, "gfx1100", "amd", 65_536),
    )
}
GRID_LIMITS = (2**31 - 1, 65_535, 65_535)

# The start of an opcode -> the family of matrix instructions that it is reported as.
MATRIX_INSTRUCTIONS = (
    (r"HGMMA\b", "HGMMA"),
    (r"HMMA\b", "HMMA"),
    (r"UTC\w*MMA\b", "UTCMMA"),
    (r"v_mfma_", "v_mfma"),
    (r"v_wmma_", "v_wmma"),
)
# Of tiles with 64 rows or more and four warps or more; smaller ones use HMMA there.
WIDE_TILE_INSTRUCTION = {90: "HGMMA", 100: "UTCMMA"}
# Copies into shared memory that a program issues and does not wait for.
ASYNCHRONOUS_LOADS = r"(LDGSTS|UTMALDG|UBLKCP)\b"
SYNCHRONOUS_LOADS = r"LDG\b"
WIDE_LOADS = SYNCHRONOUS_LOADS + r"\S*\.(64|128)\b"
# Instructions for a decoded element that the arithmetic bears, where that was worked out.
MOST_PER_ELEMENT = {89: 12.0, 90: 12.0}
# A scale of a double-quantized block: its own byte, its group's scale, the value of its code, the offset.
LOADS_OF_A_SCALE = 4
LOCAL_MEMORY = r"(STL|LDL)\b"


@dataclass(frozen=True, slots=True)
class Dot:
    """A matrix product of one program: [m, k] times [k, n], operands of `dtype` ("bf16", "f16", "f32")."""

    m: int
    n: int
    k: int
    dtype: str


@dataclass(frozen=True, slots=True)
class Instruction:
    """One line of SASS: its address, its opcode with modifiers, where it jumps to if it is a branch, and whether it is
    a matrix instruction that closes a group."""

    address: int
    opcode: str
    target: int | None = None
    closes: bool = False


@dataclass(frozen=True, slots=True)
class Loop:
    """A pipelined loop: how many asynchronous and synchronous loads from device memory its body has.

    `wide` are those of the synchronous ones that load more than 32 bits. `matrix` are its HGMMA, and `awaited` those
    that close a group, which is what a program can wait for: the last ones of a product, unless each has to wait.
    """

    asynchronous: int
    synchronous: int
    wide: int = 0
    matrix: int = 0
    awaited: int = 0


@dataclass(frozen=True, slots=True)
class Decode:
    """One turn of the main loop of a kernel over a 4-bit weight, for one thread; see static_decode.py.

    Attributes:
        per_element: instructions for a decoded element, matrix instructions left out.
        elements: that are decoded. scales: that are worked out.
        asynchronous: loads that are not waited for.
        wide_loads, narrow_loads: synchronous loads of more than 32 bits, and of at most so many.
    """

    per_element: float
    elements: float
    scales: float
    asynchronous: int
    wide_loads: int
    narrow_loads: int


@dataclass(slots=True)
class Code:
    """What one compiled kernel is made of.

    Attributes:
        registers: for one thread; on AMD vector registers, accumulation registers among them.
        spills: NVIDIA: loads and stores of local memory; AMD: registers spilled to scratch memory.
        stack: bytes of stack or scratch for one thread.
        shared: bytes of shared memory (LDS) for one program.
        matrix: number of matrix instructions by family.
        asynchronous: number of asynchronous loads by family. Not read on AMD.
        loops: the loops with asynchronous loads. Not read on AMD.
        decode: of kernels over a 4-bit weight. Not read on AMD.
    """

    registers: int
    spills: int
    stack: int
    shared: int
    matrix: dict[str, int] = field(default_factory=dict)
    asynchronous: dict[str, int] = field(default_factory=dict)
    loops: list[Loop] = field(default_factory=list)
    decode: Decode | None = None


@dataclass(slots=True)
class Record:
    """A compilation and what came of it.

    Attributes:
        arch: a key of `ARCHITECTURES`.
        kernel: the function's name. launch: what the operation calls it.
        cases: the cases that launch exactly this compilation.
        constants: the kernel's compile-time arguments, as text.
        signature: types of the run-time arguments.
        num_warps, num_stages: launch options.
        grid: the largest number of programs along each axis among the launches.
        aligned: sizes and rows of the frozen layer are multiples of 16 elements in every case.
        all_aligned: and so are the rows of every other matrix, adapters and S included.
        dots: the matrix products, from Triton's IR.
        code: what was compiled; None if that failed.
        error: why it failed.
        faults: what `judge` says.
    """

    arch: int
    kernel: str
    launch: str
    cases: list[str]
    constants: dict[str, str]
    signature: dict[str, str]
    num_warps: int
    num_stages: int
    grid: tuple[int, int, int]
    aligned: bool
    all_aligned: bool
    dots: list[Dot] = field(default_factory=list)
    code: Code | None = None
    error: str = ""
    faults: list[str] = field(default_factory=list)


def parse_dots(ttir: str) -> list[Dot]:
    """The matrix products in Triton's IR (`tt.dot`)."""
    pattern = r"\btt\.dot\b[^\n]*: tensor<(\d+)x(\d+)x(\w+)> \* tensor<\d+x(\d+)x\w+>"
    return [Dot(int(m), int(n), int(k), dtype) for m, k, dtype, n in re.findall(pattern, ttir)]


def parse_resource_usage(text: str) -> tuple[int, int]:
    """(registers, bytes of stack and local memory) from `cuobjdump -res-usage`.

    Raises:
        ValueError: if the text does not say.
    """
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if found is None:
        raise ValueError(f"cuobjdump -res-usage: expected 'REG:.. STACK:.. SHARED:.. LOCAL:..', got {text!r}")
    registers, stack, local = (int(number) for number in found.groups())
    return registers, stack + local


def parse_sass(text: str) -> list[Instruction]:
    """The instructions in the output of `cuobjdump -sass`, which for newer targets ends them with scheduling hints."""
    pattern = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)([^;]*);", re.MULTILINE)
    instructions = []
    for address, opcode, operands in pattern.findall(text):
        target = re.search(r"\b0x([0-9a-f]+)\s*(?:[&?].*)?$", operands) if opcode.startswith("BRA") else None
        closes = opcode.startswith("HGMMA") and "gsb0" in operands
        instructions.append(Instruction(int(address, 16), opcode, int(target[1], 16) if target else None, closes))
    return instructions


def pipelined_loops(code: Sequence[Instruction]) -> list[Loop]:
    """The loops with asynchronous loads in their body that hold no smaller one of that kind.

    A loop is a branch backwards and what it jumps over. Loops that only wait for a barrier lie inside a pipelined loop.
    """

    def count(span: tuple[int, int], pattern: str) -> int:
        return sum(span[0] <= i.address <= span[1] and re.match(pattern, i.opcode) is not None for i in code)

    spans = {(i.target, i.address) for i in code if i.target is not None and i.target < i.address}
    pipelined = [span for span in sorted(spans) if count(span, ASYNCHRONOUS_LOADS)]
    smallest = [s for s in pipelined if not any(t != s and s[0] <= t[0] and t[1] <= s[1] for t in pipelined)]
    counted = (ASYNCHRONOUS_LOADS, SYNCHRONOUS_LOADS, WIDE_LOADS, r"HGMMA\b")
    return [
        Loop(*(count(span, p) for p in counted), sum(i.closes for i in code if span[0] <= i.address <= span[1]))
        for span in smallest
    ]


def count_matrix_instructions(opcodes: Sequence[str]) -> dict[str, int]:
    """Number of matrix instructions by family."""
    families = (family for opcode in opcodes for pattern, family in MATRIX_INSTRUCTIONS if re.match(pattern, opcode))
    return dict(Counter(families))


def read_nvidia(resource_usage: str, sass: str, shared: int) -> Code:
    """What an NVIDIA kernel is made of; `shared` comes from Triton's metadata, for it is asked for at launch."""
    registers, stack = parse_resource_usage(resource_usage)
    instructions = parse_sass(sass)
    if not instructions:
        raise ValueError("cuobjdump -sass: no instruction found in its output")
    opcodes = [i.opcode for i in instructions]
    loads = Counter(found[1] for opcode in opcodes if (found := re.match(ASYNCHRONOUS_LOADS, opcode)))
    return Code(
        registers=registers,
        spills=sum(bool(re.match(LOCAL_MEMORY, opcode)) for opcode in opcodes),
        stack=stack,
        shared=shared,
        matrix=count_matrix_instructions(opcodes),
        asynchronous=dict(loads),
        loops=pipelined_loops(instructions),
    )


def read_amd(assembly: str, shared: int) -> Code:
    """What an AMD kernel is made of, from the assembly's text and its metadata."""

    def number(key: str) -> int:
        found = re.search(rf"^\s*\.{key}:\s*(\d+)", assembly, re.MULTILINE)
        if found is None:
            raise ValueError(f"AMD assembly: expected a line '.{key}: number', found none")
        return int(found[1])

    stack = number("private_segment_fixed_size")
    return Code(
        registers=number("vgpr_count"),
        # A scalar register that is kept in a lane of a vector register costs no memory; without scratch it was.
        spills=number("vgpr_spill_count") + (number("sgpr_spill_count") if stack else 0),
        stack=stack,
        shared=max(shared, number("group_segment_fixed_size")),
        matrix=count_matrix_instructions(re.findall(r"^\s+(v_(?:mfma|wmma)_\w+)", assembly, re.MULTILINE)),
    )


def expected_matrix_instruction(arch: int, dots: Sequence[Dot], num_warps: int) -> str:
    """The family of matrix instructions that 16-bit products must compile to, or "" where there are none.

    sm_90's HGMMA and sm_100's UTC*MMA take tiles of 64 rows or more and four warps; below that HMMA is right.
    """
    halves = [dot for dot in dots if dot.dtype in ("bf16", "f16")]
    if not halves:
        return ""
    if arch in (942, 1100):
        return {942: "v_mfma", 1100: "v_wmma"}[arch]
    whole_warpgroups = num_warps % 4 == 0 and any(dot.m >= 64 for dot in halves)
    return WIDE_TILE_INSTRUCTION.get(arch, "HMMA") if whole_warpgroups else "HMMA"


def judge(record: Record) -> list[str]:
    """What is wrong with a compilation, in words; an empty list if nothing is."""
    if record.code is None:
        return [f"does not compile: {record.error}"]
    arch, code = ARCHITECTURES[record.arch], record.code
    faults = []
    if code.spills or code.stack:
        what = "spilled registers" if arch.vendor == "amd" else "loads and stores of local memory"
        faults.append(f"spills: {code.spills} {what}, {code.stack} bytes of stack")
    if code.shared > arch.shared_memory:
        faults.append(f"shared memory: {code.shared} bytes, {arch.name} has {arch.shared_memory}")
    expected = expected_matrix_instruction(record.arch, record.dots, record.num_warps)
    if expected and expected not in code.matrix:
        tiles = ", ".join(f"{d.m}x{d.n}x{d.k}" for d in record.dots)
        found = ", ".join(code.matrix) or "none"
        faults.append(f"matrix instruction: expected {expected} for tiles {tiles}, found {found}")
    faults += _decode_faults(record, code, arch) if decodes(record) else _load_faults(record, code, arch)
    if {"BLOCK_M", "BLOCK_N", "BLOCK_K"} <= record.constants.keys():
        faults += _serial_faults(code)
    faults += [
        f"grid: {programs} programs along axis {axis}, at most {most} are allowed"
        for axis, (programs, most) in enumerate(zip(record.grid, GRID_LIMITS, strict=True))
        if programs > most
    ]
    return faults


def _load_faults(record: Record, code: Code, arch: Architecture) -> list[str]:
    """An aligned, pipelined main loop must copy asynchronously. Not asked on AMD, where every load is asynchronous.

    A kernel that gathers rows loads their numbers a step ahead, synchronously and 32 bits wide. One whose programs stay
    has a single loop for all of its tiles, and in it the loads of the low-rank part, which come once a tile.
    """
    if arch.vendor == "amd" or not record.aligned or record.num_stages < 2 or not record.dots:
        return []
    if not code.loops:
        return ["synchronous loads: no loop has an asynchronous load, though sizes are aligned"]
    if "PROGRAMS" in record.constants:
        return []
    gathers = "perm_ptr" in record.signature
    least = min(loop.wide if gathers else loop.synchronous for loop in code.loops)
    if record.all_aligned and least:
        return [f"synchronous loads: {least} beside asynchronous ones in the main loop, though all rows are aligned"]
    return []


def _serial_faults(code: Code) -> list[str]:
    """Matrix instructions of a GEMM must follow each other without waiting; with a thin factor they wait for memory.

    The assembler has each wait for the one before where it cannot prove that nothing else touches their registers, and
    says nothing: on an H200 a GEMM of this kind took 426 us, the same without the waits 366.
    """
    return [
        f"matrix instructions: each of the {loop.matrix} in a loop waits for the one before"
        for loop in code.loops
        if 1 < loop.matrix == loop.awaited
    ]


def decodes(record: Record) -> bool:
    """Whether the kernel reads a 4-bit weight."""
    return "packed_ptr" in record.signature


def _decode_faults(record: Record, code: Code, arch: Architecture) -> list[str]:
    """What is asked of a kernel over a 4-bit weight in place of `_load_faults`: few instructions, and loads ahead.

    W's codes and the rows of the other operand must be copied asynchronously, as elsewhere, and are then read from
    shared memory into registers to be decoded. Scales are loaded synchronously, each by up to four loads of 32 bits or
    fewer, and on purpose: they are one or two steps ahead in registers. So no wide synchronous load may be in the
    main loop, and no more narrow ones than the scales need. Not asked of AMD, nor of the dequantization, which loads
    once and has no product.
    """
    if arch.vendor == "amd":
        return []
    decode, faults = code.decode, []
    if decode is None:
        return ["decoding: found no loop that decodes what one turn must"]
    most = MOST_PER_ELEMENT.get(record.arch)
    if most is not None and decode.per_element > most and not _exact_products(record):
        faults.append(f"decoding: {decode.per_element} instructions an element, at most {most:g} are right")
    if not record.aligned or record.num_stages < 2 or not record.dots:
        return faults
    if not decode.asynchronous:
        faults.append("synchronous loads: no asynchronous load in the loop that decodes, though sizes are aligned")
    narrow = decode.narrow_loads - LOADS_OF_A_SCALE * decode.scales
    if decode.wide_loads or narrow > 0:
        what = f"{decode.wide_loads} wide and {decode.narrow_loads} narrow, for {decode.scales:g} scales a thread"
        faults.append(f"synchronous loads: {what}, in the loop that decodes")
    return faults


def _exact_products(record: Record) -> bool:
    """Whether products are of float32: without a matrix instruction they are counted among the rest."""
    return any(dot.dtype == "f32" for dot in record.dots)
