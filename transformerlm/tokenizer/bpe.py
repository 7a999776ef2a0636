"""Byte-pair encoding as in the paper (Sennrich, Haddow & Birch, 2016, arXiv:1508.07909), on bytes as in GPT-2.

*Learning.* Each word starts as a row of single bytes. Over and over, the pair of neighbouring tokens that occurs most
often becomes one new token, in all words. The pairs, in the order in which they were merged, are the tokenizer:

    >>> learn({b"low": 5, b"lower": 2, b"newest": 6, b"widest": 3}, 3)
    [(b's', b't'), (b'e', b'st'), (b'o', b'w')]

*Applying.* A new word starts as bytes, too, and the merges are replayed on it in the same order:

    >>> apply(b"lowest", [(b"s", b"t"), (b"e", b"st"), (b"o", b"w")])
    [b'l', b'ow', b'est']

Two things differ from the paper. Tokens are strings of bytes, so any text can be encoded and no token is unknown. And
there is no end-of-word mark: in GPT-2's way a word keeps the blank in front of it (`pretokenize.py`).

This is the textbook form, here to be read and to be tested against. It looks at every word again for every merge. The
tokenizer runs two forms that give the same result in less time: `pair_table.py` learns, `bpe_merge.py` applies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

Pair = tuple[bytes, bytes]


def learn(word_counts: Mapping[bytes, int], num_merges: int) -> list[Pair]:
    """Return the first `num_merges` merges for these words, fewer when no pair is left.

    `word_counts` says how often each word occurs. Of pairs with the same count the greater one is merged, compared by
    the bytes of its first token, then of its second: the result must not depend on the order of a dictionary.
    """
    words = [(split(word), count) for word, count in word_counts.items()]
    merges: list[Pair] = []
    while len(merges) < num_merges and (counts := count_pairs(words)):
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        words = [(merge(tokens, best), count) for tokens, count in words]
    return merges


def apply(word: bytes, merges: Iterable[Pair]) -> list[bytes]:
    """Return the tokens of a word: its bytes, after each merge in the order in which they were learned."""
    tokens = split(word)
    for pair in merges:
        tokens = merge(tokens, pair)
    return tokens


def split(word: bytes) -> list[bytes]:
    """Return a word's bytes as tokens."""
    return [bytes([value]) for value in word]


def count_pairs(words: Iterable[tuple[Sequence[bytes], int]]) -> Counter[Pair]:
    """Return how often each pair of neighbouring tokens occurs in words that occur `count` times each."""
    counts: Counter[Pair] = Counter()
    for tokens, count in words:
        for pair in pairwise(tokens):
            counts[pair] += count
    return counts


def merge(tokens: Sequence[bytes], pair: Pair) -> list[bytes]:
    """Return the tokens with each occurrence of the pair joined, from left to right: of "aaa" the first two."""
    result: list[bytes] = []
    for token in tokens:
        if result and (result[-1], token) == pair:
            result[-1] += token
        else:
            result.append(token)
    return result
