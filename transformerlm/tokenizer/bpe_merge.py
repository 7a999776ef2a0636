"""Applying learned merges to one pre-token in less time than the plain form, `bpe.apply`, takes.

`bpe.apply` replays every merge; with thousands of merges that is slow. The algorithms here look only at the pairs that
are there: as long as some merge joins two neighbours, they join the pair whose merge was learned first, the leftmost
where it is there twice. `merge_by_rank` is that sentence, and merges words. It looks at the whole pre-token again for
each merge, so long ones go to `merge_by_windows`, a window at a time, and in each to `merge_by_heap`: O(n log n) for n
bytes.

They agree with `bpe.apply` because every merge uses parts that earlier merges made (`io.check_merges` sees to it): a
merge never brings up a pair that should have come before. Llama 3's merges were not learned but listed from ranks, and
some use parts that are made later. `bpe.apply` knows no such merges; what these three do with them is what tiktoken and
Hugging Face's tokenizers do.

**Why windows are exact.** A row of tokens is what the merges make of its bytes if, and only if, that is true of every
two neighbours in it. To see why, take the first merge that would cross a border between two tokens. Until then nothing
has crossed a border, so both tokens have come to be as they do when the two are alone, with the same merges in the same
order, and the same merge would cross the border of the two alone. Hence two rows that are right and share a token may
be joined at it: every two neighbours of the joined row are neighbours in one of them.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from itertools import pairwise

Pair = tuple[int, int]

WINDOW = 128


def merge_by_rank(ids: list[int], ranks: Mapping[Pair, int], merged: Sequence[int]) -> list[int]:
    """Merge the byte ids of one pre-token: as GPT-2's `bpe` does (Radford et al. 2019), one place at a time.

    `ranks` is pair -> place in the list of merges, `merged[rank]` the id which that merge makes.
    """
    ids = list(ids)
    while known := [(ranks[pair], place) for place, pair in enumerate(pairwise(ids)) if pair in ranks]:
        rank, place = min(known)
        ids[place : place + 2] = [merged[rank]]
    return ids


def merge_by_heap(ids: list[int], ranks: Mapping[Pair, int], merged: Sequence[int]) -> list[int]:
    """Merge like `merge_by_rank`, with a heap of (rank, place) over a doubly linked list.

    Entries that a later merge has put out of date are dropped when they come up.
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
        following[right] = end  # the place is gone: entries of its own in the heap must not match again
        before = preceding[left]
        if after < end:
            preceding[after] = left
            if (new_rank := ranks.get((ids[left], ids[after]))) is not None:
                heapq.heappush(heap, (new_rank, left))
        if before >= 0 and (new_rank := ranks.get((ids[before], ids[left]))) is not None:
            heapq.heappush(heap, (new_rank, before))
    return [token_id for token_id in ids if token_id >= 0]


def merge_by_windows(
    ids: list[int], ranks: Mapping[Pair, int], merged: Sequence[int], sizes: Sequence[int], *, window: int = WINDOW
) -> list[int]:
    """Merge like `merge_by_heap`, in windows that overlap and are joined where both have the same token.

    `sizes` is the number of bytes of each id. A window that repeats the one before it, as in a run of one character,
    costs nothing. Where two windows share no token, the window grows.
    """
    result: list[int] = []
    start, tokens = 0, merge_by_heap(ids[:window], ranks, merged)
    settled = window * 7 // 8
    while start + window < len(ids):
        kept, end = _settled(tokens, sizes, settled)
        begin = start + end
        repeated = ids[begin : begin + window] == ids[start : start + window]
        others = tokens if repeated else merge_by_heap(ids[begin : begin + window], ranks, merged)
        if kept and others[0] == tokens[kept]:
            result += tokens[:kept]
            start, tokens = begin, others
        elif kept > 1:
            settled = end // 2
            continue
        else:
            first, window = tokens[0], 2 * window
            tokens = merge_by_heap(ids[start : start + window], ranks, merged)
            while result and tokens[0] != first:  # the tokens before were joined to `first`: go back to one that stays
                first = result.pop()
                start -= sizes[first]
                tokens = merge_by_heap(ids[start : start + window], ranks, merged)
        settled = window * 7 // 8
    return result + tokens


def _settled(tokens: list[int], sizes: Sequence[int], limit: int) -> tuple[int, int]:
    """Return how many of a window's tokens end within `limit` bytes, at least one, never all, and where they end."""
    kept = end = 0
    while kept < len(tokens) - 1 and (kept == 0 or end + sizes[tokens[kept]] <= limit):
        end += sizes[tokens[kept]]
        kept += 1
    return kept, end
