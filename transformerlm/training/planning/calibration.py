"""How fast a run will be, measured on a few real steps: on random tokens for a plan, or in the run before it starts."""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from config.schemas import duration_seconds
from config.train import TrainConfig
from logger import NoopLogger
from profiling import memory
from transformerlm.token_files.dataset import TokenDataset
from transformerlm.tokenizer.tokenizer import Tokenizer
from transformerlm.training.build import build_model, build_optimizer, num_validation_windows, sequences_per_pass
from transformerlm.training.eta import validations_left, work_left
from transformerlm.training.loop import batch_loss
from transformerlm.training.run_data import RunData
from transformerlm.training.runtime import Runtime
from transformerlm.training.timer import Timer, timed
from transformerlm.training.trainer import Trainer
from transformerlm.utils.dtypes import Precision

# Fewer steps are measured where they would take longer than this together.
MAX_SECONDS = 120.0
_MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}
_NUM_TOKENS = 2**20


@dataclass(frozen=True)
class Calibration:
    """What was measured: the first step with all that comes before it, the median of the others, the peak of memory.

    `seconds_per_validation` is 0 where the configuration names no `data.valid`.
    """

    steps: int
    first_step_seconds: float
    seconds_per_step: float
    seconds_per_validation: float
    peak_bytes: int | None
    matmul_flops_per_second: float


def measured_facts(config: TrainConfig, steps: int, *, plan: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """Return what `calibrate` finds under flat dotted keys; `plan` has the arithmetic, `settings` go to `calibrate`.

    Where the device runs out of memory after all, the one fact is that the run does not fit.
    """
    try:
        found = calibrate(config, steps, **settings)
    except torch.OutOfMemoryError:
        return {"memory.fits": False}
    rate = plan["tokens.per_step"] / found.seconds_per_step
    max_time = config.training.max_time
    limit = duration_seconds(max_time) if max_time else math.inf
    validations = validations_left(config, 0)
    return {
        "calibration.steps": found.steps,
        "calibration.first_step_seconds": found.first_step_seconds,
        "calibration.seconds_per_step": found.seconds_per_step,
        "calibration.seconds_per_validation": found.seconds_per_validation,
        "calibration.peak_memory_bytes": found.peak_bytes,
        "calibration.matmul_flops_per_second": found.matmul_flops_per_second,
        "tokens_per_second": rate,
        "flops_utilisation": rate * plan["flops.per_token"] / found.matmul_flops_per_second,
        "eta_seconds": min(plan["steps"] * found.seconds_per_step + validations * found.seconds_per_validation, limit),
    }


def estimate_seconds(trainer: Trainer) -> tuple[float, float]:
    """Return about how long the rest of a run takes, and how long compiling took, in seconds.

    All ranks measure two forward and backward passes together; weights, optimizer and data order are left as they are.
    Samples and saves are not counted. `max_time` is the most that is returned.
    """
    step = trainer.state.step + 1
    (inputs, targets), keys = trainer.micro_batches(step)[0], trainer.dropout_keys(step)[0]
    theirs = targets if len(targets) else inputs

    def forward_and_backward() -> None:
        with trainer.autocast():
            _, loss = batch_loss(trainer.model, inputs, theirs, dropout_keys=keys, reading=trainer.reading)
        loss.backward()  # type: ignore[no-untyped-call]
        trainer.shards.drop_gradients()

    first, second = (timed(forward_and_backward, trainer.runtime.device) for _ in range(2))
    valid_tokens = len(trainer.data.valid) if trainer.data.valid else 0
    world_size = trainer.runtime.world.world_size
    work = work_left(trainer.config, trainer.state.step, valid_tokens=valid_tokens, world_size=world_size)
    seconds, left = second * work / len(inputs), trainer.timetable.seconds_left(trainer.state.time_used)
    return seconds if left is None else min(seconds, left), max(0.0, first - second)


class RandomTokens(TokenDataset):
    """Random ids in memory, the same each time, in the place of a token file."""

    def __init__(self, *, vocab_size: int, context_length: int, num_tokens: int = _NUM_TOKENS) -> None:
        rng = np.random.default_rng(0)
        self.num_tokens = num_tokens + context_length
        self.path = Path("random tokens")
        self.tokens = rng.integers(vocab_size, size=self.num_tokens, dtype=np.uint32)
        self.sha256, self.metadata = "", {}
        self._shards = []
        # Documents of a quarter of the context.
        self.document_offsets = np.append(np.arange(0, self.num_tokens, max(1, context_length // 4)), self.num_tokens)


def trainer_on_random_tokens(
    config: TrainConfig, *, device: torch.device, precision: Precision, num_valid_tokens: int = _NUM_TOKENS
) -> Trainer:
    """Return the trainer of one process that the configuration describes, on random tokens instead of its data.

    It reads no file, and writes none unless it is told to save.
    """
    sizes = {"vocab_size": config.model.vocab_size, "context_length": config.model.context_length}
    data = RunData(
        tokenizer=Tokenizer({byte: bytes([byte]) for byte in range(256)}, []),
        train=RandomTokens(**sizes),
        valid=RandomTokens(**sizes, num_tokens=num_valid_tokens),
        separator_id=0,
    )
    model = build_model(config, device=device)
    return Trainer(
        config,
        run_dir=Path(),
        data=data,
        model=model,
        optimizer=build_optimizer(model, config, precision=precision),
        runtime=Runtime(
            device=device,
            precision=precision,
            micro_batch_size=sequences_per_pass(config.training, 1),
            logger=NoopLogger(),
        ),
    )


def calibrate(
    config: TrainConfig,
    steps: int,
    *,
    device: torch.device,
    precision: Precision,
    progress: Callable[[int], object] = lambda done: None,
) -> Calibration:
    """Make up to `steps` training steps, at least one, after a first one that is timed alone.

    `progress` is called after each. Model, optimizer, precision, micro-batches and compilation are those of the
    configuration. There is one process, and no file is read or written.

    Raises:
        torch.OutOfMemoryError: a CUDA device has too little memory.
    """
    memory.reset_peaks(device)
    before = (memory.peak_bytes(device) or 0) if device.type == "cpu" else 0
    clock = Timer(device)
    batch = sequences_per_pass(config.training, 1) * config.model.context_length
    trainer = trainer_on_random_tokens(config, device=device, precision=precision, num_valid_tokens=batch)
    _timed_step(trainer)
    first = clock.seconds()
    seconds: list[float] = []
    while len(seconds) < steps and (not seconds or sum(seconds) + seconds[-1] < MAX_SECONDS):
        seconds.append(_timed_step(trainer))
        progress(len(seconds))
    validation = _timed_validation(trainer)
    after = memory.peak_bytes(device)
    del trainer
    gc.collect()  # it and its prefetcher hold each other, and the product below needs memory
    return Calibration(
        steps=len(seconds),
        first_step_seconds=first,
        seconds_per_step=statistics.median(seconds),
        seconds_per_validation=validation,
        peak_bytes=None if after is None else max(0, after - before),
        matmul_flops_per_second=_matmul_peak(device, precision),
    )


def _timed_step(trainer: Trainer) -> float:
    """Return the seconds of a step; one that must not be made takes as long, and leaves the weights as they are."""
    trainer.state.step %= trainer.config.training.max_steps  # the schedule ends there
    return timed(trainer.step, trainer.runtime.device)


def _timed_validation(trainer: Trainer) -> float:
    """Return the seconds of a whole validation, by those of one batch, the second time it is evaluated; 0 for none."""
    config, valid = trainer.config, trainer.data.valid
    if config.data.valid is None or valid is None:
        return 0.0
    _, seconds = (timed(trainer.validate, trainer.runtime.device) for _ in range(2))
    windows = max(1, config.training.eval_tokens // config.model.context_length)
    return seconds * windows / num_validation_windows(config, len(valid))


def _matmul_peak(device: torch.device, precision: Precision) -> float:
    """Return the FLOPs per second of a large square product, the best of five."""
    size = _MATMUL_SIZE.get(device.type, 2048)
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    seconds = min(timed(lambda: a @ a, device) for _ in range(5))
    return 2 * size**3 / seconds  # a multiplication and an addition for each of the size^3 products
