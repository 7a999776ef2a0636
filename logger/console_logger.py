"""One JSON object a line on stdout, so that a run can be piped into `jq`."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any, TextIO

from logger.base import Logger, to_json_line


class ConsoleLogger(Logger):
    """Writes each record as a line to `stream` (stdout when None) and flushes it.

    When the reader goes away (`| head -1`) the logger falls silent and the run goes on: its log file and its
    checkpoints are worth more than the pipe.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream: TextIO | None = sys.stdout if stream is None else stream

    def write(self, record: Mapping[str, Any]) -> None:
        """Write one line; raises OSError when the stream cannot take it for another reason than a closed pipe."""
        if self._stream is None:
            return
        try:
            self._stream.write(to_json_line(record, encoding=self._stream.encoding or "utf-8"))
            self._stream.flush()
        except BrokenPipeError:
            _discard_the_rest(self._stream)
            self._stream = None


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
