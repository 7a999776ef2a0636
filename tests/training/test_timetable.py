"""When a run logs, validates, saves and stops: the cases, one a line."""

from __future__ import annotations

import dataclasses

import pytest

from tests.training.tiny_run import tiny_config
from transformerlm.training.timetable import STOP_SIGNALS, Agenda, Timetable

# Steps 1 to 12, a line every 2 steps, a validation every 3, a checkpoint every 5; time and patience are limited.
TABLE = Timetable(max_steps=12, max_seconds=60.0, patience=3, log_interval=2, eval_interval=3, save_interval=5)

CASES = [
    # step, what has happened, what to do: L log, V validate, S save, H hooks, and the reason to stop
    (0, {}, "LVSH", None),  # before the first step: only `stop` is looked at
    (1, {}, "H", None),
    (2, {}, "LH", None),
    (3, {}, "LVH", None),  # a validation is logged at any step
    (5, {}, "LVSH", None),  # a checkpoint is always validated
    (12, {}, "LVSH", "max_steps"),
    (13, {}, "LVSH", "max_steps"),  # a run that was resumed with fewer steps
    (1, {"seconds": 59.9}, "H", None),
    (1, {"seconds": 60.0}, "LVSH", "max_time"),
    (1, {"validations_since_lowest": 2}, "H", None),
    (1, {"validations_since_lowest": 3}, "LVSH", "early_stop"),
    (1, {"signal": "SIGTERM"}, "S", "SIGTERM"),  # saved at once, neither validated nor sampled from
    (2, {"signal": "SIGINT"}, "LS", "SIGINT"),
    (3, {"signal": "SIGUSR1"}, "LVS", "SIGUSR1"),  # a validation that was due anyway counts for early stopping
    (5, {"signal": "SIGTERM"}, "LVS", "SIGTERM"),
    (12, {"signal": "SIGTERM"}, "LVSH", "max_steps"),  # a run that is over has ended by its limit
    (12, {"seconds": 99.0, "validations_since_lowest": 9}, "LVSH", "max_steps"),
    (1, {"seconds": 99.0, "validations_since_lowest": 9, "signal": "SIGINT"}, "LVSH", "early_stop"),
    (1, {"seconds": 99.0, "signal": "SIGINT"}, "LVSH", "max_time"),
    # asked again after the validation: the first answer stays
    (3, {"validations_since_lowest": 3}, "LVSH", "early_stop"),
    (3, {"validations_since_lowest": 3, "stop": "SIGTERM"}, "LVS", "SIGTERM"),
    (3, {"validations_since_lowest": 3, "stop": "max_time"}, "LVSH", "max_time"),
]


@pytest.mark.parametrize(("step", "happened", "todo", "stop"), CASES, ids=str)
def test_what_is_done_after_a_step(step, happened, todo, stop):
    """Each case of step, time, patience and signal has its agenda."""
    letters = (letter in todo for letter in "LVSH")
    assert TABLE.agenda(step, **happened) == Agenda(*letters, stop=stop)


def test_zero_is_never():
    """Without intervals and limits only the last step is logged, validated and saved."""
    table = Timetable(max_steps=9, log_interval=10)
    idle = Agenda(log=False, validate=False, save=False, run_hooks=True, stop=None)
    for step in range(1, 9):
        assert table.agenda(step, seconds=1e9, validations_since_lowest=10**6) == idle
    assert table.agenda(9) == Agenda(log=True, validate=True, save=True, run_hooks=True, stop="max_steps")
    assert (table.seconds_left(5.0), TABLE.seconds_left(50.0), TABLE.seconds_left(70.0)) == (None, 10.0, 0.0)


def test_without_a_validation_text_nothing_is_validated():
    """Lines come at their own interval, and at the end."""
    table = dataclasses.replace(TABLE, can_validate=False)
    assert [step for step in range(1, 13) if table.agenda(step).log] == [2, 4, 6, 8, 10, 12]
    assert not any(table.agenda(step).validate for step in range(1, 13))
    assert table.agenda(5, seconds=99.0).log


@pytest.mark.parametrize("signal", STOP_SIGNALS)
def test_a_signal_stops_at_any_step(signal):
    """Whatever the step, a signal saves and stops, and runs no hook but at the end of the run."""
    for step in range(1, 12):
        todo = TABLE.agenda(step, signal=signal)
        assert (todo.save, todo.run_hooks, todo.stop) == (True, False, signal)


def test_a_configuration_has_a_timetable(files, tmp_path):
    """Its intervals and limits come from [training] and [checkpoint], the time in seconds."""
    changes = {"training.max_time": "2m", "training.early_stop_patience": 4, "training.log_interval": 7}
    found = Timetable.of(tiny_config(files, tmp_path, changes))
    assert found == Timetable(12, max_seconds=120.0, patience=4, log_interval=7, eval_interval=4, save_interval=5)
