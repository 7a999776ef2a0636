"""Behaviour of training from files: ids, inputs of all kinds, reports, and errors."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tests.pace import cost
from tests.utils.packed import write_parquet, zstd
from transformerlm.tokenizer import reading
from transformerlm.tokenizer.bpe_trainer import train_bpe
from transformerlm.tokenizer.engines import Engine
from transformerlm.utils.text_files import ReadStats

EOT = "<|endoftext|>"


def _merges_of(text: str, tmp_path: Path, *, num_merges: int = 50, specials: tuple[str, ...] = (EOT,)) -> list:
    (tmp_path / "corpus.txt").write_bytes(text.encode())
    return train_bpe(tmp_path / "corpus.txt", 256 + len(specials) + num_merges, specials)[1]


def _sample_text(num_words: int, seed: int = 0) -> str:
    """Return text with repeated words, blanks of all kinds, marks, non-ASCII letters and separators."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdeé漢", k=rng.randint(1, 9))) for _ in range(300)] + [
        "it's",
        "42",
        "--",
        "\n\n",
        "  ",
    ]
    return "".join(rng.choices(words, k=1)[0] + rng.choice([" ", " ", "\n", "", EOT]) for _ in range(num_words))


def test_ids_are_bytes_then_merges_then_special_tokens(tmp_path: Path) -> None:
    """The order of the vocabulary is fixed, and `vocab_size` counts all three."""
    (tmp_path / "a.txt").write_text("low lower newest widest low low" + EOT)
    vocab, merges = train_bpe(tmp_path / "a.txt", 262, [EOT, "<|pad|>"])
    assert list(vocab) == list(range(262))
    assert [vocab[value] for value in range(256)] == [bytes([value]) for value in range(256)]
    assert [vocab[256 + rank] for rank in range(4)] == [left + right for left, right in merges]
    assert (vocab[260], vocab[261]) == (EOT.encode(), b"<|pad|>")


def test_a_small_text_gives_a_smaller_vocabulary(tmp_path: Path) -> None:
    """When no pair is left the training ends."""
    assert _merges_of("ab", tmp_path, num_merges=1000) == [(b"a", b"b")]


def test_special_tokens_are_neither_counted_nor_merged_across(tmp_path: Path) -> None:
    """The text before and the text after a special token are two words, and its own letters do not count."""
    assert _merges_of(f"ab{EOT}cd{EOT}" * 50, tmp_path) == [(b"c", b"d"), (b"a", b"b")]
    assert (b"|", b">") in _merges_of(f"ab{EOT}cd{EOT}" * 50, tmp_path, specials=())


def test_pre_tokens_keep_words_apart(tmp_path: Path) -> None:
    """No merge crosses a space, a line end or the edge between letters and digits."""
    tokens = {left + right for left, right in _merges_of("to be 42be\r\nto be\n" * 30, tmp_path)}
    assert tokens == {b"to", b" be", b" b", b"be", b"42", b" 42", b"\r\n"} & tokens
    assert b" be" in tokens


def test_several_inputs_of_all_kinds(tmp_path: Path) -> None:
    """Globs and JSON lines count like the same text in one file with separators between."""
    (tmp_path / "a.txt").write_text("one two")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"body": body}) + "\n" for body in ("two three", "three")))
    (tmp_path / "c.txt").write_text(EOT.join(["one two", "two three", "three"]))
    together = train_bpe([f"{tmp_path}/a.*", tmp_path / "b.jsonl"], 300, [EOT], text_field="body")
    assert together == train_bpe(tmp_path / "c.txt", 300, [EOT])


def test_packed_files_never_count_as_the_bytes_that_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled engine reads large plain files as bytes; a packed file is unpacked first, however large it is."""
    pytest.importorskip("numba")
    monkeypatch.setattr(reading, "CHUNK_BYTES", 1)
    text = "one two three four\n" * 50
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "a.txt.zst").write_bytes(zstd(text.encode()))
    write_parquet(tmp_path / "a.parquet", {"text": [text]})
    expected = train_bpe(tmp_path / "a.txt", 280, [EOT], engine="compiled", num_workers=1)
    for name in ("a.txt.zst", "a.parquet"):
        assert train_bpe(tmp_path / name, 280, [EOT], engine="compiled", num_workers=1) == expected


def test_no_word_crosses_from_file_to_file(tmp_path: Path) -> None:
    """The end of a file is the end of a word."""
    (tmp_path / "a.txt").write_text("xa")
    (tmp_path / "b.txt").write_text("bx")
    assert (b"a", b"b") not in train_bpe([tmp_path / "a.txt", tmp_path / "b.txt"], 300, [])[1]


def test_line_ends_are_not_translated(tmp_path: Path) -> None:
    """CRLF is two bytes of the text and can become a token."""
    assert (b"\r", b"\n") in _merges_of("a\r\nb\r\n" * 20, tmp_path)


def test_progress_and_invalid_bytes_are_reported(tmp_path: Path) -> None:
    """The callback sees both stages to their end; invalid bytes are counted."""
    (tmp_path / "a.txt").write_bytes(_sample_text(2000).encode() + b"\xff\xfe")
    reports: list[tuple[str, int, int]] = []
    stats = ReadStats()
    train_bpe(tmp_path / "a.txt", 400, [EOT], progress=lambda *report: reports.append(report), stats=stats)
    size = (tmp_path / "a.txt").stat().st_size
    assert stats.invalid_utf8 == 2
    assert ("count", size, size) in reports
    assert reports[-1] == ("merge", 143, 143)


@pytest.mark.parametrize(
    ("vocab_size", "specials", "message"),
    [
        (256, [EOT], r"vocab_size: expected at least 257 \(256 bytes and 1 special tokens\), found 256"),
        (300, [EOT, EOT], "special_tokens: expected each once"),
        (
            300,
            [EOT, "§"],
            r"special_tokens: expected tokens that vocab.json can tell .* found '§', .* the bytes b'\\xa7'",
        ),
        (300, ["Ġthe"], r"found 'Ġthe', which is how it writes the bytes b' the' \(choose ASCII characters\)"),
        (300, ["Ã©"], "found 'Ã©'"),
        (300, ["ñ"], "found 'ñ'"),
        (300, ["a"], "expected two bytes or more, found 'a'"),
        (300, [""], "expected non-empty"),
        (
            20_000,
            [f"<|{number}|>" for number in range(10_001)],
            "special_tokens: expected 10,000 in a tokenizer at most, found 10,001",
        ),
    ],
)
def test_requests_that_cannot_be_met_are_refused(
    tmp_path: Path, vocab_size: int, specials: list[str], message: str
) -> None:
    """Each error says what was expected and what was found."""
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=message):
        train_bpe(tmp_path / "a.txt", vocab_size, specials)


@pytest.mark.parametrize("text", ["", EOT * 3])
def test_inputs_without_text_are_refused(tmp_path: Path, text: str) -> None:
    """A tokenizer trained on nothing would be a mistake that nobody notices."""
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(ValueError, match=r"expected text to train on, found none in .*a\.txt"):
        train_bpe(tmp_path / "a.txt", 300, [EOT])


def test_a_small_corpus_trains_at_once(tmp_path: Path) -> None:
    """133 kB at 500 tokens take far less than the course's limit of 1.5 s."""
    (tmp_path / "a.txt").write_text(_sample_text(22_000)[:133_000])
    assert cost(lambda: train_bpe(tmp_path / "a.txt", 500, [EOT])) < 1.5


@pytest.mark.parametrize("engine", ["reference", "compiled"])
def test_rows_are_plain_text_in_training_unless_special_tokens_are_allowed(tmp_path: Path, engine: Engine) -> None:
    """A special token that a row spells is counted like any text; in a text file it cuts."""
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": f"ab{EOT}cd " * 50}) + "\n")
    (tmp_path / "a.txt").write_text(f"ab{EOT}cd " * 50)
    merges = {
        (name, allow): train_bpe(tmp_path / name, 290, [EOT], engine=engine, allow_special=allow)[1]
        for name in ("a.jsonl", "a.txt")
        for allow in (False, True)
    }
    assert (b"|", b">") in merges["a.jsonl", False]
    assert merges["a.jsonl", True] == merges["a.txt", True] == merges["a.txt", False]
    assert (b"|", b">") not in merges["a.txt", True]


@pytest.mark.parametrize("engine", ["reference", "compiled"])
def test_a_special_token_that_the_text_makes_by_itself_is_named(tmp_path: Path, engine: Engine) -> None:
    """Two ids would have its bytes; the error says what to do."""
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "### a\n" * 50}) + "\n")
    with pytest.raises(ValueError, match=r"special_tokens: expected tokens that the text does not make .* found '###'"):
        train_bpe(tmp_path / "a.jsonl", 290, [EOT, "###"], engine=engine)


def test_a_sample_of_the_text_is_kept_while_it_is_read(tmp_path: Path) -> None:
    """Both engines keep the beginning of the text, so that nobody needs to open a pipe a second time."""
    (tmp_path / "a.txt").write_text("one two three " * 30_000)
    for engine in ("reference", "compiled"):
        stats = ReadStats(sample_chars=1000)
        train_bpe(tmp_path / "a.txt", 260, [], engine=engine, stats=stats)
        assert "".join(stats.sample) == ("one two three " * 100)[:1000]
