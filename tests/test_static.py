"""The static GPU check: what it reads, what it judges, that real kernels pass; and the plan's picks for real shapes."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton.language as tl
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from bench import static, static_report
from bench.static_cases import LLAMA_8B, S1, S2, LoraLinear, all_cases
from bench.static_cases_4bit import DEQUANTIZED, Dequantize4bit, LoraLinear4bit, quick_cases_4bit
from bench.static_compile import Compilation, compilations, rows_are_aligned, specialise
from bench.static_decode import Turn, read_decode, turn_of
from bench.static_judge import (
    ARCHITECTURES,
    Code,
    Decode,
    Dot,
    Instruction,
    Loop,
    Record,
    expected_matrix_instruction,
    judge,
    parse_dots,
    parse_resource_usage,
    parse_sass,
    pipelined_loops,
    read_amd,
    read_nvidia,
)
from peftkern_kernels.launch import Call

ROOT = Path(__file__).resolve().parent.parent

USAGE = """
Resource usage:
 Common:
  GLOBAL:0
 Function _kernel:
  REG:199 STACK:16 SHARED:1024 LOCAL:8 CONSTANT[0]:632 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
# A prologue that copies, a main loop that copies and multiplies with a loop that waits inside, an epilogue's own loop.
SASS = """
	code for sm_90a
        /*0000*/                   LDC R1, c[0x0][0x28] ;                          /* 0x00000a00ff017b82 */
                                                                                   /* 0x000ff00000000800 */
        /*0010*/              @!P0 LDGSTS.E.BYPASS.128 [R2], desc[UR4][R4.64] ;    /* 0x0 */
        /*0020*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24 ; /* 0x0 */
        /*0030*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R5 ;  /* 0x0 */
        /*0040*/              @!P0 BRA 0x30 ;                                      /* 0x0 */
        /*0050*/             @!UP0 UTMALDG.2D [UR8], [UR4] ;                       /* 0x0 */
        /*0060*/                   LDGSTS.E.BYPASS.128 [R2], desc[UR4][R4.64] ;    /* 0x0 */
        /*0070*/               @P1 BRA 0x20 ;                                      /* 0x0 */
        /*0080*/                   LDG.E R6, desc[UR4][R4.64] ;                    /* 0x0 */
        /*0090*/                   STL [R1+0x8], R6 ;                              /* 0x0 */
        /*00a0*/               @P1 BRA 0x80 ;                                      /* 0x0 */
        /*00b0*/                   BRA 0xb0;                                       /* 0x0 */
"""
AMD = """
	v_mfma_f32_32x32x8_bf16_1k a[0:15], v[2:3], v[4:5], a[0:15]
	v_mfma_f32_32x32x8_bf16_1k a[0:15], v[6:7], v[8:9], a[0:15]
    ; v_wmma_ in a comment does not count
    .group_segment_fixed_size: 4096
    .private_segment_fixed_size: 12
    .sgpr_spill_count: 1
    .vgpr_count:     190
    .vgpr_spill_count: 2
"""
TTIR = """
  %s = tt.load %p : tensor<128x16x!tt.ptr<bf16>> loc(#loc1)
  %acc = tt.dot %s, %b, %z : tensor<128x16xbf16> * tensor<16x256xbf16> -> tensor<128x256xf32> loc(#loc2)
  %out = tt.dot %x, %w, %acc, inputPrecision = tf32 : tensor<64x32xf32> * tensor<32x8xf32> -> tensor<64x8xf32>
"""

GOOD = Record(
    arch=80,
    kernel="_kernel",
    launch="base",
    cases=["M8192 K4096 N4096 r16 bfloat16"],
    constants={"BLOCK_M": "128", "EVEN_K": "True"},
    signature={"x_ptr": "*bf16"},
    num_warps=8,
    num_stages=4,
    grid=(512, 1, 1),
    aligned=True,
    all_aligned=True,
    dots=[Dot(128, 256, 32, "bf16")],
    code=Code(225, 0, 0, 73_728, {"HMMA": 96}, {"LDGSTS": 24}, [Loop(12, 0)]),
)
BARE = {"matrix": {}, "asynchronous": {}, "loops": []}


def but(record: Record = GOOD, **changes: object) -> Record:
    """The record with some fields changed, of itself or of its code."""
    names = {field.name for field in dataclasses.fields(Code)}
    code = dataclasses.replace(record.code, **{name: changes.pop(name) for name in list(changes) if name in names})
    return dataclasses.replace(record, **{"code": code, **changes})


FAULTS = [
    ("local memory", but(spills=3), "spills: 3 loads and stores"),
    ("stack", but(stack=16), "16 bytes of stack"),
    ("AMD spill", but(arch=942, matrix={"v_mfma": 1}, shared=0, spills=2), "spills: 2 spilled registers"),
    ("shared, sm_80", but(shared=166_913), "shared memory: 166913 bytes, sm_80 has 166912"),
    ("shared, sm_89", but(arch=89, shared=101_377), "sm_89 has 101376"),
    ("shared, gfx1100", but(arch=1100, matrix={"v_wmma": 1}, shared=65_537), "gfx1100 has 65536"),
    ("no HMMA", but(matrix={}), "expected HMMA for tiles 128x256x32, found none"),
    ("HMMA on sm_90", but(arch=90), "expected HGMMA for tiles 128x256x32, found HMMA"),
    ("HMMA on sm_100", but(arch=100), "expected UTCMMA"),
    ("no v_mfma", but(arch=942, shared=0, **BARE), "expected v_mfma"),
    ("v_mfma on RDNA", but(arch=1100, shared=0, matrix={"v_mfma": 4}), "expected v_wmma"),
    ("no asynchronous load", but(loops=[], asynchronous={}), "synchronous loads: no loop has an asynchronous load"),
    ("prologue only", but(loops=[]), "synchronous loads: no loop has an asynchronous load"),
    ("one of two", but(loops=[Loop(4, 2)]), "synchronous loads: 2 beside asynchronous ones"),
    ("grid", but(grid=(512, 65_536, 1)), "grid: 65536 programs along axis 1"),
    ("error", but(code=None, error="PassManager::run failed"), "does not compile: PassManager::run failed"),
]


@pytest.mark.parametrize("record, fault", [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
def test_judge_finds_the_fault(record, fault):
    """Catches a check that has stopped checking."""
    found = judge(record)
    assert len(found) == 1 and fault in found[0], found


PASSES = [
    ("good", GOOD),
    ("HGMMA", but(arch=90, matrix={"HGMMA": 5, "HMMA": 2})),
    ("sm_90, 16 rows: HMMA is right", but(arch=90, dots=[Dot(16, 128, 64, "bf16")])),
    ("sm_90, two warps: HMMA is right", but(arch=90, num_warps=2)),
    ("UTCMMA", but(arch=100, matrix={"UTCMMA": 8})),
    ("v_mfma, loads not read", but(arch=942, shared=0, matrix={"v_mfma": 9}, asynchronous={}, loops=[])),
    ("fp32 has no matrix instruction", but(dots=[Dot(64, 64, 32, "f32")], matrix={})),
    ("no product, nothing to pipeline", but(dots=[], **BARE)),
    ("one stage waits on purpose", but(num_stages=1, asynchronous={}, loops=[])),
    ("unaligned sizes cannot be copied", but(aligned=False, all_aligned=False, asynchronous={}, loops=[])),
    ("rank 8: S's rows are read synchronously", but(all_aligned=False, loops=[Loop(4, 2)])),
    ("a loop over ranks beside the main loop", but(loops=[Loop(4, 0), Loop(2, 2)])),
]


@pytest.mark.parametrize("record", [p[1] for p in PASSES], ids=[p[0] for p in PASSES])
def test_judge_passes_what_is_right(record):
    """Catches a check that cries wolf."""
    assert judge(record) == []


DECODES = but(
    signature={"packed_ptr": "*u8"},
    arch=89,
    loops=[Loop(5, 3)],
    decode=Decode(per_element=6.8, elements=32, scales=1, asynchronous=5, wide_loads=0, narrow_loads=3),
)


def but_decode(record: Record = DECODES, **changes: object) -> Record:
    """The record of a 4-bit kernel with some fields of its loop, or of itself, changed."""
    names = {field.name for field in dataclasses.fields(Decode)}
    loop = {name: changes.pop(name) for name in list(changes) if name in names}
    return but(record, decode=dataclasses.replace(record.code.decode, **loop), **changes)


FAULTS_4BIT = [
    ("12 instructions", but_decode(per_element=12.1), "decoding: 12.1 instructions an element, at most 12"),
    ("on sm_90", but_decode(per_element=20.0, arch=90, matrix={"HGMMA": 1}), "decoding: 20.0 instructions"),
    ("no loop found", but(DECODES, decode=None), "found no loop"),
    ("nothing ahead", but_decode(asynchronous=0), "no asynchronous load in the loop that decodes"),
    ("codes that are waited for", but_decode(wide_loads=1), "1 wide and 3 narrow, for 1 scales a thread"),
    ("codes word by word", but_decode(narrow_loads=12), "0 wide and 12 narrow"),
]


@pytest.mark.parametrize("record, fault", [f[1:] for f in FAULTS_4BIT], ids=[f[0] for f in FAULTS_4BIT])
def test_judge_finds_the_fault_of_a_kernel_that_decodes(record, fault):
    """Catches a 4-bit kernel whose decoding or loads are no longer looked at."""
    found = judge(record)
    assert len(found) == 1 and fault in found[0], found


PASSES_4BIT = [
    ("scales loaded synchronously, on purpose", DECODES),
    ("four loads for each of two scales", but_decode(scales=2, narrow_loads=8)),
    ("no limit was worked out for sm_80", but_decode(arch=80, per_element=13.0)),
    ("fp32 products are counted with the rest", but_decode(per_element=30.0, dots=[Dot(64, 16, 32, "f32")], matrix={})),
    ("rows of W that no wide copy can read", but_decode(aligned=False, narrow_loads=12)),
    ("dequantization: one load, no product", but_decode(dots=[], wide_loads=1, asynchronous=0, **{"matrix": {}})),
    ("AMD is not read", but(DECODES, arch=942, decode=None, matrix={"v_mfma": 2}, shared=0)),
]


@pytest.mark.parametrize("record", [p[1] for p in PASSES_4BIT], ids=[p[0] for p in PASSES_4BIT])
def test_judge_passes_a_kernel_that_decodes_well(record):
    """Catches scales that are taken for codes, and limits asked where they were not worked out."""
    assert judge(record) == []


# Four elements a thread: a short loop of another kind, then the one that decodes, with a scale's multiplication in it.
SASS_4BIT = """
        /*0000*/                   LDG.E.128 R2, desc[UR4][R4.64] ;
        /*0010*/                   HMMA.16816.F32.BF16 R24, R8, R2, R24 ;
        /*0020*/               @P1 BRA 0x0 ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R2], desc[UR4][R4.64] ;
        /*0040*/                   LDG.E.U8 R3, desc[UR4][R4.64] ;
        /*0050*/                   LDG.E.64 R3, desc[UR4][R4.64] ;
        /*0060*/                   LDG.E R3, desc[UR4][R4.64] ;
        /*0070*/                   FMUL R3, R3, R5 ;
        /*0080*/                   FMUL R3, R3, R5 ;
        /*0090*/                   FMUL R3, R3, R5 ;
        /*00a0*/                   FMUL R3, R3, R5 ;
        /*00b0*/                   FMUL R3, R3, R5 ;
        /*00c0*/                   HMMA.16816.F32.BF16 R24, R8, R2, R24 ;
        /*00d0*/                   WARPGROUP.ARRIVE ;
        /*00e0*/                   NOP ;
        /*00f0*/               @P1 BRA 0x30 ;
"""
FOUR = Turn(elements=128, scales=8, products=16 * 8 * 16, threads=32)


def test_the_loop_that_decodes_is_read():
    """Catches matrix instructions counted as decoding, another loop's loads, and a wide load taken for a scale's."""
    found = read_decode(parse_sass(SASS_4BIT), FOUR)
    assert found == Decode(per_element=10 / 4, elements=4, scales=1, asynchronous=1, wide_loads=1, narrow_loads=2)
    assert read_decode(parse_sass(SASS_4BIT), dataclasses.replace(FOUR, elements=256)) is None
    whole = read_decode(parse_sass(SASS_4BIT), dataclasses.replace(FOUR, loop=False))
    assert whole is not None and whole.per_element == 12 / 4, "of the whole program"


def test_turns_that_the_compiler_joined_are_told_apart():
    """Catches an unrolled loop that seems to take twice the instructions, and doubled products taken for one."""
    joined = SASS_4BIT.replace("FMUL R3, R3, R5 ;", "FMUL R3, R3, R5 ;\n        /*00b1*/ FMUL R3, R3, R5 ;")
    one = read_decode(parse_sass(joined), FOUR)
    assert one is not None and one.elements == 4, "twice the multiplications alone are one turn"
    twice = joined.replace(
        "HMMA.16816.F32.BF16 R24, R8, R2, R24 ;", "HMMA.16816.F32 R2 ;\n  /*00c1*/ HMMA.16816.F32 R2 ;"
    )
    two = read_decode(parse_sass(twice), FOUR)
    assert two is not None and two.elements == 8 and two.per_element == pytest.approx(15 / 8, abs=0.01)


def test_every_4bit_kernel_has_a_turn_and_the_right_one():
    """Catches a kernel or a constant that was renamed, after which nothing would be counted."""
    for arch in (89, 90):
        for case in quick_cases_4bit():
            for call in case.launches(arch):
                constants = {name: str(value) for name, value in call.constants.items()}
                turn = turn_of(call.kernel.__name__, constants, call.num_warps)
                assert (turn is not None) == ("packed_ptr" in call.args), call.name
                if turn is not None and turn.loop:
                    assert turn.elements % turn.threads == 0 and turn.products % turn.elements == 0
                    assert turn.elements == 64 * turn.scales or call.kernel.__name__.startswith("_decode")


def test_every_architecture_expects_its_own_instruction():
    """Catches an architecture that was added to the table and is not asked for anything."""
    wide = [Dot(128, 128, 64, "f16")]
    expected = {
        80: "HMMA",
        86: "HMMA",
        89: "HMMA",
        90: "HGMMA",
        100: "UTCMMA",
        120: "HMMA",
        942: "v_mfma",
        1100: "v_wmma",
    }
    assert {arch: expected_matrix_instruction(arch, wide, 4) for arch in ARCHITECTURES} == expected
    assert expected_matrix_instruction(90, [Dot(64, 64, 32, "f32")], 4) == ""


def test_resource_usage_is_read():
    """Catches local memory that is not counted with the stack, and a tool whose output has changed."""
    assert parse_resource_usage(USAGE) == (199, 24)
    with pytest.raises(ValueError, match="REG"):
        parse_resource_usage("cuobjdump fatal: nothing here")


def test_sass_is_read():
    """Catches a predicated instruction that is not seen, and a jump whose target is not found."""
    code = parse_sass(SASS)
    assert len(code) == 12
    assert code[1] == Instruction(0x10, "LDGSTS.E.BYPASS.128")
    assert code[4] == Instruction(0x40, "BRA", 0x30)
    assert [i.opcode.split(".")[0] for i in code if i.target is None][3:5] == ["SYNCS", "UTMALDG"]
    hinted = parse_sass("        /*1a90*/      BRA.U !UP0, 0x1440      &req={1,0} &rd=0x1 ?trans5;  /* 0x0 */")
    assert hinted == [Instruction(0x1A90, "BRA.U", 0x1440)]


def test_the_main_loop_is_found():
    """Catches the wait inside the main loop, or the prologue, being taken for the loop that loads."""
    assert pipelined_loops(parse_sass(SASS)) == [Loop(asynchronous=2, synchronous=0, matrix=1)]
    with_ldg = SASS.replace("SYNCS.PHASECHK.TRANS64.TRYWAIT P0,", "LDG.E R9,")
    assert pipelined_loops(parse_sass(with_ldg)) == [Loop(asynchronous=2, synchronous=1, matrix=1)]


def test_matrix_instructions_that_wait_for_each_other_are_a_fault():
    """Catches a GEMM that the assembler has serialized: a wait after each instruction, not after each product."""
    second = (
        "        /*0024*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8].tnspB, R24, gsb0 ; /* 0x0 */\n"
    )
    one_group = SASS.replace("        /*0030*/", second + "        /*0030*/")
    serial = one_group.replace("gdesc[UR8], R24 ;", "gdesc[UR8], R24, gsb0 ;")
    fault = "matrix instructions: each of the 2 in a loop waits for the one before"
    for sass, awaited, faults in ((one_group, 1, []), (serial, 2, [fault])):
        loops = pipelined_loops(parse_sass(sass))
        assert loops == [Loop(asynchronous=2, synchronous=0, matrix=2, awaited=awaited)]
        gemm = {"BLOCK_M": "128", "BLOCK_N": "256", "BLOCK_K": "64"}
        assert judge(but(loops=loops, constants=gemm)) == faults
        assert judge(but(loops=loops)) == []  # no GEMM


def test_nvidia_code_is_read():
    """Catches a spill or a matrix instruction that is miscounted."""
    code = read_nvidia(USAGE, SASS, shared=4096)
    assert (code.registers, code.spills, code.stack, code.shared) == (199, 1, 24, 4096)
    assert code.matrix == {"HGMMA": 1} and code.asynchronous == {"LDGSTS": 2, "UTMALDG": 1}
    with pytest.raises(ValueError, match="no instruction"):
        read_nvidia(USAGE, "", shared=0)


def test_amd_code_is_read():
    """Catches spilled registers or scratch being left out, and scalars kept in vector lanes taken for spills."""
    in_lanes = AMD.replace("fixed_size: 12", "fixed_size: 0").replace("vgpr_spill_count: 2", "vgpr_spill_count: 0")
    assert read_amd(in_lanes, shared=0).spills == 0
    code = read_amd(AMD, shared=0)
    assert (code.registers, code.spills, code.stack, code.shared) == (190, 3, 12, 4096)
    assert code.matrix == {"v_mfma": 2}
    with pytest.raises(ValueError, match="private_segment_fixed_size"):
        read_amd("nothing", shared=0)


def test_products_are_read_from_tritons_ir():
    """Catches fp32 products taken for 16-bit ones, and n taken for k."""
    assert parse_dots(TTIR) == [Dot(128, 256, 16, "bf16"), Dot(64, 8, 32, "f32")]


def _kernel(x_ptr, desc, seed_ptr, M, N, one, big, scale, BLOCK: tl.constexpr):
    """Stands for a kernel: only its parameters are looked at."""


def _call(**changes: object) -> Call:
    x = torch.empty(64, 48, dtype=torch.bfloat16, device="meta")
    args = {"x_ptr": x, "desc": TensorDescriptor.from_tensor(x, [32, 16]), "seed_ptr": None, "M": 64, "N": 48}
    kernel = JITFunction(_kernel, do_not_specialize=["M"])
    args |= {"one": 1, "big": 2**40 + 1, "scale": 0.5}
    return Call("", kernel, (1, 1, 1), args | changes, {"BLOCK": 32}, num_warps=8, num_stages=3)


def test_types_of_a_launch():
    """Catches types, constants or divisibility that are not those of a real launch."""
    source, options, _ = specialise(_call(), 90)
    assert {name: kind for name, kind in source.signature.items() if name != "desc"} == {
        "x_ptr": "*bf16",
        "seed_ptr": "constexpr",
        "M": "i32",
        "N": "i32",
        "one": "constexpr",
        "big": "i64",
        "scale": "fp32",
        "BLOCK": "constexpr",
    }
    assert source.signature["desc"].startswith("tensordesc<bf16[32, 16]")
    assert source.constants == {(2,): None, (5,): 1, (8,): 32}
    divisible = {path for path, found in source.attrs.items() if ["tt.divisibility", 16] in found}
    assert divisible == {(0,), (4,)}, "the pointer and N; M is not specialised"
    assert (options["num_warps"], options["num_stages"]) == (8, 3)


def test_equal_launches_are_compiled_once():
    """Catches a key that leaves out divisibility, or one that tells apart what Triton does not."""
    keys = [specialise(_call(**changes), 90)[2] for changes in ({}, {"M": 65, "N": 96}, {"N": 49}, {"one": 2})]
    assert keys[0] == keys[1] and len(set(keys)) == 3
    assert specialise(_call(), 89)[2] != keys[0]


def test_an_offset_takes_divisibility_away():
    """Catches meta tensors whose offset is not seen, so that an unaligned view is compiled as an aligned one."""
    x = torch.empty(64, 49, dtype=torch.bfloat16, device="meta").view(-1)[1 : 1 + 64 * 48].view(64, 48)
    source, _, _ = specialise(_call(x_ptr=x), 90)
    assert ["tt.divisibility", 16] not in source.attrs.get((0,), [])
    assert not rows_are_aligned(x)


@pytest.mark.parametrize(
    "shape, strides, aligned",
    [
        ((64, 48), (48, 1), True),
        ((48, 64), (1, 48), True),
        ((1, 48), (7, 1), True),
        ((64, 40), (40, 1), False),
        ((64, 40), (48, 1), False),
        ((64, 48), (56, 1), False),
        ((64, 48), (96, 2), False),
    ],
)
def test_aligned_rows(shape, strides, aligned):
    """Catches a matrix that is asked for asynchronous loads it cannot have, or excused from those it can."""
    assert rows_are_aligned(torch.empty_strided(shape, strides, device="meta")) is aligned


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_compiler_that_dies_is_a_fault_of_its_kernel_alone(monkeypatch, jobs):
    """Catches one crash of the compiler that ends the check, or is laid at another kernel's door."""
    work = [Compilation(None, {}, but(kernel=f"kernel{i}")) for i in range(5)]
    for compilation in work:
        compilation.record.code = None

    def compile_one(index: int) -> Record:
        if index in (1, 3):
            os._exit(1)
        return work[index].record

    monkeypatch.setattr(static, "_compile_one", compile_one)
    monkeypatch.setattr(compile_one, "__module__", static.__name__)
    monkeypatch.setattr(compile_one, "__qualname__", "_compile_one")
    records = sorted(static.compile_all(work, jobs), key=lambda record: record.kernel)
    assert [record.kernel for record in records] == [f"kernel{i}" for i in range(5)]
    assert [bool(record.faults) for record in records] == [False, True, False, True, False]
    assert records[1].faults == ["does not compile: the compiler ended its process"]


@dataclasses.dataclass
class _Case:
    """Stands for a case with one launch."""

    name: str
    aligned: bool
    call: Call

    def label(self) -> str:
        return self.name

    def launches(self, arch: int) -> list[Call]:
        return [self.call]


def test_cases_that_compile_the_same_share_a_record():
    """Catches a record that forgets a case or its grid, or keeps an alignment that not all of its cases have."""
    first, second, third = _call(), _call(M=65), _call(N=49)
    second.grid = (7, 2, 1)
    cases = [_Case("a", True, first), _Case("b", False, second), _Case("c", True, third)]
    records = [compilation.record for compilation in compilations(cases, [90])]
    assert [record.cases for record in records] == [["a", "b"], ["c"]]
    assert [record.aligned for record in records] == [False, True]
    assert records[0].grid == (7, 2, 1) and all(record.all_aligned for record in records)


def test_environment_of_the_check():
    """Catches a check that runs in the interpreter, or with another Triton than the one asked for."""
    before = {"TRITON_INTERPRET": "1", "PYTHONPATH": f"/else{os.pathsep}{ROOT}", "HOME": "/home"}
    after = static.child_environment(before, "/other/triton")
    assert "TRITON_INTERPRET" not in after and after["HOME"] == "/home"
    assert after["PYTHONPATH"].split(os.pathsep) == ["/other/triton", str(ROOT), str(ROOT / "kernels"), "/else"]
    assert static.child_environment(after, "/other/triton") == after, "would start itself again for ever"


@pytest.mark.parametrize("argv", [["--arch", "75"], ["--jobs", "0"], ["--triton", "/nowhere"], ["--dtype", "fp8"]])
def test_command_line_refuses(argv, capsys):
    """Catches a misspelt option that silently checks nothing."""
    with pytest.raises(SystemExit):
        static.parse_arguments(argv)
    assert argv[-1] in capsys.readouterr().err


def test_report_names_each_failure(tmp_path):
    """Catches a failure that the table, the list or the file leaves out."""
    bad = but(spills=3, arch=90)
    bad.faults = judge(bad)
    assert len(bad.faults) == 2
    lines = static_report.failures([GOOD, bad]).splitlines()
    assert len(lines) == 2 and all("sm_90 _kernel [M128 w8 s4] M8192" in line for line in lines)
    assert [line[11] for line in map(static_report.row, [GOOD, bad])] == ["ok", "FAIL"]
    assert "sm_80" in static_report.summary([GOOD, bad]) and static_report.failures([GOOD]) == ""
    static_report.write_json(tmp_path / "a" / "b.json", [GOOD, bad], {"triton": "0"})
    written = json.loads((tmp_path / "a" / "b.json").read_text())
    assert [record["faults"] for record in written["records"]] == [[], bad.faults]


def test_the_grid_covers_what_it_must():
    """Catches a size, dtype or path that is dropped from the grid."""
    cases = all_cases()
    assert LoraLinear(**S1) in cases and LoraLinear(**S2) in cases
    linear = [case for case in cases if isinstance(case, LoraLinear)]
    assert {case.M for case in linear} >= {1, 16, 512, 4096, 8192} and {case.R for case in linear} >= {8, 16, 64, 128}
    assert {(case.K, case.N) for case in linear} >= set(LLAMA_8B)
    assert {case.dtype for case in linear} == {torch.float32, torch.float16, torch.bfloat16}
    for name in ("masters", "dropout", "bias", "conv1d", "aligned", "dx"):
        assert {getattr(case, name) for case in linear} == {False, True}, name
    paths = {case.plan(90) if case.path == "auto" else case.path for case in linear}
    assert paths == {"triton", "cublas", "decode"}


def test_the_grid_over_4bit_weights_covers_what_it_must():
    """Catches a size, dtype, option or path over 4-bit weights that is dropped from the grid."""
    cases = all_cases()
    dense = [case for case in cases if isinstance(case, Dequantize4bit)]
    assert {(case.N, case.K) for case in dense} == set(DEQUANTIZED) and any(case.K % 2 for case in dense)
    linear = [case for case in cases if isinstance(case, LoraLinear4bit)]
    assert {case.M for case in linear} >= {1, 16, 64, 128, 512} and {case.R for case in linear} == {16, 36, 64}
    assert {(case.K, case.N) for case in linear} >= set(LLAMA_8B)
    for found in (dense, linear):
        assert {case.dtype for case in found} == {torch.float32, torch.float16, torch.bfloat16}
        assert {case.nested for case in found} == {False, True}
    for name in ("masters", "dropout", "bias", "aligned"):
        assert {getattr(case, name) for case in linear} == {False, True}, name
    paths = {case.plan(arch).partition(":")[0] for case in linear for arch in (89, 90)}
    assert paths == {"decode_4bit", "fused_4bit", "dequantize"}
    assert set(quick_cases_4bit()) <= set(cases)


@pytest.mark.parametrize("M, kernels", [(1, ["_decode_4bit", "_base_4bit_t"]), (64, ["_base_4bit_k", "_base_4bit_t"])])
def test_4bit_launches_are_forward_and_backward(M, kernels):
    """Catches a case whose backward is left out, or whose weight is dense after all."""
    names = [
        call.kernel.__name__ for call in LoraLinear4bit(M, 4096, 4096, 16).launches(89) if "packed_ptr" in call.args
    ]
    assert len(names) == 2 and all(name.startswith(start) for name, start in zip(names, kernels, strict=True)), names
    large = LoraLinear4bit(8192, 4096, 4096, 16)
    names = [call.name for call in large.launches(90)]
    products = [after for name, after in itertools.pairwise(names) if name == "dequantize"]
    assert large.plan(90).startswith("dequantize:") and products == ["base + expand"] * 2


@pytest.mark.parametrize("arch", [80, 89, 90])
@pytest.mark.parametrize("M, K, N, R", [tuple(S.values()) for S in (S1, S2)] + [(8192, *kn, 16) for kn in LLAMA_8B])
def test_plan_picks_triton_kernels_for_real_shapes(M, K, N, R, arch):
    """Catches a plan that steps back to plain PyTorch on the shapes that the library is for."""
    case = LoraLinear(M, K, N, R)
    assert case.plan(arch) == "triton" or (arch, N) == (90, 1024)  # few large tiles
    launches = case.launches(arch)
    assert launches and all(isinstance(call, Call) and min(call.grid) > 0 for call in launches)


def test_tile_of_the_headline_shape_on_hopper():
    """Catches a table that gives S1 a tile too small to feed Hopper's matrix units."""
    gemms = [call for call in LoraLinear(**S1).launches(90) if call.name == "base + expand"]
    gemms += [call for call in LoraLinear(**S1, path="triton").launches(90) if call.name == "base + expand"]
    assert len(gemms) == 4, "forward and dX, as planned and on the Triton path"
    for call in gemms:
        assert call.constants["BLOCK_M"] >= 128 and call.constants["BLOCK_N"] >= 256


@pytest.mark.slow
def test_quick_check_passes_on_real_targets(tmp_path):
    """Catches a kernel that spills, misses its matrix instruction or loads synchronously, on real targets."""
    command = [sys.executable, "-m", "bench.static", "--quick", "--arch", "80", "90", "gfx942"]
    command += ["--kernel", "lora", "decode_planes", "--json"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([*command, tmp_path / "out.json"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    records = json.loads((tmp_path / "out.json").read_text())["records"]
    assert {record["arch"] for record in records} == {80, 90, 942}
    seen = {(record["arch"], name) for record in records for name in record["code"]["matrix"]}
    assert seen >= {(80, "HMMA"), (90, "HGMMA"), (942, "v_mfma")}
    gemm = next(r for r in records if r["arch"] == 90 and r["launch"] == "base + expand")
    assert gemm["constants"]["BLOCK_N"] == "256" and gemm["code"]["matrix"]["HGMMA"] > 0


@pytest.mark.slow
def test_quick_check_of_4bit_kernels_passes_on_a_real_target(tmp_path):
    """Catches a figure that is no longer read off real code, and loads of scales taken for those of codes."""
    command = [sys.executable, "-m", "bench.static", "--quick", "--arch", "90", "--kernel", "_base_4bit", "_dequantize"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [*command, "--json", tmp_path / "out.json"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    records = json.loads((tmp_path / "out.json").read_text())["records"]
    assert {r["kernel"] for r in records} == {
        "_base_4bit_kernel",
        "_base_4bit_transposed_kernel",
        "_dequantize_4bit_kernel",
    }
    for record in records:
        assert 4 < record["code"]["decode"]["per_element"] <= 12, record
