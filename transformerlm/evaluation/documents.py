"""What is evaluated: documents as ids, with the true UTF-8 bytes of each, from text files or from a token file.

Of a token file with conversations, what nobody should learn is read, and not counted.

Documents are those of make-data: plain text is cut at the separator and at the end of a file. A row of JSON lines or
Parquet is one document, whose special tokens are plain text unless asked for. Documents without text are omitted. So
it does not matter how a text is split into files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from config.special_tokens import END_OF_TEXT
from transformerlm.checkpoints.document_ids import DocumentIds, ids_of_data
from transformerlm.token_files.dataset import TokenDataset
from transformerlm.token_files.loss_mask import LossMask
from transformerlm.tokenizer.pretokenize import SpecialTokenSplitter, safe_pieces
from transformerlm.tokenizer.tokenizer import Tokenizer
from transformerlm.utils.strings import check_is_no_string, to_utf8
from transformerlm.utils.text_files import ReadStats, expand_inputs, read_text
from transformerlm.utils.text_formats import format_of

_PIECE_CHARS = 1 << 20

Array = npt.NDArray[Any]


class PlainText(str):
    """Text without special tokens, whatever it spells."""

    __slots__ = ()


@dataclass(frozen=True)
class Documents:
    """Documents one after the other.

    `ids` `(tokens,)` has no separators; document i ends at `ends[i]` and has `num_bytes[i]` bytes, both `(documents,)`.
    `separator_id` ends a document in a stream of several, and is None if there is no such token. `start_id` goes before
    a document that is read by itself: the separator, unless the model knows another. `id_bytes` `(ids of the
    tokenizer,)` are the bytes that each id stands for, to count those of a part of a document. `learnt` `(tokens,)`
    says which ids count, None: all, and the separators; `num_bytes` are those of the ids that count.
    """

    ids: Array
    ends: Array
    num_bytes: Array
    separator_id: int | None
    start_id: int | None = None
    id_bytes: Array | None = None
    learnt: Array | None = None

    def __post_init__(self) -> None:
        if self.start_id is None:
            object.__setattr__(self, "start_id", self.separator_id)

    def __len__(self) -> int:
        return len(self.ends)

    def take(self, numbers: Array) -> Documents:
        """Return the documents with these numbers `(some,)`, in their order here."""
        chosen = np.zeros(len(self), dtype=np.bool_)  # (documents,)
        chosen[numbers] = True
        sizes = np.diff(self.ends, prepend=0)  # (documents,), tokens of each
        of_ids = np.repeat(chosen, sizes)  # the choice once per token: (tokens,)
        learnt = None if self.learnt is None else self.learnt[of_ids]
        parts: dict[str, Any] = {"ends": np.cumsum(sizes[chosen]), "num_bytes": self.num_bytes[chosen]}
        return replace(self, ids=self.ids[of_ids], learnt=learnt, **parts)


def draw(num: int, of: int, *, seed: int) -> Array:
    """Return the numbers of at most `num` of `of` documents, drawn at random and sorted."""
    drawn = np.random.default_rng(seed).choice(of, size=min(num, of), replace=False)
    return np.sort(drawn)


def read_documents(
    inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    separator: str = END_OF_TEXT,
    text_field: str = "text",
    allow_special: bool = False,
    stats: ReadStats | None = None,
) -> list[str]:
    """Return the documents of text files and globs (see `transformerlm.utils.text_files`).

    The rows of JSON lines and Parquet are `PlainText` unless `allow_special` is given.

    Raises:
        ValueError: a file that is not text, or no document with text at all.
        FileNotFoundError: a name or glob without a match.
    """
    paths = expand_inputs(inputs)
    documents: list[str] = []
    for path in paths:
        texts: Iterator[str]
        if format_of(path).holds_rows and not allow_special:
            texts = (PlainText(block.text) for block in read_text(path, text_field=text_field, stats=stats))
        else:
            texts = _documents_of(path, separator, text_field, stats)
        documents += [text for text in texts if text.strip()]
    if not documents:
        raise ValueError(f"input: expected text, found none in {', '.join(map(str, paths))}")
    return documents


def _documents_of(path: Path, separator: str, text_field: str, stats: ReadStats | None) -> Iterator[str]:
    blocks = read_text(path, text_field=text_field, stats=stats)
    unfinished: list[str] = []
    # A piece does not end inside a separator.
    for piece in safe_pieces(blocks, SpecialTokenSplitter([separator]), size=_PIECE_CHARS, where=str(path)):
        *ended, rest = piece.text.split(separator)
        for text in ended:
            yield "".join([*unfinished, text])
            unfinished = []
        unfinished.append(rest)
        if piece.ends_document:
            yield "".join(unfinished)
            unfinished = []


def encode_documents(
    texts: Sequence[str],
    tokenizer: Tokenizer,
    *,
    separator: str = END_OF_TEXT,
    document_ids: DocumentIds | None = None,
) -> Documents:
    """Return the ids of each text; special tokens are recognised except in `PlainText`, and bytes are the text's own.

    The documents begin and end with the model's `document_ids`, or, without them, with the separator's id.
    """
    check_is_no_string(texts, "texts")
    parts, part_ends = [np.empty(0, dtype=np.uint16)], [np.zeros(1, dtype=np.int64)]
    for is_plain, group in groupby(texts, key=lambda text: isinstance(text, PlainText)):
        ids, ends = tokenizer.encode_batch_to_array(list(group), allow_special=not is_plain)
        parts.append(ids)
        part_ends.append(ends + part_ends[-1][-1])
    num_bytes = np.array([len(to_utf8(text)) for text in texts], dtype=np.int64)
    ids, ends = np.concatenate(parts), np.concatenate(part_ends)[1:]
    known = document_ids or DocumentIds.of_separator(tokenizer.special_token_ids.get(separator))
    return Documents(ids, ends, num_bytes, known.eos_token_id, known.start_id, _id_bytes(tokenizer))


def _id_bytes(tokenizer: Tokenizer) -> Array:
    return np.array([len(tokenizer.vocab[token_id]) for token_id in range(tokenizer.vocab_size)], dtype=np.int64)


def open_token_file(path: str | Path, tokenizer: Tokenizer, *, document_ids: DocumentIds | None = None) -> Documents:
    """Return the documents of a token file or a folder of shards; a document's bytes are those of its tokens.

    They end at the file's own separator, and begin with the model's `document_ids`, or, without them, with that
    separator. Where the file says which ids are learnt, those alone count, and special tokens among them have no bytes,
    as in a validation while training.

    Raises:
        FileNotFoundError: the file, its sidecar, its mask or a shard is missing.
        ValueError: it was made with another tokenizer (one with fewer special tokens is none), has changed since, or
            holds no document, or nothing that is learnt.
    """
    dataset = TokenDataset(path)
    advice = "evaluate the text itself instead"
    tokenizer.check_fingerprint(
        dataset.tokenizer_sha256,
        vocab_size=dataset.vocab_size,
        made=f"{path}: made with",
        ours="the checkpoint's",
        advice=advice,
    )
    largest = dataset.check()
    if largest >= tokenizer.vocab_size:
        raise ValueError(
            f"{path}: expected ids below {tokenizer.vocab_size}, found {largest}; run transformerlm-make-data"
        )
    known = ids_of_data(dataset, tokenizer)
    separator_id = tokenizer.special_token_ids.get(END_OF_TEXT) if known is None else known.eos_token_id
    learnt = LossMask(dataset.mask).read(0, len(dataset)) if dataset.mask is not None else None
    documents = _split(np.asarray(dataset.tokens), separator_id, tokenizer, path, learnt=learnt)
    if not documents.num_bytes.any():
        raise ValueError(f"{path}: expected text that is learnt, found none in {len(documents):,} documents")
    start_id = None if document_ids is None else document_ids.start_id
    return documents if start_id is None else replace(documents, start_id=start_id)


def _split(
    tokens: Array, separator_id: int | None, tokenizer: Tokenizer, path: str | Path, *, learnt: Array | None = None
) -> Documents:
    is_separator = tokens == (-1 if separator_id is None else separator_id)  # (tokens,)
    ids = tokens[~is_separator]
    places = np.flatnonzero(is_separator)
    # Without separators, separator i is i places further to the left; neighbours give the same end, which counts once.
    ends = np.unique(np.r_[places - np.arange(len(places)), len(ids)])
    ends = ends[ends > 0]
    if not len(ends):
        raise ValueError(f"{path}: expected documents, found none")
    id_bytes = _id_bytes(tokenizer) if learnt is None else np.array(tokenizer.token_byte_lengths(), dtype=np.int64)
    learnt = None if learnt is None else learnt[~is_separator]
    totals = np.cumsum(id_bytes[ids] if learnt is None else id_bytes[ids] * learnt)[ends - 1]
    return Documents(ids, ends, np.diff(totals, prepend=0), separator_id, id_bytes=id_bytes, learnt=learnt)
