"""Folders of shards for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from transformerlm.token_files.dataset import TokenDataset
from transformerlm.token_files.index import Shard, write_index
from transformerlm.token_files.shard_writer import finish_shard
from transformerlm.token_files.writer import TokenFileWriter

SEPARATOR = 0
FACTS = {
    "vocab_size": 1000,
    "tokenizer_sha256": "ab" * 32,
    "separator": "<|endoftext|>",
    "separator_id": SEPARATOR,
    "sources": [],
}


def ids_with_documents(num_tokens: int, *, dtype: Any = np.uint16, seed: int = 0, every: int = 20) -> np.ndarray:
    """Return random ids below 1,000 in which a document ends about every `every` ids, and at the end."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, 1000, size=num_tokens).astype(dtype)
    ids[rng.random(num_tokens) < 1 / every] = SEPARATOR
    ids[-1:] = SEPARATOR
    return ids


def write_shards(
    folder: Path, parts: Sequence[np.ndarray], *, order: Sequence[int] | None = None, facts: Mapping[str, Any] = FACTS
) -> Path:
    """Write each part as a shard, as workers do, and then an index that lists them in `order`, by default each once."""
    shards: list[Shard] = []
    for number, ids in enumerate(parts):
        with TokenFileWriter(folder / f"{number:05}.npy", ids.dtype, separator_id=facts["separator_id"]) as writer:
            writer.append(ids)
            shards.append(finish_shard(writer, num_bytes=2 * len(ids)))
    listed = [shards[number] for number in (range(len(parts)) if order is None else order)]
    write_index(folder, listed, {"dtype": parts[0].dtype.name, **facts})
    return folder


def as_shards(path: Path, into: Path, *, shard_tokens: int) -> Path:
    """Write a token file's ids as a folder of shards of whole documents in another folder, and return it."""
    data = TokenDataset(path)
    assert data.document_offsets is not None
    cuts = [0]
    for end in data.document_offsets.tolist():
        if end - cuts[-1] >= shard_tokens:
            cuts.append(end)
    ids = np.array(data.tokens)
    parts = [part for part in np.split(ids, cuts[1:]) if len(part)]
    facts = {key: data.metadata[key] for key in FACTS}
    return write_shards(into / f"{path.stem}-{shard_tokens}.shards", parts, facts=facts)
