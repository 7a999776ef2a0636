"""Applying merges to one pre-token, compiled: `bpe_merge.py` over arrays, with the same names.

The rules of `encode_kernels.py` hold here too. A piece is merged in `work`, int64, which has `WORK_PER_BYTE` places for
each of its bytes; its ids go to `out`, uint32, from `written` on. The table of pairs begins with the values of all
pairs of ids below `DIRECT_IDS`, which are those of bytes in most vocabularies. The others follow: open addressing over
(key, value), the key -1 where a place is empty. A value is a pair's rank above 32 bits, and below them the id that it
makes: so the least value is the pair that comes first. Most pairs that are asked for merge to nothing, and the table is
larger than the processor's nearest caches; so `bits`, which fits them, has a bit set for each pair that is there.

**Some merges are certain** wherever their two tokens meet: those that come before every other merge that could take one
of the two away, and before every merge that uses what they make. It makes no difference whether such a merge is made in
its turn or at once, so a piece is read with them made: the bytes of a frequent character are one token then, and the
best pair is looked for among fewer. A quarter to two fifths of the merges that are learned are certain. Bit 31 of a
pair's value says so.

How `merge_by_scan` uses `work` for a piece of n bytes, from `base` on:

    base          n ids at most, of the tokens that were read; what is merged stays in the place of its first
    base + n      n times what the token here makes with the next one (`placed_pair`), or `NO_PAIR`
    base + 2 * n  n times the place of the next token
    base + 3 * n  n times the place of the token before

Part of: encode_kernels, encoder
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from transformerlm.tokenizer.fast.arrays import Array, hash_shift
from transformerlm.tokenizer.fast.jit import byte_at, helper, kernel, unsigned

SCANNED_BYTES = 64  # up to here a scan for the best pair beats a heap
WINDOW_BYTES = 32  # a long piece is scanned in windows of this size
WORK_PER_BYTE = 7
DIRECT_IDS = 256
HASHED = DIRECT_IDS * DIRECT_IDS  # where the hashed pairs begin
LOW_BITS = (1 << 32) - 1
CERTAIN = 1 << 31
ID_BITS = CERTAIN - 1
PLACE_MASK, PLACED_RANK = SCANNED_BYTES - 1, 38  # a place takes the six bits between a pair's rank and its id
NO_PAIR = (1 << 63) - 1 - CERTAIN

_U0, _U1, _U6, _U63 = (np.uint64(number) for number in (0, 1, 6, 63))
_MIX = np.uint64(0x9E3779B97F4A7C15)


class Pairs(NamedTuple):
    """What each pair of ids becomes: its rank and the id that merging it makes, as one number."""

    values: Array  # int64: `HASHED` values of pairs of small ids, then (key, value) of all other pairs; see above
    shift: Any  # uint64: by how much the hash of a key is shifted to give its place
    bits: Array  # uint64: a bit for each place of a longer hash, set if a pair has it
    bits_shift: Any  # uint64: by how much the hash of a key is shifted to give its bit


class Merges(NamedTuple):
    """What was learned, as the kernels read it; nothing writes to it while text is encoded."""

    byte_ids: Array  # int64 (256,): the id of each byte
    pairs: Pairs
    lengths: Array  # int64 (ids,): the number of bytes of each id


def empty_pairs(num_merges: int) -> Pairs:
    """Return a table for that many merges, which `fill_pairs` fills: half of its places stay empty, and most bits."""
    num_slots = 1 << max(4, (2 * num_merges - 1).bit_length())
    num_bits = 8 * num_slots
    values = np.full(HASHED + 2 * num_slots, -1, dtype=np.int64)
    return Pairs(values, hash_shift(num_slots), np.zeros(num_bits // 64, dtype=np.uint64), hash_shift(num_bits))


@helper
def find_pair(pairs: Pairs, left: int, right: int) -> int:
    """Return a pair's value (rank, whether it is certain, and the id it makes); `NO_PAIR` if nothing merges it."""
    values = pairs.values
    if left | right < DIRECT_IDS:
        return values[unsigned(left * DIRECT_IDS + right)]
    key = left << 31 | right  # ids have 31 bits at most, so a key is positive and never -1
    digest = np.uint64(key) * _MIX
    bit = digest >> pairs.bits_shift
    if pairs.bits[bit >> _U6] >> (bit & _U63) & _U1 == _U0:
        return NO_PAIR
    place = HASHED + np.int64(digest >> pairs.shift) * 2
    while values[unsigned(place)] != key:
        if values[unsigned(place)] < 0:
            return NO_PAIR
        place += 2
        if place == values.size:
            place = HASHED
    return values[unsigned(place + 1)]


def mark_certain(merges: Array) -> Array:
    """Return merges in order, int64 (merges, 3) of (left, right, merged id), with `CERTAIN` set in the last of some."""
    ranks = np.arange(len(merges))
    never = len(merges)
    first_as_left, first_as_right = (np.full(merges.max(initial=0) + 1, never) for _ in range(2))
    # The last of several assignments to a place counts, and in this order that is the merge which comes first.
    first_as_left[merges[::-1, 0]], first_as_right[merges[::-1, 1]] = ranks[::-1], ranks[::-1]
    left, right, merged = merges.T
    taken_away = np.minimum(first_as_right[left], first_as_left[right])
    used = np.minimum(first_as_left[merged], first_as_right[merged])
    result = merges.copy()
    result[(ranks < taken_away) & (ranks < used), 2] |= CERTAIN
    return result


@kernel
def fill_pairs(ids: Array, pairs: Pairs) -> None:
    """Fill the table of pairs, all -1 before and no bit set, from merges in order: rows of (left, right, merged id).

    The last of a row may be marked (`mark_certain`).
    """
    values = pairs.values
    for place in range(HASHED):
        values[place] = NO_PAIR
    for rank in range(ids.shape[0]):
        left, right, value = ids[rank, 0], ids[rank, 1], rank << 32 | ids[rank, 2]
        if left | right < DIRECT_IDS:
            values[left * DIRECT_IDS + right] = value
            continue
        key = left << 31 | right
        digest = np.uint64(key) * _MIX
        bit = digest >> pairs.bits_shift
        pairs.bits[bit >> _U6] |= _U1 << (bit & _U63)
        place = HASHED + np.int64(digest >> pairs.shift) * 2
        while values[place] >= 0:  # taken: look on in the next place
            place += 2
            if place == values.size:
                place = HASHED
        values[place] = key
        values[place + 1] = value


@helper
def read_tokens(data: Array, start: int, length: int, base: int, merges: Merges, work: Array) -> int:
    """Put the tokens of the bytes at `base`, all certain merges made; return how many there are.

    From `base + length` on stands what each makes with the next one (`placed`).
    """
    number = 0
    for offset in range(length):
        token = merges.byte_ids[byte_at(data, start + offset)]
        while number > 0:
            value = find_pair(merges.pairs, work[unsigned(base + number - 1)], token)
            if value & CERTAIN == 0:
                work[unsigned(base + length + number - 1)] = placed(value, number - 1)
                break
            token = value & ID_BITS
            number -= 1
        work[unsigned(base + number)] = token
        number += 1
    work[unsigned(base + length + number - 1)] = NO_PAIR
    return number


@kernel
def merge_by_scan(data: Array, start: int, length: int, base: int, merges: Merges, work: Array) -> int:
    """Put the tokens of the bytes `data[start : start + length]` at `base`; return how many there are.

    The best pair is looked for over and over. Nothing is moved meanwhile: the tokens are a linked list, as the module's
    head draws it.
    """
    pairs = merges.pairs
    best_of, after, before = base + length, base + 2 * length, base + 3 * length
    number = read_tokens(data, start, length, base, merges, work)
    for place in range(number):
        work[unsigned(after + place)], work[unsigned(before + place)] = place + 1, place - 1
    while True:
        best = NO_PAIR
        for place in range(best_of, best_of + number):  # at most SCANNED_BYTES numbers side by side
            best = min(best, work[unsigned(place)])
        if best == NO_PAIR:
            break
        left = best >> 32 & PLACE_MASK  # the place is part of the value, so it need not be looked for
        right, leader = work[unsigned(after + left)], work[unsigned(before + left)]
        follower = work[unsigned(after + right)]
        work[unsigned(base + left)], work[unsigned(after + left)] = best & ID_BITS, follower
        work[unsigned(best_of + left)], work[unsigned(best_of + right)] = NO_PAIR, NO_PAIR
        if follower < number:
            work[unsigned(before + follower)] = left
            work[unsigned(best_of + left)] = placed_pair(base, left, follower, pairs, work)
        if leader >= 0:
            work[unsigned(best_of + leader)] = placed_pair(base, leader, left, pairs, work)
    return gather_tokens(base, number, after, work)


@helper
def placed_pair(base: int, left: int, right: int, pairs: Pairs, work: Array) -> int:
    """Return a pair's rank, its place below that, and in the low 32 bits what it makes: the least first."""
    return placed(find_pair(pairs, work[unsigned(base + left)], work[unsigned(base + right)]), left)


@helper
def placed(value: int, place: int) -> int:
    """Return a pair's value with its place below its rank."""
    return NO_PAIR if value == NO_PAIR else value >> 32 << PLACED_RANK | place << 32 | value & ID_BITS


@kernel
def gather_tokens(base: int, number: int, after: int, work: Array) -> int:
    """Put the tokens of a linked list of `number` places together at `base`; return how many there are."""
    found = place = 0
    while place < number:
        work[unsigned(base + found)] = work[unsigned(base + place)]
        found, place = found + 1, work[unsigned(after + place)]
    return found


@kernel
def push(heap: Array, base: int, size: int, item: int) -> None:
    """Put an item into a heap (the least on top) of `size` items that begins at `base`."""
    place = size
    while place > 0 and heap[base + (place - 1) // 2] > item:
        heap[base + place] = heap[base + (place - 1) // 2]
        place = (place - 1) // 2
    heap[base + place] = item


@kernel
def pop(heap: Array, base: int, size: int) -> int:
    """Take the least item out of a heap of `size` items and return it."""
    least, item = heap[base], heap[base + size - 1]
    place, child = 0, 1
    while child < size - 1:
        if child + 1 < size - 1 and heap[base + child + 1] < heap[base + child]:
            child += 1
        if heap[base + child] >= item:
            break
        heap[base + place] = heap[base + child]
        place, child = child, 2 * child + 1
    heap[base + place] = item
    return least


@kernel
def merge_by_heap(base: int, length: int, pairs: Pairs, work: Array) -> int:
    """Merge like `merge_by_scan`, with a heap of (rank, place) over a linked list.

    `work` holds from `base` the ids, then for each place the next one, the one before, and the heap, at most three
    entries a place.
    """
    after, before, heap, size = base + length, base + 2 * length, base + 3 * length, 0
    for place in range(length):
        work[after + place], work[before + place] = place + 1, place - 1
        if place + 1 < length:
            size = push_pair(base, place, place + 1, pairs, work, heap, size)
    while size > 0:
        item = pop(work, heap, size)
        size -= 1
        left = item & LOW_BITS
        right = work[after + left]
        if right >= length:
            continue
        # An entry is true while its two tokens still make a pair of its rank; merges around them may have ended that.
        value = find_pair(pairs, work[base + left], work[base + right])
        if value == NO_PAIR or value >> 32 != item >> 32:
            continue  # out of date
        follower, leader = work[after + right], work[before + left]
        work[base + left], work[base + right] = value & ID_BITS, -1
        work[after + left], work[after + right] = follower, length
        if follower < length:
            work[before + follower] = left
            size = push_pair(base, left, follower, pairs, work, heap, size)
        if leader >= 0:
            size = push_pair(base, leader, left, pairs, work, heap, size)
    return gather_tokens(base, length, after, work)


@kernel
def push_pair(base: int, left: int, right: int, pairs: Pairs, work: Array, heap: int, size: int) -> int:
    """Put two neighbours into the heap if something merges them; return the heap's new size."""
    value = find_pair(pairs, work[base + left], work[base + right])
    if value == NO_PAIR:
        return size
    push(work, heap, size, value >> 32 << 32 | left)
    return size + 1


@kernel
def merge_window(data: Array, start: int, length: int, base: int, merges: Merges, work: Array) -> int:
    """Put the tokens of the bytes `data[start : start + length]` at `base`; return how many there are."""
    if length <= SCANNED_BYTES:
        return merge_by_scan(data, start, length, base, merges, work)
    for offset in range(length):
        work[unsigned(base + offset)] = merges.byte_ids[byte_at(data, start + offset)]
    return merge_by_heap(base, length, merges.pairs, work)


@kernel
def is_repeated(data: Array, start: int, other: int, length: int) -> bool:
    """Return whether two stretches of bytes are the same, as they are in a run of one character."""
    for offset in range(length):
        if byte_at(data, start + offset) != byte_at(data, other + offset):
            return False
    return True


@kernel
def merge_by_windows(data: Array, start: int, end: int, merges: Merges, work: Array, out: Array, first: int) -> int:
    """Write the ids of the bytes `data[start:end]` to `out[first:]`, as `bpe_merge.merge_by_windows` explains.

    Returns where they end. `work` holds the tokens of the window, then
    those of the next one with what merging it needs.
    """
    written, window = first, min(WINDOW_BYTES, end - start)
    number = merge_window(data, start, window, 0, merges, work)
    settled = window * 29 // 32
    while start + window < end:
        kept = num_bytes = 0
        while kept < number - 1 and (kept == 0 or num_bytes + merges.lengths[work[kept]] <= settled):
            num_bytes += merges.lengths[work[kept]]
            kept += 1
        begin, others, num_others = start + num_bytes, 0, number
        if kept and not (begin + window <= end and is_repeated(data, start, begin, window)):
            others = window
            num_others = merge_window(data, begin, min(window, end - begin), others, merges, work)
        if kept and work[others] == work[kept]:  # both windows have this token: join them here
            written = write_tokens(kept, work, out, written)
            for place in range(num_others):
                work[place] = work[others + place]
            start, number = begin, num_others
        elif kept > 1:  # try a border further to the left
            settled = num_bytes // 2
            continue
        else:  # no token in common: a larger window
            token, window = work[0], min(2 * window, end - start)
            number = merge_window(data, start, window, 0, merges, work)
            while written > first and work[0] != token:
                written -= 1
                token = np.int64(out[written])
                start -= merges.lengths[token]
                number = merge_window(data, start, window, 0, merges, work)
        settled = window * 29 // 32
    return write_tokens(number, work, out, written)


@kernel
def write_tokens(number: int, work: Array, out: Array, written: int) -> int:
    """Write the ids of the first tokens in `work` after those that are written; return where they end."""
    for place in range(number):
        out[unsigned(written + place)] = work[unsigned(place)]
    return written + number


@kernel
def merge_piece(data: Array, start: int, length: int, merges: Merges, work: Array, out: Array, written: int) -> int:
    """Write the ids of one piece after those that are written; return where they end."""
    if length > SCANNED_BYTES:
        return merge_by_windows(data, start, start + length, merges, work, out, written)
    number = merge_window(data, start, length, 0, merges, work)
    return write_tokens(number, work, out, written)
