"""One process at a time in a directory, by a lock that dies with its process."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self


class DirectoryLock:
    """Holds a directory, which is made where it is missing, until the block ends or the process dies.

    The lock is the system's (`flock`) on a file `.lock` that names its holder. A directory that was made here and is
    still empty at the end is removed again. Without `flock` (Windows) nothing is held.

    Raises:
        FileExistsError: another process holds the directory.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._path = directory / ".lock"

    def __enter__(self) -> Self:
        self._made = [path for path in (self._directory, *self._directory.parents) if not path.exists()]
        self._directory.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a+", encoding="utf-8")
        try:
            self._take()
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise FileExistsError(
                f"{self._directory}: expected to be the only run here, found {holder} training in it; "
                "wait for it, or choose another logging.run_name"
            ) from None
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()}")
        self._file.flush()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):
            self._path.unlink()
        self._file.close()
        with suppress(OSError):
            for path in self._made:
                path.rmdir()  # only where it is empty

    def _take(self) -> None:
        try:
            import fcntl
        except ImportError:
            return
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The holder before may have removed the file that we opened: then the lock is on nothing.
        if not self._path.exists() or self._path.stat().st_ino != os.fstat(self._file.fileno()).st_ino:
            raise BlockingIOError
