"""Progress for people on stderr: a live line on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

from cli.terminal import LIVE, clock, is_live, note

_SECONDS_BETWEEN_LINES = 10.0  # where there is no live line
_SHOWN = {
    "loss": "loss {:.3f}",
    "val_loss": "val loss {:.3f}",
    "val_bits_per_byte": "{:.3f} bits/byte",
    "bits_per_byte": "{:.3f} bits/byte",
    "bits_per_byte_difference": "second - first {:+.3f} bits/byte",
    "exact_match": "{:.1%} exactly right",
    "margin": "+- {:.3f}",
    "tokens_per_second": "{:,.0f} tokens/s",
}


class Progress:
    """Shows how far a job is, and when it will be done.

    Args:
        total: the number of units in the whole job.
        start: the number of units that were done before this process began.
        unit: the word for a unit; "B" shows megabytes.
        began: the monotonic time at which the job began; now, by default.
        limit: the seconds after which the job ends in any case.
        work_left: returns the work that is left after n units, where units are not all the work there is.
        live: whether to show a live line; by default, if stderr is a terminal.
    """

    def __init__(
        self,
        total: int,
        *,
        start: int = 0,
        unit: str = "step",
        began: float | None = None,
        limit: float | None = None,
        work_left: Callable[[int], float] | None = None,
        live: bool | None = None,
    ) -> None:
        self._total, self._start, self._unit = total, start, unit
        self._limit = math.inf if limit is None else limit
        self._work_left = work_left or (lambda done: total - done)
        self._done, self._finished = start, False
        self._facts: Mapping[str, float] = {}
        self._doing = ""
        self._live = is_live() if live is None else live
        self._set_clock(time.monotonic() if began is None else began)

    def _set_clock(self, now: float) -> None:
        self._began = self._at = now
        self._shown = now  # no line at once: the first rate would mean nothing

    def begin(self, what: str) -> None:
        """Start the clock again, because the job begins now, and name what is done first."""
        self._set_clock(time.monotonic())
        self.doing(what)

    def __call__(self, done: int, facts: Mapping[str, float] | None = None) -> None:
        """Show that `done` units are done, beside some numbers; a validation always gets a line of its own."""
        if self._finished:
            return
        self.move(done, facts)
        self._finished = done >= self._total
        important = self._finished or "val_loss" in (facts or {})
        if important or (not self._live and self._at - self._shown >= _SECONDS_BETWEEN_LINES):
            self._shown = self._at
            if self._finished:
                self.close()
            note(self._line(facts or {}))

    def move(self, done: int, facts: Mapping[str, float] | None = None) -> None:
        """Show on the live line alone that `done` units are done; numbers that are not in `facts` stay."""
        self._done, self._at = done, time.monotonic()
        facts = {**self._facts, **(facts or {})}
        self._facts = {
            name: value for name, value in facts.items() if not name.startswith("val_")
        }  # they belong to one step only
        self.doing("")

    def doing(self, what: str) -> None:
        """Name on the live line what takes time besides the units: "validating 3/16", "saving"; "" names nothing."""
        self._doing = what
        if self._live and not self._finished:
            LIVE.show(lambda: "  ".join(filter(None, (self._line(self._facts), self._doing))))
        elif self._live:
            LIVE.show((lambda: self._doing) if what else None)

    def close(self) -> None:
        """Remove the live line."""
        if self._live:
            LIVE.show(None)

    def _line(self, facts: Mapping[str, float]) -> str:
        now, seconds = time.monotonic(), self._at - self._began
        rate = (self._work_left(self._start) - self._work_left(self._done)) / seconds if seconds > 0 else 0.0
        until = min(self._work_left(self._done) / rate, max(0.0, self._limit - seconds)) if rate > 0 else 0.0
        eta = max(0.0, until - (now - self._at))  # it counts down while a unit takes long
        left = f"ETA {clock(eta)}" if rate > 0 and self._done < self._total else clock(now - self._began)
        if self._unit == "B":
            scale, name = (1e6, "MB") if self._total >= 1e6 else (1e3, "kB")
            return f"{self._done / scale:,.1f}/{self._total / scale:,.1f} {name}  {rate / 1e6:.1f} MB/s  {left}"
        numbers = [text.format(facts[name]) for name, text in _SHOWN.items() if name in facts]
        return "  ".join([f"{self._unit} {self._done:,}/{self._total:,}", *numbers, left])


class StageProgress:
    """Shows the progress of a job with several stages, each with its unit; it is called with (stage, done, total)."""

    def __init__(self, units: Mapping[str, str]) -> None:
        self._units = units
        self._stages: dict[str, Progress] = {}
        self._last = time.monotonic()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that `done` of `total` units of a stage are done; of a pipe, of unknown size, nothing is shown."""
        if not total:
            return
        if stage not in self._stages:
            # The first call for a stage comes after its first part. It began at the last call for the stage before.
            self._stages[stage] = Progress(total, unit=self._units[stage], began=self._last)
        self._stages[stage](done)
        self._last = time.monotonic()
