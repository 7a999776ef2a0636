"""Reading a token file, or a folder of shards, and the facts in the JSON that belongs to it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from transformerlm.token_files.array import ADVICE, open_offset_array, open_token_array
from transformerlm.token_files.index import INDEX, Shard, facts_path, read_index
from transformerlm.token_files.loss_mask import open_mask
from transformerlm.token_files.shards import ShardedTokens, allow_files
from transformerlm.token_files.sidecar import offsets_path, read_sidecar, sidecar_path
from transformerlm.utils.files import file_sha256

_SCAN_ELEMENTS = 2**22

Tokens = npt.NDArray[Any] | ShardedTokens


@dataclass(frozen=True)
class TokenFile:
    """One `.npy` of a dataset, with what its sidecar or index promises of it; `named_in` is that file's name."""

    path: Path
    tokens: int
    sha256: str
    named_in: str

    def check(self) -> int:
        """Read the file once, and return the largest id in it; -1 when it is empty.

        Raises:
            ValueError: its sha256 or its number of ids is not the one promised, or it is no array of ids.
        """
        return max(self.check_blocks(), default=-1)

    def check_blocks(self) -> Iterator[int]:
        """Read the file once, and yield the largest id so far after each block: `check` in steps.

        It raises what `check` raises; only after its end is the file known to be the one promised.
        """
        ids = open_token_array(self.path)
        _check_same(self.path, "tokens", self.tokens, len(ids), named_in=self.named_in)
        digest, largest = hashlib.sha256(), -1
        with self.path.open("rb") as file:
            digest.update(file.read(ids.offset))  # the header
            while block := file.read(_SCAN_ELEMENTS * ids.itemsize):
                digest.update(block)
                largest = max(largest, int(np.frombuffer(block, ids.dtype).max()))
                yield largest
        _check_same(self.path, "sha256", self.sha256, digest.hexdigest(), named_in=self.named_in)


class TokenDataset:
    """What transformerlm-make-data wrote: a token file or a folder of shards, with the facts of its sidecar or index.

    `tokens` is the read-only stream of ids: a memory map, or the shards as one (see `ShardedTokens`). `num_tokens`,
    `num_bytes`, `num_documents`, `vocab_size`, `tokenizer_sha256` and `sha256` come from the JSON. Raises
    FileNotFoundError if a file is missing, and ValueError if one is malformed or they contradict each other.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._shards: list[Shard] = []
        self.tokens: Tokens
        if self.path.is_dir():
            self.metadata, self._shards = read_index(self.path)
            self.tokens = ShardedTokens(self.path, self._shards, dtype=self.metadata["dtype"])
        else:
            self.metadata = read_sidecar(self.path)
            self.tokens = open_token_array(self.path)
        self.num_tokens: int = self.metadata["tokens"]
        self.num_bytes: int = self.metadata["bytes"]
        self.num_documents: int = self.metadata["documents"]
        self.vocab_size: int = self.metadata["vocab_size"]
        self.tokenizer_sha256: str = self.metadata["tokenizer_sha256"]
        self.sha256: str = self.metadata["sha256"]
        named_in = facts_path(self.path).name
        _check_same(self.path, "tokens", self.num_tokens, len(self.tokens), named_in=named_in)
        _check_same(self.path, "dtype", self.metadata["dtype"], self.tokens.dtype.name, named_in=named_in)

    def __len__(self) -> int:
        return self.num_tokens

    def files(self) -> list[TokenFile]:
        """Return the files that hold the ids, each once: what has to be read to check all of them."""
        if not self._shards:
            return [TokenFile(self.path, self.num_tokens, self.sha256, sidecar_path(self.path).name)]
        distinct = {shard.file: shard for shard in self._shards}.values()
        return [TokenFile(self.path / shard.file, shard.tokens, shard.sha256, INDEX) for shard in distinct]

    def check(self) -> int:
        """Read each file once, and return the largest id in all of them; -1 when there is none.

        Raises:
            ValueError: a file has changed since it was written.
        """
        return max(file.check() for file in self.files())

    @cached_property
    def document_offsets(self) -> npt.NDArray[np.int64] | None:
        """Where each document begins in `tokens`, and where the last one ends, int64 `(documents + 1,)`.

        None: the data is from a version that did not write it. The files with the offsets are read and checked here.

        Raises:
            FileNotFoundError: one is missing.
            ValueError: one has changed since it was written, or does not fit the ids.
        """
        if not self._shards:
            promised = self.metadata.get("documents_sha256")
            return None if promised is None else _offsets(self.path, str(promised), tokens=self.num_tokens)
        promises = {shard.file: shard.documents_sha256 for shard in self._shards}
        if None in promises.values():
            return None
        sizes = {shard.file: shard.tokens for shard in self._shards}
        # Copies: each map would hold a file descriptor.
        read = {
            name: np.array(_offsets(self.path / name, str(sha), tokens=sizes[name])) for name, sha in promises.items()
        }
        starts = np.cumsum([0, *(shard.tokens for shard in self._shards)], dtype=np.int64)
        parts = [read[shard.file][:-1] + start for shard, start in zip(self._shards, starts, strict=False)]
        return np.concatenate([*parts, starts[-1:]])

    @cached_property
    def mask(self) -> list[tuple[int, npt.NDArray[np.uint8]]] | None:
        """Which ids are learnt: stretches of numbers 1 and 0, in order, each with the place of its first id.

        None: all of them are. The files with the masks are read and checked here.

        Raises:
            FileNotFoundError: one is missing.
            ValueError: one has changed since it was written, does not fit the ids, or only some shards have one.
        """
        if not self._shards:
            promised = self.metadata.get("mask_sha256")
            return None if promised is None else [(0, open_mask(self.path, str(promised), tokens=self.num_tokens))]
        promises = {shard.file: (shard.mask_sha256, shard.tokens) for shard in self._shards}
        hashes = [sha for sha, _ in promises.values()]
        if hashes == [None] * len(hashes):
            return None
        if None in hashes:
            raise ValueError(f"{self.path}: expected a mask for each shard or for none, found one for some; {ADVICE}")
        allow_files(len(promises))  # they stay open, beside the ids
        read = {name: open_mask(self.path / name, str(sha), tokens=size) for name, (sha, size) in promises.items()}
        starts = np.cumsum([0, *(shard.tokens for shard in self._shards)], dtype=np.int64).tolist()
        return [(start, read[shard.file]) for shard, start in zip(self._shards, starts, strict=False)]

    @property
    def has_mask(self) -> bool:
        """Whether some ids may not be learnt, as in conversations."""
        return "mask_sha256" in self.metadata or any(shard.mask_sha256 for shard in self._shards)

    @property
    def mask_sha256(self) -> str | None:
        """What tells masks apart, also over all shards; None: all ids are learnt."""
        if not self._shards:
            found = self.metadata.get("mask_sha256")
            return None if found is None else str(found)
        sums = [str(shard.mask_sha256) for shard in self._shards if shard.mask_sha256]
        return hashlib.sha256("".join(sums).encode()).hexdigest() if sums else None

    @cached_property
    def num_learnt(self) -> int:
        """The number of ids that are learnt; raises as `mask`."""
        return self.num_tokens if self.mask is None else sum(int(one.sum(dtype=np.int64)) for _, one in self.mask)


def _offsets(path: Path, promised: str, *, tokens: int) -> npt.NDArray[np.int64]:
    """Return the offsets of the documents in the token file at `path`, as a memory map."""
    beside = offsets_path(path)
    if not beside.is_file():
        raise FileNotFoundError(f"{beside}: missing beside {path.name}; copy it there, or {ADVICE}")
    if (found := file_sha256(beside)) != promised:
        raise ValueError(f"{beside}: expected the file of sha256 {promised}, found {found}; {ADVICE}")
    offsets = open_offset_array(beside)
    ends = [int(offsets[0]), int(offsets[-1])] if len(offsets) else []
    if ends != [0, tokens] or np.any(offsets[1:] < offsets[:-1]):
        raise ValueError(f"{beside}: expected offsets that rise from 0 to {tokens}, found others; {ADVICE}")
    return offsets


def _check_same(path: Path, key: str, promised: object, found: object, *, named_in: str) -> None:
    if promised != found:
        raise ValueError(f"{path}: {key} is {promised} in {named_in}, found {found} in the file; {ADVICE}")
