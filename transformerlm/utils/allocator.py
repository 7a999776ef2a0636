"""How the C library hands out memory, which decides what a large tensor costs on a CPU."""

from __future__ import annotations

import ctypes
import os

import torch

# <malloc.h> of glibc
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_OWN_SETTINGS = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


def keep_freed_memory(device: torch.device) -> bool:
    """Let glibc keep what this process frees for its next request, for training on a CPU; return whether it does.

    By itself it gives large blocks back to the system, which clears each page before handing it out again: a good part
    of a training step, which asks for the same blocks every time (docs/LOG.md). From now on the process stays as large
    as it once was. What the user has set in the environment (`MALLOC_MMAP_MAX_` and its like, or `GLIBC_TUNABLES`)
    stays, and so does another C library.
    """
    own_settings = any(name in os.environ for name in _OWN_SETTINGS)
    if device.type != "cpu" or own_settings or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS, musl; Windows
        return False
    return all(mallopt(option, value) == 1 for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1)))
