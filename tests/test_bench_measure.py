"""What a benchmark's clocks hold on to, and what they say when a function fails, without a GPU."""

from __future__ import annotations

import contextlib
import gc
import weakref

import pytest
import torch

from bench import measure


class FakeGraph:
    """In the place of a CUDA graph: it records nothing and counts its replays."""

    replays = 0

    def capture_begin(self) -> None: ...

    def capture_end(self) -> None: ...

    def replay(self) -> None:
        self.replays += 1


@pytest.fixture
def fake_cuda(monkeypatch):
    class Stream:
        def __init__(self, *_: object) -> None: ...

        def wait_stream(self, other: object) -> None: ...

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)


def test_a_recorded_graph_keeps_what_it_works_on(fake_cuda):
    """Catches a graph whose routing, scratch or metadata is freed when the next implementation is made: its replay
    reads another's memory, finds a slot that is none, and the GPU reports an illegal address."""
    operand = torch.zeros(4)
    alive = weakref.ref(operand)

    def function(t: torch.Tensor = operand) -> None:
        t.add_(1)

    recorded = measure.captured(function, torch.device("cuda"))
    del function, operand
    gc.collect()
    assert alive() is not None, "freed while its graph could still be replayed"
    recorded()
    assert recorded.graph.replays == 1
    del recorded
    gc.collect()
    assert alive() is None, "kept for longer than the graph"


@pytest.mark.gpu
def test_a_replay_reads_its_own_memory():
    """The same on a GPU: catches a replay that reads what was allocated after the recording."""
    out = torch.zeros(1 << 20, device="cuda")

    def make() -> measure.Recorded:
        operand = torch.ones_like(out)
        return measure.captured(lambda: out.add_(operand), out.device)

    recorded = make()
    others = [torch.full_like(out, 7.0) for _ in range(8)]
    out.zero_()
    recorded()
    assert (out == 1).all() and len(others) == 8


def test_who_failed_is_said():
    """Catches a failure while timing that names nobody."""

    def fails() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with ...")

    with pytest.raises(measure.TimingError, match=r"^theirs: RuntimeError: CUDA error: .* encountered$") as caught:
        measure.wall_microseconds({"ours": lambda: None, "theirs": fails}, torch.device("cpu"), reps=1, rounds=1)
    assert caught.value.name == "theirs"
