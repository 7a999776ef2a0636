"""Rows of whole documents: each document in one row, as many rows as best fit needs, and each row once an epoch.

Documents are placed from the longest to the shortest, each into the row with the least room in which it fits, or into a
new one (best fit decreasing; Johnson 1973). Ding et al. 2024 ("Fewer Truncations Improve Language Modeling") train so.
A document longer than a row is cut into whole rows and a rest, which begins a row of its own, so that other documents
follow it there.

A row's inputs are a separator and a document, a separator and the next, and so on; its targets are the ids that follow.
So each id of the data is a target once an epoch. What is left of a row is padding: separators, whose targets are
`IGNORED`.

Which row comes when, and which of the documents of one length has which place, is a permutation by arithmetic, keyed
with seed and epoch. So a document's neighbours change, and a resumed run needs nothing but its step.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from transformerlm.token_files.dataset import Tokens
from transformerlm.token_files.loss_mask import LossMask
from transformerlm.training.epoch_order import hashed, permuted
from transformerlm.training.reading import IGNORED

Array = npt.NDArray[Any]


class DocumentRows:
    """The documents of a token file as rows of `context_length` inputs and targets.

    `offsets` `(documents + 1,)` are where documents begin, and where the last one ends. With a `mask` the targets that
    it does not name are `IGNORED`, too. Reading costs time only for the
    rows that are asked for.
    """

    def __init__(
        self,
        tokens: Tokens,
        offsets: Array,
        *,
        context_length: int,
        separator_id: int,
        seed: int = 0,
        mask: LossMask | None = None,
    ) -> None:
        self._mask = mask
        self.tokens, self.context_length, self.separator_id, self.seed = tokens, context_length, separator_id, seed
        sizes = np.diff(offsets)
        self.num_documents = int(np.count_nonzero(sizes))
        self.num_cut = int(np.count_nonzero(sizes > context_length))
        rests, wholes = _pieces(np.asarray(offsets[:-1]), sizes, context_length)
        self._starts = np.concatenate([rests[0], wholes[0]])  # (pieces,), of the targets
        lengths = np.concatenate([rests[1], wholes[1]])
        is_new = np.ones(len(lengths) + 1, dtype=np.bool_)  # where pieces of another kind begin
        is_new[1:-1] = lengths[1:] != lengths[:-1]
        is_new[len(rests[1])] = True
        self._kinds = np.flatnonzero(is_new)  # (kinds + 1,): rests or wholes of one length
        self._lengths = lengths[self._kinds[:-1]]  # (kinds,)
        row_of = best_fit(lengths, num_opening=len(rests[1]), room=context_length)
        self._pieces = np.argsort(row_of, kind="stable")  # row by row, each row's in order
        self._row_ends = np.cumsum(np.bincount(row_of))  # (rows,)

    def __len__(self) -> int:
        return len(self._row_ends)

    @property
    def num_padding(self) -> int:
        """The number of targets in all rows that are none."""
        return len(self) * self.context_length - int((self._lengths * np.diff(self._kinds)).sum())

    def places(self, *, batch_size: int, step: int) -> npt.NDArray[np.int64]:
        """Return the numbers of the rows of a batch, counted over all epochs, `(batch_size,)`."""
        return (step - 1) * batch_size + np.arange(batch_size, dtype=np.int64)

    def read(self, places: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        """Return the inputs and targets of rows, `(2, rows, context_length)`; ids are below 2^31."""
        both = np.empty((2, len(places), self.context_length), dtype=np.int32)
        inputs, targets = both
        inputs[:], targets[:] = self.separator_id, IGNORED
        for row, (starts, lengths) in enumerate(self._stretches(places)):
            at = 0
            for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
                first = max(0, start - 1)  # the separator of the document before; nothing is before the first one
                ids = self.tokens[first : start + length]
                inputs[row, at + length + 1 - len(ids) : at + length] = ids[:-1]
                targets[row, at : at + length] = ids[len(ids) - length :]
                if self._mask is not None:
                    targets[row, at : at + length][~self._mask.read(start, start + length)] = IGNORED
                at += length
        return both

    def _stretches(self, places: npt.NDArray[np.int64]) -> list[tuple[Array, Array]]:
        """Return the pieces of each row: where their targets begin in the tokens, and how many there are."""
        epochs, numbers = np.divmod(places, len(self))
        key = hashed(self.seed, epochs.astype(np.uint64))  # (rows,)
        rows = permuted(numbers, size=len(self), key=key)
        ends = self._row_ends[rows]
        counts = ends - np.where(rows > 0, self._row_ends[rows - 1], 0)  # (rows,)
        row_of = np.repeat(np.arange(len(rows)), counts)  # (pieces,), like all that follows
        within = np.arange(len(row_of)) - np.repeat(np.cumsum(counts) - counts, counts)
        pieces = self._pieces[np.repeat(ends - counts, counts) + within]
        kinds = np.searchsorted(self._kinds, pieces, side="right") - 1
        firsts, sizes = self._kinds[kinds], self._kinds[kinds + 1] - self._kinds[kinds]
        pieces = firsts + permuted(pieces - firsts, size=sizes, key=hashed(key[row_of]))
        cuts = np.cumsum(counts)[:-1]
        return list(zip(np.split(self._starts[pieces], cuts), np.split(self._lengths[kinds], cuts), strict=True))


def _pieces(starts: Array, sizes: Array, room: int) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """Return starts and lengths of the rests of long documents, and those of all other pieces, the longest first."""
    counts = np.where(sizes > room, sizes // room, 0)  # (documents,), whole rows of each
    is_short = (sizes > 0) & (sizes <= room)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    full = np.repeat(starts, counts) + within * room
    wholes = np.concatenate([full, starts[is_short]]), np.concatenate([np.full_like(full, room), sizes[is_short]])
    left = np.where(sizes > room, sizes - counts * room, 0)
    rests = (starts + counts * room)[left > 0], left[left > 0]
    orders = (np.argsort(-rests[1], kind="stable"), np.argsort(-wholes[1], kind="stable"))
    return (rests[0][orders[0]], rests[1][orders[0]]), (wholes[0][orders[1]], wholes[1][orders[1]])


def best_fit(lengths: Array, *, num_opening: int, room: int) -> npt.NDArray[np.int64]:
    """Return the row of each piece, `(pieces,)`, by best fit; rows are numbered from 0.

    The first `num_opening` pieces have a new row each. The others come from the longest to the shortest. Pieces of one
    length are placed together: the first row that is filled is also the best one for the next piece, as long as it has
    room. So the cost grows with the number of lengths rather than with that of pieces.
    """
    row_of = np.zeros(len(lengths), dtype=np.int64)
    row_of[:num_opening] = np.arange(num_opening)
    rows_with: list[list[int]] = [[] for _ in range(room + 1)]  # by the room that is left
    for row, length in enumerate(lengths[:num_opening].tolist()):
        rows_with[room - length].append(row)
    available = sum(1 << left for left in range(1, room + 1) if rows_with[left])  # a bit for each room that rows have
    num_rows, done = num_opening, num_opening
    changes = np.flatnonzero(np.diff(lengths[num_opening:])) + num_opening + 1
    for end in [*changes.tolist(), len(lengths)]:  # of the pieces of one length
        while done < end:
            length = int(lengths[done])
            fitting = available >> length
            left = length + (fitting & -fitting).bit_length() - 1 if fitting else room
            per_row = left // length
            needed = -(-(end - done) // per_row)
            if fitting:
                rows, rows_with[left] = rows_with[left][-needed:], rows_with[left][:-needed]
                available &= ~(1 << left) if not rows_with[left] else ~0
            else:
                rows, num_rows = list(range(num_rows, num_rows + needed)), num_rows + needed
            placed = min(end - done, per_row * len(rows))
            row_of[done : done + placed] = np.repeat(rows, per_row)[:placed]
            last = placed - per_row * (len(rows) - 1)  # pieces in the last of these rows
            for more, count in ((rows[:-1], per_row), (rows[-1:], last)):
                if more and left - count * length:
                    rows_with[left - count * length] += more
                    available |= 1 << (left - count * length)
            done += placed
    return row_of
