"""Guided search: optuna's TPE proposes the next point from the results so far (Bergstra et al. 2011).

`trials.jsonl` has a line for each point in the order in which they were asked for, and one for each result in the
order in which they came. A point follows from the lines before it alone: for each one, the search is built anew. So a
sweep that was killed asks for the points that it would have asked for.
"""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from config.errors import ConfigError
from config.extras import how_to_install
from transformerlm.experiments.metric_lines import as_record
from transformerlm.experiments.sweep.plan import SweepRun
from transformerlm.experiments.sweep.points import Axis, Option, Point
from transformerlm.experiments.sweep.scheduler import Outcome, Task
from transformerlm.utils.files import write_whole

TRIALS = "trials.jsonl"


class TrialLog:
    """The file of points and results: `asked` are labels by axis, `losses` the results by trial, None for a failure.

    Raises:
        ValueError: the file is of a search with other axes, or of no search.
    """

    def __init__(self, path: Path, axes: Sequence[Axis]) -> None:
        self._path, self._axes = path, {axis.name: axis for axis in axes}
        self.asked: list[dict[str, str]] = []
        self.losses: dict[int, float | None] = {}
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []  # what a kill cut off is not a line
        for line in lines:
            self._take(as_record(line) or {})

    def _take(self, record: Mapping[str, Any]) -> None:
        labels, trial, loss = record.get("labels"), record.get("trial"), record.get("loss")
        if not isinstance(labels, dict):
            if not isinstance(trial, int) or "loss" not in record or not isinstance(loss, float | int | None):
                raise ValueError(
                    f"{self._path}: expected the points and results of a search, found another line; move the file away"
                )
            self.losses[trial] = loss
            return
        if set(labels) != set(self._axes) or not all(_fits(axis, labels[name]) for name, axis in self._axes.items()):
            raise ValueError(
                f"{self._path}: expected points on the axes of this sweep, found others; choose another dir"
            )
        self.asked.append(labels)

    def ask(self, labels: dict[str, str]) -> None:
        """Note a new point."""
        self.asked.append(labels)
        self._append({"trial": len(self.asked) - 1, "labels": labels})

    def tell(self, trial: int, loss: float) -> None:
        """Note a result; one that is not finite is a failure."""
        known = loss if math.isfinite(loss) else None
        if trial not in self.losses or self.losses[trial] != known:
            self.losses[trial] = known
            self._append({"trial": trial, "loss": known})

    def _append(self, record: Mapping[str, Any]) -> None:
        whole = self._path.read_bytes() if self._path.exists() else b""
        if not whole.endswith(b"\n") and whole:
            write_whole(self._path, whole[: whole.rfind(b"\n") + 1])
        with self._path.open("ab") as file:
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _fits(axis: Axis, label: str) -> bool:
    if axis.options:
        return any(option.label == label for option in axis.options)
    try:
        return axis.low <= float(label) <= axis.high
    except (ValueError, TypeError):
        return False


class Guided:
    """The source of tasks for guided search.

    Args:
        axes: what is varied.
        runs_of: returns the runs of a point, one a seed; it raises ConfigError for one that is not valid.
        trials: how many points to try.
        seed: that of the search.
        log: the points and results so far.
    """

    def __init__(
        self,
        axes: Sequence[Axis],
        runs_of: Callable[[Point], list[SweepRun]],
        *,
        trials: int,
        seed: int,
        log: TrialLog,
    ) -> None:
        self._axes, self._runs_of, self._trials, self._seed, self._log = axes, runs_of, trials, seed, log
        self._tasks: deque[Task] = deque()
        self._queued: set[str] = set()
        self._by_trial: dict[int, list[SweepRun]] = {}
        self._outcomes: dict[str, Outcome] = {}
        for trial in range(len(log.asked)):
            self._queue(trial)

    def next(self) -> Task | None:
        """Return a run of the points so far, or of a new one."""
        while not self._tasks and len(self._log.asked) < self._trials:
            self._log.ask(propose(self._axes, self._log, seed=self._seed))
            self._queue(len(self._log.asked) - 1)
        return self._tasks.popleft() if self._tasks else None

    def _queue(self, trial: int) -> None:
        """Make the runs of a trial; one whose runs are all known already, or cannot be, has its result at once."""
        try:
            runs = self._runs_of(_point(self._axes, self._log.asked[trial]))
        except ConfigError:
            self._log.tell(trial, math.inf)
            return
        self._by_trial[trial] = runs
        self._tasks += [Task(run) for run in runs if run.name not in self._queued]
        self._queued |= {run.name for run in runs}
        self._tell_if_known(trial)

    def done(self, outcome: Outcome) -> None:
        """Take an outcome, and note the results of the trials that are complete with it."""
        name = outcome.task.run.name
        self._outcomes[name] = outcome
        for trial, runs in self._by_trial.items():
            if any(run.name == name for run in runs):
                self._tell_if_known(trial)

    def _tell_if_known(self, trial: int) -> None:
        outcomes = [self._outcomes.get(run.name) for run in self._by_trial[trial]]
        losses = [math.inf if one.state == "failed" else one.rank for one in outcomes if one]
        if len(losses) == len(outcomes):
            self._log.tell(trial, fmean(losses))

    @property
    def outcomes(self) -> list[Outcome]:
        """The outcomes so far, in the order in which they came."""
        return list(self._outcomes.values())


def _point(axes: Sequence[Axis], labels: Mapping[str, str]) -> Point:
    return Point.of(axes, [_option(axis, labels[axis.name]) for axis in axes])


def _option(axis: Axis, label: str) -> Option:
    if axis.options:
        return next(option for option in axis.options if option.label == label)
    return axis.option(float(label))


# --- optuna --------------------------------------------------------------------------------------------------------


def load_optuna() -> Any:
    """Return the library, without its log lines.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    try:
        import optuna
    except ImportError as error:
        raise ImportError(f'method = "tpe" needs optuna ({error}); {how_to_install("sweep")}') from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def propose(axes: Sequence[Axis], log: TrialLog, *, seed: int) -> dict[str, str]:
    """Return the labels of the next point, a function of the axes, the log and the seed."""
    optuna = load_optuna()
    number = len(log.asked)
    sampler = optuna.samplers.TPESampler(seed=(seed + 1_000_003 * number) % 2**32, constant_liar=True)
    study = optuna.create_study(sampler=sampler)
    distributions = {axis.name: _distribution(axis, optuna.distributions) for axis in axes}
    for trial, labels in enumerate(log.asked):
        params = {axis.name: _parameter(axis, labels[axis.name]) for axis in axes}
        loss = log.losses.get(trial)
        state = "COMPLETE" if loss is not None else "FAIL" if trial in log.losses else "RUNNING"
        made = optuna.trial.create_trial(
            state=optuna.trial.TrialState[state], value=loss, params=params, distributions=distributions
        )
        study.add_trial(made)
    asked = study.ask(distributions).params
    return {axis.name: asked[axis.name] if axis.options else axis.option(asked[axis.name]).label for axis in axes}


def _distribution(axis: Axis, distributions: Any) -> Any:
    if axis.options:
        return distributions.CategoricalDistribution([option.label for option in axis.options])
    if axis.is_integer:
        return distributions.IntDistribution(int(axis.low), int(axis.high), log=axis.is_log)
    return distributions.FloatDistribution(axis.low, axis.high, log=axis.is_log)


def _parameter(axis: Axis, label: str) -> str | int | float:
    return label if axis.options else int(label) if axis.is_integer else float(label)
