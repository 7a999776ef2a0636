"""What an export reads: the tokenizer of a checkpoint or a directory, and the token at which documents end."""

from __future__ import annotations

from pathlib import Path

from transformerlm.tokenizer.io import tokenizer_files
from transformerlm.tokenizer.tokenizer import Tokenizer
from transformerlm.training.checkpoint import load_tokenizer, resolve

_END_OF_TEXT = "<|endoftext|>"


def open_tokenizer(path: Path) -> Tokenizer:
    """Return the tokenizer of a tokenizer's directory, of a checkpoint, or of a run's newest checkpoint."""
    return Tokenizer.from_directory(path) if tokenizer_files(path)[0].exists() else load_tokenizer(resolve(path))


def end_of_text(tokenizer: Tokenizer) -> str | None:
    """Return the special token at which documents end, by the rule of `transformerlm-infer`: the first, if another."""
    specials = tokenizer.special_tokens
    return _END_OF_TEXT if _END_OF_TEXT in specials else next(iter(specials), None)
