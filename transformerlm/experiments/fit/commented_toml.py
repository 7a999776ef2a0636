"""Settings as TOML with a comment over each chosen key that says why; whatever a comment says, the TOML stays valid."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tomli_w

from transformerlm.experiments.fit.choice import Chosen

WIDTH = 110
Settings = Mapping[str, Any]
"""Dotted keys with their values, or with `Chosen` ones."""


def commented_toml(settings: Settings, *, head: str = "") -> str:
    """Return TOML that parses back to these settings; a comment stands over the keys that have a reason.

    Neighbours with one reason share its comment. `head` is a comment at the top.
    """
    tables: dict[str, dict[str, Any]] = {"": {}}
    for name, value in settings.items():
        table, _, key = name.rpartition(".")
        tables.setdefault(table, {})[key] = value
    lines = list(_comment(head)) if head else []
    for table, keys in tables.items():
        if keys:
            lines += ["", f"[{table}]"] if table else [""]
            lines += _lines_of(keys)
    return "\n".join(lines).strip("\n") + "\n"


def values_of(settings: Settings) -> dict[str, Any]:
    """Return the settings without their reasons."""
    return {name: value.value if isinstance(value, Chosen) else value for name, value in settings.items()}


def _lines_of(keys: Mapping[str, Any]) -> Iterator[str]:
    before = ""
    for key, setting in keys.items():
        value, why = (setting.value, setting.why) if isinstance(setting, Chosen) else (setting, "")
        if why and why != before:
            yield from _comment(why)
        before = why
        yield tomli_w.dumps({key: str(value) if isinstance(value, Path) else value}).rstrip("\n")


def _comment(text: str) -> Iterator[str]:
    """Yield a comment's lines; TOML allows no control characters in it, and a line break would end it."""
    for paragraph in text.split("\n"):
        harmless = "".join(char if char.isprintable() else f"\\u{ord(char):04x}" for char in paragraph)
        yield from (f"# {line}" for line in textwrap.wrap(harmless, WIDTH, break_long_words=False) or [""])
