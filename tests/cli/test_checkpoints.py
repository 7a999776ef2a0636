"""What a command says about the checkpoint that it uses."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.checkpoints import described
from tests.cli.commands import call
from transformerlm.checkpoints.directory import resolve
from transformerlm.checkpoints.validation import read_state


@pytest.fixture
def state(monkeypatch):
    """Return the state that each checkpoint has, for a test to change."""
    state = {"step": 600, "val_loss": 6.22, "best_step": 240, "best_val_loss": 5.925}
    monkeypatch.setattr("transformerlm.checkpoints.validation.read_state", lambda directory: state)
    return state


RUN = Path("runs/first")
NEWEST = RUN / "checkpoints/step-00000600"


def test_a_newest_checkpoint_that_is_clearly_worse_names_the_best(state):
    """The line says both losses, and the path of the best."""
    best = "its best is runs/first/best: step 240, val loss 5.925"
    assert described(RUN, NEWEST) == f"runs/first: step 600, val loss 6.220; {best}"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"val_loss": 5.926}, "runs/first: step 600, val loss 5.926"),
        ({"step": 240}, "runs/first: step 240, val loss 5.925"),
        ({"best_step": None, "best_val_loss": None, "val_loss": None}, "runs/first: step 600"),
        ({"val_loss": None}, "runs/first: step 600; its best is runs/first/best: step 240, val loss 5.925"),
    ],
    ids=["no worse", "the best", "without validation", "saved on a signal, or by an earlier version"],
)
def test_what_else_there_is_to_say(changes, line, state):
    """The best is named if the newest is worse, or may be."""
    state |= changes
    assert described(RUN, NEWEST) == line


def test_a_checkpoint_that_was_named_itself_is_what_was_meant(state):
    """For a named step, or a checkpoint outside a run, the line has only its step and loss."""
    for path in (NEWEST, Path("copy")):
        assert described(path, path) == f"{path}: step 600, val loss 6.220"


def test_a_state_of_an_earlier_version_will_do(monkeypatch):
    """An imported model's state knows no losses at all."""
    monkeypatch.setattr("transformerlm.checkpoints.validation.read_state", lambda directory: {"step": 0})
    assert described(RUN, NEWEST) == "runs/first: step 0"


@pytest.mark.parametrize("command", ["infer", "eval", "export", "train"])
def test_every_command_takes_the_best_and_says_so(command, pipeline, tmp_path):
    """`RUN/best` is a checkpoint's name for all of them, and one line on stderr says which step it is."""
    arguments = {
        "infer": ["--checkpoint", pipeline.run / "best", "--prompt=Ada", "--sampling.max_new_tokens=2"],
        "eval": ["--checkpoint", pipeline.run / "best", "--input", pipeline.files.valid, "--resamples=0"],
        "export": ["--checkpoint", pipeline.run / "best", "--output", tmp_path / "hf", "--verify=false"],
        "train": [
            *("--config", pipeline.train_toml, "--runs_dir", tmp_path, "--training.max_steps=3"),
            *("--checkpoint.init_from", pipeline.run / "best"),
        ],
    }[command]
    done = call(command, *arguments)
    assert done.code == 0, done.stderr
    best = read_state(resolve(pipeline.run / "best"))
    said = f"{pipeline.run / 'best'}: step {best['step']:,}, val loss {best['best_val_loss']:.3f}\n"
    assert done.stderr.count(said) == 1
