"""Helpers share the work of the thread that calls them."""

from __future__ import annotations

import os
import threading
import time

import pytest

from transformerlm.utils import helpers
from transformerlm.utils.helpers import share


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_all_tasks_are_done_and_begun_in_their_order(threads: int) -> None:
    """By as many threads as were allowed, at most."""
    begun: list[int] = []
    by: set[int] = set()

    def do(number: int) -> None:
        begun.append(number)
        by.add(threading.get_ident())
        time.sleep(0.001)

    share([lambda number=number: do(number) for number in range(20)], threads)  # type: ignore[misc]
    assert sorted(begun) == [*range(20)]
    assert all(abs(number - place) < threads for place, number in enumerate(begun))
    assert threading.get_ident() in by
    assert len(by) <= threads
    share([], threads)


def test_a_task_may_wait_for_one_before_it() -> None:
    """The one before has begun by then, whoever does it."""
    for _ in range(50):
        done = threading.Event()
        share([done.set, done.wait, done.wait], 2)


@pytest.mark.parametrize("place", range(4))
def test_what_a_task_raises_is_raised_when_no_thread_works_any_more(place: int) -> None:
    """Those that have not begun are left."""
    running = 0

    def work() -> None:
        nonlocal running
        running += 1
        time.sleep(0.002)
        running -= 1

    def fail() -> None:
        raise OSError("no space left")

    tasks = [work] * 40
    tasks[place] = fail
    with pytest.raises(OSError, match="no space left"):
        share(tasks, 2)
    assert running == 0


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux")
def test_helpers_keep_off_the_processor_of_their_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the two never take turns on one."""
    allowed = os.sched_getaffinity(0)
    both = threading.Barrier(2, timeout=60)
    found: list[set[int]] = []

    def meet() -> None:
        both.wait()
        if threading.current_thread().name.startswith("helper"):
            found.append(os.sched_getaffinity(0))

    for here in sorted(allowed):
        monkeypatch.setattr(helpers, "_processor", lambda here=here: here)
        share([meet, meet], 2)  # which may begin the thread
        share([meet, meet], 2)
        assert found[-1] == (allowed - {here} or allowed)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_process_has_helpers_of_its_own() -> None:
    """The threads of its parent do not live in it, so one that waited for them would wait for ever."""
    both = threading.Barrier(2, timeout=20)
    share([both.wait, both.wait], 2)
    if not (child := os.fork()):
        code = 1
        try:
            share([both.wait, both.wait], 2)
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
