"""A run of the four commands on a small text, made once: tokenizer, data, training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from config.io import dump_toml
from tests.cli.commands import Outcome, call
from tests.cli.pretended import Pretended
from tests.training.tiny_run import TinyFiles, tiny_config, write_tiny_files


@dataclass(frozen=True)
class Pipeline:
    """The files of the run, and how its training ended."""

    files: TinyFiles
    run: Path
    train_toml: Path
    outcome: Outcome


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """Return a trained run that no test changes."""
    import torch

    torch.set_num_threads(1)  # a session's fixture runs before the one that does this for each test
    home = tmp_path_factory.mktemp("pipeline")
    files = write_tiny_files(home)
    config = tiny_config(files, home, {"logging.backend": "console", "samples.interval": 6})
    train_toml = home / "train.toml"
    train_toml.write_text(dump_toml(config))
    return Pipeline(files, home / "run", train_toml, call("train", "--config", train_toml))


@pytest.fixture(scope="session")
def pretended_files(tmp_path_factory: pytest.TempPathFactory) -> TinyFiles:
    """Return the tokenizer and token files that pretended stages leave."""
    return write_tiny_files(tmp_path_factory.mktemp("pretended"))


@pytest.fixture
def pretend(pretended_files: TinyFiles, monkeypatch: pytest.MonkeyPatch) -> Pretended:
    """Replace the stages of quickstart and fit by pretended ones."""
    pretended = Pretended(pretended_files)
    monkeypatch.setattr("cli.stages.wait_for", pretended)
    return pretended
