"""What a file is, by its first bytes: text, JSON lines, or something that a reader of text must refuse.

A name says what a file should be, but anyone can choose a name. A model that reads a gzip file or UTF-16 as text trains
on noise without a warning, so the first bytes decide, before any work.
"""

from __future__ import annotations

import codecs
import json

HEAD_BYTES = 1 << 16

TO_UTF8 = "iconv -f {} -t utf-8 FILE > NEW turns it into UTF-8"
# Longer beginnings come first: UTF-32's mark begins with that of UTF-16.
_BEGINNINGS = {
    b"\xff\xfe\0\0": ("UTF-32", TO_UTF8.format("utf-32")),
    b"\0\0\xfe\xff": ("UTF-32", TO_UTF8.format("utf-32")),
    b"\xff\xfe": ("UTF-16", TO_UTF8.format("utf-16")),
    b"\xfe\xff": ("UTF-16", TO_UTF8.format("utf-16")),
    b"\x1f\x8b": ("gzip data", "give it a name that ends in .gz, or unpack it"),
    b"\x28\xb5\x2f\xfd": ("Zstandard data", "give it a name that ends in .zst, or unpack it"),
    b"\xfd7zXZ\0": ("xz data", "unpack it"),
    b"BZh": ("bzip2 data", "unpack it"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "unpack it"),
    b"PK\x03\x04": (
        "a zip archive, as .docx, .xlsx and .epub are too",
        "unpack it, or save the document as plain text",
    ),
    b"%PDF-": ("a PDF", "pdftotext FILE NEW takes its text out"),
    b"\xd0\xcf\x11\xe0": ("an old Office document", "save it as plain text"),
    b"{\\rtf": ("rich text", "save it as plain text"),
    b"\x89PNG": ("a picture", "leave it out"),
    b"\xff\xd8\xff": ("a picture", "leave it out"),
    b"GIF8": ("a picture", "leave it out"),
    b"PAR1": ("Parquet data", "give it a name that ends in .parquet"),
    b"ARROW1": ("Arrow data", "convert it to Parquet or JSON lines"),
    b"\x93NUMPY": ("numpy's ids or numbers", "give the text that they were made from"),
}
_SPELLED = (
    b"BZh",
    b"GIF8",
    b"PAR1",
    b"ARROW1",
)  # text may begin like this, too; only control characters tell them apart
_CONTROLS = bytes({*range(32), 0x7F} - set(b"\b\t\n\v\f\r\x1b"))
# Some text has a control character here and there; binary data has them everywhere, far more than any text.
_MIN_CONTROLS, _CONTROL_SHARE = 8, 0.05
# Accented text in Latin-1 has a few invalid bytes in a hundred; in Cyrillic or Chinese in an old encoding, most are.
_MIN_INVALID, _INVALID_SHARE = 16, 0.3


def check_is_text(head: bytes, where: str) -> None:
    """Refuse data that is not UTF-8 text, by its first bytes.

    Raises:
        ValueError: data of another kind; the message names it and says what to do.
    """
    num_controls = len(head) - len(head.translate(None, _CONTROLS))
    # Short text in UTF-16 has few of them, but every second byte is one.
    least = _MIN_CONTROLS if len(head) < 4 else min(_MIN_CONTROLS, len(head) / 2)
    is_binary = num_controls >= least and num_controls > _CONTROL_SHARE * len(head)
    for beginning, (kind, way_out) in _BEGINNINGS.items():
        if head.startswith(beginning) and (is_binary or beginning not in _SPELLED):
            raise _no_text(where, kind, way_out)
    if is_binary:
        if name := _as_utf16(head):
            raise _no_text(where, "what may be UTF-16", f"if so, {TO_UTF8.format(name)}")
        raise _no_text(
            where, "binary data, such as another program's token file", "give the text that it was made from"
        )
    text = codecs.getincrementaldecoder("utf-8")("replace").decode(head)
    num_invalid = text.count("\ufffd") - head.count("\ufffd".encode())
    if num_invalid >= _MIN_INVALID and num_invalid > _INVALID_SHARE * len(text):
        raise _no_text(where, f"{num_invalid / len(text):.0%} of its characters invalid", TO_UTF8.format("ENCODING"))


def _as_utf16(head: bytes) -> str:
    """Return which UTF-16 without a mark the bytes may be in: utf-16be, utf-16le, or an empty string for neither."""
    zeros = {"utf-16be": head[::2].count(0), "utf-16le": head[1::2].count(0)}  # the upper halves of Latin letters
    name = max(zeros, key=zeros.__getitem__)
    text = head.decode(name, "replace")
    num_strange = sum(not (character.isprintable() or character.isspace()) for character in text)
    return name if zeros[name] > len(head) / 8 and num_strange <= _CONTROL_SHARE * len(text) else ""


def check_is_json_lines(head: bytes, where: str) -> None:
    """Refuse JSON that is not one object a line, by its first bytes.

    Raises:
        ValueError: one array, or a first line that is not a JSON object.
    """
    text = head.decode("utf-8", "replace").removeprefix("\ufeff").lstrip()
    expected = f"{where}: expected JSON lines, an object a line, found"
    if text.startswith("["):
        raise ValueError(f"{expected} an array (jq -c '.[]' FILE > NEW.jsonl turns it into lines)")
    line, *others = text.split("\n", 1)
    if not others and len(head) == HEAD_BYTES:
        return  # a line longer than the head
    try:
        if line:
            json.loads(line)
    except (ValueError, RecursionError):
        if text.startswith("{") and others:
            raise ValueError(
                f"{expected} an object over several lines (jq -c . FILE > NEW.jsonl writes each as one line)"
            ) from None


def check_is_no_json_lines(head: bytes, where: str) -> None:
    """Refuse JSON lines that would be read as running text, by their first bytes: a model would learn their syntax.

    Raises:
        ValueError: the first two lines that are not empty are JSON objects, or the only one is.
    """
    text = head.decode("utf-8", "replace").removeprefix("\ufeff")
    if not text.lstrip().startswith("{"):
        return
    whole, _, cut = text.rpartition("\n") if len(head) >= HEAD_BYTES else (text, "", "")
    lines = [line for line in whole.split("\n") if line.strip()][:2]
    # A second line longer than the head cannot be parsed; its beginning has to suffice.
    if lines and all(map(_is_json_object, lines)) and (len(lines) == 2 or not cut or cut.startswith('{"')):
        raise ValueError(f"{where}: expected plain text, found what looks like JSON lines: rename it to .jsonl")


def _is_json_object(line: str) -> bool:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and bool(record)


def _no_text(where: str, kind: str, way_out: str) -> ValueError:
    return ValueError(f"{where}: expected UTF-8 text, found {kind} ({way_out})")
