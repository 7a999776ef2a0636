"""What a build of token files wrote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from databuilder.sources import SourceReport


@dataclass(frozen=True)
class SplitReport:
    """What one token file holds; `bytes` counts the documents' UTF-8 bytes, without separators."""

    path: Path
    tokens: int
    bytes: int
    documents: int
    sources: list[SourceReport]


@dataclass(frozen=True)
class BuildReport:
    """What a build wrote, and what it found in the text, in how many files."""

    train: SplitReport
    valid: SplitReport | None
    seconds: float
    invalid_utf8: int
    empty_documents: int
    num_files: int


def split_report(path: Path, sources: Sequence[SourceReport]) -> SplitReport:
    """Return what a token file holds, the sum over its sources."""
    tokens, num_bytes, documents = (
        sum(getattr(one, key) for one in sources) for key in ("tokens", "bytes", "documents")
    )
    return SplitReport(path, tokens, num_bytes, documents, list(sources))
