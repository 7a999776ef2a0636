"""The harness passes the toy trainer as it is, and catches each of its bugs by name."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest

from tests.torture.conftest import TOY
from tests.torture.harness import Run
from tests.torture.kills import kill_again_and_again
from tests.torture.order import audit_with_shim, audit_with_strace, cut_the_power

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
