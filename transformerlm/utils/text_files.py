"""Text inputs: from file names and globs to a stream of decoded text in bounded memory.

Plain text (any suffix), JSON lines (`.jsonl`, `.ndjson`, `.json`: an object a line, the text under one key), either of
them as `.gz` or `.zst`, and `.parquet` (the text in one column) are read alike: as `TextBlock`s that say where a
document surely ends (at the end of a file, of a JSON line, or of a row). The text is the file's, character for
character: line ends are not translated (CRLF stays), a byte order mark stays, nothing is normalised. Invalid UTF-8
becomes U+FFFD and is counted in `ReadStats`, or is refused. A file that is not text is refused by its first bytes (see
`file_kinds`); in a folder that is named as an input it is skipped.

Memory: one block (1 MiB) for text, even of a `.gz` that unpacks to far more; for JSON lines, the longest line (at most
`MAX_LINE_BYTES`) and its text; for `.parquet` see `parquet_rows`.
"""

from __future__ import annotations

import codecs
import glob
import io
import json
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

from config.paths import is_utf8, not_utf8
from transformerlm.utils.conversations import conversation_as_text
from transformerlm.utils.file_kinds import HEAD_BYTES, check_is_json_lines, check_is_no_json_lines, check_is_text
from transformerlm.utils.json_files import json_kind
from transformerlm.utils.strings import replace_halves
from transformerlm.utils.text_formats import Format, check_can_unpack, damage_named, format_of, parquet_rows

BLOCK_BYTES = 1 << 20
MAX_LINE_BYTES = 1 << 26

_MOST_AHEAD = 1 << 28  # bytes; more could drive out of memory what others need
_MAX_NAMED = 3  # of the files in a folder that are not text
_REPLACE_HINT = 'invalid_utf8 = "replace" reads it as U+FFFD'
_UTF8_BOM = b"\xef\xbb\xbf"
# In a folder: what is no text though it may look like it.
_OF_TOKEN_FILES = (".parts", ".shards")
_TOKENIZER = ("vocab.json", "merges.txt", "special_tokens.json")


class TextBlock(NamedTuple):
    """A stretch of text, and whether the document it belongs to ends with it."""

    text: str
    ends_document: bool


@dataclass
class ReadStats:
    """What reading has found so far; the caller passes it in, and it fills up while the stream is consumed.

    With `refuse_invalid` the first byte of invalid UTF-8 is an error instead of being counted. The first `sample_chars`
    characters are kept, since an input may be a pipe, which cannot be read twice. With `conversations`, the text of a
    row is that of `conversation_as_text`.
    """

    refuse_invalid: bool = False
    conversations: bool = False  # rows hold messages instead of text
    disk_bytes: int = 0  # of the files as they are on disk (compressed ones compressed)
    documents: int = 0  # with a sample only
    chosen_documents: int = 0  # of them
    invalid_utf8: int = 0  # replacement characters in place of invalid bytes (or lone surrogates)
    sample_chars: int = 0
    sample: list[str] = field(default_factory=list)

    def keep(self, text: str) -> None:
        """Add text to the sample until it has `sample_chars` characters."""
        self.sample.append(text[: self.sample_chars])
        self.sample_chars -= len(self.sample[-1])


def expand_inputs(patterns: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Turn file names, folders and globs into files, in the order given (those of one folder or glob sorted).

    A name that exists is taken literally even if it holds glob characters; `**` searches folders within folders. A
    folder means the text files below it, except hidden ones; a warning counts the files that are not text.

    Raises:
        FileNotFoundError: a name or glob without a match, or a folder without a text file.
        ValueError: no input at all, a file that is named twice, or one that is not text, by name or content, or whose
            name is not UTF-8.
        PermissionError: a file or a folder that cannot be read.
    """
    names = [patterns] if isinstance(patterns, str | os.PathLike) else list(patterns)
    if not names:
        raise ValueError("input: expected at least one text file or glob, found none")
    paths: list[Path] = []
    named_by: dict[Path, str] = {}
    for name in names:
        for path in _files_of(os.path.expanduser(os.fspath(name))):
            if not is_utf8(str(path)):  # a sidecar names its inputs
                raise ValueError(f"input: {not_utf8(str(path)[-60:])}")
            if (real := path.resolve()) in named_by:
                raise ValueError(f"inputs: {path} is named twice (by {named_by[real]!r} and {os.fspath(name)!r})")
            named_by[real] = os.fspath(name)
            paths.append(path)
    return paths


def total_bytes(paths: Sequence[Path]) -> int:
    """Return how many bytes the files take on disk."""
    return sum(path.stat().st_size for path in paths)


def read_ahead(paths: Sequence[Path]) -> None:
    """Have the system read the beginning of files while this process imports or compiles what they are for."""
    if hasattr(os, "posix_fadvise"):  # not on macOS and Windows
        threading.Thread(target=_advise, args=(list(paths),), name="read-ahead", daemon=True).start()


def _advise(paths: Sequence[Path]) -> None:
    room = _MOST_AHEAD
    for path in paths:
        if room <= 0 or not path.is_file():  # a pipe can be opened once
            continue
        with suppress(OSError), path.open("rb") as file:  # who reads it tells what is wrong
            os.posix_fadvise(file.fileno(), 0, room, os.POSIX_FADV_WILLNEED)
            room -= os.fstat(file.fileno()).st_size


def read_text(
    path: Path, *, text_field: str = "text", stats: ReadStats | None = None, stretch: tuple[int, int] | None = None
) -> Iterator[TextBlock]:
    """Yield the text of one file block by block; a JSON line, or a row of `.parquet`, is one block and one document.

    Args:
        path: the file.
        text_field: the key of JSON lines, or the column of Parquet, that holds a document's text.
        stats: filled with what the reading meets.
        stretch: read only from one byte up to another, or these row groups of `.parquet`; see `text_parts.py`, which
            knows where a file may be cut.

    Raises:
        ValueError: a damaged file, or a JSON line that is not an object with a string under `text_field`, named as
            `file:line`.
    """
    stats = stats if stats is not None else ReadStats()
    before = stats.disk_bytes
    form = format_of(path)
    with path.open("rb") as raw, damage_named(path, form):
        if form.layout == "Parquet":
            blocks = _rows(path, raw, text_field, stats, groups=None if stretch is None else range(*stretch))
        elif stretch is not None:
            blocks = _text_of_stretch(path, form, raw, text_field, stats, stretch)
            before -= stretch[0]
        elif form.layout == "JSON lines":
            blocks = _json_lines(path, form.unpacked(raw), text_field, stats)
        else:
            blocks = _plain_text(path, form.unpacked(raw), stats)
        is_counted = raw.seekable() and (stretch is None or form.layout != "Parquet")  # of which the place says nothing
        for block in blocks:
            stats.disk_bytes = before + (raw.tell() if is_counted else 0)
            if stats.sample_chars:
                stats.keep(block.text)
            yield block
    if stretch is None:
        stats.disk_bytes = before + (path.stat().st_size if path.is_file() else 0)


def is_plain_text(path: Path) -> bool:
    """Return whether a file's bytes are its text: not packed, not JSON lines, not a pipe."""
    return path.is_file() and format_of(path).is_plain


def _files_of(name: str) -> list[Path]:
    if os.path.isdir(name):
        return _texts_below(name)
    paths = _matches(name)
    for path in paths:
        form = format_of(path)
        if form.refusal:
            raise ValueError(f"input: {form.refusal.format(path)}")
        _check_readable(path, form)
        _check_head(_head_of(path, form), str(path), form)
    return paths


def _matches(name: str) -> list[Path]:
    if os.path.lexists(name):
        return [Path(name)]
    if not glob.has_magic(name):
        raise FileNotFoundError(f"input: expected a text file, found nothing at {name}")
    matches = _glob(name)
    if not matches:
        raise FileNotFoundError(f"input: expected text files, found none that match {name}")
    return matches


def _glob(pattern: str) -> list[Path]:
    return [Path(match) for match in sorted(glob.glob(pattern, recursive=True)) if not os.path.isdir(match)]


def _texts_below(folder: str) -> list[Path]:
    paths = _below(folder)
    texts = [path for path in paths if _is_text(path)]
    known = set(texts)
    others = [str(path) for path in paths if path not in known]
    more = [f"{len(others) - _MAX_NAMED:,} more"] if len(others) > _MAX_NAMED else []
    named = ", ".join([*others[:_MAX_NAMED], *more])
    if not texts:
        raise FileNotFoundError(f"input: expected text files in {folder}, found {named or 'no file'}")
    if others:
        count = f"{len(texts):,} text file{'s' * (len(texts) > 1)}"
        warnings.warn(f"{folder}: {count}; left out as no text: {named}", stacklevel=1)
    return texts


def _below(folder: str) -> list[Path]:
    """Return the files below a folder in order, each once, without hidden ones; links to folders are not followed.

    What our own commands write beside a text is left out, too: token files in parts, the files of a tokenizer, with a
    prefix as well, what a killed process has left of these, and downloads that are not whole.
    """
    found: dict[str, Path] = {}
    for here, folders, names in os.walk(folder, onerror=_refuse_folder):
        folders[:] = [name for name in folders if not name.startswith(".") and not name.endswith(_OF_TOKEN_FILES)]
        not_texts = {*_tokenizers(names), *_unfinished(names)}
        for path in (os.path.join(here, name) for name in {*names} - not_texts if not name.startswith(".")):
            real = os.path.realpath(path)
            found[real] = min(found.get(real, Path(path)), Path(path))
    return sorted(found.values())


def _tokenizers(names: Sequence[str]) -> Iterator[str]:
    """Yield the names of tokenizers' files, those with a prefix too: `gpt2-vocab.json` beside `gpt2-merges.txt`.

    A save that was killed leaves some of them as `NAME.tmp` (see `files.whole_files`).
    """
    yield from (f"{name}{end}" for name in _TOKENIZER for end in (".tmp", ".tmp-old"))
    known = {name.removesuffix(".tmp") for name in names}
    for name in known:
        prefix = name.removesuffix("vocab.json")
        if name != prefix and prefix[-1:] in ("", "-") and f"{prefix}merges.txt" in known:
            yield from (f"{prefix}{end}" for end in _TOKENIZER)


def _unfinished(names: Sequence[str]) -> Iterator[str]:
    """Yield the names of what a download has begun: `a.txt.part`, and `a.txt.part.json`, which says what it is of."""
    for name in names:
        if name.endswith(".part") and f"{name}.json" in names:
            yield from (name, f"{name}.json")


def _refuse_folder(error: OSError) -> NoReturn:
    raise type(error)(f"input: expected a folder that can be read, found {error.filename} ({error.strerror})") from None


def _is_text(path: Path) -> bool:
    """Return whether a file in a folder is text; one that cannot be read, or is damaged, is still an error."""
    form = format_of(path)
    if not path.is_file() or form.refusal:
        return False
    _check_readable(path, form)
    head = _head_of(path, form)
    try:
        _check_head(head, str(path), form)
    except ValueError:
        return False
    return True


def _check_readable(path: Path, form: Format) -> None:
    check_can_unpack(path, form)
    if not path.exists():
        raise FileNotFoundError(f"input: expected a text file, found a broken link at {path}")
    if not os.access(path, os.R_OK):
        raise PermissionError(f"input: expected a file that can be read, found {path} without read permission")


def _head_of(path: Path, form: Format) -> bytes:
    """Return a file's first bytes; none of a pipe, which can be read only once: `read_text` checks its beginning."""
    if not path.is_file() or form.layout == "Parquet":
        return b""
    with path.open("rb") as raw, damage_named(path, form):
        return form.unpacked(raw).read(HEAD_BYTES)


def _check_head(head: bytes, where: str, form: Format) -> None:
    check_is_text(head, where)
    if form.layout == "JSON lines":
        check_is_json_lines(head, where)
    else:
        check_is_no_json_lines(head, where)


class _Stretch(io.RawIOBase):
    """The bytes of an open file from where it is up to `end`, as a stream of its own."""

    def __init__(self, path: Path, raw: BinaryIO, end: int) -> None:
        self._path, self._raw, self._end = path, raw, end
        self._left = end - raw.tell()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._raw.read(min(len(buffer), self._left))
        if self._left and len(buffer) and not data:
            raise changed_since(self._path, expected=self._end)
        buffer[: len(data)] = data
        self._left -= len(data)
        return len(data)


def _text_of_stretch(
    path: Path, form: Format, raw: BinaryIO, text_field: str, stats: ReadStats, stretch: tuple[int, int]
) -> Iterator[TextBlock]:
    """Yield the text of one stretch of a file that is not packed; errors name the same lines and bytes as the whole."""
    start, end = stretch

    def stream() -> BinaryIO:
        raw.seek(start)
        return io.BufferedReader(_Stretch(path, raw, end), BLOCK_BYTES)

    if form.layout == "text":
        yield from _plain_text(path, stream(), stats, position=start)
        return
    try:
        yield from _json_lines(path, stream(), text_field, stats, number=min(start, 1))
    except ValueError:
        # Nobody counts the lines before a stretch until one is to be named; then it is read again.
        raw.seek(0)
        number, left = 0, start
        while block := raw.read(min(BLOCK_BYTES, left)):
            number, left = number + block.count(b"\n"), left - len(block)
        again = ReadStats(stats.refuse_invalid, stats.conversations)
        for _ in _json_lines(path, stream(), text_field, again, number=number):
            pass
        raise


def _plain_text(path: Path, stream: BinaryIO, stats: ReadStats, *, position: int = 0) -> Iterator[TextBlock]:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    pending, more = b"", True
    while more:
        block = stream.read(BLOCK_BYTES)
        more = bool(block)
        if position == 0 and not path.is_file():
            _check_head(block[:HEAD_BYTES], str(path), format_of(path))
        text = decoder.decode(block, final=not more)
        kept = decoder.getstate()[0]  # the first bytes of a character that the block cut in two
        if "\ufffd" in text:
            data = (pending + block)[: len(pending + block) - len(kept)]
            _count_replaced(data, text, stats, where=str(path), position=position - len(pending))
        pending = kept
        position += len(block)
        yield TextBlock(text, ends_document=not more)


def _count_replaced(data: bytes, text: str, stats: ReadStats, *, where: str, position: int = 0) -> None:
    """Count the replacement characters in `text` that were not in `data` already, or refuse the first."""
    number = text.count("\ufffd") - data.count("\ufffd".encode())
    stats.invalid_utf8 += number
    if number and stats.refuse_invalid:
        try:
            data.decode()
        except UnicodeDecodeError as error:
            raise no_utf8(where, data[error.start], position + error.start) from None


def no_utf8(where: str, byte: int, offset: int) -> ValueError:
    """Return the error for a byte of invalid UTF-8."""
    return ValueError(f"{where}: expected UTF-8, found byte {byte:#04x} at offset {offset:,} ({_REPLACE_HINT})")


def changed_since(path: Path, *, expected: int) -> ValueError:
    """Return the error for a file that has become shorter since it was cut into parts."""
    return ValueError(
        f"{path}: expected {expected:,} bytes or more, found {path.stat().st_size:,} (the file has "
        "changed since it was cut into parts)"
    )


def _json_lines(
    path: Path, stream: BinaryIO, text_field: str, stats: ReadStats, *, number: int = 0
) -> Iterator[TextBlock]:
    """Yield the text of each line; `number` lines came before the stream."""
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise ValueError(
                f"{path}:{number}: expected a line of at most {MAX_LINE_BYTES:,} bytes, found a longer one"
            )
        if number == 1:
            line = line.removeprefix(_UTF8_BOM)
        if line.strip():
            yield TextBlock(_text_of_line(line, f"{path}:{number}", text_field, stats), ends_document=True)


def _rows(path: Path, raw: BinaryIO, text_field: str, stats: ReadStats, *, groups: range | None) -> Iterator[TextBlock]:
    for where, data in parquet_rows(path, raw, text_field, groups=groups):
        text = data.decode("utf-8", "replace")
        if "\ufffd" in text:
            _count_replaced(data, text, stats, where=where)
        yield TextBlock(text, ends_document=True)


def _text_of_line(line: bytes, where: str, text_field: str, stats: ReadStats) -> str:
    decoded = line.decode("utf-8", "replace")
    if "\ufffd" in decoded:
        _count_replaced(line, decoded, stats, where=where)

    def text_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        if sum(key == text_field for key, _ in pairs) > 1:
            raise ValueError(f"{text_field!r} twice")
        return dict(pairs)

    try:
        record = json.loads(decoded, object_pairs_hook=text_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: expected a JSON object, found a line that is no JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a JSON object, found {json_kind(record)}")
    if text_field not in record:
        key = "chat.messages_field" if stats.conversations else "text_field"
        raise ValueError(f"{where}: expected the field {text_field!r}, found {sorted(record)[:8]} (set {key})")
    text = record[text_field]
    if stats.conversations:
        text, num_surrogates = conversation_as_text(text, where=where)
    elif not isinstance(text, str):
        raise ValueError(f"{where}: expected text under {text_field!r}, found {json_kind(text)}")
    else:
        text, num_surrogates = replace_halves(text)
    stats.invalid_utf8 += num_surrogates
    if num_surrogates and stats.refuse_invalid:
        raise ValueError(f"{where}: expected whole characters, found half of one spelled with \\u ({_REPLACE_HINT})")
    return str(text)
