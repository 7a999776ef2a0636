"""The event `environment` of a training run: what it ran on, with which source, on which data, by which command."""

from __future__ import annotations

import hashlib
import platform
import shutil
import sys
from pathlib import Path

from tests.cli.commands import call
from tests.training.tiny_run import read_records
from transformerlm.token_files.dataset import TokenDataset
from transformerlm.tokenizer import Tokenizer
from transformerlm.utils import environment as tools
from transformerlm.utils.environment import source_sha256
from transformerlm.utils.files import file_sha256


def environments(run: Path) -> list[dict]:
    """Return the events of a run that say what it was made with."""
    return [record for record in read_records(run) if record.get("event") == "environment"]


def test_the_event_says_how_the_run_came_about(pipeline):
    """It names versions, machine, source, data and settings, by sums that can be made again."""
    (found,) = environments(pipeline.run)
    assert found["step"] == 0
    assert {key.partition(".")[2] for key in found if key.startswith("versions.")} == {
        "transformerlm",
        "python",
        "torch",
        "numpy",
    }
    assert (found["versions.python"], found["host"]) == (platform.python_version(), platform.node())
    assert (found["device"], found["threads"], found["processes"]) == ("cpu", 1, 1)
    assert found["platform"]
    assert found["processor"]
    assert found["source_sha256"] == source_sha256()
    assert found["command"] == sys.argv
    assert found["config_sha256"] == file_sha256(pipeline.run / "config.toml")
    assert found["tokenizer_sha256"] == Tokenizer.from_directory(pipeline.files.tokenizer).fingerprint()
    for key, path in (("train", pipeline.files.train), ("valid", pipeline.files.valid)):
        tokens = TokenDataset(path)
        assert (found[f"data.{key}.sha256"], found[f"data.{key}.tokens"]) == (tokens.sha256, len(tokens))
        assert found[f"data.{key}.sha256"] == file_sha256(path)
    assert {"git.commit", "git.dirty", "project.git.commit", "project.git.dirty", "directory"} <= set(found)


def test_each_start_adds_one_and_what_is_unknown_is_null(pipeline, tmp_path, monkeypatch):
    """A resumed run names its second command, without its secrets, and its own settings; no git is no error."""
    run = tmp_path / "run"
    shutil.copytree(pipeline.run, run, symlinks=True)
    monkeypatch.setattr(sys, "argv", ["transformerlm-train", "--hub.token=abc"])
    monkeypatch.setattr(tools, "_git", lambda *_: None)
    options = [f"--runs_dir={tmp_path}", "--training.max_steps=13", "--data.valid=none"]
    done = call("train", "--config", pipeline.train_toml, *options)
    assert done.code == 0, done.stderr
    first, second = environments(run)
    assert (first["step"], second["step"]) == (0, 12)
    assert second["command"] == ["transformerlm-train", "--hub.token=***"]
    assert second["config_sha256"] == hashlib.sha256((run / "config.toml").read_bytes()).hexdigest()
    assert second["config_sha256"] != first["config_sha256"]
    assert [second[key] for key in ("git.commit", "git.dirty", "project.git.commit")] == [None, None, None]
    assert "data.valid.sha256" not in second


def test_every_step_line_has_a_time(pipeline):
    """It grows from line to line, those with a validation included, and no other line has it."""
    records = read_records(pipeline.run)
    times = [record["time.elapsed_s"] for record in records if "metrics.loss" in record]
    assert len(times) == 12
    assert times == sorted(times)
    assert times[0] > 0
    assert sum("time.elapsed_s" in record for record in records) == 12


def test_every_step_line_has_the_peak_of_memory(pipeline):
    """It is that of the process in bytes, which no later line undercuts by more than the kernel's rounding."""
    records = read_records(pipeline.run)
    peaks = [record["memory.peak_bytes"] for record in records if "memory.peak_bytes" in record]
    assert len(peaks) == sum("metrics.loss" in record for record in records) == 12
    assert all(1 << 20 < peak < 1 << 42 for peak in peaks)
    assert peaks[-1] >= peaks[0] - (8 << 20)
