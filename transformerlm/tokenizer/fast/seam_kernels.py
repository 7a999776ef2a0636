"""Seams: places in a pre-token that no token crosses, so the ids of both sides are those of the whole.

Scripts without blanks have pre-tokens of ten characters and more, and hardly one of them comes twice. Cut at their
seams, they are words of one to four characters that come again and again, so the table of pieces knows most of them.

**Why a seam is exact.** Whatever the merges make on the way is a token. Where no token of the vocabulary has the bytes
before a place as its beginning and those after it as its end, nothing ever joins the two sides. An example, with the
tokens made by merges beside it, bars at the seams:

    the text    今天|天气|很|好     tokens: 今天 天气 天气预报 很多 好的
    between 今 and 天   the token 今天 crosses
    between 天 and 天   no token has 天天 in it: a seam

Only the three bytes on either side are looked at, most often a character each, so a place may be taken for a crossing
that is none, never the other way round. A token that has fewer than three bytes on a side (half a character) is
entered by the one byte there that is nearest to the place. So four keys are asked for at each place: three bytes or one
to the left, three or one to the right. `bits` has a bit for the hash of each key.

**Tokens that only a whole pre-token is** (`ignore_merges`). A part between seams must not be taken for one of them, so
a guarded table has no seam where one may end or begin: `guard_seams` enters their last three bytes and their first
three.

Part of: encode_kernels, encoder
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from transformerlm.tokenizer.fast.arrays import Array
from transformerlm.tokenizer.fast.jit import byte_at, helper, kernel, word_at

LONG_CHARACTER = 0xE0  # the first byte of characters of three or four bytes is this or more
BITS_PER_KEY = 32  # so one key in 32 is found that was never entered

_U0, _U1, _U6, _U63 = (np.uint64(number) for number in (0, 1, 6, 63))
_MIX = np.uint64(0x9E3779B97F4A7C15)
# A window is the six bytes around a place, the first the lowest. Each key is a part of it.
_WHOLE = np.uint64(0xFFFFFFFFFFFF)
_ONE_AFTER = np.uint64(0x0000FFFFFFFF)
_ONE_BEFORE = np.uint64(0xFFFFFFFF0000)
_ONE_EACH = np.uint64(0x0000FFFF0000)
_BEFORE_ALONE, _AFTER_ALONE = np.uint64(0x000000FFFFFF), np.uint64(0xFFFFFF000000)


class Seams(NamedTuple):
    """The keys of all places inside of tokens at which a character of three or four bytes begins."""

    bits: Array  # uint64: a bit for each hash of a key
    shift: Any  # uint64: by how much a hash is shifted to give its bit
    is_guarded: Any = np.uint64(0)  # uint64: 1 if keys of one side alone are entered, too


def guard_seams(seams: Seams, tokens: Iterable[bytes]) -> Seams:
    """Return the table with no seam after what these tokens end with, and none before what they begin with.

    A part between seams has three bytes or more, so shorter tokens need no guard.
    """
    for token in tokens:
        if len(token) >= 3:
            before, after = int.from_bytes(token[-3:], "little"), int.from_bytes(token[:3], "little") << 24
            for key in (before, after):
                bit = (key * int(_MIX) & (1 << 64) - 1) >> int(seams.shift)
                seams.bits[bit >> 6] |= np.uint64(1 << (bit & 63))
    return seams._replace(is_guarded=np.uint64(1))


@helper
def key_bit(key: Any, seams: Seams) -> Any:
    """Return the number of a key's bit."""
    return key * _MIX >> seams.shift


@helper
def has_key(key: Any, seams: Seams) -> Any:
    """Return 1 if a key was entered, else most often 0."""
    bit = key_bit(key, seams)
    return seams.bits[bit >> _U6] >> (bit & _U63) & _U1


@kernel
def fill_seams(spelled: Array, places: Array, seams: Seams) -> int:
    """Enter the keys of tokens, `spelled[places[n] : places[n + 1]]` for each n; return how many there are.

    With `bits` empty, nothing is entered.
    """
    number = 0
    for token in range(places.size - 1):
        start, end = places[token], places[token + 1]
        for place in range(start + 1, end):
            if byte_at(spelled, place) < LONG_CHARACTER:
                continue
            number += 1
            if seams.bits.size == 0:
                continue
            key = window_of(spelled, start, place, end)
            seams.bits[key_bit(key, seams) >> _U6] |= _U1 << (key_bit(key, seams) & _U63)
    return number


@kernel
def window_of(spelled: Array, start: int, place: int, end: int) -> Any:
    """Return the key of a place inside of a token: three bytes on each side, or one where the token has fewer."""
    before, after = (3 if place - start >= 3 else 1), (3 if end - place >= 3 else 1)
    key = np.uint64(0)
    for offset in range(-before, after):
        key |= np.uint64(byte_at(spelled, place + offset)) << np.uint64(8 * (offset + 3))
    return key


@helper
def may_have_seams(data: Array, start: int) -> Any:
    """Return whether one of the first two bytes of a piece begins a long character: a blank may come before it."""
    return byte_at(data, start) >= LONG_CHARACTER or byte_at(data, start + 1) >= LONG_CHARACTER


@kernel
def first_seam(data: Array, start: int, end: int, seams: Seams) -> int:
    """Return the first place after `start` at which a piece may be cut, its end if there is none.

    Only places before long characters are looked at, with three bytes or more on either side.
    """
    place = start + 3
    while place + 3 <= end:
        if byte_at(data, place) < LONG_CHARACTER:
            place += 1
            continue
        window = word_at(data, place - 3)
        crossed = has_key(window & _WHOLE, seams) | has_key(window & _ONE_AFTER, seams)
        crossed |= has_key(window & _ONE_BEFORE, seams) | has_key(window & _ONE_EACH, seams)
        if seams.is_guarded != _U0:
            crossed |= has_key(window & _BEFORE_ALONE, seams) | has_key(window & _AFTER_ALONE, seams)
        if crossed == _U0:
            return place
        place += 3
    return end
