"""Arrays as the kernels need them: padded bytes, memory that is used again, and shifts for tables of a power of two.

All `*_kernels.py` use them.

Part of: byte_chunks, counter, encoder, engine, learner
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import numpy.typing as npt

Array = np.ndarray[Any, Any]

PADDING = 64  # one look of the scanner (`bytes_between`): no read that begins inside the text leaves the array


def padded(data: bytes) -> Array:
    """Return bytes as an array that the kernels may read, with `PADDING` zeros after the last."""
    result = np.empty(len(data) + PADDING, dtype=np.uint8)
    result[: len(data)] = np.frombuffer(data, dtype=np.uint8)
    result[len(data) :] = 0
    return result


class Buffers:
    """Arrays, each taken again once nobody holds it or a part of it: new memory takes longer than filling it."""

    def __init__(self, dtype: npt.DTypeLike, *, longest: int | None = None) -> None:
        """Arrays of more than `longest` items are not kept."""
        self._dtype, self._longest = dtype, longest
        self._arrays: list[Array] = []

    def take(self, size: int) -> Array:
        """Return an array of `size` items or more; what is in it is whatever was there before."""
        if self._longest is not None and size > self._longest:
            return np.empty(size, dtype=self._dtype)
        self._arrays = [array for array in self._arrays if len(array) >= size]  # what has become too short is given up
        for place in range(len(self._arrays)):
            if _references(self._arrays, place) == _OF_THE_LIST:
                return self._arrays[place]
        self._arrays.append(np.empty(size, dtype=self._dtype))
        return self._arrays[-1]


def _references(arrays: list[Array], place: int) -> int:
    return sys.getrefcount(arrays[place])


_OF_THE_LIST = _references([np.empty(0, dtype=np.uint8)], 0)  # asked, as Python's versions count the question or not


def hash_shift(num_slots: int) -> np.uint64:
    """Return by how much a 64-bit hash is shifted to give a place among `num_slots` slots, a power of two."""
    return np.uint64(65 - num_slots.bit_length())
