"""The lines of a run's `metrics.jsonl`, read while the run may be writing them.

A line may be torn: the last one while it is written, others by a power cut. A resumed run replaces the file by one
without the steps that it makes again; so a place in it is an offset and the file's identity. An inode alone would be
none: a file system gives a new file that of one which was removed.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

METRICS = "metrics.jsonl"
MOST_LINES = 2000
"""Of a longer file only every k-th step line is read, so that a curve of any length stays small."""
_CHUNK_BYTES = 1_000_000
_MOST_BYTES = 64_000_000  # of one reading that leaves lines out
_STEP_LINE_BYTES = 150  # about
_MOST_DIGITS = 18  # 64 bits hold them
_KNOWN_BYTES = 256  # before a place, by which the file is known again


@dataclass(frozen=True)
class MetricLines:
    """Whole lines of a file, and the place to go on from.

    `texts` are JSON objects. `file` and `offset` are the place after them. `reset` says that the place asked for was in
    another file, so these lines replace all that were read before. `bad` lines were no JSON objects. `every` is how
    many step lines stand behind each of these; events and validations are never left out. `more` says that there are
    lines left.
    """

    texts: list[str]
    file: str
    offset: int
    reset: bool
    bad: int
    every: int
    more: bool


def read_lines(path: Path, *, file: str = "", offset: int = 0, every: int = 0) -> MetricLines:
    """Return the lines behind a place, about a megabyte of them at most.

    `every` is 0 for what suits the file's size, and then what the last answer had; 1 reads all lines. Raises OSError.
    """
    with open(path, "rb") as stream:
        status = os.fstat(stream.fileno())
        reset = bool(file) and (offset > status.st_size or file != _identity(stream, offset))
        if reset or not file:
            offset = 0
        every = every or max(1, round(status.st_size / _STEP_LINE_BYTES / MOST_LINES))
        stream.seek(offset)
        data = stream.read(min(_CHUNK_BYTES * every, _MOST_BYTES))
        whole = data[: data.rfind(b"\n") + 1]
        end = offset + len(whole)
        name = _identity(stream, end)
    texts, bad = _chosen(whole, every)
    return MetricLines(texts, name, end, reset, bad, every, more=bool(whole) and end < status.st_size)


def _identity(stream: IO[bytes], offset: int) -> str:
    """Return by what a file is known that has a place in it: where it lies, and what is before the place."""
    status = os.fstat(stream.fileno())
    begin = max(0, offset - _KNOWN_BYTES)
    stream.seek(begin)
    return f"{status.st_dev:x}-{status.st_ino:x}-{zlib.crc32(stream.read(offset - begin)):x}"


class LineReader:
    """Reads all lines of a file, a little further each time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file, self._offset = "", 0

    def skip_to_end(self, most_bytes: int) -> None:
        """Leave out all lines but those in about the last `most_bytes` of the file; raise OSError."""
        with open(self._path, "rb") as stream:
            status = os.fstat(stream.fileno())
            stream.seek(max(0, status.st_size - most_bytes))
            if stream.tell():
                stream.readline(most_bytes)
            self._offset = stream.tell()
            self._file = _identity(stream, self._offset)

    def new(self) -> Iterator[MetricLines]:
        """Yield the lines that have come since, in parts; a file that was replaced is read anew. Raises OSError."""
        more = True
        while more:
            found = read_lines(self._path, file=self._file, offset=self._offset, every=1)
            self._file, self._offset, more = found.file, found.offset, found.more
            yield found


def each_record(path: Path) -> Iterator[dict[str, Any] | None]:
    """Yield the objects of all whole lines, None for a line that is none; raise OSError.

    The last line may be half written, by a run that trains or that was killed; it does not count.
    """
    with open(path, "rb") as stream:
        for line in stream:
            if line.endswith(b"\n"):
                yield as_record(line)


def _chosen(data: bytes, every: int) -> tuple[list[str], int]:
    """Return the lines that are JSON objects, of step lines each `every`-th, and how many were none."""
    lines = _thinned(data, every) if every > 1 and data else data.split(b"\n")[:-1]
    texts = [line.decode("utf-8", "replace") for line in lines if as_record(line) is not None]
    return texts, len(lines) - len(texts)


def _thinned(data: bytes, every: int) -> list[bytes]:
    """Return each `every`-th line, the last one, and all with an event or a validation.

    Of 50,000 lines few are wanted, so the data is searched as a whole and not cut into lines first.
    """
    import numpy as np

    ends = np.flatnonzero(np.frombuffer(data, dtype=np.uint8) == ord("\n"))
    kept = {*range(0, len(ends), every), len(ends) - 1}
    for word in (b'"event"', b"metrics.val_loss"):
        place = 0
        while (at := data.find(word, place)) >= 0:
            number = int(np.searchsorted(ends, at))
            kept.add(number)
            place = int(ends[number]) + 1  # each line is found once
    return [data[int(ends[at - 1]) + 1 if at else 0 : int(ends[at])] for at in sorted(kept)]


def _refuse(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _whole(text: str) -> int | None:
    return int(text) if len(text) <= _MOST_DIGITS else None


def _real(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None


# json.loads would build one for each line.
_DECODER = json.JSONDecoder(parse_constant=_refuse, parse_int=_whole, parse_float=_real)


def as_record(line: bytes | str) -> dict[str, Any] | None:
    """Return a line's object; None where it is none, as JSON has it (Python reads NaN, browsers do not).

    A number that no run writes, because neither a float nor 64 bits can hold it, is None: whatever counts, sorts or
    shows it would fail.
    """
    try:
        record = _DECODER.decode(line if isinstance(line, str) else line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def first_records(path: Path, *, most_bytes: int = 65536) -> Iterator[dict[str, Any]]:
    """Yield the records at the beginning of a file; raise OSError."""
    with open(path, "rb") as stream:
        data = stream.read(most_bytes)
    yield from _records(data[: data.rfind(b"\n") + 1].split(b"\n"))


def last_records(path: Path, *, most_bytes: int = 65536) -> Iterator[dict[str, Any]]:
    """Yield the records at the end of a file, the last one first; raise OSError."""
    with open(path, "rb") as stream:
        begin = max(0, stream.seek(0, os.SEEK_END) - most_bytes)
        stream.seek(begin)
        lines = stream.read().split(b"\n")
    yield from _records(reversed(lines[1 if begin else 0 : -1]))


def last_with(path: Path, key: str, *, most_bytes: int = 1_000_000) -> dict[str, Any] | None:
    """Return the last record in the end of a file that has a key, None without one; raise OSError."""
    with open(path, "rb") as stream:
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - most_bytes))
        data = stream.read()
    end = data.rfind(b"\n") + 1
    while (at := data.rfind(json.dumps(key).encode(), 0, end)) >= 0:
        end = data.rfind(b"\n", 0, at) + 1
        record = as_record(data[end : data.find(b"\n", at)])
        if record is not None and key in record:
            return record
    return None


def _records(lines: Any) -> Iterator[dict[str, Any]]:
    return (record for record in map(as_record, lines) if record is not None)
