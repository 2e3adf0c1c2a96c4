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

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton

from .direct_launch import DirectLaunch, direct_launch
from .launch import Call, TorchCall, recorded_scratch, run_all

Build = Callable[[], Sequence[Call | TorchCall]]
Produce = Callable[[], tuple[Sequence[torch.Tensor | None], Sequence[Call | TorchCall]]]
Scratch = tuple[int, torch.dtype]  # bytes into the block, and as what a library call takes it
# A result: absent, one of the tensors given, or new, of a shape, strides and dtype.
Made = None | int | tuple[torch.Size, tuple[int, ...], torch.dtype]
MOST_KEPT = 4096  # situations; then all are forgotten, for a program with so many has no use for them
SCRATCH_ALIGNMENT = 256


@dataclass(frozen=True, slots=True)
class Hole:
    """An argument of a library call that is a tensor, at `position`: number `source` of tensors and scratch, or its
    `view` (size, stride, storage offset beyond the source's), which there always is of scratch."""

    position: int
    source: int
    view: tuple[torch.Size, tuple[int, ...], int] | None


@dataclass(frozen=True, slots=True)
class LibraryStep:
    """A library call: the function, its arguments, and the holes among them."""

    function: Callable[..., Any]
    arguments: list[Any]
    holes: tuple[Hole, ...]


@dataclass(frozen=True, slots=True)
class KernelStep:
    """A launch of a compiled kernel.

    `addresses` are the (position, source, bytes into it) of arguments that are addresses, `descriptors` those of tensor
    descriptors, each with its class and what else it holds. `direct` launches without Triton's launcher, if it can.
    """

    compiled: Any
    grid: tuple[int, int, int]
    arguments: list[Any]
    addresses: tuple[tuple[int, int, int], ...]
    descriptors: tuple[tuple[int, int, int, Any, dict[str, Any]], ...]
    direct: DirectLaunch | None = None

    def filled(self, addresses: Sequence[int]) -> list[Any]:
        """The arguments where tensors and scratch lie at `addresses`."""
        arguments = self.arguments.copy()
        for position, source, offset in self.addresses:
            arguments[position] = addresses[source] + offset
        for position, source, offset, kind, fields in self.descriptors:
            described = kind.__new__(kind)  # not its constructor, which checks, nor copy.copy: each takes some 5 us
            described.__dict__.update(fields)
            described.base = Address(addresses[source] + offset)
            arguments[position] = described
        return arguments


Step = KernelStep | LibraryStep


@dataclass(frozen=True, slots=True)
class Recording:
    """The steps of one situation, the parts of one block of scratch memory, and how the results come to be.

    `alike` are pairs of tensors that lay at one address (one dY for two projections, one bias): an argument that was at
    it may be either's, so the recording is for tensors that do so again.
    """

    steps: tuple[Step, ...]
    scratch: tuple[Scratch, ...]
    scratch_bytes: int
    results: tuple[Made, ...] = ()
    alike: tuple[tuple[int, int], ...] = ()
    scratch_dtype: torch.dtype = torch.uint8  # that library calls take scratch memory as, if all take it as one

    def fits(self, addresses: Sequence[int]) -> bool:
        """Whether tensors at `addresses` that have to lie at one do."""
        return not self.alike or all(addresses[i] == addresses[j] for i, j in self.alike)


class Address:
    """What Triton asks of the base of a tensor descriptor."""

    __slots__ = ("value",)

    def __init__(self, value: int) -> None:
        self.value = value

    def data_ptr(self) -> int:
        return self.value


_kept: dict[Hashable, Recording] = {}


def _addresses(tensors: Sequence[torch.Tensor | None]) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in tensors]


def _alike(addresses: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """The pairs of tensors at one address, each with the first that is there."""
    first: dict[int, int] = {}
    pairs = ((first.setdefault(address, i), i) for i, address in enumerate(addresses) if address)
    return tuple((i, j) for i, j in pairs if i != j)


@functools.cache  # device.type makes a string
def _is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def run(
    key: Hashable,
    tensors: Sequence[torch.Tensor | None],
    build: Build,
    device: torch.device,
    told: Sequence[torch.Tensor | None] = (),
) -> None:
    """Run the launches that `build` makes, from a recording where there is one.

    Args:
        key: everything beside the tensors that `build` depends on: operation, numbers, path.
        tensors: all tensors that the launches read or write, but scratch and those of `told`.
        build: makes the launches for just these tensors.
        device: of the tensors.
        told: tensors of which the key tells shapes, strides and dtypes, so that nobody has to look; contiguous ones.
    """
    produce(key, tensors, lambda: ((), build()), device, told)


def produce(
    key: Hashable,
    tensors: Sequence[torch.Tensor | None],
    build: Produce,
    device: torch.device,
    told: Sequence[torch.Tensor | None] = (),
) -> tuple[Any, ...]:
    """As `run` for launches whose results `build` allocates: it returns (results, launches), and this the results.

    A result is one of `tensors`, or new and uninitialised, contiguous or alone in its memory, or None.
    """
    if not _is_gpu(device):
        results, calls = build()
        run_all(calls, device)
        return tuple(results)
    if torch.cuda.current_device() != device.index:
        with torch.cuda.device(device):
            return produce(key, tensors, build, device, told)
    # All that a builder may read of tensors, and what Triton specializes a pointer on.
    addresses: list[int] = []
    situation: list[Hashable] = [key, device.index]
    for t in tensors:
        if t is None:
            addresses.append(0)
            situation.append(None)
        else:
            address = t.data_ptr()
            addresses.append(address)
            situation += t.shape, t.stride(), t.dtype, address & 15
    if told:
        own = _addresses(told)
        situation += [address & 15 for address in own]
        tensors, addresses = (*tensors, *told), addresses + own
    whole = tuple(situation)
    recording = _kept.get(whole)
    if recording is not None and recording.fits(addresses):
        if not recording.results:
            replay(recording, tensors, addresses, device)
            return ()
        results = tuple([_result(made, tensors, device) for made in recording.results])
        replay(recording, (*tensors, *results), addresses + _addresses(results), device)
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
            parts.append((total, t.dtype))
            total += -(-t.nbytes // SCRATCH_ALIGNMENT) * SCRATCH_ALIGNMENT
        alike, dtype = _alike(addresses), _scratch_dtype(steps, parts, len(tensors) + len(results))
        _kept[whole] = Recording(tuple(steps), tuple(parts), total, tuple(made), alike, dtype)
    return tuple(results)


def _scratch_dtype(steps: Sequence[Step], parts: Sequence[Scratch], given: int) -> torch.dtype:
    """The dtype that all library calls among the steps take scratch memory as; uint8 if they do not agree."""
    holes = [hole for step in steps if isinstance(step, LibraryStep) for hole in step.holes if hole.source >= given]
    dtypes = {parts[hole.source - given][1] for hole in holes}
    return dtypes.pop() if len(dtypes) == 1 else torch.uint8


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
        if steps is None:
            continue
        step: Step | None
        if isinstance(call, TorchCall):
            step = _library_step(call, sources, len(tensors))
        else:
            step = _kernel_step(call, made, sources)
        steps = None if step is None else [*steps, step]
    return steps


def _source_of(t: Any, sources: Sequence[torch.Tensor | None]) -> tuple[int, int] | None:
    """(number, byte offset) of the one source that `t` lies in; None if there is no telling."""
    storage, address = t.untyped_storage().data_ptr(), t.data_ptr()
    sharing = [(i, s) for i, s in enumerate(sources) if s is not None and s.untyped_storage().data_ptr() == storage]
    if len({s.data_ptr() for _, s in sharing}) > 1:
        # Parameters cut from one flat storage, say: only their own beginnings tell them apart.
        sharing = [(i, s) for i, s in sharing if s.data_ptr() == address]
    if not sharing:
        return None
    index, source = sharing[0]  # of several at one address any will do (`Recording.alike`)
    return index, address - source.data_ptr()


def _kernel_step(call: Call, compiled: Any, sources: Sequence[torch.Tensor | None]) -> Step | None:
    if compiled is None:  # the interpreter compiles nothing
        return None
    values = {**call.args, **call.constants}
    arguments = [values[name] for name in call.kernel.arg_names]
    addresses, descriptors = [], []
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
        if is_tensor:
            addresses.append((position, *found))
        else:
            fields = {name: held for name, held in vars(value).items() if name != "base"}
            descriptors.append((position, *found, type(value), fields))
        arguments[position] = None
    step = KernelStep(compiled, call.grid, arguments, tuple(addresses), tuple(descriptors))
    places = (step.addresses, tuple(held[:3] for held in step.descriptors))
    direct = direct_launch(compiled, call.grid, step.filled, _addresses(sources), *places)
    return dataclasses.replace(step, direct=direct)


def _library_step(call: TorchCall, sources: Sequence[torch.Tensor | None], given: int) -> Step | None:
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
        same = found[0] < given and beyond == 0 and value.shape == source.shape and value.stride() == source.stride()
        holes.append(Hole(position, found[0], None if same else (value.shape, value.stride(), beyond)))
        arguments[position] = None
    return LibraryStep(call.function, arguments, tuple(holes))


def _stream(device: torch.device) -> int:
    """The current stream's handle, from where Triton has it: torch.cuda.current_stream makes an object."""
    return triton.runtime.driver.active.get_current_stream(device.index)


def _somebody_watches() -> bool:
    """Whether a profiler asked Triton to be called before or after launches."""
    runtime = triton.knobs.runtime
    hooks = (runtime.launch_enter_hook, runtime.launch_exit_hook)
    return any(getattr(hook, "calls", True) for hook in hooks if hook is not None)  # a chain of none is nobody


def replay(
    recording: Recording, tensors: Sequence[torch.Tensor | None], addresses: list[int], device: torch.device
) -> None:
    """Launch a recording's steps on the current stream with other tensors, at `addresses`, in the places of those it
    was made with."""
    block: Any = None
    if recording.scratch_bytes:
        # One block; the allocator hands it out again only to what is queued on this stream behind these launches.
        dtype = recording.scratch_dtype
        # Strided: that takes torch half the time of `empty`.
        block = torch.empty_strided((recording.scratch_bytes // dtype.itemsize,), (1,), dtype=dtype, device=device)
        start = block.data_ptr()
        addresses = addresses + [start + part[0] for part in recording.scratch]
    stream = _stream(device)
    watched = _somebody_watches()
    for step in recording.steps:
        if isinstance(step, LibraryStep):
            _call_library(step, tensors, block, recording.scratch)
        elif watched:
            step.compiled[step.grid](*step.filled(addresses), stream=stream)
        elif step.direct is not None:
            step.direct(addresses, stream)
        else:
            # What compiled[grid] comes to where no hook wants the launch described: a third of its time.
            kernel = step.compiled
            described = (kernel.function, kernel.packed_metadata, None, None, None)
            kernel.run(*step.grid, stream, *described, *step.filled(addresses))
    del block


def _call_library(
    step: LibraryStep, tensors: Sequence[torch.Tensor | None], block: Any, scratch: Sequence[Scratch]
) -> None:
    arguments = step.arguments.copy()
    for hole in step.holes:
        if hole.source < len(tensors):
            t: Any = tensors[hole.source]
            if hole.view is not None:
                size, stride, beyond = hole.view
                t = t.as_strided(size, stride, t.storage_offset() + beyond)
        else:
            begin, dtype = scratch[hole.source - len(tensors)]
            size, stride, beyond = hole.view  # type: ignore[misc]
            own = block if block.dtype is dtype else block.view(dtype)
            t = own.as_strided(size, stride, begin // dtype.itemsize + beyond)
        arguments[hole.position] = t
    step.function(*arguments)
