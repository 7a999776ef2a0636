"""What makes the benchmarks quick to test: small limits, and no new processes where one test of them is enough."""

from __future__ import annotations

from typing import Any

import pytest


class Local:
    """Stands for `fresh_process.Remote`: the object lives in this process."""

    def __init__(self, build: Any, *args: Any) -> None:
        self._object = build(*args)

    def __enter__(self) -> Local:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def call(self, method: str, *args: Any) -> Any:
        return getattr(self._object, method)(*args)


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure the machine's limits on small tensors."""
    monkeypatch.setattr("benchmarking.limits._MATMUL_SIZE", {"cpu": 64})
    monkeypatch.setattr("benchmarking.limits._COPY_BYTES", {"cpu": 2**16})


@pytest.fixture
def no_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in this process what would run in a fresh one, and say it held a megabyte."""
    monkeypatch.setattr("benchmarking.fresh_process.in_fresh_process", lambda function, *args: (function(*args), 10**6))
    monkeypatch.setattr("benchmarking.fresh_process.Remote", Local)
    monkeypatch.setattr("benchmarking.train_peers.keep_freed_memory", lambda device: False)
