"""Text files cut into parts that may be read, counted or encoded one by one, in any order, by any process.

The parts are a pure function of the files' bytes and of the size that is asked for, so every process that can read the
files finds the same list by itself. Read in order, the parts are the text of the files, character for character, with
the same errors and the same `ReadStats`.

- JSON lines: a part ends with a line.
- `.parquet`: a part is some row groups.
- Packed text (`.gz`, `.zst`) can be read only from its beginning: the file is one part. So is a pipe.
- Plain text: the caller says where it may be cut. `DocumentEnds` cuts after a document's end, so a document is never in
  two parts, and a file without a separator is one part. For counting, `transformerlm.tokenizer.reading.SafeCuts` cuts
  between words.

An end belongs to the part before it and to the part after it, and both find it from the bytes alone: it is the first
place at or after a multiple of the size where the file may be cut. So a document longer than the size makes a longer
part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, Literal

from transformerlm.utils.text_files import ReadStats, TextBlock, changed_since, read_text
from transformerlm.utils.text_formats import check_can_unpack, damage_named, format_of, parquet_groups

_BLOCK_BYTES = 1 << 20

FindCut = Callable[[BinaryIO, int], int]
"""Called with an open file and a byte's place; returns the first cut at or after it, or the file's size."""


@dataclass(frozen=True)
class TextPart:
    """A part of a text file; `dataclasses.asdict` makes it JSON, and `TextPart(**record)` makes it a part again.

    `start` and `end` count bytes, or row groups in `row_groups`; for a whole `file` they are 0 and its size.
    `num_bytes` is what the part takes of the file on the disk; those of all parts of a file add up to its size.
    """

    path: str
    kind: Literal["file", "bytes", "row_groups"]
    start: int
    end: int
    num_bytes: int


class DocumentEnds:
    """Finds where documents end in plain text: after a separator, which is a special token."""

    def __init__(self, separator: str, special_tokens: Sequence[str] = ()) -> None:
        """Prepare; a separator that another special token of the tokenizer may overlap is passed over."""
        self._separator = separator.encode()
        self._tokens = [token.encode() for token in dict.fromkeys([separator, *special_tokens])]
        self._longest = max(map(len, self._tokens))
        # U+FFFD is read in place of invalid bytes, so bytes alone do not show where such a token is.
        self._is_certain = not any("\ufffd" in token for token in [separator, *special_tokens])

    def __call__(self, file: BinaryIO, at: int) -> int:
        """Return the first end of a document at or after byte `at`, the file's size if there is none."""
        size = file.seek(0, 2)
        start = max(0, at - len(self._separator))
        kept = b""
        while self._is_certain and start + len(kept) < size:
            file.seek(start + len(kept))
            data = kept + file.read(_BLOCK_BYTES)
            place = data.find(self._separator)
            while place >= 0:
                if self._is_token(file, start + place):
                    return start + place + len(self._separator)
                place = data.find(self._separator, place + 1)
            kept = data[len(data) - len(self._separator) + 1 :] if len(data) >= len(self._separator) else data
            start += len(data) - len(kept)
        return size

    def _is_token(self, file: BinaryIO, place: int) -> bool:
        """Return whether the separator at a place is one, and not in part another token that overlaps it."""
        end = place + len(self._separator)
        before = max(0, place - self._longest + 1)
        file.seek(before)
        data = file.read(end - before + self._longest - 1)
        return not any(_crosses(data, token, cut - before) for token in self._tokens for cut in (place, end))


def _crosses(data: bytes, token: bytes, cut: int) -> bool:
    """Return whether the token is somewhere in the bytes, with the cut inside it."""
    return data.find(token, max(0, cut - len(token) + 1), cut + len(token) - 1) >= 0


def find_parts(paths: Sequence[Path], *, part_bytes: int, find_cut: FindCut) -> list[TextPart]:
    """Cut files into parts of about `part_bytes` bytes on disk, in order; each file has one part or more.

    Args:
        paths: text files, as `expand_inputs` finds them.
        part_bytes: a file that is not larger is one part.
        find_cut: where plain text may be cut, such as `DocumentEnds`.

    Raises:
        ValueError: a damaged Parquet file.
    """
    assert part_bytes > 0, part_bytes
    return [part for path in paths for part in _parts_of(path, part_bytes, find_cut)]


def gather_parts(parts: Sequence[TextPart], *, part_bytes: int) -> list[list[TextPart]]:
    """Put small parts together, in order, until they have `part_bytes` bytes: many small files are few lists."""
    lists: list[list[TextPart]] = []
    gathered = 0
    for part in parts:
        if not lists or gathered + part.num_bytes > part_bytes:
            lists.append([])
            gathered = 0
        lists[-1].append(part)
        gathered += part.num_bytes
    return lists


def read_part(part: TextPart, *, text_field: str = "text", stats: ReadStats | None = None) -> Iterator[TextBlock]:
    """Yield the text of one part as `read_text` does that of a file; the part's end counts as a document's end.

    Raises:
        ValueError: as `read_text`, or the file has become shorter.
    """
    stats = stats if stats is not None else ReadStats()
    before = stats.disk_bytes
    stretch = None if part.kind == "file" else (part.start, part.end)
    yield from read_text(Path(part.path), text_field=text_field, stats=stats, stretch=stretch)
    if part.kind != "file":
        stats.disk_bytes = before + part.num_bytes


def whole_file(path: Path) -> TextPart:
    """Return a file as one part."""
    size = path.stat().st_size if path.is_file() else 0
    return TextPart(str(path), "file", 0, size, size)


def _parts_of(path: Path, part_bytes: int, find_cut: FindCut) -> list[TextPart]:
    whole, form = whole_file(path), format_of(path)
    if form.compression is not None or whole.num_bytes <= part_bytes:
        return [whole]
    if form.layout == "Parquet":
        return _groups_of(path, whole.num_bytes, part_bytes)
    find = _line_end if form.layout == "JSON lines" else find_cut
    ends = [0]
    with path.open("rb") as file:
        while ends[-1] < whole.num_bytes:
            end = find(file, min(whole.num_bytes, (ends[-1] // part_bytes + 1) * part_bytes))
            if end <= ends[-1]:
                raise changed_since(path, expected=whole.num_bytes)
            ends.append(end)
    return [TextPart(str(path), "bytes", *span, span[1] - span[0]) for span in pairwise(ends)]


def _line_end(file: BinaryIO, at: int) -> int:
    """Return the first end of a line at or after byte `at`, the file's size if there is none."""
    file.seek(start := at - 1)
    while block := file.read(_BLOCK_BYTES):
        if (place := block.find(b"\n")) >= 0:
            return start + place + 1
        start += len(block)
    return start


def _groups_of(path: Path, size: int, part_bytes: int) -> list[TextPart]:
    """Return a Parquet file as parts of row groups; each takes its share of the file's bytes."""
    check_can_unpack(path, form := format_of(path))
    with path.open("rb") as raw, damage_named(path, form):
        sizes = parquet_groups(path, raw)
    ends, gathered, number = [0], 0, 0
    for group, num_bytes in enumerate(sizes, 1):
        gathered += num_bytes
        if gathered // part_bytes > number or group == len(sizes):
            ends.append(group)
            number = gathered // part_bytes
    if len(ends) <= 2:
        return [whole_file(path)]
    place = [
        size * end // len(sizes) for end in range(len(sizes) + 1)
    ]  # of each group's beginning, as if all were alike
    return [TextPart(str(path), "row_groups", *span, place[span[1]] - place[span[0]]) for span in pairwise(ends)]
