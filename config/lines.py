"""The line of each key in a TOML file, which the standard library's reader does not give."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

_STRING_OR_COMMENT = re.compile(
    r'"""(?:\\.|[^\\])*?"""|' + r"'''.*?'''|" + r'"(?:\\.|[^"\\\n])*"|' + r"'[^'\n]*'|#[^\n]*", re.DOTALL
)
_NAME = r"""(?:[A-Za-z0-9_-]+|"[^"\n]*"|'[^'\n]*')"""
_DOTTED = rf"{_NAME}(?:[ \t]*\.[ \t]*{_NAME})*"
_HEADER = re.compile(rf"[ \t]*(\[\[?)[ \t]*({_DOTTED})[ \t]*\]\]?[ \t]*$")
_KEY = re.compile(rf"[ \t]*({_DOTTED})[ \t]*=")


def key_lines(text: str) -> dict[str, int]:
    """Return the line of every table and key of a TOML text, by dotted name; a table of a list has its number in it.

    The text is valid TOML. Keys of inline tables, and quoted names that hold a dot, are omitted.
    """
    return dict(reversed(list(_key_lines(_STRING_OR_COMMENT.sub(_hidden, text)))))  # the first of several


def _hidden(match: re.Match[str]) -> str:
    """Return a string without the characters that mean something in TOML; a comment is dropped."""
    return "" if match[0].startswith("#") else re.sub(r"[][{}=#.]", "_", match[0])


def _key_lines(text: str) -> Iterator[tuple[str, int]]:
    section, depth = "", 0
    tables: Counter[str] = Counter()
    for number, line in enumerate(text.split("\n"), start=1):
        header, key = (pattern.match(line.rstrip("\r")) if depth == 0 else None for pattern in (_HEADER, _KEY))
        if header:
            section = _unquoted(header[2])
            if header[1] == "[[":
                section, found = f"{section}.{tables[section]}", section
                tables[found] += 1
                yield found, number
            yield section, number
            continue
        if key:
            name = f"{section}.{_unquoted(key[1])}".lstrip(".")
            while name and name != section:  # `model.d_model = 1` is in a table that has no line of its own
                yield name, number
                name = name.rpartition(".")[0]
        depth += sum(line.count(sign) for sign in "[{") - sum(line.count(sign) for sign in "]}")


def _unquoted(dotted: str) -> str:
    return ".".join(part.strip().strip("\"'") for part in dotted.split("."))
