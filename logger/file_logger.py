"""JSON lines appended to a file: the `metrics.jsonl` that every run keeps, whatever its backend."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from logger.base import Logger, to_json_line

MAX_WAITING_BYTES = 1 << 22  # of lines that a full disk did not take


class JsonlLogger(Logger):
    """Appends each record to `path` as one whole line, which the operating system has when the call returns.

    Opening the file cuts off a line that a killed run left unfinished. Raises OSError if the file cannot be opened or
    written; a line that did not fit on a full disk is withdrawn, and written with the next one that fits.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._waiting = b""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._open()

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line in one call, so that no reader and no other writer sees a part of it."""
        self._append(self._waiting + to_json_line(record).encode())

    def _append(self, lines: bytes) -> None:
        if len(lines) > MAX_WAITING_BYTES:
            lines = lines[lines.index(b"\n", len(lines) - MAX_WAITING_BYTES) + 1 :]
        self._waiting = lines
        if not self._has_the_name():  # it was replaced (`truncate_after_step`) or deleted
            new = self._open()  # if that fails, the next line tries again
            self._file.close()
            self._file = new
        append_whole(self._file, lines)
        self._waiting = b""

    def sync(self) -> None:
        """Flush the file to the disk, with the lines that wait for room on it."""
        if self._waiting:
            self._append(self._waiting)
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file, once lines that wait were tried again."""
        try:
            if self._waiting:
                self._append(self._waiting)
        finally:
            self._file.close()

    def _has_the_name(self) -> bool:
        """Return whether the open file is the one of this name; on NFS one that was replaced still has a link."""
        try:
            named = self.path.stat()
        except FileNotFoundError:
            return False
        return os.path.samestat(named, os.fstat(self._file.fileno()))

    def _open(self) -> FileIO:
        _cut_torn_line(self.path)
        return open(self.path, "ab", buffering=0)


def append_whole(file: FileIO, data: bytes) -> None:
    """Append to a file that was opened for that; what a full disk did not take whole is withdrawn. Raises OSError."""
    size = os.fstat(file.fileno()).st_size
    written = 0
    try:
        while written < len(data):
            written += file.write(data[written:])
    except OSError:
        if written:
            file.truncate(size)
        raise


def truncate_after_step(path: str | os.PathLike[str], step: int) -> int:
    """Remove every line of a later step than `step`, so that a resumed run writes each step once; return their number.

    Lines without a step are kept. Lines that are not JSON objects (torn by a kill or a power cut) are removed, too. The
    new file is written beside the old one and renamed; a missing file is not an error. Raises OSError.
    """
    target = Path(path).resolve()
    if not target.exists():
        return 0
    removed = 0
    unfinished = target.with_name(target.name + ".tmp")
    try:
        with open(target, "rb") as old, open(unfinished, "wb") as new:
            for line in old:
                if _is_kept(line, step):
                    new.write(line)
                else:
                    removed += 1
            new.flush()
            os.fsync(new.fileno())
        if removed:
            unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)
    return removed


def _is_kept(line: bytes, step: int) -> bool:
    try:
        record = json.loads(line)
    except ValueError:
        return False
    if not isinstance(record, dict) or not line.endswith(b"\n"):
        return False
    at = record.get("step")
    return not isinstance(at, int) or at <= step


def _cut_torn_line(path: Path) -> None:
    """Cut off what comes after the last newline, or the next line would be joined to it."""
    if not path.exists():
        return
    with open(path, "r+b") as file:
        end = file.seek(0, os.SEEK_END)
        keep = end
        while keep > 0:
            begin = max(0, keep - 65536)
            file.seek(begin)
            newline = file.read(keep - begin).rfind(b"\n")
            if newline >= 0:
                keep = begin + newline + 1
                break
            keep = begin
        if keep < end:
            file.truncate(keep)
