"""Files that survive a power cut: flushed to the disk, and replaced in one step."""

from __future__ import annotations

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Flush a file or a directory to the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows has no handle on a directory to flush
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # Windows flushes writable files only
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Flush every file and directory below `directory`, and itself, to the disk."""
    for path in sorted(directory.rglob("*"), reverse=True):
        sync(path)
    sync(directory)


def write_whole(path: Path, data: str | bytes) -> None:
    """Write a file beside its place as `NAME.tmp`, flush it and move it there: no reader sees a part of it.

    Raises:
        OSError: it cannot be written; what stood there before still does.
    """
    unfinished = path.with_name(f"{path.name}.tmp")
    try:
        unfinished.write_bytes(data.encode() if isinstance(data, str) else data)
        sync(unfinished)
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    sync(path.parent)


def forget_cached(path: Path) -> None:
    """Ask the system to drop a flushed file from its memory, so that the next read comes from the disk."""
    if not hasattr(os, "posix_fadvise"):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
