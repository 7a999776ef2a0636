"""Bounds on the cost of something, which hold on a machine that is slower, or busy with other work."""

from __future__ import annotations

import time
from collections.abc import Callable

LOOP_SECONDS = 0.05  # of the loop below on the machine on which the bounds were set


def cost(work: Callable[[], object]) -> float:
    """Return the CPU seconds of a piece of work, as the machine on which the bounds were set would count them."""
    loop = min(_cpu_seconds(_loop) for _ in range(3))
    return _cpu_seconds(work) / max(1.0, loop / LOOP_SECONDS)


def _loop() -> int:
    total = 0
    for number in range(1_000_000):
        total += number & 3
    return total


def _cpu_seconds(work: Callable[[], object]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin
