"""Text for the compiled engine: UTF-8 in chunks that may be worked on one by one, read from files as it is.

Files of plain text never become Python strings.

Part of: counter, engine
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from io import FileIO
from pathlib import Path

import numpy as np

from transformerlm.tokenizer import pretokenize, reading
from transformerlm.tokenizer.fast import text_kernels as text_kernels
from transformerlm.tokenizer.fast.arrays import PADDING, Array, Buffers, padded
from transformerlm.tokenizer.pretokenize import SpecialTokenSplitter
from transformerlm.tokenizer.reading import Chunk
from transformerlm.utils.text_files import ReadStats, changed_since, no_utf8

_TAIL_BYTES = 1 << 12


def chunk_of(texts: Sequence[str], *, ordinary: bool = False) -> Chunk:
    """Return texts as a chunk."""
    encoded = [text.encode() for text in texts]
    return Chunk(padded(b"".join(encoded)), np.cumsum([len(text) for text in encoded], dtype=np.int64), ordinary)


def read_chunks(
    path: Path,
    splitter: SpecialTokenSplitter,
    *,
    stats: ReadStats,
    size: int | None = None,
    start: int = 0,
    end: int | None = None,
) -> Iterator[Chunk]:
    """Yield a file of plain text in chunks of some `size` bytes, cut where the whole's pre-tokens are those of both.

    With `start` and `end`, only the bytes of one part of it are read (see `transformerlm.utils.text_parts`). Invalid
    UTF-8 is left as it is (see `made_valid`), so this is not for a splitter that needs text. Memory: a chunk, or the
    longest run without a place to cut.

    Raises:
        ValueError: a byte of invalid UTF-8, where `stats` refuses them, a run that is too long to be text, or a file
            that ends before `end`.
    """
    kept = np.empty(0, dtype=np.uint8)
    more, position, buffers = True, start, Buffers(np.uint8)
    with path.open("rb", buffering=0) as file:
        if start:
            file.seek(start)
        while more:
            room = max(size or reading.CHUNK_BYTES, len(kept) + min(len(kept), pretokenize.MAX_UNCUT_CHARS))
            data = buffers.take(room + PADDING)[: room + PADDING]
            data[: len(kept)] = kept
            left = len(data) if end is None else end - position - len(kept)
            full = _fill(file, data, len(kept), left)
            stats.disk_bytes += full - len(kept)
            more = full == len(data) - PADDING
            cut = last_cut(data[:full], splitter) if more or full > pretokenize.MAX_UNCUT_CHARS else full
            _check_runs(data[:full], cut, splitter, str(path))
            cut = cut if more else full
            kept = data[cut:full].copy()
            data[cut : cut + PADDING] = 0
            if stats.refuse_invalid and (place := text_kernels.first_invalid(data, cut)) < cut:
                raise no_utf8(str(path), int(data[place]), position + place)
            position += cut
            if stats.sample_chars:
                stats.keep(data[:cut].tobytes().decode("utf-8", "replace"))
            if cut:
                yield Chunk(data[: cut + PADDING], np.array([cut]))
            del data  # so that it can be taken again when nobody else holds it
    if end is not None and position < end:
        raise changed_since(path, expected=end)


def _check_runs(data: Array, cut: int, splitter: SpecialTokenSplitter, where: str) -> None:
    if len(data) <= pretokenize.MAX_UNCUT_CHARS:  # which nearly all are: others become text
        return
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # omits half a character
    before = decoder.decode(data[:cut].tobytes())
    text = before + decoder.decode(data[cut:].tobytes())
    pretokenize.check_runs(text, len(before), splitter, where=where)


def last_cut(data: Array, splitter: SpecialTokenSplitter) -> int:
    """Return the last place where bytes of text, the beginning of more, may be cut; 0 if there is none.

    `SpecialTokenSplitter.safe_cut` decides, on as much of the end as it needs: two characters, and before them the
    longest special token. Invalid bytes count as characters that are neither letter, number nor white space.
    """
    longest = max(map(len, splitter.special_tokens), default=0)
    size = _TAIL_BYTES
    while True:
        start = max(0, len(data) - size)
        text, before = reading.whole_text(data[start:].tobytes(), start)
        cut = splitter.safe_cut(text)
        if start == 0 or cut > longest:
            return before + len(text[:cut].encode("utf-8", "surrogateescape")) if cut else 0
        size *= 16


def made_valid(chunk: Chunk) -> tuple[Chunk, int]:
    """Put U+FFFD in place of invalid UTF-8; return the chunk and how many were put."""
    end = int(chunk.ends[-1])
    if text_kernels.first_invalid(chunk.data, end) == end:
        return chunk, 0
    data = chunk.data[:end].tobytes()
    text = data.decode("utf-8", "replace")
    return chunk_of([text], ordinary=chunk.ordinary), text.count("\ufffd") - data.count("\ufffd".encode())


def _fill(file: FileIO, data: Array, start: int, left: int) -> int:
    """Read `left` bytes from `start` on, or until only the padding is left, or the file has ended; return the end."""
    end = min(len(data) - PADDING, start + left)
    while start < end and (number := file.readinto(data[start:end].data)):
        start += number
    return start
