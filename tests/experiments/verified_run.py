"""A small run with all its checkpoints, replays of it within this process, and changes that leave the sums right."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch

from cli.train import train
from tests.cli.commands import call
from tests.training.tiny_run import TinyFiles, tiny_config, write_tiny_files
from transformerlm.experiments import replay
from transformerlm.utils.json_files import values_sha256

CHANGES = {"checkpoint.interval": 4, "checkpoint.keep": 10, "model.dropout": {"residual": 0.1}}


@dataclass(frozen=True)
class MadeRun:
    """A run of 12 steps, and the files that it was made of."""

    directory: Path
    files: TinyFiles

    def copy(self, place: Path) -> Path:
        """Return a copy of the run that a test may change."""
        return Path(shutil.copytree(self.directory, place / "run", symlinks=True))


def make_run(folder: Path, **changes: Any) -> MadeRun:
    """Train for 12 steps; a checkpoint is saved at steps 4, 8 and 12, and all are kept."""
    torch.set_num_threads(1)  # a module's fixture runs before the one that does this for each test
    (folder / "files").mkdir()
    files = write_tiny_files(folder / "files")
    assert train(tiny_config(files, folder / "runs", {**CHANGES, **changes})) == 0
    return MadeRun(folder / "runs" / "run", files)


def replay_here(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let replays train within this process, which takes a fraction of a second; return the steps that they end at."""
    ends: list[int] = []

    def train_here(command: Sequence[str], run_dir: Path, step: int, **place: Any) -> str | None:
        ends.append(step)
        done = call("train", *command[command.index("train") + 1 :])
        return None if done.code == 0 else done.stderr.splitlines()[-1]

    monkeypatch.setattr(replay, "_train_until_saved", train_here)
    return ends


def change_lines(run: Path, change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> None:
    """Change each record of the run's lines; None removes it."""
    path = run / "metrics.jsonl"
    records = [change(json.loads(line)) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(one) + "\n" for one in records if one is not None))


def change_step(run: Path, step: int, **values: Any) -> None:
    """Change values in the line of a step."""

    def change(record: dict[str, Any]) -> dict[str, Any]:
        return record | values if record.get("step") == step and "metrics.loss" in record else record

    change_lines(run, change)


def change_event(run: Path, event: str, **values: Any) -> None:
    """Change values in all events of a name."""
    change_lines(run, lambda record: record | values if record.get("event") == event else record)


def make_sums_right(checkpoint: Path) -> None:
    """Write the sums of a checkpoint's files, as they are now, to its state."""
    state = json.loads((checkpoint / "state.json").read_text())
    state["sha256"] = {name: sha256((checkpoint / name).read_bytes()).hexdigest() for name in state["sha256"]}
    state["state_sha256"] = values_sha256(state, kept_in="state_sha256")
    (checkpoint / "state.json").write_text(json.dumps(state))


def take_weights(run: Path, step: int, source: Path) -> None:
    """Put the weights of another checkpoint into that of a step, and make its sums right."""
    checkpoint = run / "checkpoints" / f"step-{step:08d}"
    shutil.copyfile(source / "model.safetensors", checkpoint / "model.safetensors")
    make_sums_right(checkpoint)


def change_settings(run: Path, old: str, new: str) -> None:
    """Change the text of the settings, in the run and its checkpoints, and make all sums right."""
    for path in (run / "config.toml", *run.glob("checkpoints/step-*/config.toml")):
        text = path.read_text()
        assert text.count(old) == 1
        path.write_text(text.replace(old, new))
    for checkpoint in run.glob("checkpoints/step-*"):
        make_sums_right(checkpoint)
    change_event(run, "environment", config_sha256=sha256((run / "config.toml").read_bytes()).hexdigest())
