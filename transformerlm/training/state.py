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
        validations_since_lowest: validations at `eval_interval` after that one.
        seconds: time used of `training.max_time`, over all starts, the same on every rank.
        elapsed_s: seconds that it took to get to this step, with steps that were made again counted once.
        guard: the memory of the spike guard.
    """

    step: int = 0
    tokens: int = 0
    best_val_loss: float | None = None
    best_step: int | None = None
    lowest_val_loss: float | None = None
    validations_since_lowest: int = 0
    seconds: float = 0.0
    elapsed_s: float = 0.0
    guard: GuardState = field(default_factory=GuardState)

    def count_validation(self, val_loss: float) -> None:
        """Count a validation at `eval_interval` for early stopping."""
        if self.lowest_val_loss is None or val_loss < self.lowest_val_loss:
            self.lowest_val_loss, self.validations_since_lowest = val_loss, 0
        else:
            self.validations_since_lowest += 1

    def count_saved(self, val_loss: float | None) -> bool:
        """Return whether this step's checkpoint is the best so far, and remember it if so."""
        is_best = val_loss is not None and (self.best_val_loss is None or val_loss < self.best_val_loss)
        if is_best:
            self.best_val_loss, self.best_step = val_loss, self.step
        return is_best
