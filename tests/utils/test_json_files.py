"""JSON from strangers is read with limits, and every refusal is one line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from transformerlm.utils.json_files import MAX_DEPTH, parse_json_object, read_json_object


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "f: expected a JSON object, found an array"),
        ('{"a": 1', "f:1: expected JSON, found Expecting"),
        ('{"a": "\x01"}', "f:1: expected JSON, found Invalid control character at column 8"),
        ('{"a": 1, "a": 2}', "f: expected each key once, found 'a' twice"),
        ('{"a": {"b": 1, "b": 1}}', "f: expected each key once, found 'b' twice"),
        ('{"a": NaN}', "f: expected finite numbers, found NaN"),
        ('{"a": [-Infinity]}', "f: expected finite numbers, found -Infinity"),
        ('{"a": 1e999}', "f: expected finite numbers, found inf"),
        (f'{{"a": {2**128}}}', "f: expected whole numbers of at most 128 bits"),
        (f'{{"a": {"9" * 5000}}}', "f: expected whole numbers of at most 128 bits"),
        ('{"a": ' + "[" * MAX_DEPTH + "]" * MAX_DEPTH + "}", f"f: expected JSON of at most {MAX_DEPTH} levels"),
        ('{"a": ' + "[" * 100_000, f"f: expected JSON of at most {MAX_DEPTH} levels"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    """Duplicate keys, NaN, endless numbers and deep nesting are errors."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is compared below)
        parse_json_object(text, where="f")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_what_is_read(tmp_path: Path) -> None:
    """An object of plain values comes back, up to the limits, with or without a byte order mark."""
    text = '{"a": ' + "[" * (MAX_DEPTH - 2) + str(2**128 - 1) + "]" * (MAX_DEPTH - 2) + ', "b": -1.5, "c": null}'
    (tmp_path / "f.json").write_text("\ufeff" + text, encoding="utf-8")
    assert read_json_object(tmp_path / "f.json", max_bytes=1000) == parse_json_object(text, where="f")


def test_files_that_are_no_files(tmp_path: Path) -> None:
    """A folder, a pipe and a file beyond the limit are refused without being read."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large.json").write_text("{}" + " " * 100)
    for name, found in (("pipe", "found a pipe or device"), ("large.json", "found 102"), (".", "found a folder")):
        with pytest.raises(ValueError, match=found):
            read_json_object(tmp_path / name, max_bytes=100)
