"""When a run logs, validates, saves and stops: a pure function of a few numbers."""

from __future__ import annotations

from dataclasses import dataclass

from config.schemas import duration_seconds
from config.train import TrainConfig

STOP_SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")


@dataclass(frozen=True)
class Agenda:
    """What to do after a step; `stop` is the reason to end the run then, or None."""

    log: bool
    validate: bool
    save: bool
    run_hooks: bool
    stop: str | None


@dataclass(frozen=True)
class Timetable:
    """The intervals and limits of a run, in steps; `max_seconds` in seconds, and `patience` in validations.

    An interval or a patience of 0 means never, and so does None for `max_seconds`. Without a validation text,
    `can_validate` is False.
    """

    max_steps: int
    max_seconds: float | None = None
    patience: int = 0
    log_interval: int = 1
    eval_interval: int = 0
    save_interval: int = 0
    can_validate: bool = True

    @classmethod
    def of(cls, config: TrainConfig) -> Timetable:
        """Return the timetable that a configuration describes."""
        training = config.training
        return cls(
            max_steps=training.max_steps,
            max_seconds=duration_seconds(training.max_time) if training.max_time else None,
            patience=training.early_stop_patience,
            log_interval=training.log_interval,
            eval_interval=training.eval_interval,
            save_interval=config.checkpoint.interval,
            can_validate=config.data.valid is not None,
        )

    def is_due(self, step: int, interval: int) -> bool:
        """Return whether what is done every `interval` steps is due after this one; after the last step it is."""
        return step == self.max_steps or (interval > 0 and step % interval == 0)

    def agenda(
        self,
        step: int,
        *,
        seconds: float = 0.0,
        validations_since_lowest: int = 0,
        signal: str | None = None,
        stop: str | None = None,
    ) -> Agenda:
        """Return what to do after `step`.

        `signal` is the one of `STOP_SIGNALS` that has arrived, if any. A validation can end the run, so the trainer
        asks again after it, with the first answer as `stop`: the reason that was found first stays.
        """
        limit = self._limit_reached(step, seconds=seconds, validations_since_lowest=validations_since_lowest)
        stop = stop or limit or signal
        is_signal = stop in STOP_SIGNALS
        save_is_due = self.is_due(step, self.save_interval)
        # A signal leaves little time: it adds a save, but no validation that was not due anyway.
        ends = stop is not None and not is_signal
        validate = self.can_validate and (save_is_due or self.is_due(step, self.eval_interval) or ends)
        return Agenda(
            log=validate or ends or self.is_due(step, self.log_interval),
            validate=validate,
            save=save_is_due or stop is not None,
            run_hooks=not is_signal,
            stop=stop,
        )

    def _limit_reached(self, step: int, *, seconds: float, validations_since_lowest: int) -> str | None:
        if step >= self.max_steps:
            return "max_steps"
        if 0 < self.patience <= validations_since_lowest:
            return "early_stop"
        return "max_time" if self.max_seconds and seconds >= self.max_seconds else None

    def seconds_left(self, seconds: float) -> float | None:
        """Return what is left of `max_seconds` after `seconds`; None where there is no such limit."""
        return None if self.max_seconds is None else max(0.0, self.max_seconds - seconds)
