"""The files of a tiny run, as the tests of training have them, runs with checkpoints, and servers to share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving.command import Server, save_random_model, serving
from tests.serving.helpers import tiny_checkpoint
from tests.training.chat_run import train_chat_run
from tests.training.conftest import files  # noqa: F401 (a fixture)
from tests.training.tiny_run import TinyFiles


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, files: TinyFiles) -> Path:  # noqa: F811 (the fixture)
    """Return a run with checkpoints of two steps, which no test changes."""
    run = tmp_path_factory.mktemp("serving") / "run"
    tiny_checkpoint(run, files, 1)
    tiny_checkpoint(run, files, 2)
    return run


@pytest.fixture(scope="session")
def untrained(tmp_path_factory: pytest.TempPathFactory, files: TinyFiles) -> Path:  # noqa: F811 (the fixture)
    """Return a run with one checkpoint, which no test changes."""
    return save_random_model(tmp_path_factory.mktemp("untrained") / "run", files)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, untrained: Path) -> Iterator[Server]:
    """Give a server that tests share: each leaves it able to make texts, and idle."""
    with serving(untrained, tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(scope="session")
def chat_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run that was trained on conversations, which no test changes."""
    return train_chat_run(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="session")
def chat_server(tmp_path_factory: pytest.TempPathFactory, chat_run: Path) -> Iterator[Server]:
    """Give a server of a model that chats, which tests share as they do the other one."""
    with serving(chat_run, tmp_path_factory.mktemp("chat-server")) as server:
        yield server
