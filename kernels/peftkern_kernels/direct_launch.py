"""A compiled kernel's launch without what Triton's launcher asks anew each time, which is all but addresses and stream.

Triton launches by `CudaLauncher.__call__`: Python that looks for scratch memory and for who watches, makes a TMA
descriptor of each tensor descriptor among the arguments, and calls a C function. What that function takes differs from
one version of Triton to the next, so nothing here knows it: the launcher is run once with a function in its place that
only notes what it is given, and where stream and addresses are found in that is where they go from then on. TMA
descriptors are kept by the addresses that they describe, for a step finds its tensors where the step before had them.
"""

from __future__ import annotations

import copy
import threading
import types
from collections.abc import Callable, Sequence
from typing import Any

MOST_KEPT = 256  # TMA descriptors of one argument; then they are forgotten
_noting = threading.Lock()  # what was noted is one thread's at a time
Place = tuple[int, int, int]  # position of an argument, number of the tensor that it is of, bytes into it


class DirectLaunch:
    """A kernel's launch for tensors at any addresses, on any stream.

    Args:
        function: the C function.
        before, after: what it takes before the stream, and between that and the kernel's arguments.
        in_one: whether it takes those as one sequence.
        arguments: the kernel's as it takes them, with anything where an address or a TMA descriptor goes.
        pointers: the places of addresses among them.
        descriptors: those of TMA descriptors.
        described: the kernel's arguments as the function takes them, for tensors at these addresses, as the launcher
            makes them.
    """

    __slots__ = (
        *("_after", "_arguments", "_before", "_described", "_descriptors", "_function", "_in_one", "_kept"),
        "_pointers",
    )

    def __init__(
        self,
        function: Callable[..., Any],
        before: tuple[Any, ...],
        after: tuple[Any, ...],
        in_one: bool,
        arguments: list[Any],
        pointers: tuple[Place, ...],
        descriptors: tuple[Place, ...],
        described: Callable[[Sequence[int]], Sequence[Any]],
    ) -> None:
        self._function, self._before, self._after, self._in_one = function, before, after, in_one
        self._arguments, self._pointers, self._descriptors = arguments, pointers, descriptors
        self._described = described
        self._kept: list[dict[int, Any]] = [{} for _ in descriptors]  # of each, by the address that it describes

    def __call__(self, addresses: Sequence[int], stream: int) -> None:
        """Launch on `stream` with tensors at `addresses`."""
        arguments = self._arguments.copy()
        for position, source, offset in self._pointers:
            arguments[position] = addresses[source] + offset
        for (position, source, offset), kept in zip(self._descriptors, self._kept, strict=True):
            made = kept.get(addresses[source] + offset)
            arguments[position] = self._make(addresses)[position] if made is None else made
        if self._in_one:
            self._function(*self._before, stream, *self._after, arguments)
        else:
            self._function(*self._before, stream, *self._after, *arguments)

    def _make(self, addresses: Sequence[int]) -> Sequence[Any]:
        """The arguments for tensors at these addresses, whose TMA descriptors are kept."""
        arguments = self._described(addresses)
        for (position, source, offset), kept in zip(self._descriptors, self._kept, strict=True):
            if len(kept) >= MOST_KEPT:
                kept.clear()
            kept[addresses[source] + offset] = arguments[position]
        return arguments


def direct_launch(
    compiled: Any,
    grid: tuple[int, int, int],
    filled: Callable[[Sequence[int]], list[Any]],
    addresses: Sequence[int],
    pointers: Sequence[Place],
    descriptors: Sequence[Place],
) -> DirectLaunch | None:
    """The launch of a compiled kernel; None where Triton's launcher is not the one that is known, or does more.

    Args:
        compiled: what Triton compiled.
        grid: programs along each axis.
        filled: the kernel's arguments, in the order of its parameters, for tensors at given addresses.
        addresses: some that are allowed.
        pointers, descriptors: the places in `filled` of what is an address, and what a tensor descriptor.
    """
    run: Any = getattr(compiled, "run", None)
    if type(run).__name__ != "CudaLauncher" or getattr(run, "gsan_enabled", False):
        return None
    if getattr(run, "global_scratch_size", 1) or getattr(run, "profile_scratch_size", 1):
        return None
    noted: list[tuple[Any, ...]] = []
    probe: Any = copy.copy(run)
    split = _split(run.launch, lambda *given: noted.append(given))
    if split is None:
        return None
    function, probe.launch = split
    stream = object()

    def note(arguments: list[Any]) -> tuple[Any, ...]:
        with _noting:
            probe(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments)
            return noted.pop()

    arguments = filled(addresses)
    try:
        given = note(arguments)
    except (AttributeError, IndexError, TypeError):  # a launcher that wants to be called otherwise
        return None
    at_stream = [i for i, value in enumerate(given) if value is stream]
    positions, count = _positions(arguments, descriptors)
    at_pointers, at_descriptors = (_moved(places, positions) for places in (pointers, descriptors))
    in_one = isinstance(given[-1], list | tuple) and len(given[-1]) == count
    at_end = 1 if in_one else count  # how much of what was given are the kernel's arguments
    taken = list(given[-1] if in_one else given[len(given) - count :])
    right = len(at_stream) == 1 and at_stream[0] < len(given) - at_end
    right = right and all(taken[at] == addresses[source] + offset for at, source, offset in at_pointers)
    for (at, _, _), (own, _, _) in zip(at_descriptors, descriptors, strict=True):
        sizes = list(arguments[own].shape)
        right = right and taken[at + 1 : at + 1 + len(sizes)] == sizes
    if not right:
        return None

    def described(addresses: Sequence[int]) -> Sequence[Any]:
        given = note(filled(addresses))
        return given[-1] if in_one else given[len(given) - count :]

    before, after = given[: at_stream[0]], given[at_stream[0] + 1 : len(given) - at_end]
    return DirectLaunch(function, before, after, in_one, taken, at_pointers, at_descriptors, described)


def _split(launch: Any, noting: Callable[..., None]) -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """(the C function, `launch` with `noting` in its place); None where they cannot be told apart."""
    if not isinstance(launch, types.FunctionType):
        return launch, noting
    names = launch.__code__.co_freevars
    if "launcher" not in names or launch.__closure__ is None:
        return None
    cells = dict(zip(names, launch.__closure__, strict=True))
    function = cells["launcher"].cell_contents
    if isinstance(function, types.FunctionType):
        return None
    cells["launcher"] = types.CellType(noting)
    closure = tuple(cells[name] for name in names)
    copied = types.FunctionType(launch.__code__, launch.__globals__, launch.__name__, launch.__defaults__, closure)
    return function, copied


def _positions(arguments: Sequence[Any], descriptors: Sequence[Place]) -> tuple[list[int], int]:
    """Where each argument is once a tensor descriptor has become a TMA descriptor, sizes and strides; and how many."""
    wide = {place[0] for place in descriptors}
    positions, count = [], 0
    for i, argument in enumerate(arguments):
        positions.append(count)
        count += 1 + 2 * len(argument.shape) if i in wide else 1
    return positions, count


def _moved(places: Sequence[Place], positions: Sequence[int]) -> tuple[Place, ...]:
    """The places where arguments are at `positions`."""
    return tuple((positions[own], source, offset) for own, source, offset in places)
