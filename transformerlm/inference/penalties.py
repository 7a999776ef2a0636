"""What changes the logits of single ids before one is drawn: penalties for ids that occurred, biases, early ends.

The cost is that of the ids that a text has, not of the vocabulary; rows that ask for nothing cost nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Penalties:
    """How much less likely ids become that the text has already; the values here change nothing.

    `presence` is subtracted from the logit of each id that was drawn, `frequency` once for each time it was drawn
    (OpenAI's definitions). `repetition` divides the positive logits of all ids of prompt and text, and multiplies the
    negative ones (Keskar et al. 2019, CTRL). `logit_bias` is added to the logits of the ids that it names.
    """

    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)


class Occurrences:
    """The ids that one text has so far, and what they change in the logits of its next id.

    Batcher: make one where `Occurrences.needed` says so, call `add` with each id that was drawn, and `adjust` before
    each choice.
    """

    def __init__(
        self, prompt: Sequence[int], penalties: Penalties, *, ends: Collection[int] = (), min_tokens: int = 0
    ) -> None:
        self._penalties, self._ends, self._num_left = penalties, sorted(ends), min_tokens
        self._drawn: dict[int, int] = {}  # id -> how often it was drawn
        self._in_prompt = sorted(set(prompt)) if penalties.repetition != 1.0 else []

    @staticmethod
    def needed(penalties: Penalties, *, min_tokens: int) -> bool:
        """Return whether a text needs one."""
        return penalties != Penalties() or min_tokens > 0

    def add(self, token_id: int) -> None:
        """Count one more id that was drawn."""
        self._drawn[token_id] = self._drawn.get(token_id, 0) + 1
        self._num_left -= 1

    def change(self, row: Tensor) -> None:
        """Change the logits `(vocab)` of the next id, in place."""
        asked = self._penalties
        drawn = torch.tensor(list(self._drawn), dtype=torch.int64, device=row.device)
        seen = torch.tensor(sorted({*self._in_prompt, *self._drawn}), dtype=torch.int64, device=row.device)
        if asked.repetition != 1.0:
            values = row[seen]
            row[seen] = torch.where(values > 0, values / asked.repetition, values * asked.repetition)
        counts = torch.tensor(list(self._drawn.values()), dtype=row.dtype, device=row.device)
        row[drawn] -= asked.presence + asked.frequency * counts
        for token_id, bias in asked.logit_bias.items():
            row[token_id] += bias
        if self._num_left > 0:
            row[self._ends] = -torch.inf


def adjust(logits: Tensor, texts: Sequence[Occurrences | None]) -> Tensor:
    """Return the logits `(batch, vocab)` as each row's text changes them, a copy; the same object where none does."""
    if not any(texts):
        return logits
    logits = logits.clone()
    for row, text in zip(logits, texts, strict=True):
        if text is not None:
            text.change(row)
    return logits
