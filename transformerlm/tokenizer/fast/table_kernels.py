"""The table of pieces, and counting them: the inner loops of `counting.BatchCounter`, compiled.

A piece is a pre-token, or a part of one. The table is open addressing over slots of four words: key, key, value,
length. A piece of up to fifteen bytes *is* its key: first eight bytes, next seven, and the length in the top byte. A
longer one has a hash and the place of its bytes in `long_bytes`, where it is compared. The second key of an empty slot
is 0. A value is a count here, and the ids of the piece in `encode_kernels.py`, whose rules and names hold here too.

Part of: counter, encode_kernels, encoder
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from transformerlm.tokenizer.fast.arrays import Array, hash_shift
from transformerlm.tokenizer.fast.jit import byte_at, helper, kernel, unsigned, word_at
from transformerlm.tokenizer.fast.piece_kernels import next_end

DONE, NEED_SLOTS, NEED_LONG_BYTES, NEED_IDS, NEED_WORK = 0, 1, 2, 3, 4
# Places in `cursor` and in `used`, the arrays in which kernels and their callers keep where they are.
SEGMENT, POSITION, WRITTEN, NEEDED, PIECE_END = 0, 1, 2, 3, 4
USED_SLOTS, USED_BYTES, USED_IDS = 0, 1, 2

SLOT_WORDS = 4
SHORT_BYTES = 15
LONG = np.uint64(0xFF << 56)  # the second key of a long piece begins with this

_U0, _U1, _U2, _U3, _U4 = (np.uint64(number) for number in range(5))
_U29, _U56 = np.uint64(29), np.uint64(56)
_PLACE_MASK, _BYTE_MASK = np.uint64((1 << 40) - 1), np.uint64(0xFF)
_MIX_A, _MIX_B = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)
_ALL_ONES = (1 << 64) - 1
_FIRST_MASK = np.array([_ALL_ONES >> max(0, 64 - 8 * length) if length else 0 for length in range(17)], np.uint64)
_SECOND_MASK = np.array([_ALL_ONES >> (128 - 8 * length) if length > 8 else 0 for length in range(17)], np.uint64)


class Pieces(NamedTuple):
    """The table of pieces; its owner grows the arrays when a kernel asks (see `room_for`)."""

    slots: Array  # uint64 (4 * number of slots,): key, key, value, length of each
    shift: Any  # uint64: by how much a hash is shifted to give a slot's number
    used: Array  # int64 (3,): how many slots, long bytes and ids are in use
    long_bytes: Array  # uint8: the bytes of all long pieces, one after the other
    ids: Array  # uint32: the ids of all pieces that have three or more, one after the other; empty while counting


@helper
def short_key(data: Array, start: int, length: int) -> tuple[Any, Any]:
    """Return one to fifteen bytes and their number as two words."""
    # Both words are read whole and masked: that is quicker than a loop over the bytes, and the padding allows it.
    first = word_at(data, start) & _FIRST_MASK[unsigned(length)]
    second = word_at(data, start + 8) & _SECOND_MASK[unsigned(length)]
    return first, second | np.uint64(length) << _U56


@helper
def home_slot(first: Any, second: Any, shift: Any) -> Any:
    """Return the place in the table, in words, where the search for a key begins; the table has 2^(64-shift) slots."""
    return ((first ^ second * _MIX_A) * _MIX_B) >> shift << _U2


@helper
def probe(slots: Array, place: Any, first: Any, second: Any) -> Any:
    """Return the place of a short piece's slot, from its home on, or that of the empty slot where it belongs."""
    mask = np.uint64(slots.size - 1)
    # The key is the piece itself: an equal key is an equal piece, and the search ends at an empty slot.
    while slots[place + _U1] != _U0 and (slots[place] != first or slots[place + _U1] != second):
        place = (place + _U4) & mask
    return place


@helper
def long_hash(data: Array, start: int, length: int) -> Any:
    """Return a hash of more than fifteen bytes."""
    # Eight bytes at a time; the last eight may overlap those before, so no byte is left over.
    result = np.uint64(length)
    for place in range(start, start + length - 7, 8):
        result = (result ^ word_at(data, place)) * _MIX_A
        result ^= result >> _U29
    return (result ^ word_at(data, start + length - 8)) * _MIX_B


@helper
def equal_bytes(left: Array, left_start: int, right: Array, right_start: int, length: int) -> bool:
    """Return whether two stretches of eight bytes or more are the same."""
    # Eight at a time; the last eight may overlap those before.
    for offset in range(0, length - 7, 8):
        if word_at(left, left_start + offset) != word_at(right, right_start + offset):
            return False
    return word_at(left, left_start + length - 8) == word_at(right, right_start + length - 8)


@kernel
def find_slot(data: Array, start: int, length: int, pieces: Pieces) -> Any:
    """Return the place of a piece's slot in the table, or that of the empty slot where it belongs."""
    first, second, home = key_and_home(data, start, length, pieces.shift)
    return slot_from(home, data, start, length, first, second, pieces)


@helper
def key_and_home(data: Array, start: int, length: int, shift: Any) -> tuple[Any, Any, Any]:
    """Return the two words of a piece's key, those of a long one its hash and 1, and where the search for it begins.

    No slot has 1 as its second key: an empty one has 0, and a short piece's length is in the top byte.
    """
    if length <= SHORT_BYTES:
        first, second = short_key(data, start, length)
        return first, second, home_slot(first, second, shift)
    first = long_hash(data, start, length)
    return first, _U1, home_slot(first, LONG, shift)


@helper
def slot_from(home: Any, data: Array, start: int, length: int, first: Any, second: Any, pieces: Pieces) -> Any:
    """Return what `find_slot` does, for a piece whose key and home are known."""
    if second == _U1:
        return probe_long(data, start, length, pieces, home, first)
    return probe(pieces.slots, home, first, second)


@helper
def probe_long(data: Array, start: int, length: int, pieces: Pieces, place: Any, first: Any) -> Any:
    """Return the place of a long piece's slot, from its home on, or that of the empty slot where it belongs."""
    slots = pieces.slots
    mask = np.uint64(slots.size - 1)
    while slots[place + _U1] != _U0:
        # The hash and the length first; the bytes are compared only where both agree.
        if slots[place] == first and slots[place + _U3] == np.uint64(length) and slots[place + _U1] >= LONG:
            stored = np.int64(slots[place + _U1] & _PLACE_MASK)
            if equal_bytes(data, start, pieces.long_bytes, stored, length):
                break
        place = (place + _U4) & mask
    return place


@kernel
def fill_slot(data: Array, start: int, length: int, pieces: Pieces, place: Any) -> None:
    """Write a piece's key into an empty slot, and a long piece's bytes after those of the others."""
    slots, used = pieces.slots, pieces.used
    if length <= SHORT_BYTES:
        first, second = short_key(data, start, length)
    else:
        first = long_hash(data, start, length)
        stored = used[USED_BYTES]
        second = LONG | np.uint64(stored)
        for offset in range(length):
            pieces.long_bytes[unsigned(stored + offset)] = byte_at(data, start + offset)
        used[USED_BYTES] = stored + length
    slots[place] = first
    slots[place + _U1] = second
    slots[place + _U3] = np.uint64(length)
    used[USED_SLOTS] += 1


@kernel
def rehash(old: Array, slots: Array, shift: Any) -> None:
    """Move all pieces of a table into a larger empty one."""
    mask = np.uint64(slots.size - 1)
    for start in range(0, old.size, SLOT_WORDS):
        if old[start + 1] != _U0:
            # A long piece's second word also holds where its bytes are; its home goes by the mark alone.
            second = LONG if old[start + 1] >= LONG else old[start + 1]
            place = home_slot(old[start], second, shift)
            while slots[place + _U1] != _U0:
                place = (place + _U4) & mask
            for word in range(SLOT_WORDS):
                slots[place + np.uint64(word)] = old[start + word]


def with_more_slots(pieces: Pieces, slots: Array) -> Pieces:
    """Return the table with all its pieces moved into a larger empty array of slots; its owner calls this."""
    shift = hash_shift(slots.size // SLOT_WORDS)
    rehash(pieces.slots, slots, shift)
    return pieces._replace(slots=slots, shift=shift)


@helper
def room_for(length: int, pieces: Pieces) -> int:
    """Return what a new piece lacks: nothing (`DONE`), slots (half of them stay empty), or room for its bytes."""
    used = pieces.used
    if (used[USED_SLOTS] + 1) * 2 * SLOT_WORDS > pieces.slots.size:
        return NEED_SLOTS
    if length > SHORT_BYTES and used[USED_BYTES] + length + 8 > pieces.long_bytes.size:
        return NEED_LONG_BYTES
    return DONE


@helper
def room_to_count(length: int, pieces: Pieces) -> int:
    """Return what a new piece lacks to be counted: as `room_for`, but only a quarter of the slots stays empty."""
    used = pieces.used
    if (used[USED_SLOTS] + 1) * 4 * SLOT_WORDS > 3 * pieces.slots.size:
        return NEED_SLOTS
    if length > SHORT_BYTES and used[USED_BYTES] + length + 8 > pieces.long_bytes.size:
        return NEED_LONG_BYTES
    return DONE


@helper
def skip_known(data: Array, start: int, end: int, pattern: int, kinds: Array, pieces: Pieces) -> tuple[int, int]:
    """Count short pieces that are in the table, up to the first other one; return where that begins and ends."""
    slots, shift = pieces.slots, pieces.shift
    seen_from, seen = start, _U0  # what is left of the scanner's last look
    while start < end:
        stop, seen_from, seen = next_end(data, start, end, pattern, kinds, seen_from, seen)
        if stop - start > SHORT_BYTES:
            return start, stop
        first, second = short_key(data, start, stop - start)
        place = probe(slots, home_slot(first, second, shift), first, second)
        if slots[place + _U1] == _U0:
            return start, stop
        slots[place + _U2] += _U1
        start = stop
    return end, end


@kernel
def count_pieces(data: Array, segments: Array, cursor: Array, pattern: int, kinds: Array, pieces: Pieces) -> int:
    """Count the pieces of the segments, rows of (start, end), into the table's values; return `DONE` or a need."""
    slots = pieces.slots
    while cursor[SEGMENT] < segments.shape[0]:
        end = segments[cursor[SEGMENT], 1]
        start = max(cursor[POSITION], segments[cursor[SEGMENT], 0])
        while start < end:
            start, stop = skip_known(data, start, end, pattern, kinds, pieces)
            cursor[POSITION] = start
            if start == end:
                break
            place = find_slot(data, start, stop - start, pieces)
            if slots[place + _U1] == _U0:
                need = room_to_count(stop - start, pieces)
                if need != DONE:
                    cursor[NEEDED] = stop - start
                    return need
                fill_slot(data, start, stop - start, pieces, place)
            slots[place + _U2] += _U1
            start = stop
        cursor[SEGMENT] += 1
        cursor[POSITION] = 0
    return DONE


@kernel
def list_pieces(pieces: Pieces, data: Array, ends: Array, values: Array) -> int:
    """Write the bytes of all pieces of a table one after the other, where each ends, and its value; return how many."""
    slots, long_bytes = pieces.slots, pieces.long_bytes
    number, stop = 0, 0
    for place in range(0, slots.size, SLOT_WORDS):
        second = slots[place + 1]
        if second == _U0:
            continue
        length = np.int64(slots[place + 3])
        for offset in range(length):
            if second >= LONG:
                data[stop + offset] = long_bytes[np.int64(second & _PLACE_MASK) + offset]
            else:
                word = slots[place] if offset < 8 else second  # the bytes of a short piece are its key
                data[stop + offset] = word >> np.uint64(8 * (offset & 7)) & _BYTE_MASK
        stop += length
        ends[number], values[number] = stop, slots[place + 2]
        number += 1
    return number


@kernel
def add_counts(data: Array, ends: Array, values: Array, cursor: Array, pieces: Pieces) -> int:
    """Add listed pieces with their counts to a table; return `DONE` or a need."""
    slots = pieces.slots
    while cursor[POSITION] < ends.size:
        number = cursor[POSITION]
        start = ends[number - 1] if number > 0 else 0
        length = ends[number] - start
        place = find_slot(data, start, length, pieces)
        if slots[place + _U1] == _U0:
            need = room_to_count(length, pieces)
            if need != DONE:
                cursor[NEEDED] = length
                return need
            fill_slot(data, start, length, pieces, place)
            slots[place + _U2] = _U0
        slots[place + _U2] += values[number]
        cursor[POSITION] = number + 1
    return DONE
