"""What a command says to people: whole lines on stderr and, on a terminal, one live line below them.

The live line is redrawn whenever it changes, and once a second while nothing else happens, which shows that the command
is alive. If stderr is not a terminal, there is no live line, and only whole lines are written.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from logger import Logger

WIDTH = 80
_MAX_LINE_CHARS = 2_000
_ERASE = "\r\x1b[K"
_REDRAW_SECONDS = 0.2
_TICK_SECONDS = 0.25
_IDLE_SECONDS = 0.9


class LiveLine:
    """The last line of a terminal, below all others; `words` returns its current text at any time."""

    def __init__(self) -> None:
        self.words: Callable[[], str] | None = None
        self._lock = threading.RLock()  # a signal's handler may write while its thread does
        self._is_drawn = False
        self._drawn_at = 0.0
        self._ticker: threading.Thread | None = None

    def show(self, words: Callable[[], str] | None) -> None:
        """Show what `words` returns from now on, or nothing; at most several times a second."""
        with self._lock:
            self.words = words
            if words is None:
                self._write("")
            elif time.monotonic() - self._drawn_at >= _REDRAW_SECONDS:
                self._draw()
            if words is not None and self._ticker is None:
                self._ticker = threading.Thread(target=self._tick, name="live-line", daemon=True)
                self._ticker.start()

    def write_above(self, text: str) -> None:
        """Write whole lines in place of the live line, and the live line below them."""
        with self._lock:
            self._write(text)
            if self.words is not None:
                self._draw()

    def _tick(self) -> None:
        """Draw the line once a second, even while nothing changes; the body of a thread."""
        while True:
            time.sleep(_TICK_SECONDS)
            with self._lock:
                if self.words is None:
                    self._ticker = None
                    return
                if time.monotonic() - self._drawn_at >= _IDLE_SECONDS:
                    self._draw()

    def _draw(self) -> None:
        words = self.words() if self.words else ""
        self._write(words[: _columns() - 1])  # a line that wraps cannot be erased
        self._is_drawn, self._drawn_at = True, time.monotonic()

    def _write(self, text: str) -> None:
        # A closed terminal does not stop the work, nor does a signal that arrives while a line is written.
        with suppress(OSError, RuntimeError):
            sys.stderr.write((_ERASE if self._is_drawn else "") + text)
            sys.stderr.flush()
        self._is_drawn = False


LIVE = LiveLine()
_records: Literal["auto", "json", "text"] = "auto"
_copies: Logger | None = None  # takes records that files hold as well


def _columns() -> int:
    """Return the width of stderr's terminal; stdout may be another terminal, or not a terminal."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or WIDTH
    except (OSError, ValueError):
        return shutil.get_terminal_size((WIDTH, 24)).columns


def is_live() -> bool:
    """Return whether stderr is a terminal that can show a live line, and this process of torchrun's shows it."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and os.environ.get("RANK", "0") == "0"


def note(line: str) -> None:
    """Say something to the person at the terminal, on stderr; a closed terminal does not stop the work."""
    LIVE.write_above(f"{line}\n")


def note_invalid_utf8(number: int) -> None:
    """Say that a text is not all UTF-8, if `number` places of it are not."""
    if number:
        note(f"the text is not all UTF-8: U+FFFD was read {number:,} times in place of other bytes")


@contextmanager
def records_as(form: Literal["auto", "json", "text"], *, in_files: bool = False) -> Iterator[None]:
    """Return a context in which `print_record` always writes ("json"), never does ("text"), or as is usual ("auto").

    With `in_files`, files hold the results as well, so the work goes on without stdout: a closed one is left in
    silence, and another error is said once, on stderr.
    """
    from logger import ConsoleLogger, MultiLogger

    global _records, _copies
    before = _records, _copies
    _records, _copies = form, MultiLogger([ConsoleLogger()]) if in_files else None
    try:
        yield
    finally:
        _records, _copies = before


def print_record(record: Mapping[str, Any]) -> None:
    """Write a result as a JSON line on stdout, unless that is a terminal whose reader has read it on stderr."""
    from logger import has_read_it

    if _records == "text" or (_records == "auto" and has_read_it()):
        return
    if _copies is not None:
        _copies.write(record)
    else:
        print(json.dumps(record, allow_nan=False), flush=True)


@contextmanager
def working(words: str) -> Iterator[None]:
    """Return a context in which the live line says what takes time, and how much so far: "starting  0:04"."""
    before, began = LIVE.words, time.monotonic()
    if is_live():
        LIVE.show(lambda: f"{words}  {clock(time.monotonic() - began)}")
    try:
        yield
    finally:
        if is_live():
            LIVE.show(before)


@contextmanager
def compiling_shown() -> Iterator[None]:
    """Return a context in which the live line names each of the compiled loops while it is compiled."""
    from transformerlm.utils.kernel import told_of_compiling

    before: list[Callable[[], str] | None] = []

    def show(name: str, is_done: bool) -> None:
        if is_done:
            LIVE.show(before.pop())
            return
        before.append(LIVE.words)
        began = time.monotonic()
        LIVE.show(lambda: f"compiling {name.rpartition('.')[2]}, this once  {clock(time.monotonic() - began)}")

    with told_of_compiling(show) if is_live() else nullcontext():
        yield


def framed(title: str, text: str) -> str:
    """Return text under a rule with a title, as lines of less than 80 columns without control characters."""
    printable = "".join(char if char.isprintable() or char == "\n" else "\ufffd" for char in text.expandtabs(4))
    lines = [line for part in printable.strip("\n").split("\n") for line in textwrap.wrap(part, WIDTH - 5) or [""]]
    shown = [line for line, before in zip(lines, ["", *lines], strict=False) if line or before]  # no two empty lines
    return "\n".join([ruled(title), *(f"   {line}".rstrip() for line in shown)])


def ruled(title: str) -> str:
    """Return a horizontal rule of less than 80 columns that begins with a title."""
    rule = "─" if _can_print("─") else "-"
    return f"{rule * 2} {title} ".ljust(WIDTH - 1, rule)


def _can_print(char: str) -> bool:
    try:
        char.encode(sys.stderr.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def clock(seconds: float) -> str:
    """Return a length of time as people read it: 0:42, 12:05, 3:07:00."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def plain(text: str) -> str:
    """Return a message as one line of printable characters, shortened if very long: it may quote a hostile file."""
    shown = text if len(text) <= _MAX_LINE_CHARS else f"{text[:_MAX_LINE_CHARS]}..."
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in shown)
