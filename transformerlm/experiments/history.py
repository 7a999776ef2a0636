"""One run, read whole: its facts, its events and its measurements as arrays over the steps.

A step that was made twice, because the run went back to a checkpoint, counts once: the last line of it does. Lines that
are no JSON objects are counted and left out, and a run that trains now may be read at any moment.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from transformerlm.experiments.metric_lines import METRICS, each_record
from transformerlm.experiments.run_directories import config_of

Axis = Literal["steps", "tokens", "flops", "seconds"]
"""What a measurement is drawn or compared over."""


@dataclass(frozen=True)
class Series:
    """The values of one key: `values` (n,) fp64 at `steps` (n,) int64, ascending, each step once."""

    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True, kw_only=True)
class RunHistory:
    """A run's whole record.

    `config` has dotted keys; `started` and `environment` are the last events of these names; `events` are all events in
    the order of the file, with their `event` and mostly a `step`. `series` has one `Series` for each numeric key of a
    step line, as `metrics.loss`. `bad` lines were no JSON objects.
    """

    name: str
    directory: Path
    config: Mapping[str, Any]
    started: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    series: Mapping[str, Series] = field(default_factory=dict)
    bad: int = 0

    def axis(self, axis: Axis, steps: np.ndarray) -> np.ndarray | None:
        """Return where steps (n,) are on an axis, (n,) fp64; None where the lines do not say.

        Between two lines, tokens and seconds are interpolated.
        """
        if axis == "steps":
            return steps.astype(np.float64)
        if axis != "flops":
            return self._between_lines("time.elapsed_s" if axis == "seconds" else "metrics.tokens", steps)
        tokens, per_token = self.computed_tokens(steps), self.started.get("flops_per_token")
        if tokens is None:
            tokens = self._between_lines("metrics.tokens", steps)
        return tokens * float(per_token) if tokens is not None and isinstance(per_token, int | float) else None

    def _between_lines(self, key: str, steps: np.ndarray) -> np.ndarray | None:
        known = self.series.get(key)
        if known is None or not len(known.steps):
            return None
        places: np.ndarray = np.interp(steps, np.concatenate([[0], known.steps]), np.concatenate([[0.0], known.values]))
        return places

    def computed_tokens(self, steps: np.ndarray) -> np.ndarray | None:
        """Return how many tokens were computed, learnt or not, (n,) fp64; None where no start says its batch."""
        starts = [
            (float(event["step"]), float(event["tokens_per_step"]))
            for event in self.events
            if event["event"] == "started"
            and isinstance(event.get("step"), int)
            and isinstance(event.get("tokens_per_step"), int)
        ]
        if not starts:
            return None
        begins = [0.0, *(begin for begin, _ in starts[1:]), math.inf]
        computed = np.zeros(len(steps))
        for (_, each), begin, end in zip(starts, begins, begins[1:], strict=False):
            computed += each * np.clip(steps - begin, 0.0, max(0.0, end - begin))
        return computed


def read_history(directory: Path, *, name: str | None = None, keys: AbstractSet[str] | None = None) -> RunHistory:
    """Return all that a run's directory says of it; raise OSError where its lines cannot be read.

    With `keys`, the series are those of these keys alone, which takes less time.
    """
    bad, events, columns = 0, [], _Columns(keys)
    for record in each_record(directory / METRICS):
        if record is None:
            bad += 1
        elif "event" not in record:
            columns.take(record)
        elif isinstance(record["event"], str):
            events.append(record)
    last = {event["event"]: event for event in events}
    return RunHistory(
        name=directory.name if name is None else name,
        directory=directory,
        config=config_of(directory),
        started=last.get("started", {}),
        environment=last.get("environment", {}),
        events=events,
        series=columns.series(),
        bad=bad,
    )


class _Columns:
    """The numbers of step lines by their keys: eight bytes each, so that a run of any length fits into memory."""

    def __init__(self, keys: AbstractSet[str] | None) -> None:
        self._keys = keys
        self._found: dict[str, tuple[array[int], array[float]]] = {}

    def take(self, record: Mapping[str, Any]) -> None:
        step = record.get("step")
        if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 2**62:
            return
        for key in record if self._keys is None else self._keys & record.keys():
            value = record[key]
            # Numbers that are not finite are words in JSON.
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if key != "step" and (is_number or value in ("nan", "inf", "-inf")):
                if key not in self._found:
                    self._found[key] = array("q"), array("d")
                steps, values = self._found[key]
                steps.append(step)
                values.append(float(value))

    def series(self) -> dict[str, Series]:
        """Return the series of each key; of a step that is there twice, the last line counts."""
        return {key: _one_series(*columns) for key, columns in self._found.items()}


def _one_series(steps: array[int], values: array[float]) -> Series:
    ascending, last = np.unique(np.array(steps, dtype=np.int64)[::-1], return_index=True)
    return Series(ascending, np.array(values, dtype=np.float64)[::-1][last])
