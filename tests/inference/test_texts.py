"""Text pieces: whole characters, and never a part of a stop string."""

from __future__ import annotations

import random

import pytest

from transformerlm.inference.texts import Pieces, pieces_of


def of_bytes(ids: list[int]) -> bytes:
    return bytes(ids)


def test_a_character_comes_whole() -> None:
    """The bytes of a character in several ids give it once, at its last byte; what never ends becomes U+FFFD."""
    pieces = Pieces(of_bytes)
    assert [pieces.push(byte) for byte in "aé€".encode()] == ["a", "", "é", "", "", "€"]
    assert pieces.push(0xE2) == ""
    assert pieces.finish() == "�"


def test_a_text_ends_before_its_stop_string() -> None:
    """What may begin a stop string is held back, shown when it does not, and never shown when it does."""
    pieces = Pieces(of_bytes, stop=["\n\n", "END"])
    assert [pieces.push(byte) for byte in b"a\nbEN."] == ["a", "", "\nb", "", "", "EN."]
    assert [pieces.push(byte) for byte in b"E\n"] == ["", "E"]
    assert pieces.push(ord("\n")) == ""
    assert pieces.stopped_by == "\n\n"
    assert pieces.push(ord("x")) == pieces.finish() == ""


def test_what_is_held_comes_at_the_end() -> None:
    """A text that ends within a stop string keeps its end."""
    assert list(pieces_of(b"one tw", Pieces(of_bytes, stop=["two"]))) == [*"one ", "tw"]


def test_no_id_is_asked_for_after_the_stop_string() -> None:
    """The loop behind the ids stops at once."""
    ids = iter(b"ab.cd")
    assert "".join(pieces_of(ids, Pieces(of_bytes, stop=["."]))) == "ab"
    assert next(ids) == ord("c")


def test_the_longest_of_strings_that_end_together_counts() -> None:
    """ "aab" and "ab" end at one character: the text ends before the longer one."""
    pieces = Pieces(of_bytes, stop=["ab", "aab"])
    assert "".join(pieces_of(b"xaab", pieces)) == "x"
    assert pieces.stopped_by == "aab"


def test_an_empty_stop_string_is_an_error() -> None:
    """It would end every text before its beginning."""
    with pytest.raises(ValueError, match="at least one character"):
        Pieces(of_bytes, stop=[""])


def test_random_texts_end_where_a_search_of_the_whole_text_says() -> None:
    """Against the plainest form: the first place at which a stop string ends, and no piece that goes past it."""
    dice = random.Random(0)
    for _ in range(300):
        text = "".join(dice.choices("ab", k=dice.randint(0, 20)))
        stops = ["".join(dice.choices("ab", k=dice.randint(1, 5))) for _ in range(dice.randint(1, 3))]
        ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
        expected, which = text, None
        if ends:
            which = max((stop for stop in stops if text[: ends[0]].endswith(stop)), key=len)
            expected = text[: ends[0] - len(which)]
        pieces = Pieces(of_bytes, stop=stops)
        assert "".join(pieces_of(text.encode(), pieces)) == expected
        assert pieces.stopped_by == which
