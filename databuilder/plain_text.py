"""Text without marked documents: cut it at blank lines, so that it can be shuffled and split like any other."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from transformerlm.utils.choice import are_chosen
from transformerlm.utils.strings import check_is_no_string
from transformerlm.utils.text_files import ReadStats, read_text
from transformerlm.utils.text_formats import format_of

DOCUMENT_CHARACTERS = 4_000
# Text without blank lines is cut at a line's end, after this many times as many characters.
PATIENCE = 4


def cut_into_documents(lines: Iterable[str], *, characters: int = DOCUMENT_CHARACTERS) -> Iterator[str]:
    """Yield documents of at least `characters` if the text allows it, each ending at a blank line.

    If no blank line comes within four times as many characters, a document ends at a line's end. The last one may be
    shorter. The lines are those of `str.splitlines(keepends=True)`; joined, the documents are the text.
    """
    check_is_no_string(lines, "lines")
    document: list[str] = []
    size = 0
    for line in lines:
        document.append(line)
        size += len(line)
        if size >= PATIENCE * characters or (size >= characters and not line.strip()):
            yield "".join(document)
            document, size = [], 0
    if document:
        yield "".join(document)


def write_documents(
    inputs: Sequence[Path],
    path: str | os.PathLike[str],
    *,
    separator: str,
    longest_line: int | None = None,
    stats: ReadStats | None = None,
) -> int:
    """Write the text of `inputs`, cut into documents with the separator's line after each; return their number.

    Files are cut, and each row of files of rows; neither is put together with the next one.

    A line of more than `longest_line` characters is cut, too, after a space if there is one; with None, none is.
    `stats` is filled with what the reading meets.

    Raises:
        ValueError: the inputs hold no text.
    """
    check_is_no_string(inputs, "inputs")
    number = 0
    with Path(path).open("w", encoding="utf-8", newline="") as file:
        for lines in chain.from_iterable(_texts(one, stats) for one in inputs):
            for document in cut_into_documents(_cut(lines, longest_line) if longest_line else lines):
                if document.strip():
                    file.write(f"{document.rstrip()}\n{separator}\n")
                    number += 1
    if not number:
        raise ValueError(f"{', '.join(map(str, inputs))}: expected text, found none")
    return number


def _texts(path: Path, stats: ReadStats | None) -> Iterator[Iterable[str]]:
    """Yield the lines of what is never put together with anything else: a file, or each row of one."""
    if format_of(path).holds_rows:
        yield from (block.text.splitlines(keepends=True) for block in read_text(path, stats=stats))
    else:
        yield _lines(path, stats)


def _lines(path: Path, stats: ReadStats | None) -> Iterator[str]:
    """Yield the lines of a text file with their ends, even if a block of it ends inside a line."""
    rest: list[str] = []  # of a line that may go on; put together once, however many blocks it has
    for block in read_text(path, stats=stats):
        first, *more = block.text.splitlines(keepends=True) or [""]
        rest.append(first)
        if more or (first and first[-1] != "\r" and first[-1].splitlines() == [""]):  # "\n" may follow "\r"
            yield from "".join(rest).splitlines(keepends=True)
            yield from more[:-1]
            rest = more[-1:]
    yield from "".join(rest).splitlines(keepends=True)


def _cut(lines: Iterable[str], longest: int) -> Iterator[str]:
    """Yield the lines in pieces of at most `longest` characters; joined, they are the lines."""
    for line in lines:
        start = 0
        while len(line) - start > longest:
            after_space = line.rfind(" ", start + longest // 2, start + longest) + 1
            end = after_space or start + longest
            yield line[start:end]
            start = end
        yield line[start:]


def write_part(
    inputs: Sequence[Path],
    path: str | os.PathLike[str],
    *,
    fraction: float,
    separator: str,
    stats: ReadStats | None = None,
) -> int:
    """Write an evenly spread `fraction` of the documents in `inputs`, a separator after each; return their number.

    A document ends at a separator, at the end of a file, or with its JSON line or row. It is written as it is read, so
    it may be of any length. `stats` is filled with what the reading meets.

    Raises:
        ValueError: no document was chosen.
    """
    check_is_no_string(inputs, "inputs")
    number = taken = 0
    is_chosen, has_text = True, False  # the first one always is
    with Path(path).open("w", encoding="utf-8", newline="") as file:
        for piece, ends_document in _pieces(inputs, separator, stats):
            has_text = has_text or bool(piece.strip())
            if is_chosen:
                file.write(piece)
            if ends_document and has_text:
                if is_chosen:
                    file.write(f"{separator}\n")
                number, taken, has_text = number + 1, taken + is_chosen, False
                is_chosen = bool(are_chosen(np.array([number]), fraction)[0])
    if not taken:
        raise ValueError(f"{', '.join(map(str, inputs))}: expected text, found none")
    return taken


def _pieces(inputs: Sequence[Path], separator: str, stats: ReadStats | None) -> Iterator[tuple[str, bool]]:
    """Yield the text of files without its separators, and with each piece whether its document ends there."""
    for source in inputs:
        rest = ""
        for block in read_text(source, stats=stats):
            *documents, last = (rest + block.text).split(separator)
            yield from ((document, True) for document in documents)
            # the next block may begin inside a separator
            keep = 0 if block.ends_document else min(len(last), len(separator) - 1)
            yield last[: len(last) - keep], block.ends_document
            rest = last[len(last) - keep :]
