"""The files of a tiny run, made once."""

from __future__ import annotations

import pytest

from tests.training.tiny_run import TinyFiles, write_tiny_files


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> TinyFiles:
    """Return a tokenizer and token files that no test changes."""
    return write_tiny_files(tmp_path_factory.mktemp("tiny"))
