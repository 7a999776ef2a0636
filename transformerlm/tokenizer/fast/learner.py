"""The compiled engine's learning: merges from counted words, by kernels, with the arrays that these need.

Twin of `learn_merges`: `transformerlm.tokenizer.pair_table.learn_merges`
Test: tests/tokenizer/fast/test_learner.py
Pays: 29x the MB/s of the reference in training on 10 MB with 10,000 ids, together with `counter` (docs/benchmarks.md)
"""

from __future__ import annotations

import numpy as np

from transformerlm.tokenizer import io
from transformerlm.tokenizer.engines import compiling
from transformerlm.tokenizer.fast import train_kernels as train_kernels
from transformerlm.tokenizer.fast.arrays import Array, hash_shift
from transformerlm.tokenizer.fast.counter import Words
from transformerlm.tokenizer.memory_limit import COMPILED_BYTES_PER_SLOT
from transformerlm.tokenizer.parallel import ProgressCallback

MAX_SLOTS = 1 << 31  # places are 32-bit
_FIRST_PAIRS = 1 << 17  # never less than the 2^16 pairs of bytes
_PAIR_BYTES = 56  # of all arrays with a row for each pair
_MERGES_AT_ONCE = 256


def learn_merges(
    word_counts: Words, num_merges: int, *, progress: ProgressCallback | None = None
) -> list[tuple[bytes, bytes]]:
    """Return the first `num_merges` merges for these words, fewer when no pair is left.

    Raises:
        ValueError: more than 2 GB of distinct words, or tokens with more bytes in all than a file of a tokenizer.
        OSError: what is beyond the memory's limit does not fit on the disk.
    """
    with compiling("train"):
        learner = _Learner(word_counts, num_merges)
        del word_counts  # laid out, they are there twice
        learner.start()
        learner.learn(0)
    done = 0
    while done < num_merges and learner.learn(min(num_merges, done + _MERGES_AT_ONCE)):
        done = learner.num_merges
        if progress is not None and done < num_merges:
            progress("merge", done, num_merges)
    if progress is not None:
        progress("merge", learner.num_merges, num_merges)
    made_of = learner.made_of[256 : 256 + learner.num_merges]
    del learner
    return spelled_merges(made_of)


def spelled_merges(made_of: Array) -> list[tuple[bytes, bytes]]:
    """Return merges as pairs of byte strings; `made_of` holds a row for each, the ids of its left and right part."""
    tokens = [bytes([value]) for value in range(256)]
    merges = []
    for left, right in zip(made_of[:, 0].tolist(), made_of[:, 1].tolist(), strict=True):
        merges.append((tokens[left], tokens[right]))
        tokens.append(tokens[left] + tokens[right])
    return merges


class _Learner:
    """The arrays of `train_kernels.learn`, and room for more pairs when it asks."""

    tokens: train_kernels.Tokens

    def __init__(self, words: Words, num_merges: int) -> None:
        num_slots = int(words.ends[-1]) + len(words.ends) + 1 if len(words.ends) else 1
        if num_slots >= MAX_SLOTS:
            raise ValueError(
                f"input: expected distinct words of less than {MAX_SLOTS / 1e9:.1f} GB in all, found "
                f"{num_slots / 1e9:.1f} GB (sample = 0.25, say, trains on a quarter of the documents)"
            )
        memory = self._memory = words.memory
        self.facts = np.zeros(6, dtype=np.int64)
        self.word_counts: Array = words.counts.view(np.int64)
        in_all = self._bytes_in_all(_FIRST_PAIRS, num_slots)
        self.text = train_kernels.Text(
            slots=memory.zeros(num_slots, np.int32, in_all=in_all),
            weights=memory.zeros(num_slots, np.int32, in_all=in_all),
            word_counts=self.word_counts,
            places=memory.zeros(3 * num_slots, np.int32, in_all=in_all),
        )
        train_kernels.lay_out(words.data, words.ends, self.word_counts, self.text.slots, self.text.weights)
        self._make_tokens(256 + num_merges)
        heads = np.full(train_kernels.LISTED_COUNTS, train_kernels.NONE, dtype=np.int32)
        self.pairs, self.queue = self._make_pairs(_FIRST_PAIRS, heads)

    def start(self) -> None:
        """Find the pairs of bytes, and let them wait for their turn."""
        pair_of = np.full(1 << 16, train_kernels.NONE, dtype=np.int32)
        train_kernels.find_byte_pairs(self.text, self.pairs, self.facts, pair_of)
        self.facts[train_kernels.LEVEL] = train_kernels.LISTED_COUNTS
        train_kernels.wait_from(0, self.queue, self.pairs, self.tokens, self.facts)

    @property
    def num_merges(self) -> int:
        """How many merges are learned."""
        return int(self.facts[train_kernels.NUM_TOKENS]) - 256

    def learn(self, num_merges: int) -> bool:
        """Go on until there are `num_merges` merges; return whether there may be more."""
        while True:
            need = train_kernels.learn(
                256 + num_merges, self.text, self.pairs, self.queue, self.tokens, self.sides, self.touched,
                self.made_of, self.facts,
            )  # fmt: skip
            if need == train_kernels.NEED_PAIRS:
                self._more_pairs()
            elif need == train_kernels.NEED_BYTES:
                self._more_bytes()
            else:
                return bool(need == train_kernels.DONE)

    def _make_tokens(self, num_tokens: int) -> None:
        self.tokens = train_kernels.Tokens(
            rows=np.zeros((num_tokens, train_kernels.TOKEN_COLUMNS), dtype=np.int64),
            spelled=np.zeros(min(16 * num_tokens, io.MAX_FILE_BYTES), dtype=np.uint8),
        )
        self.tokens.spelled[:256] = np.arange(256)
        for value in range(256):
            self.tokens.rows[value] = value, 1, value << 48
        self.facts[train_kernels.NUM_TOKENS] = self.facts[train_kernels.NUM_BYTES] = 256
        self.sides: Array = np.zeros((num_tokens, train_kernels.SIDE_COLUMNS), dtype=np.int64)
        self.touched: Array = np.zeros(num_tokens, dtype=np.int32)
        self.made_of: Array = np.zeros((num_tokens, 2), dtype=np.int32)

    def _make_pairs(self, room: int, heads: Array) -> tuple[train_kernels.Pairs, train_kernels.Queue]:
        """Return the arrays with a row for each pair; only the index is written to before there are pairs."""
        in_all = self._bytes_in_all(room, len(self.text.slots))
        columns = train_kernels.PAIR_COLUMNS
        pairs = train_kernels.Pairs(
            rows=self._memory.zeros(room * columns, np.int64, in_all=in_all).reshape(room, columns),
            index=self._memory.zeros(2 * room, np.int32, in_all=in_all),
            shift=hash_shift(2 * room),
        )
        pairs.index[:] = train_kernels.NONE
        queue = train_kernels.Queue(
            counts=self._memory.zeros(room, np.int64, in_all=in_all),
            heap=self._memory.zeros(room, np.int32, in_all=in_all),
            heads=heads,
            following=self._memory.zeros(room, np.int32, in_all=in_all),
        )
        return pairs, queue

    def _more_pairs(self) -> None:
        number = int(self.facts[train_kernels.NUM_PAIRS])
        wanted = number + 2 * int(self.facts[train_kernels.NUM_TOKENS]) + 2  # by one merge, at most
        room = len(self.pairs.rows) * 2
        while room < wanted:
            room *= 2
        pairs, queue = self._make_pairs(room, self.queue.heads)
        pairs.rows[:number], queue.following[:number] = self.pairs.rows[:number], self.queue.following[:number]
        size = int(self.facts[train_kernels.HEAP_SIZE])
        queue.counts[:size], queue.heap[:size] = self.queue.counts[:size], self.queue.heap[:size]
        train_kernels.index_pairs(pairs, number)
        self.pairs, self.queue = pairs, queue

    def _more_bytes(self) -> None:
        spelled = self.tokens.spelled
        if len(spelled) >= io.MAX_FILE_BYTES:
            raise io.too_many_bytes(self.num_merges)
        larger = np.zeros(min(4 * len(spelled) + len(self.text.slots), io.MAX_FILE_BYTES), dtype=np.uint8)
        larger[: len(spelled)] = spelled
        self.tokens = self.tokens._replace(spelled=larger)

    def _bytes_in_all(self, num_pairs: int, num_slots: int) -> int:
        return COMPILED_BYTES_PER_SLOT * num_slots + self.word_counts.nbytes + _PAIR_BYTES * num_pairs
