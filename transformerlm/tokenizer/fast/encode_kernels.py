"""Encoding, compiled by numba, and the rules of all the tokenizer's inner loops.

Each kernel does to arrays what the readable code does to strings: `encode_segments` is `ReferenceEngine.encode`.
`piece_kernels.py` has the pattern, `table_kernels.py` the table of pieces and counting, `merge_kernels.py` the merges
of one piece, `text_kernels.py` what is done to whole texts, and `train_kernels.py` the learning of merges.
docs/tokenizer.md says why they are fast.

Rules for all kernels. A kernel never allocates: where an array is too small it stops at a whole piece, says in `cursor`
where, and returns what it needs; its caller in `encoder.py` or `counter.py` makes room and calls again. Positions are
signed, keys and hashes are unsigned numbers, and the two never meet in one sum (numba would make it a float). Texts are
valid UTF-8 followed by `PADDING` zero bytes; on other bytes the cuts are arbitrary, but no read leaves the array.

Arrays that belong together come as one named tuple. What all kernels here call the same:

    data      uint8 (bytes + PADDING,)   the texts, one after the other
    segments  int64 (segments, 3)        start, end, id to write after it or -1 (counting needs the first two columns)
    ahead     uint64 (AHEAD_WORDS * MOST_AHEAD,)  pieces that are found and not yet looked up
    cursor    int64 (5,)                 SEGMENT, POSITION, WRITTEN, PIECE_END: where to go on, and where the pre-token
                                         ends in which that is; NEEDED: the length of the piece that lacks room
    kinds     uint16                     `unicode_tables.unicode_table()`
    out       uint32                     the ids of this call
    ends      int64 (segments,)          how many ids are written after each segment
    work      int64                      room to merge one piece, see `merge_kernels.py`

**Encoding** takes two loops in turn over some dozen pieces. The first finds them and begins to load their slots of the
table; the second writes the ids of those that are known, and stops at the others.

Part of: encoder
"""

from __future__ import annotations

from typing import Any

import numpy as np

from transformerlm.tokenizer.fast.arrays import Array
from transformerlm.tokenizer.fast.jit import helper, kernel, lowest_bit, prefetch, unsigned
from transformerlm.tokenizer.fast.merge_kernels import WORK_PER_BYTE, Merges, merge_piece
from transformerlm.tokenizer.fast.piece_kernels import ends_from
from transformerlm.tokenizer.fast.piece_kernels import piece_end as pre_token_end
from transformerlm.tokenizer.fast.seam_kernels import Seams, first_seam, may_have_seams
from transformerlm.tokenizer.fast.table_kernels import (
    DONE,
    NEED_IDS,
    NEED_WORK,
    NEEDED,
    PIECE_END,
    POSITION,
    SEGMENT,
    SHORT_BYTES,
    USED_IDS,
    WRITTEN,
    Pieces,
    fill_slot,
    key_and_home,
    room_for,
    slot_from,
)

CACHED_BYTES = 255  # longer pieces hardly ever come twice
AHEAD = 64  # so many pieces, or more, are found before the first is looked up: their slots are loaded meanwhile
MOST_AHEAD = AHEAD + 64  # one look shows no more than 64

_U0, _U1, _U2, _U31, _U40, _U62 = (np.uint64(number) for number in (0, 1, 2, 31, 40, 62))
_ID_MASK, _COUNT_MASK, _PLACE_MASK = np.uint64((1 << 31) - 1), np.uint64(0xFFFF), np.uint64((1 << 40) - 1)
_TWO_IDS = np.uint64(1 << 62)
# What `ahead` holds of a piece that is found and not yet looked up: the two words of its key (a long one: its hash and
# 1), its home in the table, where it ends, and where its pre-token does.
_FIRST, _SECOND, _HOME, _STOP, _PIECE_STOP = (np.uint64(number) for number in range(5))
AHEAD_WORDS = 5


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
    ahead: Array,
) -> int:
    """Find the next pieces and their homes in the table, and begin to load these; return how many there are.

    A pre-token is cut at its seams: `piece_end` is where the present one ends, and not after `start` if none has begun.
    """
    number = 0
    while start < end and number < AHEAD:
        seen_from, seen = start, _U0
        if start >= piece_end:
            seen = ends_from(data, start, end, pattern)
        while seen != _U0:
            stop = seen_from + lowest_bit(seen)
            if stop - start > SHORT_BYTES and may_have_seams(data, start):
                piece_end = stop  # it is cut at its seams below; a short one is likely to come again as it is
                break
            note_piece(data, start, stop, stop, pieces, ahead, number)
            seen &= seen - _U1
            start = stop
            number += 1
        if start > seen_from:
            continue
        if start >= piece_end:
            piece_end = pre_token_end(data, start, end, pattern, kinds)
        stop = first_seam(data, start, piece_end, seams) if may_have_seams(data, start) else piece_end
        note_piece(data, start, stop, piece_end, pieces, ahead, number)
        start = stop
        number += 1
    return number


@helper
def note_piece(data: Array, start: int, stop: int, piece_stop: int, pieces: Pieces, ahead: Array, number: int) -> None:
    """Note what `look_ahead` has found."""
    first, second, home = key_and_home(data, start, stop - start, pieces.shift)
    prefetch(pieces.slots, home)
    place = unsigned(AHEAD_WORDS * number)
    ahead[place + _FIRST], ahead[place + _SECOND], ahead[place + _HOME] = first, second, home
    ahead[place + _STOP], ahead[place + _PIECE_STOP] = np.uint64(stop), np.uint64(piece_stop)


@helper
def write_known(ahead: Array, piece: int, number: int, pieces: Pieces, out: Array, written: int) -> tuple[int, int]:
    """Write the ids of short pieces that are at home in the table and have one or two; return up to which and where.

    Nearly all pieces are of that kind. This loop is apart from what the others need so that it is kept in registers.
    """
    slots = pieces.slots
    while piece < number:
        noted = unsigned(AHEAD_WORDS * piece)
        place = ahead[noted + _HOME]
        if slots[place] != ahead[noted + _FIRST] or slots[place + _U1] != ahead[noted + _SECOND]:
            break
        value = slots[place + _U2]
        if value >= _TWO_IDS << _U1:
            break
        written = write_two(value, out, written)
        piece += 1
    return piece, written


@helper
def write_two(value: Any, out: Array, written: int) -> int:
    """Write one id or two, and return how many are written: both are, and bit 62 says how many count."""
    out[unsigned(written)] = value & _ID_MASK
    out[unsigned(written) + _U1] = value >> _U31 & _ID_MASK
    return written + 1 + np.int64(value >> _U62)


@helper
def write_value(value: Any, ids: Array, out: Array, written: int) -> int:
    """Write the ids that a slot's value holds; `out` always has room for one more than there are bytes.

    A value says, in its highest bits, how the ids are kept: 0 one id, 1 two ids, both in the value itself; 2 more of
    them, at a place in `ids`.
    """
    if value < _TWO_IDS << _U1:
        return write_two(value, out, written)
    place = np.int64(value & _PLACE_MASK)
    number = np.int64(value >> _U40 & _COUNT_MASK)
    for offset in range(number):
        out[unsigned(written + offset)] = ids[unsigned(place + offset)]
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
            ids[unsigned(stored + offset)] = out[unsigned(start + offset)]
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
    ahead: Array,
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
        while start < end:
            number = look_ahead(data, start, piece_end, end, pattern, kinds, pieces, seams, ahead)
            piece = 0
            while True:
                piece, written = write_known(ahead, piece, number, pieces, out, written)
                if piece > 0:
                    before = unsigned(AHEAD_WORDS * (piece - 1))
                    start, piece_end = np.int64(ahead[before + _STOP]), np.int64(ahead[before + _PIECE_STOP])
                if piece == number:
                    break
                noted = unsigned(AHEAD_WORDS * piece)
                stop = np.int64(ahead[noted + _STOP])
                first, second, home = ahead[noted + _FIRST], ahead[noted + _SECOND], ahead[noted + _HOME]
                place = slot_from(home, data, start, stop - start, first, second, pieces)
                if slots[place + _U1] != _U0:
                    written = write_value(slots[place + _U2], pieces.ids, out, written)
                else:
                    need = room_to_encode(stop - start, pieces, work)
                    if need != DONE:  # the next call goes on from here
                        cursor[POSITION], cursor[WRITTEN], cursor[PIECE_END] = start, written, piece_end
                        cursor[NEEDED] = stop - start
                        return need
                    written = encode_new(data, start, stop - start, merges, pieces, place, work, out, written)
                piece += 1
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
