"""Lines of stdin as text, whatever the terminal's encoding is."""

from __future__ import annotations

import sys
from collections.abc import Iterator


def stdin_lines(what: str) -> Iterator[str]:
    """Yield the lines of stdin without their ends; each is `what`, such as "a prompt", in UTF-8.

    Raises:
        ValueError: a line is not UTF-8; those before it have been taken by then.
    """
    for number, line in enumerate(getattr(sys.stdin, "buffer", sys.stdin), 1):
        try:
            text = line.decode("utf-8") if isinstance(line, bytes) else line
        except UnicodeDecodeError as error:
            raise ValueError(f"stdin: line {number}: expected {what} in UTF-8, found {odd_byte(error)}") from None
        yield text.rstrip("\r\n")


def odd_byte(error: UnicodeDecodeError) -> str:
    """Return which byte is not UTF-8, and where it is."""
    return f"the byte 0x{error.object[error.start]:02x} after {error.start} others"
