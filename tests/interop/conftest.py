"""A small text and its tokenizers, made once for all tests of this room."""

from __future__ import annotations

import pytest

from tests.interop.models import make_tokenizer
from tests.training.tiny_run import TinyFiles, write_tiny_files
from transformerlm.tokenizer import Tokenizer
from transformerlm.tokenizer.pretokenize import PATTERNS


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> TinyFiles:
    """Return a tiny text with its tokenizer and token files."""
    return write_tiny_files(tmp_path_factory.mktemp("interop"))


@pytest.fixture(scope="session", params=list(PATTERNS))
def tokenizer(files: TinyFiles, request: pytest.FixtureRequest) -> Tokenizer:
    """Return a tokenizer of each pattern, with three special tokens."""
    return make_tokenizer(files.text, pattern=request.param)
