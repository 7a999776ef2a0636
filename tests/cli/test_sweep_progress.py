"""What people read while a sweep trains."""

from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout

import pytest

from cli import sweep_progress
from cli.sweep_progress import SweepProgress
from tests.experiments.sweep.helpers import planned
from transformerlm.experiments.sweep.follow import RunFollower
from transformerlm.experiments.sweep.scheduler import Outcome, Task, Training


@pytest.fixture
def clock(monkeypatch):
    """Return a clock that the test moves, in seconds."""
    now = [0.0]
    monkeypatch.setattr(sweep_progress.time, "monotonic", lambda: now[0])
    return now


def said_by(act) -> str:
    """Return what a call says to people."""
    with redirect_stderr(io.StringIO()) as said, redirect_stdout(io.StringIO()):
        act()
    return said.getvalue()


def outcome(task: Task, **changes) -> Outcome:
    """Return how a run ended after all its steps."""
    facts = {"val_loss": 2.5, "best_val_loss": 2.25, "best_bits_per_byte": 1.0, "seconds": 30.0, "step": 12}
    return Outcome(task=task, **{"state": "finished", **facts, **changes})


def test_the_eta_follows_what_this_process_has_trained(tmp_path, clock):
    """Runs that were done before count as done, but not as speed; half a run that goes on counts as half."""
    runs = planned(tmp_path)
    progress, (first, second, third) = SweepProgress(len(runs)), map(Task, runs[:3])
    progress.tell("skipped", first, {"outcome": outcome(first)})
    progress.tell("goes on", second, {"step": 6})
    clock[0] = 10.0
    said = said_by(lambda: progress.tell("ended", second, {"outcome": outcome(second)}))
    assert said == f"2/6  {second.run.name}  val loss 2.2500 in 0:30\n"
    progress.tell("began", third, {"step": 0})
    follower = RunFollower(tmp_path)
    follower.step, follower.loss = 6, 3.0
    clock[0] = 70.0
    said = said_by(lambda: progress.tick([Training(task=third, follower=follower)]))
    # One run's worth of steps in 70 s, and 3.5 are left.
    assert said == f"2/6 runs  ETA 4:05  {third.run.name} step 6/12 loss 3.000\n"
    assert said_by(lambda: progress.tick([])) == ""
    assert progress.done_words() == "2 of 6 runs have finished"


def test_a_failure_and_a_rung_are_told_apart(tmp_path):
    """The last line of a run that failed is shown, and the step of one that a rung has stopped."""
    task = Task(planned(tmp_path)[0])
    progress = SweepProgress(6)
    failed = outcome(task, state="failed", step=4, words=("a", "error: no luck"))
    said = said_by(lambda: progress.tell("ended", task, {"outcome": failed}))
    assert said == f"1/6  {task.run.name}  failed at step 4: error: no luck\n"
    stopped = outcome(task, state="stopped", step=5)
    said = said_by(lambda: progress.tell("ended", task, {"outcome": stopped}))
    assert said == f"1/6  {task.run.name}  val loss 2.2500 at step 5, a rung\n"


def test_a_run_that_time_ends_is_as_far_as_its_clock(tmp_path, clock):
    """It has no last step, so none is shown."""
    [first, second] = map(Task, planned(tmp_path, axes=[], match="seconds", budget=60))
    progress = SweepProgress(2)
    progress.tell("began", first, {"step": 0})
    follower = RunFollower(tmp_path)
    follower.step, follower.loss, follower.seconds = 700, 3.0, 15.0
    clock[0] = 70.0
    said = said_by(lambda: progress.tick([Training(task=first, follower=follower)]))
    assert said == f"0/2 runs  ETA 8:10  {first.run.name} step 700 loss 3.000\n"
    progress.tell("ended", first, {"outcome": outcome(first, step=2800, seconds=60.0)})
    progress.tell("began", second, {"step": 0})
    clock[0] = 140.0
    said = said_by(lambda: progress.tick([Training(task=second, follower=RunFollower(tmp_path))]))
    assert said.startswith("1/2 runs  ETA 2:20  ")


def test_a_retry_says_how_the_run_ended(tmp_path):
    """By its exit code, or by the signal that killed it."""
    task = Task(planned(tmp_path)[0])
    progress = SweepProgress(6)
    said = [said_by(lambda code=code: progress.tell("retry", task, {"code": code, "step": 4})) for code in (1, -9)]
    assert said == [
        f"{task.run.name} ended with exit code {1} after step 4; it is started again\n",
        f"{task.run.name} was ended by SIGKILL after step 4; it is started again\n",
    ]


def test_a_run_that_goes_on_elsewhere_is_told_of(tmp_path):
    """The sweep ends before it, so this is its last word on it."""
    task = Task(planned(tmp_path)[0])
    said = said_by(lambda: SweepProgress(6).tell("left", task, {}))
    assert said == f"{task.run.name} goes on: its process is another machine's or another user's\n"
