"""What a command gives to a run: where to compute, whom to tell, and what to do on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from logger import Logger
from transformerlm.distributed.world import World
from transformerlm.models.transformer import TransformerLM
from transformerlm.training.state import TrainState
from transformerlm.utils.dtypes import Precision


@dataclass(frozen=True)
class Hook:
    """Something to do every `interval` steps and after the last, with the step and the model; samples, for example."""

    interval: int
    call: Callable[[int, TransformerLM], None]


@dataclass(frozen=True)
class Runtime:
    """Where and how a run computes, and whom it tells; it is complete before the Trainer is built.

    Args:
        device: the device that holds the model.
        precision: the precision of the forward pass.
        micro_batch_size: the number of sequences in a forward pass of this process.
        logger: gets the step lines and the events.
        world: the processes of the run, and which of them this is.
        hooks: what to do with the model at intervals.
        stop: returns the name of the signal that asks the run to save and end, or None.
        rewind: forgets what was logged after the step it gets, because those steps are repeated.
        progress: gets the number and the metrics of each step that is logged.
        tick: gets the number and the loss of every step.
        doing: gets the name of what takes time besides steps: "validating 3/16", "saving".
        summary: returns facts for the log about how the run went, at its end.
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
