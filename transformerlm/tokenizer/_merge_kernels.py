"""Applying merges to one pre-token, compiled: `bpe_merge.py` over arrays, with the same names.

The rules of `_kernels.py` hold here too. A piece's ids stand in `work`, which has `WORK_PER_BYTE` places for each of
them. The table of pairs is open addressing over (key, value), the key -1 where a place is empty.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from transformerlm.tokenizer._jit import byte_at, helper, kernel

Array = np.ndarray[Any, Any]

SCANNED_BYTES = 64  # up to here a scan for the best pair beats a heap
WORK_PER_BYTE = 6
NO_PAIR = (1 << 63) - 1

_MIX = np.uint64(0x9E3779B97F4A7C15)


@helper
def find_pair(pairs: Array, shift: Any, left: int, right: int) -> int:
    """Return a pair's rank and, in the low 32 bits, the id that merging it makes; `NO_PAIR` if nothing merges it."""
    key = left << 31 | right
    place = np.int64(np.uint64(key) * _MIX >> shift) * 2
    while pairs[place] != key:
        if pairs[place] < 0:
            return NO_PAIR
        place += 2
        if place == pairs.size:
            place = 0
    return pairs[place + 1]


@kernel
def fill_pairs(ids: Array, pairs: Array, shift: Any) -> None:
    """Fill the table of pairs, all -1 before, from merges in order: rows of (left id, right id, merged id)."""
    for rank in range(ids.shape[0]):
        key = ids[rank, 0] << 31 | ids[rank, 1]
        place = np.int64(np.uint64(key) * _MIX >> shift) * 2
        while pairs[place] >= 0:
            place = (place + 2) % pairs.size
        pairs[place] = key
        pairs[place + 1] = rank << 32 | ids[rank, 2]


@kernel
def merge_by_scan(length: int, pairs: Array, shift: Any, work: Array) -> int:
    """Merge the ids in `work[:length]` by looking for the best pair over and over; return how many remain."""
    best_of = length  # what each id makes with the next one stands behind the ids
    for place in range(length - 1):
        work[best_of + place] = find_pair(pairs, shift, work[place], work[place + 1])
    while length > 1:
        best, at = work[best_of], 0
        for place in range(1, length - 1):
            if work[best_of + place] < best:
                best, at = work[best_of + place], place
        if best == NO_PAIR:
            break
        work[at] = best & 0xFFFFFFFF
        length -= 1
        for place in range(at + 1, length):
            work[place] = work[place + 1]
            work[best_of + place - 1] = work[best_of + place]
        if at > 0:
            work[best_of + at - 1] = find_pair(pairs, shift, work[at - 1], work[at])
        if at < length - 1:
            work[best_of + at] = find_pair(pairs, shift, work[at], work[at + 1])
    return length


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
def merge_by_heap(length: int, pairs: Array, shift: Any, work: Array) -> int:
    """Merge the ids in `work[:length]` with a heap of (rank, place) over a linked list; return how many remain.

    `work` holds the ids, then for each place the next one, the one before, and the heap, at most three entries a place.
    """
    after, before, heap, size = length, 2 * length, 3 * length, 0
    for place in range(length):
        work[after + place], work[before + place] = place + 1, place - 1
        if place + 1 < length:
            value = find_pair(pairs, shift, work[place], work[place + 1])
            if value != NO_PAIR:
                push(work, heap, size, value >> 32 << 32 | place)
                size += 1
    while size > 0:
        item = pop(work, heap, size)
        size -= 1
        left = item & 0xFFFFFFFF
        right = work[after + left]
        if right >= length:
            continue
        value = find_pair(pairs, shift, work[left], work[right])
        if value == NO_PAIR or value >> 32 != item >> 32:
            continue  # out of date
        follower, leader = work[after + right], work[before + left]
        work[left], work[right] = value & 0xFFFFFFFF, -1
        work[after + left], work[after + right] = follower, length
        if follower < length:
            work[before + follower] = left
            size = push_pair(work, heap, size, left, follower, pairs, shift)
        if leader >= 0:
            size = push_pair(work, heap, size, leader, left, pairs, shift)
    number = 0
    for place in range(length):
        if work[place] >= 0:
            work[number] = work[place]
            number += 1
    return number


@kernel
def push_pair(work: Array, heap: int, size: int, left: int, right: int, pairs: Array, shift: Any) -> int:
    """Put two neighbours into the heap if something merges them; return the heap's new size."""
    value = find_pair(pairs, shift, work[left], work[right])
    if value == NO_PAIR:
        return size
    push(work, heap, size, value >> 32 << 32 | left)
    return size + 1


@kernel
def merge_piece(data: Array, start: int, length: int, byte_ids: Array, pairs: Array, shift: Any, work: Array) -> int:
    """Put the ids of one piece into `work` and return how many they are."""
    for offset in range(length):
        work[offset] = byte_ids[byte_at(data, start + offset)]
    if length <= SCANNED_BYTES:
        return merge_by_scan(length, pairs, shift, work)
    return merge_by_heap(length, pairs, shift, work)
