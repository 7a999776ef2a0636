"""Shards as one stream: an array of ids that lies in several files, each opened when it is first read.

Positions count over all entries of the index, and windows may cross from one shard into the next.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from transformerlm.token_files.index import Shard, open_shard

Array = npt.NDArray[Any]


def max_open() -> int:
    """Return how many shards may stay open: a quarter of the process's file descriptors, of which each takes one."""
    if sys.platform == "win32":
        return 256
    import resource

    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]  # often 1,024
    unlimited = limit == resource.RLIM_INFINITY
    return (1 << 16 if unlimited else min(limit, 1 << 16)) // 4  # the system has its own limit of maps, often 65,530


def allow_files(number: int) -> None:
    """Let this process open so many files more than now, or as many as the system lets it without asking."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        wanted = soft + number
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
        )


class ShardedTokens:
    """The ids of a folder of shards, to be read like a 1-D numpy array: `len`, a slice, or an array of positions.

    The first `max_open` shards that are read stay mapped. Windows in random order would throw others out and in again,
    so of the others only the ids that are asked for are read, after a check the first time.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard], *, dtype: str) -> None:
        sizes = np.array([shard.tokens for shard in shards], dtype=np.int64)
        numbers = {name: number for number, name in enumerate(dict.fromkeys(shard.file for shard in shards))}
        self._folder = folder
        self._files = list({shard.file: shard for shard in shards}.values())
        self._max_open = max_open()
        self._mapped: dict[int, Array] = {}
        self._headers: dict[int, int] = {}  # bytes before the ids of a shard that was checked and is not mapped
        self.dtype = np.dtype(dtype)
        self._ends = np.cumsum(sizes)  # (entries,): where each entry's ids end in the stream
        self._starts = self._ends - sizes
        self._file_of = np.array([numbers[shard.file] for shard in shards])  # (entries,): an entry may repeat a file
        self._end_list: list[int] = self._ends.tolist()
        self._entries: list[tuple[int, int, int]] = list(
            zip(self._file_of.tolist(), self._starts.tolist(), self._end_list, strict=True)
        )

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def shape(self) -> tuple[int]:
        """The shape of the stream, (tokens,)."""
        return (len(self),)

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> Array:
        """Return all ids in memory, for `np.asarray`."""
        ids = np.asarray(self[:], dtype=dtype or self.dtype)
        return ids.copy() if copy else ids

    def __getitem__(self, key: Any) -> Any:
        """Return the id at a position, the ids of a slice, or those at an integer array of positions, in its shape.

        Raises:
            IndexError: a position outside of the stream; none counts from the end, except in a slice.
        """
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            if step != 1:
                return self[np.arange(start, stop, step)]
            pieces = self._pieces(start, stop)
            return pieces[0] if len(pieces) == 1 else np.concatenate([np.empty(0, dtype=self.dtype), *pieces])
        positions = np.asarray(key)
        if positions.size and not 0 <= positions.min() <= positions.max() < len(self):
            outside = positions.min() if positions.min() < 0 else positions.max()
            raise IndexError(f"expected positions from 0 to {len(self) - 1}, found {outside}")
        found = self._gather(positions.reshape(-1)).reshape(positions.shape)
        return found if positions.ndim else found[()]

    def windows(self, starts: npt.NDArray[np.int64], length: int, *, dtype: npt.DTypeLike | None = None) -> Array:
        """Return the `length` ids from each of `starts` on, `(windows, length)`, in `dtype`; None: as in the files.

        They are those of `[starts[:, None] + arange(length)]`, in less time: a window is copied as one stretch.

        Raises:
            IndexError: a window begins or ends outside of the stream.
        """
        places = starts.tolist()
        if places and not 0 <= min(places) <= max(places) <= len(self) - length:
            raise IndexError(f"expected windows of {length} ids within {len(self)}, found one outside")
        pieces = [np.empty(0, dtype=self.dtype)]
        for start in places:
            number, base, end = self._entries[bisect_right(self._end_list, start)]
            if start + length <= end:
                pieces.append(self._stretch(number, start - base, start - base + length))
            else:
                pieces += self._pieces(start, start + length)
        return np.concatenate(pieces, dtype=dtype or self.dtype).reshape(len(places), length)

    def _gather(self, positions: npt.NDArray[np.int64]) -> Array:
        """Return the ids at a 1-D array of positions."""
        entries = np.searchsorted(self._ends, positions, side="right")  # an empty entry is never found
        found = np.empty(len(positions), dtype=self.dtype)
        for ids, places, rows in self._by_file(positions, entries, np.arange(len(positions))):
            found[rows] = ids[places]
        return found

    def _by_file(self, positions: Array, entries: Array, rows: Array) -> Iterator[tuple[Array, Array, Array]]:
        """Yield, for each file, its ids, the places in them that `rows` of `positions` mean, and these rows."""
        numbers = self._file_of[entries[rows]]
        order = np.argsort(numbers, kind="stable")
        rows, numbers = rows[order], numbers[order]
        cuts = np.flatnonzero(np.diff(numbers, prepend=-1)).tolist()  # where another file begins
        places = positions[rows] - self._starts[entries[rows]]
        for cut, end in pairwise([*cuts, len(rows)]):
            yield self._opened(int(numbers[cut])), places[cut:end], rows[cut:end]

    def _pieces(self, start: int, stop: int) -> list[Array]:
        """Return the ids from `start` to before `stop` in pieces, one for each entry."""
        pieces = []
        while start < stop:
            number, base, end = self._entries[bisect_right(self._end_list, start)]
            pieces.append(self._stretch(number, start - base, min(stop, end) - base))
            start = end
        return pieces

    def _opened(self, number: int) -> Array:
        """Return all ids of a file as a map, which is kept while there is room."""
        if number in self._mapped:
            return self._mapped[number]
        opened = open_shard(self._folder, self._files[number], dtype=self.dtype.name)
        ids: Array = opened.view(np.ndarray)  # whose slices are cheap
        if len(self._mapped) < self._max_open:
            self._mapped[number] = ids
        else:
            self._headers[number] = opened.offset
        return ids

    def _stretch(self, number: int, start: int, stop: int) -> Array:
        """Return the ids from `start` to before `stop` of a file.

        Raises:
            ValueError: the file has become shorter since it was checked.
        """
        if number not in self._headers:
            return self._opened(number)[start:stop]
        path, offset = self._folder / self._files[number].file, self._headers[number] + start * self.dtype.itemsize
        ids: Array = np.fromfile(path, self.dtype, count=stop - start, offset=offset)
        if len(ids) < stop - start:
            raise ValueError(f"{path}: has become shorter since it was checked; run transformerlm-make-data again")
        return ids
