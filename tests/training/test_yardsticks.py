"""What a text costs without a model."""

from __future__ import annotations

import gzip
import math

import numpy as np
import pytest

from tests.training.tiny_run import END, write_tiny_files
from transformerlm.tokenizer.tokenizer import Tokenizer
from transformerlm.training import yardsticks as room
from transformerlm.training.yardsticks import RUN_TOKENS, gzip_bits_per_byte, share_seen, unigram_bits, yardsticks


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


def test_what_the_training_text_has_word_for_word_is_seen(monkeypatch):
    """Runs of sixteen tokens count, wherever they are; a run with one other token does not."""
    rng = np.random.default_rng(0)
    train, text = (rng.integers(1000, size=size).astype(np.uint16) for size in (5000, 2000))
    assert share_seen(train, text) == 0.0
    text[500:1000] = train[2000:2500]
    whole, half = 2000 - RUN_TOKENS + 1, 500 - RUN_TOKENS + 1
    assert share_seen(train, text) == half / whole
    text[750] = 1000
    assert share_seen(train, text) == (half - RUN_TOKENS) / whole
    monkeypatch.setattr(room, "BLOCK_TOKENS", 700)  # the training text is read in pieces that overlap
    assert share_seen(train, text) == (half - RUN_TOKENS) / whole
    assert share_seen(train, train) == 1.0
    assert share_seen(train, text[: RUN_TOKENS - 1]) == share_seen(train[:3], text) == 0.0
