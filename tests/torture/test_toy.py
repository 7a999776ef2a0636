"""The harness passes the toy trainer as it is, and catches each of its bugs by name."""

from __future__ import annotations

import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from tests.torture.conftest import TOY
from tests.torture.damage import STEPS, cases, damage_and_resume, prepare
from tests.torture.faults import explode, meet_a_size_limit, start_twice, stop_by_signal, stop_by_two_signals
from tests.torture.harness import Run, compare
from tests.torture.kills import kill_again_and_again
from tests.torture.order import SHIM, audit_with_shim, audit_with_strace, cut_the_power
from tests.torture.process import Surroundings

KILL_BUGS = {
    "rng_not_restored": "numbers_differ",
    "data_off_by_one": "numbers_differ",
    "lr_off_by_one": "numbers_differ",
    "optimizer_not_restored": "numbers_differ",
    "newest_by_mtime": "resumed_from_older",
    "newest_by_link": "resumed_from_older",
    "in_place": "kill_left_damage",
    "announced_early": "announced_lost",
    "delete_first": "announced_lost fewer_than_two",
    "metrics_twice": "steps_repeated",
    "metrics_cut_too_far": "steps_missing",
    "stale_temporaries": "stale_temporaries",
    "saves_rarely": "redone_too_much",
    "stale_weights": "weights_differ",
}


def with_bugs(trainer, *bugs):
    """Return the toy with bugs switched on."""
    return replace(trainer, options=tuple(f"--bug={bug}" for bug in bugs))


def kinds(findings):
    """Return the names of findings."""
    return {finding.kind for finding in findings}


def test_kills_pass_the_correct_toy(toy, toy_reference, tmp_path):
    """Sixteen kills of a trainer without a bug find nothing."""
    report = kill_again_and_again(toy, tmp_path, kills=16, seed=3, reference=toy_reference)
    assert report.findings == []
    assert report.kills.total() == 16


@pytest.mark.parametrize(("bug", "expected"), KILL_BUGS.items())
def test_kills_catch(bug, expected, toy, toy_reference, tmp_path):
    """Kills find each bug in saving, finding and resuming, and call it by its name."""
    report = kill_again_and_again(with_bugs(toy, bug), tmp_path, kills=16, seed=3, reference=toy_reference)
    assert set(expected.split()) & kinds(report.findings), report


ORDER_BUGS = {
    "announced_early": {"not_durable", "not_atomic"},
    "no_fsync": {"renamed_before_synced"},
    "no_directory_fsync": {"renamed_before_synced"},
    "no_parent_fsync": {"not_durable"},
    "in_place": {"not_atomic"},
    "delete_first": {"deleted_before_durable"},
}
TRACERS = ["shim", pytest.param("strace", marks=pytest.mark.skipif(not shutil.which("strace"), reason="no strace"))]


def audit(tracer, trainer, home):
    """Return the findings of one tracer."""
    run = Run(trainer, home)
    return audit_with_shim(run) if tracer == "shim" else audit_with_strace(run, [TOY])


@pytest.mark.parametrize("tracer", TRACERS)
def test_the_order_of_a_save_passes_the_correct_toy(tracer, toy, tmp_path):
    """Write, flush, rename, flush, announce, remove: both tracers find nothing wrong with it."""
    assert audit(tracer, toy, tmp_path) == []


@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize(("bug", "expected"), ORDER_BUGS.items())
def test_the_order_of_a_save_catches(tracer, bug, expected, toy, tmp_path):
    """Both tracers find each bug in the order of a save."""
    assert expected & kinds(audit(tracer, with_bugs(toy, bug), tmp_path))


@pytest.mark.parametrize("bug", [None, "no_fsync", "no_directory_fsync", "no_parent_fsync", "announced_early"])
def test_a_power_cut_loses_what_was_not_flushed(bug, toy, tmp_path):
    """After a simulated power cut the correct toy has what it announced, and each kind of missing flush loses it."""
    findings = cut_the_power(with_bugs(toy, bug), tmp_path)
    assert kinds(findings) == ({"lost_by_power_cut"} if bug else set())


# --- damage ------------------------------------------------------------------------------------------------------


DAMAGE_BUGS = {
    "not_checked": "damage_unnoticed",
    "data_not_checked": "damage_unnoticed",
    "silent": "unnamed",
    "traceback": "traceback",
}


def damage_all(trainer, reference, folder, *, every):
    """Return the findings of every damage to every file, or of one to each."""
    prepared = prepare(trainer, folder / "prepared")
    return [
        finding
        for path, damage in cases(prepared, every=every)
        for finding in damage_and_resume(prepared, folder / "case", path, damage, seed=0, reference=reference)
    ]


@pytest.fixture(scope="session")
def short_reference(toy, tmp_path_factory):
    """The toy's run to the step that a damaged one is resumed to."""
    run = Run(toy, tmp_path_factory.mktemp("short"))
    assert run.finish(f"--training.max_steps={STEPS}") == []
    return run


def test_damage_passes_the_correct_toy(toy, short_reference, tmp_path):
    """Every damage to every file is noticed by the toy, named, and answered by the checkpoint before."""
    assert damage_all(toy, short_reference, tmp_path, every=True) == []


@pytest.mark.parametrize(("bug", "expected"), DAMAGE_BUGS.items())
def test_damage_catches(bug, expected, toy, short_reference, tmp_path):
    """A check that is missing, silent, or ends in a traceback is found."""
    assert expected in kinds(damage_all(with_bugs(toy, bug), short_reference, tmp_path, every=False))


# --- other faults ------------------------------------------------------------------------------------------------


def signal_faults(trainer, reference, folder):
    """Return the findings of one signal and of two."""
    findings = stop_by_signal(Run(trainer, folder / "one"), signal.SIGTERM, 143, lines=7, reference=reference)
    return findings + stop_by_two_signals(Run(trainer, folder / "two"), "--training.step_seconds=2")


def disk_faults(trainer, reference, folder):
    """Return the findings of a save that meets a size limit."""
    return meet_a_size_limit(Run(trainer, folder), max_file_bytes=6000, reference=reference)


def other_faults(trainer, reference, folder):
    """Return the findings of two runs, of exploding numbers, and of another hash seed and clock."""
    run, around = Run(trainer, folder / "odd"), {"PYTHONHASHSEED": "5", "TORTURE_CLOCK": "1", "PYTHONPATH": str(SHIM)}
    findings = start_twice(Run(trainer, folder / "twice"))
    findings += explode(Run(trainer, folder / "explode"), "--training.explode_at=12")
    return findings + run.finish(around=Surroundings(around)) + compare(run, reference)


FAULT_BUGS = [
    (signal_faults, "signals_ignored", "wrong_exit_code"),
    (signal_faults, "signal_exits_0", "wrong_exit_code"),
    (signal_faults, "signal_without_save", "not_saved"),
    (signal_faults, "second_signal_ignored", "second_signal_ignored"),
    (disk_faults, "failed_save_exits_0", "wrong_exit_code"),
    (disk_faults, "delete_first", "announced_lost"),
    (other_faults, "no_lock", "two_runs unnamed"),  # or they fall over each other
    (other_faults, "pid_lock", "stale_lock"),
    (other_faults, "saves_nan", "non_finite_saved"),
    (other_faults, "hash_seed", "numbers_differ"),
    (other_faults, "clock_seed", "numbers_differ"),
]


@pytest.mark.parametrize("faults", [signal_faults, disk_faults, other_faults])
def test_faults_pass_the_correct_toy(faults, toy, toy_reference, tmp_path):
    """Signals, a size limit, two runs, exploding numbers and odd surroundings find nothing wrong with the toy."""
    assert faults(toy, toy_reference, tmp_path) == []


@pytest.mark.parametrize(("faults", "bug", "expected"), FAULT_BUGS)
def test_faults_catch(faults, bug, expected, toy, toy_reference, tmp_path):
    """Each bug in the answer to a fault is found by its name."""
    assert set(expected.split()) & kinds(faults(with_bugs(toy, bug), toy_reference, tmp_path))


def test_every_bug_of_the_toy_is_caught():
    """No switch of the toy is left out of these tests."""
    switches = set(re.findall(r'bug\("(\w+)"\)', Path(TOY).read_text()))
    assert switches == {*KILL_BUGS, *ORDER_BUGS, *DAMAGE_BUGS, *(bug for _, bug, _ in FAULT_BUGS)}
