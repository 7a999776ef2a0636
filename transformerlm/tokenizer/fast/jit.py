"""What the kernels need of numba: the decorators, and a few machine instructions that Python cannot spell.

`byte_at`, `word_at` and `bytes_between` look at raw memory: no bounds are checked and no negative index wraps around,
which is why the kernels are given texts with `arrays.PADDING` zero bytes after them. Each is a function of a uint8
array and a position; tests/tokenizer/plain_kernels.py spells them in plain Python, where the kernels run uncompiled.

numba is imported where a kernel has to be compiled, and not where its machine code is kept (`utils/kernel.py`).

Part of: encode_kernels, merge_kernels, piece_kernels, table_kernels, text_kernels, train_kernels
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar, cast

import numpy as np

from transformerlm.utils.kernel import Instruction, Kernel

Function = TypeVar("Function", bound=Callable[..., Any])

# Kernels never allocate, so no references are counted (`_nrt`): numba would count those of the arrays in each inlined
# helper, four atomic calls a piece of text, ten times the scanner's own work.
_OPTIONS: dict[str, Any] = {"nogil": True, "_nrt": False}


def kernel(function: Function) -> Function:
    """Compile on the first call, without the GIL, and keep the machine code on disk where there is a place for it."""
    return cast(Function, Kernel(function, **_OPTIONS))


def helper(function: Function) -> Function:
    """Compile as a part of the kernels that call it."""
    return cast(Function, Kernel(function, inline="always", **_OPTIONS))


unsigned = np.uint64
"""Makes a place an index. numba lets a negative index count from the end, so it asks of each signed one whether it is
negative: two more instructions, and a loop that could read many items at once reads each by itself."""


def _instructions() -> ModuleType:
    from transformerlm.tokenizer.fast import instructions

    return instructions


byte_at, word_at, bytes_between, lowest_bit, prefetch = (
    Instruction(_instructions, name) for name in ("byte_at", "word_at", "bytes_between", "lowest_bit", "prefetch")
)
