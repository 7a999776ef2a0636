"""What a text costs without a model."""

from __future__ import annotations

import gzip
import math

import numpy as np
import pytest

from tests.training.tiny_run import END, write_tiny_files
from transformerlm.tokenizer.tokenizer import Tokenizer
from transformerlm.training import yardsticks as room
from transformerlm.training.yardsticks import gzip_bits_per_byte, unigram_bits, xz_to_gzip, yardsticks


def test_gzip_is_what_gzip_makes_of_the_text():
    """Bits per byte are those of a .gz file of level 9, whose header is twelve bytes longer."""
    text = b"Ada sees a tree. " * 100 + b"Bob likes the sea."
    assert gzip_bits_per_byte(text) == pytest.approx(8 * (len(gzip.compress(text, 9)) - 12) / len(text))


def test_a_unigram_costs_its_entropy():
    """Tokens drawn evenly from n cost log2(n) bits each; one that training never saw costs more, but not infinity."""
    train = np.repeat(np.arange(8, dtype=np.uint16), 1000)
    assert unigram_bits(train, np.arange(8, dtype=np.uint16), vocab_size=8) == pytest.approx(8 * 3)
    rare = unigram_bits(train, np.array([8], dtype=np.uint16), vocab_size=9)
    assert rare == pytest.approx(math.log2(8009))


def test_special_tokens_have_bits_and_no_bytes(tmp_path):
    """As in a model's bits per byte, the separator costs bits and adds no length."""
    files = write_tiny_files(tmp_path)
    tokenizer = Tokenizer.from_directory(files.tokenizer)
    train = np.array(tokenizer.encode("Ada sees a tree." * 50), dtype=np.uint16)
    text = "Bob likes the sea."
    plain, ended = (np.array(tokenizer.encode(part), dtype=np.uint16) for part in (text, text + END))
    bare, whole = (yardsticks(train, ids, tokenizer) for ids in (plain, ended))
    assert bare.gzip_bits_per_byte == whole.gzip_bits_per_byte == gzip_bits_per_byte(text.encode())
    end = unigram_bits(train, ended[-1:], vocab_size=tokenizer.vocab_size)
    difference = whole.unigram_bits_per_byte - bare.unigram_bits_per_byte
    assert difference == pytest.approx(end / len(text.encode()))
    assert yardsticks(train, ended[-1:], tokenizer) is None


def test_a_long_text_is_read_to_a_bound(tmp_path, monkeypatch):
    """Tokens beyond the limits change nothing."""
    files = write_tiny_files(tmp_path)
    tokenizer = Tokenizer.from_directory(files.tokenizer)
    ids = np.load(files.train)
    monkeypatch.setattr(room, "MAX_TEXT_TOKENS", 100)
    monkeypatch.setattr(room, "MAX_TRAIN_TOKENS", 200)
    assert yardsticks(ids, ids, tokenizer) == yardsticks(ids[:200], ids[:100], tokenizer)


def test_xz_finds_again_what_is_too_far_away_for_gzip(tmp_path):
    """A text that repeats a page of 60 kB costs xz far less than gzip; one that repeats nothing costs both the same."""
    tokenizer = Tokenizer.from_directory(write_tiny_files(tmp_path).tokenizer)
    letters = np.array([tokenizer.encode(letter)[0] for letter in "abcdefgh"], dtype=np.uint16)
    rng = np.random.default_rng(0)
    page = letters[rng.integers(8, size=60 * 1024)]
    assert xz_to_gzip(np.tile(page, 5), tokenizer) < 0.4
    assert xz_to_gzip(letters[rng.integers(8, size=5 * 60 * 1024)], tokenizer) == pytest.approx(1.0, abs=0.1)
    assert xz_to_gzip(page[:0], tokenizer) == 1.0
