"""Run directories as points of a scaling law: finished runs alone, each with its last validation loss.

A point from the middle of a schedule is none: its learning rate has not come down, and its loss is above that of a run
of its own with as many tokens (Hoffmann et al. 2022, appendix B). So a run that a signal or early stopping ended does
not count.
"""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from transformerlm.experiments.compare import MEASURED_ON, measured_on
from transformerlm.experiments.history import RunHistory, read_history
from transformerlm.experiments.metric_lines import METRICS
from transformerlm.experiments.scaling.points import Points

_WHOLE = ("max_steps", "max_time")


@dataclass(frozen=True, kw_only=True)
class MeasuredRuns:
    """What runs say: their points, the bits per byte of a nat per token, and in words which runs do not count.

    `bits_per_nat` is None where the runs do not say or do not agree.
    """

    points: Points
    bits_per_nat: float | None
    left_out: list[str]


def find_runs(names: Sequence[str]) -> list[Path]:
    """Return the directories that names or globs (`runs/scaling-*`) mean, each once, in alphabetical order for a glob.

    Raises:
        ValueError: a name means no run.
    """
    found: dict[Path, None] = {}
    for name in names:
        paths = [Path(one) for one in sorted(glob.glob(name))] if glob.has_magic(name) else [Path(name)]
        runs = [path for path in paths if (path / METRICS).is_file()]
        if not runs:
            raise ValueError(f"runs: {name}: expected directories of runs, with a {METRICS}, found none")
        found |= dict.fromkeys(runs)
    return list(found)


def read_runs(directories: Sequence[Path]) -> MeasuredRuns:
    """Return the points of finished runs.

    Raises:
        ValueError: the losses cannot be compared, because tokenizer or validation text differ.
        OSError: a run cannot be read.
    """
    rows, left_out, histories = [], [], []
    for directory in directories:
        history = read_history(directory)
        problem = _why_none(history)
        if problem:
            left_out.append(f"{directory}: {problem}")
            continue
        rows.append(_row(history, str(directory)))
        histories.append(history)
    _check_comparable(histories)
    columns = {key: np.array([row[key] for row in rows], dtype=np.float64) for key in _NUMBERS}
    points = Points(names=np.array([row["name"] for row in rows], dtype=object), **columns)
    return MeasuredRuns(points=points, bits_per_nat=_bits_per_nat(histories), left_out=left_out)


_NUMBERS = ("parameters", "tokens", "losses", "flops", "body", "seconds")


def _why_none(history: RunHistory) -> str:
    """Return why a run is no point; "" if it is one."""
    ends = [one for one in history.events if one["event"] in ("started", "finished")]
    ended = ends[-1] if ends else {"event": ""}
    if ended["event"] != "finished":
        return "it has not finished"
    if ended.get("reason") not in _WHOLE:
        return f"it ended by {ended.get('reason')}, before its schedule did"
    losses = history.series.get("metrics.val_loss")
    if losses is None or not losses.values[-1] > 0 or losses.steps[-1] != ended.get("step"):
        return "it has no validation loss at its end (set data.valid)"
    if not all(_number(history.started, key) for key in ("parameters", "flops_per_token", "tokens_per_step")):
        return f"its {METRICS} does not say how large the model is"
    return ""


def _number(facts: Mapping[str, Any], key: str) -> float | None:
    value = facts.get(key)
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 2**200
    return float(value) if is_number else None  # type: ignore[arg-type]


def _row(history: RunHistory, name: str) -> dict[str, Any]:
    started, losses = history.started, history.series["metrics.val_loss"]
    computed = history.computed_tokens(losses.steps[-1:])  # the batch may have changed on the way
    tokens = float(losses.steps[-1]) * float(started["tokens_per_step"]) if computed is None else float(computed[0])
    clock = history.series.get("time.elapsed_s")
    return {
        "name": name,
        "parameters": float(started["parameters"]),
        "tokens": tokens,
        "losses": float(losses.values[-1]),
        "flops": tokens * float(started["flops_per_token"]),
        "body": float(started["parameters"]) - _outside(history.config),
        "seconds": float(clock.values[-1]) if clock is not None and clock.values[-1] > 0 else np.nan,
    }


def _outside(config: Mapping[str, Any]) -> float:
    """Return the parameters of embedding and head; NaN where the configuration does not say."""
    sizes = [_number(config, f"model.{key}") for key in ("vocab_size", "d_model")]
    if None in sizes:
        return float("nan")
    vocab_size, d_model = sizes
    assert vocab_size is not None
    assert d_model is not None
    return vocab_size * d_model * (1 if config.get("model.tie_embeddings") else 2)


def _check_comparable(histories: Sequence[RunHistory]) -> None:
    said = [(measured_on(one.started), one.directory) for one in histories]
    for key, word in MEASURED_ON.items():
        known = {str(each[key]): directory for each, directory in said if key in each}
        if len(known) > 1:
            first, second = list(known.values())[:2]
            raise ValueError(
                f"{second}: expected the {word} of {first}, found another: losses in nats per token cannot be compared"
            )


def _bits_per_nat(histories: Sequence[RunHistory]) -> float | None:
    """Return what a loss in nats per token is multiplied with to be in bits per byte, by the last validations."""
    ratios = []
    for one in histories:
        bits, loss = (one.series.get(f"metrics.{key}") for key in ("val_bits_per_byte", "val_loss"))
        if bits is None or loss is None or bits.steps[-1] != loss.steps[-1]:
            return None
        ratios.append(float(bits.values[-1] / loss.values[-1]))
    is_one = bool(ratios) and max(ratios) - min(ratios) <= 1e-3 * max(ratios)
    return float(np.median(ratios)) if is_one else None
