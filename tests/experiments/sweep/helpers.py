"""What the tests of this room share: a base file without data, sweeps of it, and trainings by a stand-in."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from config.sweep import SweepConfig
from tests.cli.commands import ROOT
from transformerlm.experiments.sweep.plan import Planner, SweepRun
from transformerlm.experiments.sweep.points import axes_of, grid
from transformerlm.experiments.sweep.queue import SweepDirectory
from transformerlm.experiments.sweep.scheduler import Scheduler

FAKE = Path(__file__).with_name("fake_train.py")
BASE = """\
[model]
vocab_size = 300
context_length = 16
d_model = 32
num_layers = 1
num_heads = 2
[data]
train = "train.npy"
valid = "valid.npy"
tokenizer = "tokenizer"
[training]
max_steps = 12
batch_size = 4
eval_interval = 2
[checkpoint]
interval = 3
"""


def price(config: Any) -> int:
    """Return FLOPs of a token that grow with the model, as those of `estimates` do."""
    return 6 * config.model.num_layers * config.model.d_model**2


def sweep_config(folder: Path, **changes: Any) -> SweepConfig:
    """Return a sweep of three learning rates and two seeds over the base file, with keys changed."""
    (folder / "base.toml").write_text(BASE)
    axes = [{"key": "optimizer.learning_rate", "values": [1e-3, 1e-2, 1e-1]}]
    tree = {"base": str(folder / "base.toml"), "dir": str(folder / "sweep"), "seeds": [0, 1], "axes": axes}
    return SweepConfig.model_validate({**tree, **changes})


def planner_of(config: SweepConfig) -> Planner:
    """Return the planner of a sweep."""
    return Planner(config, config.base, price)


def planned(folder: Path, **changes: Any) -> list[SweepRun]:
    """Return the runs of a grid."""
    config = sweep_config(folder, **changes)
    return planner_of(config).runs(grid(axes_of(config)))


def scheduler_of(
    folder: Path, *fake_options: str, seconds: float = 0.0, tell: Callable[..., object] | None = None, **settings: Any
) -> Scheduler:
    """Return a scheduler whose trainings are those of the stand-in, each step of which takes `seconds`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FAKE_SECONDS": str(seconds)}
    return Scheduler(
        SweepDirectory(folder / "sweep"),
        command=lambda path: [sys.executable, str(FAKE), str(path), *fake_options],
        environment=environment,
        tell=tell or (lambda event, task, facts: None),
        **settings,
    )


def steps_made(folder: Path, run: SweepRun) -> list[tuple[str, int]]:
    """Return the process and the number of each step that the stand-in has made of a run."""
    lines = (folder / "sweep" / run.name / "made.txt").read_text().splitlines()
    return [(process, int(step)) for process, step in map(str.split, lines)]


def labels(records: Mapping[str, str]) -> str:
    """Return labels as one text."""
    return ",".join(f"{name}={label}" for name, label in records.items())
