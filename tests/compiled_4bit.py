"""Instructions of the compiled 4-bit kernels, for tests: compiled in a process of its own, without the interpreter.

`python tests/compiled_4bit.py decode|dequantize ARCH` prints them as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
SIZE, BLOCKSIZE = 4096, 64


def instructions_of(kernel: str, arch: int, cache: Path) -> dict[str, Any]:
    """What `kernel` ("decode" or "dequantize") is made of on an NVIDIA architecture; see `main`."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels")))}
    command = [sys.executable, __file__, kernel, str(arch)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


def call_of(kernel: str, arch: int) -> Any:
    """The launch, from tensors on the meta device: N and K 4096, double quantization, bf16, one token."""
    from peftkern_kernels.dequantize_4bit import dequantize_4bit_calls
    from peftkern_kernels.format_4bit import Packed4bit
    from peftkern_kernels.lora_decode_4bit import decode_4bit_calls

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    blocks = SIZE * SIZE // BLOCKSIZE
    codes, absmax = (empty(size, dtype=torch.uint8) for size in (SIZE * SIZE // 2, blocks))
    code, nested_absmax, nested_code, offset = (empty(n, dtype=torch.float32) for n in (16, blocks // 256, 256, 1))
    weight = Packed4bit(codes, absmax, code, nested_absmax, nested_code, offset, SIZE, SIZE, BLOCKSIZE)
    if kernel == "dequantize":
        return dequantize_4bit_calls(weight, empty(SIZE, SIZE), arch=arch)[0]
    x, a, b, out, s = empty(1, SIZE), empty(16, SIZE), empty(SIZE, 16), empty(1, SIZE), empty(1, 16)
    return decode_4bit_calls(x, weight, a, b, 1.0, out, s, arch=arch)[0]


def main(kernel: str, arch: int) -> dict[str, Any]:
    """Instructions an element, without the matrix product's: of the whole kernel ("dequantize"), or of its main loop,
    the shortest that multiplies matrices and scales ("decode"); with opcodes, loads and stores, and spills."""
    import triton

    from bench.static_compile import _cuobjdump, read_code, specialise, target_of
    from bench.static_judge import count_matrix_instructions, parse_sass

    call = call_of(kernel, arch)
    source, options, _ = specialise(call, arch)
    compiled = triton.compile(source, target=target_of(arch), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        instructions = parse_sass(_cuobjdump("-sass", file.name))
    constants, threads = call.constants, 32 * call.num_warps
    if kernel == "decode":
        spans = [(i.target, i.address) for i in instructions if i.target is not None and i.target < i.address]
        loops = [[i for i in instructions if start <= i.address <= stop] for start, stop in spans]
        scaling = [loop for loop in loops if any(i.opcode.startswith("FMUL") for i in loop)]
        instructions = min((p for p in scaling if count_matrix_instructions([i.opcode for i in p])), key=len)
        elements = constants["BLOCK_N"] * constants["BLOCK_K"] / threads
    else:
        elements = constants["BLOCK_WORDS"] * constants["WORD_CODES"] / threads
    code = read_code(compiled, arch)
    opcodes = Counter(i.opcode.split(".")[0] for i in instructions if not i.opcode.startswith("NOP"))
    outside = sum(n for name, n in opcodes.items() if "MMA" not in name and not name.startswith("WARPGROUP"))
    return {
        "per_element": outside / elements,
        "opcodes": opcodes,
        "loads": sorted({i.opcode for i in instructions if i.opcode.startswith("LDG.")}),
        "stores": sorted({i.opcode for i in instructions if i.opcode.startswith("STG.")}),
        "matrix": code.matrix,
        "registers": code.registers,
        "spills": code.spills + code.stack,
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]))))
