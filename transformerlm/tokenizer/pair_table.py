"""Learning merges without looking twice: each pair's count and places are kept up to date, a heap gives the next best.

The second step of training, after `counting.py`. Its plain form is `bpe.learn`, which counts all pairs again for every
merge; the merges are the same. Here a merge visits only the places of its pair, and changes only the counts of the
pairs to the left and to the right of these places.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Mapping
from itertools import pairwise

from transformerlm.tokenizer import io
from transformerlm.tokenizer.parallel import ProgressCallback

Pair = tuple[int, int]

_BETWEEN_WORDS = -1
_INSIDE_TOKEN = -2
_MERGES_PER_REPORT = 64


def learn_merges(
    word_counts: Mapping[bytes, int], num_merges: int, *, progress: ProgressCallback | None = None
) -> list[tuple[bytes, bytes]]:
    """Return the first `num_merges` merges for words and how often each occurs, fewer when no pair is left.

    Raises:
        ValueError: the tokens have more bytes in all than a file of a tokenizer.
    """
    pairs = PairTable(word_counts)
    merges: list[tuple[bytes, bytes]] = []
    num_bytes = len(pairs.tokens)
    while len(merges) < num_merges and (pair := pairs.pop_best()) is not None:
        left, right = pairs.tokens[pair[0]], pairs.tokens[pair[1]]
        num_bytes += len(left) + len(right)
        if num_bytes > io.MAX_FILE_BYTES:
            raise io.too_many_bytes(len(merges))
        merges.append((left, right))
        pairs.merge(pair)
        if progress is not None and len(merges) % _MERGES_PER_REPORT == 0:
            progress("merge", len(merges), num_merges)
    if progress is not None:
        progress("merge", len(merges), num_merges)
    return merges


class PairTable:
    """All words as one row of slots, a slot a byte, and each pair of neighbouring tokens with its count and places.

    A token of n bytes fills n slots; its id is in the first and in the last of them, so that both neighbours can read
    it. Slots in between hold `_INSIDE_TOKEN`, slots between words `_BETWEEN_WORDS`. A place is where the pair's
    left token begins. Places are never taken out of a pair's list: ids only grow, so a place is out of date exactly
    when its two ids are no longer there.
    """

    def __init__(self, word_counts: Mapping[bytes, int]) -> None:
        self.tokens = [bytes([value]) for value in range(256)]
        self._order = [_descending(token) for token in self.tokens]
        self._slots = [_BETWEEN_WORDS]
        self._weights = [0]  # of each slot: how often its word occurs
        for word, count in word_counts.items():
            self._slots.extend(word)
            self._slots.append(_BETWEEN_WORDS)
            self._weights.extend([count] * (len(word) + 1))
        self._counts: defaultdict[Pair, int] = defaultdict(int)
        self._places: defaultdict[Pair, list[int]] = defaultdict(list)
        for place, pair in enumerate(pairwise(self._slots)):
            if _BETWEEN_WORDS not in pair:
                self._counts[pair] += self._weights[place]
                self._places[pair].append(place)
        self._heap = [self._entry(pair) for pair in self._counts]
        heapq.heapify(self._heap)

    def pop_best(self) -> Pair | None:
        """Return the pair with the highest count, of equals the one with the greater byte strings; None at the end.

        Counts of pairs in the heap only fall (a merge makes new pairs of the new token, and takes from the others): an
        entry that is out of date is put back with its present count when it comes up.
        """
        while self._heap:
            negative_count, _, _, left, right = heapq.heappop(self._heap)
            pair = (left, right)
            if self._counts[pair] == -negative_count:
                return pair
            if 0 < self._counts[pair] < -negative_count:
                heapq.heappush(self._heap, self._entry(pair))
            else:
                self._forget(pair)
        return None

    def merge(self, pair: Pair) -> None:
        """Make the pair one new token wherever it is, from left to right, and update the counts around it."""
        slots, counts, places, tokens = self._slots, self._counts, self._places, self.tokens
        left, right = pair
        new = len(tokens)
        tokens.append(tokens[left] + tokens[right])
        self._order.append(_descending(tokens[new]))
        new_pairs: set[Pair] = set()
        for start in places[pair]:
            middle = start + len(tokens[left])
            if slots[start] != left or slots[middle] != right:
                continue  # out of date: in "aaa" the first merge takes the second pair's left token
            end = start + len(tokens[new])
            weight = self._weights[start]
            before, after = slots[start - 1], slots[end]
            if before >= 0:
                counts[before, left] -= weight
                counts[before, new] += weight
                places[before, new].append(start - len(tokens[before]))
                new_pairs.add((before, new))
            if after >= 0:
                counts[right, after] -= weight
                counts[new, after] += weight
                places[new, after].append(start)
                new_pairs.add((new, after))
            slots[middle - 1] = slots[middle] = _INSIDE_TOKEN
            slots[start] = slots[end - 1] = new
        self._forget(pair)
        for new_pair in new_pairs:
            if counts[new_pair] > 0:
                heapq.heappush(self._heap, self._entry(new_pair))
            else:
                self._forget(new_pair)

    def _entry(self, pair: Pair) -> tuple[int, str, str, int, int]:
        left, right = pair
        return -self._counts[pair], self._order[left], self._order[right], left, right

    def _forget(self, pair: Pair) -> None:
        self._counts.pop(pair, None)
        self._places.pop(pair, None)


def _descending(token: bytes) -> str:
    """Return a key that sorts byte strings from the greatest down, as Python's heap gives the smallest first.

    Each byte is turned around (255 - value), and an end mark above all of them puts a string after those that go on
    from it.
    """
    return bytes(255 - value for value in token).decode("latin-1") + "\u0100"
