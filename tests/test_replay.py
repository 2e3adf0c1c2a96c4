"""Launches that are recorded once and replayed with other tensors. Compiled kernels are stood in for by `Double`."""

from __future__ import annotations

import contextlib
import ctypes
from types import SimpleNamespace

import pytest
import torch
import triton

from peftkern_kernels import replay
from peftkern_kernels.launch import Call, TorchCall, Turns, recorded_scratch, scratch

CPU = torch.device("cpu")
STREAM = 7


class Double:
    """A "kernel" that writes 2 x source + shift: like a compiled one it takes positions, and addresses as numbers."""

    arg_names = ("source_ptr", "out_ptr", "count", "shift")
    function, packed_metadata = 1, (4, 1)

    def __init__(self):
        self.compilations = self.described = 0

    def __getitem__(self, grid):
        def launch(**arguments):
            self.compilations += 1
            values = [arguments[name] for name in self.arg_names]
            self._write(*(v.data_ptr() if isinstance(v, torch.Tensor) else v for v in values))
            return self

        return _Both(launch, self._watched)

    def _watched(self, *arguments, stream):
        self.described += 1
        self._positional(*arguments)

    def run(self, x, y, z, stream, function, metadata, launch_metadata, enter_hook, exit_hook, *arguments):
        assert (x, y, z, stream, function, metadata) == (1, 1, 1, STREAM, self.function, self.packed_metadata)
        assert launch_metadata is enter_hook is exit_hook is None
        self._positional(*arguments)

    def _positional(self, *arguments):
        self._write(*(a.base.data_ptr() if hasattr(a, "block_shape") else a for a in arguments))

    def _write(self, source, out, count, shift):
        source = source.base.data_ptr() if hasattr(source, "block_shape") else source
        values = (ctypes.c_float * count).from_address(source)
        target = (ctypes.c_float * count).from_address(out)
        for i in range(count):
            target[i] = 2 * values[i] + shift


class _Both:
    """kernel[grid](**named) before it is compiled, compiled[grid](*arguments, stream=...) after, if it is watched."""

    def __init__(self, named, positional):
        self.named, self.positional = named, positional

    def __call__(self, *arguments, **named):
        return self.positional(*arguments, **named) if arguments else self.named(**named)


@pytest.fixture
def kernel(monkeypatch):
    """A kernel, with recordings kept on a CPU as they would be on a GPU."""
    kernel = Double()
    monkeypatch.setattr(replay, "_kept", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(replay, "_stream", lambda _: STREAM)
    monkeypatch.setattr(torch, "empty", _empty_on_cpu(torch.empty))
    monkeypatch.setattr(torch, "empty_strided", _empty_on_cpu(torch.empty_strided))
    return kernel


def _empty_on_cpu(empty):
    return lambda *shape, device=None, **options: empty(*shape, **options)


GPU = torch.device("cuda", 0)


def double(kernel, source, out, shift=0.0):
    args = {"source_ptr": source, "out_ptr": out, "count": out.numel(), "shift": shift}
    # num_warps and num_stages are options of a launch and no arguments of the kernel.
    return _NoOptions("double", kernel, (1, 1, 1), args, {}, 4, 1)


class _NoOptions(Call):
    def run(self):
        return self.kernel[self.grid](**self.args)


def test_a_second_call_uses_its_own_tensors(kernel):
    """Would catch a recording that launches on the tensors it was made with."""
    for i in range(3):
        source, out = torch.full((4,), float(i)), torch.empty(4)
        replay.run("double", (source, out), lambda s=source, o=out: [double(kernel, s, o)], GPU)
        assert out.tolist() == [2.0 * i] * 4
    assert kernel.compilations == 1, "replays go past the binding of arguments by name"


@pytest.mark.parametrize("change", ["shape", "stride", "dtype", "alignment", "key", "absent"])
def test_another_situation_is_built_anew(kernel, change):
    """Would catch a recording that is replayed where a builder would have chosen otherwise."""
    built = []

    def run(key, tensors):
        replay.run(key, tensors, lambda: built.append(1) or [], GPU)

    memory = torch.zeros(64)
    run("a", (memory[:16].view(4, 4), None))
    run("a", (memory[16:32].view(4, 4), None))
    assert len(built) == 1
    other = {
        "shape": memory[:8].view(2, 4),
        "stride": memory[:16].view(4, 4).t(),
        "dtype": memory[:16].view(4, 4).view(torch.int32),
        "alignment": memory[1:17].view(4, 4),
    }.get(change, memory[:16].view(4, 4))
    run("b" if change == "key" else "a", (other, memory if change == "absent" else None))
    assert len(built) == 2


def test_one_tensor_in_two_places(kernel):
    """Would catch a list that is built anew at every call since one dY is two projections', and a recording made with
    that one replayed where they are two, which reads the first of them for both."""

    def run(a, b):
        sums, out = torch.empty(4), torch.empty(4)

        def build():
            return [double(kernel, b, out), TorchCall("copy", torch.Tensor.copy_, (sums, b))]

        replay.run("both", (a, b, sums, out), build, GPU)
        return out.tolist(), sums.tolist()

    def fresh(value):
        return torch.full((4,), value)

    one, other = fresh(1.0), fresh(2.0)
    assert [run(t, t) for t in (one, other)] == [([2.0] * 4, [1.0] * 4), ([4.0] * 4, [2.0] * 4)]
    assert kernel.compilations == 1, "the second is replayed"
    assert run(one, other) == ([4.0] * 4, [2.0] * 4)
    assert kernel.compilations == 2, "another situation"
    assert run(fresh(5.0), fresh(3.0)) == ([6.0] * 4, [3.0] * 4) and run(one, one) == ([2.0] * 4, [1.0] * 4)
    assert kernel.compilations == 2, "made with two, it serves both"


def test_views_and_offsets_are_kept(kernel):
    """Would catch an address that loses its distance from the start of the tensor that it lies in."""
    for i in range(3):
        source, out = torch.arange(8.0) + i, torch.full((8,), -1.0)
        replay.run("half", (source, out), lambda s=source, o=out: [double(kernel, s[4:], o[2:6], 1.0)], GPU)
        assert out.tolist() == [-1.0] * 2 + [2 * (v + i) + 1 for v in (4, 5, 6, 7)] + [-1.0] * 2


def test_scratch_is_taken_anew(kernel):
    """Would catch scratch memory that two replays share, or whose parts overlap."""
    outs = []
    for i in range(3):
        source, out = torch.full((5,), float(i)), torch.empty(5)

        def build(source=source, out=out):
            first = scratch(5, dtype=torch.float32, device=CPU)
            second = scratch(5, dtype=torch.float32, device=CPU)
            return [double(kernel, source, first), double(kernel, first, second, 1.0), double(kernel, second, out)]

        replay.run("chain", (source, out), build, GPU)
        outs.append(out)
    assert [out.tolist() for out in outs] == [[8.0 * i + 2] * 5 for i in range(3)]
    assert kernel.compilations == 3
    (recording,) = replay._kept.values()
    assert [part[0] for part in recording.scratch] == [0, 256]


def test_scratch_is_taken_in_turns():
    """Would catch parts of a list whose memory adds up, or two things of one part in one place."""
    turns = Turns()
    with recorded_scratch() as taken:
        with turns.turn():
            first = scratch(4, 8, dtype=torch.float32, device=CPU), scratch(16, dtype=torch.float32, device=CPU)
        outside = scratch(8, dtype=torch.float32, device=CPU)
        for _ in range(2):
            with turns.turn():
                second = scratch(30, dtype=torch.bfloat16, device=CPU), scratch(3, 5, dtype=torch.float32, device=CPU)
                other = scratch(99, dtype=torch.float32, device=CPU)
    assert [t.nbytes for t in taken] == [128, 64, 32, 396], "the last is larger than what is spare"
    assert [t.data_ptr() for t in second] == [first[1].data_ptr(), first[0].data_ptr()], "the smallest that will do"
    assert second[0].shape == (30,) and second[0].dtype is torch.bfloat16 and second[1].shape == (3, 5)
    assert outside.data_ptr() not in (t.data_ptr() for t in (*first, *second, other))


def test_descriptors_move_to_the_new_tensor(kernel):
    """Would catch a descriptor that still points at the tensors of the first call."""
    for i in range(3):
        source, out = torch.full((4,), float(i)), torch.empty(4)
        described = SimpleNamespace(base=source, block_shape=[4], shape=[4], strides=[1])
        replay.run("tma", (source, out), lambda d=described, o=out: [double(kernel, d, o)], GPU)
        assert out.tolist() == [2.0 * i] * 4
        assert described.base is source, "the caller's own descriptor is left alone"
    assert kernel.compilations == 1


def test_library_calls_get_views_of_the_new_tensors(kernel):
    """Would catch cuBLAS's call on a stale or untransposed operand."""
    for _ in range(3):
        x, w, out = torch.randn(3, 4), torch.randn(5, 4), torch.ones(3, 5)
        want = out + x @ w.t()
        call = TorchCall("base", torch.Tensor.addmm_, (out, x, w.t()))
        replay.run("addmm", (x, w, out), lambda call=call: [call], GPU)
        torch.testing.assert_close(out, want)
    assert len(replay._kept) == 1


def test_library_calls_take_scratch(kernel):
    """Would catch a product of something that lives between two launches only, as of a weight with a scale on it."""
    for i in range(3):
        x, w, out = torch.randn(3, 4), torch.randn(5, 4), torch.ones(3, 5)

        def build(x=x, w=w, out=out, i=i):
            spare = scratch(7, dtype=torch.uint8, device=CPU)
            doubled = scratch(5, 4, dtype=torch.float32, device=CPU)
            product = TorchCall("base", torch.Tensor.addmm_, (out, x, doubled.t()))
            return [TorchCall("zero", torch.Tensor.zero_, (spare,)), double(kernel, w, doubled), product]

        want = out + x @ (2 * w).t()
        replay.run("scaled", (x, w, out), build, GPU)
        torch.testing.assert_close(out, want)
    assert len(replay._kept) == 1 and kernel.compilations == 1


def test_parameters_cut_from_one_storage_are_told_apart(kernel):
    """Would catch A taken for an offset into B where both are cut from one flat storage at changing distances."""
    for distance in (8, 16, 24):
        flat = torch.arange(64.0)
        a, b, out = flat[:4], flat[distance : distance + 4], torch.empty(4)
        replay.run("flat", (a, b, out), lambda b=b, out=out: [double(kernel, b, out)], GPU)
        assert out.tolist() == [2.0 * (distance + i) for i in range(4)]
    assert kernel.compilations == 1


def test_what_cannot_be_accounted_for_is_never_kept(kernel):
    """Would catch a replay that reads memory nobody named: a constant table."""
    for i in range(2):
        hidden, out = torch.full((4,), float(i)), torch.empty(4)
        replay.run("hidden", (out,), lambda h=hidden, o=out: [double(kernel, h, o)], GPU)
        assert out.tolist() == [2.0 * i] * 4
    assert not replay._kept and kernel.compilations == 2


def test_a_method_of_a_tensor_is_never_kept(kernel):
    """Would catch a replay that zeroes the first call's result, which the bound method holds, and not its own."""
    for _ in range(2):
        out = torch.ones(4)
        replay.run("bound", (out,), lambda out=out: [TorchCall("zero", out.zero_, ())], GPU)
        assert out.tolist() == [0.0] * 4
    assert not replay._kept


def test_empty_operands_are_no_obstacle(kernel):
    """Would catch an adapter of rank 0, whose two factors have no address, that is bound by name at every call."""
    for i in range(2):
        source, out = torch.full((4,), float(i)), torch.empty(4)
        nothing = torch.empty(0, 4), torch.empty(4, 0)

        def build(source=source, out=out, nothing=nothing):
            return [double(kernel, source, out), _NoOptions("nothing", kernel, (1, 1, 1), empty(nothing[0]), {}, 4, 1)]

        def empty(t):
            return {"source_ptr": t, "out_ptr": t, "count": 0, "shift": 0.0}

        replay.run("empty", (source, *nothing, out), build, GPU)
        assert out.tolist() == [2.0 * i] * 4
    assert kernel.compilations == 2


def test_nothing_kept_holds_a_tensor(kernel):
    """Would catch a recording that keeps a model's weights or activations alive."""
    source, out = torch.ones(4), torch.empty(4)
    described = SimpleNamespace(base=source, block_shape=[4])
    call = TorchCall("add", torch.Tensor.add_, (out, source))
    replay.run("held", (source, out), lambda: [double(kernel, described, out), call], GPU)
    ((_, recording),) = replay._kept.items()
    launch, library = recording.steps
    ((*_, fields),) = launch.descriptors
    for value in (*launch.arguments, *fields.values(), *library.arguments):
        assert not isinstance(value, torch.Tensor)


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_profilers_are_told_of_launches(kernel, hook, monkeypatch):
    """Would catch replayed launches that a profiler does not see, and the slow way taken where nobody looks."""
    runtime = triton.knobs.runtime
    empty = type(runtime.launch_enter_hook)() if runtime.launch_enter_hook is not None else None

    def run():
        source, out = torch.ones(4), torch.empty(4)
        replay.run("watched", (source, out), lambda: [double(kernel, source, out)], GPU)
        assert out.tolist() == [2.0] * 4
        return kernel.described

    monkeypatch.setattr(runtime, hook, empty)
    assert (run(), run()) == (0, 0), "the first is not replayed"
    monkeypatch.setattr(runtime, hook, lambda metadata: None)
    assert run() == 1
    monkeypatch.setattr(runtime, hook, None)
    assert run() == 1


def test_kept_situations_are_bounded(kernel, monkeypatch):
    """Would catch a program with ever new lengths that fills the memory."""
    monkeypatch.setattr(replay, "MOST_KEPT", 3)
    for n in range(1, 9):
        source, out = torch.ones(n), torch.empty(n)
        replay.run("n", (source, out), lambda s=source, o=out: [double(kernel, s, o)], GPU)
        assert out.tolist() == [2.0] * n
        assert len(replay._kept) <= 3


def test_interpreted_kernels_are_not_kept():
    """Would catch a recording where nothing was compiled."""
    out = torch.ones(2)
    replay.run("cpu", (out,), lambda: [TorchCall("zero", torch.Tensor.zero_, (out,))], CPU)
    assert out.tolist() == [0.0, 0.0] and not replay._kept


def test_results_are_allocated_anew(kernel):
    """Would catch a result that two calls share, one that is given in that comes back as another, and a lost None."""
    got = []
    for i in range(3):
        source = torch.full((4,), float(i))

        def build(source=source):
            y = torch.empty(4)
            return (y, None, source), [double(kernel, source, y)]

        got.append((source, *replay.produce("new", (source,), build, GPU)))
    assert [y.tolist() for _, y, _, _ in got] == [[0.0] * 4, [2.0] * 4, [4.0] * 4]
    assert all(nothing is None and same is source for source, _, nothing, same in got)
    assert kernel.compilations == 1


def test_results_with_gaps_come_back_with_them(kernel):
    """Would catch S with rows that a descriptor of the recording cannot describe, and one that two calls share."""
    got = []
    for i in range(3):
        source = torch.full((3,), float(i))

        def build(source=source):
            y = torch.empty(0).new_empty_strided((3, 2), (4, 1))
            return (y,), [TorchCall("copy", torch.Tensor.copy_, (y, source[:, None].expand(3, 2)))]

        got += replay.produce("rows", (source,), build, GPU)
    assert [y.tolist() for y in got] == [[[float(i)] * 2] * 3 for i in range(3)]
    assert [y.stride() for y in got] == [(4, 1)] * 3 and len(replay._kept) == 1


def test_results_within_other_memory_are_not_kept(kernel):
    """Would catch a launch that writes beside the result, into memory that a new one would not have."""
    for _ in range(2):
        source = torch.ones(4)

        def build(source=source):
            wide = torch.zeros(4, 2)
            replayed = wide[:, 0]
            return (replayed,), [TorchCall("copy", torch.Tensor.copy_, (replayed, source))]

        (y,) = replay.produce("gaps", (source,), build, GPU)
        assert y.tolist() == [1.0] * 4
    assert not replay._kept
