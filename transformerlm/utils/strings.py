"""Strings as callers give them: one in the place of a list, and halves of characters."""

from __future__ import annotations

import re

_SURROGATE = re.compile("[\ud800-\udfff]")


def check_is_no_string(value: object, name: str) -> None:
    """Refuse one string where several belong: Python would take it letter by letter.

    Raises:
        TypeError: the value is a string; `name` begins the message.
    """
    if isinstance(value, str | bytes):
        raise TypeError(f"{name}: expected a list of strings, found the string {value[:60]!r} (put it into brackets)")


def whole_characters(text: str) -> str:
    """Return text in which the two halves of a character (a surrogate pair) are one, and half a character is U+FFFD.

    JavaScript, Java and JSON read in pieces give such halves; UTF-8 cannot spell them.
    """
    if text.isascii() or _SURROGATE.search(text) is None:
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def ends_in_half(text: str) -> bool:
    """Return whether the second half of the last character is still to come."""
    return "\ud800" <= text[-1:] <= "\udbff"
