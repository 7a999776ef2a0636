"""Compiled loops over whole texts that need no table: valid UTF-8, special tokens, safe cuts, and decoding.

The rules of `encode_kernels.py` hold here too.

Part of: byte_chunks, encoder
"""

from __future__ import annotations

import numpy as np

from transformerlm.tokenizer.fast.arrays import Array
from transformerlm.tokenizer.fast.jit import byte_at, bytes_between, helper, kernel, lowest_bit, unsigned
from transformerlm.tokenizer.fast.unicode_tables import ASCII_KINDS, LETTER, NUMBER, OTHER, SPACE

_U0, _U1, _U2, _U3, _U61, _U62, _U63 = (np.uint64(number) for number in (0, 1, 2, 3, 61, 62, 63))


@helper
def character_width(data: Array, place: int) -> int:
    """Return the number of bytes of the character at `place`, 0 if it is invalid UTF-8 (Unicode 15, kinds 3-7)."""
    first, second = byte_at(data, place), byte_at(data, place + 1)
    if first < 0x80:
        return 1
    if first < 0xC2 or first > 0xF4 or second & 0xC0 != 0x80:
        return 0
    if first < 0xE0:
        return 2
    if byte_at(data, place + 2) & 0xC0 != 0x80:
        return 0
    if first < 0xF0:
        overlong, surrogate = first == 0xE0 and second < 0xA0, first == 0xED and second > 0x9F
        return 0 if overlong or surrogate else 3
    if (
        byte_at(data, place + 3) & 0xC0 != 0x80
        or (first == 0xF0 and second < 0x90)
        or (first == 0xF4 and second > 0x8F)
    ):
        return 0
    return 4


@kernel
def first_invalid(data: Array, end: int) -> int:
    """Return where the first invalid byte of UTF-8 is, `end` if there is none.

    A character that the end cuts in two is invalid, as zeros follow it.
    """
    place = first_suspect(data, end)
    begin = max(0, place - 1)
    while begin > 0 and byte_at(data, begin) & 0xC0 == 0x80:  # back to where a character begins
        begin -= 1
    while begin < end:
        width = character_width(data, begin)
        if width == 0:
            return begin
        begin += width
    return end


@helper
def first_suspect(data: Array, end: int) -> int:
    """Return where the first 64 bytes begin that are not all valid; the end if all are, but for a last character cut.

    Each number here has a bit for each of 64 bytes. A byte that begins a character of n bytes wants n - 1 bytes after
    it that go on; four of them want a second byte from a part of these (Unicode 15, table 3-7).
    """
    place = 0
    wanted, not_low, not_high, not_lowest, only_lowest = _U0, _U0, _U0, _U0, _U0  # by the 64 bytes before
    while place < end:
        high = bytes_between(data, place, 0, 0x80, 0x80)
        if high | wanted == _U0:  # ASCII
            place += 64
            continue
        goes_on = bytes_between(data, place, 0, 0x80, 0x40)
        two = high & ~goes_on  # begins a character of two bytes or more
        three, four = bytes_between(data, place, 0, 0xE0, 0x20), bytes_between(data, place, 0, 0xF0, 0x10)
        if wanted | two << _U1 | three << _U2 | four << _U3 != goes_on:
            return place
        if bytes_between(data, place, 0, 0xC0, 2) | bytes_between(data, place, 0, 0xF5, 11) != _U0:
            return place
        e0, ed = bytes_between(data, place, 0, 0xE0, 1), bytes_between(data, place, 0, 0xED, 1)
        f0, f4 = bytes_between(data, place, 0, 0xF0, 1), bytes_between(data, place, 0, 0xF4, 1)
        if e0 | ed | f0 | f4 | not_low | not_high | not_lowest | only_lowest != _U0:
            upper, lowest = bytes_between(data, place, 0, 0xA0, 0x20), bytes_between(data, place, 0, 0x80, 0x10)
            wrong = (e0 << _U1 | not_low) & ~upper | (ed << _U1 | not_high) & upper
            if wrong | (f0 << _U1 | not_lowest) & lowest | (f4 << _U1 | only_lowest) & ~lowest != _U0:
                return place
        wanted = two >> _U63 | three >> _U62 | four >> _U61
        not_low, not_high, not_lowest, only_lowest = e0 >> _U63, ed >> _U63, f0 >> _U63, f4 >> _U63
        place += 64
    return end


@kernel
def cut_segments(
    data: Array,
    texts: Array,
    longest: int,
    first_bytes: Array,
    spelled: Array,
    places: Array,
    kinds: Array,
    segments: Array,
    last: Array,
) -> int:
    """Cut texts at special tokens, and what is longer than `longest` at safe places; return the number of segments.

    Args:
        texts: rows of (start, end).
        first_bytes: which bytes begin special tokens, bool `(256,)`.
        spelled: `spelled[places[n] : places[n + 1]]` is token n, the longest first.
        segments: is filled with rows of (start, end, number of the token that follows or -1). Where it is too short,
            rows are omitted, but the number is that of all of them.
        last: gets for each text the number of rows up to its end.
    """
    rows = 0
    only = byte_at(spelled, 0) if first_bytes.sum() == 1 else -1
    for text in range(texts.shape[0]):
        start, end = texts[text, 0], texts[text, 1]
        while True:
            stop, token = next_special_token(data, start, end, only, first_bytes, spelled, places)
            while stop - start > longest:
                cut = safe_cut(data, start, start + longest, stop, kinds)
                rows = add_segment(segments, rows, start, cut, -1)
                start = cut
            rows = add_segment(segments, rows, start, stop, token)
            if token < 0:
                break
            start = stop + places[token + 1] - places[token]
        last[text] = rows
    return rows


@helper
def add_segment(segments: Array, rows: int, start: int, end: int, token: int) -> int:
    """Write a row where there is room; return how many rows there are now."""
    if rows < segments.shape[0]:
        segments[rows, 0], segments[rows, 1], segments[rows, 2] = start, end, token
    return rows + 1


@helper
def next_special_token(
    data: Array, start: int, end: int, only: int, first_bytes: Array, spelled: Array, places: Array
) -> tuple[int, int]:
    """Return where the next special token begins and which it is; the end and -1 if there is none.

    `only` is the byte with which all of them begin, or -1.
    """
    if places.size < 2:
        return end, -1
    while start < end:
        if only >= 0:
            found = bytes_between(data, start, 0, only, 1)
            start += lowest_bit(found)
            if found == _U0:
                continue
        elif not first_bytes[byte_at(data, start)]:
            start += 1
            continue
        token = special_token_at(data, start, end, spelled, places)
        if token >= 0:
            return start, token
        start += 1
    return end, -1


@kernel
def special_token_at(data: Array, start: int, end: int, spelled: Array, places: Array) -> int:
    """Return which special token begins at `start`, -1 if none."""
    for token in range(places.size - 1):
        length = places[token + 1] - places[token]
        if start + length > end:
            continue
        offset = 0
        while offset < length and byte_at(data, start + offset) == byte_at(spelled, places[token] + offset):
            offset += 1
        if offset == length:
            return token
    return -1


@kernel
def safe_cut(data: Array, start: int, place: int, end: int, kinds: Array) -> int:
    """Return the first place from `place` on where the text from `start` to `end` may be cut, `end` if there is none.

    That is before white space in ASCII (only a blank after marks, which cl100k joins with line ends), after a
    character that is neither white space nor an apostrophe.
    """
    for cut in range(max(place, start + 1), end):
        following = byte_at(data, cut)
        if following >= 0x80 or kinds[ASCII_KINDS + following] != SPACE:
            continue
        first = cut - 1
        while first > start and byte_at(data, first) & 0xC0 == 0x80:  # back to where the character begins
            first -= 1
        kind = character_kind(data, first, kinds)
        if kind == LETTER or kind == NUMBER:
            return cut
        if kind == OTHER and following == ord(" ") and byte_at(data, first) != ord("'"):
            return cut
    return end


@kernel
def character_kind(data: Array, place: int, kinds: Array) -> int:
    """Return the kind of the character at `place`."""
    first, width = byte_at(data, place), character_width(data, place)
    if width <= 1:
        return kinds[ASCII_KINDS + first] if first < 0x80 else SPACE  # no cut after an invalid byte
    code = first & (0xFF >> (width + 1))  # what is left of the first byte after its `width` ones and a zero
    for offset in range(1, width):
        code = code << 6 | byte_at(data, place + offset) & 0x3F
    return kinds[np.int64(kinds[code >> 8]) + (code & 255)]


@kernel
def decoded_length(ids: Array, offsets: Array) -> int:
    """Return how many bytes the ids spell; -1 - n where the n-th is not in the vocabulary."""
    total = 0
    for number in range(ids.size):
        token = np.int64(ids[number])
        if token < 0 or token >= offsets.size - 1:
            return -1 - number
        total += offsets[unsigned(token + 1)] - offsets[unsigned(token)]
    return total


@kernel
def decode_ids(ids: Array, offsets: Array, spelled: Array, out: Array) -> int:
    """Write the bytes of the ids and return their number.

    Eight bytes are written at a time, further ones one by one; `out` and `spelled` are padded for that.
    """
    written = 0
    for number in range(ids.size):
        token = np.int64(ids[number])
        start = offsets[unsigned(token)]
        length = offsets[unsigned(token + 1)] - start
        for offset in range(8):
            out[unsigned(written + offset)] = byte_at(spelled, start + offset)
        for offset in range(8, length):
            out[unsigned(written + offset)] = byte_at(spelled, start + offset)
        written += length
    return written
