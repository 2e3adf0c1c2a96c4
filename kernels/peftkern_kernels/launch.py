"""One kernel launch as a value: what runs, on which grid, with which arguments, and what it moves.

The builders of this package return `Call`s in place of launching. An operation runs its list of calls; the static check
(`bench/static.py`) compiles the very same list from tensors on the meta device for every architecture, and the
benchmark adds up its bytes and operations. So what is checked without a GPU is what is launched on one.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch


@dataclass(slots=True)
class Call:
    """A kernel launch that has not happened yet.

    Attributes:
        name: the operation's part in words, such as "shrink" or "base + expand".
        kernel: the `triton.jit` function.
        grid: programs along each axis, all at least 1.
        args: run-time arguments by name: tensors, host-side tensor descriptors, Python ints and floats, None.
        constants: `tl.constexpr` arguments by name.
        num_warps, num_stages: launch options.
        bytes: bytes that must cross device memory, each operand counted once.
        flops: floating-point operations, 2 for each multiply-add.
        options: further compile options, such as `enable_fp_fusion`.
    """

    name: str
    kernel: Any
    grid: tuple[int, int, int]
    args: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    bytes: int = 0
    flops: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def run(self) -> Any:
        """Launch on the current stream of the tensors' device; returns the compiled kernel (interpreted: None)."""
        return self.kernel[self.grid](
            **self.args, **self.constants, num_warps=self.num_warps, num_stages=self.num_stages, **self.options
        )


@dataclass(slots=True)
class TorchCall:
    """A library call (cuBLAS through torch) that stands between kernel launches in an operation's list."""

    name: str
    function: Any
    args: tuple[Any, ...]
    bytes: int = 0
    flops: int = 0

    def run(self) -> None:
        self.function(*self.args)


_recorder = threading.local()


def scratch(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory that a list of launches uses between them, uninitialised; replays take it anew (see replay.py)."""
    turns = getattr(_recorder, "turns", None)
    taken = None if turns is None else turns.spare(shape, dtype)
    if taken is None:
        taken = torch.empty(shape, dtype=dtype, device=device)
        record = getattr(_recorder, "taken", None)
        if record is not None:
            record.append(taken)
        if turns is not None:
            turns.taken.append(taken)
    return taken


class Turns:
    """Scratch memory that parts of one list of launches take in turn.

    What one part took may be another's as soon as all launches of the first are in the list, since a launch begins when
    the one before it has ended. Each part is built within `turn`.
    """

    def __init__(self) -> None:
        self.taken: list[torch.Tensor] = []
        self._spare: list[torch.Tensor] = []

    @contextmanager
    def turn(self) -> Iterator[None]:
        before = getattr(_recorder, "turns", None)
        _recorder.turns = self
        try:
            yield
        finally:
            _recorder.turns = before
            self._spare += self.taken
            self.taken = []

    def spare(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
        """The smallest of an earlier part's memory that is large enough, in this shape; None if there is none."""
        size = math.prod(shape) * dtype.itemsize
        fitting = [i for i, t in enumerate(self._spare) if t.nbytes >= size > 0]
        if not fitting:
            return None
        whole = self._spare.pop(min(fitting, key=lambda i: self._spare[i].nbytes))
        self.taken.append(whole)
        return whole.view(-1).view(torch.uint8)[:size].view(dtype).view(shape)


@contextmanager
def recorded_scratch() -> Iterator[list[torch.Tensor]]:
    """Collect what `scratch` hands out to this thread within the block."""
    before = getattr(_recorder, "taken", None)
    taken: list[torch.Tensor] = []
    _recorder.taken = taken
    try:
        yield taken
    finally:
        _recorder.taken = before


def run_all(calls: Iterable[Call | TorchCall], device: torch.device | None = None) -> None:
    """Run calls in order on the current stream of `device`, which a model spread over several GPUs must name: Triton
    launches on the current device, wherever the tensors are."""
    with torch.cuda.device(device) if device is not None and device.type == "cuda" else nullcontext():
        for call in calls:
            call.run()


def compile_options(arch: int) -> dict[str, int]:
    """Compile options of kernels with a matrix product, beside warps and stages.

    Left to itself, NVIDIA's assembler spills a few scalars to stay below the next step of occupancy, which these
    kernels cannot use: about one program on each multiprocessor, held by its shared memory. So it may take them all.
    """
    return {"maxnreg": 255} if 0 < arch < 900 else {}


def light_options(arch: int) -> dict[str, int]:
    """Compile options of small kernels, of which many programs share a multiprocessor: mostly the assembler's own.

    Its limit costs them nothing but on sm_80 and sm_100, where it spills two or four scalars; there it is lifted.
    """
    return compile_options(arch) if arch == 80 or 100 <= arch < 120 else {}


# Projections of one x that a launch takes (projections.py): here, for the plan asks where there is no triton.
MOST_PROJECTIONS = 4


def cdiv(a: int, b: int) -> int:
    """Ceiling of a / b for positive integers."""
    return -(-a // b)


class Sized(Protocol):
    """What has elements of a size, as a tensor has."""

    def numel(self) -> int: ...
    def element_size(self) -> int: ...


def nbytes(*tensors: Sized | None) -> int:
    """Bytes of the tensors' elements, for `Call.bytes`."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def strides(t: torch.Tensor | None, *names: str) -> dict[str, int]:
    """Arguments `stride_<name>` for the axes of `t` in order, zeros where there is no tensor."""
    return {f"stride_{name}": 0 if t is None else t.stride(axis) for axis, name in enumerate(names)}


def is_aligned(t: torch.Tensor) -> bool:
    """Whether rows start on 16-byte boundaries and the last stride is 1: what vector and TMA loads ask for.

    Rows that lie on each other, as those of an expanded gradient (stride 0), are not: a descriptor's stride must not
    be below its row's length.
    """
    if t.dim() != 2 or t.stride(1) != 1 or t.stride(0) < t.shape[1]:
        return False
    return t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0
