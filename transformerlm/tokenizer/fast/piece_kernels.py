"""The pre-token patterns as a compiled scanner over UTF-8: where does the piece that begins here end?

`piece_end` gives what the regular expressions of `pretokenize.py` give, alternative by alternative, without trying one
after the other: the first character or two say which one it is. For GPT-2's pattern `gpt2_ends` looks at 64 bytes at
once, as far as they are ASCII, or Latin and Cyrillic letters, or Thai, or dashes and quotation marks. The rules of
`encode_kernels.py` hold here too.

In all kernels here `data` is the text, uint8 `(bytes + PADDING,)`, `start`, `place` and `end` are positions in it, and
`kinds` is `unicode_tables.unicode_table()`, uint16.

Part of: encode_kernels, table_kernels
"""

from __future__ import annotations

from typing import Any

import numpy as np

from transformerlm.tokenizer.fast.arrays import Array
from transformerlm.tokenizer.fast.jit import byte_at, bytes_between, helper, kernel, lowest_bit
from transformerlm.tokenizer.fast.unicode_tables import ASCII_KINDS, LETTER, NUMBER, OTHER, SPACE

GPT2, CL100K, LLAMA3, QWEN2 = 0, 1, 2, 3

_NONE, _ONE, _ALL = np.uint64(0), np.uint64(1), np.uint64((1 << 64) - 1)
_SEEN = np.uint64((1 << 61) - 1)
_TWO = np.uint64(2)
_APOSTROPHE, _BLANK, _NEWLINE, _RETURN = ord("'"), ord(" "), ord("\n"), ord("\r")


@helper
def kind_at(data: Array, place: int, kinds: Array) -> tuple[int, int]:
    """Return the kind of the character at `place` and its number of bytes."""
    first = byte_at(data, place)
    if first < 0x80:
        return kinds[ASCII_KINDS + first], 1
    # UTF-8: the first byte says how many follow, and each that follows holds six bits of the code point.
    second = byte_at(data, place + 1) & 0x3F
    if first < 0xE0:
        code, width = (first & 0x1F) << 6 | second, 2
    elif first < 0xF0:
        code, width = (first & 0x0F) << 12 | second << 6 | byte_at(data, place + 2) & 0x3F, 3
    else:
        third = byte_at(data, place + 2) & 0x3F
        code, width = (first & 0x07) << 18 | second << 12 | third << 6 | byte_at(data, place + 3) & 0x3F, 4
    return kinds[np.int64(kinds[code >> 8]) + (code & 255)], width


@helper
def begins_wide_letter(first: int) -> bool:
    """Return whether all characters that begin with this byte are letters of three bytes: U+5000 on, most of Hangul."""
    return 0xE5 <= first <= 0xE9 or 0xEB <= first <= 0xEC


@kernel
def run_end(data: Array, place: int, end: int, kind: int, kinds: Array) -> int:
    """Return where the run of characters of one kind ends that begins at `place`."""
    while place < end:
        if kind == LETTER and begins_wide_letter(byte_at(data, place)):
            place += 3
            continue
        found, width = kind_at(data, place, kinds)
        if found != kind:
            return place
        place += width
    return end


@kernel
def contraction_end(data: Array, start: int, end: int, any_case: bool) -> int:
    """Return where the contraction ('s, 'll, ...) that begins with the apostrophe at `start` ends; `start` if none.

    Regardless of case, the long s (U+017F) is an s as well.
    """
    fold = 0x20 if any_case else 0
    if start + 1 < end:
        first = byte_at(data, start + 1) | fold
        if first == ord("s") or first == ord("d") or first == ord("m") or first == ord("t"):
            return start + 2
        if start + 2 < end:
            second = byte_at(data, start + 2) | fold
            if first == ord("l") and second == ord("l"):
                return start + 3
            if (first == ord("v") or first == ord("r")) and second == ord("e"):
                return start + 3
            if any_case and byte_at(data, start + 1) == 0xC5 and byte_at(data, start + 2) == 0xBF:
                return start + 3
    return start


@kernel
def blank_end(data: Array, start: int, end: int, pattern: int, kinds: Array) -> int:
    r"""Return where the piece of white space at `start` ends.

    Before something else the run of white space loses its last character (`\s+(?!\S)`), unless it has but one. With
    GPT-4's pattern and its relatives it ends after its last line end, if it has one (`\s*[\r\n]`); with GPT-4's own,
    the run that ends the text is one piece (`\s++$`).
    """
    place, last, after_newline = start, start, start
    if start + 1 < end and byte_at(data, start) < 0x80:  # one line end before a word is far more frequent than a run
        following = byte_at(data, start + 1)
        if following < 0x80 and kinds[ASCII_KINDS + following] != SPACE:
            return start + 1
    while place < end:
        kind, width = kind_at(data, place, kinds)
        if kind != SPACE:
            break
        first = byte_at(data, place)
        last = place
        place += width
        if first == _NEWLINE or first == _RETURN:
            after_newline = place
    if place >= end and (pattern == GPT2 or pattern == CL100K or after_newline == start):
        return end
    if pattern != GPT2 and after_newline > start:
        return after_newline
    return last if last > start else place


@kernel
def gpt2_end(data: Array, start: int, end: int, kinds: Array) -> int:
    """Return where the piece that begins at `start` ends by GPT-2's pattern."""
    first = byte_at(data, start)
    if first == _APOSTROPHE:
        place = contraction_end(data, start, end, False)
        if place > start:
            return place
    place = start + (1 if first == _BLANK else 0)
    kind, width = kind_at(data, place, kinds)
    if kind == SPACE or place >= end:
        return blank_end(data, start, end, GPT2, kinds)
    return run_end(data, place + width, end, kind, kinds)


@helper
def gpt2_ends(data: Array, start: int, end: int) -> Any:
    """Return where pieces end in the 64 bytes from the piece at `start` on, bit by bit; 0 if that takes a closer look.

    One bit a byte, all bytes at once: a piece begins where the kind of character changes, but a blank belongs to what
    follows it, and of several characters of white space the last is a piece of its own. Two stretches are left to
    `piece_end`: the last three bytes, whose neighbours are not seen, and everything from the first character that is
    neither ASCII nor one of those that `wide_letters`, `wide_marks` and `thai` know. An example, the byte at `start` on
    the left and the lowest bit of each mask below it:

        text         It's 42  now!
        letters      11.1.....111....
        numbers      .....11.........
        blanks       ....1..11.......
        spaces       ....1..11....111   the text's end counts as white space
        others       ..1.........1...
        inside       .1...11.1111....   like the byte before it, or after a blank
        begins       1.111..11...11..   pieces: I t | ' | s | blank 4 2 | blank | blank n o w | ! | end
        apostrophes  ..1.............   'begins' and an apostrophe: 's ends two bytes later, so 's' begins nothing
        result       ..1.1..11...11..   It | 's | blank 4 2 | blank | blank n o w | !

    A shift to the left asks about the byte before, a shift to the right about the byte after.
    """
    # Shifted in two steps, because a shift by 64 would do nothing.
    beyond = _ALL << np.uint64(min(end - start, 64) - 1) << _ONE  # bits from `end` on
    letters = bytes_between(data, start, 0x20, ord("a"), 26)  # bit 0x20 makes a capital small
    numbers = bytes_between(data, start, 0, ord("0"), 10)
    blanks = bytes_between(data, start, 0, _BLANK, 1)
    spaces = bytes_between(data, start, 0, ord("\t"), 5) | blanks | beyond  # tab to carriage return
    odd = bytes_between(data, start, 0, 0x80, 0x80) & ~beyond  # not ASCII
    if odd != _NONE:
        wide = wide_letters(data, start)
        letters |= wide
        odd &= ~(wide | wide_marks(data, start))
        if odd != _NONE:
            known, thai_letters, thai_numbers = thai(data, start)
            letters |= thai_letters
            numbers |= thai_numbers
            odd &= ~known
    others = ~(letters | numbers | spaces)
    inside = letters & letters << _ONE | numbers & numbers << _ONE | others & others << _ONE | blanks << _ONE
    # White space begins a piece unless white space is on both sides; so does the end of the text.
    begins = ~(inside | spaces) | spaces & ~(spaces << _ONE & spaces >> _ONE) | beyond & ~(beyond << _ONE)
    apostrophes = begins & bytes_between(data, start, 0, _APOSTROPHE, 1) & _SEEN
    while apostrophes != _NONE:
        place = lowest_bit(apostrophes)
        apostrophes &= apostrophes - _ONE  # takes the lowest bit away
        stop = contraction_end(data, start + place, end, False) - start
        if stop > place:
            begins = begins & ~(_ONE << np.uint64(place + 1)) | _ONE << np.uint64(stop)
    # `~odd & (odd - 1)` has the bits below the first odd byte; one fewer, as that byte may belong to the piece before.
    return begins & (~odd & (odd - _ONE)) >> _ONE & _SEEN & ~_ONE


@helper
def wide_letters(data: Array, start: int) -> Any:
    """Return the bytes of letters of Latin and Cyrillic alphabets that have two bytes, U+00C0 to U+027F and U+0400 on.

    All of these begin with one of nine bytes, and all that begin so are letters but for the signs of multiplication and
    division.
    """
    begin = bytes_between(data, start, 0, 0xC3, 7) | bytes_between(data, start, 0, 0xD0, 2)
    # 0x97 and 0xB7 after 0xC3; 0x20 makes one the other.
    signs = bytes_between(data, start, 0x20, 0xB7, 1) & bytes_between(data, start, 0, 0xC3, 1) << _ONE
    return (begin | begin << _ONE) & ~(signs | signs >> _ONE)


@helper
def wide_marks(data: Array, start: int) -> Any:
    """Return the bytes of the marks from U+2010 to U+2027, which have three: dashes, quotation marks, the ellipsis."""
    second = bytes_between(data, start, 0, 0x80, 1) & bytes_between(data, start, 0, 0xE2, 1) << _ONE
    return whole_characters(bytes_between(data, start, 0, 0x90, 0x18) & second << _ONE)


@helper
def thai(data: Array, start: int) -> tuple[Any, Any, Any]:
    """Return the bytes of the characters of Thai, those of its letters, and those of its numbers.

    Thai is written without blanks, but GPT-2's pattern ends a piece at each vowel or tone above or below a letter. All
    characters from U+0E00 to U+0E7F have three bytes: 0xE0, 0xB8 or 0xB9, and one that says which it is.
    """
    begin = bytes_between(data, start, 0, 0xE0, 1)
    lower = bytes_between(data, start, 0, 0xB8, 1) & begin << _ONE
    upper = bytes_between(data, start, 0, 0xB9, 1) & begin << _ONE
    # U+0E01 to U+0E3A and U+0E3F; U+0E40 to U+0E5B. The others mean nothing yet.
    known = (bytes_between(data, start, 0, 0x81, 0x3A) | bytes_between(data, start, 0, 0xBF, 1)) & lower << _ONE
    known |= bytes_between(data, start, 0, 0x80, 0x1C) & upper << _ONE
    # U+0E01 to U+0E30, U+0E32 and U+0E33; U+0E40 to U+0E46.
    letters = (bytes_between(data, start, 0, 0x81, 0x30) | bytes_between(data, start, 0, 0xB2, 2)) & lower << _ONE
    letters |= bytes_between(data, start, 0, 0x80, 7) & upper << _ONE
    numbers = bytes_between(data, start, 0, 0x90, 10) & upper << _ONE
    return whole_characters(known), whole_characters(letters), whole_characters(numbers)


@helper
def whole_characters(third: Any) -> Any:
    """Return all bytes of characters of three bytes, of which the last ones are given."""
    return third | third >> _ONE | third >> _TWO


@kernel
def gpt4_end(data: Array, start: int, end: int, pattern: int, kinds: Array) -> int:
    """Return where the piece that begins at `start` ends by the pattern of GPT-4 or one of its relatives."""
    first = byte_at(data, start)
    if first == _APOSTROPHE:
        place = contraction_end(data, start, end, True)
        if place > start:
            return place
    kind, width = kind_at(data, start, kinds)
    after = start + width
    if kind == LETTER:
        return run_end(data, after, end, LETTER, kinds)
    if kind == NUMBER:
        return number_end(data, start, end, 1 if pattern == QWEN2 else 3, kinds)
    next_kind, next_width = SPACE, 0
    if after < end:
        next_kind, next_width = kind_at(data, after, kinds)
    if next_kind == LETTER and first != _NEWLINE and first != _RETURN:
        return run_end(data, after + next_width, end, LETTER, kinds)
    if kind == OTHER or (first == _BLANK and next_kind == OTHER):
        place = run_end(data, after, end, OTHER, kinds)
        while place < end and (byte_at(data, place) == _NEWLINE or byte_at(data, place) == _RETURN):
            place += 1
        return place
    return blank_end(data, start, end, pattern, kinds)


@kernel
def number_end(data: Array, start: int, end: int, most: int, kinds: Array) -> int:
    """Return where one to `most` characters of numbers end."""
    place = start
    for _ in range(most):
        if place >= end:
            return end
        kind, width = kind_at(data, place, kinds)
        if kind != NUMBER:
            return place
        place += width
    return min(place, end)


@helper
def ends_from(data: Array, start: int, end: int, pattern: int) -> Any:
    """Return where pre-tokens end after `start`, bit n for `start + n`: as many as one look shows, or none."""
    if pattern == GPT2 and is_worth_a_look(data, start):
        return gpt2_ends(data, start, end)
    return _NONE


@helper
def is_worth_a_look(data: Array, start: int) -> bool:
    """Return whether a look knows the characters that begin as the first one does, which a blank may come before."""
    first = byte_at(data, start)
    byte = max(first, byte_at(data, start + 1))
    if byte == 0xE0:
        return byte_at(data, start + (1 if first == 0xE0 else 2)) & 0xFE == 0xB8
    return byte < 0xC2 or 0xC3 <= byte <= 0xC9 or 0xD0 <= byte <= 0xD1


@kernel
def piece_end(data: Array, start: int, end: int, pattern: int, kinds: Array) -> int:
    """Return where the pre-token that begins at `start` ends."""
    if pattern == GPT2:
        return gpt2_end(data, start, end, kinds)
    return gpt4_end(data, start, end, pattern, kinds)


@helper
def next_end(
    data: Array, start: int, end: int, pattern: int, kinds: Array, seen_from: int, ends: Any
) -> tuple[int, int, Any]:
    """Return where the pre-token at `start` ends, and what is left of the last look: its place and its bits."""
    if ends == _NONE:
        seen_from, ends = start, ends_from(data, start, end, pattern)
        if ends == _NONE:
            return piece_end(data, start, end, pattern, kinds), start, _NONE
    return seen_from + lowest_bit(ends), seen_from, ends & (ends - _ONE)


@kernel
def find_pieces(data: Array, start: int, end: int, pattern: int, kinds: Array, ends: Array) -> int:
    """Write where each pre-token ends into `ends`, which has a place for each byte; return how many there are."""
    number, seen_from, seen = 0, start, _NONE
    while start < end:
        start, seen_from, seen = next_end(data, start, end, pattern, kinds, seen_from, seen)
        ends[number] = start
        number += 1
    return number
