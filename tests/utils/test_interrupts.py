"""Ctrl-C comes between two things, not in the middle of one."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from transformerlm.utils.interrupts import ctrl_c_held_back, result_of

WAIT = 300


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="needs POSIX signals")
def test_ctrl_c_waits_for_the_end_of_the_block() -> None:
    """The block is completed, then KeyboardInterrupt is raised; the handler and the blocked signals are as before."""
    handler, blocked = signal.getsignal(signal.SIGINT), signal.pthread_sigmask(signal.SIG_BLOCK, [])
    seen: list[set[int]] = []

    def work() -> None:
        with ctrl_c_held_back():
            signal.raise_signal(signal.SIGINT)
            seen.append(signal.pthread_sigmask(signal.SIG_BLOCK, []))

    with pytest.raises(KeyboardInterrupt):
        work()
    assert seen == [blocked | {signal.SIGINT}]
    assert signal.getsignal(signal.SIGINT) is handler
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == blocked


def test_ctrl_c_that_another_thread_receives_waits_too() -> None:
    """The signal reaches a thread that does not block it, and still nothing is raised within the block."""
    is_over = threading.Event()
    thread = threading.Thread(target=is_over.wait)
    thread.start()
    steps: list[int] = []

    def work() -> None:
        with ctrl_c_held_back():
            os.kill(os.getpid(), signal.SIGINT)
            for step in range(100_000):  # Python runs a handler between two of them
                steps.append(step)

    try:
        with pytest.raises(KeyboardInterrupt):
            work()
    finally:
        is_over.set()
        thread.join()
    assert len(steps) == 100_000


def test_a_handler_of_the_caller_is_kept_and_called_once() -> None:
    """A handler that raises nothing is called after the block, once for several signals."""
    calls: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: calls.append(number))
    try:
        with ctrl_c_held_back():
            signal.raise_signal(signal.SIGINT)
            assert not calls
        assert calls == [signal.SIGINT]
        with ctrl_c_held_back():
            pass
        assert calls == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_thread_and_an_ignored_signal_need_nothing() -> None:
    """Outside of the main thread, and where Ctrl-C is ignored, the block runs and Ctrl-C stays as it is."""
    with ThreadPoolExecutor(1) as pool:

        def handler() -> Any:
            with ctrl_c_held_back():
                return signal.getsignal(signal.SIGINT)

        assert pool.submit(handler).result(WAIT) is signal.getsignal(signal.SIGINT)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with ctrl_c_held_back():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


class _Interrupted(threading.Condition):
    """The lock of a future; Ctrl-C comes when it has just been taken, once."""

    is_armed = True

    def __enter__(self) -> bool:
        taken = super().__enter__()
        if self.is_armed and threading.current_thread() is threading.main_thread():
            self.is_armed = False
            signal.raise_signal(signal.SIGINT)
        return taken


def test_a_future_stays_free_when_ctrl_c_comes_during_its_wait() -> None:
    """The thread that sets the result is not kept waiting for a lock that nobody gives back."""
    future: Future[int] = Future()
    future._condition = _Interrupted()
    with pytest.raises(KeyboardInterrupt):
        result_of(future)
    thread = threading.Thread(target=future.set_result, args=(3,), daemon=True)
    thread.start()
    thread.join(WAIT)
    assert not thread.is_alive()
    assert result_of(future) == 3


@pytest.mark.parametrize("error", [ValueError("no"), TimeoutError("the function's own")])
def test_what_the_function_raised_is_raised(error: Exception) -> None:
    """A result that takes longer than one look comes through, and so does each error, a TimeoutError too."""

    def work(outcome: Exception | int) -> int:
        time.sleep(0.25)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(type(error), match=str(error)):
            result_of(pool.submit(work, error))
        assert result_of(pool.submit(work, 7)) == 7
