"""Trains runs, each in a process of its own, several at a time, until a source of tasks has no more.

The scheduler keeps nothing that would be missed after it is killed: what is done is read from the runs' own lines, and
who trains what from locks (see `queue.py`).
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from transformerlm.experiments.sweep.follow import RunFollower
from transformerlm.experiments.sweep.plan import SweepRun
from transformerlm.experiments.sweep.queue import SweepDirectory

POLL_SECONDS = 0.25
BAD_INPUT = 2  # exit code of a command that cannot use what it was given: the next start would end alike


@dataclass(frozen=True)
class Task:
    """A run to train: to its end, or until its validation after step `until` is known."""

    run: SweepRun
    until: int | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a task ended. Losses are validation losses in nats a token, infinite where there is none.

    `val_loss` and `val_bits_per_byte` are those of the step `until`, or the last ones. `seconds` and `flops` are what
    the run has spent, if its lines say so. `words` are the last lines of a run that failed.
    """

    task: Task
    state: Literal["finished", "stopped", "failed"]
    step: int
    val_loss: float
    best_val_loss: float
    best_bits_per_byte: float
    seconds: float
    flops: float = math.nan
    words: tuple[str, ...] = ()
    val_bits_per_byte: float = math.inf

    @property
    def rank(self) -> float:
        """What settings are ranked by, the lower the better: bits per byte, which do not depend on the tokenizer.

        A run whose lines do not say them is ranked by nats a token.
        """
        return self.best_bits_per_byte if math.isfinite(self.best_bits_per_byte) else self.best_val_loss

    @property
    def rank_at_rung(self) -> float:
        """The same at the step `until`."""
        return self.val_bits_per_byte if math.isfinite(self.val_bits_per_byte) else self.val_loss


class Source(Protocol):
    """What there is to do."""

    def next(self) -> Task | None:
        """Return another task; None if there is none now: after the next outcome there may be."""

    def done(self, outcome: Outcome) -> None:
        """Take an outcome."""


class InOrder:
    """The source of a list of runs that does not depend on their results."""

    def __init__(self, runs: Sequence[SweepRun]) -> None:
        self._tasks = iter([Task(run) for run in runs])
        self.outcomes: list[Outcome] = []

    def next(self) -> Task | None:
        """Return the next run of the list."""
        return next(self._tasks, None)

    def done(self, outcome: Outcome) -> None:
        """Keep an outcome."""
        self.outcomes.append(outcome)


@dataclass(kw_only=True)
class Training:
    """A task at work. `process` is None for one that another sweep began, or that was started by hand.

    `signals` counts those that its process was sent: the first lets it save, the second ends it at once.
    """

    task: Task
    follower: RunFollower
    process: subprocess.Popen[bytes] | None = None
    failures: int = 0
    reached: int = -1
    signals: int = 0
    began: float = field(default_factory=time.monotonic)


def train_command(config: Path) -> list[str]:
    """Return the command line that trains a run."""
    return [sys.executable, "-P", "-m", "cli.train", "--config", str(config)]  # -P: no `cli` of the working directory


class Scheduler:
    """Works through a source.

    Args:
        directory: the sweep's directory, which the caller holds.
        parallel: runs at a time.
        retries: how often a run is started again that crashed and got no further than before.
        environment: the environment of the trainings.
        tell: called with what happens: "skipped", "began", "goes on", "waiting", "retry", "ended", "left", each with
            the task and facts about it.
        tick: called now and then with the trainings at work.
        stop: returns the names of the stop signals so far; the first ends the scheduler, and each goes to the runs.
        command: returns the command line that trains the run of a TOML file.
    """

    def __init__(
        self,
        directory: SweepDirectory,
        *,
        parallel: int = 1,
        retries: int = 0,
        environment: Mapping[str, str] | None = None,
        tell: Callable[[str, Task, Mapping[str, Any]], object] = lambda event, task, facts: None,
        tick: Callable[[Sequence[Training]], object] = lambda trainings: None,
        stop: Callable[[], Sequence[str]] = lambda: (),
        command: Callable[[Path], list[str]] = train_command,
    ) -> None:
        self._directory, self._parallel, self._retries = directory, parallel, retries
        self._environment = dict(os.environ if environment is None else environment)
        self._tell, self._tick, self._stop, self._command = tell, tick, stop, command
        self._active: list[Training] = []

    def work(self, source: Source) -> str | None:
        """Train until the source has no more; return the name of the signal that ended the work before, if any.

        The trainings have ended, too, when this returns or raises, but those that no signal reaches from here.
        """
        try:
            while not self._stop() and (self._fill(source) or self._active):
                self._tick(self._active)
                time.sleep(POLL_SECONDS if self._active else 0)
                self._look(source)
        finally:
            self._end()
        return next(iter(self._stop()), None)

    # --- one after the other ---------------------------------------------------------------------------------------

    def _fill(self, source: Source) -> bool:
        """Begin tasks while there is room; return whether there may be more to do at once."""
        while len(self._active) < self._parallel:
            if (task := source.next()) is None:
                return False
            training = Training(task=task, follower=RunFollower(self._directory.run_dir(task.run)))
            training.follower.update()
            if state := self._reached(training):
                self._settle(source, training, state, "skipped")
                continue
            self._active.append(training)
            self._start(training)
        return True

    def _reached(self, training: Training) -> Literal["finished", "stopped"] | None:
        """Return how the task of a training has ended by what its lines say; None if it has not."""
        if training.task.until in training.follower.val_losses:
            return "stopped"
        return "finished" if training.follower.finished else None

    def _start(self, training: Training) -> None:
        """Start the process of a training, or wait for the one that is there."""
        run, training.process, training.signals = training.task.run, None, 0
        claim = self._directory.claim(run)
        if claim is None:
            self._tell("waiting", training.task, {})
            return
        inherited: dict[str, Any] = {} if os.name == "nt" else {"pass_fds": (claim.fileno(),)}
        event = "goes on" if training.follower.step else "began"
        with claim, self._directory.open_log(run) as log:
            training.process = subprocess.Popen(
                self._command(self._directory.config_path(run)),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                env=self._environment,
                start_new_session=True,  # Ctrl-C reaches the trainings through us alone
                **inherited,
            )
        self._tell(event, training.task, {"step": training.follower.step})

    def _look(self, source: Source) -> None:
        """See to the trainings that have ended or reached their step."""
        for training in list(self._active):
            ended = self._has_ended(training)  # before its lines are read: then these are all of them
            training.follower.update()
            state = self._reached(training)
            if ended and state:
                self._active.remove(training)
                self._settle(source, training, state, "ended")
            elif ended:
                self._go_on(source, training)
            elif state == "stopped" and not training.signals and not training.follower.finished:
                training.signals += self._signal(training, "SIGTERM")

    def _has_ended(self, training: Training) -> bool:
        if training.process is not None:
            return training.process.poll() is not None
        return self._directory.is_free(training.task.run)

    def _go_on(self, source: Source, training: Training) -> None:
        """Start a training again that has ended before its time, or give it up."""
        process, step = training.process, training.follower.step
        if process is None:
            self._start(training)
            return
        if process.returncode == BAD_INPUT and not self._directory.is_free(training.task.run):
            training.process = None  # somebody else trains it
            self._tell("waiting", training.task, {})
            return
        training.failures = 1 if step > training.reached else training.failures + 1
        training.reached = max(step, training.reached)
        if training.failures > self._retries or process.returncode == BAD_INPUT:
            self._active.remove(training)
            self._settle(source, training, "failed", "ended")
            return
        words = self._directory.last_words(training.task.run)
        self._tell("retry", training.task, {"code": process.returncode, "step": step, "words": words})
        self._start(training)

    def _settle(
        self, source: Source, training: Training, state: Literal["finished", "stopped", "failed"], event: str
    ) -> None:
        follower, until = training.follower, training.task.until
        val_loss, bits = (_at(until, table) for table in (follower.val_losses, follower.bits_per_byte))
        outcome = Outcome(
            task=training.task,
            state=state,
            step=follower.step,
            val_loss=val_loss,
            val_bits_per_byte=bits,
            best_val_loss=follower.best_val_loss,
            best_bits_per_byte=follower.best_bits_per_byte,
            seconds=follower.seconds,
            flops=follower.step * training.task.run.tokens_per_step * follower.flops_per_token,
            words=tuple(self._directory.last_words(training.task.run)) if state == "failed" else (),
        )
        self._tell(event, training.task, {"outcome": outcome})
        source.done(outcome)

    # --- the end ---------------------------------------------------------------------------------------------------

    def _signal(self, training: Training, name: str) -> bool:
        """Send a signal to a training's process; return whether there was one."""
        process = training.process
        pid = process.pid if process else self._directory.process_of(training.task.run)
        if pid is None or (process is not None and process.poll() is not None):
            return False
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, getattr(signal, name))
            return True
        return False

    def _end(self) -> None:
        """End the trainings that are at work, and wait until they have saved.

        One that another sweep began may not have said yet which process it is; it gets its signals when it has. One
        whose process is on another machine, or another user's, goes on.
        """
        while self._active:
            names = self._stop() or ("SIGTERM",)
            for training in list(self._active):
                run = training.task.run
                was_held = training.process is None and self._directory.is_held(run)
                while training.signals < len(names) and self._signal(training, names[training.signals]):
                    training.signals += 1
                if training.signals < len(names) and was_held and self._directory.is_held(run):
                    self._active.remove(training)
                    self._tell("left", training.task, {})
            time.sleep(POLL_SECONDS)
            self._active = [training for training in self._active if not self._has_ended(training)]


def _at(step: int | None, losses: Mapping[int, float]) -> float:
    """Return the loss of a step, or the last one; infinite without one."""
    last = losses[max(losses)] if losses else math.inf
    return last if step is None else losses.get(step, last)
