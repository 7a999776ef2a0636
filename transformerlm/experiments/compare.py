"""Runs side by side: what differs in their settings, what they reached at equal places, and whether that is luck.

Runs with the same settings but the seed are one group. Each group is compared with the first one: pair by pair where
runs of one seed saw the same batches, else as two samples. Losses are compared at one place that all runs reached, and
are interpolated on a straight line between the two validations around it. A run that diverged has no number.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from transformerlm.experiments.history import Axis, RunHistory
from transformerlm.experiments.settings import SEED, batches_of, defaults, law_of
from transformerlm.experiments.statistics import LEAST_SEEDS, Difference, paired_difference, welch_difference

At = Literal["steps", "tokens", "flops", "seconds", "end", "lowest"]
AXES: tuple[Axis, ...] = get_args(Axis)
LOSS, NATS, BITS = "metrics.loss", "metrics.val_loss", "metrics.val_bits_per_byte"
UNITS = {NATS: "nats per token", BITS: "bits per byte"}
# What a run's losses are measured on: the keys of its line `started`, and their meaning.
MEASURED_ON = {
    "tokenizer_sha256": "tokenizer",
    "valid_sha256": "validation file",
    "valid_tokens": "number of validation tokens",
    "valid_packing": "packing of the validation text",
    "valid_context_length": "length of its rows",
    "valid_mask_sha256": "tokens of it that count",
    "document_mask": "mask between its documents",
}
_UNSAID = {"valid_packing": "windows"}
UNKNOWN = "unknown"
"""The settings of a run whose directory does not hold them."""
_NUMBER = re.compile(r"-\d+$")
# What an event `environment` says of the files that settings name; so many digits are shown.
_SUMS = {
    "data.train": "data.train.sha256",
    "data.valid": "data.valid.sha256",
    "data.tokenizer": "tokenizer_sha256",
}
_SHORT_SUM = 12
_DIVERGED = 2.0  # times the loss of the first run at the same place
_LEARNT, _FORGOT = 0.8, 1.5  # times its own first and lowest loss


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs that differ only in the seed, in the order given; `law` holds their other settings."""

    name: str
    runs: list[RunHistory]
    law: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class GroupResult:
    """What a group reached at the place: a value a run, None for one that diverged, has no validation or is a copy.

    `losses` are in the comparison's unit, `bits` in bits per byte. `tokens` is the most that a run of it has seen at
    the place. `words` says of each run why it has no value. `versus` is the difference to the first group; where there
    is none, `missing` says why.
    """

    group: Group
    losses: list[float | None]
    bits: list[float | None]
    words: list[str]
    tokens: float | None
    mean: float | None
    spread: float | None
    versus: Difference | None = None
    missing: str = ""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Groups at one place, the first being what the others are compared with.

    `measure` is NATS or BITS; `place` is None with `at = "end"`, where each run is taken as it ended, and with
    `at = "lowest"`, where its lowest validation counts. `settings` has
    the keys in which groups differ, and each one's value. `elsewhere` has the means at the last common place of each
    axis that all runs have. `diverged` has the directories of runs that diverged. `notes` are for people.
    """

    at: At
    place: float | None
    measure: str
    diverged: frozenset[Path]
    results: list[GroupResult]
    settings: dict[str, list[Any]]
    elsewhere: dict[Axis, tuple[float, list[float | None]]]
    notes: list[str] = field(default_factory=list)


def compare_runs(runs: Sequence[RunHistory], *, at: At = "tokens", place: float | None = None) -> Comparison:
    """Compare runs, the first one's group being the baseline.

    Args:
        runs: the runs, in the order of the rows.
        at: the axis on which runs are compared at one place; or "end": each where it ended, or "lowest": each at its
            lowest validation.
        place: the place; None: the last one that all runs reached which did not diverge.

    Raises:
        ValueError: no run has a validation with the measure, or not all runs have the axis or reached the place.
    """
    notes: list[str] = []
    measure = choose_measure(runs, notes)
    if not any(len(_curve(run, measure)[0]) for run in runs):
        raise ValueError(f"{runs[0].directory}: expected validations with {measure}, found none (set data.valid)")
    groups = group_runs(runs, notes)
    diverged = _diverged(runs, measure)
    if at != "end" and at != "lowest" and place is None:
        place = _common_place(runs, at, measure=measure, diverged=diverged)
    results = [_result(group, measure, at=at, place=place, diverged=diverged) for group in groups]
    first = results[0]
    results = [first, *(_against(first, other) for other in results[1:])]
    notes += filter(None, map(_of_some_seeds, results[1:]))
    keys = sorted({key for group in groups for key in group.law})
    table = {key: [_setting(group, key) for group in groups] for key in keys}
    return Comparison(
        at=at,
        place=place,
        measure=measure,
        diverged=diverged,
        results=results,
        settings={key: row for key, row in table.items() if len({repr(value) for value in row} - {repr(UNKNOWN)}) > 1},
        elsewhere=_elsewhere(groups, measure, diverged=diverged),
        notes=notes,
    )


def _setting(group: Group, key: str) -> Any:
    return group.law.get(key, defaults().get(key)) if group.runs[0].config else UNKNOWN


# --- what can be compared ----------------------------------------------------------------------------------------


def choose_measure(runs: Sequence[RunHistory], notes: list[str]) -> str:
    """Return NATS, or BITS if the runs' tokenizers or texts differ, and add to the notes why.

    Nats per token depend on the tokenizer. With different texts, or different parts of one, neither says which model is
    better.
    """
    known = [run.started for run in runs if "tokenizer_sha256" in run.started]
    unknown = [run for run in runs if "tokenizer_sha256" not in run.started]
    if unknown:
        notes.append(
            f"{unknown[0].directory}: does not say what it was measured on; comparing it supposes the same tokenizer "
            "and text"
        )
    said = [measured_on(started) for started in known]
    different = [MEASURED_ON[key] for key in differing(said)]
    if not different:
        return NATS
    texts = "" if different == ["tokenizer"] else "; of different texts a difference says nothing of the models"
    notes.append(f"the runs differ in {', '.join(different)}: comparing bits per byte, not nats per token{texts}")
    return BITS


def measured_on(started: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the losses of a run are measured on, by its event `started`, without what it does not say."""
    said: dict[str, Any] = {**_UNSAID, **started}
    return {key: said[key] for key in MEASURED_ON if key in said}


def differing(said: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys of `MEASURED_ON` in which those differ that say them."""
    return [key for key in MEASURED_ON if len({str(each[key]) for each in said if key in each}) > 1]


def group_runs(runs: Sequence[RunHistory], notes: list[str]) -> list[Group]:
    """Return the runs in groups by their settings and data without the seed, in the order in which each first occurs.

    A run without settings, as those of other programs, is grouped by its name without a final `-` and digits. Names of
    groups are those of their first runs without that, or whole where two would be equal, or else their directories.
    """
    found: dict[str, list[RunHistory]] = {}
    for run in runs:
        key = repr(sorted(_law(run).items())) if run.config else f"name: {_NUMBER.sub('', run.name)}"
        found.setdefault(key, []).append(run)
    if any(not run.config for run in runs):
        notes.append("a run without a config.toml is grouped by its name without a final number")
    firsts = [some[0] for some in found.values()]
    names = [_NUMBER.sub("", run.name) for run in firsts]
    for longer in (lambda run: run.name, lambda run: str(run.directory)):
        names = [name if names.count(name) == 1 else longer(run) for name, run in zip(names, firsts, strict=True)]
    return [Group(name=name, runs=some, law=_law(some[0])) for name, some in zip(names, found.values(), strict=True)]


def _law(run: RunHistory) -> dict[str, Any]:
    """Return a run's settings without the seed; files that it knows by their fingerprint are named by that."""
    law = law_of(run.config)
    for path, key in _SUMS.items():
        if path in law and isinstance(fingerprint := run.environment.get(key), str):
            del law[path]
            law[key] = fingerprint[:_SHORT_SUM]
    return law


# --- curves and places -------------------------------------------------------------------------------------------


def _curve(run: RunHistory, measure: str) -> tuple[np.ndarray, np.ndarray]:
    series = run.series.get(measure)
    return (np.array([], dtype=np.int64), np.array([])) if series is None else (series.steps, series.values)


def _diverged(runs: Sequence[RunHistory], measure: str) -> frozenset[Path]:
    """Return the directories of the runs that diverged.

    Their last loss is no number, or they failed because of one, or they never learnt, or forgot, and their last
    validation is above twice the loss that the first run has after as many tokens: the first one that did not end so.
    """
    found = {run.directory for run in runs if _ended_without_a_number(run, measure)}
    first = next((run for run in runs if run.directory not in found and len(_curve(run, measure)[0])), None)
    if first is None:
        return frozenset(found)
    return frozenset(found | {run.directory for run in runs if _is_far_above(first, run, measure)})


def _ended_without_a_number(run: RunHistory, measure: str) -> bool:
    ends = [event for event in run.events if event["event"] in ("started", "finished", "failed")]
    has_failed = bool(ends) and str(ends[-1].get("error", "")).startswith(FloatingPointError.__name__)
    lasts = [values[-1] for _, values in (_curve(run, LOSS), _curve(run, measure)) if len(values)]
    return has_failed or not all(map(math.isfinite, lasts))


def _is_far_above(first: RunHistory, run: RunHistory, measure: str) -> bool:
    """Return whether a run's last validation is above twice the first one's there, or where that one begins or ends.

    A run whose loss fell, and stays where it came to, is worse or behind and has not diverged.
    """
    (steps, values), (known, losses) = _curve(run, measure), _curve(first, measure)
    if not len(steps) or (values[-1] < _LEARNT * values[0] and values[-1] < _FORGOT * np.nanmin(values)):
        return False
    place, places = run.axis("tokens", steps[-1:]), first.axis("tokens", known)
    if place is None or places is None:
        place, places = steps[-1:], known
    return bool(values[-1] > _DIVERGED * np.interp(place, places, losses)[0])


def _common_place(runs: Sequence[RunHistory], axis: Axis, *, measure: str, diverged: AbstractSet[Path]) -> float | None:
    """Return the last place on an axis that all runs with validations reached; those that diverged do not count."""
    ends = []
    for run in runs:
        steps, _ = _curve(run, measure)
        if not len(steps) or run.directory in diverged:
            continue
        places = run.axis(axis, steps[-1:])
        if places is None:
            raise ValueError(f"{run.directory}: its lines do not say at how many {axis} a step is; try --at=steps")
        ends.append(float(places[0]))
    return min(ends, default=None)


def value_at(run: RunHistory, key: str, *, at: At, place: float | None) -> float | None:
    """Return a measurement where a run ended, or at a place between its first validation and its last one."""
    steps, values = _curve(run, key)
    if not len(steps):
        return None
    if at == "lowest":
        return float(np.min(values))
    if at == "end" or place is None:
        return float(values[-1])
    places = run.axis(at, steps)
    if places is None or not places[0] <= place <= places[-1] * (1 + 1e-12):
        return None
    return float(np.interp(place, places, values))


def _result(group: Group, measure: str, *, at: At, place: float | None, diverged: AbstractSet[Path]) -> GroupResult:
    losses: list[float | None] = []
    words, seeds = [], set()
    for run in group.runs:
        loss, word, seed = value_at(run, measure, at=at, place=place), "", run.config.get(SEED)
        if run.directory in diverged:
            loss, word = None, "diverged"
        elif not len(_curve(run, measure)[0]):
            word = "no validation"
        elif loss is None or not math.isfinite(loss):
            loss, word = None, "not there"
        elif seed is not None and seed in seeds:
            loss, word = None, "same seed"
        if loss is not None:
            seeds.add(seed)
        losses.append(loss)
        words.append(word)
    bits = [
        value_at(run, BITS, at=at, place=place) if loss is not None else None
        for run, loss in zip(group.runs, losses, strict=True)
    ]
    known = [loss for loss in losses if loss is not None]
    return GroupResult(
        group=group,
        losses=losses,
        bits=bits,
        words=words,
        tokens=_tokens(group, measure, at=at, place=place),
        mean=statistics.fmean(known) if known and "diverged" not in words else None,
        spread=statistics.stdev(known) if len(known) > 1 else None,
    )


def _tokens(group: Group, measure: str, *, at: At, place: float | None) -> float | None:
    """Return the most tokens that a run of a group has seen at the place."""
    found = []
    for run in group.runs:
        steps, values = _curve(run, measure)
        tokens = run.axis("tokens", steps) if len(steps) else None
        if tokens is None:
            continue
        if at == "lowest":
            found.append(float(tokens[np.argmin(values)]))
            continue
        places = None if at == "end" else run.axis(at, steps)
        found.append(float(tokens[-1] if places is None or place is None else np.interp(place, places, tokens)))
    return max(found, default=None)


def _elsewhere(
    groups: Sequence[Group], measure: str, *, diverged: AbstractSet[Path]
) -> dict[Axis, tuple[float, list[float | None]]]:
    """Return the means of the groups at the last common place of each axis that all runs have."""
    found: dict[Axis, tuple[float, list[float | None]]] = {}
    runs = [run for group in groups for run in group.runs]
    for axis in AXES:
        try:
            place = _common_place(runs, axis, measure=measure, diverged=diverged)
        except ValueError:
            continue
        if place is not None:
            means = [_result(group, measure, at=axis, place=place, diverged=diverged).mean for group in groups]
            found[axis] = place, means
    return found


# --- differences -------------------------------------------------------------------------------------------------


def _against(first: GroupResult, other: GroupResult) -> GroupResult:
    """Return a result with its difference to the first group, or with what is missing for one."""
    pairs = _pairs(first, other)
    one, two = ([loss for loss in result.losses if loss is not None] for result in (first, other))
    versus, missing = None, ""
    if "diverged" in first.words + other.words:
        missing = f"a run of {(first if 'diverged' in first.words else other).group.name} diverged"
    elif len(pairs) >= LEAST_SEEDS:
        versus = paired_difference([a for a, _ in pairs], [b for _, b in pairs])
    elif min(len(one), len(two)) >= LEAST_SEEDS:
        versus = welch_difference(one, two)
    else:
        lacking = [
            f"{LEAST_SEEDS - len(known)} more seed{'s' * (LEAST_SEEDS - len(known) > 1)} of {result.group.name}"
            for known, result in ((one, first), (two, other))
            if len(known) < LEAST_SEEDS
        ]
        missing = f"that needs {' and '.join(lacking)}"
    return GroupResult(**{**vars(other), "versus": versus, "missing": missing})


def _of_some_seeds(result: GroupResult) -> str:
    """Return a note where a test is on fewer seeds than the means are of, which then may say something else."""
    known = sum(loss is not None for loss in result.losses)
    if result.versus is None or result.versus.method != "paired" or result.versus.seeds == known:
        return ""
    seeds = f"the {result.versus.seeds} seeds that both have"
    return f"{result.group.name}: the difference is that of {seeds}, the means are of all"


def _pairs(first: GroupResult, other: GroupResult) -> list[tuple[float, float]]:
    """Return the losses of runs that saw the same batches: the same seed, data and shape of a batch."""
    known = {}
    for run, loss in zip(first.group.runs, first.losses, strict=True):
        batches = _batches(run)
        if batches is not None and loss is not None:
            known[batches] = loss
    return [
        (known[batches], loss)
        for run, loss in zip(other.group.runs, other.losses, strict=True)
        if loss is not None and (batches := _batches(run)) in known and batches is not None
    ]


def _batches(run: RunHistory) -> tuple[Any, ...] | None:
    return batches_of(run.config, run.environment.get(_SUMS["data.train"]))
