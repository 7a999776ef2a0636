"""Tokenizers as Hugging Face converts them from ranks: Llama 3's is such a one."""

from __future__ import annotations

import random

from transformerlm.tokenizer import Tokenizer
from transformerlm.tokenizer.engines import Engine


def from_ranks(seed: int, *, alphabet: str = "abc", pattern: str = "llama3", engine: Engine = "auto") -> Tokenizer:
    """Return a tokenizer of random tokens, each with a merge for all its splits, in the order of its rank.

    Some merges use parts that are made later, and some tokens have no merge at all.
    """
    rng = random.Random(seed)
    words = {"".join(rng.choices(alphabet, k=rng.randint(2, 6))).encode() for _ in range(40)}
    words |= {b" " + word for word in rng.sample(sorted(words), 10)}
    wide = [character.encode() for character in alphabet if not character.isascii()]
    words |= {*wide, *(character[:2] for character in wide if len(character) > 2)}
    tokens = [*(bytes([value]) for value in range(256)), *rng.sample(sorted(words), len(words))]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    merges: list[tuple[bytes, bytes]] = []
    for token in tokens:
        splits = [(token[:place], token[place:]) for place in range(1, len(token))]
        known = [(left, right) for left, right in splits if left in ranks and right in ranks]
        merges += sorted(known, key=lambda parts: (ranks[parts[0]], ranks[parts[1]]))
    return Tokenizer(dict(enumerate(tokens)), merges, ["<|end|>"], pattern=pattern, ignore_merges=True, engine=engine)
