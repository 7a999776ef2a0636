"""The compiled engine's training: pre-tokens counted by threads, merges learned by kernels, both exactly.

Counts are 64-bit. Each thread counts into a table of its own; at the end they are added up.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from queue import Empty, LifoQueue
from typing import Any, NamedTuple

import numpy as np

from transformerlm.tokenizer import _kernels as kernels
from transformerlm.tokenizer import _train_kernels as train_kernels
from transformerlm.tokenizer._jit import PADDING
from transformerlm.tokenizer.compiled import PATTERNS, PieceTable, SpecialTokens, hash_shift, padded
from transformerlm.tokenizer.engines import compiling
from transformerlm.tokenizer.parallel import ProgressCallback, map_in_order
from transformerlm.tokenizer.unicode_tables import unicode_table

Array = np.ndarray[Any, Any]

_FIRST_PAIRS = 1 << 18  # never less than the 2^16 pairs of bytes
_MERGES_AT_ONCE = 256
_HASH_START = 0x4F29CE4842


class Words(NamedTuple):
    """Distinct pre-tokens: their bytes one after the other, where each ends, and how often it occurs."""

    data: Array
    ends: Array
    counts: Array


class PieceCounter:
    """Counts the pre-tokens of batches of texts; `words` says what came together."""

    def __init__(self, special_tokens: Sequence[str], *, pattern: str) -> None:
        self._specials = SpecialTokens(dict.fromkeys(special_tokens, 0))
        self._pattern = PATTERNS[pattern]
        self._tables: LifoQueue[PieceTable] = LifoQueue()
        with compiling("train"):
            self._count(["a"])
            self._tables.get_nowait()

    def count(self, batches: Iterable[Sequence[str]], *, num_threads: int) -> Iterator[None]:
        """Count batch by batch, as many at a time as there are threads; yield after each."""
        with closing(map_in_order(self._count, batches, num_workers=num_threads, threads=num_threads > 1)) as results:
            yield from results

    def words(self) -> Words:
        """Add up what the threads have counted, and list it."""
        total = self._tables.get_nowait() if not self._tables.empty() else PieceTable()
        while not self._tables.empty():
            words = list_words(self._tables.get_nowait())
            add_words(total, words)
        return list_words(total)

    def _count(self, texts: Sequence[str]) -> None:
        encoded = [text.encode("utf-8", "replace") for text in texts]
        data = padded(b"".join(encoded))
        ends = np.cumsum(np.array([len(text) for text in encoded], dtype=np.int64))
        segments, _ = self._specials.segments(data, np.stack([np.r_[0, ends[:-1]], ends], axis=1))
        cursor = np.zeros(4, dtype=np.int64)
        with self._table() as table:
            while need := kernels.count_pieces(
                data, segments, cursor, self._pattern, unicode_table(), table.slots, table.shift, table.used,
                table.long_bytes,
            ):  # fmt: skip
                table.make_room(need, int(cursor[kernels.NEEDED]))

    @contextmanager
    def _table(self) -> Iterator[PieceTable]:
        try:
            table = self._tables.get_nowait()
        except Empty:
            table = PieceTable()
        yield table
        self._tables.put(table)


def list_words(table: PieceTable) -> Words:
    """Return the pieces of a table and their counts."""
    number = int(table.used[kernels.USED_SLOTS])
    num_bytes = int(table.slots[3 :: kernels.SLOT_WORDS].sum())
    data = np.zeros(num_bytes + PADDING, dtype=np.uint8)
    ends, counts = np.empty(number, dtype=np.int64), np.empty(number, dtype=np.uint64)
    kernels.list_pieces(table.slots, table.long_bytes, data, ends, counts)
    return Words(data, ends, counts)


def add_words(table: PieceTable, words: Words) -> None:
    """Add words and their counts to a table."""
    cursor = np.zeros(4, dtype=np.int64)
    while need := kernels.add_counts(
        words.data, words.ends, words.counts, cursor, table.slots, table.shift, table.used, table.long_bytes
    ):
        table.make_room(need, int(cursor[kernels.NEEDED]))


def learn_merges(
    words: Words, num_merges: int, *, progress: ProgressCallback | None = None
) -> list[tuple[bytes, bytes]]:
    """Return the first `num_merges` merges for these words, fewer when no pair is left."""
    with compiling("train"):
        learner = _Learner(words, num_merges)
        learner.learn(0)
    done = 0
    while done < num_merges and learner.learn(min(num_merges, done + _MERGES_AT_ONCE)):
        done = learner.num_merges
        if progress is not None and done < num_merges:
            progress("merge", done, num_merges)
    if progress is not None:
        progress("merge", learner.num_merges, num_merges)
    return learner.merges()


class _Learner:
    """The arrays of `_train_kernels.learn`, and room for more pairs when it asks."""

    spelled: Array

    def __init__(self, words: Words, num_merges: int) -> None:
        num_slots = int(words.ends[-1]) + len(words.ends) + 1 if len(words.ends) else 1
        if num_slots >= 1 << 31:
            raise MemoryError(f"expected distinct words of less than 2 GB in all, found {num_slots / 1e9:.1f} GB")
        self.facts = np.zeros(6, dtype=np.int64)
        self.slots = np.empty(num_slots, dtype=np.int32)
        self.weights = np.empty(num_slots, dtype=np.int64)
        self.places = np.empty(3 * num_slots, dtype=np.int32)
        train_kernels.lay_out(words.data, words.ends, words.counts.view(np.int64), self.slots, self.weights)
        self._make_tokens(256 + num_merges)
        self.pairs = np.empty((_FIRST_PAIRS, train_kernels.PAIR_COLUMNS), dtype=np.int64)
        self._make_index()
        pair_of = np.full(1 << 16, train_kernels.NONE, dtype=np.int64)
        train_kernels.find_byte_pairs(
            self.slots, self.weights, self.places, self.pairs, self.index, self.shift, self.facts, pair_of
        )
        self.facts[train_kernels.LEVEL] = train_kernels.LISTED_COUNTS
        self.heads = np.full(train_kernels.LISTED_COUNTS, train_kernels.NONE, dtype=np.int64)
        for pair in range(int(self.facts[train_kernels.NUM_PAIRS])):
            train_kernels.wait(
                pair, self.counts, self.heap, self.heads, self.pairs, self.tokens, self.spelled, self.facts
            )

    @property
    def num_merges(self) -> int:
        """How many merges are learned."""
        return int(self.facts[train_kernels.NUM_TOKENS]) - 256

    def learn(self, num_merges: int) -> bool:
        """Go on until there are so many merges; tell whether there may be more."""
        while True:
            need = train_kernels.learn(
                256 + num_merges, self.slots, self.weights, self.places, self.pairs, self.index, self.shift,
                self.counts, self.heap, self.heads, self.tokens, self.spelled, self.known, self.sides, self.touched,
                self.made_of, self.facts,
            )  # fmt: skip
            if need == train_kernels.NEED_PAIRS:
                self._more_pairs()
            elif need == train_kernels.NEED_BYTES:
                self.spelled = np.r_[self.spelled, np.zeros(3 * len(self.spelled) + len(self.slots), dtype=np.uint8)]
            else:
                return bool(need == train_kernels.DONE)

    def merges(self) -> list[tuple[bytes, bytes]]:
        """Return the merges as pairs of byte strings."""
        spelled = self.spelled.tobytes()
        starts, lengths = train_kernels.START, train_kernels.LENGTH
        rows = self.tokens[: 256 + self.num_merges].tolist()
        tokens = [spelled[row[starts] : row[starts] + row[lengths]] for row in rows]
        return [(tokens[left], tokens[right]) for left, right in self.made_of[256 : len(tokens)].tolist()]

    def _make_tokens(self, num_tokens: int) -> None:
        self.tokens: Array = np.zeros((num_tokens, train_kernels.TOKEN_COLUMNS), dtype=np.int64)
        self.spelled = np.zeros(16 * num_tokens, dtype=np.uint8)
        self.spelled[:256] = np.arange(256)
        self.known: Array = np.full(4 * num_tokens + 1, train_kernels.NONE, dtype=np.int64)
        for value in range(256):
            digest = ((_HASH_START ^ value) * train_kernels.HASH_FACTOR) & train_kernels.HASH_MASK
            self.tokens[value] = value, 1, digest, value << 48
        self.facts[train_kernels.NUM_TOKENS] = self.facts[train_kernels.NUM_BYTES] = 256
        self.sides: Array = np.zeros((num_tokens, train_kernels.SIDE_COLUMNS), dtype=np.int64)
        self.touched: Array = np.zeros(num_tokens, dtype=np.int64)
        self.made_of: Array = np.zeros((num_tokens, 2), dtype=np.int64)

    def _make_index(self) -> None:
        room = len(self.pairs)
        self.index: Array = np.full(2 * room, train_kernels.NONE, dtype=np.int32)
        self.shift = hash_shift(2 * room)
        self.counts: Array = np.empty(room, dtype=np.int64)
        self.heap: Array = np.empty(room, dtype=np.int64)

    def _more_pairs(self) -> None:
        number = int(self.facts[train_kernels.NUM_PAIRS])
        wanted = number + 2 * int(self.facts[train_kernels.NUM_TOKENS]) + 2
        room = len(self.pairs) * 2
        while room < wanted:
            room *= 2
        pairs, counts, heap = self.pairs, self.counts, self.heap
        self.pairs = np.empty((room, train_kernels.PAIR_COLUMNS), dtype=np.int64)
        self.pairs[:number] = pairs[:number]
        self._make_index()
        size = int(self.facts[train_kernels.HEAP_SIZE])
        self.counts[:size], self.heap[:size] = counts[:size], heap[:size]
        train_kernels.index_pairs(self.pairs, number, self.index, self.shift)
