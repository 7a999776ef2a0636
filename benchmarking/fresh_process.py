"""Run a function in a new process, where its peak memory is its own and nothing is warm."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

from profiling.memory import peak_rss_bytes

T = TypeVar("T")


def in_fresh_process(function: Callable[..., T], *args: Any) -> tuple[T, int | None]:
    """Return what `function(*args)` returns in a new process, and that process's peak memory in bytes.

    The peak includes the interpreter and what the function's module imports. `function` and its arguments must pickle.
    An exception is raised here too; BrokenProcessPool when the process died, for want of memory perhaps.
    """
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_with_peak, function, args).result()


def _with_peak(function: Callable[..., T], args: tuple[Any, ...]) -> tuple[T, int | None]:
    return function(*args), peak_rss_bytes()
