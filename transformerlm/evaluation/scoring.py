"""How many nats a model needs for each document: windows over streams of ids, in batches.

A stream is read through windows of at most `context_length` ids that begin `stride` ids apart. Each window predicts
the id after each of its own; an id that an earlier window predicted is not scored again. So each id is scored once,
given everything before it, or at least the last `context_length - stride` ids. `stride = 1` gives every id the longest
context, `stride = context_length` reads each id once, as validation in training does.

In mode "documents" each document is a stream that begins with the id at which documents start. In mode "sliding" all
documents are one stream, with a separator before the first and after each, as in a token file: context reaches into
earlier documents, unless the model was trained with `document_mask`, which then holds here, too. A separator is scored
with the document that it ends. If there is no such id, a stream begins with its own first id, which costs
log(vocab_size) nats: every id is equally likely.

A text may take longer than anybody wants to wait. `Scoring` reads it batch by batch, in mode "documents" in random
order, so that the part read so far represents the whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch

from transformerlm.evaluation.documents import Array, Documents
from transformerlm.models.functional import document_positions, token_nats
from transformerlm.models.transformer import TransformerLM

Mode = Literal["documents", "sliding"]
# Windows are sorted by length within this many batches: enough for batches of one length, few in a long text.
_BATCHES_SORTED = 16


@dataclass(frozen=True)
class Scores:
    """What each document cost: nats, the number of scored tokens, and its UTF-8 bytes; each `(documents,)`."""

    nats: Array
    tokens: Array
    num_bytes: Array


@dataclass(frozen=True)
class Windowing:
    """How streams are read and computed.

    `context_length` None means the model's; `stride` None means half of that. `progress` is called with the number of
    ids scored so far and in all.
    """

    context_length: int | None = None
    stride: int | None = None
    batch_size: int = 8
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext
    progress: Callable[[int, int], object] = lambda done, total: None

    def resolve(self, model: TransformerLM) -> tuple[int, int]:
        """Return context length and stride for a model.

        Raises:
            ValueError: the context is longer than the model's, or the stride than the context.
        """
        context_length = self.context_length or model.context_length
        if context_length > model.context_length:
            raise ValueError(
                f"context_length: expected at most the model's {model.context_length}, found {context_length}"
            )
        stride = self.stride or max(1, context_length // 2)
        if stride > context_length:
            raise ValueError(f"stride: expected at most the context of {context_length} tokens, found {stride}")
        return context_length, stride


class Windows(NamedTuple):
    """Windows over streams that follow each other, each array `(windows,)`.

    A window reads the ids from `starts` to before `ends` and predicts the one after each of them; the predictions from
    `scored_from` on count.
    """

    starts: Array
    ends: Array
    scored_from: Array


def cut_windows(lengths: Array, *, context_length: int, stride: int) -> Windows:
    """Return the windows over streams of these `lengths` `(streams,)`; a stream's first id is never predicted."""
    targets = lengths - 1  # (streams,)
    # Windows of each stream: one, and one more for each stride begun beyond the first context (-(-a // b) rounds up).
    counts = np.where(targets > 0, 1 + -(-np.maximum(targets - context_length, 0) // stride), 0)
    stream = np.repeat(np.arange(len(lengths)), counts)  # (windows,), whose window it is
    index = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # (windows,), from 0 in each stream
    offsets = np.cumsum(lengths) - lengths  # (streams,), where each begins
    starts = offsets[stream] + index * stride
    ends = np.minimum(starts + context_length, (offsets + targets)[stream])
    return Windows(starts, ends, np.where(index == 0, starts, starts + context_length - stride))


@torch.no_grad()
def score_windows(
    model: TransformerLM,
    ids: Array,
    windows: Windows,
    windowing: Windowing,
    *,
    nats: Array | None = None,
    greedy: Array | None = None,
    separator_id: int | None = None,
) -> Array:
    """Return the nats of each of `ids` `(tokens,)`, fp64; 0, or what `nats` held, for those that no window predicts.

    If `separator_id` is given, attention stays within the documents that begin with it, as `document_mask` says. If
    `greedy` `(tokens,)` is given, it is set to True for ids that were the most likely, and False for others.
    Windows of similar length share a batch. A shorter one is padded with the ids that happen to follow it: a causal
    model sees them only after the positions that count.
    """
    nats = np.zeros(len(ids)) if nats is None else nats
    lengths = windows.ends - windows.starts
    order = np.argsort(-lengths, kind="stable")  # the longest first: too little memory shows at once
    done, total = 0, int((windows.ends - windows.scored_from).sum())
    device = model.token_embeddings.weight.device
    for first in range(0, len(order), windowing.batch_size):
        batch = order[first : first + windowing.batch_size]
        positions = windows.starts[batch, None] + np.arange(lengths[batch[0]] + 1)  # (batch, length + 1)
        read = ids[np.minimum(positions, len(ids) - 1)].astype(np.int64)
        rows = torch.from_numpy(read).to(device)
        within = None if separator_id is None else document_positions(rows[:, :-1], separator_id)
        with windowing.autocast():
            logits = model(rows[:, :-1], document_positions=within)
            losses = token_nats(logits, rows[:, 1:])
        before = positions[:, :-1]  # (batch, length), the place before each predicted id
        scored = (before >= windows.scored_from[batch, None]) & (before < windows.ends[batch, None])
        nats[before[scored] + 1] = losses.cpu().numpy()[scored]
        if greedy is not None:
            greedy[before[scored] + 1] = (logits.argmax(dim=-1) == rows[:, 1:]).cpu().numpy()[scored]
        done += int(scored.sum())
        windowing.progress(done, total)
    return nats


def score_continuations(
    model: TransformerLM, requests: Sequence[tuple[Sequence[int], Sequence[int]]], windowing: Windowing
) -> list[tuple[float, bool]]:
    """Return for each (context, continuation) its log-likelihood in nats, and whether greedy decoding would give it.

    If a context is too long, only its end is read. A continuation longer than the model's context is scored through
    windows, each half a context further.
    """
    if not requests:
        return []
    longest = model.context_length
    parts = [[*context, *continuation][-1 - max(longest, len(continuation)) :] for context, continuation in requests]
    lengths = np.array([len(part) for part in parts])
    windows = cut_windows(lengths, context_length=longest, stride=max(1, longest // 2))
    ids = np.concatenate([np.array(part, dtype=np.int64) for part in parts])
    greedy = np.ones(len(ids), dtype=np.bool_)
    nats = score_windows(model, ids, windows, windowing, greedy=greedy)
    answers = []
    for (_, continuation), end in zip(requests, np.cumsum(lengths).tolist(), strict=True):
        scored = slice(end - len(continuation), end)
        answers.append((-float(nats[scored].sum()), bool(greedy[scored].all())))
    return answers


def score_documents(
    model: TransformerLM, documents: Documents, *, mode: Mode, windowing: Windowing | None = None
) -> Scores:
    """Return what each document costs a model, and put the model into evaluation mode.

    Raises:
        ValueError: the windows do not fit the model, an id is beyond its vocabulary, or a loss is not finite.
    """
    scoring = Scoring(model, documents, mode=mode, windowing=windowing)
    while not scoring.is_done:
        scoring.advance()
    return scoring.scores()


class Scoring:
    """The cost of documents for a model, as far as they have been read; the model is put into evaluation mode.

    With the same `seed` and number of documents, two models read them in the same order.

    Raises:
        ValueError: the windows do not fit the model, an id is beyond its vocabulary, or no id counts.
    """

    def __init__(
        self,
        model: TransformerLM,
        documents: Documents,
        *,
        mode: Mode,
        windowing: Windowing | None = None,
        seed: int = 0,
    ) -> None:
        self._windowing = windowing or Windowing()
        context_length, stride = self._windowing.resolve(model)
        if documents.ids.max(initial=0) >= model.vocab_size:
            found = documents.ids.max()
            raise ValueError(f"expected ids below the model's vocab_size {model.vocab_size}, found {found}")
        self._model, self._documents = model.eval(), documents
        self._ids, lengths, self._owners, self._counted = _streams(documents, mode)
        self._windows = cut_windows(lengths, context_length=context_length, stride=stride)
        is_masked = mode == "sliding" and model.settings.document_mask
        self._separator_id = documents.separator_id if is_masked else None
        self._nats = np.zeros(len(self._ids))
        self._is_first = np.zeros(len(self._ids), dtype=np.bool_)
        firsts = np.cumsum(lengths) - lengths
        self._is_first[firsts] = True
        if (documents.start_id if mode == "documents" else documents.separator_id) is None:
            self._nats[firsts] = math.log(model.vocab_size)
        else:
            self._counted[firsts] = False
        self._bytes = _bytes_of_ids(documents, model.vocab_size)[self._ids] * self._counted
        self._totals = np.bincount(self._owners, weights=self._counted, minlength=len(documents))
        self._sums = np.zeros((len(documents), 3))  # nats, tokens and bytes of what has been read, of each document
        self._order = self._order_of_windows(len(lengths), seed)
        self._begins = np.zeros(len(documents), dtype=np.int64)  # where each document is in this order
        if len(lengths) > 1:
            self._begins[:] = len(self._order)
            np.minimum.at(self._begins, self._owners[self._windows.starts[self._order]], np.arange(len(self._order)))
        self._done, self._tokens_done, self._num_tokens = 0, 0, int(self._totals.sum())
        if not self._num_tokens:
            raise ValueError(f"expected tokens that are learnt in {len(documents):,} documents, found none")
        self._add(firsts[lengths == 1])  # no window reads a stream of one id

    @property
    def _block(self) -> int:
        """How many windows are sorted by length, so that those of a batch are about equally long."""
        return _BATCHES_SORTED * self._windowing.batch_size

    def _order_of_windows(self, num_streams: int, seed: int) -> Array:
        """Return the windows stream by stream, sorted by length within blocks; a stream's stay in order."""
        order = np.arange(len(self._windows.starts))
        if num_streams > 1:  # each is a document
            turns = np.random.default_rng(seed).permutation(num_streams)
            order = np.argsort(turns[self._owners[self._windows.starts]], kind="stable")
        sizes = (self._windows.ends - self._windows.starts)[order]
        return order[np.lexsort((-sizes, np.arange(len(sizes)) // self._block))]

    @property
    def is_done(self) -> bool:
        """Whether all documents have been read to their ends."""
        return self._done == len(self._order)

    @property
    def num_tokens(self) -> tuple[int, int]:
        """How many tokens have been scored, and how many there are to score."""
        return self._tokens_done, self._num_tokens

    def advance(self) -> None:
        """Score the next batch.

        Raises:
            ValueError: a loss is not finite.
        """
        chosen = self._order[self._done : self._done + self._windowing.batch_size]
        windows = Windows(*(column[chosen] for column in self._windows))
        score_windows(
            self._model, self._ids, windows, self._windowing, nats=self._nats, separator_id=self._separator_id
        )
        # No window predicts the first id of a stream; it counts with the stream's first window.
        begins = windows.scored_from + ~self._is_first[windows.starts]
        counts = windows.ends + 1 - begins
        # The places of all windows' scored ids, one range after the other: (scored ids,)
        places = np.repeat(begins - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
        nats = self._nats[places]
        if not np.isfinite(nats).all():
            raise ValueError(f"expected a finite loss, found {nats[~np.isfinite(nats)][0]}; try precision = fp32")
        self._add(places)
        self._done += len(chosen)

    def _add(self, places: Array) -> None:
        self._tokens_done += int(self._counted[places].sum())
        counted = self._counted[places]
        columns = self._nats[places] * counted, counted, self._bytes[places]
        np.add.at(self._sums, self._owners[places], np.stack(columns, axis=1))  # one call: Ctrl-C does not cut it

    def reached(self) -> Array:
        """Return how many bytes of each document have been read `(documents,)`.

        If the documents do not know the bytes of their ids, one that has not been read to its end counts as unread. So
        do those that were begun in a block that is not whole, since its longest come first, unless it is the first.
        """
        reached = np.where(self._sums[:, 1] == self._totals, self._documents.num_bytes, self._sums[:, 2])
        whole = self._done if self.is_done or self._done < self._block else self._done // self._block * self._block
        is_begun = (self._begins < whole) | (self._begins == len(self._order))  # the latter have no windows
        return np.where(is_begun, reached, 0).astype(np.int64)

    def scores(self, reached: Array | None = None) -> Scores:
        """Return the costs of the documents that have been begun, each as far as it has been read.

        `reached` `(documents,)` cuts each earlier, at that many bytes: for example, where both of two models have been.
        """
        mine = self.reached()
        reached = mine if reached is None else reached
        sums = self._sums.copy()
        for document in np.flatnonzero((reached > 0) & (reached < mine)).tolist():
            sums[document] = self._cut(document, reached[document])
        begun = (reached > 0) | (self._documents.num_bytes == 0)
        nats, tokens = sums[begun, :2].T
        return Scores(nats, tokens.astype(np.int64), reached[begun])

    def _cut(self, document: int, num_bytes: int) -> Array:
        """Return what the first bytes of a document cost; a token that is cut costs in proportion to its bytes."""
        places = np.flatnonzero((self._owners == document) & self._counted)
        ends = np.cumsum(self._bytes[places])
        number = int(np.searchsorted(ends, num_bytes, side="right"))  # of whole tokens
        nats = self._nats[places[:number]].sum()
        if number < len(places):
            size = self._bytes[places[number]]
            nats += self._nats[places[number]] * (1 - (ends[number] - num_bytes) / size)
        return np.array([nats, number, num_bytes])


def scores_in_common(scorings: Sequence[Scoring]) -> list[Scores]:
    """Return what the same documents cost each of several models, as far as all models have read."""
    reached = np.minimum.reduce([scoring.reached() for scoring in scorings])
    return [scoring.scores(reached) for scoring in scorings]


def _bytes_of_ids(documents: Documents, vocab_size: int) -> Array:
    """Return the bytes of text that each id stands for `(vocab_size,)`: none for the ids that we insert."""
    num_bytes = np.zeros(vocab_size, dtype=np.int64)
    if documents.id_bytes is not None:
        num_bytes[: len(documents.id_bytes)] = documents.id_bytes
    num_bytes[[each for each in (documents.separator_id, documents.start_id) if each is not None]] = 0
    return num_bytes


def _streams(documents: Documents, mode: Mode) -> tuple[Array, Array, Array, Array]:
    """Return the streams' ids `(ids,)`, their lengths `(streams,)`, and for each id its document and whether it counts.

    A separator counts where all ids do.
    """
    counted = np.ones(len(documents.ids), dtype=np.bool_) if documents.learnt is None else documents.learnt
    sizes = np.diff(documents.ends, prepend=0)
    owners = np.repeat(np.arange(len(sizes)), sizes)
    ids, by_itself = documents.ids, mode == "documents"
    inserted = documents.start_id if by_itself else documents.separator_id
    if inserted is not None:
        places = documents.ends - sizes if by_itself else np.r_[0, documents.ends]
        numbers = np.arange(len(sizes))
        ids, counted = np.insert(ids, places, inserted), np.insert(counted, places, documents.learnt is None)
        owners = np.insert(owners, places, numbers if by_itself else np.r_[0, numbers])
        sizes = sizes + 1
    return ids, sizes if by_itself else np.array([len(ids)]), owners, counted
