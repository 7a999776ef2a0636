"""What a report holds of a run: plain data, small enough for a page, from which `report.js` draws.

Curves are thinned; validations and events are all there. Steps are written as differences, since they are most of the
bytes otherwise. Numbers that are not finite are words, as in the run's own lines.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from transformerlm.experiments.history import RunHistory, Series
from transformerlm.experiments.report_facts import best_validation, checkpoints_of, facts_of
from transformerlm.experiments.reproduction import reproduction_of
from transformerlm.experiments.run_directories import summary_of
from transformerlm.experiments.thinning import MOST_POINTS, few_places, thinned

CURVES = {
    "loss": "metrics.loss",
    "val_loss": "metrics.val_loss",
    "bits_per_byte": "metrics.val_bits_per_byte",
    "lr": "metrics.lr",
    "grad_norm": "metrics.grad_l2_norm",
    "tokens_per_second": "metrics.tokens_per_second",
    "memory": "memory.peak_bytes",
}
"""The curves by their names in run_lines.js."""
_WHOLE = {"val_loss", "bits_per_byte"}
_SAMPLE_BYTES = 300_000  # of all runs together
_LONGEST_SAMPLE = 20_000
_LONGEST_WORDS = 2_000
_RUNS_WITH_ALL_POINTS = 10


def report_data(runs: Sequence[RunHistory]) -> list[dict[str, Any]]:
    """Return the data of each run, names told apart."""
    share = max(len(runs), _RUNS_WITH_ALL_POINTS)
    most_points = MOST_POINTS * _RUNS_WITH_ALL_POINTS // share
    names = distinct_names(runs)
    return [
        _data_of(run, name, most_points=most_points, most_bytes=_SAMPLE_BYTES // len(runs))
        for run, name in zip(runs, names, strict=True)
    ]


def distinct_names(runs: Sequence[RunHistory]) -> list[str]:
    """Return a name for each run: its own, its path where several have the same, with a number if it is given twice."""
    names = [run.name for run in runs]
    names = [str(run.directory) if names.count(name) > 1 else name for run, name in zip(runs, names, strict=True)]
    return [f"{name} ({names[:at].count(name) + 1})" if name in names[:at] else name for at, name in enumerate(names)]


def _data_of(run: RunHistory, name: str, *, most_points: int, most_bytes: int) -> dict[str, Any]:
    summary = replace(summary_of(run.directory), name=name)
    samples, left_out = _samples(run, most_bytes)
    return {
        "name": name,
        "summary": asdict(summary) | ({"best_val_loss": best[1]} if (best := best_validation(run)) else {}),
        "curves": {
            short: _curve(run.series[key], len(run.series[key].steps) if short in _WHOLE else most_points)
            for short, key in CURVES.items()
            if key in run.series
        },
        "clock": _clock(run, most_points // 2),
        "events": [_short(event) for event in run.events if event["event"] != "sample"],
        "samples": samples,
        "samples_left_out": left_out,
        "config": dict(run.config),
        "facts": facts_of(run, summary),
        "checkpoints": checkpoints_of(run.directory),
        "reproduction": reproduction_of(run),
        "bad_lines": run.bad,
    }


def _curve(series: Series, most: int) -> dict[str, Any]:
    found = thinned(series, max(most, 16))
    means = found.means
    if means is None:
        return {**_columns(found.points), "means": None}
    rounded = Series(means.steps, np.array([float(f"{value:.6g}") for value in means.values.tolist()]))
    return {**_columns(found.points), "means": _columns(rounded)}


def _columns(series: Series) -> dict[str, Any]:
    return {"steps": _differences(series.steps), "values": [plain_number(value) for value in series.values.tolist()]}


def _differences(steps: np.ndarray) -> list[int]:
    """Return the first step and then each one's distance from the one before."""
    return [int(step) for step in np.diff(steps, prepend=0)]


def plain_number(value: float) -> float | str:
    """Return a number as JSON can hold it, without a point where it is whole."""
    if not math.isfinite(value):
        return str(value)
    return int(value) if value == int(value) and abs(value) < 2**53 else value


def _clock(run: RunHistory, most: int) -> dict[str, Any]:
    """Return tokens and seconds at some steps, from which those at all others follow by proportion."""
    known = run.series.get("metrics.tokens")
    if known is None or not len(known.steps):
        return {"steps": [], "tokens": [], "seconds": []}
    places = few_places(known.steps, known.values, max(most, 16))
    seconds = run.axis("seconds", known.steps)
    if seconds is None:
        seconds = _seconds_by_rates(run, known)
    columns = {"tokens": known.values[places], "seconds": seconds[places].round(3)}
    numbers = {key: [plain_number(value) for value in column.tolist()] for key, column in columns.items()}
    return {"steps": _differences(known.steps[places]), **numbers}


def _seconds_by_rates(run: RunHistory, tokens: Series) -> np.ndarray:
    """Return the seconds trained at each line by its tokens a second: runs of earlier versions have no clock."""
    rates = run.series.get("metrics.tokens_per_second")
    if rates is None or not len(rates.steps):
        return np.zeros(len(tokens.steps))
    at = np.interp(tokens.steps, rates.steps, rates.values)
    with np.errstate(divide="ignore", invalid="ignore"):
        spent = np.diff(tokens.values, prepend=0.0) / at
    return np.cumsum(np.where(np.isfinite(spent) & (spent > 0), spent, 0.0))


def _samples(run: RunHistory, most_bytes: int) -> tuple[list[list[Any]], int]:
    """Return [step, prompt, text] of a run's samples, the earliest first, and how many were left out.

    Of too many, each second one is left out, and again, until they fit; the last ones of all prompts stay.
    """
    found: list[list[Any]] = [
        [
            event.get("step"),
            _cut(event.get("text.prompt"), _LONGEST_SAMPLE),
            _cut(event.get("text.output"), _LONGEST_SAMPLE),
        ]
        for event in run.events
        if event["event"] == "sample"
    ]
    by_prompt: dict[str, list[list[Any]]] = {}
    for sample in found:
        by_prompt.setdefault(sample[1], []).append(sample)
    kept = found
    every = 1
    while len(json.dumps(kept)) > most_bytes and every < len(found):
        every *= 2
        kept = [sample for samples in by_prompt.values() for sample in samples[::-1][::every][::-1]]
    return sorted(kept, key=lambda one: one[0] if isinstance(one[0], int) else 0), len(found) - len(kept)


def _cut(value: Any, most: int) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= most else text[:most] + " […]"


def _short(event: dict[str, Any]) -> dict[str, Any]:
    """Return an event whose texts and lists are not longer than a page can show."""
    return {key: _shortened(value) for key, value in event.items()}


def _shortened(value: Any) -> Any:
    if isinstance(value, str):
        return _cut(value, _LONGEST_WORDS)
    if isinstance(value, list):
        return [_shortened(one) for one in value[:100]]
    if isinstance(value, float):
        return plain_number(value)
    return value if isinstance(value, int | bool | None) else _cut(value, _LONGEST_WORDS)
