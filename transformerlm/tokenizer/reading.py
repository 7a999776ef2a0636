"""From text files to safe pieces of text: what counting and encoding work on, one after the other or side by side.

A piece is *safe* when the pre-tokens of the whole text are those of its pieces (see `pretokenize.py`). Pieces come in
two forms: `Texts` are Python strings, which any kind of file can give; a `Chunk` is the bytes of a large plain text
file as they are, for the compiled engine only.
"""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from transformerlm.tokenizer import pretokenize
from transformerlm.tokenizer.pretokenize import SpecialTokenSplitter, safe_pieces
from transformerlm.utils.choice import are_chosen
from transformerlm.utils.text_files import ReadStats, TextBlock, is_plain_text
from transformerlm.utils.text_formats import Format, format_of
from transformerlm.utils.text_parts import TextPart, read_part, whole_file

if TYPE_CHECKING:
    import numpy as np

CHUNK_CHARS = 1 << 20
CHUNK_BYTES = 1 << 18  # a few of them fit the processor's cache
KEY_CHARS = 1 << 16  # of a document's beginning, which a sample chooses by
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

    def __call__(self, file: BinaryIO, at: int) -> int:
        """Return a safe cut at or after byte `at`, the file's size if there is none.

        It is the last in the first few kilobytes that have any. What is read begins before `at` by more than the
        longest special token, since one that begins there must not be cut.

        Raises:
            ValueError: a run without a cut that is too long to be text.
        """
        size = file.seek(0, 2)
        most = 4 * (pretokenize.MAX_UNCUT_CHARS + 2)  # bytes that hold a run which is refused, whatever its characters
        before = max(0, at - 4 * (self._longest + 2))  # a character has four bytes at most
        window = _WINDOW_BYTES
        while at < size and not self._splitter.needs_text:
            file.seek(before)
            whole = file.read(at - before + window)
            text, start = whole_text(whole, before)
            cut = self._splitter.safe_cut(text)
            place = start + len(text[:cut].encode("utf-8", "surrogateescape"))
            if place >= at and cut > (self._longest if before else 0):
                return place
            if before + len(whole) >= size:
                break
            pretokenize.check_runs(text, cut, self._splitter, where=file.name)
            if window >= most:  # no text at all, which reading it will say
                break
            window = min(16 * window, most)
        return size


def whole_text(data: bytes, place: int) -> tuple[str, int]:
    """Return the text of the bytes at a place in a file, without a character that an edge cuts, and the text's place.

    Invalid bytes are escaped as surrogates, so that the text can be turned into the same bytes again.
    """
    begun = data.lstrip(_CONTINUATION)
    text = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode(begun)  # omits half a character
    return text, place + len(data) - len(begun)


def comes_in_chunks(path: Path, splitter: SpecialTokenSplitter) -> bool:
    """Return whether a file is plain text of a chunk or more, and its bytes show where it may be cut."""
    return is_plain_text(path) and path.stat().st_size >= CHUNK_BYTES and not splitter.needs_text


class DocumentSample:
    """Chooses a fraction of the documents by what they say, so that the same ones are chosen in any order.

    A number that is made from a document's beginning (`KEY_CHARS` characters) decides, by the rule of `utils.choice`.
    So nobody has to count the documents before it. Copies of a document are chosen all together, or none of them.
    """

    def __init__(self, fraction: float, separator: str | None) -> None:
        """Prepare; `separator` is the special token that ends a document in running text.

        Raises:
            ValueError: no fraction above 0 and below 1.
        """
        if not 0 < fraction < 1:
            raise ValueError(f"sample: expected a fraction above 0 and below 1, found {fraction}")
        self.fraction = fraction
        self._separator = separator

    def choose(
        self, pieces: Iterable[TextBlock], splitter: SpecialTokenSplitter, *, stats: ReadStats
    ) -> Iterator[TextBlock]:
        """Yield the chosen documents' text, without separators; a document's pieces stay safe pieces.

        Documents of white space alone are not chosen, and not counted.
        """
        held: list[str] = []  # the document's beginning, until there is enough of it to choose by
        num_held, chosen = 0, False
        for text, ends_document in self._documents(pieces, splitter):
            if num_held < KEY_CHARS:
                held.append(text)
                num_held += len(text)
                if num_held < KEY_CHARS and not ends_document:
                    continue
                text = "".join(held)
                held, num_held = [], max(num_held, KEY_CHARS)
                is_blank = ends_document and not text.strip()
                chosen = not is_blank and self._is_chosen(text[:KEY_CHARS])
                stats.documents += not is_blank
                stats.chosen_documents += chosen
            if chosen and text:
                yield TextBlock(text, ends_document)
            if ends_document:
                num_held = 0

    def _documents(self, pieces: Iterable[TextBlock], splitter: SpecialTokenSplitter) -> Iterator[TextBlock]:
        """Cut safe pieces of text at the ends of documents as well; omit documents of no characters at all."""
        is_empty = True
        for text, ends_document in pieces:
            start = 0
            for left, right in splitter.find(text):
                if text[left:right] == self._separator:
                    if left > start or not is_empty:
                        yield TextBlock(text[start:left], ends_document=True)
                    start, is_empty = right, True
            if len(text) > start:
                yield TextBlock(text[start:], ends_document)
                is_empty = ends_document
            elif ends_document and not is_empty:
                yield TextBlock("", ends_document=True)
                is_empty = True

    def _is_chosen(self, beginning: str) -> bool:
        import numpy as np

        digest = hashlib.blake2b(beginning.encode(), digest_size=8).digest()
        return bool(are_chosen(np.array([int.from_bytes(digest, "little")], dtype=np.uint64), self.fraction)[0])


def read_batches(
    parts: Sequence[TextPart],
    splitter: SpecialTokenSplitter,
    *,
    size: int,
    text_field: str,
    allow_special: bool,
    stats: ReadStats,
    sample: DocumentSample | None = None,
) -> Iterator[Texts]:
    """Gather safe pieces of the parts' text into lists of at least `size` characters; no piece crosses a document.

    A list never mixes rows, in which special tokens are plain text unless `allow_special` is given, with other text.
    With a sample, only the documents that it chooses are there.
    """
    for ordinary, group in groupby(parts, key=lambda part: not allow_special and _format_of(part).holds_rows):
        cutter = splitter.without_tokens() if ordinary else splitter
        batch: list[str] = []
        gathered = 0
        for part in group:
            blocks = read_part(part, text_field=text_field, stats=stats)
            pieces = safe_pieces(blocks, cutter, size=size, where=part.path)
            for piece in pieces if sample is None else sample.choose(pieces, cutter, stats=stats):
                batch.append(piece.text)
                gathered += len(piece.text)
                if gathered >= size:
                    yield Texts(batch, ordinary)
                    batch, gathered = [], 0
        if batch:
            yield Texts(batch, ordinary)


def as_parts(texts: Sequence[Path | TextPart]) -> list[TextPart]:
    """Return files and parts of files as parts."""
    return [text if isinstance(text, TextPart) else whole_file(text) for text in texts]


def _format_of(part: TextPart) -> Format:
    return format_of(Path(part.path))
