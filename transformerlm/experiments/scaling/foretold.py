"""Predictions that are written down before the run is made, and kept: a law that is fitted again cannot change them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from transformerlm.experiments.scaling.study import Prediction, as_json
from transformerlm.utils.files import write_whole
from transformerlm.utils.json_files import read_json_object

PREDICTIONS = "predictions.json"
_MOST_BYTES = 50_000_000


def state_predictions(
    directory: Path, predictions: Sequence[Prediction], *, law: Mapping[str, Any], made: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Write down what was predicted of runs, by their names, and return all statements of these runs.

    A run that has a statement keeps it. `made` names runs that there were already: their statements say so.

    Raises:
        ValueError: the file is there but holds no statements.
    """
    path = directory / PREDICTIONS
    known = read_predictions(path)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    for one in predictions:
        known.setdefault(
            one.name,
            {
                "written": now,
                "before_the_run": one.name not in made,
                "parameters": one.parameters,
                "tokens": one.tokens,
                "loss": one.loss,
                "intervals": as_json(one.intervals),
                "times_beyond_runs": one.far,
                "law": dict(law),
            },
        )
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(known, indent=1) + "\n")
    return {one.name: known[one.name] for one in predictions}


def as_stated(prediction: Prediction, statement: Mapping[str, Any]) -> Prediction:
    """Return the prediction of a run as its statement has it, whatever the law says by now."""
    intervals = {
        float(level) / 100: (-math.inf if low is None else low, math.inf if high is None else high)
        for level, (low, high) in statement["intervals"].items()
    }
    far = statement.get("times_beyond_runs", prediction.far)
    return replace(prediction, loss=statement["loss"], intervals=intervals, far=far)


def read_predictions(path: Path) -> dict[str, dict[str, Any]]:
    """Return the statements in a file by the names of the runs; none where there is no file.

    Raises:
        ValueError: the file holds something else.
    """
    if not path.exists():
        return {}
    found = read_json_object(path, max_bytes=_MOST_BYTES)
    for name, one in found.items():
        if not isinstance(one, dict) or not isinstance(one.get("loss"), float) or not _has_intervals(one):
            raise ValueError(f"{path}: expected a prediction with loss and intervals for {name!r}; move the file away")
    return found


def _has_intervals(statement: Mapping[str, Any]) -> bool:
    intervals = statement.get("intervals")
    return isinstance(intervals, dict) and all(
        isinstance(ends, list) and len(ends) == 2 and all(isinstance(end, int | float | None) for end in ends)
        for ends in intervals.values()
    )


def _is_between(value: float, low: float | None, high: float | None) -> bool:
    """Return whether a value is in an interval; a side that is None has no end."""
    return (low is None or low <= value) and (high is None or value <= high)


def judge(statement: Mapping[str, Any], measured: float) -> dict[str, Any]:
    """Return how good a prediction was: its relative error, and for each level whether the loss is in the interval."""
    return {
        "predicted": statement["loss"],
        "intervals": statement["intervals"],
        "measured": measured,
        "error": statement["loss"] / measured - 1,
        "inside": {level: _is_between(measured, *ends) for level, ends in statement["intervals"].items()},
        "before_the_run": bool(statement.get("before_the_run")),
        "written": statement.get("written"),
    }
