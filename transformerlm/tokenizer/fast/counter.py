"""The compiled engine's counting: chunks of text, whose pre-tokens threads count, exactly.

Each thread counts into a table of its own, so that none waits for another. A table that has grown to its share of the
memory is added to one table of all threads, and emptied. Counts are 64-bit.

Twin of `count_pre_tokens`: `transformerlm.tokenizer.counting.count_pre_tokens`
Twin of `sum_counts`: `transformerlm.tokenizer.counting.sum_counts`
Test: tests/tokenizer/fast/test_counter.py
Pays: 29x the MB/s of the reference in training on 10 MB with 10,000 ids, together with `learner` (docs/benchmarks.md)
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, LifoQueue

import numpy as np

from transformerlm.tokenizer import reading
from transformerlm.tokenizer.counting import WordList
from transformerlm.tokenizer.engines import compiling
from transformerlm.tokenizer.fast import table_kernels as kernels
from transformerlm.tokenizer.fast.arrays import PADDING, Array, hash_shift
from transformerlm.tokenizer.fast.byte_chunks import chunk_of, made_valid, read_chunks
from transformerlm.tokenizer.fast.encoder import PATTERNS, SpecialTokens, bounds_of
from transformerlm.tokenizer.fast.unicode_tables import unicode_table
from transformerlm.tokenizer.memory_limit import Memory
from transformerlm.tokenizer.parallel import ProgressCallback, map_in_order, resolve_num_workers
from transformerlm.tokenizer.pretokenize import DEFAULT_PATTERN, SpecialTokenSplitter
from transformerlm.tokenizer.reading import Chunk, DocumentSample, as_parts, comes_in_chunks, read_batches
from transformerlm.utils.text_files import ReadStats
from transformerlm.utils.text_parts import TextPart

TABLE_BYTES = 1 << 26  # a thread's share where no limit is given

_FIRST_SLOTS = 1 << 12
_OF_THE_WHOLE = 1.25  # beside the table of all: an eighth of the limit for the threads', and their words


@dataclass(frozen=True)
class Words:
    """Distinct pre-tokens: their bytes one after the other, where each ends, and how often it occurs.

    `data` is uint8 `(bytes + PADDING,)`, `ends` int64 `(words,)`, `counts` uint64 `(words,)`. `memory` is where the
    arrays go that are made of them.
    """

    data: Array
    ends: Array
    counts: Array
    memory: Memory = field(default_factory=Memory)

    def __len__(self) -> int:
        """Return the number of words."""
        return len(self.ends)


def count_pre_tokens(
    texts: Sequence[Path | TextPart],
    special_tokens: Sequence[str],
    *,
    num_workers: int | None = None,
    text_field: str = "text",
    allow_special: bool = False,
    pattern: str = DEFAULT_PATTERN,
    progress: ProgressCallback | None = None,
    stats: ReadStats | None = None,
    memory_limit_mb: float | None = None,
    sample: DocumentSample | None = None,
) -> Words:
    """Return how often each pre-token occurs in the text of files, or of parts of them, special tokens omitted.

    Large files of plain text are read as the bytes they are; the text of all other files, and of a sample, is gathered
    into chunks.
    """
    splitter = SpecialTokenSplitter(special_tokens, pattern=pattern)
    stats = stats if stats is not None else ReadStats()
    parts = as_parts(texts)
    num_bytes = sum(part.num_bytes for part in parts)
    counter = PieceCounter(
        special_tokens, pattern=pattern, num_threads=resolve_num_workers(num_workers, num_bytes),
        memory=Memory(memory_limit_mb),
    )  # fmt: skip

    def chunks() -> Iterator[Chunk]:
        others = []
        for part in parts:
            path = Path(part.path)
            if sample is None and comes_in_chunks(path, splitter):
                end = None if part.kind == "file" else part.end
                yield from read_chunks(path, splitter, stats=stats, start=part.start, end=end)
            else:
                others.append(part)
        for batch in read_batches(
            others, splitter, size=reading.CHUNK_BYTES, text_field=text_field, allow_special=allow_special, stats=stats,
            sample=sample,
        ):  # fmt: skip
            yield chunk_of(batch.texts, ordinary=batch.ordinary)

    for replaced in counter.count(chunks()):
        stats.invalid_utf8 += replaced
        if progress is not None:
            progress("count", stats.disk_bytes, num_bytes)
    return counter.words()


def sum_counts(groups: Iterable[Iterable[WordList]], *, memory_limit_mb: float | None = None) -> Words:
    """Add up counts; a word may be in several lists of one group, but not in two groups.

    Memory: the table of one group at a time, and the distinct words of all.
    """
    memory, lists = Memory(memory_limit_mb), []
    with compiling("train"):
        for group in groups:
            table = PieceCounts(memory)
            for words in group:
                data = np.zeros(len(words.data) + PADDING, dtype=np.uint8)
                data[: len(words.data)] = words.data
                add_words(table, Words(data, words.ends, words.counts))
            lists.append(list_words(table))
    return _joined(lists, memory)


def _joined(lists: list[Words], memory: Memory) -> Words:
    """Return lists of words as one, which takes their place."""
    num_bytes = sum(int(words.ends[-1]) for words in lists if len(words)) + PADDING
    number = sum(map(len, lists))
    in_all = 2 * (num_bytes + 16 * number)
    data = memory.zeros(num_bytes, np.uint8, in_all=in_all)
    ends = memory.zeros(number, np.int64, in_all=in_all)
    counts = memory.zeros(number, np.uint64, in_all=in_all)
    place = first = 0
    while lists:
        words = lists.pop()
        last = first + len(words)
        size = int(words.ends[-1]) if len(words) else 0
        data[place : place + size] = words.data[:size]
        ends[first:last] = words.ends + place
        counts[first:last] = words.counts
        place, first = place + size, last
    return Words(data, ends, counts, memory)


class PieceCounter:
    """Counts the pre-tokens of chunks of text; `words` returns what it has counted."""

    def __init__(
        self,
        special_tokens: Sequence[str],
        *,
        pattern: str,
        num_threads: int = 1,
        memory: Memory | None = None,
    ) -> None:
        """Prepare; of a limit the threads' tables get an eighth, since the words that they hold may be in all of them.

        Args:
            special_tokens: cut the text and are not counted.
            pattern: a name in `PATTERNS`.
            num_threads: how many count at a time.
            memory: where the distinct words go; by default without a limit.
        """
        self._specials = SpecialTokens(dict.fromkeys(special_tokens, 0))
        self._no_specials = SpecialTokens({})
        self._pattern = PATTERNS[pattern]
        self._num_threads = num_threads
        self._memory = Memory() if memory is None else memory
        self._share = min(TABLE_BYTES, self._memory.limit_bytes / (8 * num_threads))
        self._tables: LifoQueue[PieceCounts] = LifoQueue()
        self._total = PieceCounts(self._memory)
        self._lock = threading.Lock()
        with compiling("train"):
            self._count(chunk_of(["a"]))
            self._add_to_total(self._tables.get_nowait())
        self._total = PieceCounts(self._memory)

    def count(self, chunks: Iterable[Chunk]) -> Iterator[int]:
        """Count chunk by chunk, as many at a time as there are threads; yield how many U+FFFD each one needed.

        Raises:
            ValueError: the distinct words need more memory than the limit.
        """
        several = self._num_threads > 1
        with closing(
            map_in_order(self._count, chunks, num_workers=self._num_threads, threads=several, caller_works=True)
        ) as results:
            yield from results

    def add_up(self) -> int:
        """Add up what the threads have counted; return the number of distinct pre-tokens."""
        while not self._tables.empty():
            table = self._tables.get_nowait()
            if self._total.num_pieces == 0:
                self._total, table.memory = table, self._memory
            else:
                self._add_to_total(table)
        return self._total.num_pieces

    def words(self) -> Words:
        """Return what was counted, and forget it."""
        self.add_up()
        words, self._total = list_words(self._total), PieceCounts(self._memory)
        return words

    def _count(self, chunk: Chunk) -> int:
        chunk, replaced = made_valid(chunk)
        data, ends = chunk.data, chunk.ends
        specials = self._no_specials if chunk.ordinary else self._specials
        segments, _ = specials.segments(data, bounds_of(ends))
        cursor = np.zeros(4, dtype=np.int64)
        with self._table() as table:
            while need := kernels.count_pieces(data, segments, cursor, self._pattern, unicode_table(), table.pieces):
                length = int(cursor[kernels.NEEDED])
                if table.num_pieces > 0 and table.bytes_to_grow(need, length) > self._share:
                    self._add_to_total(table)
                    table.clear()
                else:
                    table.make_room(need, length)
        return replaced

    def _add_to_total(self, table: PieceCounts) -> None:
        words = list_words(table)
        with self._lock:
            add_words(self._total, words)

    @contextmanager
    def _table(self) -> Iterator[PieceCounts]:
        """Lend a table that no other thread has."""
        try:
            table = self._tables.get_nowait()
        except Empty:
            table = PieceCounts()
        yield table
        self._tables.put(table)


class PieceCounts:
    """A table of pieces and their counts that grows as its kernels ask; see `table_kernels.Pieces`."""

    def __init__(self, memory: Memory | None = None) -> None:
        self.memory = Memory() if memory is None else memory
        self.pieces = kernels.Pieces(
            slots=self.memory.zeros(_FIRST_SLOTS * kernels.SLOT_WORDS, np.uint64, in_all=0),
            shift=hash_shift(_FIRST_SLOTS),
            used=np.zeros(3, dtype=np.int64),
            long_bytes=np.zeros(1 << 12, dtype=np.uint8),
            ids=np.zeros(0, dtype=np.uint32),  # a slot's value is a count here
        )

    @property
    def num_pieces(self) -> int:
        """How many pieces are in the table."""
        return int(self.pieces.used[kernels.USED_SLOTS])

    @property
    def num_bytes(self) -> int:
        """How many bytes all its pieces have."""
        return int(self.pieces.slots[3 :: kernels.SLOT_WORDS].sum())

    @property
    def nbytes(self) -> int:
        """How many bytes the table takes."""
        return self.pieces.slots.nbytes + len(self.pieces.long_bytes)

    def bytes_to_grow(self, need: int, length: int) -> int:
        """Return how many bytes the table takes while room is made for a piece of `length` bytes."""
        slots, long_bytes = self.pieces.slots, self.pieces.long_bytes
        return self.nbytes + (2 * slots.nbytes if need == kernels.NEED_SLOTS else 2 * len(long_bytes) + length)

    def make_room(self, need: int, length: int) -> None:
        """Give a kernel what it lacks for a piece of `length` bytes."""
        in_all = _OF_THE_WHOLE * self.bytes_to_grow(need, length)
        slots, short = self.pieces.slots, self.pieces.long_bytes
        if need == kernels.NEED_SLOTS:
            larger = self.memory.zeros(2 * len(slots), np.uint64, in_all=in_all)
            self.pieces = kernels.with_more_slots(self.pieces, larger)
        else:
            long_bytes = self.memory.zeros(2 * len(short) + length + 8, np.uint8, in_all=in_all)
            long_bytes[: len(short)] = short
            self.pieces = self.pieces._replace(long_bytes=long_bytes)

    def clear(self) -> None:
        """Forget all pieces."""
        self.pieces.slots[:] = 0
        self.pieces.used[:] = 0


def list_words(table: PieceCounts) -> Words:
    """Return the pieces of a table and their counts."""
    number, num_bytes = table.num_pieces, table.num_bytes + PADDING
    in_all = table.nbytes + num_bytes + 16 * number
    data = table.memory.zeros(num_bytes, np.uint8, in_all=in_all)
    ends = table.memory.zeros(number, np.int64, in_all=in_all)
    counts = table.memory.zeros(number, np.uint64, in_all=in_all)
    kernels.list_pieces(table.pieces, data, ends, counts)
    return Words(data, ends, counts, table.memory)


def add_words(table: PieceCounts, words: Words) -> None:
    """Add words and their counts to a table."""
    cursor = np.zeros(4, dtype=np.int64)
    while need := kernels.add_counts(words.data, words.ends, words.counts, cursor, table.pieces):
        table.make_room(need, int(cursor[kernels.NEEDED]))
