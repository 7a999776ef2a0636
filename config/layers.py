"""The sources of a configuration, of which later ones override earlier ones: files, TOML text, options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

MISSING = object()


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
            index = int(part) if isinstance(found, list) and part.isdigit() else part
            try:
                found = found[index]
            except (LookupError, TypeError):
                return MISSING
        return found

    def place(self, parts: Sequence[str]) -> str:
        """Return where the key is, in the form that begins an error: `train.toml:7`, `--model.d_model`."""
        if self.is_options:
            return "--" + ".".join(takewhile(lambda part: not part.isdigit(), parts))
        known = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
        line = next((self.lines[name] for name in known if name in self.lines), None)
        return f"{self.name}:{line}" if line else self.name
