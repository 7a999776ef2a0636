"""What fits into the time of a quickstart: how large a model, how many steps, and how often to evaluate."""

from __future__ import annotations

import math
from dataclasses import dataclass

VALIDATION_SHARE = 0.08  # of the time, for all validations together
NUM_VALIDATIONS = 10
NUM_SAMPLES = 6
MIN_EVAL_TOKENS, MAX_EVAL_TOKENS = 2**10, 2**15
# A size is worth its time if this many tokens are left for each of its parameters (docs/LOG.md).
TOKENS_PER_PARAMETER = 0.15
# The time ends the run and its schedule; the number of steps is a little more than should fit.
STEPS_MARGIN = 1.15


@dataclass(frozen=True)
class Size:
    """A model's size and its cost."""

    d_model: int
    num_layers: int
    num_heads: int
    parameters: int
    flops_per_token: int


@dataclass(frozen=True)
class Speed:
    """The speed measured with a model whose tokens cost `flops_per_token`."""

    flops_per_token: int
    seconds_per_token: float
    seconds_per_validation_token: float

    def slower(self, size: Size) -> float:
        """Return how many times as long a token of another size takes."""
        return size.flops_per_token / self.flops_per_token


@dataclass(frozen=True)
class Budget:
    """The settings of a training run that fills its time."""

    size: Size
    steps: int
    eval_interval: int
    eval_tokens: int
    sample_interval: int


def plan_budget(seconds: float, *, speed: Speed, sizes: list[Size], tokens_per_step: int) -> Budget:
    """Return what fits into `seconds` of training, given the speed of one size; FLOPs give the speed of the others.

    The answer is the largest of the ascending `sizes` that sees enough tokens, or the smallest. Validations take at
    most `VALIDATION_SHARE` of the time, and there is at least one.
    """
    size = sizes[0]
    for larger in sizes[1:]:
        if _num_tokens(seconds, larger, speed) >= TOKENS_PER_PARAMETER * larger.parameters:
            size = larger
    steps = max(2, round(_num_tokens(seconds, size, speed) / tokens_per_step))
    validation_tokens = VALIDATION_SHARE * seconds / (speed.seconds_per_validation_token * speed.slower(size))
    eval_tokens = round(max(MIN_EVAL_TOKENS, min(MAX_EVAL_TOKENS, validation_tokens / NUM_VALIDATIONS)))
    num_validations = max(1, min(NUM_VALIDATIONS, int(validation_tokens / eval_tokens)))
    return Budget(
        size=size,
        steps=round(STEPS_MARGIN * steps),
        eval_interval=math.ceil(steps / num_validations),
        eval_tokens=eval_tokens,
        sample_interval=max(1, steps // NUM_SAMPLES),
    )


def _num_tokens(seconds: float, size: Size, speed: Speed) -> float:
    return (1 - VALIDATION_SHARE) * seconds / (speed.seconds_per_token * speed.slower(size))
