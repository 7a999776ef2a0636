"""The clocks of a run: seconds of one call, tokens per second over a measured window, and seconds of the whole run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from transformerlm.utils.device import synchronize


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that a call takes, until the device has finished what it queued."""
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


class Timer:
    """Tokens per second over the window since the last reading, without pauses; and seconds in two counts.

    Args:
        device: what has to finish before the clock is read.
        before: the time in seconds that earlier starts of the run took.
        elapsed_s: the time in seconds that it took to get to the step from which the run goes on.
    """

    def __init__(self, device: torch.device, *, before: float = 0.0, elapsed_s: float = 0.0) -> None:
        self._device = device
        self._before = before
        self._start = self._mark = time.perf_counter()
        self._tokens: int | None = None
        self._elapsed_before, self._elapsed_start = elapsed_s, self._start

    def seconds(self) -> float:
        """Return how long the run has taken, over all its starts."""
        return self._before + time.perf_counter() - self._start

    def elapsed_s(self) -> float:
        """Return the seconds that it took to get to this step; the time of steps that were made again counts once.

        Validations and saves are in it. It is what a comparison of runs at equal time goes by.
        """
        return self._elapsed_before + time.perf_counter() - self._elapsed_start

    def rates(self, tokens: int) -> dict[str, float]:
        """Return tokens per second since the last call, and start a new window; nothing for the first window.

        It does not wait for the device: each step has waited for its loss, and the update that may be left is at most
        one at either end of the window.
        """
        now = time.perf_counter()
        seconds, before = now - self._mark, self._tokens
        self._mark, self._tokens = now, tokens
        return {} if before is None or seconds <= 0 else {"tokens_per_second": (tokens - before) / seconds}

    def restart(self, *, elapsed_s: float) -> None:
        """Begin again with a first window at an earlier step, `elapsed_s` seconds from the run's beginning."""
        self._tokens = None
        self._elapsed_before, self._elapsed_start = elapsed_s, time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Return a context whose time does not count in the rates."""
        synchronize(self._device)
        began = time.perf_counter()
        try:
            yield
        finally:
            self._mark += time.perf_counter() - began
