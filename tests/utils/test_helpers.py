"""Helpers share the work of the thread that calls them."""

from __future__ import annotations

import os
import threading
import time
from functools import partial

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
        done, came = threading.Event(), []

        def wait(done: threading.Event = done, came: list[bool] = came) -> None:
            came.append(done.wait(20))

        share([done.set, wait, wait], 2)
        assert came == [True, True]


@pytest.mark.parametrize("place", range(4))
def test_what_a_task_raises_is_raised_when_no_thread_works_any_more(place: int) -> None:
    """Those that have not begun are left, whichever thread it was."""
    lock, begun, running = threading.Lock(), 0, 0

    def work() -> None:
        nonlocal begun, running
        with lock:
            begun, running = begun + 1, running + 1
        time.sleep(0.02)
        with lock:
            running -= 1

    def fail() -> None:
        raise OSError("no space left")

    tasks = [work] * 40
    tasks[place] = fail
    with pytest.raises(OSError, match="no space left"):
        share(tasks, 3)
    assert running == 0
    assert begun < 10


def test_nobody_waits_for_a_helper_that_has_not_begun() -> None:
    """All callers share one pool: while its threads do another's work, and inside a task, the caller works alone."""
    release, busy = threading.Event(), [threading.Event() for _ in range((os.cpu_count() or 1) + 1)]

    def hold(own: threading.Event) -> None:
        own.set()
        assert release.wait(60)

    other = threading.Thread(target=share, args=([partial(hold, own) for own in busy], len(busy)))
    other.start()
    assert all(own.wait(60) for own in busy)
    done: list[int] = []
    share([partial(share, [partial(done.append, number)] * 2, 2) for number in range(3)], 2)
    assert sorted(done) == [0, 0, 1, 1, 2, 2]
    release.set()
    other.join()


def test_where_no_thread_can_be_started_the_caller_works_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under a limit of processes; nothing is done later."""

    def fail(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    done: list[int] = []
    helpers._helpers.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        share([partial(done.append, number) for number in range(4)], 3)
    assert done == [0, 1, 2, 3]
    share([partial(done.append, number) for number in range(4, 8)], 2)
    assert sorted(done) == [*range(8)]
    helpers._helpers.cache_clear()


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

    helpers._helpers.cache_clear()
    for here in sorted(allowed):
        monkeypatch.setattr(helpers, "_sched_getcpu", lambda here=here: lambda: here)
        share([meet, meet], 2)
        assert found[-1] == (allowed - {here} or allowed)
    try:
        os.sched_setaffinity(0, {here})  # the caller's own may change
        share([meet, meet], 2)
        assert found[-1] == {here}
    finally:
        os.sched_setaffinity(0, allowed)
        helpers._helpers.cache_clear()


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
