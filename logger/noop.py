"""A logger that keeps nothing, for the ranks that do not log and for runs that want no output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from logger.base import Logger


class NoopLogger(Logger):
    """Takes every record and forgets it."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Do nothing."""

    def log_metrics(
        self, step: int, metrics: Mapping[str, Any], *, elapsed_s: float | None = None, peak_bytes: int | None = None
    ) -> None:
        """Do nothing; in particular, do not wait for a device to hand over its scalars."""
