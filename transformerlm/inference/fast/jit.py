"""What the compiled loops need of numba: the decorator, and the names of `instructions.py`.

numba is imported where a loop has to be compiled, and not where its machine code is kept (`utils/kernel.py`).

Part of: choice_kernels, step_kernels
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar, cast

from transformerlm.utils.kernel import Instruction, Kernel

Function = TypeVar("Function", bound=Callable[..., Any])

# contract: a product and a sum are one instruction, rounded once. Nothing is summed in another order than is written.
# The loops never allocate, so no references are counted (`_nrt`): what would count them is part of numba.
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}, "_nrt": False}


def kernel(function: Function) -> Function:
    """Compile on the first call, without the GIL, and keep the machine code on disk where there is a place for it."""
    return cast(Function, Kernel(function, **_OPTIONS))


def _instructions() -> ModuleType:
    from transformerlm.inference.fast import instructions

    return instructions


multiply_one, multiply_four, multiply_keys, fetch = (
    Instruction(_instructions, name) for name in ("multiply_one", "multiply_four", "multiply_keys", "fetch")
)
