"""A map over a stream with worker processes: in order, in bounded memory, and never hanging.

Workers are started with `spawn`: forking a process in which torch or W&B have started threads can deadlock. They
ignore Ctrl-C (the parent stops them) and exit when the parent is gone, even when it was killed. With one worker no
process is started: the function is called right here.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from transformerlm.utils.interrupts import ctrl_c_held_back, leave_with_parent, result_of

Item = TypeVar("Item")
Result = TypeVar("Result")

ProgressCallback = Callable[[str, int, int], None]
"""Called with (stage, done, total); what is counted depends on the stage."""

# Below this a worker's start (0.2-0.4 s) costs more than it saves.
SMALL_INPUT_BYTES = 8_000_000

_worker_function: Callable[[Any], Any] | None = None


def default_num_workers(input_bytes: int) -> int:
    """Return one worker for small inputs, else one for each CPU that this process may use."""
    if input_bytes < SMALL_INPUT_BYTES:
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def resolve_num_workers(num_workers: int | None, input_bytes: int) -> int:
    """Return the number of workers asked for, or the default where none was.

    Raises:
        TypeError: no whole number.
        ValueError: fewer than one.
    """
    if num_workers is None:
        return default_num_workers(input_bytes)
    _check_num_workers(num_workers)
    return num_workers


def map_in_order(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    num_workers: int,
    threads: bool = False,
    caller_works: bool = False,
) -> Generator[Result, None, None]:
    """Yield `function(item)` for each item, in order; at most two items for each worker are pending.

    `function` is pickled once for each worker, so it may be a bound method of something large. With `threads` the
    workers are threads and nothing is pickled: for functions that give up the GIL. Then even a single worker works
    while the caller reads the items and uses the results. With `caller_works` the calling thread is one of several
    workers, for functions that take some milliseconds: one thread less shares the processors, and what the caller has
    read is in the cache of its own.

    What `items` raises comes after the results of all items before it, so reading ahead changes nothing for the caller.

    Raises:
        ValueError: fewer workers than one.
        RuntimeError: a worker process died. What the function itself raises comes through unchanged.
    """
    _check_num_workers(num_workers)
    if num_workers == 1 and not threads:
        yield from map(function, items)
        return
    if threads and caller_works and num_workers > 1:
        yield from _map_with_caller(function, items, num_workers)
        return
    pool: Executor
    if threads:
        pool, call = ThreadPoolExecutor(num_workers), function
    else:
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(num_workers, context, initializer=_start_worker, initargs=(function,))
        call = _call
    pending: deque[Future[Result]] = deque()
    errors: list[Exception] = []
    try:
        for item in _until_error(items, errors):
            with ctrl_c_held_back():  # what is started here never hears it
                pending.append(pool.submit(call, item))
            if len(pending) >= 2 * num_workers:
                yield result_of(pending.popleft())
        while pending:
            yield result_of(pending.popleft())
        if errors:
            raise errors[0]
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a worker process died: killed (out of memory?), or started from a script without "
            "`if __name__ == '__main__':`; num_workers=1 works without worker processes"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _map_with_caller(
    function: Callable[[Item], Result], items: Iterable[Item], num_workers: int
) -> Generator[Result, None, None]:
    """Yield what `map_in_order` does; the caller takes an item whenever the threads have enough, or it would wait."""
    pool = ThreadPoolExecutor(num_workers - 1)
    pending: deque[tuple[Item, Future[Result]]] = deque()
    errors: list[Exception] = []

    def take_one() -> bool:
        for place in reversed(range(len(pending))):  # the last one read is still in this processor's cache
            item, future = pending[place]
            if future.cancel():  # no thread has begun it
                pending[place] = item, _done_here(function, item)
                return True
        return False

    try:
        for item in _until_error(items, errors):
            with ctrl_c_held_back():  # what is started here never hears it
                pending.append((item, pool.submit(function, item)))
            if sum(not (future.running() or future.done()) for _, future in pending) >= num_workers:
                take_one()
            while pending and (pending[0][1].done() or len(pending) >= 2 * num_workers):
                yield result_of(pending.popleft()[1])
        while pending:
            if pending[0][1].done() or not take_one():
                yield result_of(pending.popleft()[1])
        if errors:
            raise errors[0]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _done_here(function: Callable[[Item], Result], item: Item) -> Future[Result]:
    """Return the result of a call, or its error, as a future."""
    future: Future[Result] = Future()
    try:
        future.set_result(function(item))
    except Exception as error:
        future.set_exception(error.with_traceback(None))  # a traceback would hold the item
    return future


def _until_error(items: Iterable[Item], errors: list[Exception]) -> Iterator[Item]:
    """Yield the items; an error that ends them goes to `errors`."""
    try:
        yield from items
    except Exception as error:
        errors.append(error)


def _check_num_workers(num_workers: int) -> None:
    if not hasattr(num_workers, "__index__"):
        found = f"{type(num_workers).__name__} {num_workers!r}"
        raise TypeError(f"num_workers: expected a whole number, found {found}")
    if num_workers < 1:
        raise ValueError(f"num_workers: expected at least 1, found {num_workers}")


def _start_worker(function: Callable[[Any], Any]) -> None:
    global _worker_function
    _worker_function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    leave_with_parent()


def _call(item: Any) -> Any:
    assert _worker_function is not None, "a task came before the worker was set up"
    return _worker_function(item)
