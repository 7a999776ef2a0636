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
from transformerlm.token_files.sidecar import sidecar_path
from transformerlm.token_files.writer import TokenFileWriter, publish
from transformerlm.tokenizer import Tokenizer
from transformerlm.tokenizer.parallel import ProgressCallback, map_in_order, resolve_num_workers
from transformerlm.tokenizer.pretokenize import SpecialTokenSplitter, safe_pieces
from transformerlm.tokenizer.reading import Chunk, comes_in_chunks
from transformerlm.utils.text_files import ReadStats, read_text
from transformerlm.utils.text_formats import format_of

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
    limited = iter if max_tokens is None else Limit(max_tokens, tokenizer.special_token_ids[separator])
    sorter = DocumentSorter(tokenizer, separator, valid_fraction)
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    num_bytes = sum(source.disk_bytes for source in sources)
    max_bytes = math.inf if max_tokens is None else max_tokens * dtype.itemsize
    threads = tokenizer.runs_in_threads(num_bytes)
    workers = resolve_num_workers(num_workers, num_bytes)
    batches = _batches(sources, tokenizer, stats=stats, as_bytes=threads, allow_special=allow_special)
    with ExitStack() as stack:
        writers = [stack.enter_context(TokenFileWriter(path, dtype)) for path in outputs]
        encoder = BatchEncoder(tokenizer, separator)
        encoded = stack.enter_context(closing(map_in_order(encoder, batches, num_workers=workers, threads=threads)))
        held = _write_all(
            limited(encoded), sources, sorter, writers, max_bytes=max_bytes, stats=stats, progress=progress
        )
        _check_split_documents(sorter, separator, valid_fraction)
        splits = [split_report(writer, reports) for writer, reports in zip(writers, held, strict=True)]
        shared = {**shared_facts(tokenizer, sources, separator), "invalid_utf8": stats.invalid_utf8}
        shared |= {} if max_tokens is None else {"max_tokens": max_tokens}
        publish(writers, [{**split_facts(split, with_mixture=sources[0].weighted), **shared} for split in splits])
    return BuildReport(
        train=splits[TRAIN],
        valid=splits[_VALID] if len(splits) > 1 else None,
        seconds=time.perf_counter() - start,
        invalid_utf8=stats.invalid_utf8,
        empty_documents=sorter.num_empty,
    )


def _batches(
    sources: Sequence[SourceFiles], tokenizer: Tokenizer, *, stats: ReadStats, as_bytes: bool, allow_special: bool
) -> Iterator[Batch]:
    """Read the sources as batches, at least one from each, cut at safe places."""
    for number, source in enumerate(sources):
        parts = [whole_file(path) for path in source.paths]
        for batch in read_batches(
            parts,
            tokenizer,
            text_field=source.text_field,
            stats=stats,
            as_bytes=as_bytes,
            allow_special=allow_special,
        ):
            yield batch._replace(source=number)


def _write_all(
    encoded: Iterable[Encoded],
    sources: Sequence[SourceFiles],
    sorter: DocumentSorter,
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


def _check_split_documents(sorter: DocumentSorter, separator: str, valid_fraction: float) -> None:
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


def check_outputs(outputs: Sequence[Path], inputs: Sequence[Path], *, overwrite: bool) -> None:
    """Refuse token files that are inputs, or, without `overwrite`, that exist already.

    Raises:
        ValueError: an output among the inputs, or a folder in its place.
        FileExistsError: an output exists already.
    """
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
