"""The file of results: one JSON line each, on the disk as soon as it is known. Standard library only.

Every line has `kind`: `suite` (what was asked for), `environment`, `row` (a line of a table), `check` (a promise and
whether it held), `part` (how a part ended).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

Line = dict[str, Any]
NAME = "results.jsonl"


class Results:
    """Appends lines to `results.jsonl`; several processes may do so at once."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME

    def write(self, kind: str, **entries: Any) -> None:
        """Append a line and wait until it is on the disk."""
        line = json.dumps({"kind": kind, **entries}, default=str) + "\n"
        # One write to an appending file: lines of two processes do not mix, and a kill leaves at most a part of the
        # last line.
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read(folder: Path) -> list[Line]:
    """Return the whole lines of a folder's results, without a line that was cut off in the middle.

    Raises:
        ValueError: there is no such file, or no whole line in it.
    """
    path = folder / NAME
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a folder that benchmarking.gpu_suite wrote (--out)")
    lines = [line for line in map(_parsed, path.read_bytes().split(b"\n")) if line is not None]
    if not lines:
        raise ValueError(f"{path}: expected lines of JSON, found none")
    return lines


def _parsed(line: bytes) -> Line | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and "kind" in found else None
