"""Byte-pair encoding on one page: learn merges from a text, encode with them, decode (Sennrich et al. 2016, on bytes).

    python docs/tour/bpe.py

A token is a string of bytes. The first 256 tokens are the single bytes. Each merge adds one: the pair of neighbours
that occurs most often. `transformerlm/tokenizer` learns the same merges and gives the same ids. It adds special
tokens, files of any size, several processes, and a learner that does not recount every pair after each merge.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import regex

Token = bytes
Pair = tuple[Token, Token]

# A pre-token is a word with the space before it, a number, marks, or white space (GPT-2, Radford et al. 2019).
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
NUM_MERGES = 20
SENTENCE = "The fox sat in the box."
TEXT = """The fox sat in the box. The cat sat on the mat. The fox saw the cat, and the cat saw the fox.
The cat ran to the box. The fox ran to the mat. Then the cat sat in the box, and the fox sat on the mat.
The fox sat in the sun. The cat sat in the sun. The sun went down, and the fox and the cat went to bed.
"""


def pre_tokenize(text: str) -> list[str]:
    """Cut a text into pre-tokens; no merge crosses their borders."""
    return regex.findall(PATTERN, text)


def split(word: str) -> list[Token]:
    """Return the single bytes of a pre-token."""
    return [bytes([value]) for value in word.encode()]


def merge(tokens: Sequence[Token], pair: Pair) -> list[Token]:
    """Replace a pair of neighbours by one token, from left to right."""
    merged: list[Token] = []
    for token in tokens:
        if merged and (merged[-1], token) == pair:
            merged[-1] += token
        else:
            merged.append(token)
    return merged


def learn(text: str, num_merges: int) -> list[Pair]:
    """Return the merges in the order in which they were learned, fewer if no pair is left."""
    counts = Counter(pre_tokenize(text))  # equal words are looked at once
    words = {word: split(word) for word in counts}
    merges: list[Pair] = []
    while len(merges) < num_merges:
        pairs: Counter[Pair] = Counter()
        for word, tokens in words.items():
            for pair in pairwise(tokens):
                pairs[pair] += counts[word]
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))  # of equally frequent pairs, the greater bytes
        merges.append(best)
        words = {word: merge(tokens, best) for word, tokens in words.items()}
    return merges


def vocabulary(merges: Sequence[Pair]) -> list[Token]:
    """Return the tokens by id: the 256 bytes, then the merges in order."""
    return [bytes([value]) for value in range(256)] + [left + right for left, right in merges]


def encode(text: str, merges: Sequence[Pair]) -> list[int]:
    """Return the ids of a text: in each pre-token the earliest merge first, until none applies."""
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    ids = {token: token_id for token_id, token in enumerate(vocabulary(merges))}
    found: list[int] = []
    for word in pre_tokenize(text):
        tokens = split(word)
        while pairs := [pair for pair in pairwise(tokens) if pair in ranks]:
            tokens = merge(tokens, min(pairs, key=ranks.__getitem__))
        found += [ids[token] for token in tokens]
    return found


def decode(ids: Sequence[int], merges: Sequence[Pair]) -> str:
    """Return the text of ids; invalid UTF-8 becomes U+FFFD."""
    return b"".join(vocabulary(merges)[token_id] for token_id in ids).decode("utf-8", "replace")


if __name__ == "__main__":
    learned = learn(TEXT, NUM_MERGES)
    print("merges    ", *(repr((left + right).decode()) for left, right in learned))
    print("pre-tokens", pre_tokenize(SENTENCE))
    print("ids       ", encode(SENTENCE, learned))
    print("tokens    ", [decode([token_id], learned) for token_id in encode(SENTENCE, learned)])
