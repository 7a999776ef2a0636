"""Behaviour of the textbook form: the published example by hand, and the same results as what the product runs."""

from __future__ import annotations

import doctest
import random
from collections import Counter

import pytest

from transformerlm.tokenizer import Tokenizer, bpe
from transformerlm.tokenizer.pair_table import learn_merges

WORDS = {b"low": 5, b"lower": 2, b"newest": 6, b"widest": 3}
ALPHABETS = [b"a", b"ab", b"abc", b"a\xff\x00", bytes(range(256))]


def _random_words(rng: random.Random) -> Counter[bytes]:
    alphabet = rng.choice(ALPHABETS)
    words = Counter(bytes(rng.choices(alphabet, k=rng.randint(1, 20))) for _ in range(rng.randint(1, 12)))
    return Counter({word: count * rng.choice([1, 1, 2, 7]) for word, count in words.items()})


def test_the_published_example() -> None:
    """Sennrich et al., 2016: "es" and "st" both occur nine times, and "st" is greater; "lowest" was never seen."""
    merges = bpe.learn(WORDS, 5)
    assert merges == [(b"s", b"t"), (b"e", b"st"), (b"o", b"w"), (b"l", b"ow"), (b"w", b"est")]
    assert bpe.apply(b"lowest", merges) == [b"low", b"est"]
    assert bpe.count_pairs([(bpe.split(b"low"), 5), (bpe.split(b"lower"), 2)])[b"o", b"w"] == 7


def test_the_examples_of_the_docstring_are_true() -> None:
    """What the module's head shows is what it does."""
    found = doctest.testmod(bpe)
    assert found.attempted == 2
    assert found.failed == 0


def test_pairs_are_merged_from_the_left() -> None:
    """In a run of one letter the first two are joined, and a merged token is not joined again by the same merge."""
    assert bpe.merge([b"a"] * 5, (b"a", b"a")) == [b"aa", b"aa", b"a"]
    assert bpe.merge([], (b"a", b"a")) == []
    assert bpe.learn({b"": 3, b"a": 2}, 5) == []


@pytest.mark.parametrize("seed", range(20))
def test_the_products_learner_gives_the_same_merges(seed: int) -> None:
    """Merge for merge, on small alphabets where ties and overlaps are frequent, until no pair is left."""
    rng = random.Random(seed)
    for _ in range(8):
        words = _random_words(rng)
        assert bpe.learn(words, 60) == learn_merges(words, 60)


@pytest.mark.parametrize("seed", range(20))
def test_the_products_encoder_gives_the_same_tokens(seed: int) -> None:
    """Token for token, on words that the training never saw, short ones and longer than a window of the encoder."""
    rng = random.Random(seed)
    words = _random_words(rng)
    merges = bpe.learn(words, 60)
    tokens = [bytes([value]) for value in range(256)] + [left + right for left, right in merges]
    tokenizer = Tokenizer(dict(enumerate(tokens)), merges, engine="reference")
    letters = [chr(value) for value in sorted(set(b"".join(words))) if value < 128] or ["a"]
    for length in (0, 1, 2, 7, 40, 300):
        piece = "".join(rng.choices(letters, k=length))
        assert [tokens[token_id] for token_id in tokenizer.encode_piece(piece)] == bpe.apply(piece.encode(), merges)
