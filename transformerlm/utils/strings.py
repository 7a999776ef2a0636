"""Strings as callers pass them: one string instead of a list, halves of characters; and errors as people read them."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable, Sized
from pathlib import Path

_SURROGATE = re.compile("[\ud800-\udfff]")


def check_is_no_string(value: object, name: str) -> None:
    """Refuse one string where several are expected: Python would take it letter by letter.

    Raises:
        TypeError: the value is a string; `name` begins the message.
    """
    if isinstance(value, str | bytes):
        raise TypeError(f"{name}: expected a list of strings, found the string {value[:60]!r} (put it into brackets)")


def check_is_string(value: object, name: str) -> None:
    """Refuse a value that is not a string.

    Raises:
        TypeError: it is something else; `name` begins the message.
    """
    if not isinstance(value, str):
        way_out = " (decode it first)" if isinstance(value, bytes) else ""
        raise TypeError(f"{name}: expected one string, found {type(value).__name__} {repr(value)[:60]}{way_out}")


def check_are_strings(values: object, name: str) -> None:
    """Refuse a value that is not a list of strings.

    Raises:
        TypeError: it is one string, or not a list, or an item of it is not a string; `name` begins the message.
    """
    check_is_no_string(values, name)
    if not (isinstance(values, Sized) and isinstance(values, Iterable)):
        raise TypeError(f"{name}: expected a list of strings, found {type(values).__name__}")
    if not all(issubclass(kind, str) for kind in set(map(type, values))):  # far faster than checking each value
        for index, value in enumerate(values):
            check_is_string(value, f"{name}[{index}]")


def whole_characters(text: str) -> str:
    """Return text in which surrogate pairs are joined, and a lone surrogate (half a character) is U+FFFD.

    JavaScript, Java, and JSON that is read in pieces give such halves; UTF-8 cannot spell them.

    Raises:
        TypeError: it is not a string.
    """
    if not isinstance(text, str):
        check_is_string(text, "text")
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace") if _has_halves(text) else text


def replace_halves(text: str) -> tuple[str, int]:
    """Return text with U+FFFD for each surrogate, and how many: JSON can spell half a character, "\\ud83d"."""
    return _SURROGATE.subn("\ufffd", text) if _has_halves(text) else (text, 0)


def to_utf8(text: str) -> bytes:
    """Return text as UTF-8, its halves of characters as `whole_characters` makes them."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return whole_characters(text).encode()


def is_utf8(data: bytes) -> bool:
    """Return whether bytes are whole characters of valid UTF-8."""
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _has_halves(text: str) -> bool:
    if text.isascii():  # Python knows, and does not look
        return False
    try:
        text.encode()  # several times faster than a search for surrogates
    except UnicodeEncodeError:
        return True
    return False


def ends_in_half(text: str) -> bool:
    """Return whether the second half of the last character is still to come."""
    return "\ud800" <= text[-1:] <= "\udbff"


def in_words(error: BaseException) -> str:
    """Return an error's message in one line, as people read it; of a file's error, the path and what is wrong there.

    Where a file is in the place of a directory, the system's reason is "File exists" or "Not a directory", and its path
    may be one that was to be made below that file: the line names the file.
    """
    if not isinstance(error, OSError) or not error.strerror:
        return " ".join(str(error).split()) or type(error).__name__
    if error.filename is None or isinstance(error.filename, int):
        return error.strerror
    path = os.fsdecode(error.filename)
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        for place in (Path(path), *Path(path).parents):
            if os.path.isfile(place):  # Path.is_file may raise
                return f"{place}: expected a directory, found a file"
    return f"{path}: {error.strerror}"
