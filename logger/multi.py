"""Several loggers as one; the failure of one never reaches the others or the run."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from logger.base import Logger

_log = logging.getLogger(__name__)


class MultiLogger(Logger):
    """Passes every record to each logger in turn.

    A logger that raises is named once on stderr (by `logging`) and still gets the next record: somebody may free space
    on a full disk while the run continues. `run_id` is kept for a later start where no logger has one.
    """

    def __init__(self, loggers: Sequence[Logger], *, run_id: str | None = None) -> None:
        self.loggers, self._run_id = tuple(loggers), run_id
        self._reported: set[int] = set()

    def write(self, record: Mapping[str, Any]) -> None:
        """Write the record to each logger."""
        self._each(lambda logger: logger.write(record))

    def log_artifact(self, path: str | os.PathLike[str], *, name: str, type: str) -> None:
        """Offer the artifact to each logger."""
        self._each(lambda logger: logger.log_artifact(path, name=name, type=type))

    def sync(self) -> None:
        """Make each logger's records durable."""
        self._each(lambda logger: logger.sync())

    @property
    def run_id(self) -> str | None:
        """The first id that one of the loggers has, or the one that is kept."""
        return next((logger.run_id for logger in self.loggers if logger.run_id is not None), self._run_id)

    def close(self) -> None:
        """Close each logger."""
        self._each(lambda logger: logger.close())

    def _each(self, call: Callable[[Logger], None]) -> None:
        for position, logger in enumerate(self.loggers):
            try:
                call(logger)
            except Exception as error:
                if position not in self._reported:
                    self._reported.add(position)
                    name = type(logger).__name__
                    _log.warning("%s failed, the run goes on: %s: %s", name, type(error).__name__, error)
