"""What an export reads: the tokenizer of a checkpoint or a directory."""

from __future__ import annotations

from pathlib import Path

from transformerlm.tokenizer.io import VOCAB_FILE
from transformerlm.tokenizer.tokenizer import Tokenizer
from transformerlm.training.checkpoint import load_tokenizer, resolve


def open_tokenizer(path: Path) -> Tokenizer:
    """Return the tokenizer of a tokenizer's directory, of a checkpoint, or of a run's newest checkpoint."""
    return Tokenizer.from_directory(path) if (path / VOCAB_FILE).exists() else load_tokenizer(resolve(path))
