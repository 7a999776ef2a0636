"""Ctrl-C at a moment when nothing is half done, and processes that end with their parent.

Python runs the handler of a signal between any two steps of the main thread, and Ctrl-C's raises KeyboardInterrupt
there. In `concurrent.futures` that may be the moment after a future's lock was taken and before the `with` began that
gives it back. The thread that sets the future's result then waits for that lock forever, and so does whoever joins it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import TypeVar

Result = TypeVar("Result")

_LOOK_SECONDS = 0.1


@contextmanager
def ctrl_c_held_back() -> Iterator[None]:
    """Let Ctrl-C wait until the end of the block, also in the processes and threads that the block starts.

    Its handler is held back, because another thread may receive the signal, and that runs the handler in the main
    thread all the same. The signal is blocked as well, because what the block starts inherits that: else Ctrl-C would
    end a new process during its imports, with a traceback. Windows blocks no signals.
    """
    heard: list[int] = []
    is_held = threading.current_thread() is threading.main_thread() and callable(signal.getsignal(signal.SIGINT))
    handler = signal.signal(signal.SIGINT, lambda number, _: heard.append(number)) if is_held else None
    try:
        with _ctrl_c_blocked():
            yield
    finally:
        if is_held:
            signal.signal(signal.SIGINT, handler)
            if heard:
                signal.raise_signal(signal.SIGINT)


def result_of(future: Future[Result]) -> Result:
    """Return a future's result, or raise what its function raised, as `future.result()` does; Ctrl-C is safe here.

    It is noticed after a tenth of a second at most.
    """
    while True:
        with ctrl_c_held_back():
            try:
                future.exception(timeout=_LOOK_SECONDS)
            except TimeoutError:  # of the wait: what the function raised is returned
                continue
            return future.result()


@contextmanager
def _ctrl_c_blocked() -> Iterator[None]:
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_with_parent() -> None:
    """Let this process, which `multiprocessing` has started, end as soon as its parent has, even if that was killed."""
    threading.Thread(target=_end_after_parent, daemon=True).start()


def _end_after_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
