"""Writing a token file: an `.npy` of ids and its sidecar, which appear whole or not at all.

Ids are appended with plain writes to `.NAME.tmp`, and the length goes into the header at the end. (A memory map would
need the length before the first id, and on a full disk a signal would kill the process instead of an error.) The
sidecar is written last, so a token file that has a sidecar is whole.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np

from transformerlm.token_files.sidecar import sidecar_path, write_sidecar
from transformerlm.utils import files
from transformerlm.utils.lock import try_lock

BLOCK_TOKENS = 1 << 20


class TokenFileWriter:
    """An unfinished token file, which is removed at the end of the `with` block unless it was published."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self.path = path
        self.dtype = dtype
        self.tokens = 0
        self._unfinished = path.with_name(f".{path.name}.tmp")

    def __enter__(self) -> Self:
        """Create the unfinished file.

        Raises:
            FileExistsError: another build is writing the same file.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.fdopen(os.open(self._unfinished, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        try:
            _lock(self._file, self._unfinished)
        except BaseException:
            self._file.close()
            raise
        self._file.truncate()
        self._header_bytes = self._write_header()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close, and remove what was not published."""
        with suppress(OSError):
            self._file.close()
        with suppress(FileNotFoundError):
            self._unfinished.unlink()

    def append(self, ids: np.ndarray[Any, Any]) -> None:
        """Write ids, an array of this file's dtype.

        Raises:
            OSError: the disk is full, or another failure to write.
        """
        try:
            self._file.write(ids.data)
            self._file.flush()
        except OSError as error:
            done = self.tokens * self.dtype.itemsize
            reason = f"{error.strerror} after {done:,} bytes (the unfinished file is removed)"
            raise OSError(error.errno, reason, str(self.path)) from error
        self.tokens += len(ids)

    def blocks(self, start: int, end: int) -> Iterator[np.ndarray[Any, Any]]:
        """Yield the ids from `start` to before `end` in blocks, while others may be appended."""
        for first in range(start, end, BLOCK_TOKENS):
            self._file.seek(self._header_bytes + first * self.dtype.itemsize)
            data = self._file.read(min(BLOCK_TOKENS, end - first) * self.dtype.itemsize)
            self._file.seek(0, os.SEEK_END)
            yield np.frombuffer(data, dtype=self.dtype)

    def finish(self) -> str:
        """Put the length into the header, make the file durable, and return its sha256."""
        self._file.seek(0)
        header_bytes = self._write_header()
        self._file.flush()
        expected = header_bytes + self.tokens * self.dtype.itemsize
        size = os.fstat(self._file.fileno()).st_size
        assert (header_bytes, size) == (self._header_bytes, expected), (
            header_bytes,
            self._header_bytes,
            size,
            expected,
        )
        with ThreadPoolExecutor(1) as pool:  # one thread waits for the disk while the other computes
            synced = pool.submit(os.fsync, self._file.fileno())
            self._file.seek(0)
            digest = hashlib.file_digest(self._file, "sha256").hexdigest()
            synced.result()
        return digest

    def rename(self) -> None:
        """Move the finished file to its place."""
        self._unfinished.replace(self.path)

    def _write_header(self) -> int:
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (self.tokens,)}
        np.lib.format.write_array_header_1_0(self._file, header)  # numpy leaves room for the length to grow
        return self._file.tell()


def publish(writers: Sequence[TokenFileWriter], facts: Sequence[Mapping[str, Any]]) -> None:
    """Finish the files and put them in place with their sidecars, which hold `facts` and what the file itself says.

    Old sidecars are removed first and new ones are written last, so that a file is never beside a sidecar that is not
    its own.
    """
    finished = [
        {"tokens": writer.tokens, "dtype": writer.dtype.name, "sha256": writer.finish(), **own}
        for writer, own in zip(writers, facts, strict=True)
    ]
    for writer in writers:
        sidecar_path(writer.path).unlink(missing_ok=True)
    for writer in writers:
        writer.rename()
    for writer, known in zip(writers, finished, strict=True):
        files.sync(writer.path.parent)  # the token file's name before its sidecar's
        write_sidecar(writer.path, known)


def _lock(file: BinaryIO, path: Path) -> None:
    """Keep a second build from the same unfinished file; a file that a killed build left is taken over."""
    if not try_lock(file, path):
        raise FileExistsError(f"{path}: expected to be the only build of this file, found another one writing it")
