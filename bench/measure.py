"""Clocks and counters: GPU time, wall time, peak memory, bytes saved for backward, launches.

Functions to be compared are timed in rounds, one after the other within a round, so that a clock that drifts or a busy
neighbour touches all of them alike.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

Functions = Mapping[str, Callable[[], Any]]
CYCLES_PER_SECOND = 2e9  # of a GPU, about: only used to make it wait a while
LONGEST_WAIT = 0.02  # seconds


@dataclass(frozen=True, slots=True)
class Micros:
    """Microseconds: the median of `samples` repetitions, their least, and the 10th and 90th percentile."""

    median: float
    least: float
    p10: float
    p90: float
    samples: int

    @classmethod
    def of(cls, values: list[float]) -> Micros:
        """From measured values, at least one."""
        ordered = sorted(values)
        last = len(ordered) - 1
        p10, p90 = ordered[round(0.1 * last)], ordered[round(0.9 * last)]
        return cls(statistics.median(ordered), ordered[0], p10, p90, len(ordered))

    def as_dict(self) -> dict[str, float]:
        return {name: round(value, 3) for name, value in asdict(self).items()}


class TimingError(RuntimeError):
    """A function failed while it was timed; `name` says which."""

    def __init__(self, name: str, error: Exception) -> None:
        self.name, self.what = name, describe_error(error)
        super().__init__(f"{name}: {self.what}")


def describe_error(error: Exception) -> str:
    """Its kind and the first line of its message."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]


@contextmanager
def naming(name: str) -> Iterator[None]:
    """TimingError with the name for whatever is raised in the block."""
    try:
        yield
    except Exception as error:
        raise TimingError(name, error) from error


def synchronize(device: torch.device) -> None:
    """Wait for the device; a CPU has nothing to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def is_usable(device: torch.device) -> bool:
    """Whether the device still works: after an illegal address nothing does in this process."""
    try:
        synchronize(device)
    except RuntimeError:
        return False
    return True


def _in_rounds(names: Iterable[str], rounds: int) -> Iterable[str]:
    """Each name once a round, each round beginning with the next name."""
    order = list(names)
    for i in range(rounds):
        start = i % len(order)
        yield from order[start:] + order[:start]


def gpu_microseconds(functions: Functions, device: torch.device, *, reps: int, rounds: int) -> dict[str, Micros]:
    """GPU time of one call of each function, by CUDA events, from a cold L2 cache and with a full queue.

    Before every call a buffer twice the size of the L2 cache is overwritten and another one read, so that operands come
    from memory, and nothing that the first left in the cache is written back at the call's expense. The GPU
    is made to wait before that until the host has queued the whole call: the events then stand around the kernels and
    not around the host's work between them, which the wall time shows.
    """
    l2 = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
    flush = torch.empty(max(2 * l2, 64 << 20), dtype=torch.int8, device=device)
    other = torch.zeros(flush.numel() // 4, dtype=torch.float32, device=device)
    waits = {}
    for name, function in functions.items():
        with naming(name):
            function()
            synchronize(device)
            start = time.perf_counter()
            function()
            queued = time.perf_counter() - start
            synchronize(device)
        waits[name] = int(min(1.5 * queued + 50e-6, LONGEST_WAIT) * CYCLES_PER_SECOND)
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for name in _in_rounds(functions, rounds):
        function, events = functions[name], []
        with naming(name):
            function()
            for _ in range(reps):
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                torch.cuda._sleep(waits[name])
                flush.zero_()
                other.sum()
                begin.record()
                function()
                end.record()
                events.append((begin, end))
                # Queued calls must not pile up: what they allocate would, too.
                end.synchronize()
            taken[name] += [1e3 * begin.elapsed_time(end) for begin, end in events]
    return {name: Micros.of(values) for name, values in taken.items()}


class Recorded:
    """A CUDA graph that is replayed when called, and the function that it was recorded from."""

    def __init__(self, graph: Any, function: Callable[[], Any]) -> None:
        self.graph, self.function = graph, function

    def __call__(self) -> None:
        self.graph.replay()


def captured(function: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """The function recorded in a CUDA graph, as a function that replays it: what a server does with a decode step.

    It is run on the capturing stream first, so that whatever it sets up once is there. What it returns is dropped. A
    graph holds addresses and no tensors, so the function, and with it all that its closure names, lives as long as what
    is returned: memory that it worked on would otherwise be another's by the time of a replay.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    synchronize(device)
    # Not torch.cuda.graph, which empties the allocator's cache every time: a search records hundreds.
    with torch.cuda.stream(stream):
        graph.capture_begin()
        try:
            function()
        finally:
            graph.capture_end()
    synchronize(device)

    return Recorded(graph, function)


def wall_microseconds(functions: Functions, device: torch.device, *, reps: int, rounds: int) -> dict[str, Micros]:
    """Wall time of one call of each function in a loop of `reps` calls, as a training loop sees it: a value a round.

    Raises:
        TimingError: as `gpu_microseconds`.
    """
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for name in _in_rounds(functions, rounds):
        function = functions[name]
        with naming(name):
            function()
            synchronize(device)
            start = time.perf_counter()
            for _ in range(reps):
                function()
            synchronize(device)
        taken[name].append(1e6 * (time.perf_counter() - start) / reps)
    return {name: Micros.of(values) for name, values in taken.items()}


def storage_key(t: torch.Tensor) -> int:
    """Identifies the memory that a tensor lives in; views of one memory share it."""
    return t.untyped_storage().data_ptr()


class SavedBytes:
    """Context manager that adds up what autograd saves for backward while it is open.

    Counted: every distinct storage of a tensor that an operation saves, once, at its full size, whoever shares it.
    Not counted: the storages in `excluded` (parameters, buffers, labels: what exists anyway), and whatever a function
    keeps outside autograd's own saving. `counting` may be switched off and on while open.
    """

    def __init__(self, excluded: Iterable[torch.Tensor]) -> None:
        self._excluded = {storage_key(t) for t in excluded}
        # Held, so that no storage is freed and its address taken by another while counting.
        self._saved: dict[int, torch.UntypedStorage] = {}
        self.counting = True
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t)

    def _pack(self, t: torch.Tensor) -> torch.Tensor:
        if self.counting and storage_key(t) not in self._excluded:
            self._saved[storage_key(t)] = t.untyped_storage()
        return t.detach()  # an operation's own output, saved as it is, would hold its graph alive

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    @property
    def total(self) -> int:
        """Bytes saved so far."""
        return sum(storage.nbytes() for storage in self._saved.values())


def saved_bytes(forward: Callable[[], Any], excluded: Iterable[torch.Tensor]) -> int:
    """Bytes that `forward` saves for backward, see `SavedBytes`."""
    with SavedBytes(excluded) as saved:
        out = forward()
        total = saved.total
    del out
    return total


def peak_bytes(function: Callable[[], Any], device: torch.device) -> int | None:
    """The most memory that a call held beyond what was allocated before it; None on a CPU."""
    if device.type != "cuda":
        return None
    function()
    synchronize(device)
    gc.collect()  # what an earlier problem left in cycles would be freed meanwhile, and count as less
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def launches(function: Callable[[], Any], device: torch.device) -> int | None:
    """Kernels that a call launches, as torch.profiler sees them on the device; None on a CPU."""
    if device.type != "cuda":
        return None
    function()
    synchronize(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        synchronize(device)
    on_device = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not e.name.startswith(("Memcpy", "Memset")) for e in on_device)
