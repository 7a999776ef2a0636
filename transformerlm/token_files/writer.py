"""Writing a token file: an `.npy` of ids and its sidecar, which appear whole or not at all.

Ids are appended with plain writes to `.NAME.tmp`, and the length goes into the header at the end. (A memory map would
need the length before the first id, and on a full disk a signal would kill the process instead of an error.) The
sidecar is written last, so a token file that has a sidecar is whole.

Where documents begin goes into a second `.npy` beside it, found by the separator's id while ids are appended.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np

from transformerlm.token_files.array import OFFSET_TYPE
from transformerlm.token_files.loss_mask import MARKED_TYPE, MASK_TYPE, are_learnt, ids_of, marked, mask_path
from transformerlm.token_files.sidecar import new_sidecars, offsets_path, sidecar_path
from transformerlm.utils import files
from transformerlm.utils.interrupts import ctrl_c_held_back, result_of
from transformerlm.utils.lock import try_lock

BLOCK_TOKENS = 1 << 20

Array = np.ndarray[Any, Any]


class RowFile:
    """An unfinished `.npy` of one row of numbers, to which numbers are appended; it is removed unless it was renamed.

    Raises:
        FileExistsError: another build is writing the same file.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self.path = path
        self.dtype = dtype
        self.length = 0
        self._unfinished = path.with_name(f".{path.name}.tmp")
        self._is_in_place = False
        self._file = os.fdopen(os.open(self._unfinished, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        try:
            _lock(self._file, self._unfinished)
        except BaseException:
            self._file.close()
            raise
        self._file.truncate()
        self._header_bytes = self._write_header()

    def append(self, numbers: Array) -> None:
        """Write numbers, an array of this file's dtype.

        Raises:
            OSError: the disk is full, or another failure to write.
        """
        try:
            self._file.write(numbers.data)
            self._file.flush()
        except OSError as error:
            done = self.length * self.dtype.itemsize
            reason = f"{error.strerror} after {done:,} bytes (the unfinished file is removed)"
            raise OSError(error.errno, reason, str(self.path)) from error
        self.length += len(numbers)

    def read(self, start: int, length: int) -> Array:
        """Return `length` numbers from `start` on."""
        self._file.seek(self._header_bytes + start * self.dtype.itemsize)
        data = self._file.read(length * self.dtype.itemsize)
        self._file.seek(0, os.SEEK_END)
        return np.frombuffer(data, dtype=self.dtype)

    def finish(self) -> str:
        """Put the length into the header, make the file durable, and return its sha256."""
        self._file.seek(0)
        header_bytes = self._write_header()
        self._file.flush()
        expected = header_bytes + self.length * self.dtype.itemsize
        size = os.fstat(self._file.fileno()).st_size
        assert (header_bytes, size) == (self._header_bytes, expected), (
            header_bytes,
            self._header_bytes,
            size,
            expected,
        )
        with ThreadPoolExecutor(1) as pool:  # one thread waits for the disk while the other computes
            with ctrl_c_held_back():
                synced = pool.submit(os.fsync, self._file.fileno())
            self._file.seek(0)
            digest = hashlib.file_digest(self._file, "sha256").hexdigest()
            result_of(synced)
        return digest

    def rename(self) -> None:
        """Move the finished file to its place."""
        self._unfinished.replace(self.path)
        self._is_in_place = True

    def close(self) -> None:
        """Remove the file if it has not been renamed, and close it.

        It is removed while its lock is held: afterwards that name may be another build's.
        """
        if not self._is_in_place:
            self._unfinished.unlink(missing_ok=True)
        with suppress(OSError):
            self._file.close()

    def _write_header(self) -> int:
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self._file, header)  # numpy leaves room for the length to grow
        return self._file.tell()


class OffsetsWriter:
    """Finds where documents begin in the ids that are appended, and writes it down: int64 `(documents + 1,)`.

    A document ends with the separator, or where the ids end; the last number is the number of ids.
    """

    def __init__(self, path: Path, separator_id: int) -> None:
        self._row = RowFile(path, OFFSET_TYPE)
        self._separator_id = separator_id
        self._num_ids = 0
        self._last = 0  # the end of the last document that has ended
        self._row.append(np.zeros(1, dtype=OFFSET_TYPE))

    @property
    def num_documents(self) -> int:
        """The number of documents, with the one that has not ended, if there is one."""
        return self._row.length - 1 + (self._last < self._num_ids)

    def append(self, ids: Array) -> None:
        """Take note of the documents that end within the next ids."""
        ends = np.flatnonzero(ids == self._separator_id) + (self._num_ids + 1)  # (documents that end,)
        self._num_ids += len(ids)
        if len(ends):
            self._row.append(ends.astype(OFFSET_TYPE, copy=False))
            self._last = int(ends[-1])

    def finish(self) -> str:
        """Write the end of a last document without a separator, make the file durable, and return its sha256."""
        if self._last < self._num_ids:
            self._row.append(np.array([self._num_ids], dtype=OFFSET_TYPE))
            self._last = self._num_ids
        return self._row.finish()

    def rename(self) -> None:
        """Move the finished file to its place."""
        self._row.rename()

    def close(self) -> None:
        """Close the file, and remove it if it has not been renamed."""
        self._row.close()


class TokenFileWriter:
    """An unfinished token file, which is removed at the end of the `with` block unless it was published.

    With a `separator_id` the documents' offsets are written, too, to the file that `offsets_path` names. With
    `has_mask`, ids come marked (see `loss_mask`), and the marks go to the file that `mask_path` names.
    """

    def __init__(
        self, path: Path, dtype: np.dtype[Any], *, separator_id: int | None = None, has_mask: bool = False
    ) -> None:
        self.path = path
        self.dtype = MARKED_TYPE if has_mask else dtype
        self._written, self._has_mask = dtype, has_mask
        self._mask: RowFile | None = None
        self._separator_id = separator_id
        self._offsets: OffsetsWriter | None = None

    def __enter__(self) -> Self:
        """Create the unfinished file.

        Raises:
            FileExistsError: another build is writing the same file.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            self._ids = RowFile(self.path, self._written)
            stack.callback(self._ids.close)
            if self._has_mask:
                self._mask = RowFile(mask_path(self.path), MASK_TYPE)
                stack.callback(self._mask.close)
            if self._separator_id is not None:
                self._offsets = OffsetsWriter(offsets_path(self.path), self._separator_id)
                stack.callback(self._offsets.close)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close, and remove what was not published."""
        self._stack.close()

    @property
    def tokens(self) -> int:
        """The number of ids so far."""
        return self._ids.length

    @property
    def documents(self) -> int | None:
        """The number of documents so far; None: without a separator nobody counts them."""
        return None if self._offsets is None else self._offsets.num_documents

    def append(self, ids: Array) -> None:
        """Write ids, an array of this file's dtype.

        Raises:
            OSError: the disk is full, or another failure to write.
        """
        plain = ids
        if self._mask is not None:
            self._mask.append(are_learnt(ids))
            plain = ids_of(ids).astype(self._written)
        self._ids.append(plain)
        if self._offsets is not None:
            self._offsets.append(plain)

    def blocks(self, start: int, end: int) -> Iterator[Array]:
        """Yield the ids from `start` to before `end` in blocks, while others may be appended."""
        for first in range(start, end, BLOCK_TOKENS):
            length = min(BLOCK_TOKENS, end - first)
            ids = self._ids.read(first, length)
            yield ids if self._mask is None else marked(ids, self._mask.read(first, length))

    def finish(self) -> dict[str, Any]:
        """Make the files durable, and return what a sidecar says of them: tokens, dtype, and the sha256 of each."""
        facts = {"tokens": self.tokens, "dtype": self._written.name, "sha256": self._ids.finish()}
        if self._mask is not None:
            facts["mask_sha256"] = self._mask.finish()
        return facts if self._offsets is None else {**facts, "documents_sha256": self._offsets.finish()}

    def rename(self) -> None:
        """Move the finished files to their places."""
        if self._offsets is not None:
            self._offsets.rename()
        if self._mask is not None:
            self._mask.rename()
        self._ids.rename()


def publish(writers: Sequence[TokenFileWriter], facts: Sequence[Mapping[str, Any]]) -> None:
    """Finish the files and put them in place with their sidecars, which hold `facts` and what the file itself says.

    Old sidecars are removed first and new ones get their names last, so that a file is never beside a sidecar that is
    not its own. Before anything is removed, all that is new is on the disk.
    """
    finished = {writer.path: {**writer.finish(), **own} for writer, own in zip(writers, facts, strict=True)}
    with ctrl_c_held_back(), new_sidecars(finished):
        for path in finished:
            sidecar_path(path).unlink(missing_ok=True)
        for writer in writers:
            writer.rename()
        for path in finished:
            files.sync(path.parent)  # the token file's name before its sidecar's


def _lock(file: BinaryIO, path: Path) -> None:
    """Keep a second build from the same unfinished file; a file that a killed build left is taken over."""
    if not try_lock(file, path):
        raise FileExistsError(f"{path}: expected to be the only build of this file, found another one writing it")
