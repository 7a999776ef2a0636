"""What the whole of a run's lines says in a few numbers: its best validation, and its loss at some places.

The lines are searched, not parsed, so a gigabyte takes about a second; of a file that has grown, only the new lines are
searched.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformerlm.experiments.metric_lines import METRICS, as_record

CURVE_POINTS = 24
_VALIDATION = b'"metrics.val_loss"'
_LOSS = b'"metrics.loss"'
_BLOCK_BYTES = 8_000_000
_CHECK_BYTES = 256
_WINDOW_BYTES = 8192  # in which a step line is found, also after a sample


@dataclass(frozen=True, kw_only=True)
class RunScan:
    """What was found up to `offset` of the file `file`; `check` is of the bytes just before it.

    `curve` holds the training losses at equal distances in the file, and the last one; those that are not finite are
    words, as in the lines.
    """

    file: str = ""
    offset: int = 0
    check: int = 0
    best_val_loss: float | None = None
    best_val_bits_per_byte: float | None = None
    best_val_step: int | None = None
    curve: list[float | str] = field(default_factory=list)


def scan_run(directory: Path, before: RunScan | None = None) -> RunScan:
    """Return what a run's lines say by now, going on from an earlier scan of the same file; raise OSError."""
    with open(directory / METRICS, "rb") as stream:
        status = os.fstat(stream.fileno())
        file = f"{status.st_dev:x}-{status.st_ino:x}"
        scan = before if before is not None and _is_continued(stream, before, file=file) else RunScan()
        best = (scan.best_val_loss, scan.best_val_bits_per_byte, scan.best_val_step)
        offset = scan.offset
        for block in _blocks(stream, offset):
            offset += len(block)
            for record in _records_with(block, _VALIDATION):
                best = _better(best, record)
        return RunScan(
            file=file,
            offset=offset,
            check=_check(stream, offset),
            best_val_loss=best[0],
            best_val_bits_per_byte=best[1],
            best_val_step=best[2],
            curve=list(_losses_along(stream, offset)),
        )


def _is_continued(stream: Any, before: RunScan, *, file: str) -> bool:
    """Return whether the file begins with what was scanned: a resumed run replaces it, and its number may come back."""
    return before.file == file and _check(stream, before.offset) == before.check


def _check(stream: Any, offset: int) -> int:
    begin = max(0, offset - _CHECK_BYTES)
    stream.seek(begin)
    return zlib.crc32(stream.read(offset - begin))


def _blocks(stream: Any, offset: int) -> Iterator[bytes]:
    """Yield the bytes from an offset to the last end of a line, in blocks of whole lines."""
    stream.seek(offset)
    rest = b""
    while data := stream.read(_BLOCK_BYTES):
        data = rest + data
        end = data.rfind(b"\n") + 1
        rest = data[end:]
        if end:
            yield data[:end]


def _records_with(block: bytes, key: bytes) -> Iterator[dict[str, Any]]:
    place = block.find(key)
    while place >= 0:
        end = block.index(b"\n", place)
        record = as_record(block[block.rfind(b"\n", 0, place) + 1 : end])
        if record is not None and "event" not in record:
            yield record
        place = block.find(key, end)


Best = tuple[float | None, float | None, int | None]


def _better(best: Best, record: dict[str, Any]) -> Best:
    loss = _real(record.get("metrics.val_loss"))
    if loss is None or (best[0] is not None and loss >= best[0]):
        return best
    step = record.get("step")
    return loss, _real(record.get("metrics.val_bits_per_byte")), step if isinstance(step, int) else None


def _real(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**1000
    return float(value) if is_number else None


def _losses_along(stream: Any, size: int) -> Iterator[float | str]:
    """Yield the loss of the first line after each of some places in the file, and of the last line, each line once."""
    seen = -1
    for number in range(CURVE_POINTS):
        begin = max(0, size * number // CURVE_POINTS - 1)  # a place where a line ends is as good as any
        stream.seek(begin)
        data = stream.read(_WINDOW_BYTES)
        first = data.find(b"\n") + 1 if begin else 0
        place = data.find(_LOSS, first)
        line = data.rfind(b"\n", 0, place) + 1
        if place < 0 or begin + line <= seen:
            continue
        seen = begin + line
        yield from _loss_of(data[line : data.find(b"\n", place)])
    begin = max(0, size - _WINDOW_BYTES)
    stream.seek(begin)
    data = stream.read(size - begin)
    place = data.rfind(_LOSS)
    line = data.rfind(b"\n", 0, max(0, place)) + 1
    if place >= 0 and begin + line > seen:
        yield from _loss_of(data[line : data.find(b"\n", place)])


def _loss_of(line: bytes) -> Iterator[float | str]:
    loss = (as_record(line) or {}).get("metrics.loss")
    if _real(loss) is not None or loss in ("nan", "inf", "-inf"):
        yield loss
