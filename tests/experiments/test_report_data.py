"""What a report holds of a run: names, samples within bounds, clocks of old runs."""

from __future__ import annotations

import json
from itertools import accumulate, pairwise

import pytest

from tests.experiments.runs import STARTED, step, validation, write_run
from transformerlm.experiments.history import read_history
from transformerlm.experiments.report_data import distinct_names, plain_number, report_data


def test_runs_of_one_name_are_told_apart(tmp_path):
    """By their paths, and by a number where the same run is given twice."""
    runs = [read_history(write_run(tmp_path, name, step(1, 3.0))) for name in ("a/run", "b/run", "c/other")]
    assert distinct_names(runs) == [str(tmp_path / "a/run"), str(tmp_path / "b/run"), "other"]
    assert distinct_names([runs[2], runs[2]]) == [str(tmp_path / "c/other"), f"{tmp_path / 'c/other'} (2)"]


@pytest.mark.parametrize(
    ("value", "expected"), [(3.0, 3), (0.1, 0.1), (float("nan"), "nan"), (float("-inf"), "-inf"), (1e300, 1e300)]
)
def test_numbers_are_those_of_json(value, expected):
    """Whole ones without a point, and those that are not finite as words."""
    assert plain_number(value) == expected
    assert json.loads(json.dumps(plain_number(value), allow_nan=False)) == expected


def test_too_many_samples_are_thinned(tmp_path):
    """Evenly, the last ones of each prompt stay, and the report says how many are not there."""
    records = [
        {"event": "sample", "step": number, "text.prompt": prompt, "text.output": "x" * 10_000}
        for number in range(1, 101)
        for prompt in ("a", "b")
    ]
    (found,) = report_data([read_history(write_run(tmp_path, "one", STARTED, *records))])
    assert len(json.dumps(found["samples"])) <= 300_000
    assert found["samples_left_out"] == 200 - len(found["samples"])
    assert [sample[:2] for sample in found["samples"][-2:]] == [[100, "a"], [100, "b"]]
    steps = [sample[0] for sample in found["samples"] if sample[1] == "a"]
    assert {after - before for before, after in pairwise(steps)} == {8}


def test_a_run_without_a_clock_has_the_time_of_its_rates(tmp_path):
    """64 tokens a step at 100 tokens a second are 0.64 s; with a clock in its lines, a run has that one."""
    old = write_run(tmp_path, "old", STARTED, *(step(number, 3.0) for number in range(1, 5)))
    new = write_run(tmp_path, "new", *(step(number, 3.0) | {"time.elapsed_s": 2.0 * number} for number in range(1, 5)))
    one, other = (run["clock"] for run in report_data([read_history(old), read_history(new)]))
    assert one["seconds"] == [0.64, 1.28, 1.92, 2.56]
    assert other["seconds"] == [2, 4, 6, 8]
    assert list(accumulate(other["steps"])) == [1, 2, 3, 4]


def test_validations_and_events_are_never_left_out(tmp_path):
    """Of a run with more of them than a curve has points, all are there."""
    records = [validation(number, 3.0 + number % 7) for number in range(1, 2501)]
    records += [{"event": "checkpoint_saved", "step": number} for number in range(1, 2501)]
    (found,) = report_data([read_history(write_run(tmp_path, "one", *records))])
    assert len(found["curves"]["val_loss"]["values"]) == 2500
    assert len(found["curves"]["loss"]["values"]) < 2000
    assert len(found["events"]) == 2500


def test_long_words_in_events_are_cut(tmp_path):
    """An event with a text of a megabyte does not make the report that long."""
    event = {
        "event": "environment",
        "step": 0,
        "command": ["x" * 10**6],
        "host": "y" * 10**6,
        "odd": {"a": 1},
        "big": 1e308,
    }
    (found,) = report_data([read_history(write_run(tmp_path, "one", event))])
    assert len(json.dumps(found["events"], allow_nan=False)) < 5000
