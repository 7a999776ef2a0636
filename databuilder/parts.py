"""Token files from parts of the text, which processes here or elsewhere encode, each on its own, in any order.

First each part is encoded: its documents' ids go to a file, one after the other, and how many there are is its facts.
A document's number decides whether it is held out, or taken by a weight's fraction, so that the number of documents
before a part is all that has to be known to go on. Then the parts become token files: one `.npy`, by one process, or a
folder of shards, where each part becomes its own shards. The documents, and their order, are those of a build in one
pass.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from databuilder.encoding import TRAIN, Array, BatchEncoder, DocumentSorter, read_batches
from databuilder.sources import SourceFiles, SourceReport, SourceWriter, Thinner, are_chosen
from transformerlm.distributed.work import Facts
from transformerlm.token_files.loss_mask import MARKED_TYPE, ids_of
from transformerlm.token_files.shard_writer import finish_shard
from transformerlm.token_files.writer import BLOCK_TOKENS, TokenFileWriter
from transformerlm.tokenizer import Tokenizer
from transformerlm.tokenizer.chat import ChatFormat
from transformerlm.tokenizer.parallel import map_in_order
from transformerlm.utils.files import naming
from transformerlm.utils.interrupts import ctrl_c_held_back, result_of
from transformerlm.utils.text_files import ReadStats
from transformerlm.utils.text_parts import TextPart

_IDS, _ENDS, _ID_BYTES = "ids", "ends", "id-bytes"
_FLUSH_TOKENS = 1 << 23
_MAX_RUNS = 1000  # of documents in a block; more are faster picked id by id


def encode_part(
    folder: Path,
    *,
    pieces: Sequence[Mapping[str, Any]],
    text_field: str,
    tokenizer: Tokenizer | Mapping[str, str],
    separator: str,
    allow_special: bool,
    refuse_invalid: bool,
    chat: Mapping[str, Any] | None = None,
    engine_bytes: int,
    num_workers: int,
    progress: Callable[[int], object] | None = None,
) -> Facts:
    """Encode the documents of some text: the ids of those with text, and where each ends, as two files of numbers.

    Args:
        folder: where the files go.
        pieces: `TextPart`s as JSON.
        text_field: as in `build_dataset`, like the other names.
        tokenizer: the tokenizer, or the directory and the engine to load it with, for another process.
        separator: ends a document.
        allow_special: recognise special tokens in rows.
        refuse_invalid: refuse invalid UTF-8.
        chat: the format of conversations, as JSON; None: rows are text.
        engine_bytes: the size of the whole text, by which the engine is chosen.
        num_workers: of this part.
        progress: called with the bytes that have been read.

    Returns the numbers of documents, of ids, of the documents' bytes, of those without text, of invalid bytes, and the
    warnings.
    """
    known = tokenizer if isinstance(tokenizer, Tokenizer) else _tokenizer_of(**tokenizer)
    stats = ReadStats(refuse_invalid=refuse_invalid, conversations=chat is not None)
    threads = known.runs_in_threads(engine_bytes)
    parts = [TextPart(**piece) for piece in pieces]
    batches = read_batches(
        parts, known, text_field=text_field, stats=stats, as_bytes=threads, allow_special=allow_special
    )
    sorter = DocumentSorter(known, separator, 0.0, is_marked=chat is not None)
    encoder = BatchEncoder(known, separator, ChatFormat.of(chat) if chat else None)
    separator_id, num_ids, num_invalid = known.special_token_ids[separator], 0, 0
    with ExitStack() as stack:
        told = stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        ids_file, ends_file = (stack.enter_context((folder / name).open("wb")) for name in (_IDS, _ENDS))
        flushes: list[Future[None]] = []
        flusher = stack.enter_context(ThreadPoolExecutor(1))
        encoded = map_in_order(encoder, batches, num_workers=num_workers, threads=threads, caller_works=threads)
        for batch in stack.enter_context(closing(encoded)):
            ids = sorter.sort(batch.ids)[TRAIN]
            ends_file.write((np.flatnonzero(ids == separator_id) + (num_ids + 1)).astype(np.int64).data)
            ids_file.write(ids.data)
            if (num_ids + len(ids)) // _FLUSH_TOKENS > num_ids // _FLUSH_TOKENS:
                # So that little is left to wait for at the end.
                with ctrl_c_held_back():
                    flushes.append(flusher.submit(os.fsync, ids_file.fileno()))
            num_ids += len(ids)
            num_invalid += batch.invalid_utf8
            if progress is not None:
                progress(batch.disk_bytes)
        for flush in flushes:
            result_of(flush)  # an error of the disk is told once, to the flush that met it
    return {
        "documents": int(sorter.num_documents.sum()),
        "ids": num_ids,
        "bytes": int(sorter.num_bytes.sum()),
        "empty_documents": sorter.num_empty,
        "invalid_utf8": num_invalid,
        "warnings": [str(warning.message) for warning in told],
    }


@lru_cache(maxsize=1)
def _tokenizer_of(directory: str, engine: str, sha256: str) -> Tokenizer:
    found = Tokenizer.from_directory(directory, engine=engine)  # type: ignore[arg-type]
    if found.fingerprint() != sha256:
        raise ValueError(f"{directory}: expected the tokenizer {sha256}, found {found.fingerprint()}")
    return found


@dataclass(frozen=True)
class EncodedPart:
    """A part that was encoded, and the number of its first document among all, and among its source's for training."""

    folder: Path
    facts: Facts
    first: int
    first_train: int
    valid_fraction: float

    @property
    def num_train(self) -> int:
        """The number of its documents for training."""
        return int(self.facts["documents"]) - int(np.count_nonzero(self.are_valid()))

    def are_valid(self) -> Array:
        """Return which documents are held out, bool `(documents,)`."""
        return are_chosen(self.first + np.arange(self.facts["documents"]), self.valid_fraction)

    def are_more(self, fraction: float) -> Array:
        """Return which documents a weight's fraction takes, bool `(documents,)`."""
        train = ~self.are_valid()
        numbers = self.first_train + np.cumsum(train) - train  # of each among the source's for training
        chosen: Array = train & are_chosen(numbers, fraction)
        return chosen

    def blocks(self, chosen: Array, dtype: np.dtype[Any]) -> Iterator[Array]:
        """Yield the ids of the chosen documents, with their separators, in blocks."""
        if not self.facts["ids"]:
            return
        ids: Array = np.memmap(self.folder / _IDS, dtype, mode="r")
        ends: Array = np.memmap(self.folder / _ENDS, np.int64, mode="r")
        assert (len(ids), len(ends)) == (self.facts["ids"], len(chosen)), self.folder
        first = start = 0
        while first < len(ends):
            last = max(first + 1, int(np.searchsorted(ends, start + BLOCK_TOKENS, side="right")))
            end, wanted = int(ends[last - 1]), chosen[first:last]
            if wanted.any():
                yield _taken(ids[start:end], ends[first:last] - start, wanted)
            first, start = last, end


def _taken(ids: Array, ends: Array, wanted: Array) -> Array:
    """Return the ids of the documents that are wanted, some or all of those that end at `ends`, `(documents,)`."""
    edges = [0, *(np.flatnonzero(wanted[1:] != wanted[:-1]) + 1).tolist(), len(wanted)]  # of runs, wanted or not
    if len(edges) > _MAX_RUNS:
        taken: Array = ids[np.repeat(wanted, np.diff(ends, prepend=0))]
        return taken
    places = [0, *ends[np.array(edges[1:]) - 1].tolist()]
    runs: list[Array] = [ids[places[run] : places[run + 1]] for run, first in enumerate(edges[:-1]) if wanted[first]]
    return runs[0] if len(runs) == 1 else np.concatenate(runs)


def numbered_parts(
    folders: Sequence[Sequence[Path]], facts: Mapping[str, Facts], valid_fraction: float
) -> list[list[EncodedPart]]:
    """Return each source's parts with the numbers of their documents, from the parts' folders in order."""
    first = 0
    numbered: list[list[EncodedPart]] = []
    for of_source in folders:
        numbered.append([])
        first_train = 0
        for folder in of_source:
            part = EncodedPart(folder, facts[folder.name], first, first_train, valid_fraction)
            numbered[-1].append(part)
            first += part.facts["documents"]
            first_train += part.num_train
    return numbered


def append_source(
    source: SourceFiles,
    parts: Sequence[EncodedPart],
    writers: Sequence[TokenFileWriter],
    *,
    separator_id: int,
    id_bytes: Array,
) -> list[SourceReport]:
    """Write a source's documents to the token files as `SourceWriter` does, and return what each holds of it.

    `id_bytes` `(vocab_size,)` are the bytes that each id stands for, 0 for the separator.
    """

    def num_bytes_of(ids: Array) -> int:
        return int(id_bytes.take(ids_of(ids)).sum(dtype=np.int64))

    thinner = Thinner(source.weight % 1, separator_id, num_bytes_of)
    writer = SourceWriter(source, writers, thinner)
    documents, num_bytes = np.zeros(2, dtype=np.int64), np.zeros(2, dtype=np.int64)
    for part in parts:
        valid = part.are_valid()
        dtype = writers[TRAIN].dtype
        for ids in part.blocks(~valid, dtype):
            writer.append([ids, ids[:0]])
        held = 0
        for ids in part.blocks(valid, dtype):
            held += num_bytes_of(ids)
            writer.append([ids[:0], ids])
        num_valid = int(np.count_nonzero(valid))
        documents += [len(valid) - num_valid, num_valid]
        num_bytes += [part.facts["bytes"] - held, held]
    return writer.finish(documents, num_bytes)


def write_id_bytes(folder: Path, *, id_bytes: Array) -> Facts:
    """Write the bytes that each id stands for, uint32 `(vocab_size,)`, for `write_part_shards` to read."""
    path = folder / _ID_BYTES
    with naming(path), path.open("wb") as file:  # numpy itself would not say why a write fails, nor where
        file.write(id_bytes.data)
    return {}


def write_part_shards(
    folder: Path,
    *,
    encoded: Mapping[str, Any],
    name: str,
    weight: float,
    dtype: str,
    writing: Mapping[str, Any],
    id_bytes: str,
) -> Facts:
    """Write an encoded part's shards: `train/`, `valid/`, and `more/` of what a weight's fraction takes once more.

    Args:
        folder: where they go.
        encoded: an `EncodedPart` as a dictionary, with strings for paths.
        name: of the shards; `-more` is added to that of the fraction.
        weight: the source's; below 1, the fraction is all that it takes.
        dtype: of the ids.
        writing: the keywords of `TokenFileWriter`.
        id_bytes: the folder that `write_id_bytes` has filled.

    Returns the entry of each shard that has documents, under "train", "valid" and "more".
    """
    part = EncodedPart(**{**encoded, "folder": Path(encoded["folder"])})
    sizes = np.fromfile(Path(id_bytes) / _ID_BYTES, dtype=np.uint32)
    valid = part.are_valid()
    wanted = {"valid": valid}
    if weight >= 1:
        wanted["train"] = ~valid
    if weight % 1:
        wanted["more"] = part.are_more(weight % 1)
    return {
        kind: write_shard(
            folder / kind / f"{name}{'-more' if kind == 'more' else ''}.npy",
            part.blocks(chosen, MARKED_TYPE if writing["has_mask"] else np.dtype(dtype)),
            dtype=np.dtype(dtype),
            writing=writing,
            id_bytes=sizes,
        )
        for kind, chosen in wanted.items()
        if chosen.any()
    }


def write_shard(
    path: Path, blocks: Iterable[Array], *, dtype: np.dtype[Any], writing: Mapping[str, Any], id_bytes: Array
) -> Facts:
    """Write ids as one shard, and return its entry in an index as JSON."""
    num_bytes = 0
    with TokenFileWriter(path, dtype, **writing) as writer:
        for ids in blocks:
            writer.append(ids)
            num_bytes += int(id_bytes.take(ids_of(ids)).sum(dtype=np.int64))
        return asdict(finish_shard(writer, num_bytes=num_bytes))
