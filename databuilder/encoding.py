"""From text to ids, batch by batch: what a worker does to one batch, and what is found in the stream of ids.

Text is cut at safe places (see `transformerlm.tokenizer.pretokenize`), so batches can be encoded side by side. The
separator's id follows each document, so the ids themselves say where documents end.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from databuilder.sources import are_chosen
from transformerlm.token_files.loss_mask import ids_of, marked
from transformerlm.tokenizer import Tokenizer
from transformerlm.tokenizer.chat import ChatFormat, ChatRenderer
from transformerlm.tokenizer.pretokenize import SpecialTokenSplitter, safe_pieces
from transformerlm.tokenizer.reading import Chunk, comes_in_chunks
from transformerlm.utils.conversations import messages_of
from transformerlm.utils.text_files import ReadStats
from transformerlm.utils.text_formats import format_of
from transformerlm.utils.text_parts import TextPart, read_part

BATCH_CHARS = 1 << 20

Array = np.ndarray[Any, Any]

TRAIN, VALID, _DROPPED = 0, 1, -1


class Batch(NamedTuple):
    """Safe pieces of text, and which of them end a document."""

    texts: list[str] | Chunk
    ends_document: list[bool]
    disk_bytes: int  # read up to the end of this batch
    source: int = 0
    ordinary: bool = False  # special tokens in it are plain text
    invalid_utf8: int = 0  # replaced while it was read; a chunk's bytes are replaced when it is encoded


class Encoded(NamedTuple):
    """The ids of a batch."""

    ids: Array  # the separator's after each document
    disk_bytes: int
    source: int
    invalid_utf8: int  # replaced in the text of this batch


class BatchEncoder:
    """The work on one batch, as an object that can be sent to a worker process or shared by threads."""

    def __init__(self, tokenizer: Tokenizer, separator: str, chat: ChatFormat | None = None) -> None:
        self._tokenizer = tokenizer
        self._renderer = ChatRenderer(tokenizer, chat) if chat else None
        self._separator_id = tokenizer.special_token_ids[separator]

    def __call__(self, batch: Batch) -> Encoded:
        if not isinstance(batch.texts, list):
            ids, replaced = self._tokenizer.encode_chunk(batch.texts)
            return Encoded(ids, batch.disk_bytes, batch.source, batch.invalid_utf8 + replaced)
        if self._renderer is not None:
            plain, learnt, ends = self._renderer.render_all([messages_of(text) for text in batch.texts])
            ids = marked(plain, learnt)
        else:
            ids, ends = self._tokenizer.encode_batch_to_array(batch.texts, allow_special=not batch.ordinary)
        if any(batch.ends_document):
            ids = np.insert(ids, ends[batch.ends_document], self._separator_id)
        return Encoded(ids, batch.disk_bytes, batch.source, batch.invalid_utf8)


@lru_cache(maxsize=2)
def token_tables(tokenizer: Tokenizer, separator: str) -> tuple[Array, Array]:
    """Return, for each id, how many bytes it stands for, uint32, and whether they may be white space alone, bool.

    Both are `(vocab_size,)`; the separator stands for none.
    """
    tokens = [tokenizer.vocab[token_id] for token_id in range(tokenizer.vocab_size)]
    tokens[tokenizer.special_token_ids[separator]] = b""
    num_bytes = np.array([len(token) for token in tokens], dtype=np.uint32)
    return num_bytes, np.array([not token.decode("utf-8", "ignore").strip() for token in tokens])


class DocumentSorter:
    """Finds the documents in a stream of ids, drops those without text, and assigns each of the others to its split.

    A document without text holds only white space. One that has only white space so far waits in `_held`. With
    `is_marked`, ids come with the marks of `loss_mask`.
    """

    def __init__(self, tokenizer: Tokenizer, separator: str, valid_fraction: float, *, is_marked: bool = False) -> None:
        self._marked = is_marked
        self.num_documents = np.zeros(2, dtype=np.int64)
        self.num_bytes = np.zeros(2, dtype=np.int64)
        self.num_empty = 0
        self._tokenizer = tokenizer
        self._separator_id = tokenizer.special_token_ids[separator]
        self._valid_fraction = valid_fraction
        self._token_bytes, self._may_be_blank = token_tables(tokenizer, separator)
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
            parts = [ids[split_of == split] for split in (TRAIN, VALID)]
        self.num_bytes += [self.num_bytes_of(part) for part in parts]
        return parts

    def num_bytes_of(self, ids: Array) -> int:
        """Return how many bytes of text the ids stand for."""
        return int(self._token_bytes.take(self._plain(ids)).sum(dtype=np.int64))

    def _plain(self, ids: Array) -> Array:
        return ids_of(ids) if self._marked else ids

    def _are_blank(self, ids: Array, starts: Array, ends: Array) -> Array:
        """Return which stretches of ids have no text, bool; the first two ids of nearly all with text show it."""
        ids = self._plain(ids)
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


class Limit:
    """Lets whole documents through until the next would exceed a number of tokens; a document waits for its end."""

    def __init__(self, max_tokens: int, separator_id: int) -> None:
        self.max_tokens = max_tokens
        self._separator_id = separator_id

    def __call__(self, encoded: Iterable[Encoded]) -> Iterator[Encoded]:
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


def read_batches(
    parts: Sequence[TextPart],
    tokenizer: Tokenizer,
    *,
    text_field: str,
    stats: ReadStats,
    as_bytes: bool,
    allow_special: bool,
) -> Iterator[Batch]:
    """Read files, or parts of them, as one batch or more; with `as_bytes`, read large plain files as bytes.

    Batches are read ahead, so `stats` may count what is never used; each batch says what was replaced in it.
    """
    splitter = SpecialTokenSplitter(tokenizer.special_tokens, pattern=tokenizer.pattern)
    before = stats.invalid_utf8

    def kind(part: TextPart) -> tuple[bool, bool]:
        path = Path(part.path)
        return as_bytes and comes_in_chunks(path, splitter), format_of(path).holds_rows and not allow_special

    for (in_chunks, ordinary), group in groupby(parts, key=kind):
        batches: Iterator[Batch]
        if stats.conversations:
            batches = _conversations(group, text_field=text_field, stats=stats)
        elif in_chunks:
            batches = _chunk_batches(group, tokenizer, stats=stats)
        elif ordinary:
            batches = _row_batches(group, splitter, text_field=text_field, stats=stats)
        else:
            batches = _text_batches(group, splitter, text_field=text_field, stats=stats)
        for batch in batches:
            yield batch._replace(invalid_utf8=stats.invalid_utf8 - before)
            before = stats.invalid_utf8


def _chunk_batches(parts: Iterable[TextPart], tokenizer: Tokenizer, *, stats: ReadStats) -> Iterator[Batch]:
    for part in parts:
        span = {} if part.kind == "file" else {"start": part.start, "end": part.end}
        for chunk in tokenizer.read_chunks(Path(part.path), stats=stats, size=BATCH_CHARS, **span):
            yield Batch(chunk, [], stats.disk_bytes)
        yield Batch([""], [True], stats.disk_bytes)


def _row_batches(
    parts: Iterable[TextPart], splitter: SpecialTokenSplitter, *, text_field: str, stats: ReadStats
) -> Iterator[Batch]:
    """Read the parts as batches of rows, in which special tokens are plain text, and warn if the first spell any."""
    batches = _text_batches(parts, splitter.without_tokens(), text_field=text_field, stats=stats)
    for number, batch in enumerate(batches):
        if number == 0:
            _warn_of_special_tokens(batch, splitter.special_tokens)
        yield batch._replace(ordinary=True)


def _conversations(parts: Iterable[TextPart], *, text_field: str, stats: ReadStats) -> Iterator[Batch]:
    """Read the parts as batches of whole conversations.

    Raises:
        ValueError: as `conversation_as_text`.
    """
    texts: list[str] = []
    gathered = 0
    for part in parts:
        for block in read_part(part, text_field=text_field, stats=stats):
            texts.append(block.text)
            gathered += len(block.text)
            if gathered >= BATCH_CHARS:
                yield Batch(texts, [True] * len(texts), stats.disk_bytes)
                texts, gathered = [], 0
    yield Batch(texts, [True] * len(texts), stats.disk_bytes)


def _warn_of_special_tokens(batch: Batch, special_tokens: Sequence[str]) -> None:
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
    parts: Iterable[TextPart], splitter: SpecialTokenSplitter, *, text_field: str, stats: ReadStats
) -> Iterator[Batch]:
    """Read the parts as batches of at least `BATCH_CHARS` characters."""
    texts: list[str] = []
    ends_document: list[bool] = []
    gathered = 0
    for part in parts:
        blocks = read_part(part, text_field=text_field, stats=stats)
        for piece in safe_pieces(blocks, splitter, size=BATCH_CHARS, where=part.path):
            texts.append(piece.text)
            ends_document.append(piece.ends_document)
            gathered += len(piece.text)
            if gathered >= BATCH_CHARS:
                yield Batch(texts, ends_document, stats.disk_bytes)
                texts, ends_document, gathered = [], [], 0
    yield Batch(texts, ends_document, stats.disk_bytes)
