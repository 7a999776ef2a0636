"""What a run is given by whoever starts it: where to compute, whom to tell, and what to do on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from logger import Logger
from transformerlm.distributed import World
from transformerlm.models.transformer import TransformerLM
from transformerlm.utils.dtypes import Precision


@dataclass(frozen=True)
class Hook:
    """Something to do every `interval` steps and after the last, given the step and the model: samples, for one."""

    interval: int
    call: Callable[[int, TransformerLM], None]


@dataclass
class Runtime:
    """Where and how a run computes, and whom it tells.

    `stop` names the signal that asks to save and end, if there was one; `rewind` forgets what was told of the steps
    after the one given, which will be made again. `progress` is told of the steps that are logged, `tick` of each, and
    `doing` of what takes time besides steps: "validating 3/16", "saving". `summary` is asked at the end how it went.
    """

    device: torch.device
    precision: Precision
    logger: Logger
    world: World = field(default_factory=World)
    hooks: Sequence[Hook] = ()
    stop: Callable[[], str | None] = lambda: None
    rewind: Callable[[int], object] = lambda step: None
    progress: Callable[[int, dict[str, float]], None] = lambda step, metrics: None
    tick: Callable[[int, dict[str, float]], None] = lambda step, metrics: None
    doing: Callable[[str], None] = lambda what: None
    summary: Callable[[], dict[str, Any]] = dict
