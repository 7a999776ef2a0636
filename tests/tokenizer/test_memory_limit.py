"""Behaviour of the cap on training's memory: the same merges under it and beyond it, or one plain line."""

from __future__ import annotations

import os
import random
import re
import warnings
from pathlib import Path

import numpy as np
import pytest

from tests.small_disk import files_of_at_most
from transformerlm.tokenizer import memory_limit, reading, train_bpe
from transformerlm.tokenizer.memory_limit import check_memory_limit

EOT = "<|endoftext|>"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of 15,000 distinct words, which occur several times each, in three documents."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 7))) for _ in range(15_000)]
    path = tmp_path_factory.mktemp("corpus") / "a.txt"
    path.write_text(EOT.join(" ".join(rng.choices(words, k=25_000)) for _ in range(3)))
    return path


@pytest.fixture(scope="module")
def merges(corpus: Path) -> list[tuple[bytes, bytes]]:
    """Return what the reference learns without a limit."""
    return train_bpe(corpus, 500, [EOT], engine="reference")[1]


@pytest.mark.parametrize("num_workers", [1, 3])
def test_compiled_training_gives_the_same_merges_under_a_limit(
    corpus: Path, merges: list[tuple[bytes, bytes]], monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    """Under a limit just above what the distinct words need, full tables are emptied, and nothing changes."""
    pytest.importorskip("numba")
    from transformerlm.tokenizer.fast import counter as counting_engine

    monkeypatch.setattr(reading, "CHUNK_BYTES", 20_000)
    added: list[int] = []
    add_words = counting_engine.add_words
    monkeypatch.setattr(counting_engine, "add_words", lambda table, words: (added.append(1), add_words(table, words)))
    found = train_bpe(corpus, 500, [EOT], engine="compiled", num_workers=num_workers, memory_limit_mb=11)[1]
    assert found == merges
    assert len(added) > 3 * (num_workers - 1)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_compiled_training_goes_on_in_files_beyond_the_limit(
    corpus: Path, merges: list[tuple[bytes, bytes]], monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    """Far below what the distinct words need, counting and learning use files, warn once, and nothing changes."""
    pytest.importorskip("numba")

    monkeypatch.setattr(reading, "CHUNK_BYTES", 20_000)
    made: list[int] = []
    pages_in_file = memory_limit._pages_in_file
    monkeypatch.setattr(memory_limit, "_pages_in_file", lambda size: (made.append(size), pages_in_file(size))[1])
    with pytest.warns(UserWarning, match="memory_limit_mb: .* training goes on in files in ") as told:
        found = train_bpe(corpus, 500, [EOT], engine="compiled", num_workers=num_workers, memory_limit_mb=1)[1]
    assert found == merges
    assert len([warning for warning in told if "memory_limit_mb" in str(warning.message)]) == 1
    assert sum(made) > 8e6


@pytest.mark.parametrize("fallocate", [True, False])
def test_a_disk_without_room_for_the_files_is_an_error(monkeypatch: pytest.MonkeyPatch, fallocate: bool) -> None:
    """The blocks are allocated before the pages are used: a full disk gives a line of error, not a signal."""
    if not fallocate:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    with (
        files_of_at_most(1 << 20),
        pytest.warns(match="goes on in files"),
        pytest.raises(OSError, match="training needs a file of 4 MB beyond"),
    ):
        memory_limit.Memory(1).zeros(1_000_000, np.uint32, in_all=4e6)


@pytest.mark.parametrize("in_all", [0, 4e6])
def test_pages_are_zeros_that_can_be_written(in_all: float) -> None:
    """Arrays are alike in memory and in a file, from no number at all to more than a huge page."""
    memory = memory_limit.Memory(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in (0, 3, 1 << 21):
            numbers = memory.zeros(number, np.int32, in_all=in_all)
            assert len(numbers) == number
            assert not numbers.any()
            numbers[:] = 7
            assert numbers.sum() == 7 * number


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").is_dir() or not Path("/proc/self/smaps").is_file(),
    reason="the system has no huge pages",
)
def test_large_arrays_ask_for_huge_pages() -> None:
    """The kernel has noted it (`hg`), and the pages are not shared (`sh`): those it would not make huge."""
    numbers = memory_limit.Memory().zeros(1 << 21, np.int32, in_all=0)
    is_here, flags = False, [""]
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            is_here = int(found[1], 16) <= numbers.ctypes.data < int(found[2], 16)
        elif is_here and line.startswith("VmFlags:"):
            flags = line.split()
    assert "hg" in flags
    assert "sh" not in flags


def test_words_that_need_more_are_refused_by_the_reference(corpus: Path) -> None:
    """The error names the key, what would be enough, and what was found."""
    with pytest.raises(ValueError, match=r"memory_limit_mb: expected at least \d+ for the [\d,]+ distinct words .*2"):
        train_bpe(corpus, 500, [EOT], engine="reference", memory_limit_mb=2)


def test_the_reference_learns_under_a_limit(tmp_path: Path) -> None:
    """With room for the distinct words, a limit changes nothing."""
    (tmp_path / "a.txt").write_text("low lower newest widest " * 20_000)
    assert train_bpe(tmp_path / "a.txt", 300, [], engine="reference", memory_limit_mb=1) == train_bpe(
        tmp_path / "a.txt", 300, [], engine="reference"
    )


def test_no_limit_refuses_nothing() -> None:
    """Without a limit any need is met, and a need that is the limit is within it."""
    check_memory_limit(None, 1e15, num_words=1)
    check_memory_limit(3, 3e6, num_words=1)
    with pytest.raises(
        ValueError, match=r"expected at least 4 for the 1,000 distinct words of the text so far, found 3 "
    ):
        check_memory_limit(3, 3e6 + 1, num_words=1000)
