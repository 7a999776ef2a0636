"""Behaviour of the cap on training's memory: the same merges under it, or one plain line."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from transformerlm.tokenizer import train_bpe
from transformerlm.tokenizer.memory_limit import check_memory_limit

EOT = "<|endoftext|>"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of 15,000 distinct words, each some times, in three documents."""
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
    from transformerlm.tokenizer import byte_chunks, compiled_counter

    monkeypatch.setattr(byte_chunks, "CHUNK_BYTES", 20_000)
    added: list[int] = []
    add_words = compiled_counter.add_words
    monkeypatch.setattr(compiled_counter, "add_words", lambda table, words: (added.append(1), add_words(table, words)))
    found = train_bpe(corpus, 500, [EOT], engine="compiled", num_workers=num_workers, memory_limit_mb=11)[1]
    assert found == merges
    assert len(added) > 3 * (num_workers - 1)


@pytest.mark.parametrize("engine", ["reference", "compiled"])
def test_words_that_need_more_are_refused_in_one_line(corpus: Path, engine: str) -> None:
    """The key, what would do, and what was found; the compiled engine needs less."""
    if engine == "compiled":
        pytest.importorskip("numba")
    with pytest.raises(ValueError, match=r"memory_limit_mb: expected at least \d+ for the [\d,]+ distinct words .*2"):
        train_bpe(corpus, 500, [EOT], engine=engine, memory_limit_mb=2)


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
