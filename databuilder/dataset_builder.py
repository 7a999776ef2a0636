"""From text files to token files: documents encoded in parallel, in order, in bounded memory.

Large texts go by parts (see `parts_build`), with the same result, others in one pass. This process reads the text and
cuts it at safe places, workers encode batches of such pieces, and this process appends what they return. Workers are
threads with the tokenizer's compiled engine, which encodes large inputs and takes plain text as bytes; otherwise they
are processes.

The separator's id follows each document: where plain text has the separator, at a file's end, and after each row of
JSON lines or Parquet. So the ids themselves say where documents end, and nothing here is done document by document. The
result is the same for any number of workers.

The validation split takes whole documents, spread evenly over the inputs (see `sources.are_chosen`). It is the same in
each run, is close to the fraction in every stretch of the text, and always includes the first document.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from itertools import groupby
from pathlib import Path
from typing import Literal

from config.schemas import ClusterConfig
from config.special_tokens import END_OF_TEXT
from databuilder.build import Build
from databuilder.checks import (
    check_conversations,
    check_limit,
    check_room,
    check_separator,
    check_split,
)
from databuilder.encoding import TRAIN, VALID, Batch, BatchEncoder, DocumentSorter, Encoded, Limit, read_batches
from databuilder.parts_build import PartsBuild
from databuilder.reports import BuildReport, SplitReport, split_report
from databuilder.sources import PathName, Source, SourceFiles, SourceReport, SourceWriter, Thinner, find_sources
from transformerlm.token_files.writer import TokenFileWriter, publish
from transformerlm.tokenizer import Tokenizer
from transformerlm.tokenizer.chat import ChatFormat
from transformerlm.tokenizer.parallel import ProgressCallback, map_in_order, resolve_num_workers
from transformerlm.utils.text_files import ReadStats
from transformerlm.utils.text_parts import whole_file

__all__ = ["BuildReport", "SplitReport", "build_dataset"]


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
    cluster: ClusterConfig | None = None,
    chat: ChatFormat | None = None,
    progress: ProgressCallback | None = None,
) -> BuildReport | None:
    """Encode text files into `train_path` and, where a fraction is given, `valid_path`, each an `.npy` with a sidecar.

    A path that ends in `.shards` becomes a folder of token files with an index. Small texts are encoded in one pass;
    larger ones, and all that go into shards or are for a cluster, by parts, so that the same call goes on after a kill.

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
        num_workers: processes or threads that encode; by default one for each CPU, one below 8 MB. On Ray, of one part.
        cluster: who does the parts; by default this process.
        chat: read rows of JSON lines as conversations, whose messages are under `text_field`, and render them by this
            format; a mask beside the token file says which ids are learnt.
        progress: called with ("encode", bytes read, bytes in total), in bytes on disk.

    Returns None with `cluster.on = "share"` alone: if other shares are still at work, or have written the outputs.

    Raises:
        TypeError: names and sources in one list.
        ValueError: arguments that do not fit together, inputs without text, a split that would leave one side empty, or
            parts of other inputs or settings in the outputs' place.
        FileExistsError: an output exists already.
        OSError: the disk has too little room or cannot be written.
    """
    check_split(train_path, valid_path, valid_fraction)
    check_separator(tokenizer, separator)
    build = Build(
        sources=find_sources(inputs, text_field),
        outputs=[Path(path) for path in (train_path, valid_path) if path is not None],
        tokenizer=tokenizer,
        valid_fraction=valid_fraction,
        separator=separator,
        allow_special=allow_special,
        refuse_invalid=invalid_utf8 == "refuse",
        overwrite=overwrite,
        num_workers=num_workers,
        cluster=cluster or ClusterConfig(),
        progress=progress,
        chat=chat,
    )
    if chat is not None:
        chat.check(tokenizer, separator=separator)
    check_limit(max_tokens, build.sources)
    by_parts = PartsBuild(build)
    by_parts.check(max_tokens)
    by_parts.finish_removal()
    if build.cluster.on == "share" and build.is_made() and not by_parts.is_publishing:
        return None
    if chat is not None:
        check_conversations(build.paths)
        chat.warn_of_unlisted(tokenizer)
    by_parts.check_outputs()
    if max_tokens is None and by_parts.is_needed:
        return by_parts.run()
    return _build_in_one_pass(build, max_tokens)


def _build_in_one_pass(build: Build, max_tokens: int | None) -> BuildReport:
    start = time.perf_counter()
    sources, tokenizer, separator = build.sources, build.tokenizer, build.separator
    stats = ReadStats(refuse_invalid=build.refuse_invalid, conversations=build.chat is not None)
    limited = iter if max_tokens is None else Limit(max_tokens, build.separator_id)
    sorter = DocumentSorter(tokenizer, separator, build.valid_fraction, is_marked=build.chat is not None)
    max_bytes = math.inf if max_tokens is None else max_tokens * build.stream_dtype.itemsize
    threads = tokenizer.runs_in_threads(build.num_bytes)
    workers = resolve_num_workers(build.num_workers, build.num_bytes)
    batches = _batches(sources, tokenizer, stats=stats, as_bytes=threads, allow_special=build.allow_special)
    with ExitStack() as stack:
        writers = [stack.enter_context(TokenFileWriter(path, build.dtype, **build.writing)) for path in build.outputs]
        encoder = BatchEncoder(tokenizer, separator, build.chat)
        encoded = stack.enter_context(
            closing(map_in_order(encoder, batches, num_workers=workers, threads=threads, caller_works=threads))
        )
        held, num_invalid = _write_all(
            limited(encoded), sources, sorter, writers, max_bytes=max_bytes, progress=build.progress
        )
        build.check_split(sorter.num_documents.tolist())
        splits = [split_report(writer.path, reports) for writer, reports in zip(writers, held, strict=True)]
        shared = {**build.shared_facts(), "invalid_utf8": num_invalid}
        shared |= {} if max_tokens is None else {"max_tokens": max_tokens}
        build.check_outputs()  # nothing may have come there meanwhile
        publish(writers, [{**build.own_facts(split), **shared} for split in splits])
    return BuildReport(
        train=splits[TRAIN],
        valid=splits[VALID] if len(splits) > 1 else None,
        seconds=time.perf_counter() - start,
        invalid_utf8=num_invalid,
        empty_documents=sorter.num_empty,
        num_files=build.num_files,
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
    progress: ProgressCallback | None,
) -> tuple[list[tuple[SourceReport, ...]], int]:
    """Append all documents to their files.

    Returns what each file holds from each source, and how many U+FFFD were read in place of invalid bytes.
    """
    disk_bytes = sum(source.disk_bytes for source in sources)
    first = next((source.paths[0] for source in sources if source.disk_bytes), None)
    room = sum(source.disk_bytes_like(first) * source.weight for source in sources) if first else 0
    reports: list[list[SourceReport]] = []
    num_invalid = 0
    for number, batches in groupby(encoded, key=lambda batch: batch.source):
        documents, num_bytes = sorter.num_documents.copy(), sorter.num_bytes.copy()
        thinner = Thinner(sources[number].weight % 1, sorter._separator_id, sorter.num_bytes_of)
        writer = SourceWriter(sources[number], writers, thinner)
        for batch in batches:
            if room and batch.disk_bytes > 0:  # the first batch shows how much disk the whole will take
                expected = batch.ids.nbytes * room / batch.disk_bytes
                check_room(writers[0].path.parent, int(min(expected, max_bytes)))
            room = 0
            writer.append(sorter.sort(batch.ids))
            num_invalid += batch.invalid_utf8
            if progress is not None:
                progress("encode", batch.disk_bytes, disk_bytes)
        reports.append(writer.finish(sorter.num_documents - documents, sorter.num_bytes - num_bytes))
    return list(zip(*reports, strict=True)), num_invalid
