"""How far a run is, from lines that are written meanwhile."""

from __future__ import annotations

import json
import math

from transformerlm.experiments.sweep.follow import RunFollower


def write(path, *records, mode="a") -> None:
    """Add records to a run's lines."""
    with (path / "metrics.jsonl").open(mode) as file:
        file.write("".join(json.dumps(record) + "\n" for record in records))


def test_lines_are_read_as_they_come(tmp_path):
    """Steps, losses, seconds and the end are known once their line is whole."""
    follower = RunFollower(tmp_path)
    follower.update()
    assert (follower.step, follower.best_val_loss, follower.finished) == (0, math.inf, False)
    write(tmp_path, {"event": "started", "step": 0}, {"step": 1, "metrics.loss": 3.0, "time.elapsed_s": 1.5})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "metrics.val_loss": 2.5')
    follower.update()
    assert (follower.step, follower.loss, follower.seconds, follower.val_losses) == (1, 3.0, 1.5, {})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(', "metrics.val_bits_per_byte": 1.5}\n')
    write(tmp_path, {"step": 3, "metrics.val_loss": 2.75}, {"event": "finished", "step": 3, "reason": "max_steps"})
    follower.update()
    assert (follower.step, follower.finished, follower.reason) == (3, True, "max_steps")
    assert (follower.best_val_loss, follower.val_losses[3], follower.best_bits_per_byte) == (2.5, 2.75, 1.5)


def test_a_run_that_was_stopped_or_goes_on_is_not_finished(tmp_path):
    """A signal ends no run, and a new start takes an end back."""
    follower = RunFollower(tmp_path)
    write(tmp_path, {"event": "finished", "step": 3, "reason": "signal", "signal": "SIGTERM"})
    follower.update()
    assert not follower.finished
    write(tmp_path, {"event": "finished", "step": 4, "reason": "early_stop"})
    follower.update()
    assert follower.finished
    write(tmp_path, {"event": "started", "step": 4})
    follower.update()
    assert not follower.finished


def test_a_file_that_was_replaced_is_read_anew(tmp_path):
    """A resumed run cuts the steps that it makes again; their losses no longer count."""
    follower = RunFollower(tmp_path)
    write(tmp_path, {"step": 2, "metrics.val_loss": 2.0}, {"step": 4, "metrics.val_loss": 1.0})
    follower.update()
    write(tmp_path, {"step": 2, "metrics.val_loss": 2.0}, mode="w")
    (tmp_path / "metrics.jsonl").rename(tmp_path / "old")
    write(tmp_path, {"step": 2, "metrics.val_loss": 2.0})
    follower.update()
    assert (follower.step, follower.val_losses) == (2, {2: 2.0})


def test_what_is_no_number_is_no_loss(tmp_path):
    """A loss that is not finite counts as infinite: such a run is never the best."""
    follower = RunFollower(tmp_path)
    write(tmp_path, {"step": 2, "metrics.val_loss": "nan"}, {"step": True, "metrics.val_loss": 1.0}, {"step": "3"})
    follower.update()
    assert follower.val_losses == {2: math.inf}
