"""Seams: the ids of a text cut at them are the ids of the whole, and texts without blanks have many."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import pytest

from tests.tokenizer import plain_kernels
from transformerlm.tokenizer.bpe_merge import merge_by_heap
from transformerlm.tokenizer.pair_table import learn_merges

pytest.importorskip("numba")
from transformerlm.tokenizer.fast import encoder, seam_kernels
from transformerlm.tokenizer.fast.arrays import padded

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")  # hashes wrap around
PLAIN = plain_kernels.load()
ALPHABETS = [
    "今天气很好",
    "のにはを、ー一",
    "กขค\u0e31\u0e34",
    "한국어 말",
    "a今é漢\U0001f600😀",
    "тест今",
    "\u3000一a ",
]


def _parts(text: bytes, seams: Any, kernels: ModuleType = seam_kernels) -> list[bytes]:
    """Cut at every seam."""
    data, parts, start = padded(text), [], 0
    while start < len(text):
        stop = kernels.first_seam(data, start, len(text), seams)
        parts.append(text[start:stop])
        start = stop
    return parts


class Learned:
    """Merges learned from random words, half of whose bytes are cut off: their tokens hold halves of characters."""

    def __init__(self, alphabet: str, rng: random.Random) -> None:
        words = Counter("".join(rng.choices(alphabet, k=rng.randint(1, 6))).encode() for _ in range(60))
        words += Counter(word[1:-1] for word in list(words)[::2] if len(word) > 3)
        merges = learn_merges(words, rng.choice([5, 40, 150]))
        tokens = [bytes([value]) for value in range(256)] + [left + right for left, right in merges]
        ids = {token: token_id for token_id, token in enumerate(tokens)}
        self._ranks = {(ids[left], ids[right]): rank for rank, (left, right) in enumerate(merges)}
        self.made = tokens[256:]

    def ids(self, text: bytes) -> list[int]:
        """Return the reference's ids of a piece."""
        return merge_by_heap(list(text), self._ranks, list(range(256, 999)))


@pytest.mark.parametrize("alphabet", ALPHABETS)
def test_the_parts_have_the_ids_of_the_whole(alphabet: str) -> None:
    """In many scripts, with vocabularies small and large; the same source without numba finds the same seams."""
    rng, seen = random.Random(0), 0
    for number in range(60):
        learned = Learned(alphabet, rng)
        seams = encoder._seams_of(learned.made)
        for _ in range(10):
            text = "".join(rng.choices(alphabet, k=rng.randint(1, 30))).encode()
            parts = _parts(text, seams)
            assert b"".join(parts) == text
            assert [i for part in parts for i in learned.ids(part)] == learned.ids(text), (text, parts)
            seen += len(parts) - 1
            if number % 10 == 0:
                assert parts == _parts(text, seams, PLAIN["seam_kernels"])
    assert seen > 20


@pytest.mark.parametrize(
    ("tokens", "parts"),
    [
        (["今天", "天气", "很多"], ["今天气", "很", "好"]),  # 今天气: which two of them are joined is not known here
        ([], ["今", "天", "气", "很", "好"]),
        (["今天气很好"], ["今天气很好"]),
    ],
)
def test_a_seam_is_where_no_token_crosses(tokens: Sequence[str], parts: Sequence[str]) -> None:
    """Between two characters that no token has side by side; this shows that cuts are found at all."""
    seams = encoder._seams_of([token.encode() for token in tokens])
    assert _parts("今天气很好".encode(), seams) == [part.encode() for part in parts]


def test_half_a_character_in_a_token_crosses() -> None:
    """A token that ends, or begins, in the middle of a character crosses the place before it, or after it."""
    for token in ("今天".encode()[:4], "今天".encode()[:5], "今天".encode()[2:], "今天".encode()[1:5]):
        assert _parts("今天气".encode(), encoder._seams_of([token])) == ["今天".encode(), "气".encode()]
