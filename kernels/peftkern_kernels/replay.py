"""Launches that are worked out once for a situation, and launched again with other tensors.

A step repeats the same few launches with the same shapes thousands of times. Building their `Call`s and binding some
thirty arguments of each by name takes Python about 100 us a launch on a server's core, more than many of the kernels
run. So the first time in a situation (shapes, strides, dtypes, alignment, numbers) the list is built, run, and kept as
compiled kernels and positional arguments with holes; from then on the holes are filled with addresses.

What is kept holds no tensor. Every address must be accounted for: it lies in one of the tensors that the caller names,
or in scratch memory that a builder took by `launch.scratch` and that is taken anew each time. A list with any other
address in it is run as it stands and never kept. So is everything where kernels do not run compiled (the interpreter).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .launch import Call, TorchCall, recorded_scratch, run_all

Build = Callable[[], Sequence[Call | TorchCall]]
Produce = Callable[[], tuple[Sequence[torch.Tensor | None], Sequence[Call | TorchCall]]]
Scratch = tuple[int, int, torch.Size, torch.dtype]  # bytes into the block, bytes, and as what a library call takes it
# A result: absent, one of the tensors given, or new, of a shape, strides and dtype.
Made = None | int | tuple[torch.Size, tuple[int, ...], torch.dtype]
MOST_KEPT = 4096  # situations; then all are forgotten, for a program with so many has no use for them
SCRATCH_ALIGNMENT = 256


@dataclass(frozen=True, slots=True)
class Hole:
    """An argument that is an address: `offset` bytes into tensor (or scratch) number `source`, at `position`.

    `descriptor` is a tensor descriptor whose base is to lie there; `view` the (size, stride, storage offset beyond the
    source's) of a tensor argument of a library call, None for the source itself.
    """

    position: int
    source: int
    offset: int
    descriptor: Any = None
    view: tuple[torch.Size, tuple[int, ...], int] | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """One launch: what runs, its arguments, and the holes among them."""

    run: Callable[..., Any]
    arguments: list[Any]
    holes: tuple[Hole, ...]
    on_tensors: bool  # a library call, which takes tensors and no stream


@dataclass(frozen=True, slots=True)
class Recording:
    """The steps of one situation, the parts of one block of scratch memory, and how the results come to be."""

    steps: tuple[Step, ...]
    scratch: tuple[Scratch, ...]
    scratch_bytes: int
    results: tuple[Made, ...] = ()


class Address:
    """What Triton asks of the base of a tensor descriptor."""

    __slots__ = ("value",)

    def __init__(self, value: int) -> None:
        self.value = value

    def data_ptr(self) -> int:
        return self.value


_kept: dict[Hashable, Recording] = {}


def situation(t: torch.Tensor | None) -> Hashable:
    """All that a builder may read of a tensor, and what Triton specializes a pointer on."""
    return None if t is None else (t.shape, t.stride(), t.dtype, t.data_ptr() & 15)


def run(key: Hashable, tensors: Sequence[torch.Tensor | None], build: Build, device: torch.device) -> None:
    """Run the launches that `build` makes, from a recording where there is one.

    Args:
        key: everything beside the tensors that `build` depends on: operation, numbers, path.
        tensors: all tensors that the launches read or write, but scratch.
        build: makes the launches for just these tensors.
        device: of the tensors.
    """
    produce(key, tensors, lambda: ((), build()), device)


def produce(
    key: Hashable, tensors: Sequence[torch.Tensor | None], build: Produce, device: torch.device
) -> tuple[Any, ...]:
    """As `run` for launches whose results `build` allocates: it returns (results, launches), and this the results.

    A result is one of `tensors`, or new and uninitialised, contiguous or alone in its memory, or None.
    """
    if device.type != "cuda":
        results, calls = build()
        run_all(calls, device)
        return tuple(results)
    if torch.cuda.current_device() != device.index:
        with torch.cuda.device(device):
            return produce(key, tensors, build, device)
    whole = (key, device.index, *map(situation, tensors))
    recording = _kept.get(whole)
    if recording is not None:
        results = tuple(_result(made, tensors, device) for made in recording.results)
        replay(recording, (*tensors, *results), device)
        return results
    with recorded_scratch() as scratch:
        results, calls = build()
    made = [_how_made(t, tensors) for t in results]
    fresh = [None if isinstance(how, int) else t for t, how in zip(results, made, strict=True)]
    steps = record(calls, [*tensors, *fresh], scratch)
    if steps is not None and all(t is None or t.is_contiguous() or _is_alone(t) for t in fresh):
        if len(_kept) >= MOST_KEPT:
            _kept.clear()
        parts: list[Scratch] = []
        total = 0
        for t in scratch:
            parts.append((total, t.nbytes, t.shape, t.dtype))
            total += -(-t.nbytes // SCRATCH_ALIGNMENT) * SCRATCH_ALIGNMENT
        _kept[whole] = Recording(tuple(steps), tuple(parts), total, tuple(made))
    return tuple(results)


def _how_made(result: torch.Tensor | None, tensors: Sequence[torch.Tensor | None]) -> Made:
    if result is None:
        return None
    for i, t in enumerate(tensors):
        if t is result:
            return i
    return result.shape, result.stride(), result.dtype


def _is_alone(t: torch.Tensor) -> bool:
    """Whether t's memory begins and ends with it, though it may have gaps: no launch was given more than what another
    of its shape and strides would have."""
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.storage_offset() == 0 and t.untyped_storage().nbytes() == (last + 1) * t.element_size()


def _result(made: Made, tensors: Sequence[torch.Tensor | None], device: torch.device) -> torch.Tensor | None:
    if made is None:
        return None
    if isinstance(made, int):
        return tensors[made]
    shape, stride, dtype = made
    return torch.empty_strided(shape, stride, dtype=dtype, device=device)


def record(
    calls: Sequence[Call | TorchCall], tensors: Sequence[torch.Tensor | None], scratch: Sequence[torch.Tensor]
) -> list[Step] | None:
    """Run `calls` and return them as steps; None if one cannot be replayed (all have run all the same)."""
    sources = [*tensors, *scratch]
    steps: list[Step] | None = []
    for call in calls:
        made = call.run()
        step = None
        if steps is not None:
            step = _library_step(call, sources) if isinstance(call, TorchCall) else _kernel_step(call, made, sources)
        steps = None if steps is None or step is None else [*steps, step]
    return steps


def _source_of(t: Any, sources: Sequence[torch.Tensor | None]) -> tuple[int, int] | None:
    """(number, byte offset) of the one source that `t` lies in; None if there is no telling."""
    storage, address = t.untyped_storage().data_ptr(), t.data_ptr()
    sharing = [(i, s) for i, s in enumerate(sources) if s is not None and s.untyped_storage().data_ptr() == storage]
    if len(sharing) > 1:  # parameters cut from one flat storage, say: only their own beginnings tell them apart
        sharing = [(i, s) for i, s in sharing if s.data_ptr() == address]
    if len(sharing) != 1:
        return None
    index, source = sharing[0]
    return index, address - source.data_ptr()


def _kernel_step(call: Call, compiled: Any, sources: Sequence[torch.Tensor | None]) -> Step | None:
    if compiled is None:  # the interpreter compiles nothing
        return None
    values = {**call.args, **call.constants}
    arguments = [values[name] for name in call.kernel.arg_names]
    holes = []
    for position, value in enumerate(arguments):
        is_tensor = isinstance(value, torch.Tensor)
        if not is_tensor and not hasattr(value, "block_shape"):
            continue
        if is_tensor and value.numel() == 0:  # nothing there is read, and no address tells it from another
            arguments[position] = 0
            continue
        found = _source_of(value if is_tensor else value.base, sources)
        if found is None:
            return None
        descriptor = None
        if not is_tensor:
            descriptor = copy.copy(value)
            descriptor.base = None
        holes.append(Hole(position, *found, descriptor))
        arguments[position] = None
    return Step(compiled[call.grid], arguments, tuple(holes), False)


def _library_step(call: TorchCall, sources: Sequence[torch.Tensor | None]) -> Step | None:
    if isinstance(getattr(call.function, "__self__", None), torch.Tensor):  # a bound method, which holds its tensor
        return None
    arguments, holes = list(call.args), []
    for position, value in enumerate(arguments):
        if not isinstance(value, torch.Tensor):
            continue
        found = _source_of(value, sources)
        if found is None:
            return None
        source: Any = sources[found[0]]
        if source.dtype != value.dtype:
            return None
        beyond = value.storage_offset() - source.storage_offset()
        same = beyond == 0 and value.shape == source.shape and value.stride() == source.stride()
        holes.append(Hole(position, *found, view=None if same else (value.shape, value.stride(), beyond)))
        arguments[position] = None
    return Step(call.function, arguments, tuple(holes), True)


def replay(recording: Recording, tensors: Sequence[torch.Tensor | None], device: torch.device) -> None:
    """Launch a recording's steps on the current stream with other tensors in the places of those it was made with."""
    addresses = [0 if t is None else t.data_ptr() for t in tensors]
    block: Any = None
    if recording.scratch_bytes:
        # One block; the allocator hands it out again only to what is queued on this stream behind these launches.
        block = torch.empty(recording.scratch_bytes, dtype=torch.uint8, device=device)
        start = block.data_ptr()
        addresses += [start + part[0] for part in recording.scratch]
    stream = torch.cuda.current_stream(device).cuda_stream
    for step in recording.steps:
        arguments = step.arguments.copy()
        if step.on_tensors:
            for hole in step.holes:
                if hole.source < len(tensors):
                    source = tensors[hole.source]
                else:
                    begin, size, shape, dtype = recording.scratch[hole.source - len(tensors)]
                    source = block[begin : begin + size].view(dtype).view(shape)
                arguments[hole.position] = _viewed(source, hole.view)
            step.run(*arguments)
            continue
        for hole in step.holes:
            address = addresses[hole.source] + hole.offset
            if hole.descriptor is not None:
                described = copy.copy(hole.descriptor)
                described.base = Address(address)
                arguments[hole.position] = described
            else:
                arguments[hole.position] = address
        step.run(*arguments, stream=stream)
    del block


def _viewed(t: Any, view: tuple[torch.Size, tuple[int, ...], int] | None) -> torch.Tensor:
    if view is None:
        return t
    size, stride, beyond = view
    return t.as_strided(size, stride, t.storage_offset() + beyond)
