"""From text files to token files: documents encoded in parallel, in order, in bounded memory.

One pass: this process reads the text, cuts it into documents (at the separator, at a file's end, one per JSON line)
and those into pieces at safe places; workers encode batches of pieces (threads with the tokenizer's compiled engine,
which large inputs get, processes otherwise); this process appends what they return.
Each document is followed by the separator's id, and no token crosses from one document into the next. The result is
the same for any number of workers.

The validation split takes whole documents, spread evenly over the inputs: document i goes there when the fractional
part of i times the golden ratio is below the fraction. That is the same for each run, close to the fraction at every
stretch of the text, and always takes the first document.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from databuilder.token_file import TokenFileWriter, publish, sidecar_path
from transformerlm.tokenizer import Tokenizer
from transformerlm.tokenizer.parallel import ProgressCallback, map_in_order, resolve_num_workers
from transformerlm.tokenizer.pretokenize import SpecialTokenSplitter, safe_pieces
from transformerlm.utils.text_files import ReadStats, TextBlock, expand_inputs, read_text, total_bytes

DEFAULT_SEPARATOR = "<|endoftext|>"
BATCH_CHARS = 1 << 20

_TRAIN, _VALID = 0, 1
_GOLDEN_RATIO = 0x9E3779B97F4A7C15  # its fractional part, in units of 2^-64


@dataclass(frozen=True)
class SplitReport:
    """What one token file holds; `bytes` counts the documents' UTF-8 bytes, separators left out."""

    path: Path
    tokens: int
    bytes: int
    documents: int


@dataclass(frozen=True)
class BuildReport:
    """What a build has made and met."""

    train: SplitReport
    valid: SplitReport | None
    seconds: float
    invalid_utf8: int
    empty_documents: int


def build_dataset(
    inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    tokenizer: Tokenizer,
    train_path: str | os.PathLike[str],
    valid_path: str | os.PathLike[str] | None = None,
    valid_fraction: float = 0.0,
    separator: str = DEFAULT_SEPARATOR,
    text_field: str = "text",
    invalid_utf8: Literal["replace", "refuse"] = "replace",
    overwrite: bool = False,
    num_workers: int | None = None,
    progress: ProgressCallback | None = None,
) -> BuildReport:
    """Encode text files into `train_path` and, where a fraction is given, `valid_path`, each an `.npy` with a sidecar.

    Args:
        inputs: files and globs of plain text, `.gz` or `.jsonl` (see `transformerlm.utils.text_files`).
        tokenizer: must know `separator` as a special token.
        train_path: the token file to write; ids are uint16 where all fit and uint32 otherwise, shape (tokens,).
        valid_path: the token file for the validation documents; given exactly when `valid_fraction` is above 0.
        valid_fraction: which part of the documents to hold out, from 0 to below 1.
        separator: ends a document in the text, and follows each document in the token file.
        text_field: where the text stands in a line of a `.jsonl` file.
        invalid_utf8: read bytes that are no UTF-8 as U+FFFD and count them, or refuse the file.
        overwrite: replace existing outputs, at the very end; otherwise they are refused before any work.
        num_workers: processes or threads that encode; by default one for each CPU, one below 8 MB.
        progress: called with ("encode", bytes read, bytes in all), in bytes on disk.

    Raises:
        ValueError: arguments that do not fit together, inputs without text, or a split that would leave one side empty.
        FileExistsError: an output exists already.
        OSError: the disk has too little room or cannot be written.
    """
    start = time.perf_counter()
    _check_split(train_path, valid_path, valid_fraction)
    outputs = [Path(path) for path in (train_path, valid_path) if path is not None]
    paths = expand_inputs(inputs)
    _check_outputs(outputs, paths, overwrite=overwrite)
    _check_separator(tokenizer, separator)
    stats = ReadStats(refuse_invalid=invalid_utf8 == "refuse")
    source = _DocumentSource(paths, tokenizer, separator, text_field, valid_fraction, stats)
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    with ExitStack() as stack:
        writers = [stack.enter_context(TokenFileWriter(path, dtype)) for path in outputs]
        workers = resolve_num_workers(num_workers, total_bytes(paths))
        text_bytes = _encode_all(source, writers, num_workers=workers, progress=progress)
        source.check_documents()
        splits = [
            SplitReport(writer.path, writer.tokens, size, documents)
            for writer, size, documents in zip(writers, text_bytes, source.documents, strict=False)
        ]
        shared = {**_shared_facts(tokenizer, paths, separator), "invalid_utf8": stats.invalid_utf8}
        publish(writers, [{"bytes": split.bytes, "documents": split.documents, **shared} for split in splits])
    return BuildReport(
        train=splits[_TRAIN],
        valid=splits[_VALID] if len(splits) > 1 else None,
        seconds=time.perf_counter() - start,
        invalid_utf8=stats.invalid_utf8,
        empty_documents=source.empty_documents,
    )


def is_validation_document(index: int, fraction: float) -> bool:
    """Tell whether document `index` (from 0, empty ones not counted) is held out."""
    return (index * _GOLDEN_RATIO) % (1 << 64) < fraction * (1 << 64)


class _Piece(NamedTuple):
    text: str
    split: int
    ends_document: bool


class _Batch(NamedTuple):
    pieces: list[_Piece]
    disk_bytes: int  # read up to and with this batch


class _Encoded(NamedTuple):
    ids: list[bytes]  # per split, as the bytes of an array
    text_bytes: list[int]  # per split
    disk_bytes: int


class _DocumentSource:
    """Reads the inputs as batches of pieces of documents, each piece with its split, and counts the documents."""

    def __init__(
        self,
        paths: Sequence[Path],
        tokenizer: Tokenizer,
        separator: str,
        text_field: str,
        valid_fraction: float,
        stats: ReadStats,
    ) -> None:
        self.paths = paths
        self.tokenizer = tokenizer
        self.separator = separator
        self.documents = [0, 0]
        self.empty_documents = 0
        self.stats = stats
        self._splitter = SpecialTokenSplitter(tokenizer.special_tokens)
        self._text_field = text_field
        self._valid_fraction = valid_fraction

    def batches(self) -> Iterator[_Batch]:
        """Yield batches of at least `BATCH_CHARS` characters."""
        pieces: list[_Piece] = []
        gathered = 0
        for piece in self._pieces():
            pieces.append(piece)
            gathered += len(piece.text)
            if gathered >= BATCH_CHARS:
                yield _Batch(pieces, self.stats.disk_bytes)
                pieces, gathered = [], 0
        yield _Batch(pieces, self.stats.disk_bytes)

    def check_documents(self) -> None:
        """Refuse inputs that gave no document, or none to one side of the split."""
        train, valid = self.documents
        if train + valid == 0:
            raise ValueError(f"inputs: expected text, found none in {', '.join(map(str, self.paths))}")
        if self._valid_fraction > 0 and 0 in (train, valid):
            raise ValueError(
                f"valid_fraction: expected at least one document on each side, found {train + valid} in all at "
                f"{self._valid_fraction} (documents end at {self.separator!r})"
            )

    def _pieces(self) -> Iterator[_Piece]:
        """Give each document with any text its split; a document of white space alone is dropped."""
        blank, split = "", None
        for block in self._blocks():
            if split is None and not block.text.strip():
                self.empty_documents += bool(block.ends_document and blank + block.text)
                blank = "" if block.ends_document else blank + block.text
                continue
            if split is None:
                split = _VALID if is_validation_document(sum(self.documents), self._valid_fraction) else _TRAIN
                self.documents[split] += 1
            yield _Piece(blank + block.text, split, block.ends_document)
            blank = ""
            if block.ends_document:
                split = None

    def _blocks(self) -> Iterator[TextBlock]:
        """Cut the text at safe places and at the separator."""
        for path in self.paths:
            blocks = read_text(path, text_field=self._text_field, stats=self.stats)
            for text, ends_document in safe_pieces(blocks, self._splitter, size=BATCH_CHARS, where=str(path)):
                end = 0
                for start, stop in self._splitter.find(text):
                    if text[start:stop] == self.separator:
                        yield TextBlock(text[end:start], ends_document=True)
                        end = stop
                yield TextBlock(text[end:], ends_document)


class _BatchEncoder:
    """The work on one batch, as an object that can be sent to a worker process or shared by threads."""

    def __init__(self, tokenizer: Tokenizer, separator: str, num_splits: int) -> None:
        self._tokenizer = tokenizer
        self._separator_id = tokenizer.special_token_ids[separator]
        self._num_splits = num_splits

    def __call__(self, batch: _Batch) -> _Encoded:
        ids: list[bytes] = []
        text_bytes: list[int] = []
        for split in range(self._num_splits):
            pieces = [piece for piece in batch.pieces if piece.split == split]
            part, ends = self._tokenizer.encode_batch_to_array([piece.text for piece in pieces])
            document_ends = ends[[piece.ends_document for piece in pieces]]
            ids.append(np.insert(part, document_ends, self._separator_id).tobytes())
            text_bytes.append(sum(len(piece.text.encode()) for piece in pieces))
        return _Encoded(ids, text_bytes, batch.disk_bytes)


def _encode_all(
    source: _DocumentSource, writers: Sequence[TokenFileWriter], *, num_workers: int, progress: ProgressCallback | None
) -> list[int]:
    """Append all documents to their files; return the bytes of text of each split."""
    encoder = _BatchEncoder(source.tokenizer, source.separator, len(writers))
    num_bytes = total_bytes(source.paths)
    text_bytes = [0] * len(writers)
    threads = source.tokenizer.runs_in_threads(num_bytes)
    results = map_in_order(encoder, source.batches(), num_workers=num_workers, threads=threads)
    with closing(results):
        for number, encoded in enumerate(results):
            if number == 0 and encoded.disk_bytes > 0:
                expected = sum(map(len, encoded.ids)) * num_bytes // encoded.disk_bytes
                _check_room(writers[0].path.parent, expected)
            for split, writer in enumerate(writers):
                writer.append(encoded.ids[split])
                text_bytes[split] += encoded.text_bytes[split]
            if progress is not None:
                progress("encode", encoded.disk_bytes, num_bytes)
    return text_bytes


def _check_room(folder: Path, expected: int) -> None:
    """Refuse early what the first batch shows to be too much for the disk."""
    free = shutil.disk_usage(folder).free
    if expected > free:
        needed = f"about {expected / 1e6:,.0f} MB for the token files"
        raise OSError(f"{folder}: expected {needed}, found {free / 1e6:,.0f} MB free")


def _shared_facts(tokenizer: Tokenizer, paths: Sequence[Path], separator: str) -> dict[str, Any]:
    return {
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_sha256": tokenizer.fingerprint(),
        "separator": separator,
        "sources": [{"path": str(path), "bytes": path.stat().st_size} for path in paths],
    }


def _check_split(
    train_path: str | os.PathLike[str], valid_path: str | os.PathLike[str] | None, valid_fraction: float
) -> None:
    if not (math.isfinite(valid_fraction) and 0 <= valid_fraction < 1):
        raise ValueError(f"valid_fraction: expected 0 or more and less than 1, found {valid_fraction}")
    if (valid_path is None) != (valid_fraction == 0):
        raise ValueError(
            f"valid_path: expected exactly when valid_fraction is above 0, found {valid_path} with {valid_fraction}"
        )
    for path in (train_path, valid_path):
        if path is not None and Path(path).suffix != ".npy":
            raise ValueError(f"expected token files that end in .npy, found {path}")
    if valid_path is not None and Path(valid_path).resolve() == Path(train_path).resolve():
        raise ValueError(f"valid_path: expected another file than train_path, found {valid_path} twice")


def _check_outputs(outputs: Sequence[Path], inputs: Sequence[Path], *, overwrite: bool) -> None:
    sources = {path.resolve() for path in inputs}
    for output in outputs:
        for path in (output, sidecar_path(output)):
            if path.resolve() in sources:
                raise ValueError(f"{path}: expected an output that is not an input, found it among the inputs")
            if path.is_dir():
                raise ValueError(f"{path}: expected a file to write, found a folder")
            if path.exists() and not overwrite:
                raise FileExistsError(f"{path}: expected no such file yet, found one (overwrite replaces it)")


def _check_separator(tokenizer: Tokenizer, separator: str) -> None:
    if separator not in tokenizer.special_token_ids:
        known = ", ".join(map(repr, tokenizer.special_tokens)) or "none at all"
        raise ValueError(f"separator: expected a special token of the tokenizer ({known}), found {separator!r}")
