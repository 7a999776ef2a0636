"""Runs below a directory are listed with their state, without disturbing them and without leaving the directory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from transformerlm.experiments import run_directories
from transformerlm.experiments.run_directories import RunDirectories, check_is_run, config_differences, config_of
from transformerlm.utils.lock import DirectoryLock

STARTED = {"event": "started", "step": 0, "parameters": 1000, "max_steps": 50, "flops_per_token": 6000}
STEP = {"step": 40, "metrics.loss": 2.5, "metrics.tokens": 2560, "metrics.tokens_per_second": 100.5}
VALID = {"step": 30, "metrics.loss": 2.6, "metrics.val_loss": 2.7, "metrics.val_bits_per_byte": 1.1}
FINISHED = {"event": "finished", "step": 50, "reason": "max_steps"}


@pytest.fixture
def write(tmp_path):
    """Return a function that makes a run of some records, last written an hour ago."""

    def make(name: str, *records: dict):
        directory = tmp_path / "runs" / name
        directory.mkdir(parents=True)
        path = directory / "metrics.jsonl"
        path.write_text("".join(json.dumps(one) + "\n" for one in records))
        os.utime(path, (1_700_000_000, 1_700_000_000))
        return directory

    (tmp_path / "runs").mkdir()
    return make


@pytest.fixture
def runs(tmp_path):
    return RunDirectories(tmp_path / "runs")


def states(runs: RunDirectories) -> dict[str, str]:
    return {one.name: one.state for one in runs.summaries()}


def test_numbers_come_from_both_ends_of_the_lines(write, runs):
    """The last value of each quantity counts, wherever it stands."""
    write("a", STARTED, VALID, STEP, {"event": "summary", "step": 40, "best_val_loss": 2.7}, FINISHED)
    (one,) = runs.summaries()
    assert one.name == "a"
    assert one.state == "finished"
    assert (one.step, one.max_steps, one.tokens, one.parameters) == (50, 50, 2560, 1000)
    assert (one.loss, one.val_loss, one.best_val_loss, one.val_bits_per_byte) == (2.5, 2.7, 2.7, 1.1)
    assert (one.tokens_per_second, one.flops_per_token) == (100.5, 6000.0)
    write("b", STARTED, VALID, *[STEP] * 2000)
    assert {one.name: one.val_loss for one in runs.summaries()} == {"a": 2.7, "b": 2.7}  # far from both ends


def test_the_lowest_loss_is_that_of_all_starts(write, runs):
    """After a resume, the checkpoint or the last validation knows of a lower one than the summary before."""
    ended = [STARTED, VALID, {"event": "summary", "step": 30, "best_val_loss": 2.7}, FINISHED | {"step": 30}]
    checkpoint = write("a", *ended, STARTED, STEP) / "checkpoints" / "step-00000040"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text('{"lowest_val_loss": 2.5}')
    (checkpoint.parent / "latest").symlink_to(checkpoint.name)
    write("b", *ended, STARTED, VALID | {"step": 50, "metrics.val_loss": 2.6})
    write("c", *ended, STARTED, VALID | {"step": 50, "metrics.val_loss": 2.8})
    assert {one.name: one.best_val_loss for one in runs.summaries()} == {"a": 2.5, "b": 2.6, "c": 2.7}


def test_states_are_those_of_the_last_start(write, runs):
    """Finished, stopped, broken off, and broken off after it was resumed."""
    write("finished", STARTED, STEP, FINISHED)
    write("stopped", STARTED, STEP, {"event": "finished", "step": 40, "reason": "signal", "signal": "SIGTERM"})
    write("killed", STARTED, STEP)
    write("again", STARTED, STEP, FINISHED, {"event": "resumed", "step": 50}, STEP)
    write("empty")
    assert states(runs) == {
        "finished": "finished", "stopped": "stopped", "killed": "interrupted", "again": "interrupted",
        "empty": "interrupted",
    }  # fmt: skip


HOLD = """
import sys
from pathlib import Path
from transformerlm.utils.lock import DirectoryLock
with DirectoryLock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("has_locks_file", [True, False])
def test_a_run_is_running_while_its_lock_is_held(has_locks_file, write, runs, monkeypatch):
    """A killed training is none, though its lock file is still there; looking never takes the lock."""
    if not has_locks_file:
        monkeypatch.setattr(run_directories, "_locked_inodes", lambda: None)
    elif run_directories._locked_inodes() is None:
        pytest.skip("no /proc/locks here")
    directory = write("a", STARTED, STEP)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    assert states(runs) == {"a": "running"}
    while_held = runs.sizes()
    holder.kill()
    holder.communicate()
    assert while_held != runs.sizes() == runs.sizes()  # so who watches is told, though no line was written
    assert (directory / ".lock").exists()
    assert states(runs) == {"a": "interrupted"}
    with DirectoryLock(directory):
        pass


def test_a_run_of_another_machine_is_known_by_its_lines(write, runs, monkeypatch):
    """Also where the system tells no locks: its process is not looked for here, whatever its number."""
    monkeypatch.setattr(run_directories, "_locked_inodes", lambda: None)
    directory = write("a", STARTED, STEP)
    (directory / ".lock").write_text(f"process {os.getpid()} on another machine")
    assert states(runs) == {"a": "running"}
    os.utime(directory / ".lock", (1_700_000_000, 1_700_000_000))
    assert states(runs) == {"a": "interrupted"}


def test_runs_in_folders_are_found_and_links_are_not_followed(write, runs, tmp_path):
    """Two levels deep; checkpoints, hidden folders and what lies elsewhere are no runs of this directory."""
    write("first", STARTED)
    write("quickstart/run", STARTED)
    write("first/checkpoints/odd", STARTED)
    write(".trash", STARTED)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/metrics.jsonl").write_text(json.dumps(STARTED) + "\n")
    (tmp_path / "runs/link").symlink_to(tmp_path / "elsewhere")
    write("linked").joinpath("metrics.jsonl").unlink()
    (tmp_path / "runs/linked/metrics.jsonl").symlink_to(tmp_path / "elsewhere/metrics.jsonl")
    assert set(states(runs)) == {"first", "quickstart/run"}


def test_a_directory_that_is_missing_has_no_runs(tmp_path):
    """It may come later."""
    assert RunDirectories(tmp_path / "none").summaries() == []
    assert RunDirectories(tmp_path / "none").sizes() == {}


def test_what_has_not_changed_is_not_read_again(write, runs, monkeypatch):
    """A list of many runs costs a look at each, no more."""
    write("a", STARTED, STEP)
    write("b", STARTED)
    before = runs.summaries()
    read: list[str] = []
    summarize = run_directories.summarize
    monkeypatch.setattr(
        run_directories, "summarize", lambda name, *rest, **more: read.append(name) or summarize(name, *rest, **more)
    )
    assert runs.summaries() == before
    assert read == []
    with (runs.root / "b/metrics.jsonl").open("a") as file:
        file.write(json.dumps(STEP) + "\n")
    assert {one.name: one.step for one in runs.summaries()} == {"a": 40, "b": 40}
    assert read == ["b"]


def test_hostile_values_are_no_numbers(write, runs):
    """Strings, nan as the log writes it, and truth values are left out."""
    write("a", {**STARTED, "parameters": "<img>", "max_steps": True}, {"step": 3, "metrics.loss": "nan"})
    (one,) = runs.summaries()
    assert (one.step, one.parameters, one.max_steps, one.loss) == (3, None, None, None)


def test_numbers_beyond_those_of_floats_are_none(write, runs):
    """One line must not spoil the list of all runs."""
    directory = write("a", STARTED)
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "metrics.loss": 1e999, "metrics.val_loss": 1' + "0" * 400 + "}\n")
    (one,) = runs.summaries()
    assert (one.step, one.loss, one.val_loss) == (3, None, None)


def test_a_run_that_has_ended_is_not_running(write, runs):
    """Its last line says so, though it holds the directory; a line from before it took the directory does not."""
    directory = write("a", STARTED, STEP, FINISHED | {"reason": "signal"})
    assert states(runs) == {"a": "stopped"}
    with DirectoryLock(directory):
        assert states(runs) == {"a": "running"}
        with (directory / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(FINISHED) + "\n")
        assert states(runs) == {"a": "finished"}
        os.utime(directory / ".lock", (2e9, 2e9))  # as of a process that took it from that one
        assert states(runs) == {"a": "running"}


def test_a_configuration_is_a_small_file_of_the_run(write, tmp_path):
    """A link out of the run, a pipe, and a file that is too large are none; odd values become words."""
    (tmp_path / "secret.toml").write_text("password = 1")
    write("linked").joinpath("config.toml").symlink_to(tmp_path / "secret.toml")
    os.mkfifo(write("pipe") / "config.toml")
    write("large").joinpath("config.toml").write_text("a = 1\n" + "# " + "x" * 2_000_000)
    write("deep").joinpath("config.toml").write_text("a = " + "[" * 50_000)
    home = write("odd").parent
    (home / "odd/config.toml").write_text("a = inf\nb = 2026-01-01\nc = [nan, 1]\n")
    assert [config_of(home / name) for name in ("linked", "pipe", "large", "deep")] == [{}] * 4
    assert config_of(home / "odd") == {"a": "inf", "b": "2026-01-01", "c": ["nan", 1]}


def test_configurations_differ_in_the_keys_that_differ(write):
    """Equal keys are left out; a missing one is None; a file that is no TOML is empty."""
    for name, text in {
        "a": "[model]\nd_model = 8\nnum_heads = 2",
        "b": "[model]\nd_model = 16\nnum_heads = 2",
        "c": "[",
    }.items():
        write(name).joinpath("config.toml").write_text(text)
    home = write("z").parent
    configs = {name: config_of(home / name) for name in "ab"}
    assert config_differences(configs) == {"model.d_model": {"a": 8, "b": 16}}
    assert config_of(home / "c") == {}
    assert config_differences({"a": configs["a"], "c": {}})["model.num_heads"] == {"a": 2, "c": None}


def test_the_length_of_a_run_is_that_of_its_last_start(write, runs):
    """Its settings are written at each start; the first lines know only the first one."""
    directory = write("a", STARTED, STEP)
    assert [one.max_steps for one in runs.summaries()] == [50]
    (directory / "config.toml").write_text("[training]\nmax_steps = 200\n")
    assert [one.max_steps for one in runs.summaries()] == [200]


def test_a_run_that_cannot_be_read_is_damaged(write, runs, monkeypatch):
    """It stays in the list, and spoils no other row; one that was removed just now is none."""
    write("a", STARTED, FINISHED)
    write("broken", STARTED)
    write("gone", STARTED)
    summarize = run_directories.summarize

    def failing(name, *rest, **more):
        if name != "a":
            raise FileNotFoundError if name == "gone" else OSError("input/output error")
        return summarize(name, *rest, **more)

    monkeypatch.setattr(run_directories, "summarize", failing)
    assert states(runs) == {"a": "finished", "broken": "damaged"}


def test_what_is_no_run_is_refused_with_a_hint(write, tmp_path):
    """A typo, a name without its directory, a directory of runs: the message names the run that may be meant."""
    runs_dir = write("first", STARTED).parent
    check_is_run(runs_dir / "first")
    for path, words in {
        runs_dir / "frist": f"found no such directory (did you mean {runs_dir / 'first'}?)",
        tmp_path / "first": f"found no such directory (did you mean {runs_dir / 'first'}?)",
        runs_dir: f"found no metrics.jsonl in it (did you mean {runs_dir / 'first'}?)",
        runs_dir / "other": "expected the directory of a run, found no such directory",
    }.items():
        with pytest.raises(ValueError, match=re.escape(words) + "$"):
            check_is_run(path, runs_dir=runs_dir)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such pipes")
def test_a_pipe_or_a_device_is_no_run(tmp_path):
    """The one would be waited for, and the other never ends."""
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match=r"found no metrics\.jsonl in it"):
        check_is_run(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=r"found no metrics\.jsonl in it"):
        check_is_run(tmp_path)
