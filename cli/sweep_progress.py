"""What people and programs read of a sweep while it trains: which run of how many, its loss, and when all is done."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cli.terminal import LIVE, clock, is_live, note, print_record
from config.schemas import duration_seconds
from config.sweep import ENDLESS_STEPS

if TYPE_CHECKING:
    from transformerlm.experiments.sweep.plan import SweepRun
    from transformerlm.experiments.sweep.scheduler import Outcome, Task, Training

_SECONDS_BETWEEN_LINES = 60.0  # where there is no live line


class SweepProgress:
    """Shows what a `Scheduler` tells: lines for people on stderr, JSON lines on stdout.

    Args:
        total: the number of runs, as far as it is known beforehand.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._ended: dict[str, str] = {}
        self._began = self._shown = time.monotonic()
        self._worked = 0.0  # runs that this process has trained, in whole runs
        self._from: dict[str, float] = {}
        self._live = is_live()

    def done_words(self) -> str:
        """Return how many runs have finished, in words; one that waits at a rung has not."""
        return f"{list(self._ended.values()).count('finished'):,} of {self._total:,} runs have finished"

    def tell(self, event: str, task: Task, facts: Mapping[str, Any]) -> None:
        """Say what happened to a run; the events are those of `Scheduler`."""
        run, outcome = task.run, facts.get("outcome")
        if outcome is not None:
            self._settle(event, outcome)
            return
        if event in ("began", "goes on"):
            self._from[run.name] = _share(run, facts["step"])
        if event == "retry":
            code = facts["code"]
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            note(f"{run.name} {how} after step {facts['step']:,}; it is started again")
        elif event == "waiting":
            note(f"{run.name} is being trained by another process; waiting for it")
        elif event == "left":
            note(f"{run.name} goes on: its process is another machine's or another user's")
        elif event == "goes on":
            note(f"{run.name} goes on after step {facts['step']:,}")
        plain = {key: value for key, value in facts.items() if key != "words"}
        print_record({"event": event.replace(" ", "_"), "run": run.name, **plain})

    def _settle(self, event: str, outcome: Outcome) -> None:
        run = outcome.task.run
        self._ended[run.name] = outcome.state
        share = 1.0 if outcome.state == "finished" else _share(run, outcome.step, outcome.seconds)
        self._worked += max(0.0, share - self._from.pop(run.name, 1.0))
        place = f"{len(self._ended)}/{max(self._total, len(self._ended))}"
        if event == "ended" or outcome.state == "failed":
            note(f"{place}  {run.name}  {_in_words(outcome)}")
        else:
            note(f"{place}  {run.name}  {_in_words(outcome)}, as trained before")
        print_record(
            {
                "event": event,
                "run": run.name,
                "state": outcome.state,
                "step": outcome.step,
                "val_loss": _finite(outcome.val_loss),
                "best_val_loss": _finite(outcome.best_val_loss),
                "best_val_bits_per_byte": _finite(outcome.best_bits_per_byte),
                "seconds": _finite(outcome.seconds),
                "settings": {**run.point.settings, "training.seed": str(run.seed)},
                **({"words": list(outcome.words)} if outcome.words else {}),
            }
        )

    def tick(self, trainings: Sequence[Training]) -> None:
        """Show how far the runs at work are."""
        if self._live:
            LIVE.show(lambda: self._line(trainings))
        elif time.monotonic() - self._shown >= _SECONDS_BETWEEN_LINES:
            self._shown = time.monotonic()
            note(self._line(trainings))

    def close(self) -> None:
        """Remove the live line."""
        if self._live:
            LIVE.show(None)

    def _line(self, trainings: Sequence[Training]) -> str:
        seconds, now = time.monotonic() - self._began, 0.0
        parts = []
        for training in trainings:
            run, follower = training.task.run, training.follower
            now += max(0.0, _share(run, follower.step, follower.seconds) - self._from.get(run.name, 0.0))
            loss = f" loss {follower.loss:.3f}" if math.isfinite(follower.loss) else ""
            until = training.task.until or run.config.training.max_steps
            total = f"/{until:,}" if until < ENDLESS_STEPS else ""
            parts.append(f"{run.name} step {min(follower.step, until):,}{total}{loss}")
        open_shares = sum(1 - _share(one.task.run, one.follower.step, one.follower.seconds) for one in trainings)
        left = max(0, self._total - len(self._ended) - len(trainings)) + open_shares
        worked = self._worked + now
        eta = f"ETA {clock(seconds * left / worked)}" if worked > 0 else clock(seconds)
        return "  ".join([f"{len(self._ended)}/{self._total:,} runs", eta, *parts])


def _share(run: SweepRun, step: int, seconds: float = math.nan) -> float:
    """Return which share of a run is made, by its steps or, if time ends it, by its clock."""
    training = run.config.training
    if training.max_time and math.isfinite(seconds):
        return min(1.0, max(step / training.max_steps, seconds / duration_seconds(training.max_time)))
    return min(1.0, step / training.max_steps)


def _in_words(outcome: Outcome) -> str:
    if outcome.state == "failed":
        last = f": {outcome.words[-1]}" if outcome.words else ""
        return f"failed at step {outcome.step:,}{last}"
    loss = f"val loss {outcome.best_val_loss:.4f}" if math.isfinite(outcome.best_val_loss) else "no validation loss"
    took = f" in {clock(outcome.seconds)}" if math.isfinite(outcome.seconds) else ""
    stopped = f" at step {outcome.step:,}, a rung" if outcome.state == "stopped" else took
    return f"{loss}{stopped}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
