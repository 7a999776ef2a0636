"""What every logger can do, and how a record becomes one flat JSON line.

The room knows nothing of models or configs: keys and values come from the caller. Keys are dotted and name their units
(`metrics.latency_ms`); values are JSON scalars, or lists of them.
"""

from __future__ import annotations

import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self


class Logger(ABC):
    """A place that records go to; a subclass defines `write`.

    All methods are called from one thread. `close` is called once; as a context manager, a logger calls it itself.
    """

    @abstractmethod
    def write(self, record: Mapping[str, Any]) -> None:
        """Take one flat record, as `flatten` returns it."""

    def log_metrics(
        self, step: int, metrics: Mapping[str, Any], *, elapsed_s: float | None = None, peak_bytes: int | None = None
    ) -> None:
        """Log the measurements of a step; `{"loss": 2.5}` is written as `metrics.loss`.

        `elapsed_s`, the seconds from the run's beginning to this step, is written as `time.elapsed_s`, and
        `peak_bytes`, the most memory until then, as `memory.peak_bytes`.
        """
        beside = {"time.elapsed_s": elapsed_s, "memory.peak_bytes": peak_bytes}
        known = {key: value for key, value in beside.items() if value is not None}
        self.write({"step": step, **flatten(metrics, prefix="metrics."), **known})

    def log_event(self, event: str, **fields: Any) -> None:
        """Log that something happened, as `{"event": "checkpoint_saved", "step": 1000}`."""
        self.write({"event": event, **flatten(fields)})

    def log_record(self, record: Mapping[str, Any]) -> None:
        """Log a record whose keys are kept as given (`params.temperature`, `text.output`)."""
        self.write(flatten(record))

    def log_artifact(  # noqa: B027  # most backends keep no files
        self, path: str | os.PathLike[str], *, name: str, type: str
    ) -> None:
        """Keep a file or directory under `name` if the backend can store files; the others do nothing."""

    def sync(self) -> None:  # noqa: B027  # most backends have no disk
        """Make what was logged survive a power cut, if the backend has a disk; called before a checkpoint is saved."""

    @property
    def run_id(self) -> str | None:
        """The id under which the backend continues this run after a resume, if it has one."""
        return None

    def close(self) -> None:  # noqa: B027  # most backends hold nothing back
        """Write what still waits, and release the backend."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def flatten(values: Mapping[str, Any], *, prefix: str = "") -> dict[str, Any]:
    """Join the keys of nested mappings with dots and turn numpy and torch scalars into Python's own."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, prefix=f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = _plain(value)
    return flat


def to_json_line(record: Mapping[str, Any], *, encoding: str = "utf-8") -> str:
    """Return the record as one line of JSON, newline included, that `encoding` can express.

    JSON has no numbers that are not finite, so such floats are written as the strings "nan", "inf" and "-inf".
    """
    finite = {key: _finite(value) for key, value in record.items()}
    line = json.dumps(finite, ensure_ascii=False, allow_nan=False)
    try:
        line.encode(encoding)
    except UnicodeEncodeError:  # a terminal without UTF-8, or half of a surrogate pair in a text
        line = json.dumps(finite, allow_nan=False)
    return line + "\n"


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):
        try:
            return value.item()
        except (ValueError, RuntimeError):  # more than one element
            return value.tolist()
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, list | tuple):
        return [_plain(element) for element in value]
    return str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(element) for element in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
