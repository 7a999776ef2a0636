"""What a text costs without a model: the yardsticks for a model's bits per byte.

A model that has learnt which tokens are frequent, but nothing of their order, is as good as `unigram`. One that has
learnt words and phrases needs fewer bits than `gzip`.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from transformerlm.token_files.dataset import Tokens
from transformerlm.tokenizer.tokenizer import Tokenizer

MAX_TEXT_TOKENS = 2**20  # of the validation text
MAX_TRAIN_TOKENS = 2**22  # to count
MAX_SEEN_TOKENS = 2**17  # of the validation text, to look for in the training text
BLOCK_TOKENS = 2**20  # of the training text, at once
RUN_TOKENS = 16
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, from the golden ratio (Knuth, The Art of Computer Programming 6.4)

Ids = npt.NDArray[np.integer]


@dataclass(frozen=True)
class Yardsticks:
    """Bits per UTF-8 byte of a text: by `gzip -9`, and by the token frequencies of the training text."""

    gzip_bits_per_byte: float
    unigram_bits_per_byte: float


def yardsticks(train: Tokens, text: Tokens, tokenizer: Tokenizer) -> Yardsticks | None:
    """Return what the first few MB of a text cost, given its tokens; None for a text without bytes.

    As in a model's bits per byte, special tokens cost bits and have no bytes.
    """
    text = np.asarray(text[:MAX_TEXT_TOKENS])
    lengths = np.array(tokenizer.token_byte_lengths())
    data = tokenizer.decode_bytes(text[lengths[text] > 0].tolist())
    if not data:
        return None
    bits = unigram_bits(np.asarray(train[:MAX_TRAIN_TOKENS]), text, vocab_size=tokenizer.vocab_size)
    return Yardsticks(gzip_bits_per_byte(data), bits / len(data))


def gzip_bits_per_byte(data: bytes) -> float:
    """Return how many bits `gzip -9` needs for each byte of the data, with the shorter header of zlib."""
    return 8 * len(zlib.compress(data, 9)) / len(data)


def share_seen(train: Tokens, text: Tokens) -> float:
    """Return which share of the runs of 16 tokens in the first tokens of a text the training text has, word for word.

    The runs are compared by hashes of 64 bits. A text of fewer tokens has none, and gives 0.
    """
    wanted, counts = np.unique(_hashes_of_runs(text[:MAX_SEEN_TOKENS]), return_counts=True)
    if not len(wanted):
        return 0.0
    seen = np.zeros(len(wanted), dtype=np.bool_)
    for start in range(0, len(train), BLOCK_TOKENS):
        hashes = _hashes_of_runs(train[start : start + BLOCK_TOKENS + RUN_TOKENS - 1])
        places = np.minimum(np.searchsorted(wanted, hashes), len(wanted) - 1)
        seen[places[wanted[places] == hashes]] = True
    return float(counts[seen].sum() / counts.sum())


def _hashes_of_runs(tokens: Tokens) -> npt.NDArray[np.uint64]:
    """Return a polynomial hash of each run of `RUN_TOKENS` tokens, (tokens - RUN_TOKENS + 1,), modulo 2^64."""
    ids = np.asarray(tokens).astype(np.uint64) + np.uint64(1)
    number = max(0, len(ids) - RUN_TOKENS + 1)
    hashes = np.zeros(number, dtype=np.uint64)
    for place in range(RUN_TOKENS if number else 0):
        hashes = hashes * _FACTOR + ids[place : place + number]
    return hashes


def unigram_bits(train: Ids, text: Ids, *, vocab_size: int) -> float:
    """Return the bits of a text under the token frequencies of `train`, with 1 added to each count."""
    # `counts` is (vocab_size,); the 1 is Laplace's: a token that `train` lacks has a probability, too.
    counts = np.bincount(train.astype(np.int64), minlength=vocab_size) + 1.0
    return float(-np.log2(counts / counts.sum())[text].sum())
