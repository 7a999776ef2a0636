"""How much work a run has left, in windows to train on: functions of its configuration and a step."""

from __future__ import annotations

from config.train import TrainConfig
from transformerlm.training.build import num_validation_windows

# What a window costs in a validation, in windows of training: it has no backward pass.
_VALIDATION_COST = 1 / 3


def work_left(config: TrainConfig, step: int, *, valid_tokens: int, world_size: int = 1) -> float:
    """Return the work after `step` for each process: the windows of its steps, plus those of validations by their cost.

    `valid_tokens` is the length of the validation data, 0 without any. Samples and saves are not counted.
    """
    windows = (config.training.max_steps - step) * config.training.batch_size / world_size
    if valid_tokens and step < config.training.max_steps:
        validated = validations_left(config, step) * num_validation_windows(config, valid_tokens)
        windows += validated * _VALIDATION_COST / world_size
    return windows


def validations_left(config: TrainConfig, step: int) -> int:
    """Return how many validations come after `step`."""
    last = config.training.max_steps
    intervals = [interval for interval in (config.training.eval_interval, config.checkpoint.interval) if interval]
    # Those at the more frequent interval, which mostly include the others, and that of the last step.
    return max(((last - 1) // interval - step // interval for interval in intervals), default=0) + 1
