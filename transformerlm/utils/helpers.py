"""Helper threads that share the work of the thread that calls them, and keep off its processor."""

from __future__ import annotations

import ctypes
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache

from transformerlm.utils.interrupts import ctrl_c_held_back

Task = Callable[[], None]


def share(tasks: Sequence[Task], threads: int) -> None:
    """Do all tasks, which are begun in their order, by this thread and helpers, `threads` in all.

    What a task raises is raised here, when no thread works any more; tasks that have not begun by then are left.
    """
    work = _Work(tasks)
    with ctrl_c_held_back():
        if (count := min(len(tasks), threads) - 1) > 0:
            _helpers().begin(work.help, count)
        work.do()
        work.finish()


class _Work:
    """Tasks, and the helpers that do some of them."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._waiting = deque(tasks)
        self._errors: list[BaseException] = []
        self._num_helpers, self._is_over = 0, False
        self._changed = threading.Condition()

    def do(self) -> None:
        """Do tasks until none waits."""
        while self._waiting:
            try:
                task = self._waiting.popleft()
            except IndexError:  # another thread took the last one
                return
            try:
                task()
            except BaseException as error:
                self._waiting.clear()
                self._errors.append(error)

    def help(self) -> None:
        """Do tasks beside the thread whose work it is, unless that has finished."""
        with self._changed:
            if self._is_over:
                return
            self._num_helpers += 1
        self.do()
        with self._changed:
            self._num_helpers -= 1
            self._changed.notify()

    def finish(self) -> None:
        """Wait for the helpers that have begun; raise what a task has raised."""
        with self._changed:
            self._is_over = True
            self._changed.wait_for(lambda: not self._num_helpers)
        if self._errors:
            raise self._errors[0]


class _Helpers:
    """A pool of threads.

    Linux often wakes a thread on the processor of the one that wakes it, if the others are busy. The two then take
    turns there for milliseconds, when another has long been free. So helpers may not run where their caller does.
    """

    def __init__(self) -> None:
        self._ids: list[int] = []  # of the threads, as the system has them
        self._seen: tuple[int, frozenset[int]] | None = None
        self._others: frozenset[int] = frozenset()
        self._pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="helper", initializer=self._begin_thread)

    def _begin_thread(self) -> None:
        self._ids.append(threading.get_native_id())
        self._move(self._ids[-1:])

    def begin(self, work: Task, count: int) -> None:
        """Let so many threads work; where the system allows no more threads, fewer do."""
        self._keep_off()
        with suppress(RuntimeError):
            for _ in range(count):
                self._pool.submit(work)

    def _keep_off(self) -> None:
        """Look where the caller is, and where it may be; move the helpers if that has changed."""
        if (ask := _sched_getcpu()) is None:
            return
        with suppress(OSError):
            here, allowed = ask(), frozenset(os.sched_getaffinity(0))
            if (here, allowed) != self._seen:
                self._seen, self._others = (here, allowed), allowed - {here} or allowed
                self._move(self._ids)

    def _move(self, threads: list[int]) -> None:
        with suppress(OSError):  # where a sandbox forbids it, it is slower
            for thread in threads if self._others else []:
                os.sched_setaffinity(thread, self._others)


@cache
def _sched_getcpu() -> Callable[[], int] | None:
    """Return what tells on which processor a thread runs; None: the system does not tell."""
    with suppress(OSError):  # of a Python that is linked to its libraries for good
        if hasattr(os, "sched_setaffinity"):
            return getattr(ctypes.PyDLL(None), "sched_getcpu", None)
    return None


@cache
def _helpers() -> _Helpers:
    _forget_in_children()
    return _Helpers()


@cache
def _forget_in_children() -> None:
    """See to it that a forked child begins helpers of its own: the threads of its parent do not live in it."""
    if hasattr(os, "register_at_fork"):  # not on Windows
        os.register_at_fork(after_in_child=_helpers.cache_clear)
