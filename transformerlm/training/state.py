"""What a run remembers from step to step, besides its weights and its optimizer."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformerlm.training.spike_guard import GuardState


@dataclass
class TrainState:
    """The memory of a run; every field is in a checkpoint's `state.json`.

    Args:
        step: the last step, made or skipped.
        tokens: tokens trained on.
        best_val_loss: the lowest validation loss among the saved checkpoints.
        best_step: the step of that checkpoint.
        lowest_val_loss: the lowest loss of all validations at `eval_interval`, saved or not.
        patience_val_loss: the loss that early stopping compares with; the lowest one, unless later ones were lower by
            `early_stop_min_delta` or less. None where a checkpoint of an earlier version does not hold it.
        validations_since_lowest: validations at `eval_interval` after the one with that loss.
        seconds: time used of `training.max_time`, over all starts, the same on every rank; what follows the last step
            of a start, a validation and a save, is not in it. 0 without such a limit, in this start or before.
        elapsed_s: seconds that it took to get to this step, with steps that were made again counted once.
        guard: the memory of the spike guard.
    """

    step: int = 0
    tokens: int = 0
    best_val_loss: float | None = None
    best_step: int | None = None
    lowest_val_loss: float | None = None
    patience_val_loss: float | None = None
    validations_since_lowest: int = 0
    seconds: float = 0.0
    elapsed_s: float = 0.0
    guard: GuardState = field(default_factory=GuardState)

    @property
    def time_used(self) -> float:
        """The seconds that count for `training.max_time`; of a run without a limit so far, those up to this step."""
        return self.seconds or self.elapsed_s

    def count_validation(self, val_loss: float, *, min_delta: float = 0.0) -> None:
        """Count a validation at `eval_interval` for early stopping; one that is lower by more than `min_delta` resets.

        Small improvements add up: each is compared with the loss of the last reset, not with the one before.
        """
        before = self.lowest_val_loss if self.patience_val_loss is None else self.patience_val_loss
        if before is None or val_loss < before - min_delta:
            self.patience_val_loss, self.validations_since_lowest = val_loss, 0
        else:
            self.patience_val_loss = before
            self.validations_since_lowest += 1
        self.lowest_val_loss = val_loss if self.lowest_val_loss is None else min(val_loss, self.lowest_val_loss)

    def forget_validations(self) -> None:
        """Forget all validation losses: those to come are of another text, or of another part of it."""
        self.best_val_loss = self.best_step = self.lowest_val_loss = self.patience_val_loss = None
        self.validations_since_lowest = 0

    def count_saved(self, val_loss: float | None) -> bool:
        """Return whether this step's checkpoint is the best so far, and remember it if so."""
        is_best = val_loss is not None and (self.best_val_loss is None or val_loss < self.best_val_loss)
        if is_best:
            self.best_val_loss, self.best_step = val_loss, self.step
        return is_best
