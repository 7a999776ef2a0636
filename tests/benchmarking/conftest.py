"""What makes the benchmarks quick to test: small limits, and no new processes except where a test needs them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def object_in_this_process(build: Any, *args: Any) -> Iterator[Any]:
    """Replace `fresh_process.object_in_fresh_process`."""
    built = build(*args)
    yield lambda method, *arguments: getattr(built, method)(*arguments)


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure the machine's limits on small tensors."""
    monkeypatch.setattr("benchmarking.limits._MATMUL_SIZE", {"cpu": 64})
    monkeypatch.setattr("benchmarking.limits._COPY_BYTES", {"cpu": 2**16})


@pytest.fixture
def no_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in this process what would run in a fresh one, and report a peak of a megabyte."""
    monkeypatch.setattr("benchmarking.fresh_process.in_fresh_process", lambda function, *args: (function(*args), 10**6))
    monkeypatch.setattr("benchmarking.fresh_process.object_in_fresh_process", object_in_this_process)
    monkeypatch.setattr("benchmarking.peers.training.keep_freed_memory", lambda device: False)
