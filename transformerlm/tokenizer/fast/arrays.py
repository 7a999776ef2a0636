"""Arrays as the kernels need them: padded bytes, and shifts for tables of a power of two. All `*_kernels.py` use them.

Part of: byte_chunks, counter, encoder, engine, learner
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

PADDING = 64  # one look of the scanner (`bytes_between`): no read that begins inside the text leaves the array


def padded(data: bytes) -> Array:
    """Return bytes as an array that the kernels may read, with `PADDING` zeros after the last."""
    result = np.empty(len(data) + PADDING, dtype=np.uint8)
    result[: len(data)] = np.frombuffer(data, dtype=np.uint8)
    result[len(data) :] = 0
    return result


def hash_shift(num_slots: int) -> np.uint64:
    """Return by how much a 64-bit hash is shifted to give a place among `num_slots` slots, a power of two."""
    return np.uint64(65 - num_slots.bit_length())
