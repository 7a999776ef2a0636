"""Run code in a new process, with its own peak memory, no warm caches, and no settings of other code.

Where the benchmark is killed, the process ends too.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from profiling.memory import peak_rss_bytes
from transformerlm.utils.interrupts import leave_with_parent

T = TypeVar("T")


def in_fresh_process(function: Callable[..., T], *args: Any) -> tuple[T, int | None]:
    """Return what `function(*args)` returns in a new process, and that process's peak memory in bytes.

    The peak includes the interpreter and what the function's module imports. `function` and its arguments must pickle.
    An exception is raised here, too; BrokenProcessPool means that the process died, perhaps for lack of memory.
    """
    with _new_process() as process:
        return process.submit(_with_peak, function, args).result()


@contextmanager
def object_in_fresh_process(build: Callable[..., object], *args: Any) -> Iterator[Callable[..., Any]]:
    """Build an object in a new process, where it lives until the `with` block ends.

    Yields a function that takes a method's name and arguments and returns what that method returns. Pickling and errors
    are as in `in_fresh_process`.
    """
    with _new_process() as process:
        process.submit(_keep, build, args).result()
        yield lambda method, *arguments: process.submit(_call_kept, method, arguments).result()


def _new_process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=leave_with_parent)


def _with_peak(function: Callable[..., T], args: tuple[Any, ...]) -> tuple[T, int | None]:
    return function(*args), peak_rss_bytes()


_kept: list[object] = []  # in the new process: the object of `object_in_fresh_process`


def _keep(build: Callable[..., object], args: tuple[Any, ...]) -> None:
    _kept.append(build(*args))


def _call_kept(method: str, args: tuple[Any, ...]) -> Any:
    return getattr(_kept[0], method)(*args)
