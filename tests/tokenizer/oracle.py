"""The slow way to learn merges, written from the definition: an independent reference for the trainer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import pairwise


def slow_merges(word_counts: Mapping[bytes, int], num_merges: int) -> list[tuple[bytes, bytes]]:
    """Count all pairs anew before each merge and rewrite all words after it."""
    words = [([bytes([value]) for value in word], count) for word, count in word_counts.items()]
    merges: list[tuple[bytes, bytes]] = []
    while len(merges) < num_merges:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for word, count in words:
            for left, right in pairwise(word):
                pairs[left, right] += count
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        words = [(merge_everywhere(word, best), count) for word, count in words]
    return merges


def merge_everywhere(word: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    """Replace the pair wherever it stands, from left to right."""
    result: list[bytes] = []
    rest = list(word)
    while rest:
        if tuple(rest[:2]) == pair:
            result.append(rest.pop(0) + rest.pop(0))
        else:
            result.append(rest.pop(0))
    return result
