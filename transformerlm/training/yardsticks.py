"""What a text costs without a model: the yardsticks for a model's bits per byte.

A model that has learnt which tokens are frequent, but nothing of their order, is as good as `unigram`. One that has
learnt words and phrases needs fewer bits than `gzip`.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from transformerlm.token_files.dataset import Tokens
from transformerlm.tokenizer.tokenizer import Tokenizer

MAX_TEXT_TOKENS = 2**20  # of the validation text
MAX_TRAIN_TOKENS = 2**22  # to count
PIECES, PIECE_TOKENS = 256, 1024  # about a megabyte

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


def xz_to_gzip(tokens: Tokens, tokenizer: Tokenizer) -> float:
    """Return how many times as many bytes xz needs as gzip: the less, the more a text repeats itself over a distance.

    Both read the same pieces from all over the text, in a random order. gzip finds again what it has read in the last
    32 KiB, which is eight pieces, and xz what it has read in all of them. A text without bytes gives 1.
    """
    import lzma  # not every Python has it, and training does not need it

    starts = np.linspace(0, max(0, len(tokens) - PIECE_TOKENS), max(1, min(PIECES, len(tokens) // PIECE_TOKENS)))
    pieces = [tokenizer.decode_bytes(np.asarray(tokens[at : at + PIECE_TOKENS]).tolist()) for at in map(int, starts)]
    random.Random(0).shuffle(pieces)
    data = b"".join(pieces)
    raw = lzma.compress(data, format=lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 6}])
    return len(raw) / len(zlib.compress(data, 9)) if data else 1.0


def unigram_bits(train: Ids, text: Ids, *, vocab_size: int) -> float:
    """Return the bits of a text under the token frequencies of `train`, with 1 added to each count."""
    # `counts` is (vocab_size,); the 1 is Laplace's: a token that `train` lacks has a probability, too.
    counts = np.bincount(train.astype(np.int64), minlength=vocab_size) + 1.0
    return float(-np.log2(counts / counts.sum())[text].sum())
