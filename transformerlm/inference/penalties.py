"""What changes the logits of single ids before one is drawn: penalties for ids that occurred, biases, early ends.

A text that asks for any of it has an `Occurrences`, which is told each id that is drawn. `adjust` changes the rows of
such texts. It costs what the ids cost that occur, not what the vocabulary does; where no row asks it does nothing.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from transformerlm.utils.dtypes import upcast

_MOST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, kw_only=True)
class Penalties:
    """How much less likely ids become that the text has already; the values here change nothing.

    `presence` is subtracted from the logit of each id that was drawn, `frequency` once for each time it was drawn
    (OpenAI's definitions). `repetition` divides the positive logits of all ids of prompt and text, and multiplies the
    negative ones (Keskar et al. 2019, CTRL); it comes first. `logit_bias` is added to the logits of the ids that it
    names. Raises ValueError when a number is out of range.
    """

    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in (("presence", self.presence), ("frequency", self.frequency)):
            if not abs(value) <= _MOST:
                raise ValueError(f"penalties: {name} must be finite in fp32, got {value}")
        if not 1 / _MOST <= self.repetition <= _MOST:
            raise ValueError(f"penalties: repetition must be greater than 0 and finite in fp32, got {self.repetition}")
        for token_id, bias in self.logit_bias.items():
            if not abs(bias) <= _MOST:
                raise ValueError(f"penalties: the logit_bias of id {token_id} must be finite in fp32, got {bias}")


class Occurrences:
    """The ids of one text whose next logits change, and how; `add` is told each id that is drawn.

    None of `ends` can be drawn before `min_tokens` ids were.
    """

    def __init__(
        self, prompt: Sequence[int], penalties: Penalties, *, ends: Collection[int] = (), min_tokens: int = 0
    ) -> None:
        self._penalties = penalties
        self._places: dict[int, int] = {}  # id -> its index in the arrays
        self._counts: list[int] = []  # how often it was drawn
        self._ids, self._factors, self._terms = np.zeros(64, np.int64), np.ones(64), np.zeros(64)
        if penalties.repetition != 1.0:
            for token_id in dict.fromkeys(prompt):
                place = self._place(token_id)  # first, since it may make the arrays anew
                self._factors[place] = penalties.repetition
        for token_id, bias in penalties.logit_bias.items():
            place = self._place(token_id)
            self._terms[place] = bias
        self._num_left = min_tokens
        self._banned = [self._place(token_id) for token_id in ends] if min_tokens > 0 else []
        self._terms[self._banned] = -math.inf

    @staticmethod
    def needed(penalties: Penalties, *, min_tokens: int = 0) -> bool:
        """Return whether a text with these settings has anything to change."""
        return min_tokens > 0 or penalties != Penalties()

    def add(self, token_id: int) -> None:
        """Count one more id that was drawn."""
        place = self._place(token_id)
        self._counts[place] += 1
        self._factors[place] = self._penalties.repetition
        self._terms[place] = self._term(token_id, self._counts[place])
        self._num_left -= 1
        if self._num_left == 0:
            ids = self._ids.tolist()
            for banned in self._banned:
                self._terms[banned] = self._term(ids[banned], self._counts[banned])

    def changes(self, vocab_size: int) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
        """Return the ids below `vocab_size`, by what each one's logit is divided, and what is added then."""
        size = len(self._counts)
        ids = self._ids[:size]
        known = ids < vocab_size
        if known.all():
            return ids, self._factors[:size], self._terms[:size]
        return ids[known], self._factors[:size][known], self._terms[:size][known]

    def _term(self, token_id: int, count: int) -> float:
        bias = self._penalties.logit_bias.get(token_id, 0.0)
        return bias - (self._penalties.presence if count else 0.0) - self._penalties.frequency * count

    def _place(self, token_id: int) -> int:
        """Return the id's index in the arrays, a new one for a new id."""
        place = self._places.get(token_id)
        if place is not None:
            return place
        place = self._places[token_id] = len(self._counts)
        self._counts.append(0)
        if place == len(self._ids):  # twice the room
            self._ids = np.concatenate((self._ids, np.zeros_like(self._ids)))
            self._factors = np.concatenate((self._factors, np.ones_like(self._factors)))
            self._terms = np.concatenate((self._terms, np.zeros_like(self._terms)))
        self._ids[place] = token_id
        return place


def adjust(logits: Tensor, texts: Sequence[Occurrences | None]) -> Tensor:
    """Return the logits `(batch, vocab)` with the changes of each row's text; the same object where there are none.

    The given logits stay as they are; changed ones are in at least fp32, or half precision would round penalties away.
    `texts[i]` is None where row i asks for nothing.
    """
    vocab_size = logits.shape[1]
    rows = [(row, text.changes(vocab_size)) for row, text in enumerate(texts) if text is not None]
    if not rows:
        return logits
    places = np.concatenate([ids + row * vocab_size for row, (ids, _, _) in rows])  # in the rows one after another
    divided, added = (np.concatenate([changes[part] for _, changes in rows]).astype(np.float32) for part in (1, 2))
    index, factors, terms = (torch.from_numpy(each).to(logits.device) for each in (places, divided, added))
    changed = upcast(logits).clone(memory_format=torch.contiguous_format)
    values = changed.view(-1)[index]
    changed.view(-1)[index] = torch.where(values > 0, values / factors, values * factors) + terms
    return changed
