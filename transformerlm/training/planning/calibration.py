"""A few real training steps on random tokens, to say how fast a run will be; no file is read or written."""

from __future__ import annotations

import gc
import math
import statistics
import time
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
from transformerlm.training.build import num_validation_windows
from transformerlm.training.eta import validations_left
from transformerlm.training.planning.micro_batch import sequences_per_pass
from transformerlm.training.runtime import Runtime
from transformerlm.training.trainer import Trainer
from transformerlm.utils.device import synchronize
from transformerlm.utils.dtypes import Precision

# A run so slow that its steps take longer than this together is measured by fewer of them.
MAX_SECONDS = 120.0
_MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}
_NUM_TOKENS = 2**20


@dataclass(frozen=True)
class Calibration:
    """What was measured: the first step with all that begins it, the median of the others, and the peak of memory.

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

    A device whose memory is not enough after all does not fit, and that is all there is to say.
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


class RandomTokens(TokenDataset):
    """A token file that is none: random ids, the same each time, in memory."""

    def __init__(self, *, vocab_size: int, context_length: int, num_tokens: int = _NUM_TOKENS) -> None:
        rng = np.random.default_rng(0)
        self.num_tokens = num_tokens + context_length
        self.tokens = rng.integers(vocab_size, size=self.num_tokens, dtype=np.uint32)
        self.sha256 = ""


class _Calibrator(Trainer):
    """A trainer that is asked for steps only, and keeps no batch of those that it had to skip."""

    def timed_step(self) -> float:
        self.state.step %= self.config.training.max_steps  # the schedule knows no more
        start = time.perf_counter()
        self._step()
        synchronize(self.runtime.device)
        return time.perf_counter() - start

    def timed_validation(self) -> float:
        """Return the time of a whole validation, by that of its first batch, the second time it is evaluated."""
        assert self.valid_data is not None
        for _ in range(2):
            start = time.perf_counter()
            self.validate()
            synchronize(self.runtime.device)
            seconds = time.perf_counter() - start
        windows = max(1, self.config.training.eval_tokens // self.config.model.context_length)
        return seconds * windows / num_validation_windows(self.config, len(self.valid_data))

    def _skip(self, *_: Any) -> None:
        pass  # the weights stay as they are, which takes as long


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
    configuration; the process is one.

    Raises:
        torch.OutOfMemoryError: a CUDA device has too little memory.
    """
    memory.reset_peaks()
    before = memory.peaks()
    start = time.perf_counter()
    sizes = {"vocab_size": config.model.vocab_size, "context_length": config.model.context_length}
    batch = sequences_per_pass(config.training, 1) * config.model.context_length
    trainer = _Calibrator(
        config,
        run_dir=Path(),  # where nothing is written: only saving and skipping do
        tokenizer=Tokenizer({byte: bytes([byte]) for byte in range(256)}, []),
        train_data=RandomTokens(**sizes),
        valid_data=RandomTokens(**sizes, num_tokens=batch) if config.data.valid else None,
        runtime=Runtime(device=device, precision=precision, logger=NoopLogger()),
    )
    trainer.timed_step()
    first = time.perf_counter() - start
    seconds: list[float] = []
    while len(seconds) < steps and (not seconds or sum(seconds) + seconds[-1] < MAX_SECONDS):
        seconds.append(trainer.timed_step())
        progress(len(seconds))
    validation = trainer.timed_validation() if trainer.valid_data else 0.0
    after, key = memory.peaks(), "cuda_peak_allocated_bytes" if device.type == "cuda" else "cpu_peak_rss_bytes"
    del trainer
    gc.collect()  # it and its prefetcher hold each other, and the product below needs memory
    return Calibration(
        steps=len(seconds),
        first_step_seconds=first,
        seconds_per_step=statistics.median(seconds),
        seconds_per_validation=validation,
        peak_bytes=max(0, after[key] - (before[key] if device.type == "cpu" else 0)) if key in after else None,
        matmul_flops_per_second=_matmul_peak(device, precision),
    )


def _matmul_peak(device: torch.device, precision: Precision) -> float:
    """Return the FLOPs per second of a large square product, the best of five."""
    size = _MATMUL_SIZE.get(device.type, 2048)
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
