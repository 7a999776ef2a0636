"""The clock of a run: tokens per second over a measured window, and the end of its time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from transformerlm.utils.device import synchronize


class Timer:
    """Tokens per second over the window since the last reading, and the end of `max_seconds`; pauses do not count."""

    def __init__(self, max_seconds: float | None, device: torch.device) -> None:
        self._max_seconds = max_seconds
        self._device = device
        self._start = self._mark = time.perf_counter()
        self._tokens: int | None = None

    def rates(self, tokens: int) -> dict[str, float]:
        """Return tokens per second since the last call, and start a new window; nothing for the first window."""
        synchronize(self._device)
        now = time.perf_counter()
        seconds, before = now - self._mark, self._tokens
        self._mark, self._tokens = now, tokens
        return {} if before is None or seconds <= 0 else {"tokens_per_second": (tokens - before) / seconds}

    def restart(self) -> None:
        """Begin with a first window again: the tokens have gone back."""
        self._tokens = None

    def is_over(self) -> bool:
        """Tell whether `max_seconds` have passed."""
        return self._max_seconds is not None and time.perf_counter() - self._start >= self._max_seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Return a context whose time does not count into the rates."""
        synchronize(self._device)
        began = time.perf_counter()
        try:
            yield
        finally:
            self._mark += time.perf_counter() - began
