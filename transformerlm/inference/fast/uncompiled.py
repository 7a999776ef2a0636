"""What is said once where loops that could be compiled are not, because compiling them failed.

numba compiles at the first call, so there is much that may fail late: LLVM, a full disk, a folder that has become
read-only. The same work is then done without it, more slowly.

Part of: decoder, choice
"""

from __future__ import annotations

import logging
from functools import cache

_logger = logging.getLogger(__name__)


@cache
def warn_once(what: str, reason: str) -> None:
    """Say that `what` is not compiled, and why."""
    _logger.warning("%s cannot be compiled and takes several times as long (%s)", what, reason)


def reason_of(error: Exception) -> str:
    """Return an error's kind and its first line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
