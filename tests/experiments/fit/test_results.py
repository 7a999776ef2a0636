"""What a run came to is read from its lines, and held against what was said of it."""

from __future__ import annotations

import json

import pytest

from transformerlm.experiments.fit.prediction import Interval
from transformerlm.experiments.fit.results import judgement, read_result

SUMMARY = {
    "event": "summary",
    "step": 40,
    "steps": 40,
    "seconds": 9.0,
    "passes_over_data": 0.5,
    "val_loss": 2.0,
    "val_bits_per_byte": 1.0,
    "best_checkpoint_val_loss": 1.8,
    "gzip_bits_per_byte": 1.5,
    "unigram_bits_per_byte": 1.7,
}


def write(folder, *, rates=(100.0, 900.0, 200.0, 210.0), **changes):
    """Write the lines of a run; None leaves a fact out."""
    summary = {key: value for key, value in {**SUMMARY, **changes}.items() if value is not None}
    steps = [{"step": step, "metrics.tokens_per_second": rate} for step, rate in enumerate(rates, start=2)]
    lines = [{"event": "started", "parameters": 1000}, {"step": 1}, *steps, summary]
    lines.append({"event": "finished", "reason": "max_time"})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_last_validation_counts(tmp_path):
    """The model at the end is what one has."""
    last = read_result(write(tmp_path))
    assert last.bits_per_byte == 1.0
    assert (last.steps, last.parameters, last.stopped_by) == (40, 1000, "max_time")


def test_a_run_of_two_starts_counts_both(tmp_path):
    """Steps and seconds are those of the whole run, though its last summary is of the last start."""
    write(tmp_path, steps=15, seconds=4.0)
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 20, "time.elapsed_s": 5.5}\n{"step": 40, "time.elapsed_s": 9.5}\n' + path.read_text())
    found = read_result(tmp_path)
    assert (found.steps, found.seconds) == (40, 9.5)


def test_a_step_takes_what_the_median_of_its_lines_says(tmp_path):
    """One line that was disturbed changes nothing; too few lines say nothing."""
    assert read_result(write(tmp_path)).tokens_per_second == 210
    found = read_result(write(tmp_path, rates=(100.0, 90.0)))
    assert found.tokens_per_second is None


@pytest.mark.parametrize(
    "changes", [{"val_bits_per_byte": None}, {"val_bits_per_byte": float("nan")}, {"gzip_bits_per_byte": None}]
)
def test_a_run_without_a_validation_has_no_result(changes, tmp_path):
    """The error names the run."""
    with pytest.raises(ValueError, match="ended without a validation loss"):
        read_result(write(tmp_path, **changes))


@pytest.mark.parametrize(("low", "high", "is_inside"), [(0.9, 1.1, True), (1.0, 1.2, True), (1.1, 1.2, False)])
def test_the_judgement_says_where_the_outcome_is(low, high, is_inside, tmp_path):
    """The ends belong to the interval; the error is relative to the middle."""
    result = read_result(write(tmp_path))
    found = judgement(Interval(low, 1.1, high, 0.9), result)
    assert found["inside"] is is_inside
    assert found["above_middle"] == pytest.approx(1.0 / 1.1 - 1)
