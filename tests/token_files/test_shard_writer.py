"""A folder of shards is whole or not there, and does not depend on how its ids were appended."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from tests.token_files.shards import FACTS, SEPARATOR, ids_with_documents
from transformerlm.token_files.dataset import TokenDataset
from transformerlm.token_files.shard_writer import ShardWriter, publish_shards

UINT16 = np.dtype(np.uint16)
ID_BYTES = np.where(np.arange(1000) == SEPARATOR, 0, np.arange(1000) % 7 + 1)


def writer_of(path: Path, shard_tokens: int = 100) -> ShardWriter:
    """Return a writer of shards of this size."""
    return ShardWriter(path, UINT16, separator_id=SEPARATOR, id_bytes=ID_BYTES, shard_tokens=shard_tokens)


def write(path: Path, ids: np.ndarray, *, shard_tokens: int, step: int) -> Path:
    """Write a folder from parts of `step` ids."""
    with writer_of(path, shard_tokens) as writer:
        for start in range(0, len(ids), step):
            writer.append(ids[start : start + step])
        assert writer.tokens == len(ids)
        publish_shards([writer], [FACTS])
    return path


def contents(folder: Path) -> dict[str, str]:
    """Return the sha256 of each file of a folder."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("shard_tokens", [1, 100, 5000])
def test_shards_hold_whole_documents_however_they_are_appended(tmp_path: Path, shard_tokens: int) -> None:
    """The same ids give the same bytes; each shard ends with a document, and has the size asked for, but the last."""
    ids = ids_with_documents(1000)
    folders = [write(tmp_path / f"{step}.shards", ids, shard_tokens=shard_tokens, step=step) for step in (1, 37, 1000)]
    assert contents(folders[0]) == contents(folders[1]) == contents(folders[2])
    data = TokenDataset(folders[0])
    np.testing.assert_array_equal(np.asarray(data.tokens), ids)
    assert (data.num_bytes, data.num_documents) == (ID_BYTES[ids].sum(), np.count_nonzero(ids == SEPARATOR))
    shards = [np.load(file.path) for file in data.files()]
    assert all(shard[-1] == SEPARATOR and len(shard) >= shard_tokens for shard in shards[:-1])
    # It ends at the first place where it may: without its last document it would be too short.
    assert all(SEPARATOR not in shard[shard_tokens - 1 : -1] for shard in shards)
    np.testing.assert_array_equal(data.document_offsets, [0, *np.flatnonzero(ids == SEPARATOR) + 1])


def test_ids_without_a_separator_at_the_end_and_no_ids_at_all(tmp_path: Path) -> None:
    """A document without its separator is the last one of the last shard; nothing is one shard of nothing."""
    ids = np.append(ids_with_documents(300), 5).astype(np.uint16)
    data = TokenDataset(write(tmp_path / "a.shards", ids, shard_tokens=100, step=50))
    np.testing.assert_array_equal(np.asarray(data.tokens), ids)
    assert data.document_offsets is not None
    assert data.document_offsets[-2:].tolist() == [300, 301]
    assert data.num_documents == len(data.document_offsets) - 1
    empty = TokenDataset(write(tmp_path / "b.shards", ids[:0], shard_tokens=100, step=1))
    assert (len(empty), empty.num_documents, empty.max_id(), len(empty.files())) == (0, 0, -1, 1)


def test_nothing_stays_of_what_was_not_published(tmp_path: Path) -> None:
    """Leaving the block unpublished, keeps only an older folder; what a killed build left goes, too."""
    old = contents(write(tmp_path / "a.shards", ids_with_documents(300), shard_tokens=100, step=50))
    (tmp_path / ".a.shards.tmp").mkdir()
    (tmp_path / ".a.shards.tmp/00009.npy").write_bytes(b"x")
    with writer_of(tmp_path / "a.shards") as writer:
        writer.append(ids_with_documents(500, seed=1))
    assert os.listdir(tmp_path) == ["a.shards"]
    assert contents(tmp_path / "a.shards") == old


def test_an_older_folder_is_replaced_with_all_its_shards(tmp_path: Path) -> None:
    """The new folder has none of the old one's shards, of which there were more."""
    write(tmp_path / "a.shards", ids_with_documents(900), shard_tokens=50, step=50)
    ids = ids_with_documents(300, seed=1)
    (tmp_path / ".a.shards.tmp").mkdir()
    (tmp_path / ".a.shards.tmp/00009.npy").write_bytes(b"x")
    write(tmp_path / "a.shards", ids, shard_tokens=1000, step=50)
    assert sorted(os.listdir(tmp_path / "a.shards")) == ["00000.documents.npy", "00000.npy", "index.json"]
    np.testing.assert_array_equal(np.asarray(TokenDataset(tmp_path / "a.shards").tokens), ids)
    assert os.listdir(tmp_path) == ["a.shards"]


@pytest.mark.parametrize("name", ["notes.txt", "mine.npy"])
def test_a_folder_of_other_things_is_not_replaced(tmp_path: Path, name: str) -> None:
    """What is in the way and was not written here is refused before any work, and stays."""
    (tmp_path / "a.shards").mkdir()
    (tmp_path / "a.shards" / name).write_bytes(b"mine")
    with pytest.raises(ValueError, match="choose another output"), writer_of(tmp_path / "a.shards"):
        pass
    assert (tmp_path / "a.shards" / name).read_bytes() == b"mine"


def test_two_builds_of_one_folder_are_refused(tmp_path: Path) -> None:
    """The second writer is told of the first, and does not touch its shards."""
    pytest.importorskip("fcntl")
    with writer_of(tmp_path / "a.shards") as first:
        first.append(ids_with_documents(300))
        with pytest.raises(FileExistsError, match="found another one"), writer_of(tmp_path / "a.shards"):
            pass
        publish_shards([first], [FACTS])
    assert len(TokenDataset(tmp_path / "a.shards")) == 300


def test_a_crash_between_two_folders_loses_neither_old_nor_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Old and new are never side by side under their names, and the old ones are kept until the new are in place."""
    for name in ("train.shards", "valid.shards"):
        write(tmp_path / name, ids_with_documents(300), shard_tokens=100, step=50)
    with writer_of(tmp_path / "train.shards") as train, writer_of(tmp_path / "valid.shards") as valid:
        train.append(ids_with_documents(300, seed=1))

        def crash() -> None:
            raise OSError("pulled the plug")

        monkeypatch.setattr(valid, "rename", crash)
        with pytest.raises(OSError, match="pulled the plug"):
            publish_shards([train, valid], [FACTS, FACTS])
    assert not (tmp_path / "valid.shards").exists()
    assert len(TokenDataset(tmp_path / ".valid.shards.tmp-old")) == 300
    assert json.loads((tmp_path / "train.shards/index.json").read_text())["tokens"] == 300
