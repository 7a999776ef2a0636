"""A lock on a file or a directory that one process holds at a time, and that ends with the process."""

from __future__ import annotations

import errno
import os
import platform
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def try_lock(file: IO[Any], path: Path, *, shared: bool = False) -> bool:
    """Take the system's lock (`flock`) on `file`, which was opened at `path`; return False if another process has it.

    Any number of processes may hold a `shared` lock at once, while none holds the other kind. Windows has no such lock,
    nor have some network file systems: there the answer is always True.
    """
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        # The previous holder may have removed the file that we opened: then the lock is on nothing.
        return path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return True


class DirectoryLock:
    """Holds a directory, which is created if missing, until the block ends or the process dies.

    The lock is the system's (`flock`) on a file `.lock` that names its holder. A directory that was created here and
    is still empty at the end is removed. Without `flock` (Windows) nothing is held.

    Args:
        directory: what is held.
        work: what the next one should have been and what was found, for its error; `{holder}` is replaced.
        instead: what the next one can do besides waiting.

    Raises:
        FileExistsError: another process holds the directory.
    """

    def __init__(
        self,
        directory: Path,
        *,
        work: str = "the only run here, found {holder} training in it",
        instead: str = "choose another logging.run_name",
    ) -> None:
        self._directory = directory
        self._path = directory / ".lock"
        self._work, self._instead = work, instead

    def __enter__(self) -> Self:
        self._made = [path for path in (self._directory, *self._directory.parents) if not path.exists()]
        self._directory.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a+", encoding="utf-8")
        if not try_lock(self._file, self._path):
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            found = self._work.format(holder=holder)
            raise FileExistsError(f"{self._directory}: expected to be {found}; wait for it, or {self._instead}")
        try:
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {platform.node()}")
            self._file.flush()
        except OSError as error:
            error.filename = str(self._path)  # a write on a full disk does not say where
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if os.name == "nt":
            self._file.close()  # Windows removes no open file
        with suppress(OSError):
            self._path.unlink()
        self._file.close()
        with suppress(OSError):
            for path in self._made:
                path.rmdir()  # only where it is empty
