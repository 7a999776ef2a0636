"""Behaviour of the compiled scanner: its pieces are those of the regular expressions, on every text."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tokenizer import plain_kernels
from tests.tokenizer.test_pretokenize import ANY_TEXT
from transformerlm.tokenizer.fast.unicode_tables import ASCII_KINDS, LETTER, NUMBER, OTHER, SPACE, unicode_table
from transformerlm.tokenizer.pretokenize import PATTERNS

pytest.importorskip("numba")
from transformerlm.tokenizer.fast import encoder, piece_kernels
from transformerlm.tokenizer.fast.arrays import padded

ALPHABET = list("aZsvlretdmSVLRETDM\u017f'1926.  \n\r\t\u3000\u00a0é漢²\x1c<|>e\u2019—\u0301🇩")
WIDE = list("aé\u00d7÷ñ\u017fɿ\u0280жЂ\u0482\u04c1ß'1. \n\u2010\u2019…\u2027\u2028\u200a\u20ac漢한の々e\u0301")
THAI = [*map(chr, range(0x0DFF, 0x0E82)), *"a'1. \né…", *("\u0e01\u0e19" * 40)]
PLAIN = plain_kernels.load()
BROKEN = st.lists(st.sampled_from([b"\xf0", b"\xe3\x80", b"\xe0\xb8", b"\xe0", b"\xb8\x81", b" ", b"a"])).map(b"".join)
EACH_PATTERN = pytest.mark.parametrize("pattern", encoder.PATTERNS)


def _pieces(data: bytes, pattern: str, kernels: object = piece_kernels, *, behind: bytes = b"") -> list[bytes]:
    ends = np.zeros(len(data) + 1, dtype=np.int64)
    array = padded(data + behind)
    with np.errstate(over="ignore"):  # numpy warns where a number wraps around; the kernels mean it
        number = kernels.find_pieces(array, 0, len(data), encoder.PATTERNS[pattern], unicode_table(), ends)  # type: ignore[attr-defined]
    bounds = [0, *ends[:number].tolist()]
    return [data[start:stop] for start, stop in pairwise(bounds)]


def _expected(text: str, pattern: str) -> list[bytes]:
    return [piece.encode() for piece in regex.findall(PATTERNS[pattern], text)]


def _check_code_points(points: range, context: str, pattern: str) -> None:
    """Compare the cuts of all these characters at once, and one by one only where that fails."""
    valid = [point for point in points if not 0xD800 <= point < 0xE000]
    text = "|a|".join(context.format(chr(point)) for point in valid)
    if _pieces(text.encode(), pattern) != _expected(text, pattern):
        for point in valid:
            part = context.format(chr(point))
            assert _pieces(part.encode(), pattern) == _expected(part, pattern), hex(point)
        raise AssertionError(f"{points} are cut otherwise together than one by one")


@EACH_PATTERN
@pytest.mark.parametrize("points", [range(0x32000), range(0xE0000, 0xE0200), range(0x10FF00, 0x110000)])
def test_every_assigned_code_point_is_cut_as_regex_cuts_it(points: range, pattern: str) -> None:
    """Each character of Unicode between letters, digits, marks, line ends and blanks."""
    _check_code_points(points, "a{0} {0}'{0}\n{0}  {0}1", pattern)


@pytest.mark.slow
@EACH_PATTERN
@pytest.mark.parametrize(
    "context", ["{0}", "a{0}b", " {0} ", "'{0}", "1{0}2", "\n{0}\r ", " {0}{0}x", "\u2019{0}  {0}"]
)
def test_every_code_point_is_cut_as_regex_cuts_it(context: str, pattern: str) -> None:
    """All of Unicode, unassigned code points too, in more contexts."""
    for first in range(0, 0x110000, 1 << 14):
        _check_code_points(range(first, first + (1 << 14)), context, pattern)


@EACH_PATTERN
def test_random_text_is_cut_as_regex_cuts_it(pattern: str) -> None:
    """7,500 texts of the characters at which the patterns decide: short ones, and longer than one look takes in."""
    rng = random.Random(0)
    alphabets = [
        ALPHABET,
        [character for character in ALPHABET if character.isascii()],
        list("it's  \n we'll"),
        WIDE,
        THAI,
    ]
    for number in range(7_500):
        alphabet = alphabets[number % len(alphabets)]
        text = "".join(rng.choices(alphabet, k=rng.choice([3, 10, 40, 63, 64, 65, 200])))
        assert _pieces(text.encode(), pattern) == _expected(text, pattern), text
        behind = "".join(rng.choices(alphabet, k=5)).encode()  # of the next text, which is none of this one's
        assert _pieces(text.encode(), pattern, behind=behind) == _expected(text, pattern), (text, behind)


@EACH_PATTERN
@settings(deadline=None)
@given(text=ANY_TEXT)
def test_the_kernels_cut_alike_without_numba(text: str, pattern: str) -> None:
    """The same source without numba gives the same pieces, and reads nothing outside of the text and its padding."""
    assert _pieces(text.encode(), pattern, PLAIN["piece_kernels"]) == _expected(text, pattern)


@EACH_PATTERN
@settings(deadline=None)
@given(data=st.one_of(st.binary(max_size=40), BROKEN))
def test_damaged_bytes_stay_inside(data: bytes, pattern: str) -> None:
    """Invalid UTF-8 is cut somewhere, but completely, in order, and without a read outside of the array."""
    pieces = _pieces(data, pattern)
    assert b"".join(pieces) == data
    assert all(pieces)
    assert _pieces(data, pattern, PLAIN["piece_kernels"]) == pieces


def test_the_table_says_what_regex_says() -> None:
    """Each of the four kinds, and the shortcut for ASCII."""
    table = unicode_table()
    for point in [*range(0x3100), 0xFEFF, 0x1F600, 0x20000, 0x10FFFF]:
        kind = int(table[int(table[point >> 8]) + (point & 255)])
        expected = [OTHER, LETTER, NUMBER, SPACE][
            next((n for n, p in ((1, r"\p{L}"), (2, r"\p{N}"), (3, r"\s")) if regex.match(p, chr(point))), 0)
        ]
        assert kind == expected, hex(point)
        assert point >= 128 or table[ASCII_KINDS + point] == kind
