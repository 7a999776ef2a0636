"""Behaviour of reading text as bytes: it is cut only at safe places, and nothing else is refused or changed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from transformerlm.tokenizer import Tokenizer, pretokenize, reading, train_bpe
from transformerlm.tokenizer import tokenizer as tokenizer_module
from transformerlm.tokenizer.pretokenize import SpecialTokenSplitter
from transformerlm.tokenizer.reading import Chunk
from transformerlm.utils import text_files
from transformerlm.utils.text_files import ReadStats, read_text

pytest.importorskip("numba")
from transformerlm.tokenizer.fast import byte_chunks
from transformerlm.tokenizer.fast.arrays import Buffers


def test_a_run_without_a_cut_is_one_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk grows until the text can be cut."""
    monkeypatch.setattr(reading, "CHUNK_BYTES", 64)
    (tmp_path / "a.txt").write_bytes(b"x" * 5000 + b" " + b"y" * 20_000)
    chunks = list(byte_chunks.read_chunks(tmp_path / "a.txt", SpecialTokenSplitter([]), stats=ReadStats()))
    assert [int(chunk.ends[-1]) for chunk in chunks] == [5000, 20_001]


def test_memory_is_used_again_only_when_nobody_holds_any_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks that are kept stay as they are; those that are not come in the same memory; a short one is given up."""
    (tmp_path / "a.txt").write_bytes(b"".join(b"%d " % number for number in range(3000)))

    def chunks() -> Iterator[Chunk]:
        splitter = SpecialTokenSplitter([])
        return byte_chunks.read_chunks(tmp_path / "a.txt", splitter, stats=ReadStats(), size=1000)

    kept = list(chunks())
    assert b"".join(bytes(chunk.data[: chunk.ends[-1]]) for chunk in kept) == (tmp_path / "a.txt").read_bytes()
    assert len({chunk.data.ctypes.data for chunk in kept}) == len(kept) > 10
    made: list[Buffers] = []

    def noted(dtype: type[np.uint8]) -> Buffers:
        made.append(Buffers(dtype))
        return made[-1]

    monkeypatch.setattr(byte_chunks, "Buffers", noted)
    assert [len(made[0]._arrays) for _ in chunks()][-1] <= 2
    buffers = Buffers(np.uint8, longest=200)
    held = buffers.take(100)
    part = held[:1]
    assert buffers.take(50) is not held
    place = held.ctypes.data
    del held
    assert buffers.take(50).ctypes.data != place
    del part
    assert place in {buffers.take(50).ctypes.data, buffers.take(100).ctypes.data}
    buffers.take(200)
    assert [len(array) for array in buffers._arrays] == [200]
    assert len(buffers.take(201)) == 201
    assert [len(array) for array in buffers._arrays] == [200]


@pytest.mark.parametrize("damaged", [0, 700, 1500, 2999])
def test_refused_bytes_are_refused_by_both_engines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: int
) -> None:
    """Where invalid UTF-8 is refused, a file that is read in chunks is refused with the same words."""
    monkeypatch.setattr(reading, "CHUNK_BYTES", 1000)
    data = bytearray("wör ".encode() * 600)
    data[damaged] = 0xFF
    (tmp_path / "a.txt").write_bytes(data)
    found = []
    for engine in ("reference", "compiled"):
        with pytest.raises(ValueError, match=r"expected UTF-8, found byte 0x.. at offset") as error:
            train_bpe(tmp_path / "a.txt", 300, [], engine=engine, stats=ReadStats(refuse_invalid=True))
        found.append(str(error.value))
    assert found[0] == found[1]


@pytest.mark.parametrize(("run", "is_refused"), [("x" * 3000, True), ("x" * 999, False), ("é" * 999, False)])
@pytest.mark.parametrize("after", ["", " and more" * 200])
def test_a_run_that_is_no_text_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: str, is_refused: bool, after: str
) -> None:
    """A run of characters passes up to the limit; one of twice as many is stopped wherever it ends."""
    monkeypatch.setattr(pretokenize, "MAX_UNCUT_CHARS", 1000)
    monkeypatch.setattr(reading, "CHUNK_BYTES", 300)
    (tmp_path / "a.txt").write_text(f"some words and {run}{after}")
    chunks = byte_chunks.read_chunks(tmp_path / "a.txt", SpecialTokenSplitter([]), stats=ReadStats())
    if is_refused:
        with pytest.raises(ValueError, match=r"a\.txt: expected words of at most 1,000 characters, .* ' xxxxxxxxxx"):
            list(chunks)
    else:
        assert sum(int(chunk.ends[-1]) for chunk in chunks) == (tmp_path / "a.txt").stat().st_size


@pytest.mark.parametrize("character", [b"x", "é".encode(), "漢".encode(), b"\x80"])
@pytest.mark.parametrize("after", [b"", b" and more" * 200])
def test_both_engines_refuse_the_same_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, character: bytes, after: bytes
) -> None:
    """A run of one character more than the limit is refused, and one less passes, wherever blocks of the file end."""
    monkeypatch.setattr(pretokenize, "MAX_UNCUT_CHARS", 1000)
    path, splitter = tmp_path / "a.txt", SpecialTokenSplitter([])
    for length, size in itertools.product([500, 999, 1000, 1001, 1100, 1999, 2600], [64, 300]):
        monkeypatch.setattr(text_files, "BLOCK_BYTES", size)
        path.write_bytes(b"some words and " + character * length + after)
        for read in (
            byte_chunks.read_chunks(path, splitter, stats=ReadStats(), size=size),
            pretokenize.safe_pieces(read_text(path), splitter, size=size, where=str(path)),
        ):
            if length > 999:  # and a blank before it
                with pytest.raises(ValueError, match=r"a\.txt: expected words of at most 1,000 characters"):
                    list(read)
            else:
                list(read)


def test_special_tokens_that_invalid_bytes_may_spell_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where U+FFFD is part of a special token, files are read as text: the size of chunks changes nothing."""
    monkeypatch.setattr(reading, "CHUNK_BYTES", 7)
    monkeypatch.setattr(tokenizer_module, "_FILE_CHUNK_BYTES", 7)
    data = b"one \xff two \xff three" * 20
    (tmp_path / "a.txt").write_bytes(data)
    vocab, merges = train_bpe(tmp_path / "a.txt", 270, ["\ufffd t"], engine="reference")
    assert train_bpe(tmp_path / "a.txt", 270, ["\ufffd t"], engine="compiled") == (vocab, merges)
    tokenizer = Tokenizer(vocab, merges, ["\ufffd t"], engine="compiled")
    assert tokenizer.encode_file(tmp_path / "a.txt").tolist() == tokenizer.encode(data.decode("utf-8", "replace"))
