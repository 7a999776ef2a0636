"""Trainings by a stand-in: killed, held, crashed and stopped, none is lost or made twice."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.cli.commands import ROOT
from tests.experiments.sweep.helpers import planned, scheduler_of, steps_made
from transformerlm.experiments.sweep.follow import RunFollower
from transformerlm.experiments.sweep.queue import SweepDirectory
from transformerlm.experiments.sweep.scheduler import InOrder, Task

SWEEP = """
import sys
from pathlib import Path
from tests.experiments.sweep.helpers import planned, scheduler_of
from transformerlm.experiments.sweep.queue import SweepDirectory
from transformerlm.experiments.sweep.scheduler import InOrder
folder = Path(sys.argv[1])
with SweepDirectory(folder / "sweep").hold():
    source = InOrder(planned(folder))
    scheduler_of(folder, parallel=2, retries=100, seconds=0.02).work(source)
"""


def losses_of(folder: Path, runs) -> dict[str, dict[int, float]]:
    """Return the validation losses of runs that have finished."""
    found = {}
    for run in runs:
        follower = RunFollower(folder / "sweep" / run.name)
        follower.update()
        assert follower.finished, run.name
        found[run.name] = follower.val_losses
    return found


def wait_until(condition) -> None:
    """Wait for something that comes soon, however slow the machine is."""
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_every_run_is_trained_once(tmp_path):
    """Two at a time; the outcomes have the losses of the runs' own lines, and a second time trains nothing."""
    runs, told = planned(tmp_path), []
    source = InOrder(runs)
    assert scheduler_of(tmp_path, parallel=2, tell=lambda *facts: told.append(facts)).work(source) is None
    assert sorted(one.task.run.name for one in source.outcomes) == sorted(run.name for run in runs)
    assert {one.state for one in source.outcomes} == {"finished"}
    assert [event for event, _, _ in told].count("began") == len(runs)
    for outcome in source.outcomes:
        assert [step for _, step in steps_made(tmp_path, outcome.task.run)] == list(range(1, 13))
        assert outcome.best_val_loss == min(losses_of(tmp_path, runs)[outcome.task.run.name].values())
    told.clear()
    again = InOrder(runs)
    scheduler_of(tmp_path, tell=lambda *facts: told.append(facts)).work(again)
    assert [event for event, _, _ in told] == ["skipped"] * len(runs)
    assert [one.best_val_loss for one in again.outcomes] == [
        {one.task.run.name: one.best_val_loss for one in source.outcomes}[run.name] for run in runs
    ]


def test_a_crashed_run_is_set_aside_with_its_last_lines(tmp_path):
    """It is started again as often as allowed, and the others go on."""
    runs, told = planned(tmp_path, seeds=[0]), []
    source = InOrder(runs)
    scheduler_of(tmp_path, "--fail", "0.01-", retries=2, tell=lambda *facts: told.append(facts)).work(source)
    failed = [one for one in source.outcomes if one.state == "failed"]
    assert len(failed) == 1
    assert len(source.outcomes) == len(runs)
    assert failed[0].words[-2:] == ("something went wrong", "error: no luck")
    events = [event for event, task, _ in told if task.run == failed[0].task.run]
    assert events == ["began", "retry", "began", "retry", "began", "ended"]


def test_a_training_that_outlived_its_sweep_is_waited_for(tmp_path):
    """Neither the claim of the queue nor the lock of the run's directory lets a second process train it."""
    run, told = planned(tmp_path)[0], []
    directory = SweepDirectory(tmp_path / "sweep")
    outlived = scheduler_of(tmp_path, seconds=0.1)
    thread = threading.Thread(target=outlived.work, args=[InOrder([run])])
    thread.start()
    wait_until(lambda: not directory.is_free(run))
    source = InOrder([run])
    scheduler_of(tmp_path, tell=lambda *facts: told.append(facts)).work(source)
    thread.join()
    assert [event for event, _, _ in told] == ["waiting", "ended"]
    assert [step for _, step in steps_made(tmp_path, run)] == list(range(1, 13))
    assert source.outcomes[0].state == "finished"


def test_a_run_that_is_trained_by_hand_is_waited_for(tmp_path):
    """A command that somebody else started holds the run's directory alone; ours gives way, and it is no failure."""
    run, told = planned(tmp_path)[0], []
    directory = SweepDirectory(tmp_path / "sweep")
    directory.write_queue([run])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FAKE_SECONDS": "0.3"}
    fake = Path(__file__).with_name("fake_train.py")
    by_hand = subprocess.Popen([sys.executable, str(fake), str(directory.config_path(run))], env=environment)
    wait_until(lambda: directory.process_of(run) == by_hand.pid)
    source = InOrder([run])
    scheduler_of(tmp_path, tell=lambda *facts: told.append(facts)).work(source)
    assert by_hand.wait() == 0
    assert [event for event, _, _ in told][1:] == ["waiting", "ended"]
    assert source.outcomes[0].state == "finished"


def test_a_signal_is_handed_on_and_the_runs_save(tmp_path):
    """The scheduler returns when they have ended, and the next one goes on where they were."""
    runs, signals, told = planned(tmp_path), [], []

    def tick(trainings) -> None:
        if any(training.follower.step >= 2 for training in trainings):
            signals.append("SIGTERM")

    first = InOrder(runs)
    settings = {"parallel": 2, "seconds": 0.1}
    assert scheduler_of(tmp_path, tick=tick, stop=lambda: signals[:1], **settings).work(first) == "SIGTERM"
    assert first.outcomes == []
    source = InOrder(runs)
    scheduler_of(tmp_path, parallel=2, tell=lambda *facts: told.append(facts)).work(source)
    assert [event for event, _, _ in told].count("goes on") == 2
    assert {one.state for one in source.outcomes} == {"finished"}
    for run in runs:
        assert [step for _, step in steps_made(tmp_path, run)] == list(range(1, 13))


HOLD = """
import sys
from pathlib import Path
from transformerlm.utils.lock import DirectoryLock
directory = Path(sys.argv[1])
with DirectoryLock(directory):
    (directory / ".lock").write_text(sys.argv[2])
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("holder", ["process 1 on elsewhere", "process 1"])
def test_a_signal_ends_a_sweep_that_waits_for_what_it_cannot_reach(holder, tmp_path, monkeypatch):
    """A training on another machine, or of another user, goes on; it is told of, and the sweep ends."""
    run, told, signals = planned(tmp_path)[0], [], []
    kill = os.kill

    def kill_no_others(pid: int, number: int) -> None:
        if pid == 1:
            raise PermissionError
        kill(pid, number)

    monkeypatch.setattr(os, "kill", kill_no_others)
    command = [sys.executable, "-c", HOLD, str(tmp_path / "sweep" / run.name), holder]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert other.stdout.readline() == "held\n"
    scheduler = scheduler_of(
        tmp_path,
        tell=lambda *facts: told.append(facts),
        tick=lambda trainings: signals.extend(["SIGTERM"] * any(one.process is None for one in trainings)),
        stop=lambda: signals[:1],
    )
    ending = threading.Thread(target=scheduler.work, args=[InOrder([run])], daemon=True)
    ending.start()
    ending.join(60)
    assert not ending.is_alive()
    assert [event for event, _, _ in told][-2:] == ["waiting", "left"]
    assert other.poll() is None
    other.communicate("")


def test_a_stop_after_a_rung_is_no_second_signal(tmp_path):
    """A run that is to stop at a rung saves; a second signal meanwhile would end it unsaved."""
    run, sent = planned(tmp_path)[0], []
    source = InOrder([])
    source._tasks = iter([Task(run, until=4)])
    scheduler = scheduler_of(tmp_path, seconds=0.3, stop=lambda: ["SIGTERM"] if sent else [])
    signal_it = scheduler._signal
    scheduler._signal = lambda training, name: sent.append(name) or signal_it(training, name)
    assert scheduler.work(source) == "SIGTERM"
    assert sent == ["SIGTERM"]
    assert [step for _, step in steps_made(tmp_path, run)][:4] == [1, 2, 3, 4]


def test_a_task_ends_at_its_step(tmp_path):
    """A run that is to stop at a validation is told to; its loss there counts, and the rest is made later."""
    run = planned(tmp_path)[0]
    source = InOrder([])
    source._tasks = iter([Task(run, until=4), Task(run)])
    scheduler_of(tmp_path, seconds=0.3).work(source)
    stopped, finished = source.outcomes
    assert (stopped.state, finished.state, finished.step) == ("stopped", "finished", 12)
    assert 4 <= stopped.step < 12
    assert stopped.val_loss == losses_of(tmp_path, [run])[run.name][4]


def test_the_second_sweep_of_a_directory_is_refused(tmp_path):
    """It says who holds the directory, and what else to do."""
    directory = SweepDirectory(tmp_path / "sweep")
    with directory.hold():
        with pytest.raises(
            FileExistsError, match=f"only sweep here, found process {os.getpid()}.* at work.*another dir"
        ):
            directory.hold().__enter__()
        (tmp_path / "sweep" / "x").touch()


def kill_and_check(folder: Path, *, kills: int, seed: int) -> None:
    """Kill a sweep, its trainings, or both, at random moments; then let it end, and compare with an undisturbed one."""
    rng, runs = random.Random(seed), planned(folder)
    directory, sweep = SweepDirectory(folder / "sweep"), None
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for _ in range(kills):
        if sweep is None or sweep.poll() is not None:
            sweep = subprocess.Popen([sys.executable, "-c", SWEEP, str(folder)], env=environment)
        wait_until(lambda sweep=sweep: sweep.poll() is not None or any(map(directory.process_of, runs)))
        time.sleep(rng.uniform(0, 0.4))
        at_work = [pid for pid in map(directory.process_of, runs) if pid]
        for pid in rng.choice([[sweep.pid], at_work, [sweep.pid, *at_work], [*at_work, sweep.pid]]):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    sweep.kill()
    sweep.wait()
    source = InOrder(runs)
    scheduler_of(folder, parallel=2, retries=100).work(source)
    assert {one.state for one in source.outcomes} == {"finished"}
    undisturbed = folder / "undisturbed"
    undisturbed.mkdir()
    others = planned(undisturbed)
    scheduler_of(undisturbed, parallel=2).work(InOrder(others))
    assert losses_of(folder, runs) == losses_of(undisturbed, others)
    for run in runs:  # a step is made again only after a kill, by another process
        made = steps_made(folder, run)
        assert len(set(made)) == len(made)
        assert [step for process, step in made if process == made[-1][0]][-1] == 12
        assert made.count((made[-1][0], 12)) == 1
        assert sum(step == 12 for _, step in made) <= 2  # killed between the last step and its save, at most
    names = {path.name for path in (folder / "sweep").iterdir() if path.is_dir()}
    assert names == {run.name for run in runs} | {"queue", "logs"}


def test_a_sweep_that_is_killed_goes_on(tmp_path):
    """After kills of the sweep, of runs, and of both, every run ends as in an undisturbed sweep."""
    kill_and_check(tmp_path, kills=3, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_a_sweep_that_is_killed_often_goes_on(tmp_path, seed):
    """The same with thirty kills."""
    kill_and_check(tmp_path, kills=30, seed=seed)
