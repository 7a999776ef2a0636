"""Behaviour of compiled training: the reference's merges, list-equal, whatever the text, the counts or the threads."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.tokenizer import plain_kernels
from tests.tokenizer.test_bpe_trainer import _sample_text
from transformerlm.tokenizer import bpe, io, pair_table, reading, train_bpe
from transformerlm.tokenizer.counting import count_pre_tokens
from transformerlm.tokenizer.engines import COMPILED_PATTERNS
from transformerlm.tokenizer.memory_limit import Memory

pytest.importorskip("numba")
from transformerlm.tokenizer.fast import byte_chunks, learner
from transformerlm.tokenizer.fast import counter as counting_engine
from transformerlm.tokenizer.fast import train_kernels as train_kernels
from transformerlm.tokenizer.fast.arrays import padded

EOT = "<|endoftext|>"
ALPHABETS = [b"a", b"ab", b"abc", b"a\xff\x00", bytes(range(256))]
PLAIN = plain_kernels.load()["learner"]


def _words(counts: Counter[bytes], limit_mb: float | None = None) -> counting_engine.Words:
    ends = np.cumsum([len(word) for word in counts], dtype=np.int64)
    values = np.array([*counts.values()], np.uint64)
    return counting_engine.Words(padded(b"".join(counts)), ends, values, Memory(limit_mb))


def _random_words(rng: random.Random) -> Counter[bytes]:
    alphabet = rng.choice(ALPHABETS)
    words = Counter(bytes(rng.choices(alphabet, k=rng.randint(1, 40))) for _ in range(rng.randint(1, 40)))
    return Counter({word: count * rng.choice([1, 1, 2, 70_000, 1 << 33]) for word, count in words.items()})


@pytest.mark.parametrize("seed", range(20))
def test_merges_are_those_of_the_reference(seed: int) -> None:
    """Tiny alphabets with many ties and overlaps, and counts on both sides of what the lists hold and of 2^32."""
    rng = random.Random(seed)
    for _ in range(16):
        words = _random_words(rng)
        assert learner.learn_merges(_words(words), 100) == pair_table.learn_merges(words, 100)


@pytest.mark.parametrize("seed", range(5))
def test_the_kernels_as_plain_python_learn_what_the_definition_says(seed: int) -> None:
    """The same source without numba, each array access checked, against the definition."""
    rng = random.Random(seed)
    with np.errstate(over="ignore"):
        for _ in range(4):
            words = Counter(dict(list(_random_words(rng).items())[:10]))
            assert PLAIN.learn_merges(_words(words), 30) == bpe.learn(words, 30)


def test_counts_beyond_32_bits_stay_right() -> None:
    """A pair that occurs 2^33 times beats one that occurs 2^33 - 1 times."""
    words = Counter({b"ab": 2**33 - 1, b"cd": 2**33, b"zz": 2**32 + 1})
    assert learner.learn_merges(_words(words), 3) == [(b"c", b"d"), (b"a", b"b"), (b"z", b"z")]
    table = counting_engine.PieceCounts()
    for _ in range(3):
        counting_engine.add_words(table, _words(words))
    listed = counting_engine.list_words(table)
    assert sorted(listed.counts.tolist()) == sorted(3 * count for count in words.values())


def test_room_is_made_for_pairs_and_long_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Learning begins with arrays that are far too small, and goes on where it stopped when they have grown."""
    monkeypatch.setattr(learner, "_FIRST_PAIRS", 1 << 16)
    grown: list[int] = []
    index = train_kernels.index_pairs
    monkeypatch.setattr(
        train_kernels, "index_pairs", lambda pairs, number: (grown.append(len(pairs.rows)), index(pairs, number))
    )
    rng = random.Random(3)
    words = Counter(bytes(rng.choices(range(256), k=30)) for _ in range(6000))
    words[b"ab" * 40_000] = 7
    assert learner.learn_merges(_words(words), 700) == pair_table.learn_merges(words, 700)
    assert grown == [1 << 17]


@pytest.mark.parametrize("pattern", COMPILED_PATTERNS)
@pytest.mark.parametrize("num_workers", [1, 2])
def test_files_give_the_references_merges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int, pattern: str
) -> None:
    """The merges are equal for text in chunks, on threads, with separators between."""
    monkeypatch.setattr(reading, "CHUNK_CHARS", 3000)
    monkeypatch.setattr(reading, "CHUNK_BYTES", 3000)
    (tmp_path / "a.txt").write_bytes(_sample_text(20_000).encode() + b"\xff" + b"x" * 300)
    (tmp_path / "b.txt").write_bytes(_sample_text(2000, seed=1).encode())
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    reports: list[tuple[str, int, int]] = []
    results = [
        train_bpe(
            paths, 800, [EOT], num_workers=num_workers, pattern=pattern, engine=engine,
            progress=lambda *now: reports.append(now),
        )
        for engine in ("reference", "compiled")
    ]  # fmt: skip
    assert results[0] == results[1]
    assert reports[-1] == ("merge", 543, 543)


def test_counts_are_those_of_the_reference(tmp_path: Path) -> None:
    """Counts are equal for short pieces and for long ones that begin alike, from batches on three threads."""
    text = (_sample_text(3000) + " " + "漢字" * 30 + " " + "漢字" * 29 + "x" + EOT) * 4
    (tmp_path / "a.txt").write_bytes(text.encode())
    counter = counting_engine.PieceCounter([EOT], pattern="gpt2", num_threads=3)
    list(counter.count(byte_chunks.chunk_of([part]) for part in text.split(EOT)))
    words = counter.words()
    data, bounds = words.data.tobytes(), [0, *words.ends.tolist()]
    found = {data[a:b]: n for a, b, n in zip(bounds, bounds[1:], words.counts.tolist(), strict=False)}
    assert found == count_pre_tokens([tmp_path / "a.txt"], [EOT], num_workers=1)


def test_text_without_a_pair_and_no_text(tmp_path: Path) -> None:
    """One byte makes no merge; nothing at all is an error, as in the reference."""
    (tmp_path / "a.txt").write_bytes(b"a")
    assert train_bpe(tmp_path / "a.txt", 300, [], engine="compiled")[1] == []
    (tmp_path / "b.txt").write_bytes(b"")
    with pytest.raises(ValueError, match="expected text to train on"):
        train_bpe(tmp_path / "b.txt", 300, [], engine="compiled")


def test_more_words_than_places_can_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line says how much is allowed and how much there is; the test lowers the bound."""
    monkeypatch.setattr(learner, "MAX_SLOTS", 1 << 27)
    words = counting_engine.Words(np.zeros(0, np.uint8), np.array([1 << 28]), np.array([1], np.uint64))
    with pytest.raises(ValueError, match=r"less than 0.1 GB in all, found 0.3 GB \(sample = 0.25, say"):
        learner.learn_merges(words, 3)


@pytest.mark.parametrize(
    "word", [bytes(random.Random(0).choices(b"abcdefgh", k=3000)), b"ab" * 40_000], ids=["random", "repeated"]
)
def test_tokens_that_no_file_could_hold_are_refused(monkeypatch: pytest.MonkeyPatch, word: bytes) -> None:
    """Both engines learn what just fits the limit of a file, and stop with one error at the first merge beyond it."""
    words = Counter({word: 1})
    expected = pair_table.learn_merges(words, 14)
    assert len(expected) == 14
    size = 256 + sum(len(left) + len(right) for left, right in expected)
    monkeypatch.setattr(io, "MAX_FILE_BYTES", size)
    assert learner.learn_merges(_words(words), 14) == pair_table.learn_merges(words, 14) == expected
    monkeypatch.setattr(io, "MAX_FILE_BYTES", size - 1)
    message = (
        rf"input: expected tokens of at most {size - 1:,} bytes in all, .* found more after 13 merges \(a long run"
    )
    with pytest.raises(ValueError, match=message):
        learner.learn_merges(_words(words), 14)
    with pytest.raises(ValueError, match=message):
        pair_table.learn_merges(words, 14)


def test_tables_for_more_pairs_go_to_files_under_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is checked again when learning asks for more: what fits at first goes on in files later."""
    monkeypatch.setattr(learner, "_FIRST_PAIRS", 1 << 16)
    rng = random.Random(3)
    words = Counter(bytes(rng.choices(range(256), k=30)) for _ in range(6000))
    expected = learner.learn_merges(_words(words), 700)
    assert learner.learn_merges(_words(words, 30), 700) == expected
    with pytest.warns(UserWarning, match="the distinct words need 11 MB or more, the limit is 8; training goes on in"):
        assert learner.learn_merges(_words(words, 8), 700) == expected
