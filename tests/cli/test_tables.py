"""Tables for people."""

from __future__ import annotations

import pytest

from cli.tables import columns_that_fit, real, short_bytes, short_number, short_time, shortened, table_lines


def test_columns_are_as_wide_as_their_cells():
    """Words are flush left and numbers flush right, without spaces at the ends of lines."""
    assert table_lines(["name", "n", ""], [["a", "10", "yes"], ["long name", "1", ""]], left=[0, 2]) == [
        "name        n",
        "a          10  yes",
        "long name   1",
    ]


def test_wide_signs_take_two_columns():
    """What follows them in a line is below its head all the same."""
    lines = table_lines(["name", "n"], [["日本", "1"], ["e\u0301", "22"]])
    assert lines == ["name   n", "日本   1", "e\u0301     22"]


def test_columns_go_until_the_rest_fits():
    """In the order given, and no more than must."""
    heads, rows = ["aaaa", "bbbb", "cccc"], [["1", "2", "3"]]
    assert columns_that_fit(heads, rows, width=16, drop=[1, 2]) == [0, 1, 2]
    assert columns_that_fit(heads, rows, width=15, drop=[1, 2]) == [0, 2]
    assert columns_that_fit(heads, rows, width=1, drop=[1, 2]) == [0]


def test_a_long_text_is_cut_in_its_middle():
    """Both ends stay, and no more characters than may be."""
    assert shortened("rates/learning_rate=0.002-4e097a67b0-2", 14) == "rates/...7b0-2"
    assert [shortened("abcdefgh", most) for most in (9, 8, 7)] == ["abcdefgh", "abcdefgh", "ab...gh"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (0, "0"), (9999, "9999"), (12_345, "12.3k"), (123_456, "123k"), (5_300_000, "5.3M"), (2e12, "2.0T")],
)
def test_short_numbers(value, text):
    """At most five characters."""
    assert short_number(value) == text


def test_sizes_and_times():
    """Each by its largest unit."""
    assert [short_bytes(value) for value in (None, 0, 999, 1200, 3.4e6, 25e6, 1.2e9, 3e12)] == [
        "", "0 B", "999 B", "1.2 kB", "3.4 MB", "25 MB", "1.2 GB", "3.0 TB",
    ]  # fmt: skip
    assert [short_time(value) for value in (None, 3, 90, 7000, 5 * 3600.0, 12 * 86400)] == [
        "", "3 s", "2 min", "1.9 h", "5.0 h", "12 d",
    ]  # fmt: skip
    assert (real(None), real(1.23456), real(2, 1)) == ("", "1.235", "2.0")
