"""How the C library hands out memory, which decides what a large tensor costs on a CPU."""

from __future__ import annotations

import ctypes
import os

import torch

# <malloc.h> of glibc
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_OWN_SETTINGS = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


def keep_freed_memory(device: torch.device) -> bool:
    """Let glibc keep freed memory for this process's next request, for training on a CPU; return whether it does.

    By default glibc returns large blocks to the system, which clears each page before it hands it out again. A training
    step asks for the same blocks every time, so this takes a good part of its time (docs/LOG.md). After this call the
    process never shrinks. What the user has set in the environment (`MALLOC_MMAP_MAX_` and the like, or
    `GLIBC_TUNABLES`) stays, and other C libraries are not changed.
    """
    own_settings = any(name in os.environ for name in _OWN_SETTINGS)
    if device.type != "cpu" or own_settings or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS, musl; Windows
        return False
    return all(mallopt(option, value) == 1 for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1)))
