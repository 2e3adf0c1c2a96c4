"""Launches past Triton's launcher: the C function gets what the launcher would give it, for any tensors and stream."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")
from bench import null_device
from peftkern_kernels import direct_launch as module
from peftkern_kernels.direct_launch import direct_launch

ROOT = Path(__file__).parent.parent
GRID, STREAM = (3, 2, 1), 77


class Descriptor:
    """A tensor descriptor, as far as a launcher asks."""

    def __init__(self, address, shape):
        self.base, self.shape, self.strides = address, shape, [shape[1], 1]


def wrapped(launcher, before, in_one):
    """What Triton puts before its C function where there are descriptors; `before` is how much is no argument of the
    kernel."""

    def inner(*given):
        arguments, expanded = (given[-1] if in_one else given[before:]), []
        for a in arguments:
            expanded += [("map", a.base), *a.shape, *a.strides] if isinstance(a, Descriptor) else [a]
        return launcher(*given[:-1], expanded) if in_one else launcher(*given[:before], *expanded)

    return inner


class CudaLauncher:
    """Triton's launcher in the form of 3.9 (`in_one`) or of 3.6."""

    def __init__(self, function, in_one, has_descriptors):
        self.launch = wrapped(function, 12, in_one) if has_descriptors else function
        self.in_one = in_one
        self.global_scratch_size = self.profile_scratch_size = 0

    def __call__(self, x, y, z, stream, function, metadata, launch_metadata, enter_hook, exit_hook, *arguments):
        hooks = (metadata, launch_metadata, enter_hook, exit_hook)
        if self.in_one:
            self.launch(x, y, z, stream, function, False, True, *hooks, None, None, "annotations", arguments)
        else:
            self.launch(x, y, z, stream, function, False, True, None, None, *hooks[:3], *arguments)


class Called:
    """A C function that remembers what it was given."""

    def __init__(self):
        self.given = []

    def __call__(self, *given):
        self.given.append(tuple(tuple(g) if isinstance(g, list | tuple) else g for g in given))


POINTERS, DESCRIPTORS = [(0, 0, 0), (3, 1, 64)], [(1, 1, 0), (4, 2, 32)]


def filled_with(has_descriptors):
    """A kernel's arguments: an address, a descriptor, a number, an address, a descriptor, a number that no launch sees
    changed."""

    def filled(addresses):
        first = Descriptor(addresses[1], [8, 16]) if has_descriptors else 5
        second = Descriptor(addresses[2] + 32, [4, 4]) if has_descriptors else 6
        return [addresses[0], first, 2.5, addresses[1] + 64, second, 128]

    return filled


@pytest.mark.parametrize("has_descriptors", [True, False])
@pytest.mark.parametrize("in_one", [True, False])
def test_the_function_is_given_the_same(in_one, has_descriptors):
    """Would catch an address in another's place, a descriptor of another tensor, and a launch on another stream."""
    function = Called()
    run = CudaLauncher(function, in_one, has_descriptors)
    compiled = SimpleNamespace(run=run, function=4711, packed_metadata=(4, 1, 0))
    filled, descriptors = filled_with(has_descriptors), DESCRIPTORS if has_descriptors else []
    direct = direct_launch(compiled, GRID, filled, [1024, 2048, 4096], POINTERS, descriptors)
    assert direct is not None and not function.given, "nothing was launched"
    for stream, addresses in (
        (STREAM, [1024, 2048, 4096]),
        (5, [64, 128, 256]),
        (6, [64, 640, 256]),
        (STREAM, [1, 2, 3]),
    ):
        direct(addresses, stream)
        run(*GRID, stream, 4711, (4, 1, 0), None, None, None, *filled(addresses))
        mine, own = function.given[-2:]
        assert mine == own


def test_descriptors_are_made_once_for_an_address(monkeypatch):
    """Would catch one that is made at each launch, and memory that grows with every address that ever was."""
    monkeypatch.setattr(module, "MOST_KEPT", 3)
    made = []
    compiled = SimpleNamespace(run=CudaLauncher(Called(), True, True), function=1, packed_metadata=())
    filled = filled_with(True)
    direct = direct_launch(
        compiled, GRID, lambda addresses: (made.append(1), filled(addresses))[1], [1, 2, 3], POINTERS, DESCRIPTORS
    )
    made.clear()
    for _ in range(3):
        for addresses in ([64, 128, 256], [64, 640, 512], [64, 128, 512]):
            direct(addresses, STREAM)
    assert len(made) == 2, "the third pair is of known addresses"
    for i in range(10):
        direct([64, 128 * i, 256], STREAM)
        assert all(len(kept) <= 3 for kept in direct._kept)


CHANGES = ["another launcher", "scratch", "profile", "unknown closure", "other arguments", "another call"]


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_known_is_left_to_triton(change):
    """Would catch a launch without the memory that a kernel asks for, or with arguments in places that were guessed."""
    run = CudaLauncher(Called(), True, True)
    if change == "another launcher":
        run = lambda *_: None  # noqa: E731
    elif change == "scratch":
        run.global_scratch_size = 16
    elif change == "profile":
        run.profile_scratch_size = 16
    elif change == "another call":
        run.__class__ = type("CudaLauncher", (), {"__call__": lambda self, grid, stream: None})
    elif change == "unknown closure":
        function = run.launch
        run.launch = lambda *given: function(*given)
    else:
        inner = run.launch

        def launcher(*given):
            inner(*given[:-1], [0, *given[-1]])

        run.launch = lambda *given: launcher(*given)
    compiled = SimpleNamespace(run=run, function=1, packed_metadata=())
    assert direct_launch(compiled, GRID, filled_with(True), [1, 2, 3], POINTERS, DESCRIPTORS) is None


REAL = """
import copy
from bench import host, null_device
case = host.Case("a layer", 2048, 16, outs=(512,), dropout=0.1)
small = host.Case("a layer", 4, 16, outs=(512,))
layers = host.layers_of(case)
null_device.install()
import triton
from peftkern_kernels import direct_launch, replay
utils = triton.runtime.driver.active.utils
for name in ("fill_tma_descriptor_tiled", "fill_tma_descriptor"):
    if hasattr(utils, name):
        original = getattr(utils, name)
        setattr(utils, name, lambda *a, original=original: (original(*a), None)[1] or ("map", *map(repr, a)))
given = []
for each in (case, small):
    host.runners(each, layers, null_device.CUDA)["forward+backward"]()
for recording in replay._kept.values():
    for step in recording.steps:
        if not isinstance(step, replay.KernelStep):
            continue
        assert step.direct is not None, step
        numbers = [s for _, s, _ in step.addresses] + [d[1] for d in step.descriptors]
        addresses = [4096 * (7 + i) for i in range(max(numbers) + 1)]
        step.direct._function = lambda *a: given.append(a)
        step.direct(addresses, 99)
        run = copy.copy(step.compiled.run)
        run.launch = direct_launch._split(run.launch, lambda *a: given.append(a))[1]
        kernel = step.compiled
        run(*step.grid, 99, kernel.function, kernel.packed_metadata, None, None, None, *step.filled(addresses))
        mine, own = given[-2:]
        flat = [[*a[:-1], *a[-1]] if isinstance(a[-1], (list, tuple)) else list(a) for a in (mine, own)]
        assert flat[0] == flat[1], (flat, step)
print("same", len(given) // 2)
"""


@pytest.mark.skipif(null_device.compiler() is None, reason="Triton's launcher needs a C compiler")
def test_triton_gives_its_function_the_same():
    """Would catch a form of Triton's launcher that is read wrongly, with a layer's kernels, forward and backward."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, "-c", REAL], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    assert int(run.stdout.split()[-1]) >= 10, run.stdout
