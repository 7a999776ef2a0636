"""One JSON object a line on stdout, so that a run can be piped into `jq`."""

from __future__ import annotations

import logging
import os
import select
import stat
import sys
from collections.abc import Mapping
from typing import Any, TextIO

from logger.base import Logger, to_json_line

_log = logging.getLogger(__name__)


def is_terminal(stream: TextIO | None = None) -> bool:
    """Return whether a person reads the stream (stdout if None), who wants words, not JSON."""
    stream = sys.stdout if stream is None else stream
    return stream is not None and stream.isatty()


def has_read_it(stream: TextIO | None = None) -> bool:
    """Return whether a person reads the stream (stdout if None) and has read on stderr what JSON would say."""
    return is_terminal(stream) and is_terminal(sys.stderr)


class ConsoleLogger(Logger):
    """Writes each record as a line to `stream` (stdout if None) and flushes it.

    When the reader goes away (`| head -1`), the logger falls silent and the run continues: its log file and its
    checkpoints are worth more than the pipe. With `patience`, it does the same if a pipe's reader takes nothing for
    that many seconds; without, it waits.
    """

    def __init__(self, stream: TextIO | None = None, *, patience: float | None = None) -> None:
        self._stream: TextIO | None = sys.stdout if stream is None else stream
        self._patience = patience

    def write(self, record: Mapping[str, Any]) -> None:
        """Write one line; raise OSError if the stream cannot take it for another reason than a closed pipe."""
        if self._stream is None:
            return
        encoding = self._stream.encoding or "utf-8"
        line = to_json_line(record, encoding=encoding)
        try:
            descriptor = None if self._patience is None else _pipe_of(self._stream)
            if descriptor is None:
                self._stream.write(line)
                self._stream.flush()
            else:
                self._stream.flush()
                _write_patiently(descriptor, line.encode(encoding), self._patience or 0.0)
        except (BrokenPipeError, TimeoutError) as error:
            if isinstance(error, TimeoutError):
                _log.warning("stdout has taken nothing for %g s: no more lines there, the run goes on", self._patience)
            _discard_the_rest(self._stream)
            self._stream = None


def _pipe_of(stream: TextIO) -> int | None:
    """Return the descriptor of a stream that is a pipe; None: it is not a pipe, or this system cannot wait for one."""
    try:
        descriptor = stream.fileno()
        mode = os.fstat(descriptor).st_mode
    except (OSError, ValueError):
        return None
    return descriptor if sys.platform != "win32" and stat.S_ISFIFO(mode) else None


def _write_patiently(descriptor: int, data: bytes, patience: float) -> None:
    """Write in parts that a pipe with room takes at once; raise TimeoutError after `patience` seconds without room."""
    for start in range(0, len(data), select.PIPE_BUF):
        if not select.select([], [descriptor], [], patience)[1]:
            raise TimeoutError
        os.write(descriptor, data[start : start + select.PIPE_BUF])


def _discard_the_rest(stream: TextIO) -> None:
    """Point a broken pipe at the null device, since Python flushes stdout once more at exit and would fail there."""
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError):
        return
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, descriptor)
    finally:
        os.close(null)
