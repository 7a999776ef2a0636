"""A folder of shards is read as one array of ids, whatever the sizes of its shards."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.token_files.shards import ids_with_documents, write_shards
from transformerlm.token_files import index, shards
from transformerlm.token_files.dataset import TokenDataset
from transformerlm.token_files.index import Shard
from transformerlm.training.data import get_batch, sequential_batches


def cut(ids: np.ndarray, size: int) -> list[np.ndarray]:
    """Return the ids in parts of a size."""
    return [ids[start : start + size] for start in range(0, len(ids), size)]


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@pytest.mark.parametrize("size", [4, 100, 333, 999])
def test_batches_are_those_of_one_file(tmp_path: Path, size: int, dtype: type) -> None:
    """Training and evaluation see the same windows at any size of a shard, those across several borders too."""
    ids = ids_with_documents(999, dtype=dtype)
    folder = TokenDataset(write_shards(tmp_path / "a.shards", cut(ids, size)))
    for step in range(20):
        sizes = {"batch_size": 6, "context_length": 16, "seed": 3, "step": step}
        for ours, theirs in zip(get_batch(folder.tokens, **sizes), get_batch(ids, **sizes), strict=True):
            assert torch.equal(ours, theirs)
    sizes = {"batch_size": 5, "context_length": 31}
    pairs = zip(sequential_batches(folder.tokens, **sizes), sequential_batches(ids, **sizes), strict=True)
    assert all(torch.equal(ours[1], theirs[1]) for ours, theirs in pairs)


def test_an_array_of_several_files_is_indexed_like_one(tmp_path: Path) -> None:
    """Length, slices, positions of any shape, single ids and the whole are numpy's, empty shards or not."""
    ids = ids_with_documents(500)
    parts = [ids[:100], ids[:0], ids[100:101], ids[101:101], ids[101:400], ids[400:], ids[:0]]
    tokens = TokenDataset(write_shards(tmp_path / "a.shards", parts)).tokens
    assert (len(tokens), tokens.shape, tokens.dtype) == (500, (500,), np.uint16)
    rng = np.random.default_rng(1)
    for start, stop in [(0, 500), (0, 0), (99, 102), (100, 101), (-5, None), (400, 900), (300, 200), (499, 500)]:
        np.testing.assert_array_equal(tokens[start:stop], ids[start:stop])
    for positions in (rng.integers(500, size=(3, 4, 5)), np.empty((0, 3), dtype=np.int64), np.array([[100], [99]])):
        np.testing.assert_array_equal(tokens[positions], ids[positions])
    assert tokens[100] == ids[100]
    np.testing.assert_array_equal(tokens[10:400:7], ids[10:400:7])
    np.testing.assert_array_equal(np.asarray(tokens), ids)
    found = tokens.windows(np.array([0, 95, 480]), 20)
    np.testing.assert_array_equal(found[1], ids[95:115])
    assert found.dtype == tokens.dtype
    assert tokens.windows(np.array([0]), 20, dtype=np.int64).dtype == np.int64
    for outside in (np.array([500]), np.array([-1])):
        with pytest.raises(IndexError, match=r"positions from 0 to 499, found"):
            tokens[outside]
        with pytest.raises(IndexError, match=r"windows of 1 ids within 500"):
            tokens.windows(outside, 1)


def test_a_shard_that_is_listed_again_is_read_again(tmp_path: Path) -> None:
    """A weight is a longer list: the stream repeats the shard, and its file is there, opened and checked once."""
    ids = ids_with_documents(300)
    parts = cut(ids, 100)
    data = TokenDataset(write_shards(tmp_path / "a.shards", parts, order=[0, 1, 1, 2, 1]))
    expected = np.concatenate([parts[number] for number in (0, 1, 1, 2, 1)])
    np.testing.assert_array_equal(np.asarray(data.tokens), expected)
    np.testing.assert_array_equal(
        data.tokens.windows(np.array([150, 240]), 120), [expected[150:270], expected[240:360]]
    )
    assert data.num_tokens == 500
    assert [file.path.name for file in data.files()] == ["00000.npy", "00001.npy", "00002.npy"]


def open_below(folder: Path) -> int:
    """Return how many files of a folder this process has open; what other tests left open may close meanwhile."""
    count = 0
    for link in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            count += link.readlink().is_relative_to(folder)
    return count


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts this process's open files, in Linux's way")
def test_no_more_files_are_open_than_a_process_may_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards are opened when they are read, not before; those for which there is no room do not stay open."""
    monkeypatch.setattr(shards, "max_open", lambda: 8)
    ids = ids_with_documents(300)
    tokens = TokenDataset(write_shards(tmp_path / "a.shards", cut(ids, 10))).tokens
    assert open_below(tmp_path) == 0
    np.testing.assert_array_equal(tokens[np.arange(300)], ids)
    np.testing.assert_array_equal(tokens[:], ids)
    assert 0 < open_below(tmp_path) <= 8


def test_each_shard_is_checked_once_however_many_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of shards for which there is no room are read without another look at the header; a cut file shows."""
    checked: list[str] = []
    check = index.open_shard

    def counted(folder: Path, shard: Shard, **options: str) -> object:
        checked.append(shard.file)
        return check(folder, shard, **options)

    monkeypatch.setattr(shards, "open_shard", counted)
    monkeypatch.setattr(shards, "max_open", lambda: 8)
    ids = ids_with_documents(300)
    tokens = TokenDataset(write_shards(tmp_path / "a.shards", cut(ids, 10))).tokens
    assert isinstance(tokens, shards.ShardedTokens)
    starts = np.random.default_rng(0).integers(300 - 15, size=200)
    for _ in range(3):
        np.testing.assert_array_equal(tokens.windows(starts, 15), ids[starts[:, None] + np.arange(15)])
    assert sorted(checked) == sorted(set(checked))
    assert len(checked) == 30
    last = tmp_path / "a.shards" / checked[-1]
    os.truncate(last, last.stat().st_size - 20)
    with pytest.raises(ValueError, match=rf"{checked[-1]}: has become shorter since it was checked"):
        tokens[:]


@pytest.mark.parametrize(
    ("limit", "expected"), [(100, 25), (1024, 256), (20_000, 5000), (1 << 20, 16_384), (-1, 16_384)]
)
def test_a_quarter_of_the_descriptors_is_for_shards(limit: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest is for what else a process opens; without a limit, that of memory maps counts."""
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY if limit < 0 else limit, 1 << 20))
    assert shards.max_open() == expected


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX limits")
def test_files_that_stay_open_get_room(monkeypatch):
    """The soft limit rises by their number, up to the hard one; without a limit there is nothing to do."""
    import resource

    limits, set_to = [(1024, 4096)], []
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[0])
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: set_to.append(pair))
    for number in (300, 10**6):
        shards.allow_files(number)
    limits[0] = (1024, resource.RLIM_INFINITY)
    shards.allow_files(300)
    limits[0] = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    shards.allow_files(300)
    assert set_to == [(1324, 4096), (4096, 4096), (1324, resource.RLIM_INFINITY)]
