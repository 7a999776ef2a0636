"""Any text, cut anywhere, in any amount: nothing is lost, nothing changes, and little is held."""

from __future__ import annotations

import gzip
import json
import random
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from databuilder import encoding
from databuilder.dataset_builder import build_dataset
from tests.cli.commands import Outcome, call
from tests.utils.packed import write_parquet, zstd
from transformerlm.tokenizer import Tokenizer, engines, reading, train_bpe
from transformerlm.tokenizer.pair_table import learn_merges
from transformerlm.utils import text_files

END = "<|endoftext|>"
EDGES = f"a\r\né{END}漢\r\n\r\n🍎 it'll  {END}{END}<|end \tx\u0301\u2028 12345"
MERGES = learn_merges({word.encode(): 9 for word in (" the", "\r\n", "漢", "🍎", " it", "'ll", "é", "aaaa")}, 30)
ENGINES = ["reference", "compiled"]
each_engine = pytest.mark.parametrize("engine", ENGINES)


@pytest.fixture(autouse=True)
def _numba(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "engine" in request.fixturenames and request.getfixturevalue("engine") == "compiled":
        pytest.importorskip("numba")
        monkeypatch.setattr(engines, "CALL_CHARS", 0)  # short texts, too, are for the kernels
        monkeypatch.setattr(engines, "CALL_IDS", 0)


def make_tokenizer(engine: str, pattern: str = "gpt2") -> Tokenizer:
    """Return a small tokenizer on an engine."""
    tokens = [bytes([value]) for value in range(256)] + [left + right for left, right in MERGES]
    return Tokenizer(dict(enumerate(tokens)), MERGES, [END], pattern=pattern, engine=engine)  # type: ignore[arg-type]


@each_engine
@pytest.mark.parametrize("pattern", ["gpt2", "cl100k"])
def test_every_unicode_scalar_comes_back(engine, pattern):
    """All 1,112,064 characters, in one text and each on a line, decode to what was encoded."""
    scalars = "".join(map(chr, (*range(0xD800), *range(0xE000, 0x110000))))
    assert len(scalars) == 1_112_064
    tokenizer = make_tokenizer(engine, pattern)
    for text in (scalars, "\n".join(scalars[:: 1 if engine == "compiled" else 7])):
        assert tokenizer.decode_bytes(tokenizer.encode_to_array(text)) == text.encode()


@each_engine
def test_any_bytes_come_back(engine):
    """Ids of arbitrary bytes give these bytes, and text is what its bytes are, however they were decoded."""
    tokenizer, rng = make_tokenizer(engine), random.Random(0)
    for length in (0, 1, 2, 255, 5_000):
        data = rng.randbytes(length)
        ids = np.array([tokenizer._vocabulary.byte_ids[value] for value in data], dtype=np.uint16)
        assert tokenizer.decode_bytes(ids) == data
        text = data.decode("utf-8", "replace")
        assert tokenizer.decode(tokenizer.encode(text)) == text
        text = data.decode("latin-1")
        assert tokenizer.decode_bytes(tokenizer.encode(text)).decode().encode("latin-1") == data


@each_engine
@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".jsonl", ".jsonl.zst", ".parquet"])
def test_a_blocks_edge_anywhere_changes_no_token_file(engine, suffix, tmp_path, monkeypatch):
    """Special tokens, line ends and characters of several bytes may lie across any edge of what is read at once."""
    tokenizer, source = make_tokenizer(engine), write_text(tmp_path / f"in{suffix}", EDGES)
    expected = None
    for size in (1 << 20, *range(1, 8), 11, 13, 17, 19, 23):
        monkeypatch.setattr(text_files, "BLOCK_BYTES", size)
        monkeypatch.setattr(encoding, "BATCH_CHARS", size)
        build_dataset(source, tokenizer=tokenizer, train_path=tmp_path / "out.npy", overwrite=True, num_workers=1)
        ids = np.load(tmp_path / "out.npy").tolist()
        expected = expected or ids
        assert ids == expected, size
    assert tokenizer.decode(expected).replace(END, "") == EDGES.replace(END, "")


@each_engine
@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".jsonl"])
def test_a_blocks_edge_anywhere_changes_no_merge(engine, suffix, tmp_path, monkeypatch):
    """Training sees the same text whatever is read, and counted, at once."""
    source = write_text(tmp_path / f"in{suffix}", EDGES * 3)
    expected = None
    for size in (1 << 20, *range(1, 8), 11, 13, 17, 19, 23):
        monkeypatch.setattr(text_files, "BLOCK_BYTES", size)
        monkeypatch.setattr(reading, "CHUNK_CHARS", size)
        _, merges = train_bpe(source, 300, [END], num_workers=1, engine=engine)
        expected = expected or merges
        assert merges == expected, size
    assert expected


def write_text(path: Path, text: str) -> Path:
    """Write a text as its name says: plain, compressed, or as a JSON line."""
    if path.suffix == ".parquet":
        return write_parquet(path, {"text": [text]})
    line = json.dumps({"text": text}) if ".jsonl" in path.name else text
    path.write_bytes({".gz": gzip.compress, ".zst": zstd}.get(path.suffix, bytes)(line.encode()))
    return path


@each_engine
def test_encoding_a_stream_grows_by_less_than_a_megabyte(engine):
    """Of a stream of 2 MB, in parts of all sizes, less than 1 MB is held at any time."""
    tokenizer, rng = make_tokenizer(engine), random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(1, 9))) for _ in range(500)]

    def parts(num_bytes: int) -> Iterator[str]:
        while num_bytes > 0:
            part = " ".join(rng.choices(words, k=rng.choice([1, 50, 2_000])))
            num_bytes -= len(part)
            yield part

    consume = lambda num_bytes: sum(1 for _ in tokenizer.encode_iterable(parts(num_bytes)))  # noqa: E731
    consume(200_000)  # what is made once: the cache of words, the compiled engine's tables
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        assert consume(2_000_000) > 500_000
        assert tracemalloc.get_traced_memory()[1] - before < 1_000_000
    finally:
        tracemalloc.stop()


# --- texts that are odd -------------------------------------------------------------------------------------------

ODD = {
    "one document": b"one document without any separator. " * 50,
    "one long word": b"ab" * 50_000,
    "one character": b"a",
    "NUL": b"a text with NUL\0 here and there. " * 30,
    "blanks and a letter": b" \n" * 500 + b"x",
    "no UTF-8": b"\xff and \xfea\xc3\xc3\xa9 \xf0\x9f\x8d in a text. " * 20,
}


@each_engine
@pytest.mark.parametrize("name", ODD)
def test_training_survives_odd_texts(name, engine, tmp_path):
    """A tokenizer comes of one document, one long word, one character, or bytes that are no text."""
    (tmp_path / "odd.txt").write_bytes(ODD[name])
    outcome = train(tmp_path, engine)
    assert outcome.code == 0, outcome.stderr
    tokenizer = Tokenizer.from_directory(tmp_path / "tokenizer", engine=engine)
    text = ODD[name].decode("utf-8", "replace")
    assert tokenizer.decode(tokenizer.encode(text)) == text


def train(home: Path, engine: str, *options: str) -> Outcome:
    """Train a tokenizer on `odd.txt`."""
    arguments = [f"--input={home / 'odd.txt'}", f"--output_dir={home / 'tokenizer'}", f"--tokenizer.engine={engine}"]
    return call("train_tokenizer", *arguments, "--tokenizer.vocab_size=300", *options)


@each_engine
@pytest.mark.parametrize("content", [b"", b"\n \n", END.encode() * 3], ids=["empty", "blank", "separators"])
def test_a_text_without_text_is_refused(content, engine, tmp_path):
    """There is nothing to learn or to encode: one line says so. Blanks are learned from, and make no document."""
    (tmp_path / "odd.txt").write_bytes(content)
    outcome = train(tmp_path, engine)
    assert outcome.code == (0 if content.isspace() else 2)
    make_tokenizer(engine).save(tmp_path / "tokenizer")
    data = make_data(tmp_path, engine)
    assert data.code == 2
    assert "expected text, found none in" in data.stderr.splitlines()[-1]


def make_data(home: Path, engine: str, *options: str) -> Outcome:
    """Make a token file of `odd.txt`."""
    arguments = [f"--input={home / 'odd.txt'}", f"--tokenizer={home / 'tokenizer'}", f"--train={home / 'out.npy'}"]
    return call("make_data", *arguments, f"--engine={engine}", *options)


@each_engine
def test_bytes_that_are_no_text_are_replaced_and_counted_or_refused(engine, tmp_path):
    """By default U+FFFD stands for them, and stderr, the log and the sidecar say how often; else they are refused."""
    (tmp_path / "odd.txt").write_bytes(ODD["no UTF-8"])
    count = ODD["no UTF-8"].decode("utf-8", "replace").count("\ufffd")
    trained, made = train(tmp_path, engine), make_data(tmp_path, engine)
    for outcome in (trained, made):
        assert f"U+FFFD was read {count} times in place of other bytes" in outcome.stderr
        assert outcome.records[-1]["invalid_utf8"] == count
    assert json.loads((tmp_path / "out.json").read_text())["invalid_utf8"] == count
    for command in (train, make_data):
        outcome = command(tmp_path, engine, "--overwrite", "--invalid_utf8=refuse")
        assert outcome.code == 2
        assert "odd.txt: expected UTF-8, found byte 0xff at offset 0" in outcome.stderr


@pytest.mark.parametrize("block", [1, 2, 3, 5, 1 << 20])
def test_a_refusal_names_the_offset_of_the_first_bad_byte(block, tmp_path, monkeypatch):
    """Whatever is read at once, the offset is that in the file."""
    monkeypatch.setattr(text_files, "BLOCK_BYTES", block)
    (tmp_path / "odd.txt").write_bytes("é漢🍎ab".encode() + b"\xf0\x9f\x8dz")
    with pytest.raises(ValueError, match="found byte 0xf0 at offset 11 "):
        list(text_files.read_text(tmp_path / "odd.txt", stats=text_files.ReadStats(refuse_invalid=True)))


# --- damage -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "special_tokens.json"])
def test_a_changed_byte_of_a_tokenizer_is_noticed(name, tmp_path):
    """A flipped bit, a zeroed stretch or a cut in any file is refused, or has left the tokenizer what it was."""
    tokenizer = make_tokenizer("reference")
    tokenizer.save(tmp_path)
    path, rng = tmp_path / name, random.Random(0)
    original = path.read_bytes()
    places = range(0, len(original), max(1, len(original) // 150))
    damaged = [flip(original, place, 1 << rng.randrange(8)) for place in places]
    damaged += [original[:place] + bytes(16) + original[place + 16 :] for place in list(places)[:-1:10]]
    damaged += [original[:place] for place in list(places)[::10]]
    for content in damaged:
        path.write_bytes(content)
        with suppress(ValueError):
            assert Tokenizer.from_directory(tmp_path).fingerprint() == tokenizer.fingerprint()


def flip(data: bytes, place: int, mask: int) -> bytes:
    """Return the data with one byte changed."""
    return data[:place] + bytes([data[place] ^ mask]) + data[place + 1 :]
