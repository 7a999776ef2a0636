"""Where plain text may be cut for counting, and which documents a sample takes."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from pathlib import Path

import pytest

from tests.utils.packed import write_parquet
from tests.utils.test_text_parts import EOT, OVERLAPS, PIECES
from transformerlm.tokenizer import pretokenize, reading
from transformerlm.tokenizer.bpe_trainer import train_bpe
from transformerlm.tokenizer.counting import BatchCounter, count_pre_tokens
from transformerlm.tokenizer.pretokenize import PATTERNS, SpecialTokenSplitter
from transformerlm.tokenizer.reading import DocumentSample, SafeCuts, Texts
from transformerlm.utils.text_files import ReadStats
from transformerlm.utils.text_parts import TextPart, find_parts


@pytest.mark.parametrize("pattern", list(PATTERNS))
def test_safe_cuts_keep_the_pre_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str) -> None:
    """The counts of the two sides of the cut found from each byte add up to the whole's, with any special tokens."""
    monkeypatch.setattr("transformerlm.tokenizer.reading._WINDOW_BYTES", 4)
    rng = random.Random(pattern)
    path = tmp_path / "a.txt"
    for _ in range(40):
        data = b"".join(rng.choices(PIECES, k=rng.randint(1, 14)))
        path.write_bytes(data)
        splitter = SpecialTokenSplitter(rng.sample([EOT, *OVERLAPS, "a", " "], rng.randint(0, 4)), pattern=pattern)
        count, find_cut = BatchCounter(splitter), SafeCuts(splitter)
        text = data.decode("utf-8", "replace")
        with path.open("rb") as file:
            for cut in {find_cut(file, at) for at in range(1, len(data) + 1)}:
                sides = [data[:cut].decode("utf-8", "replace"), data[cut:].decode("utf-8", "replace")]
                assert "".join(sides) == text
                assert Counter(count(Texts(sides, ordinary=False))) == count(Texts([text], ordinary=False))


def test_a_safe_cut_is_near(tmp_path: Path) -> None:
    """In prose a part is at most a few kilobytes longer than asked for; without a place to cut it is the file."""
    path = tmp_path / "a.txt"
    path.write_text("some words and more of them\n" * 3000)
    sizes = [
        part.num_bytes for part in find_parts([path], part_bytes=10_000, find_cut=SafeCuts(SpecialTokenSplitter([EOT])))
    ]
    assert len(sizes) > 5
    assert max(sizes) < 20_000
    path.write_text("a" * 84_000)
    assert find_parts([path], part_bytes=10_000, find_cut=SafeCuts(SpecialTokenSplitter([EOT]))) == [
        TextPart(str(path), "bytes", 0, 84_000, 84_000)
    ]


@pytest.mark.parametrize("character", ["a", "\U00010348", " "])
def test_a_run_that_is_too_long_is_refused_before_it_is_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, character: str
) -> None:
    """Gigabytes without a place to cut are not held in memory; the error is the one that reading them gives."""
    monkeypatch.setattr(pretokenize, "MAX_UNCUT_CHARS", 10_000)
    path = tmp_path / "a.txt"
    path.write_text(character * 200_000, encoding="utf-8")
    with path.open("rb") as file:
        with pytest.raises(ValueError, match=r"a\.txt: expected (words of at most|at most) 10,000 characters"):
            SafeCuts(SpecialTokenSplitter([EOT]))(file, 20_000)
        assert file.tell() < 70_000


def test_no_more_is_read_of_bytes_that_are_no_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have no place to cut, however many there are."""
    monkeypatch.setattr(pretokenize, "MAX_UNCUT_CHARS", 10_000)
    path = tmp_path / "a.txt"
    path.write_bytes(b"\x80" * 200_000)
    with path.open("rb") as file:
        assert SafeCuts(SpecialTokenSplitter([EOT]))(file, 20_000) == 200_000
        assert file.tell() < 70_000


def _documents(number: int) -> list[str]:
    rng = random.Random(number)
    return [" ".join(f"w{rng.randrange(500)}" for _ in range(rng.randint(1, 30))) for _ in range(number)]


def _is_in(document: str, fraction: float) -> bool:
    """Return whether the rule takes a document, written down once more: a hash times the golden ratio, modulo 1."""
    number = int.from_bytes(hashlib.blake2b(document[: reading.KEY_CHARS].encode(), digest_size=8).digest(), "little")
    return number * 0x9E3779B97F4A7C15 % 2**64 < fraction * 2**64


@pytest.mark.parametrize("key_chars", [7, 1 << 16])
@pytest.mark.parametrize("fraction", [0.1, 0.7])
def test_a_sample_is_the_documents_that_the_rule_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fraction: float, key_chars: int
) -> None:
    """In every format, with any block edges: what is counted is the chosen documents, and nothing of the others."""
    monkeypatch.setattr(reading, "KEY_CHARS", key_chars)
    monkeypatch.setattr("transformerlm.utils.text_files.BLOCK_BYTES", 50)
    documents = [*_documents(300), " \n", ""]
    (tmp_path / "a.txt").write_text(EOT.join(documents))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    write_parquet(tmp_path / "c.parquet", {"text": documents})
    chosen = [text for text in documents[:300] if _is_in(text, fraction)]
    expected = BatchCounter(SpecialTokenSplitter([EOT]))(Texts(chosen, ordinary=False))
    for path in sorted(tmp_path.iterdir()):
        for size in (1, 1 << 20):
            monkeypatch.setattr(reading, "CHUNK_CHARS", size)
            stats = ReadStats()
            counts = count_pre_tokens([path], [EOT], sample=DocumentSample(fraction, EOT), stats=stats)
            assert counts == {word.encode(): count for word, count in expected.items()}
            assert (stats.documents, stats.chosen_documents) == (300, len(chosen))


def test_a_sample_is_about_the_fraction() -> None:
    """Of 5,000 documents, a quarter within three standard deviations; a larger fraction has those of a smaller one."""
    documents = _documents(5000)
    quarter, half = ([text for text in documents if DocumentSample(part, EOT)._is_chosen(text)] for part in (0.25, 0.5))
    assert abs(len(quarter) - 1250) < 3 * (5000 * 0.25 * 0.75) ** 0.5
    assert set(quarter) < set(half)


def test_text_without_a_separator_is_one_document(tmp_path: Path) -> None:
    """A file is in the sample or not, as a whole; the same holds for special tokens that are spelled in rows."""
    (tmp_path / "a.txt").write_text("one two three\n\n" * 5000)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": f"one{EOT}two"}) + "\n")
    for name in ("a.txt", "b.jsonl"):
        for fraction in (1e-9, 1 - 1e-9):
            stats = ReadStats()
            counts = count_pre_tokens([tmp_path / name], [EOT], sample=DocumentSample(fraction, EOT), stats=stats)
            assert (stats.documents, stats.chosen_documents, bool(counts)) == (1, fraction > 0.5, fraction > 0.5)
    stats = ReadStats()
    sample = DocumentSample(1 - 1e-9, EOT)
    count_pre_tokens([tmp_path / "b.jsonl"], [EOT], sample=sample, stats=stats, allow_special=True)
    assert stats.chosen_documents == 2


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0, 2.0, float("nan")])
def test_a_fraction_is_between_none_and_all(tmp_path: Path, fraction: float) -> None:
    """All text is meant by leaving `sample` out."""
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match="sample: expected a fraction above 0 and below 1"):
        train_bpe(tmp_path / "a.txt", 300, [EOT], sample=fraction)
