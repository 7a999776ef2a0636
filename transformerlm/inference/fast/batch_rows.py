"""The requests of a `Batcher` on their way: what each has read and drawn.

Part of: batcher
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from transformerlm.inference.penalties import Occurrences
from transformerlm.inference.random_numbers import RandomNumbers
from transformerlm.inference.requests import Request, TokenLogprobs


@dataclass(eq=False)
class Row:
    """A request on its way: `window` is what its slot reads from position 0 on, before the ids drawn after it."""

    request: Request
    window: list[int]
    occurrences: Occurrences | None
    numbers: RandomNumbers
    slot: int = -1
    due: int = 0
    """What has the least is read first."""
    length: int = 0
    drawn: list[int] = field(default_factory=list)
    scored: list[TokenLogprobs] = field(default_factory=list)
    num_reused: int = 0

    @property
    def is_read(self) -> bool:
        """Whether the window is in the slot."""
        return self.length >= len(self.window)


class Part(NamedTuple):
    """Some ids of a row's window, from position `start` on, that are read in one pass."""

    row: Row
    start: int
    ids: list[int]


def last_ids(rows: list[Row]) -> tuple[list[int], list[int]]:
    """Return the last ids of rows, and their slots."""
    return [row.drawn[-1] for row in rows], [row.slot for row in rows]


def one_longer(rows: list[Row]) -> list[Row]:
    """Count one more id in each row; return the rows."""
    for row in rows:
        row.length += 1
    return rows
