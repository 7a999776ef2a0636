"""Which ids of a token file are learnt: a byte for each, 1 or 0, in an `.npy` of its own beside the ids.

While data is made, an id and its mark travel as one number, a uint32 whose highest bit is the mark. So whatever orders,
thins or repeats documents moves both together.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from transformerlm.token_files.array import ADVICE, open_row
from transformerlm.utils.files import file_sha256

Array = npt.NDArray[Any]

MASK_SUFFIX = ".mask.npy"
MASK_TYPE = np.dtype("u1")
MARKED_TYPE = np.dtype("<u4")
_MARK = np.uint32(1 << 31)
_TYPES: dict[str, np.dtype[Any]] = {"|u1": MASK_TYPE}


def mask_path(path: Path) -> Path:
    """Return the path of a token file's mask: `train.mask.npy` beside `train.npy`."""
    return path.with_suffix(MASK_SUFFIX)


def marked(ids: Array, learnt: Array) -> Array:
    """Return ids below 2^31 with the mark of those that are learnt, uint32."""
    return ids.astype(MARKED_TYPE) | np.where(learnt, _MARK, np.uint32(0))


def ids_of(numbers: Array) -> Array:
    """Return the ids of marked ones; ids without marks are returned as they are."""
    return numbers & ~_MARK if numbers.dtype == MARKED_TYPE else numbers


def are_learnt(numbers: Array) -> Array:
    """Return which of marked ids are learnt, uint8."""
    return (numbers >> np.uint32(31)).astype(MASK_TYPE)


def open_mask(path: Path, promised: str, *, tokens: int) -> Array:
    """Return the mask of the token file at `path`, uint8 `(tokens,)`, as a read-only memory map.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it has changed since it was written, or does not fit the ids.
    """
    beside = mask_path(path)
    if not beside.is_file():
        raise FileNotFoundError(f"{beside}: missing beside {path.name}; copy it there, or {ADVICE}")
    if (found := file_sha256(beside)) != promised:
        raise ValueError(f"{beside}: expected the file of sha256 {promised}, found {found}; {ADVICE}")
    mask = open_row(beside, _TYPES, kinds="uint8")
    if len(mask) != tokens:
        raise ValueError(f"{beside}: expected a number for each of {tokens:,} ids, found {len(mask):,}; {ADVICE}")
    return mask


class LossMask:
    """Which ids of a token file or a folder of shards are learnt, to be read a stretch at a time.

    `stretches` are those of `TokenDataset.mask`.
    """

    def __init__(self, stretches: Sequence[tuple[int, Array]]) -> None:
        self._starts, self._parts = [start for start, _ in stretches], [part for _, part in stretches]

    def read(self, start: int, stop: int) -> Array:
        """Return whether the ids from `start` to before `stop` are learnt, bool."""
        found = [np.empty(0, dtype=np.bool_)]
        while start < stop:
            number = bisect_right(self._starts, start) - 1
            part, base = self._parts[number], self._starts[number]
            end = min(stop, base + len(part))
            found.append(part[start - base : end - base].astype(np.bool_))
            start = end
        return np.concatenate(found)
