"""Successive halving: settings that are behind at a rung train no further (Jamieson and Talwalkar 2016).

All settings train to the first rung, a number of steps; those with the lowest validation losses go on to the next. A
run keeps its whole schedule: its learning rate at a rung is that of a run that goes on to the end, and going on is a
resume. So a setting whose schedule pays late, such as a high learning rate with a long decay, may be stopped too early.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from statistics import fmean

from transformerlm.experiments.sweep.plan import SweepRun, group_runs
from transformerlm.experiments.sweep.scheduler import Outcome, Task


class Halving:
    """The source of tasks for successive halving; settings are judged by their means over the seeds.

    Args:
        runs: all runs.
        rungs: the steps at which losses are compared, ascending.
        factor: of this many settings, one goes on, rounded up.
    """

    def __init__(self, runs: Sequence[SweepRun], *, rungs: Sequence[int], factor: int) -> None:
        self._groups = group_runs(runs)
        self._targets: list[int | None] = [*rungs, None]
        self._level, self._factor = 0, factor
        self._latest: dict[str, Outcome] = {}
        self._begin(list(self._groups))

    def _begin(self, groups: Sequence[str]) -> None:
        self._alive, until = list(groups), self._targets[self._level]
        tasks = [Task(run, until) for group in groups for run in self._groups[group]]
        self._tasks, self._open = deque(tasks), len(tasks)

    def next(self) -> Task | None:
        """Return the next run of this rung; None while its last ones train."""
        return self._tasks.popleft() if self._tasks else None

    def done(self, outcome: Outcome) -> None:
        """Take an outcome; after the last one of a rung, the best settings begin the next."""
        self._latest[outcome.task.run.name] = outcome
        self._open -= 1
        if self._open or self._level + 1 == len(self._targets):
            return
        self._level += 1
        self._begin(self._best())

    def _best(self) -> list[str]:
        """Return the settings that go on, in their first order; one that has failed does not."""
        losses = {group: self._mean(group) for group in self._alive}
        sound = sorted((group for group in self._alive if math.isfinite(losses[group])), key=losses.__getitem__)
        best = set(sound[: math.ceil(len(self._alive) / self._factor)])
        return [group for group in self._alive if group in best]

    def _mean(self, group: str) -> float:
        outcomes = [self._latest[run.name] for run in self._groups[group]]
        return fmean(math.inf if one.state == "failed" else one.rank_at_rung for one in outcomes)

    @property
    def outcomes(self) -> list[Outcome]:
        """The latest outcome of each run; one that a rung has stopped is not finished."""
        return list(self._latest.values())
