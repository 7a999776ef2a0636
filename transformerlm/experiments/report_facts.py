"""What a report says of a run in words: how it ended, plan and outcome, data and checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from config.schemas import duration_seconds
from config.sweep import ENDLESS_STEPS
from transformerlm.experiments.facts import ended_by
from transformerlm.experiments.history import RunHistory
from transformerlm.experiments.listing import disk_bytes
from transformerlm.experiments.run_directories import RunSummary
from transformerlm.experiments.saved_checkpoints import checkpoint_directories, linked_names, state_of

Rows = list[tuple[str, str]]
"""Words, and what is to be said of them."""
_UNKNOWN = "-"
_NEARLY = 0.95  # of the time that is left at a resume: the lines do not say how long saving took


def facts_of(run: RunHistory, summary: RunSummary) -> dict[str, Rows]:
    """Return the rows of a report's tables by the tables' names; a row that the run says nothing of is left out."""
    tables = {
        "Result": _result(run, summary),
        "Plan and outcome": _plan(run),
        "Data": _data(run),
    }
    return {title: [row for row in rows if row[1] != _UNKNOWN] for title, rows in tables.items()}


# --- the result --------------------------------------------------------------------------------------------------


def _result(run: RunHistory, summary: RunSummary) -> Rows:
    best, told = best_validation(run), _last(run, "summary")
    reason = ended_by(run) if summary.state not in ("failed", "running") else None  # an error has a place of its own
    return [
        ("State", summary.state + (f" ({reason})" if isinstance(reason, str) else "")),
        ("Best validation loss", _at(best, "step {:,}")),
        ("Last validation loss", _at(_end(run, "metrics.val_loss"), "step {:,}")),
        ("Bits per byte at best", _fixed(bits_per_byte(run))),
        ("By gzip", _fixed(_number(told.get("gzip_bits_per_byte")), " bits per byte")),
        ("By the tokens' frequencies", _fixed(_number(told.get("unigram_bits_per_byte")), " bits per byte")),
        ("Last training loss", _at(_end(run, "metrics.loss"), "step {:,}")),
        ("Losses that are not finite", _count(not_finite(run))),
        ("Steps skipped", _count(_events(run, "step_skipped"))),
        ("Rollbacks", _count(_events(run, "rolled_back"))),
        ("Resumes", _count(_events(run, "resumed"))),
        ("Lines that could not be read", _count(run.bad)),
    ]


def best_validation(run: RunHistory) -> tuple[int, float] | None:
    """Return the step and the lowest validation loss; None where there is none that is finite."""
    series = run.series.get("metrics.val_loss")
    if series is None or not np.isfinite(series.values).any():
        return None
    at = int(np.where(np.isfinite(series.values), series.values, np.inf).argmin())
    return int(series.steps[at]), float(series.values[at])


def bits_per_byte(run: RunHistory) -> float | None:
    """Return the bits per byte of the best validation."""
    best, series = best_validation(run), run.series.get("metrics.val_bits_per_byte")
    if best is None or series is None:
        return None
    found = series.values[series.steps == best[0]]
    return float(found[0]) if len(found) and np.isfinite(found[0]) else None


def not_finite(run: RunHistory) -> int:
    """Return how many training losses are not finite."""
    series = run.series.get("metrics.loss")
    return 0 if series is None else int((~np.isfinite(series.values)).sum())


def _end(run: RunHistory, key: str) -> tuple[int, float] | None:
    series = run.series.get(key)
    return None if series is None or not len(series.steps) else (int(series.steps[-1]), float(series.values[-1]))


# --- the plan ----------------------------------------------------------------------------------------------------


def _plan(run: RunHistory) -> Rows:
    """Return what was planned beside what came; a resumed run's plan is that of its last start."""
    started, made = run.started, _last_step(run)
    begin, planned = _number(started.get("step")) or 0.0, _number(started.get("max_steps"))
    eta, per_step = _number(started.get("eta_seconds")), _number(started.get("tokens_per_step"))
    until = _until(run, begin=begin, planned=planned, eta=eta)
    steps = None if planned is None else planned - begin
    rate = None  # which a time that is cut does not say
    if until is None and eta and per_step and steps is not None and steps > 0:
        rate = per_step * steps / eta
    tokens, seconds = _end(run, "metrics.tokens"), _trained_seconds(run)
    flops = None if made is None else run.axis("flops", np.array([made]))
    return [
        ("Steps", _beside(until or planned, made, "{:,.0f}")),
        ("Tokens", _beside(until or (planned and per_step and planned * per_step), tokens and tokens[1], "{:,.0f}")),
        ("FLOPs", _beside(None, None if flops is None else flops[0], "{:.3g}")),
        ("Time", _duration_row(eta, seconds, steps=steps, is_timed=until is not None)),
        ("Tokens a second", _beside(rate, _median_rate(run), "{:,.0f}")),
        ("Memory", _memory(started, _peak(run))),
        ("Parameters", _whole(started.get("parameters"))),
        ("Sequences at a time", _whole(started.get("micro_batch_size"))),
        (
            "Device and precision",
            " in ".join(str(started[key]) for key in ("device", "precision") if key in started) or _UNKNOWN,
        ),
    ]


def _until(run: RunHistory, *, begin: float, planned: float | None, eta: float | None) -> str | None:
    """Return "until 30m" for a run that by its last start time ends, not its steps; None for another."""
    text = run.config.get("training.max_time")
    with suppress(ValueError):
        if isinstance(text, str):
            used = run.axis("seconds", np.array([begin])) if begin else None
            left = duration_seconds(text) - (0.0 if used is None else float(used[0]))
            is_cut = eta is not None and eta >= left * (_NEARLY if begin else 1.0)
            is_endless = planned is not None and planned >= ENDLESS_STEPS
            return f"until {text}" if is_cut or is_endless else None
    return None


def _memory(started: Mapping[str, Any], peak: float | None) -> str:
    """Return the memory as it was planned, which is that of the model and its batches, and as it came."""
    words = _beside(_gigabytes(started.get("memory_estimate_bytes")), _gigabytes(peak), "{:.2f} GB")
    is_process = peak is not None and not str(started.get("device", "cpu")).startswith("cuda")
    return f"{words}, Python and its libraries included" if is_process else words


def _beside(planned: float | str | None, came: float | None, form: str) -> str:
    if planned is None and came is None:
        return _UNKNOWN
    if planned is None:
        return form.format(came)
    words = planned if isinstance(planned, str) else form.format(planned)
    return f"{words} planned, not measured" if came is None else f"{words} planned, {form.format(came)} came"


def _duration_row(eta: float | None, seconds: float | None, *, steps: float | None, is_timed: bool) -> str:
    came = _UNKNOWN if seconds is None else duration(seconds)
    if not eta or steps is None:
        return came
    words = f"{duration(eta)} planned" + ("" if is_timed else f" for {steps:,.0f} steps")
    return words if seconds is None else f"{words}, {came} trained in all"


def duration(seconds: float) -> str:
    """Return a time in words of two units at most."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min"


def _trained_seconds(run: RunHistory) -> float | None:
    elapsed = _end(run, "time.elapsed_s")
    if elapsed and math.isfinite(elapsed[1]):
        return elapsed[1]
    return _number(_last(run, "summary").get("seconds"))


def _median_rate(run: RunHistory) -> float | None:
    series = run.series.get("metrics.tokens_per_second")
    finite = np.empty(0) if series is None else series.values[np.isfinite(series.values)]
    return float(np.median(finite)) if len(finite) else None


def _peak(run: RunHistory) -> float | None:
    series = run.series.get("memory.peak_bytes")
    return None if series is None or not len(series.values) else float(np.nanmax(series.values))


# --- the data ----------------------------------------------------------------------------------------------------


def _data(run: RunHistory) -> Rows:
    environment, tokens = run.environment, _end(run, "metrics.tokens")
    available = _number(environment.get("data.train.tokens"))
    passes = tokens[1] / available if tokens and available else _number(_last(run, "summary").get("passes_over_data"))
    valid = environment.get("data.valid.sha256", run.started.get("valid_sha256"))
    return [
        ("Training tokens", _text(run.config.get("data.train"))),
        ("Number of training tokens", _whole(available)),
        ("sha256 of the training tokens", _text(environment.get("data.train.sha256"))),
        ("Passes over them", _UNKNOWN if passes is None else f"{passes:.3g}"),
        ("Validation tokens", _text(run.config.get("data.valid"))),
        ("Number of validation tokens", _whole(environment.get("data.valid.tokens"))),
        ("Of these, measured on", _whole(run.started.get("valid_tokens"))),
        ("sha256 of the validation tokens", _text(valid)),
        ("Tokenizer", _text(run.config.get("data.tokenizer"))),
        ("sha256 of the tokenizer", _text(environment.get("tokenizer_sha256", run.started.get("tokenizer_sha256")))),
    ]


# --- checkpoints -------------------------------------------------------------------------------------------------


def checkpoints_of(directory: Path) -> list[dict[str, Any]]:
    """Return the checkpoints that a run has now: step, names, bytes, validation loss and the sha256 of the weights."""
    try:
        directories = checkpoint_directories(directory)
    except OSError:
        directories = {}
    names, found = linked_names(directory), []
    for step, path in directories.items():
        state = state_of(path)
        sums = state.get("sha256")
        weights = (
            {name: one for name, one in sums.items() if str(name).startswith("model")} if isinstance(sums, dict) else {}
        )
        found.append(
            {
                "step": step,
                "names": [name for name, target in names.items() if target == path.name],
                "bytes": disk_bytes(path),
                "val_loss": _number(state.get("val_loss")),
                "sha256": {str(name): str(one)[:64] for name, one in sorted(weights.items())},
            }
        )
    return found


# --- values ------------------------------------------------------------------------------------------------------


def _last(run: RunHistory, name: str) -> Mapping[str, Any]:
    return next((event for event in reversed(run.events) if event["event"] == name), {})


def _events(run: RunHistory, name: str) -> int:
    return sum(event["event"] == name for event in run.events)


def _last_step(run: RunHistory) -> int | None:
    steps = [int(series.steps[-1]) for series in run.series.values() if len(series.steps)]
    return max(steps, default=None)


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**1000
    return float(value) if is_number else None


def _gigabytes(value: Any) -> float | None:
    number = _number(value)
    return None if number is None else number / 1e9


def _at(found: tuple[int, float] | None, place: str) -> str:
    return _UNKNOWN if found is None else f"{found[1]:.4f} at {place.format(found[0])}"


def _fixed(value: float | None, unit: str = "") -> str:
    return _UNKNOWN if value is None else f"{value:.4f}{unit}"


def _whole(value: Any) -> str:
    number = _number(value)
    return _UNKNOWN if number is None else f"{number:,.0f}"


def _count(number: int) -> str:
    return f"{number:,}" if number else _UNKNOWN


def _text(value: Any) -> str:
    return value if isinstance(value, str) and value else _UNKNOWN
