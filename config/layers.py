"""The sources of a configuration, of which later ones override earlier ones: files, TOML text, options."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from pydantic import BaseModel

from config.keys import Key, iter_keys

MISSING = object()
_DECIMAL = re.compile(r"[+-]?(\d+\.|\.\d+)([eE][+-]?\d+)?")  # as people and Python write numbers, and TOML does not
Overrides = Mapping[str, str | list[str]]
"""Dotted keys, each with its value as written on the command line: a list of words for a list."""


@dataclass(frozen=True)
class Layer:
    """One source of a configuration: a file, TOML text on the command line, or the options."""

    name: str
    tree: dict[str, Any]
    lines: Mapping[str, int] = field(default_factory=dict)
    is_options: bool = False

    def holds(self, parts: Sequence[str]) -> bool:
        """Return whether the source sets the key with these parts, or holds the table."""
        return self.find(parts) is not MISSING

    def find(self, parts: Sequence[str]) -> object:
        """Return what the source has for a key; MISSING if it has nothing."""
        found: Any = self.tree
        for part in parts:
            index = int(part) if isinstance(found, list) and part.isdecimal() else part
            try:
                found = found[index]
            except (LookupError, TypeError):
                return MISSING
        return found

    def place(self, parts: Sequence[str]) -> str:
        """Return where the key is, in the form that begins an error: `train.toml:7`, `--model.d_model`."""
        if self.is_options:
            return "--" + ".".join(takewhile(lambda part: not part.isdecimal(), parts))
        known = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
        line = next((self.lines[name] for name in known if name in self.lines), None)
        return f"{self.name}:{line}" if line else self.name


def options_layer(schema: type[BaseModel], overrides: Overrides) -> Layer:
    """Return options as a source; each has a key of the schema."""
    options: dict[str, Any] = {}
    keys = {key.name: key for key in iter_keys(schema)}
    for name, value in overrides.items():
        set_key(options, name, _parse_override(value, keys[name]))
    return Layer("command line", options, is_options=True)


def set_key(tree: dict[str, Any], name: str, value: object) -> None:
    """Set the key of a dotted name in nested tables."""
    *sections, leaf = name.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
    tree[leaf] = value


def _parse_override(value: str | list[str], key: Key) -> object:
    if value == "none" and key.is_optional:
        return None
    if isinstance(value, list):
        if key.has_free_items:  # a prompt may look like a TOML list
            return value
        whole = _toml_value(value[0]) if len(value) == 1 and value[0].startswith("[") else None
        return whole if isinstance(whole, list) else [_toml_value(word) for word in value]
    return value if key.is_text else _toml_value(value)


def _toml_value(text: str) -> object:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (tomllib.TOMLDecodeError, RecursionError, ValueError):
        return float(text) if _DECIMAL.fullmatch(text) else text
    return parsed["value"] if len(parsed) == 1 else text
