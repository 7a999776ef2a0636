"""Applying learned merges to one pre-token: two algorithms with one result.

Both replace, as long as there is one, the pair of neighbours whose merge was learned first, from left to right.
`merge_by_scan` says so in six lines; it is O(n^2) for a pre-token of n bytes and is here to be read and to be tested
against. `merge_by_heap` is O(n log n), so that a megabyte of one letter takes seconds, and measured faster from four
bytes on; the tokenizer uses it.

They agree because every merge uses parts that earlier merges made (`io.check_merges` sees to it): a merge never brings
up a pair that should have come before.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from itertools import pairwise

Pair = tuple[int, int]


def merge_by_scan(ids: list[int], ranks: Mapping[Pair, int], merged: Sequence[int]) -> list[int]:
    """Merge the byte ids of one pre-token by looking through all pairs for the best one, over and over.

    `ranks` is pair -> place in the list of merges, `merged[rank]` the id which that merge makes.
    """
    never = len(merged)
    while len(ids) > 1:
        best = min(pairwise(ids), key=lambda pair: ranks.get(pair, never))
        if best not in ranks:
            break
        ids = _replace(ids, best, merged[ranks[best]])
    return ids


def merge_by_heap(ids: list[int], ranks: Mapping[Pair, int], merged: Sequence[int]) -> list[int]:
    """Merge like `merge_by_scan`, with a heap of (rank, place) over a doubly linked list.

    Entries that a later merge has made untrue are dropped when they come up.
    """
    ids = list(ids)
    end = len(ids)
    following = list(range(1, end + 1))
    preceding = list(range(-1, end - 1))
    heap = [(ranks[pair], place) for place, pair in enumerate(pairwise(ids)) if pair in ranks]
    heapq.heapify(heap)
    while heap:
        rank, left = heapq.heappop(heap)
        right = following[left]
        if right == end or ranks.get((ids[left], ids[right])) != rank:
            continue
        ids[left], ids[right] = merged[rank], -1
        after = following[left] = following[right]
        following[right] = end  # the place is dead: its own entries must not come true again
        before = preceding[left]
        if after < end:
            preceding[after] = left
            if (new_rank := ranks.get((ids[left], ids[after]))) is not None:
                heapq.heappush(heap, (new_rank, left))
        if before >= 0 and (new_rank := ranks.get((ids[before], ids[left]))) is not None:
            heapq.heappush(heap, (new_rank, before))
    return [token_id for token_id in ids if token_id >= 0]


def _replace(ids: list[int], pair: Pair, new_id: int) -> list[int]:
    left, right = pair
    result: list[int] = []
    place = 0
    while place < len(ids):
        if ids[place] == left and place + 1 < len(ids) and ids[place + 1] == right:
            result.append(new_id)
            place += 2
        else:
            result.append(ids[place])
            place += 1
    return result
