"""Who waits for whom: each rank says how far it has come, so that the one that is missing can be named."""

from __future__ import annotations

import time


class Progress:
    """How far this rank has come: how often it arrived where all ranks meet, where that was last, and when.

    One thread writes, another may read.
    """

    def __init__(self) -> None:
        self.meetings = 0
        self.where = "the start"
        self.since = time.monotonic()

    def arrive(self, where: str | None) -> None:
        """Count a meeting; None keeps the name of the one before."""
        self.where = where or self.where
        self.since = time.monotonic()
        self.meetings += 1
