"""Files that survive a power cut: they are flushed to the disk and replaced in one step."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from transformerlm.utils.interrupts import ctrl_c_held_back

VISIBLE_SECONDS = 60.0
"""How long a network disk may take to show another machine's file: NFS asks again after a minute at the latest."""


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


def move_into_place(unfinished: Path, path: Path) -> None:
    """Flush a finished file to the disk, give it its name, and flush the folder, which holds the name."""
    sync(unfinished)
    unfinished.replace(path)
    sync(path.absolute().parent)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a name beside `path`, `NAME.tmp`, to write to; the file takes its place, flushed, when the block ends.

    No reader sees a part of it. After an error, what was at `path` is still there and nothing is left of the new file.
    """
    unfinished = path.with_name(f"{path.name}.tmp")
    try:
        yield unfinished
        move_into_place(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


@contextmanager
def whole_files(contents: Mapping[Path, str | bytes]) -> Iterator[None]:
    """Write files, each as `NAME.tmp`, and flush them; they take their places, in order, when the block ends.

    So a full disk, or an error in the block, leaves what was there before, and nothing of the new files. So does an
    error while they take their places, except in the last flush: all new files are there then. Ctrl-C waits meanwhile.

    Raises:
        OSError: one cannot be written; the error names the file.
    """
    unfinished = {path: path.with_name(f"{path.name}.tmp") for path in contents}
    try:
        for path, data in contents.items():
            with naming(path):
                unfinished[path].write_bytes(data.encode() if isinstance(data, str) else data)
                sync(unfinished[path])
        yield
        with ctrl_c_held_back():
            _take_places(unfinished)
    except BaseException:
        _remove(unfinished.values())
        raise


def _take_places(unfinished: Mapping[Path, Path]) -> None:
    """Give each finished file its name, in order; if one cannot have it, all names mean what they meant before."""
    # The last needs no copy: once it has its name, nothing is undone.
    kept = {path: path.with_name(f"{path.name}.tmp-old") for path in [*unfinished][:-1] if path.is_file()}
    replaced: list[Path] = []
    try:
        for path, old in kept.items():
            with naming(path):
                _keep(path, old)
        for path, new in unfinished.items():
            with naming(path):
                new.replace(path)
                replaced.append(path)
                sync(path.absolute().parent)
    except BaseException:
        for path in replaced if len(replaced) < len(unfinished) else ():
            if path in kept:
                kept[path].replace(path)
            else:
                path.unlink()
        _remove(kept.values())
        raise
    _remove(kept.values())


def _keep(path: Path, old: Path) -> None:
    """Give a file a second name."""
    old.unlink(missing_ok=True)  # of a process that was killed
    try:
        old.hardlink_to(path)
    except OSError:  # a file system without hard links
        shutil.copy2(path, old)


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an OSError name the file: a read or a write that fails does not say where."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def write_whole(path: Path, data: str | bytes) -> None:
    """Write one file as `whole_files` does.

    Raises:
        OSError: it cannot be written; the error names the file.
    """
    with whole_files({path: data}):
        pass


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hexadecimal."""
    with naming(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def forget_cached(path: Path) -> None:
    """Ask the system to drop a flushed file from its memory, so that the next read comes from the disk."""
    if not hasattr(os, "posix_fadvise"):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def wait_for(path: Path) -> None:
    """Wait until `path` can be seen: on a network disk, what another machine has written appears some seconds later.

    Raises:
        FileNotFoundError: after `VISIBLE_SECONDS` it is still not there.
    """
    end = time.monotonic() + VISIBLE_SECONDS
    while not path.exists():
        if time.monotonic() > end:
            raise FileNotFoundError(f"{path}: this machine does not see it")
        time.sleep(0.1)
        if path.parent.is_dir():
            os.listdir(path.parent)  # makes NFS ask its server again


def check_free(path: Path, *, overwrite: bool, holds: str | None = None, beside: Sequence[str] = ()) -> None:
    """Refuse an output that exists, or that may be overwritten but is not of the kind that would replace it.

    Args:
        path: the output.
        overwrite: whether an existing output may be replaced.
        holds: for a directory, a name that only an output of the same kind holds.
        beside: patterns of the other names that it may hold, all of which are lost when it is replaced.

    Raises:
        FileExistsError: the output exists.
        ValueError: it is something else, which must not be lost.
    """
    if not path.exists() and not path.is_symlink():
        return
    if not overwrite:
        raise FileExistsError(f"{path}: is there already; choose another output, or set overwrite = true")
    if holds is None and not path.is_file():
        raise ValueError(f"{path}: expected a file to overwrite, found a directory; choose another output")
    if holds is not None and not (path.is_dir() and not path.is_symlink() and (path / holds).exists()):
        raise ValueError(f"{path}: expected a directory with {holds} to overwrite, found none; choose another output")
    names = sorted(entry.name for entry in path.iterdir()) if holds is not None else []
    if strange := [name for name in names if not any(fnmatch(name, known) for known in (holds or "", *beside))]:
        raise ValueError(
            f"{path}: expected nothing to overwrite but such an output, found {strange[0]} in it, too; "
            "choose another output"
        )


def check_writable(directory: Path) -> None:
    """Refuse a directory that cannot be created or written to, before the work whose result goes there.

    Raises:
        NotADirectoryError: a file is in its place, or in the place of a parent.
        PermissionError: it, or the directory to create it in, cannot be written to.
    """
    there = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{directory}: expected a directory, found the file {there}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{directory}: expected a directory that can be written to, found that {there} cannot")


@contextmanager
def whole_directory(path: Path, *, displace: Callable[[Path], object] | None = None) -> Iterator[Path]:
    """Give a directory beside `path` to fill; it takes that place, flushed, when the block ends without an error.

    A directory that is already at `path` is replaced, or handed to `displace`, which moves it away. After an error
    nothing is left of the new one.
    """
    unfinished, old = path.with_name(f"{path.name}.tmp"), path.with_name(f"{path.name}.tmp-old")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        sync_tree(unfinished)
        if path.exists() and displace is not None:
            displace(path)
        elif path.exists():
            shutil.rmtree(old, ignore_errors=True)  # of a process that was killed
            path.rename(old)
        unfinished.rename(path)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)
    sync(path.absolute().parent)
