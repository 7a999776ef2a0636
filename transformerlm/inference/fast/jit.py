"""What the compiled loops need of numba. Calling `kernel` imports it, and fails where it is not installed.

Part of: step_kernels, choice_kernels
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from transformerlm.utils.compiled import compiled

Function = TypeVar("Function", bound=Callable[..., Any])


def kernel(function: Function) -> Function:
    """Compile on the first call, without the GIL, and keep the machine code on disk where there is a place for it."""
    # contract: a product and a sum are one instruction, rounded once. All is summed in the order that is written.
    return compiled(function, nogil=True, error_model="numpy", fastmath={"contract"})
