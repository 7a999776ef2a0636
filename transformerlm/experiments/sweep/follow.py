"""How far a run is, from its `metrics.jsonl`, read a little further each time while the run may be writing it."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformerlm.experiments.metric_lines import METRICS, LineReader, as_record

VAL_LOSS, BITS = "metrics.val_loss", "metrics.val_bits_per_byte"


class RunFollower:
    """The numbers of one run by which a sweep judges it.

    `val_losses` are by step; one that is not finite counts as infinite. `finished` says that the run has come to its
    end; one that a signal ended has not. `step` is the last step of which a line is there, and `seconds` how long the
    run has trained by then, and `flops_per_token` what a token costs, if its lines say so.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._reader = LineReader(directory / METRICS)
        self._forget()

    def _forget(self) -> None:
        self.step, self.loss = 0, math.nan
        self.finished, self.reason = False, ""
        self.seconds = self.flops_per_token = math.nan
        self.val_losses: dict[int, float] = {}
        self.bits_per_byte: dict[int, float] = {}

    def update(self) -> None:
        """Read the lines that were written since; a resumed run replaces its file, which is then read anew."""
        with suppress(OSError):  # not begun yet
            for found in self._reader.new():
                if found.reset:
                    self._forget()
                for text in found.texts:
                    self._take(as_record(text) or {})

    def _take(self, record: dict[str, Any]) -> None:
        event = record.get("event")
        if event in ("started", "resumed"):
            self.finished, self.reason = False, ""
            self.flops_per_token = _number(record.get("flops_per_token"), self.flops_per_token)
        elif event == "finished":
            self.reason = str(record.get("reason"))
            self.finished = self.reason != "signal"
        step = record.get("step")
        if not isinstance(step, int) or isinstance(step, bool):
            return
        self.step = max(self.step, step)
        if event is not None:
            return
        self.loss = _number(record.get("metrics.loss"), self.loss)
        self.seconds = _number(record.get("time.elapsed_s"), self.seconds)
        for key, table in ((VAL_LOSS, self.val_losses), (BITS, self.bits_per_byte)):
            if key in record:
                table[step] = _number(record[key], math.inf)

    @property
    def best_val_loss(self) -> float:
        """The lowest validation loss so far, in nats a token; infinite without one."""
        return min(self.val_losses.values(), default=math.inf)

    @property
    def best_bits_per_byte(self) -> float:
        """The lowest validation loss in bits per byte; infinite without one."""
        return min(self.bits_per_byte.values(), default=math.inf)


def _number(value: object, otherwise: float) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**1000
    return float(value) if is_number else otherwise  # type: ignore[arg-type]
