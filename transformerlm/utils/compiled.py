"""Loops that numba compiles, kept on disk until a file of their folder changes (extra `fast`)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function, **options: Any) -> Function:
    """Compile on the first call, with numba's `options`, and keep the machine code where there is a place for it.

    Raises:
        ImportError: numba is not installed.
    """
    from numba import njit

    try:
        kernel = njit(cache=True, **options)(function)
    except RuntimeError:  # numba finds no folder that can be written, neither beside the file nor at home
        return njit(**options)(function)  # type: ignore[no-any-return]
    # numba throws its kept code away when the function's own file changes; a kernel holds code of the others as well.
    cache_file: Any = getattr(kernel._cache, "_cache_file", None)
    if hasattr(cache_file, "_source_stamp"):
        cache_file._source_stamp = _source_stamp(_folder_of(function))
    return kernel  # type: ignore[no-any-return]


def _folder_of(function: Callable[..., Any]) -> Path:
    return Path(str(sys.modules[function.__module__].__file__)).parent


@cache
def _source_stamp(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Return what changes when a file of a folder does."""
    files = sorted(folder.glob("*.py"))
    return tuple((path.name, path.stat().st_mtime_ns, path.stat().st_size) for path in files)
