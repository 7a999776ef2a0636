"""From text files to safe pieces of text: what counting and encoding work on, one after the other or side by side.

A piece is *safe* when the pre-tokens of the whole text are those of its pieces (see `pretokenize.py`). Pieces come in
two forms: `Texts` are Python strings, which any kind of file can give; a `Chunk` is the bytes of a large plain text
file as they are, for the compiled engine only.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from transformerlm.tokenizer.pretokenize import SpecialTokenSplitter, safe_pieces
from transformerlm.utils.text_files import ReadStats, is_plain_text, read_text
from transformerlm.utils.text_formats import format_of

if TYPE_CHECKING:
    import numpy as np

CHUNK_CHARS = 1 << 20
CHUNK_BYTES = 1 << 18  # a few of them fit the processor's cache
_CONTINUATION = bytes(range(0x80, 0xC0))  # bytes that go on with a character and begin none

_WINDOW_BYTES = 1 << 12


class Texts(NamedTuple):
    """Safe pieces of text; with `ordinary`, special tokens in them are plain text."""

    texts: list[str]
    ordinary: bool


class Chunk(NamedTuple):
    """Safe pieces of text as UTF-8, one after the other, with 64 zeros after the last, and where each ends.

    `data` is uint8 `(bytes + 64,)`, `ends` int64 `(pieces,)`. With `ordinary`, special tokens in them are plain text.
    """

    data: np.ndarray
    ends: np.ndarray
    ordinary: bool = False


class SafeCuts:
    """Finds where plain text may be cut for counting: the pre-tokens of the whole are those of its parts.

    See `transformerlm.utils.text_parts.find_parts`. A document may then be in two parts.
    """

    def __init__(self, splitter: SpecialTokenSplitter) -> None:
        self._splitter = splitter
        self._longest = max(map(len, splitter.special_tokens), default=0)
        # U+FFFD is read in place of invalid bytes, so bytes alone do not show where such a token is.
        self._is_certain = not any("\ufffd" in token for token in splitter.special_tokens)

    def __call__(self, file: BinaryIO, at: int) -> int:
        """Return a safe cut at or after byte `at`, the file's size if there is none.

        It is the last in the first few kilobytes that have any. What is read begins before `at` by more than the
        longest special token, since one that begins there must not be cut.
        """
        size = file.seek(0, 2)
        before = max(0, at - 4 * (self._longest + 2))  # a character has four bytes at most
        window = _WINDOW_BYTES
        while self._is_certain and at < size:
            file.seek(before)
            whole = file.read(at - before + window)
            text, start = whole_text(whole, before)
            cut = self._splitter.safe_cut(text)
            place = start + len(text[:cut].encode("utf-8", "surrogateescape"))
            if place >= at and cut > (self._longest if before else 0):
                return place
            if before + len(whole) >= size:
                break
            window *= 16
        return size


def whole_text(data: bytes, place: int) -> tuple[str, int]:
    """Return the text of the bytes at a place in a file, without a character that an edge cuts, and the text's place.

    Invalid bytes are escaped as surrogates, so that the text can be turned into the same bytes again.
    """
    begun = data.lstrip(_CONTINUATION)
    text = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode(begun)  # omits half a character
    return text, place + len(data) - len(begun)


def comes_in_chunks(path: Path) -> bool:
    """Return whether a file is plain text of a chunk or more."""
    return is_plain_text(path) and path.stat().st_size >= CHUNK_BYTES


def read_batches(
    paths: Sequence[Path],
    splitter: SpecialTokenSplitter,
    *,
    size: int,
    text_field: str,
    allow_special: bool,
    stats: ReadStats,
) -> Iterator[Texts]:
    """Gather safe pieces of the files' text into lists of at least `size` characters; no piece crosses a document.

    A list never mixes rows, in which special tokens are plain text unless `allow_special` is given, with other text.
    """
    for ordinary, files in groupby(paths, key=lambda path: not allow_special and format_of(path).holds_rows):
        cutter = splitter.without_tokens() if ordinary else splitter
        batch: list[str] = []
        gathered = 0
        for path in files:
            blocks = read_text(path, text_field=text_field, stats=stats)
            for piece in safe_pieces(blocks, cutter, size=size, where=str(path)):
                batch.append(piece.text)
                gathered += len(piece.text)
                if gathered >= size:
                    yield Texts(batch, ordinary)
                    batch, gathered = [], 0
        if batch:
            yield Texts(batch, ordinary)
