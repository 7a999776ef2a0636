"""Events as JSON lines on stdout, from a program that must never wait for whoever reads them."""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from typing import Any, TextIO

_MOST_WAITING = 10_000


class EventLines:
    """Writes events in a thread of its own; while nobody reads, later events are dropped and counted."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._lines: queue.Queue[str | None] = queue.Queue(_MOST_WAITING)
        self._dropped = 0
        self._thread = threading.Thread(target=self._write, name="event-lines", daemon=True)
        self._thread.start()

    def tell(self, event: str, facts: dict[str, Any]) -> None:
        """Write one event, if there is room for it."""
        record = {"event": event, **facts}
        if self._dropped:
            record["dropped_events"] = self._dropped
        try:
            self._lines.put_nowait(json.dumps(record))
            self._dropped = 0
        except queue.Full:
            self._dropped += 1

    def close(self, seconds: float = 1.0) -> None:
        """Wait until all is written, but no longer than `seconds`: nobody may be reading."""
        try:
            self._lines.put(None, timeout=seconds)
        except queue.Full:
            return
        self._thread.join(seconds)

    def _write(self) -> None:
        """Write the lines; the body of the thread."""
        while (line := self._lines.get()) is not None:
            try:
                self._put(f"{line}\n")
            except (OSError, ValueError):  # the reader has gone, or the stream is closed: the server goes on
                return

    def _put(self, text: str) -> None:
        """Write a text past the stream's buffer: who ends the process would wait for its lock, or for its reader."""
        try:
            number = self._stream.fileno()
        except OSError:  # a stream in memory
            self._stream.write(text)
            return
        data = text.encode()
        while data:
            data = data[os.write(number, data) :]
