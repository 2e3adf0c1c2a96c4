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
