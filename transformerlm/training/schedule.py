"""Learning rates as pure functions of the step: cosine, constant, warmup-stable-decay, each after a linear warm-up.

Step 0 of a warm-up has learning rate 0 and would change nothing, so training numbers its updates from 1. The end of a
decay may have learning rate 0 as well, so it is one step after the last update: `learning_rate` is called with step 1
for the first update and `max_steps` for the last, and both change something.
"""

from __future__ import annotations

import math
from typing import Any


def cosine(step: float, *, learning_rate: float, min_learning_rate: float, warmup_steps: int, max_steps: int) -> float:
    """Return the rate that rises linearly to `learning_rate` at `warmup_steps`, then falls to `min_learning_rate`.

    The fall is half a cosine and ends at `max_steps`; later steps keep the minimum (Loshchilov & Hutter 2017).
    """
    if step < warmup_steps:
        return learning_rate * step / warmup_steps
    if step >= max_steps:
        return min_learning_rate
    progress = (step - warmup_steps) / (max_steps - warmup_steps)
    return min_learning_rate + 0.5 * (1.0 + math.cos(math.pi * progress)) * (learning_rate - min_learning_rate)


def constant(step: float, *, learning_rate: float, warmup_steps: int) -> float:
    """Return the rate that rises linearly to `learning_rate` at `warmup_steps` and stays there."""
    return learning_rate * step / warmup_steps if step < warmup_steps else learning_rate


def wsd(
    step: float,
    *,
    learning_rate: float,
    min_learning_rate: float,
    warmup_steps: int,
    max_steps: int,
    decay_steps: int,
) -> float:
    """Return the rate that rises, stays, and falls linearly over the last `decay_steps` (Hu et al. 2024).

    Raises ValueError when warm-up and decay do not both fit in `max_steps`.
    """
    if warmup_steps + decay_steps > max_steps:
        raise ValueError(
            f"schedule: warmup_steps ({warmup_steps}) + decay_steps ({decay_steps}) exceed max_steps ({max_steps})"
        )
    if step >= max_steps:
        return min_learning_rate
    if step <= max_steps - decay_steps:
        return constant(step, learning_rate=learning_rate, warmup_steps=warmup_steps)
    remaining = (max_steps - step) / decay_steps
    return min_learning_rate + remaining * (learning_rate - min_learning_rate)


def learning_rate(
    step: float,
    *,
    name: str,
    learning_rate: float,
    min_learning_rate: float = 0.0,
    warmup_steps: int = 0,
    max_steps: int,
    decay_steps: int = 0,
) -> float:
    """Return the learning rate of update number `step`, counted from 1, by the schedule called `name`.

    `name` is "cosine", "constant" or "wsd"; "constant" ignores `min_learning_rate` and `max_steps`, and only "wsd" uses
    `decay_steps`. A decay would reach `min_learning_rate` at step `max_steps + 1`. Raises ValueError for another name.
    """
    if name == "constant":
        return constant(step, learning_rate=learning_rate, warmup_steps=warmup_steps)
    if name == "cosine":
        return cosine(
            step,
            learning_rate=learning_rate,
            min_learning_rate=min_learning_rate,
            warmup_steps=warmup_steps,
            max_steps=max_steps + 1,
        )
    if name == "wsd":
        return wsd(
            step,
            learning_rate=learning_rate,
            min_learning_rate=min_learning_rate,
            warmup_steps=warmup_steps,
            max_steps=max_steps + 1,
            decay_steps=decay_steps + 1,
        )
    raise ValueError(f"schedule.name: expected cosine, constant or wsd, got {name!r}")


def timed_learning_rate(step: int, *, time_share: float, warmup_is_share: bool = False, **schedule: Any) -> float:
    """Return the learning rate of update number `step`, when the share `time_share` (0 to 1) of a run's time is over.

    Steps or time, whichever is further, says how far the schedule is, so that a run that its time limit ends has
    finished its decay. A warm-up of n steps takes n steps, however fast the time goes; one that is a share of the run
    follows the schedule. `schedule` holds the keywords of `learning_rate`. With `time_share` 0 the result is that of
    `learning_rate`.
    """
    rate = learning_rate(max(step, time_share * schedule["max_steps"]), **schedule)
    if warmup_is_share:
        return rate
    peak, warmup_steps = schedule["learning_rate"], schedule.get("warmup_steps", 0)
    return min(rate, constant(step, learning_rate=peak, warmup_steps=warmup_steps))
