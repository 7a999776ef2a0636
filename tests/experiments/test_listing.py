"""Runs are rows with the right states, filtered and sorted; what has not changed is not read again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from tests.experiments.runs import FINISHED, STARTED, step, validation, write_run
from transformerlm.experiments import listing as listing_module
from transformerlm.experiments import run_directories
from transformerlm.experiments.listing import Listing, disk_bytes, holds
from transformerlm.experiments.listing_cache import cache_path


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


HOLD = """
import sys
from pathlib import Path
from transformerlm.utils.lock import DirectoryLock
with DirectoryLock(Path(sys.argv[1])):
    if not sys.argv[1].endswith("begins"):
        with open(sys.argv[1] + "/metrics.jsonl", "a") as file:
            print('{"step": 7, "metrics.loss": 3.0}', file=file)
    print("held", flush=True)
    sys.stdin.read()
"""


def test_states_of_runs_that_live_and_die(tmp_path):
    """Running, also after SIGSTOP, in a resume and after it; killed just now; ended in each way; cut off; damaged."""
    if run_directories._locked_inodes() is None:
        pytest.skip("no /proc/locks here")
    runs = tmp_path / "runs"
    holders = {}
    ended = {"resumed": [FINISHED, STARTED], "begins": [FINISHED]}
    for name in ("running", "paused", "killed", "resumed", "begins"):
        directory = write_run(runs, name, STARTED, step(3, 4.0), *ended.get(name, []))
        holders[name] = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
    for holder in holders.values():
        assert holder.stdout.readline() == "held\n"
    holders["paused"].send_signal(signal.SIGSTOP)
    holders["killed"].kill()
    holders["killed"].wait()
    write_run(runs, "finished", STARTED, step(50, 2.0), FINISHED)
    write_run(runs, "stopped", STARTED, {"event": "finished", "step": 9, "reason": "signal", "signal": "SIGTERM"})
    write_run(runs, "failed", STARTED, {"event": "failed", "step": 9, "error": "no memory"})
    write_run(runs, "cut", STARTED, step(3, 4.0))
    (write_run(runs, "no lines") / "metrics.jsonl").write_bytes(b"\\0" * 5000)
    (write_run(runs, "no settings", STARTED, FINISHED) / "config.toml").write_text("[model")
    try:
        assert {row["name"]: row["state"] for row in Listing(runs).rows()} == {
            "running": "running", "paused": "running", "killed": "interrupted", "resumed": "running",
            "begins": "running", "finished": "finished", "stopped": "stopped", "failed": "failed",
            "cut": "interrupted", "no lines": "damaged", "no settings": "damaged",
        }  # fmt: skip
    finally:
        holders["paused"].send_signal(signal.SIGCONT)
        for holder in holders.values():
            holder.kill()
            holder.communicate()


def test_a_training_on_another_machine_is_known_by_its_lines(tmp_path):
    """And by its start. Its lock is not ours to see; one of this machine that is not held is nobody's."""
    if run_directories._locked_inodes() is None:
        pytest.skip("no /proc/locks here")
    directory = write_run(tmp_path, "a", STARTED, step(3, 4.0))
    (directory / ".lock").write_text("process 1 on another-machine")
    path = directory / "metrics.jsonl"
    os.utime(path)
    assert [row["state"] for row in Listing(tmp_path).rows()] == ["running"]
    os.utime(path, (1e9, 1e9))
    assert [row["state"] for row in Listing(tmp_path).rows()] == ["running"]
    os.utime(directory / ".lock", (1e9, 1e9))
    assert [row["state"] for row in Listing(tmp_path).rows()] == ["interrupted"]


def test_a_repaired_configuration_is_noticed(tmp_path):
    """A run is damaged as long as its settings are, though its lines stay as they are."""
    directory = write_run(tmp_path, "a", STARTED, FINISHED)
    (directory / "config.toml").write_text("[model")
    for state, text in (("damaged", "[model]\nd_model = 8"), ("finished", "")):
        listing = Listing(tmp_path)
        assert [row["state"] for row in listing.rows()] == [state]
        listing.keep()
        (directory / "config.toml").write_text(text)


def count_scans(monkeypatch) -> list[str]:
    """Return a list to which the name of each run is added that is scanned from now on."""
    scanned: list[str] = []
    scan = listing_module.scan_run
    monkeypatch.setattr(
        listing_module, "scan_run", lambda path, before: scanned.append(path.name) or scan(path, before)
    )
    return scanned


def test_what_has_not_changed_is_not_read_again(tmp_path, monkeypatch):
    """Another process finds what the last one kept; only a run that has grown is read."""
    for name in "abc":
        write_run(tmp_path / "runs", name, STARTED, step(3, 4.0), validation(10, 3.0), config={"x.y": name})

    def rows():
        listing = Listing(tmp_path / "runs")
        found = [(row["name"], row["best_val_loss"], row["step"], row["curve"]) for row in listing.rows()]
        settings = [listing.settings_of(tmp_path / "runs" / name) for name, *_ in found]
        listing.keep()
        return sorted(found), settings

    first = rows()
    scanned = count_scans(monkeypatch)
    monkeypatch.setattr(listing_module, "config_of", lambda path: scanned.append(f"settings of {path}"))
    assert rows() == first
    assert scanned == []
    with (tmp_path / "runs/b/metrics.jsonl").open("a") as file:
        file.write(json.dumps(validation(20, 2.5)) + "\n")
    assert rows()[0][1] == ("b", 2.5, 20, [4.0, 3.0, 2.5])
    assert scanned == ["b"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"format": 1, "runs": {"a": 3}}', b"\\xff", None])
def test_a_lost_or_damaged_cache_costs_time_only(content, tmp_path):
    """Whatever is in its place, the rows are the same, and nothing is written into the runs."""
    directory = write_run(tmp_path / "runs", "a", STARTED, validation(10, 3.0))
    before = sorted((path.name, path.stat().st_mtime_ns) for path in directory.iterdir())
    first = Listing(tmp_path / "runs")
    rows = first.rows()
    first.keep()
    cache = cache_path(tmp_path / "runs")
    assert cache.is_file()
    if content is None:
        cache.unlink()
        cache.parent.rmdir()
        cache.parent.write_text("a file where the folder should be")
    else:
        cache.write_bytes(content)
    second = Listing(tmp_path / "runs")
    found = second.rows()
    second.keep()
    assert [row | {"age_seconds": 0} for row in found] == [row | {"age_seconds": 0} for row in rows]
    assert sorted((path.name, path.stat().st_mtime_ns) for path in directory.iterdir()) == before


def test_bytes_on_disk_are_those_of_all_files(tmp_path):
    """Those of checkpoints, too; a link adds nothing, a missing directory has none."""
    directory = write_run(tmp_path, "a", STARTED)
    (directory / "checkpoints/step-1").mkdir(parents=True)
    (directory / "checkpoints/step-1/model.safetensors").write_bytes(b"x" * 1000)
    (directory / "checkpoints/latest").symlink_to("step-1")
    own = sum((directory / name).stat().st_size for name in ("metrics.jsonl", "config.toml"))
    assert disk_bytes(directory) == own + 1000
    assert disk_bytes(tmp_path / "none") == 0


@pytest.mark.parametrize(
    ("found", "sign", "text", "expected"),
    [
        (512, "=", "512", True), (512, "=", "512.0", True), (512, "!=", "512", False), (0.001, "<", "1e-2", True),
        (0.001, ">=", "1e-3", True), ("adamw", "=", "adamw", True), ("adamw", "=", '"adamw"', True),
        ("adamw", ">", "a", False), (None, "=", "none", True), (None, "!=", "3", True), (None, "<", "3", False),
        (True, "=", "true", True), (True, "=", "1", False), (1, "=", "true", False), ([1, 2], "=", "[1, 2]", True),
        ("5%", "=", "5%", True), ("a\nb", "=", "a", False),
    ],
)  # fmt: skip
def test_conditions(found, sign, text, expected):
    """Numbers are compared as numbers, words as words, and `none` is a key without a value."""
    assert holds(found, sign, text) is expected
