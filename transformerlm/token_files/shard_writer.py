"""Writing a folder of shards: as one token file is written, in several, with an index in the place of the sidecar.

All is written to `.NAME.tmp` beside the folder, which takes the folder's place when it is whole.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from transformerlm.token_files.index import INDEX, Shard, write_index
from transformerlm.token_files.writer import Array, TokenFileWriter
from transformerlm.utils import files
from transformerlm.utils.lock import try_lock

SHARD_TOKENS = 1 << 29  # 1 GB of uint16
_LOCK = ".lock"


def shard_name(number: int) -> str:
    """Return the name of a shard, `00000.npy` for the first."""
    return f"{number:05d}.npy"


def finish_shard(writer: TokenFileWriter, *, num_bytes: int) -> Shard:
    """Put a file that was written with a separator in its place, durable and without a sidecar; return its entry."""
    assert writer.documents is not None, writer.path
    facts = writer.finish()
    writer.rename()
    files.sync(writer.path.parent)
    hashes = {"sha256": facts["sha256"], "documents_sha256": facts["documents_sha256"]}
    return Shard(writer.path.name, writer.tokens, num_bytes, writer.documents, **hashes)


class ShardWriter:
    """An unfinished folder of shards, which is removed at the end of the `with` block unless it was published.

    A shard ends with the first document that ends at or after its `shard_tokens`-th id. So each holds whole documents,
    and the same ids make the same shards, in whatever parts they are appended. `id_bytes` `(vocab_size,)` are the bytes
    that each id stands for, 0 for the separator's.
    """

    def __init__(
        self,
        path: Path,
        dtype: np.dtype[Any],
        *,
        separator_id: int,
        id_bytes: Array,
        shard_tokens: int = SHARD_TOKENS,
    ) -> None:
        assert shard_tokens >= 1, shard_tokens
        self.path = path
        self.dtype = dtype
        self.tokens = 0
        self.shards: list[Shard] = []
        self._separator_id = separator_id
        self._id_bytes = id_bytes
        self._shard_tokens = shard_tokens
        self._unfinished = path.with_name(f".{path.name}.tmp")
        self._open: TokenFileWriter | None = None
        self._num_bytes = 0  # of the open shard

    def __enter__(self) -> Self:
        """Create the unfinished folder.

        Raises:
            FileExistsError: another build is writing the same folder.
            ValueError: there is something else in its place than shards, which must not be lost.
        """
        is_empty = self.path.is_dir() and not any(self.path.iterdir())
        if not is_empty:
            files.check_free(self.path, overwrite=True, holds=INDEX, beside=("*.npy",))
        self._unfinished.mkdir(parents=True, exist_ok=True)
        self._lock = (self._unfinished / _LOCK).open("w", encoding="utf-8")
        if not try_lock(self._lock, self._unfinished / _LOCK):
            self._lock.close()
            raise FileExistsError(f"{self.path}: expected to be the only build of this folder, found another one")
        for left in self._unfinished.iterdir():  # by a build that was killed
            if left.name != _LOCK:
                left.unlink()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close, and remove what was not published."""
        if self._open is not None:
            self._open.__exit__(kind, error, trace)
        self._lock.close()
        shutil.rmtree(self._unfinished, ignore_errors=True)

    def append(self, ids: Array) -> None:
        """Write ids, an array of this folder's dtype.

        Raises:
            OSError: the disk is full, or another failure to write.
        """
        self.tokens += len(ids)
        while len(ids):
            shard = self._open or self._begin()
            # The shard may end at the first separator from `least` on, among the ids that are left.
            least = max(0, self._shard_tokens - shard.tokens - 1)
            ends = np.flatnonzero(ids[least:] == self._separator_id)[:1]
            size = least + int(ends[0]) + 1 if len(ends) else len(ids)
            shard.append(ids[:size])
            self._num_bytes += int(self._id_bytes.take(ids[:size]).sum(dtype=np.int64))
            ids = ids[size:]
            if len(ends):
                self._end()

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Make all shards durable, and write the index with these facts; no more ids may follow."""
        if self._open is not None or not self.shards:
            self._open = self._open or self._begin()
            self._end()
        write_index(self._unfinished, self.shards, {"dtype": self.dtype.name, **facts})

    def displace(self) -> Path:
        """Move an older folder out of the way, and return where it is now, if there was one."""
        old = self.path.with_name(f".{self.path.name}.tmp-old")
        shutil.rmtree(old, ignore_errors=True)
        with suppress(FileNotFoundError):
            self.path.rename(old)
        return old

    def rename(self) -> None:
        """Move the finished folder to its place."""
        (self._unfinished / _LOCK).unlink()
        self._unfinished.rename(self.path)
        files.sync(self.path.absolute().parent)

    def _begin(self) -> TokenFileWriter:
        path = self._unfinished / shard_name(len(self.shards))
        self._open = TokenFileWriter(path, self.dtype, separator_id=self._separator_id).__enter__()
        return self._open

    def _end(self) -> None:
        assert self._open is not None
        self.shards.append(finish_shard(self._open, num_bytes=self._num_bytes))
        self._open.__exit__(None, None, None)
        self._open, self._num_bytes = None, 0


def publish_shards(writers: Sequence[ShardWriter], facts: Sequence[Mapping[str, Any]]) -> None:
    """Finish the folders and put them in place with their indexes, which hold `facts` (see `write_index`).

    Older ones are moved away before the first is put in place, so that old and new ones are never side by side. After a
    crash in between they are still there, as `.NAME.tmp-old`.
    """
    for writer, known in zip(writers, facts, strict=True):
        writer.finish(known)
    displaced = [writer.displace() for writer in writers]
    for writer in writers:
        writer.rename()
    for old in displaced:
        shutil.rmtree(old, ignore_errors=True)
