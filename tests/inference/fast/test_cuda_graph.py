"""The capture of a step, without a GPU: on whose streams it is. tests/gpu has the numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from transformerlm.inference.fast import cuda_graph
from transformerlm.inference.fast.cuda_graph import CapturedStep


class Stream:
    """A stream that notes the devices of what it waits for."""

    def __init__(self, device: object, seen: list[str]) -> None:
        self.device, self._seen = str(device), seen

    def wait_stream(self, other: Stream) -> None:
        self._seen += [self.device, other.device]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Return a pretended machine: its current device, and the devices of all streams that were used."""
    found = SimpleNamespace(current="cuda:0", seen=[])

    @contextmanager
    def within(device: torch.device) -> Iterator[None]:
        before, found.current = found.current, str(device)
        yield
        found.current = before

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        found.seen.append(stream.device)
        yield

    @contextmanager
    def capture(graph: object, *, stream: Stream | None = None, capture_error_mode: str) -> Iterator[None]:
        found.seen += [found.current, stream.device if stream else "cuda:0"]  # by default, of the first capture
        yield

    pretended = {
        "Stream": lambda device: Stream(device, found.seen),
        "current_stream": lambda: Stream(found.current, found.seen),
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
        "device": within,
        "stream": on,
        "graph": capture,
    }
    for name, value in pretended.items():
        monkeypatch.setattr(torch.cuda, name, value)
    cuda_graph._streams.cache_clear()
    yield found
    cuda_graph._streams.cache_clear()


def test_a_step_is_captured_on_streams_of_its_own_device(machine: SimpleNamespace) -> None:
    """Another device is the current one, before and after; the CPU stands for that of the model."""
    calls = []
    step = CapturedStep(lambda ids, positions: calls.append(1) or torch.zeros(2, 5), [3, 4], torch.device("cpu"))
    assert len(calls) == 4
    assert set(machine.seen) == {"cpu"}
    assert machine.current == "cuda:0"
    assert step(torch.tensor([[1], [2]]), [4, 5]).shape == (2, 5)
