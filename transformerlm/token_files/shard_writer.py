"""The last step of writing a shard, after which an index may list it."""

from __future__ import annotations

from typing import Any

from transformerlm.token_files.index import Shard
from transformerlm.token_files.writer import TokenFileWriter
from transformerlm.utils import files


def finish_shard(writer: TokenFileWriter, *, num_bytes: int) -> Shard:
    """Put a file that was written with a separator in its place, durable and without a sidecar; return its entry."""
    assert writer.documents is not None, writer.path
    facts = writer.finish()
    writer.rename()
    files.sync(writer.path.parent)
    hashes: dict[str, Any] = {name: facts.get(name) for name in ("sha256", "documents_sha256", "mask_sha256")}
    return Shard(writer.path.name, writer.tokens, num_bytes, writer.documents, **hashes)
