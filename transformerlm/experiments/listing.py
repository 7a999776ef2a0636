"""Runs as the rows of a table: what each has reached, filtered and sorted by its results and by its settings."""

from __future__ import annotations

import os
import time
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformerlm.experiments.listing_cache import load_kept, save_kept
from transformerlm.experiments.run_directories import RunDirectories, RunSummary, config_key, config_of
from transformerlm.experiments.run_scan import RunScan, scan_run

Row = dict[str, Any]
Condition = tuple[str, str, str]
"""A key, one of `= != < <= > >=`, and a value as it was typed."""


class Listing:
    """The runs below a directory as rows, with all that was read of them kept until the next time."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._kept = load_kept(root)
        self._directories = RunDirectories(root, self._kept.summaries)
        self._has_changed = False

    def rows(self) -> list[Row]:
        """Return a row for each run: the fields of `RunSummary` and more, and the losses of its curve."""
        before, now, rows = self._directories.known, time.time(), []
        summaries = self._directories.summaries()
        paths = {one.name: path for path, (_, one) in self._directories.known.items()}
        for one in summaries:
            path = paths[one.name]
            scan = self._scan(path, is_same=path in before and before[path][0] == self._directories.known[path][0])
            rows.append(_row(one, path, scan, now=now))
        return rows

    def _scan(self, path: Path, *, is_same: bool) -> RunScan:
        before = self._kept.scans.get(path)
        self._has_changed |= before is None or not is_same
        if before is not None and is_same:
            return before
        try:
            self._kept.scans[path] = scan_run(path, before)
        except OSError:
            return RunScan()
        return self._kept.scans[path]

    def settings_of(self, directory: Path) -> dict[str, Any]:
        """Return a run's configuration by dotted keys."""
        key, (known, config) = config_key(directory), self._kept.settings.get(directory, ([], {}))
        if not key or key != known:
            config, self._has_changed = config_of(directory), True
            self._kept.settings[directory] = (key, config)
        return config

    def keep(self) -> None:
        """Write what was read for the next time, if it was more than last time."""
        if not self._has_changed:
            return
        names = {path: name for name, path in self._directories.paths().items()}
        save_kept(self._root, replace(self._kept, summaries=self._directories.known), names=names)


def _row(one: RunSummary, path: Path, scan: RunScan, *, now: float) -> Row:
    row = vars(one) | {"directory": str(path), "age_seconds": max(0.0, now - one.changed)}
    if scan.best_val_loss is not None:
        row["best_val_loss"] = scan.best_val_loss
    best = {"best_val_bits_per_byte": scan.best_val_bits_per_byte, "best_val_step": scan.best_val_step}
    return row | best | {"disk_bytes": disk_bytes(path), "curve": scan.curve}


def disk_bytes(directory: Path) -> int:
    """Return the bytes of all files below a directory; those behind links are not counted."""
    total, waiting = 0, [os.fspath(directory)]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    elif not entry.is_symlink():
                        total += entry.stat(follow_symlinks=False).st_size
        except OSError:  # removed just now, or not ours to read
            continue
    return total


class Settings:
    """The configurations of runs, each read when it is first asked for."""

    def __init__(self, read: Callable[[Path], dict[str, Any]] = config_of) -> None:
        self._read = read
        self._known: dict[str, dict[str, Any]] = {}

    def of(self, row: Row) -> dict[str, Any]:
        """Return the configuration of a row's run, by dotted keys."""
        directory = row["directory"]
        if directory not in self._known:
            self._known[directory] = self._read(Path(directory))
        return self._known[directory]

    def value(self, row: Row, key: str) -> Any:
        """Return what a row has under a key of the table or of the settings; None if it has neither."""
        return row[key] if key in row else self.of(row).get(key)


SHORT_NAMES = {"age": "age_seconds", "size": "disk_bytes", "steps": "step", "speed": "tokens_per_second"}
"""Words that people type for keys of a row."""


def filtered(rows: Iterable[Row], conditions: Sequence[Condition], settings: Settings) -> list[Row]:
    """Return the rows for which all conditions hold."""
    return [
        row
        for row in rows
        if all(holds(settings.value(row, SHORT_NAMES.get(key, key)), sign, text) for key, sign, text in conditions)
    ]


def sorted_rows(rows: Iterable[Row], key: str, settings: Settings, *, reverse: bool = False) -> list[Row]:
    """Return the rows by ascending value, numbers before words; rows without the key are last in either order."""
    pairs = [(settings.value(row, SHORT_NAMES.get(key, key)), row) for row in rows]
    known = [pair for pair in pairs if pair[0] is not None]
    known.sort(key=lambda pair: _order(pair[0]), reverse=reverse)
    return [row for _, row in known] + [row for value, row in pairs if value is None]


def _order(value: Any) -> tuple[int, float, str]:
    return (0, float(value), "") if isinstance(value, int | float) else (1, 0.0, str(value))


def holds(found: Any, sign: str, text: str) -> bool:
    """Return whether a condition holds for what a run has, None for nothing: `none` is what one types for that.

    Two numbers are compared as numbers; otherwise < and > never hold, and = compares the words.
    """
    wanted = _typed(text)
    if _is_number(found) and _is_number(wanted):
        signs: Mapping[str, bool] = {
            "=": found == wanted, "!=": found != wanted, "<": found < wanted, ">": found > wanted,
            "<=": found <= wanted, ">=": found >= wanted,
        }  # fmt: skip
        return signs[sign]
    if sign not in ("=", "!="):
        return False
    words = "none" if found is None else str(found).lower() if isinstance(found, bool) else str(found)
    is_equal = words == text or (found == wanted and isinstance(found, list | str))
    return is_equal == (sign == "=")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _typed(text: str) -> Any:
    """Return a value as TOML reads it, such as 0.5, true or "a"; other text as it is."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError, KeyError):
        return text


def known_keys(rows: Sequence[Row], settings: Settings) -> set[str]:
    """Return the keys by which these rows can be sorted and filtered."""
    keys = {*SHORT_NAMES, *(key for row in rows for key in row)}
    return keys | {key for row in rows for key in settings.of(row)}
