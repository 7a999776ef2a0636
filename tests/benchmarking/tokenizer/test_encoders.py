"""The compared encoders: with our merges each gives our ids."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarking.tokenizer.encoders import ENCODERS, cut_at_blanks, tokenizer_json
from transformerlm.tokenizer import Tokenizer

EOT = "<|endoftext|>"
DOCUMENTS = ["The cat sat on the mat, the cat's mat.\n\n\tIt's 42 cats — früh, 漢字! ", "Once upon a time…\r\n" * 4]
TEXT = EOT.join(DOCUMENTS * 20)
MERGES = [(b"t", b"h"), (b"th", b"e"), (b" ", b"c"), (b"a", b"t"), (b" c", b"at"), (b"\xc3", b"\xbc")]


@pytest.fixture
def tokenizer() -> Tokenizer:
    tokens = [bytes([value]) for value in range(256)] + [left + right for left, right in MERGES]
    return Tokenizer(dict(enumerate(tokens)), MERGES, [EOT], engine="reference")


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_encoders_give_the_same_ids_and_text(name: str, threads: int, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A file, its separators included, documents and ids back to text: every library agrees with our reference."""
    if name not in ("transformerlm", "reference"):
        pytest.importorskip(name)
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT.encode())
    encoder = ENCODERS[name](tokenizer, 1 if name == "reference" else threads, "compiled")
    ids = tokenizer.encode(TEXT)
    assert encoder.encode_file(path).tolist() == ids
    assert encoder.encode_documents(DOCUMENTS) == [tokenizer.encode(text) for text in DOCUMENTS]
    assert encoder.decode_array(encoder.own_array(np.array(ids, dtype=np.uint16))) == TEXT.encode()
    assert encoder.decode_list(ids) == TEXT


@pytest.mark.parametrize("size", [1, 7, 50, 10_000])
def test_cut_text_has_the_same_ids(size: int, tokenizer: Tokenizer) -> None:
    """Parts are of the size or longer, are the text when joined, and give its ids."""
    text = TEXT + "x  y é z\n a"
    parts = list(cut_at_blanks(text, size))
    assert "".join(parts) == text
    assert all(len(part) >= size for part in parts[:-1])
    assert len(parts) > 1 or size > len(text)
    assert [i for part in parts for i in tokenizer.encode(part)] == tokenizer.encode(text)


def test_the_json_names_every_token(tokenizer: Tokenizer) -> None:
    """The file for the other libraries holds all ids once, merges in order, and the separator as a special token."""
    record = json.loads(tokenizer_json(tokenizer))
    assert sorted(record["model"]["vocab"].values()) == list(range(tokenizer.vocab_size))
    assert record["model"]["merges"][0] == ["t", "h"]
    assert [token["content"] for token in record["added_tokens"]] == [EOT]
