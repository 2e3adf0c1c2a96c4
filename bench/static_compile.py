"""From a launch to its compiled code, without a GPU.

The types, constants and divisibility that a launch's arguments have for Triton are derived here by Triton's own
functions, those that `kernel[grid](...)` goes through, given a target in place of the current device's. Meta tensors
serve: their data pointer counts from 0, as that of an allocation does from a multiple of 16.
"""

from __future__ import annotations

import functools
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from bench.static_cases import Case
from bench.static_decode import Turn, read_decode, turn_of
from bench.static_judge import ARCHITECTURES, Code, Record, judge, parse_dots, parse_sass, read_amd, read_nvidia
from peftkern_kernels.launch import Call

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(slots=True)
class Compilation:
    """One compilation that the cases ask for: Triton's source and options, and the record to be filled."""

    source: ASTSource
    options: dict[str, Any]
    record: Record


def target_of(arch: int) -> GPUTarget:
    """Triton's target for an architecture number."""
    return {942: GPUTarget("hip", "gfx942", 64), 1100: GPUTarget("hip", "gfx1100", 32)}.get(
        arch, GPUTarget("cuda", arch, 32)
    )


@functools.cache
def _binder(kernel: Any, arch: int) -> tuple[Any, Any]:
    """Triton's backend for an architecture, and the function by which it types a launch's arguments."""
    backend = make_backend(target_of(arch))
    return backend, create_function_from_signature(kernel.signature, kernel.params, backend)


def specialise(call: Call, arch: int) -> tuple[ASTSource, dict[str, Any], str]:
    """What a launch compiles on an architecture: (source, options, a key that is equal for equal compilations)."""
    kernel = call.kernel
    backend, binder = _binder(kernel, arch)
    arguments = {**call.args, **call.constants, **call.options}
    arguments |= {"num_warps": call.num_warps, "num_stages": call.num_stages}
    bound, specialization, rest = binder(**arguments)
    options, signature, constants, attributes = kernel._pack_args(backend, arguments, bound, specialization, rest)
    source = ASTSource(kernel, signature, constants, attributes)
    return source, options.__dict__, f"{arch}-{source.hash()}-{options.hash()}"


def matrices(call: Call) -> list[torch.Tensor]:
    """The launch's arguments with two axes or more, those behind tensor descriptors included."""
    tensors = (getattr(value, "base", None) if hasattr(value, "block_shape") else value for value in call.args.values())
    return [t for t in tensors if isinstance(t, torch.Tensor) and t.dim() >= 2]


def rows_are_aligned(t: torch.Tensor) -> bool:
    """Whether one axis has stride 1, and its size, the other strides and the start are multiples of 16 elements."""
    axes = [(size, stride) for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1]
    inner = [size for size, stride in axes if stride == 1]
    outer = [stride for _, stride in axes if stride != 1]
    return len(inner) == 1 and all(number % 16 == 0 for number in (*inner, *outer, t.storage_offset()))


def compilations(cases: Iterable[Case], architectures: Iterable[int]) -> list[Compilation]:
    """The distinct compilations of all launches of the cases, each with the cases that share it."""
    found: dict[str, Compilation] = {}
    # Cases outermost, so that the first results of a long run come from every architecture.
    for case, arch in product(cases, architectures):
        for call in case.launches(arch):
            source, options, key = specialise(call, arch)
            all_aligned = all(map(rows_are_aligned, matrices(call)))
            if key not in found:
                found[key] = Compilation(source, options, _record(call, arch, source, case.aligned, all_aligned))
            record = found[key].record
            if case.label() not in record.cases:
                record.cases.append(case.label())
            record.aligned &= case.aligned
            record.all_aligned &= all_aligned
            record.grid = tuple(map(max, record.grid, call.grid))  # type: ignore[assignment]
    return list(found.values())


def _record(call: Call, arch: int, source: ASTSource, aligned: bool, all_aligned: bool) -> Record:
    return Record(
        arch=arch,
        kernel=call.kernel.__name__,
        launch=call.name,
        cases=[],
        constants={name: str(value) for name, value in call.constants.items()},
        signature={name: kind for name, kind in source.signature.items() if kind != "constexpr"},
        num_warps=call.num_warps,
        num_stages=call.num_stages,
        grid=call.grid,
        aligned=aligned,
        all_aligned=all_aligned,
    )


def compile_and_judge(compilation: Compilation) -> Record:
    """Compile (or take from Triton's cache), read the code and judge it. A compiler's error becomes the record's."""
    record = compilation.record
    try:
        kernel = triton.compile(compilation.source, target=target_of(record.arch), options=compilation.options)
    except Exception as error:  # whatever a compiler's passes may raise is a finding, not a failure of the check
        record.error = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    else:
        record.dots = parse_dots(kernel.asm["ttir"])
        turn = turn_of(record.kernel, record.constants, record.num_warps)
        record.code = read_code(kernel, record.arch, turn)
    record.faults = judge(record)
    return record


def read_code(kernel: Any, arch: int, turn: Turn | None = None) -> Code:
    """What Triton's compiled kernel is made of; `turn` says what its main loop decodes, if it decodes anything."""
    shared = kernel.metadata.shared
    if ARCHITECTURES[arch].vendor == "amd":
        return read_amd(kernel.asm["amdgcn"], shared)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        sass = _cuobjdump("-sass", file.name)
        code = read_nvidia(_cuobjdump("-res-usage", file.name), sass, shared)
    if turn is not None:
        code.decode = read_decode(parse_sass(sass), turn)
    return code


def _cuobjdump(flag: str, file: str) -> str:
    """Output of the tool that Triton's package carries.

    Raises:
        RuntimeError: if it fails.
    """
    done = subprocess.run([TOOLS / "cuobjdump", flag, file], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"cuobjdump {flag}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
