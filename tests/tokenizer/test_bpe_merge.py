"""Behaviour of applying merges: the fast algorithm gives what the definition gives, in time n log n."""

from __future__ import annotations

import random
import time
from collections import Counter

import pytest

from tests.tokenizer.oracle import merge_everywhere
from transformerlm.tokenizer.bpe_merge import merge_by_heap, merge_by_scan
from transformerlm.tokenizer.bpe_trainer import learn_merges


def _learned(alphabet: bytes, seed: int, num_merges: int = 80) -> list[tuple[bytes, bytes]]:
    rng = random.Random(seed)
    words = Counter(bytes(rng.choices(alphabet, k=rng.randint(1, 25))) for _ in range(40))
    return learn_merges(words, num_merges)


def _tables(merges: list[tuple[bytes, bytes]]) -> tuple[dict[tuple[int, int], int], list[int], list[bytes]]:
    tokens = [bytes([value]) for value in range(256)] + [left + right for left, right in merges]
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    return {(ids[left], ids[right]): rank for rank, (left, right) in enumerate(merges)}, list(range(256, 999)), tokens


@pytest.mark.parametrize("alphabet", [b"a", b"ab", b"abc", bytes(range(256))])
@pytest.mark.parametrize("seed", range(5))
def test_heap_and_scan_and_the_definition_agree(alphabet: bytes, seed: int) -> None:
    """Applying each learned merge everywhere, in order, is what both algorithms do, for short and for long words."""
    merges = _learned(alphabet, seed)
    ranks, merged, tokens = _tables(merges)
    rng = random.Random(seed)
    for length in [0, 1, 2, 3, 5, 9, 17, 33, 64, 65, 130, 400]:
        word = bytes(rng.choices(alphabet, k=length))
        expected = [bytes([value]) for value in word]
        for pair in merges:
            expected = merge_everywhere(expected, pair)
        assert [tokens[token_id] for token_id in merge_by_scan(list(word), ranks, merged)] == expected
        assert [tokens[token_id] for token_id in merge_by_heap(list(word), ranks, merged)] == expected


def test_the_input_list_is_left_alone() -> None:
    """Merging gives a new list."""
    ids = [97, 98]
    assert merge_by_heap(ids, {(97, 98): 0}, [256]) == [256]
    assert ids == [97, 98]


def test_a_long_run_of_one_letter_is_merged_in_time() -> None:
    """200,000 equal letters take a second or so, not hours: no step looks at the whole run."""
    ranks = {(97, 97): 0, (256, 256): 1, (257, 257): 2}
    start = time.perf_counter()
    assert merge_by_heap([97] * 200_000, ranks, [256, 257, 258]) == [258] * 25_000
    assert time.perf_counter() - start < 10
