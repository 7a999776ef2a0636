"""Run code in a new process, where its peak memory is its own, nothing is warm, and no setting is somebody else's."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from typing import Any, TypeVar

from profiling.memory import peak_rss_bytes

T = TypeVar("T")


def in_fresh_process(function: Callable[..., T], *args: Any) -> tuple[T, int | None]:
    """Return what `function(*args)` returns in a new process, and that process's peak memory in bytes.

    The peak includes the interpreter and what the function's module imports. `function` and its arguments must pickle.
    An exception is raised here too; BrokenProcessPool when the process died, for want of memory perhaps.
    """
    with _new_process() as process:
        return process.submit(_with_peak, function, args).result()


class Remote:
    """An object that lives in a new process until the `with` block ends; errors come as from `in_fresh_process`."""

    def __init__(self, build: Callable[..., object], *args: Any) -> None:
        self._process = _new_process()
        self._build = (build, args)

    def __enter__(self) -> Remote:
        with ExitStack() as stack:
            stack.enter_context(self._process)
            self._process.submit(_keep, *self._build).result()
            stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._process.shutdown()

    def call(self, method: str, *args: Any) -> Any:
        """Return what the object's method returns; it and the arguments must pickle."""
        return self._process.submit(_call_kept, method, args).result()


def _new_process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn"))


def _with_peak(function: Callable[..., T], args: tuple[Any, ...]) -> tuple[T, int | None]:
    return function(*args), peak_rss_bytes()


_kept: list[object] = []  # in the new process: the one object that `Remote` calls


def _keep(build: Callable[..., object], args: tuple[Any, ...]) -> None:
    _kept.append(build(*args))


def _call_kept(method: str, args: tuple[Any, ...]) -> Any:
    return getattr(_kept[0], method)(*args)
