"""Behaviour of compiled counting: the reference's counts, wherever the text is cut, however little memory there is."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.tokenizer import plain_kernels
from tests.tokenizer.test_bpe_trainer import _sample_text
from transformerlm.tokenizer import reading, train_bpe
from transformerlm.tokenizer.counting import BatchCounter
from transformerlm.tokenizer.engines import COMPILED_PATTERNS
from transformerlm.tokenizer.pretokenize import SpecialTokenSplitter
from transformerlm.tokenizer.reading import Chunk, Texts
from transformerlm.utils.text_files import ReadStats

pytest.importorskip("numba")
from transformerlm.tokenizer.fast import byte_chunks
from transformerlm.tokenizer.fast import counter as counting_engine

EOT = "<|endoftext|>"
SPECIALS = [EOT, "<|end of text|>", "aab", "aba", "\n\n!", " \t", "é x"]
PARTS = [*"ab'.1 \n\t\r", "é", "漢字", "²", "\u3000", "'ll", "  ", "ab ", "\U0001f600", "\ufffd", *SPECIALS]
PLAIN = plain_kernels.load()


def _counts(counter: counting_engine.PieceCounter, chunks: Iterable[Chunk]) -> dict[bytes, int]:
    list(counter.count(chunks))
    words = counter.words()
    data, bounds = words.data.tobytes(), [0, *words.ends.tolist()]
    return {data[a:b]: n for a, b, n in zip(bounds, bounds[1:], words.counts.tolist(), strict=False)}


def _expected(text: str, specials: list[str], pattern: str = "gpt2") -> dict[bytes, int]:
    counts = BatchCounter(SpecialTokenSplitter(specials, pattern=pattern))(Texts([text], ordinary=False))
    return {word.encode(): count for word, count in counts.items()}


def _check_cuts(
    modules: tuple[ModuleType, ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    path: Path,
    rng: random.Random,
    *,
    length: int,
) -> None:
    """Count one random file, in tiny chunks; damage some of its bytes."""
    chunking, counting = modules
    data = bytearray("".join(rng.choices(PARTS, k=length)).encode())
    for _ in range(rng.choice([0, 0, 3])):
        data[rng.randrange(len(data))] = rng.choice([0xFF, 0xE2, 0x80, 0xF0])
    path.write_bytes(data)
    text = data.decode("utf-8", "replace")
    specials, pattern = rng.sample(SPECIALS, rng.randint(0, 4)), rng.choice(COMPILED_PATTERNS)
    monkeypatch.setattr(reading, "CHUNK_BYTES", rng.choice([1, 7, 40, 10_000]))
    monkeypatch.setattr(chunking, "_TAIL_BYTES", rng.choice([1, 5, 16]))
    counter = counting.PieceCounter(specials, pattern=pattern)
    chunks = list(chunking.read_chunks(path, SpecialTokenSplitter(specials, pattern=pattern), stats=ReadStats()))
    assert b"".join(chunk.data[: chunk.ends[-1]].tobytes() for chunk in chunks) == data
    assert _counts(counter, chunks) == _expected(text, specials, pattern)


@pytest.mark.parametrize("seed", range(10))
def test_counts_do_not_depend_on_where_bytes_are_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Files of blanks, marks, scripts, damaged bytes, and special tokens that overlap and hold blanks."""
    rng = random.Random(seed)
    for _ in range(16):
        _check_cuts((byte_chunks, counting_engine), monkeypatch, tmp_path / "a.txt", rng, length=rng.randint(1, 300))


def test_the_kernels_count_the_same_without_numba(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same source without numba counts the same, each array access checked, from tables that must grow at once."""
    modules = PLAIN["byte_chunks"], PLAIN["counter"]
    monkeypatch.setattr(modules[1], "_FIRST_SLOTS", 16)
    monkeypatch.setattr(modules[1], "TABLE_BYTES", 3000)
    rng = random.Random(0)
    with np.errstate(over="ignore"):
        for _ in range(4):
            _check_cuts(modules, monkeypatch, tmp_path / "a.txt", rng, length=150)


def test_reading_is_reported_as_the_reference_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers of bytes read and of invalid bytes are the same, from large files, small ones and JSON lines."""
    monkeypatch.setattr(reading, "CHUNK_BYTES", 500)
    (tmp_path / "a.txt").write_bytes(_sample_text(500).encode() + b"\xff\xe2\x82 \xef\xbf\xbd" * 90)
    (tmp_path / "b.txt").write_bytes(b"one \xf0\x9f")
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "two \\ud800"}\n')
    found = []
    for engine in ("reference", "compiled"):
        stats = ReadStats()
        trained = train_bpe([f"{tmp_path}/*"], 400, [EOT], engine=engine, stats=stats)
        found.append((trained, stats))
    assert found[0] == found[1]
    assert found[0][1].invalid_utf8 == 2 * 90 + 1 + 1


@pytest.mark.parametrize("num_threads", [1, 3])
def test_full_tables_are_added_up(monkeypatch: pytest.MonkeyPatch, num_threads: int) -> None:
    """With room for some hundred pieces a thread, tables are emptied again and again, and no count is lost."""
    monkeypatch.setattr(counting_engine, "_FIRST_SLOTS", 16)
    monkeypatch.setattr(counting_engine, "TABLE_BYTES", 30_000)
    added: list[int] = []
    add_words = counting_engine.add_words
    monkeypatch.setattr(
        counting_engine, "add_words", lambda table, words: (added.append(len(words.ends)), add_words(table, words))
    )
    rng = random.Random(1)
    texts = [
        " ".join(f"w{int(rng.expovariate(1e-3))}{'x' * rng.choice([0, 20])}" for _ in range(300)) for _ in "ab" * 40
    ]
    counter = counting_engine.PieceCounter([], pattern="gpt2", num_threads=num_threads)
    found = _counts(counter, [byte_chunks.chunk_of([text]) for text in texts])
    assert found == sum((Counter(_expected(text, [])) for text in texts), Counter())
    assert len(added) > 10


def test_a_piece_longer_than_a_threads_share_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece is counted however small a thread's share of the memory is."""
    monkeypatch.setattr(counting_engine, "TABLE_BYTES", 100)
    counter = counting_engine.PieceCounter([], pattern="gpt2")
    text = "a" * 40_000 + " b " + "c" * 50_000
    assert _counts(counter, [byte_chunks.chunk_of([text] * 3)]) == {
        word: 3 * count for word, count in _expected(text, []).items()
    }
