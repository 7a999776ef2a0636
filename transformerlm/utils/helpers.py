"""Helper threads that share the work of the thread that calls them, and keep off its processor."""

from __future__ import annotations

import ctypes
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cache

from transformerlm.utils.interrupts import ctrl_c_held_back

Task = Callable[[], None]


def share(tasks: Sequence[Task], threads: int) -> None:
    """Do all tasks, which are begun in their order, by this thread and helpers, `threads` in all.

    What a task raises is raised here, when no thread works any more.
    """
    waiting, count = deque(tasks), min(len(tasks), threads) - 1
    with ctrl_c_held_back():
        helpers = _helpers().begin(count, waiting) if count > 0 else []
        try:
            _do_all(waiting)
        finally:
            waiting.clear()
            for each in helpers:
                each.result()


def _do_all(waiting: deque[Task]) -> None:
    """Do tasks until none waits."""
    while waiting:
        try:
            task = waiting.popleft()
        except IndexError:  # another thread took the last one
            return
        task()


class _Helpers:
    """A pool of threads.

    Linux often wakes a thread on the processor of the one that wakes it, if the others are busy. The two then take
    turns there for milliseconds, when another has long been free. So helpers may not run where their caller does.
    """

    def __init__(self) -> None:
        self._ids: list[int] = []  # of the threads, as the system has them
        self._kept_off: int | None = None
        self._pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="helper", initializer=self._note)

    def _note(self) -> None:
        self._ids.append(threading.get_native_id())
        self._kept_off = None

    def begin(self, count: int, waiting: deque[Task]) -> list[Future[None]]:
        """Let so many threads do tasks until none waits."""
        self._keep_off()
        return [self._pool.submit(_do_all, waiting) for _ in range(count)]

    def _keep_off(self) -> None:
        here = _processor()
        if here is None or here == self._kept_off:
            return
        self._kept_off = here
        if others := os.sched_getaffinity(0) - {here}:
            with suppress(OSError):  # where a sandbox forbids it, it is slower
                for thread in self._ids:
                    os.sched_setaffinity(thread, others)


def _processor() -> int | None:
    """Return the number of the processor on which this thread runs; None: the system does not tell."""
    ask = _sched_getcpu()
    return None if ask is None else ask()


@cache
def _sched_getcpu() -> Callable[[], int] | None:
    return getattr(ctypes.CDLL(None), "sched_getcpu", None) if hasattr(os, "sched_setaffinity") else None


@cache
def _helpers() -> _Helpers:
    _forget_in_children()
    return _Helpers()


@cache
def _forget_in_children() -> None:
    """See to it that a forked child begins helpers of its own: the threads of its parent do not live in it."""
    if hasattr(os, "register_at_fork"):  # not on Windows
        os.register_at_fork(after_in_child=_helpers.cache_clear)
