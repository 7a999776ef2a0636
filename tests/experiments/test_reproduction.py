"""The command that trains a run again: where, from what, with which threads, and what "auto" was."""

from __future__ import annotations

import shlex

import pytest

from tests.experiments.runs import STARTED, write_run
from transformerlm.experiments.history import read_history
from transformerlm.experiments.reproduction import command_of, reproduction_of


def test_the_command_is_one_for_a_shell(tmp_path):
    """It goes where the run was started, with its threads; a name with spaces and quotes is one word."""
    environment = {
        "event": "environment",
        "step": 0,
        "threads": 2,
        "directory": "/a b",
        "command": ["x", "it's"],
        "git.dirty": True,
    }
    run = write_run(tmp_path, "a 'run'", environment, STARTED, config={"training.max_time": "100s"})
    words = shlex.split(command_of(read_history(run)))
    assert words[:5] == ["cd", "/a b", "&&", "OMP_NUM_THREADS=2", "transformerlm-train"]
    assert words[5:] == [
        "--config",
        str(run / "config.toml"),
        f"--runs_dir={tmp_path / 'reproduced'}",
        "--logging.run_name=a 'run'",
    ]
    found = reproduction_of(read_history(run))
    assert found["typed"] == "x 'it'\"'\"'s'"
    assert "follows the clock" in " ".join(found["notes"])
    assert "not committed" in " ".join(found["notes"])


def test_without_settings_there_is_no_command(tmp_path):
    """A run whose config.toml is gone says so."""
    run = write_run(tmp_path, "one", STARTED)
    (run / "config.toml").unlink()
    assert reproduction_of(read_history(run)) == {
        "command": "",
        "typed": "",
        "notes": ["Its config.toml is missing or cannot be read, so there is no command that trains it again."],
    }


def test_what_was_automatic_is_written_out(tmp_path):
    """Micro-batch, precision and device are those of the run's machine; what the settings say is not repeated."""
    started = STARTED | {"micro_batch_size": 4, "precision": "bf16", "device": "cpu"}
    run = write_run(tmp_path, "my run", started, config={"training.device": "cpu"})
    words = shlex.split(command_of(read_history(run)))
    assert words[0] == "transformerlm-train"
    assert words[-3:] == ["--logging.run_name=my run", "--training.micro_batch_size=4", "--training.precision=bf16"]


@pytest.mark.parametrize(("resume", "words"), [("required", ["--checkpoint.resume=auto"]), ("never", []), ("auto", [])])
def test_a_run_that_had_to_resume_begins_anew(resume, words, tmp_path):
    """In another directory there is no checkpoint, and the settings would refuse to begin without one."""
    run = write_run(tmp_path, "one", STARTED, config={"checkpoint.resume": resume})
    assert shlex.split(command_of(read_history(run)))[5:] == words


@pytest.mark.parametrize("processes", [None, True, "2", 1, 2])
def test_a_run_of_several_processes_is_started_by_torchrun(tmp_path, processes):
    """Each process has its share of a batch, so fewer of them would round otherwise; a note says where they start."""
    environment = {"event": "environment", "step": 0, "processes": processes}
    run = write_run(tmp_path, "one", STARTED, environment, config={"model.d_model": 8})
    found = reproduction_of(read_history(run))
    launcher = "torchrun --nproc-per-node=2 --no-python " if processes == 2 else ""
    assert found["command"].startswith(f"{launcher}transformerlm-train --config ")
    assert ("on one machine" in " ".join(found["notes"])) == (processes == 2)
