"""Behaviour of learning merges: the published example, the tie rule, and the plain form's merges in less time."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from tests.pace import cost
from transformerlm.tokenizer import bpe
from transformerlm.tokenizer.pair_table import learn_merges


def test_the_published_example() -> None:
    """Sennrich et al., 2016: low x5, lower x2, newest x6, widest x3; of "es" and "st", both x9, "st" is greater."""
    words = {b"low": 5, b"lower": 2, b"newest": 6, b"widest": 3}
    expected = [
        b"s t",
        b"e st",
        b"o w",
        b"l ow",
        b"w est",
        b"n e",
        b"ne west",
        b"w i",
        b"wi d",
        b"wid est",
        b"low e",
        b"lowe r",
    ]
    assert [b" ".join(pair) for pair in learn_merges(words, 100)] == expected


@pytest.mark.parametrize("seed", range(40))
def test_merges_are_those_of_the_plain_form(seed: int) -> None:
    """On tiny alphabets, where ties and overlaps are frequent, each merge is the one that the definition gives."""
    rng = random.Random(seed)
    for _ in range(8):
        alphabet = rng.choice([b"a", b"ab", b"abc", b"a\xff\x00"])
        words = Counter(bytes(rng.choices(alphabet, k=rng.randint(1, 20))) for _ in range(rng.randint(1, 12)))
        assert learn_merges(words, 60) == bpe.learn(words, 60)


def test_ties_go_to_the_greater_pair_of_byte_strings() -> None:
    """Bytes are compared by value, and a longer string is greater than its own beginning."""
    assert learn_merges({b"ab": 1, b"\xc3\xa9": 1, b"zz": 1}, 3) == [(b"\xc3", b"\xa9"), (b"z", b"z"), (b"a", b"b")]
    words = {b"ba": 9, b"baz": 5, b"bz": 5}
    assert learn_merges(words, 2) == [(b"b", b"a"), (b"ba", b"z")] == bpe.learn(words, 2)


def test_overlapping_pairs_merge_from_the_left() -> None:
    """In a run of one letter the pairs are taken from the left, and counted as the definition counts them."""
    assert (
        learn_merges({b"aaaaa": 1}, 9) == bpe.learn({b"aaaaa": 1}, 9) == [(b"a", b"a"), (b"aa", b"aa"), (b"aaaa", b"a")]
    )


def test_a_very_long_word_costs_no_more_than_its_length() -> None:
    """A run of 200,000 random letters is not read again for each merge."""
    word = bytes(random.Random(0).choices(b"abcdefgh", k=200_000))
    merges: list[tuple[bytes, bytes]] = []
    assert cost(lambda: merges.extend(learn_merges({word: 1}, 500))) < 10
    assert len(merges) == 500
