"""The cap on the memory of training: what is beyond it goes to files, or is refused.

Learning merges looks at all distinct words together, whatever their number. The compiled engine's arrays move from
memory to temporary files once they need more than the cap: their pages are then the system's to write out and to read
again, and the merges are the same. The reference's objects cannot move, so it refuses. What is held for a while only
(text, counts that are not added up yet) gives way to the cap; see `PieceCounter`.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
import warnings
from contextlib import suppress
from typing import Any

import numpy as np

# For each byte of the distinct words, with one more for the end of each word.
COMPILED_BYTES_PER_SLOT = 20
REFERENCE_BYTES_PER_SLOT = 140

_HUGE_PAGE = 1 << 21


def check_memory_limit(memory_limit_mb: float | None, num_bytes: float, *, num_words: int) -> None:
    """Refuse words that need more memory than the limit.

    Raises:
        ValueError: they do.
    """
    if memory_limit_mb is not None and num_bytes > memory_limit_mb * 1e6:
        raise ValueError(
            f"memory_limit_mb: expected at least {math.ceil(num_bytes / 1e6)} for the {num_words:,} distinct words of "
            f"the text so far, found {memory_limit_mb:g} (raise it, leave it out, set sample, or take the "
            "compiled engine, which goes on in files)"
        )


class Memory:
    """Makes the arrays of a training, in memory up to a limit in megabytes (None: no limit) and in files beyond it.

    The files have no name, so that they are gone when the process is; `TMPDIR` chooses their folder.
    """

    def __init__(self, limit_mb: float | None = None) -> None:
        self.limit_bytes = math.inf if limit_mb is None else limit_mb * 1e6
        self._in_files = False

    def zeros(self, number: int, dtype: Any, *, in_all: float) -> np.ndarray[Any, Any]:
        """Return `number` zeros in pages of their own; in a file where `in_all` bytes, theirs included, are too many.

        Raises:
            OSError: the disk has no room for the file.
        """
        num_bytes = max(1, number * np.dtype(dtype).itemsize)
        if in_all > self.limit_bytes:
            self._tell(in_all)
            pages = _pages_in_file(num_bytes)
        else:
            pages = _pages_in_memory(num_bytes)
        return np.frombuffer(pages, dtype=dtype, count=number)

    def _tell(self, in_all: float) -> None:
        if not self._in_files:
            self._in_files = True
            warnings.warn(
                f"memory_limit_mb: the distinct words need {in_all / 1e6:,.0f} MB or more, the limit is "
                f"{self.limit_bytes / 1e6:,.0f}; training goes on in files in {tempfile.gettempdir()}, more slowly",
                stacklevel=2,
            )


def _pages_in_memory(num_bytes: int) -> mmap.mmap:
    """Return zeros of this process alone, in huge pages where the system gives them: one touch brings 2 MB."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return mmap.mmap(-1, num_bytes)
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared ones are never huge
    if num_bytes >= _HUGE_PAGE:
        with suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


def _pages_in_file(num_bytes: int) -> mmap.mmap:
    """Return zeros in an unnamed file whose blocks are there: a page without one would end the process by a signal."""
    with tempfile.TemporaryFile() as file:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, num_bytes)
            else:
                for start in range(0, num_bytes, 1 << 24):
                    file.write(bytes(min(1 << 24, num_bytes - start)))
                file.flush()
        except OSError as error:
            needed = f"{error.strerror}: training needs a file of {num_bytes / 1e6:,.0f} MB beyond memory_limit_mb"
            raise OSError(error.errno, needed, tempfile.gettempdir()) from error
        return mmap.mmap(file.fileno(), num_bytes)
