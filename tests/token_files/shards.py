"""Folders of shards for tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from transformerlm.token_files.dataset import TokenDataset
from transformerlm.token_files.index import Shard, write_index
from transformerlm.token_files.shard_writer import ShardWriter, finish_shard, publish_shards, shard_name
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


def write_shards(folder: Path, parts: Sequence[np.ndarray], *, order: Sequence[int] | None = None) -> Path:
    """Write each part as a shard, as workers do, and then an index that lists them in `order`, by default each once."""
    shards: list[Shard] = []
    for number, ids in enumerate(parts):
        with TokenFileWriter(folder / shard_name(number), ids.dtype, separator_id=SEPARATOR) as writer:
            writer.append(ids)
            shards.append(finish_shard(writer, num_bytes=2 * len(ids)))
    listed = [shards[number] for number in (range(len(parts)) if order is None else order)]
    write_index(folder, listed, {"dtype": parts[0].dtype.name, **FACTS})
    return folder


def as_shards(path: Path, into: Path, *, shard_tokens: int) -> Path:
    """Write a token file's ids as a folder of shards in another folder, and return it."""
    data = TokenDataset(path)
    facts = {key: data.metadata[key] for key in FACTS}
    id_bytes = np.ones(data.vocab_size, dtype=np.int64)
    ids = np.array(data.tokens)
    separator_id = facts["separator_id"]
    folder = into / f"{path.stem}-{shard_tokens}.shards"
    with ShardWriter(
        folder, ids.dtype, separator_id=separator_id, id_bytes=id_bytes, shard_tokens=shard_tokens
    ) as writer:
        writer.append(ids)
        publish_shards([writer], [facts])
    return folder
