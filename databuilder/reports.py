"""What a build of token files wrote: for people, and for the sidecars."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from databuilder.sources import SourceFiles, SourceReport
from transformerlm.tokenizer import Tokenizer


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
    """What a build wrote, and what it found in the text."""

    train: SplitReport
    valid: SplitReport | None
    seconds: float
    invalid_utf8: int
    empty_documents: int


def split_report(path: Path, sources: Sequence[SourceReport]) -> SplitReport:
    """Return what a token file holds, the sum over its sources."""
    tokens, num_bytes, documents = (
        sum(getattr(one, key) for one in sources) for key in ("tokens", "bytes", "documents")
    )
    return SplitReport(path, tokens, num_bytes, documents, list(sources))


def split_facts(split: SplitReport, *, with_mixture: bool) -> dict[str, Any]:
    """Return what a sidecar says of its own file."""
    mixture = {"mixture": [asdict(source) for source in split.sources]} if with_mixture else {}
    return {"bytes": split.bytes, "documents": split.documents, **mixture}


def shared_facts(tokenizer: Tokenizer, sources: Sequence[SourceFiles], separator: str) -> dict[str, Any]:
    """Return what the sidecars of all files of a build say."""
    return {
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_sha256": tokenizer.fingerprint(),
        "separator": separator,
        "separator_id": tokenizer.special_token_ids[separator],
        "sources": [{"path": str(path), "bytes": path.stat().st_size} for source in sources for path in source.paths],
    }
