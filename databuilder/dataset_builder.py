"""From text files to token files: documents encoded in parallel, in order, in bounded memory.

All in one pass: this process reads the text and cuts it at safe places, workers encode batches of such pieces, and this
process appends what they return. Workers are threads with the tokenizer's compiled engine, which encodes large inputs
and takes plain text as bytes; otherwise they are processes.

The separator's id follows each document: where plain text has the separator, at a file's end, and after each row of
JSON lines or Parquet. So the ids themselves say where documents end, and nothing here is done document by document. The
result is the same for any number of workers.

The validation split takes whole documents, spread evenly over the inputs (see `sources.are_chosen`). It is the same in
each run, is close to the fraction in every stretch of the text, and always includes the first document.
"""

from __future__ import annotations

import math
import os
import shutil
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from config.special_tokens import END_OF_TEXT
from databuilder.sources import (
    PathName,
    Source,
    SourceFiles,
    SourceReport,
    SourceWriter,
    Thinner,
    are_chosen,
    find_sources,
)
from transformerlm.token_files.sidecar import OFFSETS_SUFFIX, offsets_path, sidecar_path
from transformerlm.token_files.writer import TokenFileWriter, publish
from transformerlm.tokenizer import Tokenizer
from transformerlm.tokenizer.parallel import ProgressCallback, map_in_order, resolve_num_workers
from transformerlm.tokenizer.pretokenize import SpecialTokenSplitter, safe_pieces
from transformerlm.tokenizer.reading import Chunk, comes_in_chunks
from transformerlm.utils.text_files import ReadStats, read_text
from transformerlm.utils.text_formats import format_of

BATCH_CHARS = 1 << 20

Array = np.ndarray[Any, Any]

_TRAIN, _VALID, _DROPPED = 0, 1, -1


@dataclass(frozen=True)
class SplitReport:
    """What one token file holds; `bytes` counts the documents' UTF-8 bytes, without separators."""

    path: Path
    tokens: int
    bytes: int
    documents: int
    sources: list[SourceReport]


@dataclass(frozen=True)
class BuildReport:
    """What a build wrote, and what it found in the text."""

    train: SplitReport
    valid: SplitReport | None
    seconds: float
    invalid_utf8: int
    empty_documents: int


def build_dataset(
    inputs: PathName | Sequence[PathName] | Sequence[Source],
    *,
    tokenizer: Tokenizer,
    train_path: str | os.PathLike[str],
    valid_path: str | os.PathLike[str] | None = None,
    valid_fraction: float = 0.0,
    separator: str = END_OF_TEXT,
    text_field: str = "text",
    allow_special: bool = False,
    invalid_utf8: Literal["replace", "refuse"] = "replace",
    max_tokens: int | None = None,
    overwrite: bool = False,
    num_workers: int | None = None,
    progress: ProgressCallback | None = None,
) -> BuildReport:
    """Encode text files into `train_path` and, where a fraction is given, `valid_path`, each an `.npy` with a sidecar.

    It has more than ten parameters because each key of `transformerlm-make-data` is one of them, under the same name.

    Args:
        inputs: files and globs of text, JSON lines or Parquet (see `transformerlm.utils.text_files`); or a list of
            `Source`, each with a weight.
        tokenizer: must know `separator` as a special token.
        train_path: the token file to write; ids are uint16 where all fit and uint32 otherwise, shape (tokens,).
        valid_path: the token file for the validation documents; required if `valid_fraction` is above 0, else None.
        valid_fraction: the share of the documents to hold out, from 0 to below 1.
        separator: ends a document in the text, and follows each document in the token file.
        text_field: the key of JSON lines, or the column of Parquet, that holds a document's text.
        allow_special: recognise special tokens, the separator too, in the rows of JSON lines and Parquet, which are
            plain text otherwise. In plain text files they always are.
        invalid_utf8: read invalid UTF-8 as U+FFFD and count it, or refuse the file.
        max_tokens: write whole documents, from the first on, until the next would exceed this many tokens; separators
            and the validation split count, too. The rest is not read. Not for weighted sources.
        overwrite: replace existing outputs, at the very end; otherwise they are refused before any work.
        num_workers: processes or threads that encode; by default one for each CPU, one below 8 MB.
        progress: called with ("encode", bytes read, bytes in total), in bytes on disk.

    Raises:
        TypeError: names and sources in one list.
        ValueError: arguments that do not fit together, inputs without text, or a split that would leave one side empty.
        FileExistsError: an output exists already.
        OSError: the disk has too little room or cannot be written.
    """
    start = time.perf_counter()
    _check_split(train_path, valid_path, valid_fraction)
    outputs = [Path(path) for path in (train_path, valid_path) if path is not None]
    sources = find_sources(inputs, text_field)
    _check_limit(max_tokens, sources)
    check_outputs(outputs, [path for source in sources for path in source.paths], overwrite=overwrite)
    _check_separator(tokenizer, separator)
    stats = ReadStats(refuse_invalid=invalid_utf8 == "refuse")
    limited = iter if max_tokens is None else _Limit(max_tokens, tokenizer.special_token_ids[separator])
    sorter = _DocumentSorter(tokenizer, separator, valid_fraction)
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    num_bytes = sum(source.disk_bytes for source in sources)
    max_bytes = math.inf if max_tokens is None else max_tokens * dtype.itemsize
    threads = tokenizer.runs_in_threads(num_bytes)
    workers = resolve_num_workers(num_workers, num_bytes)
    batches = _batches(sources, tokenizer, stats=stats, as_bytes=threads, allow_special=allow_special)
    with ExitStack() as stack:
        separator_id = tokenizer.special_token_ids[separator]
        writers = [stack.enter_context(TokenFileWriter(path, dtype, separator_id=separator_id)) for path in outputs]
        encoder = _BatchEncoder(tokenizer, separator)
        encoded = stack.enter_context(closing(map_in_order(encoder, batches, num_workers=workers, threads=threads)))
        held = _write_all(
            limited(encoded), sources, sorter, writers, max_bytes=max_bytes, stats=stats, progress=progress
        )
        _check_split_documents(sorter, separator, valid_fraction)
        splits = [_split_report(writer, reports) for writer, reports in zip(writers, held, strict=True)]
        shared = {**_shared_facts(tokenizer, sources, separator), "invalid_utf8": stats.invalid_utf8}
        shared |= {} if max_tokens is None else {"max_tokens": max_tokens}
        publish(writers, [{**_facts(split, with_mixture=sources[0].weighted), **shared} for split in splits])
    return BuildReport(
        train=splits[_TRAIN],
        valid=splits[_VALID] if len(splits) > 1 else None,
        seconds=time.perf_counter() - start,
        invalid_utf8=stats.invalid_utf8,
        empty_documents=sorter.num_empty,
    )


class _Batch(NamedTuple):
    texts: list[str] | Chunk
    ends_document: list[bool]
    disk_bytes: int  # read up to the end of this batch
    source: int = 0
    ordinary: bool = False  # special tokens in it are plain text


class _Encoded(NamedTuple):
    ids: Array  # the separator's after each document
    disk_bytes: int
    source: int
    invalid_utf8: int = 0  # replaced in a chunk


class _BatchEncoder:
    """The work on one batch, as an object that can be sent to a worker process or shared by threads."""

    def __init__(self, tokenizer: Tokenizer, separator: str) -> None:
        self._tokenizer = tokenizer
        self._separator_id = tokenizer.special_token_ids[separator]

    def __call__(self, batch: _Batch) -> _Encoded:
        if not isinstance(batch.texts, list):
            ids, replaced = self._tokenizer.encode_chunk(batch.texts)
            return _Encoded(ids, batch.disk_bytes, batch.source, replaced)
        ids, ends = self._tokenizer.encode_batch_to_array(batch.texts, allow_special=not batch.ordinary)
        if any(batch.ends_document):
            ids = np.insert(ids, ends[batch.ends_document], self._separator_id)
        return _Encoded(ids, batch.disk_bytes, batch.source)


class _DocumentSorter:
    """Finds the documents in a stream of ids, drops those without text, and assigns each of the others to its split.

    A document without text holds only white space. One that has only white space so far waits in `_held`.
    """

    def __init__(self, tokenizer: Tokenizer, separator: str, valid_fraction: float) -> None:
        self.num_documents = np.zeros(2, dtype=np.int64)
        self.num_bytes = np.zeros(2, dtype=np.int64)
        self.num_empty = 0
        self._tokenizer = tokenizer
        self._separator_id = tokenizer.special_token_ids[separator]
        self._valid_fraction = valid_fraction
        tokens = [tokenizer.vocab[token_id] for token_id in range(tokenizer.vocab_size)]
        tokens[self._separator_id] = b""
        self._token_bytes = np.array([len(token) for token in tokens], dtype=np.uint32)
        self._may_be_blank = np.array([not token.decode("utf-8", "ignore").strip() for token in tokens])
        self._held = np.empty(0, dtype=np.uint16)
        self._open = _DROPPED  # the split of the document that the next ids continue

    def sort(self, ids: Array) -> list[Array]:
        """Return the ids that go to each split."""
        ids = np.concatenate([self._held, ids]).astype(ids.dtype, copy=False)
        ends = np.flatnonzero(ids == self._separator_id) + 1
        starts, ends = np.r_[0, ends], np.r_[ends, len(ids)]  # (documents,); the last one has not ended yet
        splits = np.full(len(starts), _DROPPED)  # (documents,)
        has_text = ~self._are_blank(ids, starts, ends)
        if self._open != _DROPPED:
            splits[0], has_text[0] = self._open, False
        indexes = self.num_documents.sum() + np.arange(np.count_nonzero(has_text))
        splits[has_text] = are_chosen(indexes, self._valid_fraction)
        self.num_documents += np.bincount(splits[has_text], minlength=2)
        self.num_empty += int(np.count_nonzero((splits[:-1] == _DROPPED) & (ends - starts > 1)[:-1]))
        self._open = int(splits[-1])
        self._held = ids[starts[-1] :] if self._open == _DROPPED else ids[:0]
        if not splits[ends > starts].any():  # nothing but training documents
            parts = [ids, ids[:0]]
        else:
            split_of = np.repeat(splits, ends - starts)  # the split of each id: (ids,)
            parts = [ids[split_of == split] for split in (_TRAIN, _VALID)]
        self.num_bytes += [self._token_bytes.take(part).sum(dtype=np.int64) for part in parts]
        return parts

    def num_bytes_of(self, ids: Array) -> int:
        """Return how many bytes of text the ids stand for."""
        return int(self._token_bytes.take(ids).sum(dtype=np.int64))

    def _are_blank(self, ids: Array, starts: Array, ends: Array) -> Array:
        """Return which stretches of ids have no text, bool; the first two ids of nearly all with text show it."""
        if len(ids) == 0:
            return np.ones(1, dtype=np.bool_)
        firsts, seconds = (np.minimum(places, ends - 1) for places in (starts, starts + 1))  # the last may be empty
        blank: Array = self._may_be_blank[ids[firsts]] & self._may_be_blank[ids[seconds]]
        for number in np.flatnonzero(blank):
            document = ids[starts[number] : ends[number]]
            if not self._may_be_blank[document].all():
                blank[number] = False
            else:
                text = self._tokenizer.decode(document[document != self._separator_id])
                blank[number] = not text.strip()
        return blank


class _Limit:
    """Lets whole documents through until the next would exceed a number of tokens; a document waits for its end."""

    def __init__(self, max_tokens: int, separator_id: int) -> None:
        self.max_tokens = max_tokens
        self._separator_id = separator_id

    def __call__(self, encoded: Iterable[_Encoded]) -> Iterator[_Encoded]:
        """Yield the batches with the ids of documents that have ended and fit, and stop at the first that does not.

        Raises:
            ValueError: the first document does not fit.
        """
        left = self.max_tokens
        held: list[Array] = []
        num_held = 0
        for batch in encoded:
            held.append(batch.ids)
            num_held += len(batch.ids)
            ids = batch.ids[:0]
            if num_held > left or self._separator_id in batch.ids:
                waiting = np.concatenate(held)
                ends = np.flatnonzero(waiting == self._separator_id) + 1
                end = int(max(ends[ends <= left], default=0))
                if num_held > left == self.max_tokens and end == 0:
                    raise ValueError(
                        f"max_tokens: expected the first document within {left:,} tokens, found a longer one"
                    )
                ids, held = waiting[:end], [waiting[end:]]
            yield batch._replace(ids=ids)
            if num_held > left:
                return
            left, num_held = left - len(ids), num_held - len(ids)


def _batches(
    sources: Sequence[SourceFiles], tokenizer: Tokenizer, *, stats: ReadStats, as_bytes: bool, allow_special: bool
) -> Iterator[_Batch]:
    """Read the sources as batches, at least one from each, cut at safe places."""
    for number, source in enumerate(sources):
        for batch in _source_batches(source, tokenizer, stats=stats, as_bytes=as_bytes, allow_special=allow_special):
            yield batch._replace(source=number)


def _source_batches(
    source: SourceFiles, tokenizer: Tokenizer, *, stats: ReadStats, as_bytes: bool, allow_special: bool
) -> Iterator[_Batch]:
    """Read files as batches; with `as_bytes`, read large plain files as bytes."""
    splitter = SpecialTokenSplitter(tokenizer.special_tokens, pattern=tokenizer.pattern)

    def kind(path: Path) -> tuple[bool, bool]:
        return as_bytes and comes_in_chunks(path), format_of(path).holds_rows and not allow_special

    for (in_chunks, ordinary), files in groupby(source.paths, key=kind):
        if not in_chunks:
            cutter = splitter.without_tokens() if ordinary else splitter
            for number, batch in enumerate(_text_batches(files, cutter, text_field=source.text_field, stats=stats)):
                if ordinary and number == 0:
                    _warn_of_special_tokens(batch, splitter.special_tokens)
                yield batch._replace(ordinary=ordinary)
            continue
        for path in files:
            for chunk in tokenizer.read_chunks(path, stats=stats, size=BATCH_CHARS):
                yield _Batch(chunk, [], stats.disk_bytes)
            yield _Batch([""], [True], stats.disk_bytes)


def _warn_of_special_tokens(batch: _Batch, special_tokens: Sequence[str]) -> None:
    """Warn if the first rows spell special tokens: they may be meant as such, as in conversations."""
    texts = batch.texts if isinstance(batch.texts, list) else []
    for token in special_tokens:
        if any(token in text for text in texts):
            warnings.warn(
                f"rows spell {token}, which is plain text there; allow_special makes special tokens in rows tokens",
                stacklevel=2,
            )
            return


def _text_batches(
    paths: Iterable[Path], splitter: SpecialTokenSplitter, *, text_field: str, stats: ReadStats
) -> Iterator[_Batch]:
    """Read the inputs as batches of at least `BATCH_CHARS` characters."""
    texts: list[str] = []
    ends_document: list[bool] = []
    gathered = 0
    for path in paths:
        blocks = read_text(path, text_field=text_field, stats=stats)
        for piece in safe_pieces(blocks, splitter, size=BATCH_CHARS, where=str(path)):
            texts.append(piece.text)
            ends_document.append(piece.ends_document)
            gathered += len(piece.text)
            if gathered >= BATCH_CHARS:
                yield _Batch(texts, ends_document, stats.disk_bytes)
                texts, ends_document, gathered = [], [], 0
    yield _Batch(texts, ends_document, stats.disk_bytes)


def _write_all(
    encoded: Iterable[_Encoded],
    sources: Sequence[SourceFiles],
    sorter: _DocumentSorter,
    writers: Sequence[TokenFileWriter],
    *,
    max_bytes: float,
    stats: ReadStats,
    progress: ProgressCallback | None,
) -> list[tuple[SourceReport, ...]]:
    """Append all documents to their files, and return what each file holds from each source."""
    disk_bytes = sum(source.disk_bytes for source in sources)
    room = sum(source.disk_bytes * source.weight for source in sources)
    reports: list[list[SourceReport]] = []
    for number, batches in groupby(encoded, key=lambda batch: batch.source):
        documents, num_bytes = sorter.num_documents.copy(), sorter.num_bytes.copy()
        thinner = Thinner(sources[number].weight % 1, sorter._separator_id, sorter.num_bytes_of)
        writer = SourceWriter(sources[number], writers, thinner)
        for batch in batches:
            if room and batch.disk_bytes > 0:  # the first batch shows how much disk the whole will take
                expected = batch.ids.nbytes * room / batch.disk_bytes
                _check_room(writers[0].path.parent, int(min(expected, max_bytes)))
            room = 0
            writer.append(sorter.sort(batch.ids))
            stats.invalid_utf8 += batch.invalid_utf8
            if progress is not None:
                progress("encode", batch.disk_bytes, disk_bytes)
        reports.append(writer.finish(sorter.num_documents - documents, sorter.num_bytes - num_bytes))
    return list(zip(*reports, strict=True))


def _split_report(writer: TokenFileWriter, sources: Sequence[SourceReport]) -> SplitReport:
    return SplitReport(
        path=writer.path,
        tokens=writer.tokens,
        bytes=sum(source.bytes for source in sources),
        documents=sum(source.documents for source in sources),
        sources=list(sources),
    )


def _check_split_documents(sorter: _DocumentSorter, separator: str, valid_fraction: float) -> None:
    """Refuse inputs that leave one side of the split without a document."""
    if valid_fraction > 0 and 0 in sorter.num_documents:
        raise ValueError(
            f"valid_fraction: expected at least one document on each side, found {sorter.num_documents.sum()} in all "
            f"at {valid_fraction} (documents end at {separator!r})"
        )


def _check_limit(max_tokens: int | None, sources: Sequence[SourceFiles]) -> None:
    if max_tokens is None:
        return
    if max_tokens < 1:
        raise ValueError(f"max_tokens: expected at least 1, found {max_tokens}")
    if sources[0].weighted:
        raise ValueError("max_tokens: expected input, found weighted sources, of which it would take the first alone")


def _check_room(folder: Path, expected: int) -> None:
    """Refuse early if the first batch shows that the disk has too little room."""
    free = shutil.disk_usage(folder).free
    if expected > free:
        needed = f"about {expected / 1e6:,.0f} MB for the token files"
        raise OSError(f"{folder}: expected {needed}, found {free / 1e6:,.0f} MB free")


def _facts(split: SplitReport, *, with_mixture: bool) -> dict[str, Any]:
    mixture = {"mixture": [asdict(source) for source in split.sources]} if with_mixture else {}
    return {"bytes": split.bytes, "documents": split.documents, **mixture}


def _shared_facts(tokenizer: Tokenizer, sources: Sequence[SourceFiles], separator: str) -> dict[str, Any]:
    return {
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_sha256": tokenizer.fingerprint(),
        "separator": separator,
        "separator_id": tokenizer.special_token_ids[separator],
        "sources": [{"path": str(path), "bytes": path.stat().st_size} for source in sources for path in source.paths],
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
        if path is not None and Path(path).name.endswith(OFFSETS_SUFFIX):
            raise ValueError(f"expected a token file that does not end in {OFFSETS_SUFFIX}, found {path}")
    if valid_path is not None and Path(valid_path).resolve() == Path(train_path).resolve():
        raise ValueError(f"valid_path: expected another file than train_path, found {valid_path} twice")


def check_outputs(outputs: Sequence[Path], inputs: Sequence[Path], *, overwrite: bool) -> None:
    """Refuse token files that are inputs, or, without `overwrite`, that exist already.

    Raises:
        ValueError: an output among the inputs, or a folder in its place.
        FileExistsError: an output exists already.
    """
    sources = {path.resolve() for path in inputs}
    for output in outputs:
        for path in (output, sidecar_path(output), offsets_path(output)):
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
