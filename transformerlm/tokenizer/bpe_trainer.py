"""Learning BPE merges from text (Sennrich, Haddow & Birch, 2016, arXiv:1508.07909), on bytes as in GPT-2.

Two steps. *Counting*: the text is cut into pre-tokens, and equal ones are counted once; this is a map over pieces of
text, done by worker processes for large inputs. *Merging*: over and over, the pair of neighbouring tokens that occurs
most often becomes one token. Ties go to the greater pair of byte strings, which makes the result a function of the
text alone.

The merging never looks at a word again that the merge does not touch: each pair's count and places are kept up to
date, and a heap gives the next best. Knows nothing of files but how to ask for their text; the vocabulary's files are
`io.py`'s.
"""

from __future__ import annotations

import heapq
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from transformerlm.tokenizer import io
from transformerlm.tokenizer.engines import COMPILED_PATTERNS, Engine, check_engine, use_compiled
from transformerlm.tokenizer.fast.memory_limit import REFERENCE_BYTES_PER_SLOT, Memory, check_memory_limit
from transformerlm.tokenizer.parallel import ProgressCallback, map_in_order, resolve_num_workers
from transformerlm.tokenizer.pretokenize import DEFAULT_PATTERN, SpecialTokenSplitter, pre_tokenize, safe_pieces
from transformerlm.utils.strings import check_is_no_string
from transformerlm.utils.text_files import ReadStats, expand_inputs, holds_rows, read_text, total_bytes

if TYPE_CHECKING:
    from transformerlm.tokenizer.fast.byte_chunks import Chunk

Pair = tuple[int, int]

CHUNK_CHARS = 1 << 20
_BETWEEN_WORDS = -1
_INSIDE_TOKEN = -2
_MERGES_PER_REPORT = 64


def train_bpe(
    input_path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    vocab_size: int,
    special_tokens: Sequence[str],
    *,
    num_workers: int | None = None,
    text_field: str = "text",
    allow_special: bool = False,
    pattern: str = DEFAULT_PATTERN,
    engine: Engine = "auto",
    memory_limit_mb: float | None = None,
    progress: ProgressCallback | None = None,
    stats: ReadStats | None = None,
) -> tuple[dict[int, bytes], list[tuple[bytes, bytes]]]:
    """Train a byte-level BPE tokenizer on text files and return its vocabulary and its merges in order.

    Args:
        input_path: file, glob, or several of them (see `transformerlm.utils.text_files`).
        vocab_size: tokens in all: the 256 bytes, the merges, the special tokens. A small text may run out of pairs
            first; the vocabulary is then smaller.
        special_tokens: kept whole, never merged with their neighbours and not counted.
        num_workers: processes (threads of the compiled engine) that count; by default one for each CPU, and none
            besides this one below 8 MB. The result does not depend on it.
        text_field: the key of JSON lines, or the column of Parquet, that holds a document's text.
        allow_special: recognise special tokens in the rows of JSON lines and Parquet, too, which are plain text
            otherwise. In plain text files they always are.
        pattern: how text is cut into pre-tokens, a name in `pretokenize.PATTERNS`.
        engine: "reference", "compiled" (same result, needs numba), or "auto": the compiled one for large inputs.
        memory_limit_mb: what counting and merging may hold in memory, in megabytes, besides the libraries and the text
            in hand. Beyond it the compiled engine goes on in temporary files (see `memory_limit.Memory`), with a
            warning, and the reference refuses.
        progress: called with ("count", bytes read, bytes in all), then with ("merge", merges done, merges wanted).
        stats: filled with what the reading met, such as bytes that are not UTF-8.

    Returns:
        `vocab`: id -> bytes, ids 0..255 the bytes by value, then the merges in order, then the special tokens.
        `merges`: pairs of byte strings.

    Raises:
        TypeError: `special_tokens` is one string.
        ValueError: `vocab_size` below 256 + the special tokens, special tokens that cannot be or be saved, inputs
            without any text, or with distinct words that need more memory than the limit (the reference only).
        OSError: a file that cannot be read, or no room for the temporary files.
    """
    check_is_no_string(special_tokens, "special_tokens")
    specials = list(special_tokens)
    _check_request(vocab_size, specials)
    paths = expand_inputs(input_path)
    check_engine(engine, pattern=pattern)
    compiled = pattern in COMPILED_PATTERNS and use_compiled(engine, total_bytes(paths), "train")
    learn = _learn_compiled if compiled else _learn_by_reference
    merges = learn(
        paths, specials, vocab_size - 256 - len(specials), num_workers=num_workers, text_field=text_field,
        allow_special=allow_special, pattern=pattern, progress=progress, stats=stats, memory_limit_mb=memory_limit_mb,
    )  # fmt: skip
    if merges is None:
        raise ValueError(f"input: expected text to train on, found none in {', '.join(map(str, paths))}")
    tokens = [bytes([value]) for value in range(256)] + [left + right for left, right in merges]
    tokens += [special.encode() for special in specials]
    return dict(enumerate(tokens)), merges


def _learn_by_reference(
    paths: Sequence[Path],
    specials: Sequence[str],
    num_merges: int,
    *,
    progress: ProgressCallback | None,
    **options: Any,
) -> list[tuple[bytes, bytes]] | None:
    """Count and merge in Python; `None` where there is no text."""
    counts = count_pre_tokens(paths, specials, progress=progress, **options)
    if not counts:
        return None
    return learn_merges({word.encode(): count for word, count in counts.items()}, num_merges, progress=progress)


def _learn_compiled(
    paths: Sequence[Path],
    specials: Sequence[str],
    num_merges: int,
    *,
    num_workers: int | None,
    text_field: str,
    allow_special: bool,
    pattern: str,
    progress: ProgressCallback | None,
    stats: ReadStats | None,
    memory_limit_mb: float | None,
) -> list[tuple[bytes, bytes]] | None:
    """Count and merge with kernels; `None` where there is no text."""
    from transformerlm.tokenizer.fast import counter as compiled_counter
    from transformerlm.tokenizer.fast import learner as compiled_trainer

    splitter = SpecialTokenSplitter(specials, pattern=pattern)
    stats = stats if stats is not None else ReadStats()
    num_bytes, memory = total_bytes(paths), Memory(memory_limit_mb)
    counter = compiled_counter.PieceCounter(
        specials, pattern=pattern, num_threads=resolve_num_workers(num_workers, num_bytes),
        memory=memory,
    )  # fmt: skip
    reading = _Reading(splitter, text_field=text_field, allow_special=allow_special, stats=stats)
    for replaced in counter.count(_chunks(paths, reading)):
        stats.invalid_utf8 += replaced
        if progress is not None:
            progress("count", stats.disk_bytes, num_bytes)
    if counter.add_up() == 0:
        return None
    return compiled_trainer.learn_merges(counter.words(), num_merges, progress=progress, memory=memory)


def _chunks(paths: Sequence[Path], reading: _Reading) -> Iterator[Chunk]:
    """Yield large files of plain text as the bytes they are, and the text of all other files gathered."""
    from transformerlm.tokenizer.fast.byte_chunks import CHUNK_BYTES, chunk_of, comes_in_chunks, read_chunks

    others = []
    for path in paths:
        if comes_in_chunks(path):
            yield from read_chunks(path, reading.splitter, stats=reading.stats)
        else:
            others.append(path)
    for batch in reading.batches(others, chunk_chars=CHUNK_BYTES):
        yield chunk_of(batch.texts, ordinary=batch.ordinary)


def count_pre_tokens(
    paths: Sequence[Path],
    special_tokens: Sequence[str],
    *,
    num_workers: int | None = None,
    text_field: str = "text",
    allow_special: bool = False,
    pattern: str = DEFAULT_PATTERN,
    progress: ProgressCallback | None = None,
    stats: ReadStats | None = None,
    chunk_chars: int = CHUNK_CHARS,
    memory_limit_mb: float | None = None,
) -> Counter[str]:
    """Count the pre-tokens of the files' text, special tokens left out.

    This process reads and cuts (at safe places only), the workers split and count. Memory: about four chunks a worker,
    one run of text without a safe cut where that is longer, and the distinct pre-tokens.
    """
    splitter = SpecialTokenSplitter(special_tokens, pattern=pattern)
    stats = stats if stats is not None else ReadStats()
    num_bytes = total_bytes(paths)
    reading = _Reading(splitter, text_field=text_field, allow_special=allow_special, stats=stats)
    batches = reading.batches(paths, chunk_chars=chunk_chars)
    counts: Counter[str] = Counter()
    workers = resolve_num_workers(num_workers, num_bytes)
    with closing(map_in_order(_PreTokenCounter(splitter), batches, num_workers=workers)) as results:
        for chunk_counts in results:
            counts.update(chunk_counts)
            if memory_limit_mb is not None:
                num_bytes_to_learn = REFERENCE_BYTES_PER_SLOT * sum(len(word.encode()) + 1 for word in counts)
                check_memory_limit(memory_limit_mb, num_bytes_to_learn, num_words=len(counts))
            if progress is not None:
                progress("count", stats.disk_bytes, num_bytes)
    return counts


def learn_merges(
    word_counts: Mapping[bytes, int], num_merges: int, *, progress: ProgressCallback | None = None
) -> list[tuple[bytes, bytes]]:
    """Return the first `num_merges` merges for words that occur so often, fewer when no pair is left."""
    pairs = _PairTable(word_counts)
    merges: list[tuple[bytes, bytes]] = []
    while len(merges) < num_merges and (pair := pairs.pop_best()) is not None:
        merges.append((pairs.tokens[pair[0]], pairs.tokens[pair[1]]))
        pairs.merge(pair)
        if progress is not None and len(merges) % _MERGES_PER_REPORT == 0:
            progress("merge", len(merges), num_merges)
    if progress is not None:
        progress("merge", len(merges), num_merges)
    return merges


class _Texts(NamedTuple):
    """Safe pieces of text; with `ordinary`, special tokens in them are plain text."""

    texts: list[str]
    ordinary: bool


class _PreTokenCounter:
    """The work on one chunk, as an object that can be sent to a worker process."""

    def __init__(self, splitter: SpecialTokenSplitter) -> None:
        self.splitter = splitter

    def __call__(self, batch: _Texts) -> dict[str, int]:
        counts: Counter[str] = Counter()
        splitter = self.splitter.without_tokens() if batch.ordinary else self.splitter
        for text in batch.texts:
            for segment, is_special in splitter.split(text):
                if not is_special:
                    counts.update(pre_tokenize(segment, pattern=splitter.pattern))
        return dict(counts)


class _Reading:
    """How the files are read: where they may be cut, and what has been met."""

    def __init__(
        self, splitter: SpecialTokenSplitter, *, text_field: str, allow_special: bool, stats: ReadStats
    ) -> None:
        self.splitter, self.stats = splitter, stats
        self._text_field, self._allow_special = text_field, allow_special

    def batches(self, paths: Sequence[Path], *, chunk_chars: int) -> Iterator[_Texts]:
        """Gather safe pieces of text into lists of at least `chunk_chars` characters; none crosses a document."""
        for ordinary, files in groupby(paths, key=lambda path: not self._allow_special and holds_rows(path)):
            batch: list[str] = []
            gathered = 0
            for text in self._texts(files, ordinary=ordinary, chunk_chars=chunk_chars):
                batch.append(text)
                gathered += len(text)
                if gathered >= chunk_chars:
                    yield _Texts(batch, ordinary)
                    batch, gathered = [], 0
            if batch:
                yield _Texts(batch, ordinary)

    def _texts(self, paths: Iterable[Path], *, ordinary: bool, chunk_chars: int) -> Iterator[str]:
        splitter = self.splitter.without_tokens() if ordinary else self.splitter
        for path in paths:
            blocks = read_text(path, text_field=self._text_field, stats=self.stats)
            for piece in safe_pieces(blocks, splitter, size=chunk_chars, where=str(path)):
                yield piece.text


class _PairTable:
    """All words as one row of slots, a slot a byte, and each pair of neighbouring tokens with its count and places.

    A token of n bytes fills n slots; its id stands in the first and in the last of them, so that both neighbours can
    read it. Slots in between hold `_INSIDE_TOKEN`, slots between words `_BETWEEN_WORDS`. A place is where the pair's
    left token begins. Places are never taken out of a pair's list: ids only grow, so a place is out of date exactly
    when its two ids are no longer there.
    """

    def __init__(self, word_counts: Mapping[bytes, int]) -> None:
        self.tokens = [bytes([value]) for value in range(256)]
        self._known = set(self.tokens)
        self._order = [_descending(token) for token in self.tokens]
        self._slots = [_BETWEEN_WORDS]
        self._weights = [0]  # of each slot: how often its word occurs
        for word, count in word_counts.items():
            self._slots.extend(word)
            self._slots.append(_BETWEEN_WORDS)
            self._weights.extend([count] * (len(word) + 1))
        self._counts: defaultdict[Pair, int] = defaultdict(int)
        self._places: defaultdict[Pair, list[int]] = defaultdict(list)
        for place, pair in enumerate(pairwise(self._slots)):
            if _BETWEEN_WORDS not in pair:
                self._counts[pair] += self._weights[place]
                self._places[pair].append(place)
        self._heap = [self._entry(pair) for pair in self._counts]
        heapq.heapify(self._heap)

    def pop_best(self) -> Pair | None:
        """Return the pair with the highest count, of equals the one with the greater byte strings; None at the end.

        Counts of pairs in the heap only fall (a merge makes new pairs of the new token, and takes from the others): an
        entry that is out of date is put back with its present count when it comes up. A pair that would spell a token
        which exists already is passed over, so that no two ids mean the same.
        """
        while self._heap:
            negative_count, _, _, left, right = heapq.heappop(self._heap)
            pair = (left, right)
            if self._counts[pair] == -negative_count and self.tokens[left] + self.tokens[right] not in self._known:
                return pair
            if 0 < self._counts[pair] < -negative_count:
                heapq.heappush(self._heap, self._entry(pair))
            else:
                self._forget(pair)
        return None

    def merge(self, pair: Pair) -> None:
        """Make the pair one new token wherever it stands, from left to right, and update the counts around it."""
        slots, counts, places, tokens = self._slots, self._counts, self._places, self.tokens
        left, right = pair
        new = len(tokens)
        tokens.append(tokens[left] + tokens[right])
        self._known.add(tokens[new])
        self._order.append(_descending(tokens[new]))
        new_pairs: set[Pair] = set()
        for start in places[pair]:
            middle = start + len(tokens[left])
            if slots[start] != left or slots[middle] != right:
                continue  # out of date: in "aaa" the first merge takes the second pair's left token
            end = start + len(tokens[new])
            weight = self._weights[start]
            before, after = slots[start - 1], slots[end]
            if before >= 0:
                counts[before, left] -= weight
                counts[before, new] += weight
                places[before, new].append(start - len(tokens[before]))
                new_pairs.add((before, new))
            if after >= 0:
                counts[right, after] -= weight
                counts[new, after] += weight
                places[new, after].append(start)
                new_pairs.add((new, after))
            slots[middle - 1] = slots[middle] = _INSIDE_TOKEN
            slots[start] = slots[end - 1] = new
        self._forget(pair)
        for new_pair in new_pairs:
            if counts[new_pair] > 0:
                heapq.heappush(self._heap, self._entry(new_pair))
            else:
                self._forget(new_pair)

    def _entry(self, pair: Pair) -> tuple[int, str, str, int, int]:
        left, right = pair
        return -self._counts[pair], self._order[left], self._order[right], left, right

    def _forget(self, pair: Pair) -> None:
        self._counts.pop(pair, None)
        self._places.pop(pair, None)


def _descending(token: bytes) -> str:
    """Return a key that sorts byte strings from the greatest down, as Python's heap gives the smallest first.

    Each byte is turned round, and an end mark above all of them puts a string behind those that go on from it.
    """
    return bytes(255 - value for value in token).decode("latin-1") + "\u0100"


def _check_request(vocab_size: int, special_tokens: Sequence[str]) -> None:
    if len(set(special_tokens)) < len(special_tokens):
        raise ValueError(f"special_tokens: expected each once, found {list(special_tokens)}")
    io.check_special_tokens(special_tokens)
    io.check_special_tokens_to_save(special_tokens)
    if vocab_size < 256 + len(special_tokens):
        raise ValueError(
            f"vocab_size: expected at least {256 + len(special_tokens)} (256 bytes and {len(special_tokens)} "
            f"special tokens), found {vocab_size}"
        )
