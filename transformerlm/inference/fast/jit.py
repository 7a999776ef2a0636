"""What the compiled loops need of numba. Importing this module imports it, and fails where it is not installed.

Part of: step_kernels, choice_kernels
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from numba import njit

Function = TypeVar("Function", bound=Callable[..., Any])

# contract: a product and a sum are one instruction, rounded once. Nothing is summed in another order than is written.
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}


def kernel(function: Function) -> Function:
    """Compile on the first call, without the GIL, and keep the machine code on disk where there is a place for it."""
    try:
        return njit(cache=True, **_OPTIONS)(function)  # type: ignore[no-any-return]
    except RuntimeError:  # numba finds no folder that can be written
        return njit(**_OPTIONS)(function)  # type: ignore[no-any-return]
