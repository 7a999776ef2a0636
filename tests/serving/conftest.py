"""The files of a tiny run, as the tests of training have them, and a run with one checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.serving.helpers import tiny_checkpoint
from tests.training.conftest import files  # noqa: F401 (a fixture)
from tests.training.tiny_run import TinyFiles


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, files: TinyFiles) -> Path:  # noqa: F811 (the fixture)
    """Return a run with checkpoints of two steps, which no test changes."""
    run = tmp_path_factory.mktemp("serving") / "run"
    tiny_checkpoint(run, files, 1)
    tiny_checkpoint(run, files, 2)
    return run
