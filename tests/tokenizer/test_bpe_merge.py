"""Behaviour of applying merges: the fast ways give what the definition gives, and look at each byte about once."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise

import pytest

from tests.tokenizer.from_ranks import from_ranks
from transformerlm.tokenizer import bpe, bpe_merge
from transformerlm.tokenizer.bpe_merge import merge_by_heap, merge_by_rank, merge_by_windows
from transformerlm.tokenizer.pair_table import learn_merges


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
def test_ranks_and_the_heap_give_what_the_definition_gives(alphabet: bytes, seed: int) -> None:
    """Applying each learned merge everywhere, in order, is what both do, for short and for long words."""
    merges = _learned(alphabet, seed)
    ranks, merged, tokens = _tables(merges)
    rng = random.Random(seed)
    for length in [0, 1, 2, 3, 5, 9, 17, 33, 64, 65, 130, 400]:
        word = bytes(rng.choices(alphabet, k=length))
        expected = bpe.apply(word, merges)
        for merge in (merge_by_rank, merge_by_heap):
            assert [tokens[token_id] for token_id in merge(list(word), ranks, merged)] == expected


@pytest.mark.parametrize("seed", range(20))
def test_merges_of_parts_that_are_made_later_are_joined_by_rank(seed: int) -> None:
    """As tiktoken joins: over and over the pair of the lowest rank, also where a merge brings up one that is lower."""
    known = from_ranks(seed)._vocabulary
    rng = random.Random(seed)
    for length in [2, 3, 5, 9, 33, 130]:
        word = list(rng.choices(b"abc", k=length))
        expected = list(word)
        while found := [(known.ranks[pair], at) for at, pair in enumerate(pairwise(expected)) if pair in known.ranks]:
            rank, at = min(found)
            expected[at : at + 2] = [known.merged[rank]]
        assert merge_by_rank(word, known.ranks, known.merged) == expected
        assert merge_by_heap(word, known.ranks, known.merged) == expected
        for window in (2, 3, 4, 7, 16):
            assert merge_by_windows(word, known.ranks, known.merged, known.sizes, window=window) == expected


def test_a_merge_may_bring_up_one_that_comes_first() -> None:
    """Of "bcbc" the first "bc" is joined to the "b" after it before that could become a second "bc"."""
    ranks, merged = {(256, 98): 0, (98, 99): 1}, [257, 256]
    for merge in (merge_by_rank, merge_by_heap):
        assert merge([*b"bcbc"], ranks, merged) == [257, 99]


def test_the_input_list_is_left_alone() -> None:
    """Merging returns a new list and leaves its input alone."""
    ids = [97, 98]
    assert merge_by_heap(ids, {(97, 98): 0}, [256]) == merge_by_rank(ids, {(97, 98): 0}, [256]) == [256]
    assert ids == [97, 98]


@pytest.mark.parametrize("alphabet", [b"a", b"ab", b"abc", b"aabbbbc", bytes(range(256))])
@pytest.mark.parametrize("seed", range(4))
def test_windows_of_any_size_give_what_the_definition_gives(alphabet: bytes, seed: int) -> None:
    """Windows that are far too small for the tokens are joined, tried again and grown until the tokens are right."""
    merges = _learned(alphabet, seed)
    ranks, merged, tokens = _tables(merges)
    sizes = [len(token) for token in tokens]
    rng = random.Random(seed)
    for length in [0, 1, 2, 5, 33, 130, 400]:
        word = list(rng.choices(alphabet, k=length))
        expected = merge_by_heap(word, ranks, merged)
        for window in (2, 3, 4, 7, 16, 100):
            assert merge_by_windows(word, ranks, merged, sizes, window=window) == expected, (word, window)


@pytest.fixture
def merged_lengths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the lengths of the windows that are merged."""
    lengths: list[int] = []

    def counting(ids: list[int], ranks: dict[tuple[int, int], int], merged: list[int]) -> list[int]:
        lengths.append(len(ids))
        return merge_by_heap(ids, ranks, merged)

    monkeypatch.setattr(bpe_merge, "merge_by_heap", counting)
    return lengths


@pytest.mark.parametrize("unit", [b"a", b"ab", "\u6f22".encode(), b"=" * 16], ids=["a", "ab", "CJK", "marks"])
def test_a_long_run_of_one_character_is_merged_once(unit: bytes, merged_lengths: list[int]) -> None:
    """Of 1,000,000 bytes of one character, a few windows are merged; the others repeat them."""
    merges = learn_merges({unit * 30: 1}, 12)
    ranks, merged, tokens = _tables(merges)
    ids = merge_by_windows(list(unit * (1_000_000 // len(unit))), ranks, merged, [len(token) for token in tokens])
    assert b"".join(tokens[token_id] for token_id in ids) == unit * (1_000_000 // len(unit))
    assert sum(merged_lengths) < 10_000


def test_random_letters_are_merged_about_once(merged_lengths: list[int]) -> None:
    """Where nothing repeats, each byte is in 1.3 windows on average, and no window has to grow."""
    alphabet = b"abcdefghijklmnopqrstuvwxyz"
    ranks, merged, tokens = _tables(_learned(alphabet, 0, num_merges=500))
    word = random.Random(0).choices(alphabet, k=100_000)
    merge_by_windows(word, ranks, merged, [len(token) for token in tokens])
    assert sum(merged_lengths) < 130_000
    assert max(merged_lengths) == bpe_merge.WINDOW
