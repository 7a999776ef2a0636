"""Settings as TOML with comments that say why; whatever a comment says, the TOML parses back to the same settings."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from config.paths import as_written

WIDTH = 110


def commented_toml(settings: Mapping[str, Any], reasons: Mapping[str, str], *, head: str = "") -> str:
    """Return settings under dotted keys as TOML, with a comment over each key that has a reason.

    Neighbours with one reason share its comment. `head` is a comment at the top, whose lines stay whole, since one may
    be a command.
    """
    tables: dict[str, list[str]] = {"": []}
    for name in settings:
        tables.setdefault(name.rpartition(".")[0], []).append(name)
    lines = [f"# {_harmless(line)}" for line in head.split("\n")] if head else []
    for table, names in tables.items():
        if names:
            lines += ["", f"[{table}]"] if table else [""]
            lines += _lines_of({name: settings[name] for name in names}, reasons)
    return "\n".join(lines).strip("\n") + "\n"


def _lines_of(settings: Mapping[str, Any], reasons: Mapping[str, str]) -> Iterator[str]:
    import tomli_w

    before = ""
    for name, value in settings.items():
        why = reasons.get(name, "")
        if why and why != before:
            yield from _comment(why)
        before = why
        key = name.rpartition(".")[2]
        yield tomli_w.dumps({key: as_written(value)}).rstrip("\n")


def _comment(text: str) -> Iterator[str]:
    """Yield a comment's lines; a line break would end it."""
    for paragraph in text.split("\n"):
        yield from (f"# {line}" for line in textwrap.wrap(_harmless(paragraph), WIDTH, break_long_words=False) or [""])


def _harmless(line: str) -> str:
    """Return a line without control characters, which TOML does not allow in a comment."""
    return "".join(char if char.isprintable() else f"\\u{ord(char):04x}" for char in line)
