"""Successive halving, with losses that the test makes up."""

from __future__ import annotations

import math

from tests.experiments.sweep.helpers import planned, scheduler_of, steps_made
from transformerlm.experiments.sweep.halving import Halving
from transformerlm.experiments.sweep.scheduler import Outcome, Task

AXES = [{"key": "optimizer.learning_rate", "values": [1e-3, 2e-3, 3e-3, 4e-3, 5e-3]}]


def outcome(task: Task, loss: float, state: str = "stopped") -> Outcome:
    """Return what the scheduler would say."""
    numbers = {"val_loss": 9 - loss, "best_val_loss": 9 - loss, "val_bits_per_byte": loss, "best_bits_per_byte": loss}
    numbers |= {"seconds": 1.0}  # the tokenizers differ: bits per byte decide
    return Outcome(task=task, state=state, step=task.until or 12, **numbers)


def ask_all(source: Halving) -> list[Task]:
    """Return all tasks that there are now."""
    return list(iter(source.next, None))


def test_the_best_half_goes_on_at_each_rung(tmp_path):
    """Five settings become three, then two; settings are judged by the mean over their seeds."""
    runs = planned(tmp_path, axes=AXES)
    source = Halving(runs, rungs=[2, 6], factor=2)
    sizes = []
    while tasks := ask_all(source):
        sizes.append((tasks[0].until, len(tasks)))
        for task in tasks:  # the seeds lie far apart, but the mean falls with the rate
            rate = task.run.config.optimizer.learning_rate
            source.done(outcome(task, 5 - 100 * rate + (1 if task.run.seed else -1)))
    assert sizes == [(2, 10), (6, 6), (None, 4)]
    last = {one.task.run.point.labels["learning_rate"] for one in source.outcomes if one.task.until is None}
    assert last == {"0.004", "0.005"}
    assert len(source.outcomes) == 10


def test_a_setting_that_failed_goes_no_further(tmp_path):
    """Nor does one whose loss is not finite; if none is left, the sweep ends."""
    source = Halving(planned(tmp_path, axes=AXES, seeds=[0]), rungs=[2], factor=2)
    for place, task in enumerate(ask_all(source)):
        source.done(outcome(task, math.inf if place % 2 else 1.0, "failed" if place < 4 else "stopped"))
    assert [task.run.point.labels["learning_rate"] for task in ask_all(source)] == ["0.005"]
    nothing = Halving(planned(tmp_path, axes=AXES, seeds=[0]), rungs=[2], factor=2)
    for task in ask_all(nothing):
        nothing.done(outcome(task, math.inf, "failed"))
    assert nothing.next() is None


def test_a_sweep_with_halving_ends_the_same_after_a_stop(tmp_path):
    """The losses at a rung are in the runs' lines, so the same command stops the same runs again."""
    axes = [{"key": "optimizer.learning_rate", "values": [1e-2, 1e-1, 1e-3, 2e-2]}]
    runs = planned(tmp_path, axes=axes, seeds=[0])
    source = Halving(runs, rungs=[4], factor=2)
    scheduler_of(tmp_path, seconds=0.02, parallel=4).work(source)
    finished = {one.task.run.point.labels["learning_rate"] for one in source.outcomes if one.state == "finished"}
    assert finished == {"0.01", "0.001"} or finished == {"0.01", "0.02"}
    again, told = Halving(runs, rungs=[4], factor=2), []
    scheduler_of(tmp_path, tell=lambda event, task, facts: told.append(event)).work(again)
    assert set(told) == {"skipped"}
    assert [(one.task.run.name, one.val_loss) for one in again.outcomes] == [
        (run.name, {one.task.run.name: one.val_loss for one in source.outcomes}[run.name]) for run in runs
    ]
    for run in runs:
        assert [step for _, step in steps_made(tmp_path, run)] == list(range(1, len(steps_made(tmp_path, run)) + 1))
