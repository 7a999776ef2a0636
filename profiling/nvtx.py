"""NVTX ranges by level, chosen by environment variables; they cost nothing when off.

`TRANSFORMERLM_NVTX=1` switches them on, and `TRANSFORMERLM_NVTX_LEVEL=coarse|fine|verbose` says how many. Only this
module reads the two, once, at the first range. It knows nothing of models: callers name their ranges. Without a CUDA
device, and inside a graph that `torch.compile` is tracing, every range is the same empty context.
"""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

Level = Literal["coarse", "fine", "verbose"]

LEVELS: dict[str, int] = {"coarse": 1, "fine": 2, "verbose": 3}
ALL_ON: dict[str, str] = {"TRANSFORMERLM_NVTX": "1", "TRANSFORMERLM_NVTX_LEVEL": "verbose"}
"""The environment in which a process records every range."""

_NULL: AbstractContextManager[None] = nullcontext()

# None until the first range has read the environment; 0 is off, otherwise the highest level that is recorded.
_threshold: int | None = None


class _Range:
    """A range pushed on entry and popped on exit; torch's own class takes braces in a name for a format string."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        import torch

        torch.cuda.nvtx.range_push(self._name)  # type: ignore[no-untyped-call]

    def __exit__(self, *exc_info: object) -> None:
        import torch

        torch.cuda.nvtx.range_pop()  # type: ignore[no-untyped-call]


def range(name: str, *, level: Level = "coarse") -> AbstractContextManager[None]:
    """Return a context manager that marks what runs inside it as `name` on the profiler's time line.

    `level` is the coarsest setting at which the range still shows: "coarse" for data, forward, backward and optimizer,
    "fine" for attention and ffn, "verbose" for anything below. Raises ValueError when an environment variable is
    malformed.
    """
    # This check precedes any look at the cached level, so that a compiled graph has no guard on it to recompile for.
    torch = sys.modules.get("torch")
    if torch is not None and torch.compiler.is_compiling():
        return _NULL
    threshold = reload() if _threshold is None else _threshold
    if threshold == 0 or LEVELS[level] > threshold:
        return _NULL
    return _Range(name)


def reload() -> int:
    """Read the environment again and return the level that now holds, 0 for off (for tests; a run reads it once)."""
    global _threshold
    _threshold = None
    _threshold = _read_environment()
    return _threshold


def _read_environment() -> int:
    switch = os.environ.get("TRANSFORMERLM_NVTX", "")
    if switch not in ("", "0", "1"):
        raise ValueError(f"TRANSFORMERLM_NVTX: expected 0 or 1, got {switch!r}; 1 records ranges")
    if switch != "1":
        return 0
    level = os.environ.get("TRANSFORMERLM_NVTX_LEVEL", "coarse")
    if level not in LEVELS:
        raise ValueError(f"TRANSFORMERLM_NVTX_LEVEL: expected one of {', '.join(LEVELS)}, got {level!r}")
    import torch

    # A CPU build has the functions, but they raise when called.
    return LEVELS[level] if torch.cuda.is_available() else 0
