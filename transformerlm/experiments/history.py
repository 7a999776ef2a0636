"""One run, read whole: its facts, its events and its measurements as arrays over the steps.

A step that was made twice, because the run went back to a checkpoint, counts once: the last line of it does. Lines that
are no JSON objects are counted and left out, and a run that trains now may be read at any moment.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from transformerlm.experiments.metric_lines import METRICS, all_records
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
        known = self.series.get("time.elapsed_s" if axis == "seconds" else "metrics.tokens")
        if known is None or not len(known.steps):
            return None
        places: np.ndarray = np.interp(steps, np.concatenate([[0], known.steps]), np.concatenate([[0.0], known.values]))
        if axis != "flops":
            return places
        per_token = self.started.get("flops_per_token")
        return places * float(per_token) if isinstance(per_token, int | float) else None


def read_history(directory: Path, *, name: str | None = None, keys: Collection[str] | None = None) -> RunHistory:
    """Return all that a run's directory says of it; raise OSError where its lines cannot be read.

    With `keys`, the series are those of these keys alone, which takes less time.
    """
    records, bad = all_records(directory / METRICS)
    events = [record for record in records if isinstance(record.get("event"), str)]
    last = {event["event"]: event for event in events}
    return RunHistory(
        name=directory.name if name is None else name,
        directory=directory,
        config=config_of(directory),
        started=last.get("started", {}),
        environment=last.get("environment", {}),
        events=events,
        series=_series([record for record in records if "event" not in record], keys),
        bad=bad,
    )


def _series(records: list[dict[str, Any]], keys: Collection[str] | None) -> dict[str, Series]:
    found: dict[str, dict[int, float]] = {}
    for record in records:
        step = record.get("step")
        if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 2**62:
            continue
        for key, value in record.items() if keys is None else [(key, record[key]) for key in keys if key in record]:
            # Numbers that are not finite are words in JSON; of the others, Python reads some that no float holds.
            is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**1000
            if key != "step" and (is_number or value in ("nan", "inf", "-inf")):
                found.setdefault(key, {})[step] = float(value)
    return {key: _one_series(by_step) for key, by_step in found.items()}


def _one_series(by_step: dict[int, float]) -> Series:
    steps = sorted(by_step)
    return Series(np.array(steps, dtype=np.int64), np.array([by_step[step] for step in steps], dtype=np.float64))
