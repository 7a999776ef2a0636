"""What a run is given by whoever starts it: where to compute, whom to tell, and what to do on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from logger import Logger
from transformerlm.distributed import World
from transformerlm.models.transformer import TransformerLM
from transformerlm.training.state import TrainState
from transformerlm.utils.dtypes import Precision


@dataclass(frozen=True)
class Hook:
    """Something to do every `interval` steps and after the last, given the step and the model: samples, for one."""

    interval: int
    call: Callable[[int, TransformerLM], None]


@dataclass(frozen=True)
class Runtime:
    """Where and how a run computes, and whom it tells; complete before the Trainer is built.

    Args:
        device: where the model is.
        precision: what the forward pass computes in.
        micro_batch_size: sequences that this process passes through the model at once.
        logger: takes the step lines and the events.
        world: this process and the others of the run.
        hooks: what to do every so often with the model.
        stop: returns the name of the signal that asks to save and end, or None.
        rewind: forgets what was logged after the step it is given: those steps are made again.
        progress: is told of the steps that are logged.
        tick: is told of each step.
        doing: is told what takes time besides steps: "validating 3/16", "saving".
        summary: returns, at the end, facts for the log about how the run went.
    """

    device: torch.device
    precision: Precision
    micro_batch_size: int
    logger: Logger
    world: World = field(default_factory=World)
    hooks: Sequence[Hook] = ()
    stop: Callable[[], str | None] = lambda: None
    rewind: Callable[[int], object] = lambda step: None
    progress: Callable[[int, dict[str, float]], None] = lambda step, metrics: None
    tick: Callable[[int, dict[str, float]], None] = lambda step, metrics: None
    doing: Callable[[str], None] = lambda what: None
    summary: Callable[[TrainState], dict[str, Any]] = lambda state: {}
