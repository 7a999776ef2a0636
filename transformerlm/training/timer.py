"""The clock of a run: tokens per second over a measured window, and how long it has trained."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from transformerlm.utils.device import synchronize


class Timer:
    """Tokens per second over the window since the last reading, in which pauses do not count; and seconds in all.

    `before` are the seconds that the run took until it was stopped and started again.
    """

    def __init__(self, device: torch.device, *, before: float = 0.0) -> None:
        self._device = device
        self._before = before
        self._start = self._mark = time.perf_counter()
        self._tokens: int | None = None

    def seconds(self) -> float:
        """Return how long the run has taken, over all its starts."""
        return self._before + time.perf_counter() - self._start

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

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Return a context whose time does not count into the rates."""
        synchronize(self._device)
        began = time.perf_counter()
        try:
            yield
        finally:
            self._mark += time.perf_counter() - began
