"""The lines of a run as they come, also over a resume, which replaces the file."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformerlm.experiments.metric_lines import METRICS, LineReader, as_record, first_records
from transformerlm.experiments.run_directories import (
    RunState,
    check_is_run,
    config_of,
    has_begun_since,
    is_held,
    summary_of,
)
from transformerlm.experiments.run_scan import scan_run

Line = tuple[str, dict[str, Any]]
_MOST_LOSSES = 4000
_LEAST_BYTES = 4_000_000
_BYTES_PER_LINE = 2000


class FollowedRun:
    """Reads a run's lines, each once, and keeps what the last ones say.

    Of a long file only the end is read, which has some `last_lines` lines at least; the losses before it are few.

    Raises:
        ValueError: there is no such run: neither lines nor a training that will write some.
    """

    def __init__(self, directory: Path, *, last_lines: int = 0) -> None:
        self._directory, self._path = directory, directory / METRICS
        if self._path.exists() or not is_held(directory):
            check_is_run(directory)
        self._reader = LineReader(self._path)
        self._seen: Counter[int] = Counter()  # how often each line was shown, by its hash
        self._here: Counter[int] = Counter()  # and how often it is in the file so far
        self.losses: list[float] = []
        self.step = 0
        self.max_steps: int | None = None
        self.tokens_per_second: float | None = None
        self._tokens_per_step: float | None = None
        self._last_end: str | None = None
        self._written_ns = 0  # the time of the lines that were read; later ones count the next time
        self._read_at = time.monotonic()
        self._first_step = 0
        self._skip(max(_LEAST_BYTES, last_lines * _BYTES_PER_LINE))

    def _skip(self, most_bytes: int) -> None:
        """Leave out what is long before the end, but what it says of the whole run."""
        if not self._path.exists() or self._path.stat().st_size <= most_bytes:
            return
        self._reader.skip_to_end(most_bytes)
        for record in first_records(self._path):
            if record.get("event") == "started":
                self._take(record)
        self.max_steps = _whole(config_of(self._directory).get("training.max_steps")) or self.max_steps  # it may go on
        self.losses = [float(loss) for loss in scan_run(self._directory).curve]
        self._first_step = -1  # not known yet

    def new(self) -> list[Line]:
        """Return the lines that have come since the last call; a file that was replaced gives those not seen before."""
        found: list[Line] = []
        try:
            self._written_ns = self._path.stat().st_mtime_ns
            for part in self._reader.new():
                if part.reset:
                    self.losses.clear()
                    self._here.clear()
                found += self._unseen(part.texts)
        except FileNotFoundError:  # it trains, but has written nothing, or it was removed
            pass
        return found

    def _unseen(self, texts: Sequence[str]) -> Iterator[Line]:
        for text in texts:
            record = as_record(text) or {}
            self._take(record)
            if self._first_step < 0:
                self._first_step = self.step
            key = hash(text)
            self._here[key] += 1
            if self._here[key] > self._seen[key] and self.step >= self._first_step:
                self._seen[key] = self._here[key]
                yield text, record

    def _take(self, record: dict[str, Any]) -> None:
        event, step, loss = record.get("event"), record.get("step"), record.get("metrics.loss")
        if isinstance(step, int) and not isinstance(step, bool):
            self.step = step
        if event == "started":
            self.max_steps = _whole(record.get("max_steps"))
            self._tokens_per_step = _whole(record.get("tokens_per_step"))
        if event in ("started", "resumed", "finished", "failed"):
            self._last_end = event
        if isinstance(record.get("metrics.tokens_per_second"), int | float):
            self.tokens_per_second = float(record["metrics.tokens_per_second"])
        if isinstance(loss, int | float) or loss in ("nan", "inf", "-inf"):
            self.losses.append(float(loss))
            if len(self.losses) > _MOST_LOSSES:
                self.losses = self.losses[::2]
            self._read_at = time.monotonic()

    def has_ended(self) -> bool:
        """Return whether nothing trains in the directory, or what trains there has said that it is done."""
        has_said = self._last_end in ("finished", "failed") and not has_begun_since(self._directory, self._written_ns)
        return has_said or not is_held(self._directory)

    def state(self) -> RunState:
        """Return the run's state."""
        return summary_of(self._directory).state

    def eta_seconds(self) -> float | None:
        """Return the seconds until the last step at the speed of the last line; None where that is not known."""
        if not self.max_steps or not self._tokens_per_step or not self.tokens_per_second:
            return None
        left = (self.max_steps - self.step) * self._tokens_per_step / self.tokens_per_second
        return max(0.0, left - (time.monotonic() - self._read_at))


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
