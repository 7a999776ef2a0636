"""The tokenizer's inner loops, compiled by numba: the table of pre-tokens, counting and encoding.

Each kernel does to arrays what the readable code does to strings: `count_pieces` is `counting.BatchCounter`,
`encode_segments` is `ReferenceEngine.encode`. `piece_kernels.py` has the pattern, `merge_kernels.py` the merges of one
piece, `text_kernels.py` what is done to whole texts, and `train_kernels.py` the learning of merges. docs/tokenizer.md
says why they are fast.

Rules for all kernels. A kernel never allocates: where an array is too small it stops at a whole piece, says in `cursor`
where, and returns what it needs; its caller in `encoder.py` or `counter.py` makes room and calls again. Positions are
signed, keys and hashes are unsigned numbers, and the two never meet in one sum (numba would make it a float). Texts are
valid UTF-8 followed by `PADDING` zero bytes; on other bytes the cuts are arbitrary, but no read leaves the array.

Arrays that belong together come as one named tuple. What all kernels here call the same:

    data      uint8 (bytes + PADDING,)   the texts, one after the other
    segments  int64 (segments, 3)        start, end, id to write after it or -1 (counting needs the first two columns)
    cursor    int64 (5,)                 SEGMENT, POSITION, WRITTEN, PIECE_END: where to go on, and where the pre-token
                                         ends in which that is; NEEDED: the length of the piece that lacks room
    kinds     uint16                     `unicode_tables.unicode_table()`
    out       uint32                     the ids of this call
    ends      int64 (segments,)          how many ids are written after each segment
    work      int64                      room to merge one piece, see `merge_kernels.py`

**The piece table** is open addressing over slots of four words: key, key, value, length. A piece of up to fifteen
bytes *is* its key: first eight bytes, next seven, and the length in the top byte. A longer one has a hash and the place
of its bytes in `long_bytes`, where it is compared. The second key of an empty slot is 0.

Part of: counter, encoder
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from transformerlm.tokenizer.fast.arrays import Array, hash_shift
from transformerlm.tokenizer.fast.jit import byte_at, helper, kernel, prefetch, word_at
from transformerlm.tokenizer.fast.merge_kernels import WORK_PER_BYTE, Merges, merge_piece
from transformerlm.tokenizer.fast.piece_kernels import next_end
from transformerlm.tokenizer.fast.seam_kernels import Seams, first_seam, may_have_seams

DONE, NEED_SLOTS, NEED_LONG_BYTES, NEED_IDS, NEED_WORK = 0, 1, 2, 3, 4
# Places in `cursor` and in `used`, the arrays in which kernels and their callers keep where they are.
SEGMENT, POSITION, WRITTEN, NEEDED, PIECE_END = 0, 1, 2, 3, 4
USED_SLOTS, USED_BYTES, USED_IDS = 0, 1, 2

SLOT_WORDS = 4
SHORT_BYTES = 15
CACHED_BYTES = 255  # longer pieces hardly ever come twice
AHEAD = 16  # so many pieces are found before the first of them is looked up: their slots are loaded meanwhile

_U0, _U1, _U2, _U3, _U4 = (np.uint64(number) for number in range(5))
_U29, _U31, _U40, _U56, _U62 = (np.uint64(number) for number in (29, 31, 40, 56, 62))
_ID_MASK, _COUNT_MASK, _PLACE_MASK = np.uint64((1 << 31) - 1), np.uint64(0xFFFF), np.uint64((1 << 40) - 1)
_BYTE_MASK = np.uint64(0xFF)
_TWO_IDS = np.uint64(1 << 62)
_LONG = np.uint64(0xFF << 56)
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


class Ahead(NamedTuple):
    """Pieces that are found and not yet looked up, up to `AHEAD` of them."""

    ends: Array  # int64 (2 * AHEAD,): where each ends, and where its pre-token does
    keys: Array  # uint64 (3 * AHEAD,): the two words of its key (a long one: its hash and 0), and its home in the table


@helper
def short_key(data: Array, start: int, length: int) -> tuple[Any, Any]:
    """Return one to fifteen bytes and their number as two words."""
    # Both words are read whole and masked: that is quicker than a loop over the bytes, and the padding allows it.
    first = word_at(data, start) & _FIRST_MASK[length]
    second = word_at(data, start + 8) & _SECOND_MASK[length]
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
    slots, shift = pieces.slots, pieces.shift
    if length <= SHORT_BYTES:
        first, second = short_key(data, start, length)
        return probe(slots, home_slot(first, second, shift), first, second)
    first = long_hash(data, start, length)
    return probe_long(data, start, length, pieces, home_slot(first, _LONG, shift), first)


@helper
def probe_long(data: Array, start: int, length: int, pieces: Pieces, place: Any, first: Any) -> Any:
    """Return the place of a long piece's slot, from its home on, or that of the empty slot where it belongs."""
    slots = pieces.slots
    mask = np.uint64(slots.size - 1)
    while slots[place + _U1] != _U0:
        # The hash and the length first; the bytes are compared only where both agree.
        if slots[place] == first and slots[place + _U3] == np.uint64(length) and slots[place + _U1] >= _LONG:
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
        second = _LONG | np.uint64(stored)
        for offset in range(length):
            pieces.long_bytes[stored + offset] = byte_at(data, start + offset)
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
            second = _LONG if old[start + 1] >= _LONG else old[start + 1]
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
            if second >= _LONG:
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


@helper
def look_ahead(
    data: Array,
    start: int,
    piece_end: int,
    end: int,
    pattern: int,
    kinds: Array,
    pieces: Pieces,
    seams: Seams,
    ahead: Ahead,
    seen_from: int,
    seen: Any,
) -> tuple[int, int, Any]:
    """Find the next pieces and their homes in the table, and begin to load these; return how many there are.

    A pre-token is cut at its seams: `piece_end` is where the present one ends, and not after `start` if none has begun.
    The scanner's last look, `seen_from` and `seen`, is returned as `next_end` does.
    """
    number = 0
    while start < end and number < AHEAD:
        if start >= piece_end:
            piece_end, seen_from, seen = next_end(data, start, end, pattern, kinds, seen_from, seen)
        stop = piece_end
        if seen == _U0 and may_have_seams(data, start):  # a look shows no piece that has seams
            stop = first_seam(data, start, piece_end, seams)
        if stop - start <= SHORT_BYTES:
            first, second = short_key(data, start, stop - start)
            home = home_slot(first, second, pieces.shift)
        else:
            first, second = long_hash(data, start, stop - start), _U0
            home = home_slot(first, _LONG, pieces.shift)
        prefetch(pieces.slots, home)
        ahead.ends[2 * number], ahead.ends[2 * number + 1] = stop, piece_end
        ahead.keys[3 * number], ahead.keys[3 * number + 1], ahead.keys[3 * number + 2] = first, second, home
        start = stop
        number += 1
    return number, seen_from, seen


@helper
def write_value(value: Any, ids: Array, out: Array, written: int) -> int:
    """Write the ids that a slot's value holds; `out` always has room for one more than there are bytes.

    A value says, in its highest bits, how the ids are kept: 0 one id, 1 two ids, both in the value itself; 2 more of
    them, at a place in `ids`.
    """
    if value < _TWO_IDS << _U1:  # one id or two: both are written, and bit 62 says how many count
        out[written] = value & _ID_MASK
        out[written + 1] = value >> _U31 & _ID_MASK
        return written + 1 + np.int64(value >> _U62)
    place = np.int64(value & _PLACE_MASK)
    number = np.int64(value >> _U40 & _COUNT_MASK)
    for offset in range(number):
        out[written + offset] = ids[place + offset]
    return written + number


@kernel
def keep_ids(out: Array, start: int, end: int, pieces: Pieces, place: Any) -> None:
    """Write the ids in `out[start:end]` into the value of a piece's slot, three and more at the end of `ids`."""
    slots, used, ids = pieces.slots, pieces.used, pieces.ids
    number = end - start
    if number == 1:
        slots[place + _U2] = np.uint64(out[start])
    elif number == 2:
        slots[place + _U2] = _TWO_IDS | np.uint64(out[start + 1]) << _U31 | np.uint64(out[start])
    else:
        stored = used[USED_IDS]
        for offset in range(number):
            ids[stored + offset] = out[start + offset]
        used[USED_IDS] = stored + number
        slots[place + _U2] = _TWO_IDS << _U1 | np.uint64(number) << _U40 | np.uint64(stored)


@kernel
def encode_segments(
    data: Array,
    segments: Array,
    cursor: Array,
    pattern: int,
    kinds: Array,
    merges: Merges,
    seams: Seams,
    pieces: Pieces,
    ahead: Ahead,
    work: Array,
    out: Array,
    ends: Array,
) -> int:
    """Encode the segments into `out`, with the ids that follow them; return `DONE` or a need."""
    slots = pieces.slots
    while cursor[SEGMENT] < segments.shape[0]:
        row = cursor[SEGMENT]
        end = segments[row, 1]
        start = max(cursor[POSITION], segments[row, 0])
        written, piece_end = cursor[WRITTEN], cursor[PIECE_END]
        seen_from, seen = start, _U0
        while start < end:
            number, seen_from, seen = look_ahead(
                data, start, piece_end, end, pattern, kinds, pieces, seams, ahead, seen_from, seen
            )
            for piece in range(number):
                stop = ahead.ends[2 * piece]
                first, second, place = ahead.keys[3 * piece], ahead.keys[3 * piece + 1], ahead.keys[3 * piece + 2]
                if second == _U0:
                    place = probe_long(data, start, stop - start, pieces, place, first)
                else:
                    place = probe(slots, place, first, second)
                if slots[place + _U1] != _U0:
                    written = write_value(slots[place + _U2], pieces.ids, out, written)
                else:
                    need = room_to_encode(stop - start, pieces, work)
                    if need != DONE:  # the next call goes on from here
                        cursor[POSITION], cursor[WRITTEN], cursor[PIECE_END] = start, written, piece_end
                        cursor[NEEDED] = stop - start
                        return need
                    written = encode_new(data, start, stop - start, merges, pieces, place, work, out, written)
                start, piece_end = stop, ahead.ends[2 * piece + 1]
        if segments[row, 2] >= 0:
            out[written] = segments[row, 2]
            written += 1
        ends[row] = written
        cursor[SEGMENT], cursor[POSITION], cursor[WRITTEN], cursor[PIECE_END] = row + 1, 0, written, 0
    return DONE


@kernel
def encode_new(
    data: Array,
    start: int,
    length: int,
    merges: Merges,
    pieces: Pieces,
    place: Any,
    work: Array,
    out: Array,
    written: int,
) -> int:
    """Write the ids of a piece that is not in the table, and put it there; return how many ids are written now."""
    end = merge_piece(data, start, length, merges, work, out, written)
    if length <= CACHED_BYTES:  # else the next such piece is merged again
        fill_slot(data, start, length, pieces, place)
        keep_ids(out, written, end, pieces, place)
    return end


@helper
def room_to_encode(length: int, pieces: Pieces, work: Array) -> int:
    """Return what merging and keeping a new piece lacks, `DONE` if nothing."""
    if length * WORK_PER_BYTE > work.size:
        return NEED_WORK
    if length > CACHED_BYTES:
        return DONE
    if pieces.used[USED_IDS] + length > pieces.ids.size:
        return NEED_IDS
    return room_for(length, pieces)
