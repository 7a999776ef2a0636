"""The compiled engine's encoder and decoder: they prepare arrays, call kernels, and make room where these ask for it.

Texts are joined into one array of UTF-8; a kernel cuts it at special tokens into segments, another encodes runs of
segments. With several threads each has a table of pieces of its own, so that none waits for another; the kernels run
without the GIL. Tables are kept from call to call, and emptied when they reach their share of the cache's bytes.

Part of: counter, engine
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from queue import Empty, LifoQueue
from typing import NamedTuple

import numpy as np

from transformerlm.tokenizer.fast import encode_kernels as kernels
from transformerlm.tokenizer.fast import merge_kernels as merge_kernels
from transformerlm.tokenizer.fast import seam_kernels as seam_kernels
from transformerlm.tokenizer.fast import table_kernels as table_kernels
from transformerlm.tokenizer.fast import text_kernels as text_kernels
from transformerlm.tokenizer.fast.arrays import PADDING, Array, Buffers, hash_shift, padded
from transformerlm.tokenizer.fast.unicode_tables import unicode_table
from transformerlm.tokenizer.memory_limit import Memory
from transformerlm.tokenizer.parallel import map_in_order
from transformerlm.utils.strings import is_utf8

PATTERNS = {"gpt2": 0, "cl100k": 1, "llama3": 2, "qwen2": 3}
CACHE_BYTES = 64_000_000
SEGMENT_BYTES = 1 << 20

_FIRST_SLOTS = 1 << 16  # 2 MB, a huge page
_KEPT_WORK = 1 << 21  # numbers: a piece of 300 kB, of which there are hardly any
_KEPT_IDS = 4 * SEGMENT_BYTES  # more are those of a run without a place to cut, which there hardly is
_STEP = 1 << 16  # room for ids is a multiple of this, so that it is enough for other chunks, too


class KnownPieces(NamedTuple):
    """Pieces that are one token each, whatever merges would make of them."""

    data: Array  # uint8: the bytes of all, one after the other, and `PADDING`
    ends: Array  # int64 (pieces,): where each ends
    ids: Array  # uint64 (pieces,)


class PieceTable:
    """A table of pieces and their ids that grows as its kernel asks; see `table_kernels.Pieces`."""

    def __init__(
        self, *, max_bytes: int | None = None, num_slots: int = _FIRST_SLOTS, known: KnownPieces | None = None
    ) -> None:
        """Make a table of at most `max_bytes` that has `known` pieces from the beginning."""
        self.max_bytes = max_bytes
        self._known = known
        self.pieces = table_kernels.Pieces(
            slots=_zero_words(num_slots * table_kernels.SLOT_WORDS),
            shift=hash_shift(num_slots),
            used=np.zeros(3, dtype=np.int64),
            long_bytes=np.zeros(1 << 14, dtype=np.uint8),
            ids=np.zeros(1 << 14, dtype=np.uint32),
        )
        self.ahead = np.zeros(kernels.AHEAD_WORDS * kernels.MOST_AHEAD, dtype=np.uint64)
        self.work = _room_to_merge(kernels.CACHED_BYTES)
        self._ids = Buffers(np.uint32, longest=_KEPT_IDS)
        self._add_known()

    @property
    def num_bytes(self) -> int:
        """How many bytes the table takes."""
        return self.pieces.slots.nbytes + self.pieces.long_bytes.nbytes + self.pieces.ids.nbytes

    def make_room(self, need: int, length: int) -> None:
        """Give a kernel what it lacks for a piece of `length` bytes; empty the table where that would be too much."""
        if need == table_kernels.NEED_WORK:
            self.work = _room_to_merge(length)
            return
        slots, long_bytes, ids = self.pieces.slots, self.pieces.long_bytes, self.pieces.ids
        grown = {
            table_kernels.NEED_SLOTS: slots,
            table_kernels.NEED_LONG_BYTES: long_bytes,
            table_kernels.NEED_IDS: ids,
        }[need]
        num_known = 0 if self._known is None else len(self._known.ids)
        holds_more = self.pieces.used[table_kernels.USED_SLOTS] > 2 * num_known  # else emptying it would win nothing
        if self.max_bytes is not None and holds_more and self.num_bytes + 3 * grown.nbytes > self.max_bytes:
            slots[:] = 0
            self.pieces.used[:] = 0
            self._add_known()
        elif need == table_kernels.NEED_SLOTS:
            self.pieces = table_kernels.with_more_slots(self.pieces, _zero_words(4 * len(slots)))
        elif need == table_kernels.NEED_LONG_BYTES:
            self.pieces = self.pieces._replace(long_bytes=_longer(long_bytes, length))
        else:
            self.pieces = self.pieces._replace(ids=_longer(ids, length))

    def _add_known(self) -> None:
        if self._known is None:
            return
        cursor = np.zeros(5, dtype=np.int64)
        # A slot's value is the id where a piece has but one, so adding it to nothing is entering it.
        while need := table_kernels.add_counts(
            self._known.data, self._known.ends, self._known.ids, cursor, self.pieces
        ):
            self.make_room(need, int(cursor[table_kernels.NEEDED]))

    def room_to_write(self, num_ids: int) -> Array:
        """Return an array for the ids of a call; it is used again when nobody holds it."""
        return self._ids.take(-(-num_ids // _STEP) * _STEP)


def _room_to_merge(num_bytes: int) -> Array:
    return np.zeros(merge_kernels.WORK_PER_BYTE * num_bytes, dtype=np.int64)


def bounds_of(ends: Array) -> Array:
    """Return where texts that follow each other begin and end, int64 `(texts, 2)`."""
    bounds = np.zeros((len(ends), 2), dtype=np.int64)
    bounds[1:, 0] = ends[:-1]
    bounds[:, 1] = ends
    return bounds


class SpecialTokens:
    """Special tokens as the kernels need them: spelled one after the other, the longest first."""

    def __init__(self, ids: Mapping[str, int]) -> None:
        longest_first = sorted(ids, key=len, reverse=True)
        spelled = [token.encode() for token in longest_first]
        self.spelled = padded(b"".join(spelled))
        self.places = np.cumsum([0, *map(len, spelled)], dtype=np.int64)
        self.first_bytes = np.zeros(256, dtype=np.bool_)
        self.first_bytes[[token[0] for token in spelled]] = True
        self.ids = np.array([*(ids[token] for token in longest_first), -1], dtype=np.int64)  # [-1] is "no token"

    def segments(self, data: Array, texts: Array, *, longest: int = SEGMENT_BYTES) -> tuple[Array, Array]:
        """Cut texts, rows of (start, end), into rows of (start, end, id that follows or -1).

        Returns the rows, and for each text the number of rows up to its end.
        """
        segments = np.empty((2 * len(texts) + len(data) // 500 + 16, 3), dtype=np.int64)
        last = np.empty(len(texts), dtype=np.int64)
        while True:
            number = text_kernels.cut_segments(
                data, texts, longest, self.first_bytes, self.spelled, self.places, unicode_table(), segments, last
            )
            if number <= len(segments):
                break
            segments = np.empty((number, 3), dtype=np.int64)
        segments = segments[:number]
        # The kernel wrote which token follows, -1 for none; the last entry of `ids` turns that into -1 again.
        segments[:, 2] = self.ids[segments[:, 2]]
        return segments, last


class CompiledEncoder:
    """What a tokenizer's `encode` does, by kernels."""

    def __init__(
        self,
        *,
        byte_ids: Sequence[int],
        merges: Sequence[tuple[int, int, int]],
        tokens: Sequence[bytes],
        special_token_ids: Mapping[str, int],
        pattern: str,
        dtype: type[np.uint16] | type[np.uint32],
        whole_tokens: Mapping[bytes, int] | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        """Make the tables; `merges` are (left id, right id, merged id) in order, `tokens` the bytes of each id.

        A piece of `whole_tokens` is that token (see `reference.Vocabulary`).
        """
        self._dtype = dtype
        self._pattern = PATTERNS[pattern]
        self._specials = SpecialTokens(special_token_ids)
        self._no_specials = SpecialTokens({})
        self._cache_bytes = cache_bytes
        self._tables: LifoQueue[PieceTable] = LifoQueue()
        pairs = merge_kernels.empty_pairs(len(merges))
        merge_kernels.fill_pairs(merge_kernels.mark_certain(np.array(merges, dtype=np.int64).reshape(-1, 3)), pairs)
        sizes = np.fromiter(map(len, tokens), dtype=np.int64, count=len(tokens))
        self._merges = merge_kernels.Merges(np.array(byte_ids, dtype=np.int64), pairs, sizes)
        self._seams = _seams_of([*(whole_tokens or ()), *(tokens[made] for _, _, made in merges)])
        self._known: KnownPieces | None = None
        self.encode_texts([b"a"])  # compiles the kernels
        if whole_tokens:
            self._learn_whole_tokens(whole_tokens)

    def _learn_whole_tokens(self, whole_tokens: Mapping[bytes, int]) -> None:
        """Know from now on tokens that merges do not make of their bytes; a part of a character is never a piece."""
        tokens = [token for token in whole_tokens if is_utf8(token)]
        ids, ends = self.encode_texts(tokens, ordinary=True)
        wanted = np.array([whole_tokens[token] for token in tokens], dtype=np.uint64)
        differ = (np.diff(ends, prepend=0) != 1) | (ids[ends - 1] != wanted)
        found = [token for token, differs in zip(tokens, differ, strict=True) if differs]
        ends = np.cumsum(np.fromiter(map(len, found), dtype=np.int64, count=len(found)))
        self._known = KnownPieces(padded(b"".join(found)), ends, wanted[differ])
        self._seams = seam_kernels.guard_seams(self._seams, found)
        self._tables = LifoQueue()  # without what merges made of these pieces
        self._tables.put(PieceTable(max_bytes=self._cache_bytes, known=self._known))  # compiles what enters them

    def encode_texts(
        self, texts: Sequence[bytes], *, num_threads: int = 1, ordinary: bool = False
    ) -> tuple[Array, Array]:
        """Return the ids of all texts, valid UTF-8, one after the other, and where those of each end.

        With `ordinary`, special tokens are spelled out.
        """
        ends = np.cumsum(np.fromiter(map(len, texts), dtype=np.int64, count=len(texts)))
        return self._encode(padded(b"".join(texts)), ends, num_threads=num_threads, ordinary=ordinary)

    def encode_array(self, data: Array, ends: Array, *, ordinary: bool = False) -> Array:
        """Return the ids of texts, valid UTF-8 with `PADDING` zeros after it, which end at `ends`.

        They are uint32 as the kernels wrote them, for a caller who copies them to their place: their memory, of four
        bytes for each byte of text, is used again when they are let go.
        """
        return self._encode(data, ends, num_threads=1, ordinary=ordinary, as_written=True)[0]

    def _encode(
        self, data: Array, ends: Array, *, num_threads: int, ordinary: bool = False, as_written: bool = False
    ) -> tuple[Array, Array]:
        segments, last = (self._no_specials if ordinary else self._specials).segments(data, bounds_of(ends))
        # Each run of segments gives its ids and where each segment's end; the ends are counted from the run's first id.
        parts, part_ends = [], []
        total = 0
        tasks = ((data, run, as_written) for run in _runs(segments))
        with closing(
            map_in_order(self._encode_run, tasks, num_workers=num_threads, threads=num_threads > 1, caller_works=True)
        ) as results:
            for ids, id_ends in results:
                parts.append(ids)
                part_ends.append(id_ends + total)
                total += len(ids)
        all_ends = np.concatenate([np.zeros(1, dtype=np.int64), *part_ends])
        ids = parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, dtype=self._dtype), *parts])
        return ids, all_ends[last]

    def _encode_run(self, task: tuple[Array, Array, bool]) -> tuple[Array, Array]:
        data, segments, as_written = task
        ends = np.empty(len(segments), dtype=np.int64)
        cursor = np.zeros(5, dtype=np.int64)
        with self._table() as table:
            # A token has a byte or more, an id may follow each segment, and two ids are written at a time.
            out = table.room_to_write(int((segments[:, 1] - segments[:, 0]).sum()) + len(segments) + 2)
            while need := kernels.encode_segments(
                data,
                segments,
                cursor,
                self._pattern,
                unicode_table(),
                self._merges,
                self._seams,
                table.pieces,
                table.ahead,
                table.work,
                out,
                ends,
            ):  # fmt: skip
                table.make_room(need, int(cursor[table_kernels.NEEDED]))
            ids = out[: cursor[table_kernels.WRITTEN]]
            return ids if as_written else ids.astype(self._dtype), ends

    @contextmanager
    def _table(self) -> Iterator[PieceTable]:
        """Lend a table that no other thread has; after an error it is not used again, as it may be half made."""
        try:
            table = self._tables.get_nowait()
        except Empty:
            table = PieceTable(max_bytes=self._cache_bytes, known=self._known)
        yield table
        if len(table.work) > _KEPT_WORK:  # for a giant piece, and the next one may never come
            table.work = _room_to_merge(kernels.CACHED_BYTES)
        self._tables.put(table)


class CompiledDecoder:
    """What a tokenizer's `decode_bytes` does, by kernels."""

    def __init__(self, tokens: Sequence[bytes]) -> None:
        """Make the tables; `tokens` are the bytes of each id."""
        self._spelled = padded(b"".join(tokens))
        self._offsets = np.cumsum([0, *map(len, tokens)], dtype=np.int64)
        self.decode(np.zeros(1, dtype=np.uint16))  # compiles the kernels

    def decode(self, ids: Array) -> memoryview:
        """Return the bytes of the ids, an array of whole numbers of one dimension.

        Raises:
            KeyError: an id that is not in the vocabulary.
        """
        ids = np.ascontiguousarray(ids, dtype=np.uint16 if ids.dtype == np.uint16 else np.int64)
        if not ids.flags.writeable:
            ids = ids.copy()
        length = text_kernels.decoded_length(ids, self._offsets)
        if length < 0:
            raise KeyError(int(ids[-1 - length]))
        out = np.empty(length + PADDING, dtype=np.uint8)
        text_kernels.decode_ids(ids, self._offsets, self._spelled, out)
        return out[:length].data


def _seams_of(tokens: Sequence[bytes]) -> seam_kernels.Seams:
    """Return where none of these tokens is crossed; the table has room for the keys that there are."""
    spelled, places = padded(b"".join(tokens)), np.cumsum([0, *map(len, tokens)], dtype=np.int64)
    number = seam_kernels.fill_seams(spelled, places, seam_kernels.Seams(np.zeros(0, np.uint64), np.uint64(0)))
    num_bits = 1 << max(6, (seam_kernels.BITS_PER_KEY * number - 1).bit_length())
    seams = seam_kernels.Seams(np.zeros(num_bits // 64, dtype=np.uint64), hash_shift(num_bits))
    seam_kernels.fill_seams(spelled, places, seams)
    return seams


def _runs(segments: Array) -> Iterator[Array]:
    """Yield runs of segments of about `SEGMENT_BYTES`."""
    sizes = np.cumsum(segments[:, 1] - segments[:, 0] + 1)
    start = 0
    while start < len(segments):
        before = sizes[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(sizes, before + SEGMENT_BYTES, side="right")))
        yield segments[start:stop]
        start = stop


def _zero_words(number: int) -> Array:
    return Memory().zeros(number, np.uint64, in_all=0)


def _longer(array: Array, at_least: int) -> Array:
    result = np.zeros(4 * len(array) + at_least, dtype=array.dtype)
    result[: len(array)] = array
    return result
