"""Paths as people write them in a file or on the command line, with `~` and variables.

A shell replaces ~ and $HOME before a program sees them, but not in a TOML file, and not after `--key=`.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

MAX_PATH_CHARS = 4096  # of Linux; other systems allow fewer
# `$$` stands for a `$`.
_VARIABLE = re.compile(r"(?:(?<=/)|(?<=\\)|^)\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\}|\$)", re.ASCII)
_NOTHING = ("none", "null", "nil")
_HALF = re.compile("[\ud800-\udfff]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def checked_path(text: str) -> str:
    """Return a path with `~`, and `$NAME`, `${NAME}` or `$$` (a `$`) at the start of a part, replaced.

    Raises:
        ValueError: it is empty, too long, the word none, holds a control character, or names a variable that is not
            set.
    """
    if not text or "\0" in text:
        raise ValueError("a path cannot hold a NUL byte" if text else "expected a path, found an empty string")
    if len(text) > MAX_PATH_CHARS:
        raise ValueError(f"expected a path of at most {MAX_PATH_CHARS:,} characters, found {len(text):,}")
    if not is_utf8(text):
        raise ValueError(not_utf8(text))
    if text.lower() in _NOTHING:
        raise ValueError(
            f'expected a path, found the word "{text}"; leave the key out for no path, or write "./{text}" for a file'
        )
    if found := _CONTROL.search(text):
        raise ValueError(
            f"expected a path, found one with the character {found[0]!a}; "
            r"in TOML a Windows path is written 'C:\data' (single quotes) or C:/data"
        )
    path = os.path.expanduser(_VARIABLE.sub(_value, text))
    if not path:
        raise ValueError(f"expected a path, found {text}, which is empty here")
    if path.partition("/")[0] == "~":
        raise ValueError(f"expected a path, found {text}, and who runs this has no home directory (set HOME)")
    return path


def read_name(value: object) -> str:
    """Return what stands for a path in a file that nobody has checked, as `checked_path` reads it, if it can."""
    try:
        return checked_path(str(value))
    except ValueError:
        return str(value)


def to_path(value: object) -> object:
    """Return a text as a path, read as `checked_path` does; what is no text stays as it is."""
    return Path(checked_path(value)) if isinstance(value, str) else value


def written_path(path: Path) -> str:
    """Return a path as `checked_path` reads it; of `./none` and `./~` Python keeps `none` and `~`."""
    text = written_name(str(path))
    return f"./{text}" if text.lower() in _NOTHING or text.startswith("~") else text


def written_name(text: str) -> str:
    """Return the name of a file, as `checked_path` gave it, as it reads it: with `$$` for a `$`."""
    return _VARIABLE.sub(lambda match: f"${match[0]}", text)


def as_written(value: object) -> object:
    """Return a setting as TOML holds it: a path, alone or in a list, as text that is read as that path."""
    if isinstance(value, list):
        return [as_written(one) for one in value]
    return written_path(value) if isinstance(value, Path) else value


def is_utf8(text: str) -> bool:
    """Return whether a text of the command line is UTF-8: Python keeps other bytes as lone surrogates."""
    return text.isascii() or not _HALF.search(text)


def not_utf8(text: str) -> str:
    """Return the message for a text that is not UTF-8, which neither JSON nor TOML can hold."""
    return (
        f"expected text in UTF-8, found {text[:60]!r}; a file can be renamed, or linked to by another name; where the "
        "locale is not UTF-8, set PYTHONUTF8=1"
    )


def _value(match: re.Match[str]) -> str:
    name = match[1] or match[2]
    if not name:
        return "$"
    if name not in os.environ:
        raise ValueError(f"expected a path, found the variable {match[0]}, which is not set")
    return os.environ[name]


def names_in_paths(value: object) -> list[str]:
    """Return the variables that a path, or a list of them, names; `~` is HOME."""
    texts = [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
    found = {match[1] or match[2] for text in texts for match in _VARIABLE.finditer(text)} - {None}
    return sorted({*found, *(["HOME"] if any(text.startswith("~") for text in texts) else [])})
