"""What an export reads: the tokenizer of a checkpoint or a directory, and the token before each text."""

from __future__ import annotations

from pathlib import Path

from transformerlm.checkpoints.directory import resolve
from transformerlm.checkpoints.document_ids import recorded_ids
from transformerlm.checkpoints.load import load_tokenizer
from transformerlm.tokenizer.io import tokenizer_files
from transformerlm.tokenizer.tokenizer import Tokenizer


def open_tokenizer(path: Path) -> Tokenizer:
    """Return the tokenizer of a tokenizer's directory, of a checkpoint, or of a run's newest checkpoint."""
    return Tokenizer.from_directory(path) if tokenizer_files(path)[0].exists() else load_tokenizer(resolve(path))


def leading_token_of(path: Path, tokenizer: Tokenizer) -> str | None:
    """Return the special token before each text, which a checkpoint may record and a tokenizer's directory does not."""
    known = None if tokenizer_files(path)[0].exists() else recorded_ids(resolve(path), tokenizer)
    if known is None or not known.starts_texts:
        return None
    return next((text for text, index in tokenizer.special_token_ids.items() if index == known.start_id), None)
