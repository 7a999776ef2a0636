"""A model of GPT-2's size, 124 M parameters, compiled: how close it gets to the card's peak, and what the rest is."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarking.gpu import kernels, training
from benchmarking.gpu.shapes import TINY
from benchmarking.gpu.task import Task
from benchmarking.harness import OURS, Sample, run_rounds, timed
from benchmarking.limits import MatmulPeak
from benchmarking.peers.training import TrainCase, make_step
from transformerlm.models.estimates import count_parameters, estimate_training_memory
from transformerlm.models.settings import ModelSettings
from transformerlm.models.transformer import TransformerLM
from transformerlm.utils.device import device_memory_bytes, synchronize

GPT2: dict[str, Any] = {
    "vocab_size": 50304,
    "context_length": 1024,
    "d_model": 768,
    "num_layers": 12,
    "num_heads": 12,
    "d_ff": 2048,
}
_SIZES = (512, 384, 256, 192, 128, 96, 64, 48, 32, 24, 16, 12, 8, 6, 4, 2, 1)
_REPEATS, _SECONDS_PER_ROUND = 5, 2.0
_TOP = 15


def run(task: Task) -> None:
    """Measure the step, then profile it."""
    hparams = TransformerLM(**(TINY.model() if task.tiny else GPT2), device="meta").hparams()
    size = largest_micro_batch(task, hparams)
    case = TrainCase(hparams, size, task.device, backend=task.backend)
    task.row(
        "124 M parameters: sizes",
        parameters=count_parameters(ModelSettings(**hparams)),
        micro_batch=size,
        context=_context(hparams),
    )
    step = make_step(case, OURS, precision="bf16", compiled=True)
    start = time.perf_counter()
    step()
    first = time.perf_counter() - start
    step()  # now the optimizer's states exist
    seconds = _measure(task, case, step, first)
    _look_into(task, step, seconds)
    _embedding_backward(task, hparams, size)


def _context(hparams: dict[str, Any]) -> int:
    return int(hparams["context_length"])


def largest_micro_batch(task: Task, hparams: dict[str, Any]) -> int:
    """Return the largest number of sequences with which two uncompiled steps run; compiled steps need no more."""
    settings, room = ModelSettings(**hparams), device_memory_bytes(task.device)
    for size in (4, 2, 1) if task.tiny else _SIZES:
        parts = estimate_training_memory(settings, micro_batch_size=size, precision="bf16", device_type=task.device)
        if parts["total"] > room and size > 1:
            continue
        try:
            step = make_step(TrainCase(hparams, size, task.device), OURS, precision="bf16", compiled=False)
            step()
            step()
        except torch.OutOfMemoryError:
            continue
        finally:
            step = None  # type: ignore[assignment]
            gc.collect()
            if task.device == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
        return size
    raise RuntimeError("not even one sequence fits")


def _measure(task: Task, case: TrainCase, step: Callable[[], float], first: float) -> float:
    """Write the row about speed, and return the seconds that a step takes."""
    device = torch.device(task.device)
    timer = partial(timed, synchronize=partial(synchronize, device))
    steps = 1 if task.tiny else max(1, round(_SECONDS_PER_ROUND / timer(step)))
    seconds_per_step: list[float] = []

    def rate() -> Sample:
        seconds_per_step.append(timer(lambda: [step() for _ in range(steps)]) / steps)
        return {"tokens_per_second": case.batch_size * _context(case.hparams) / seconds_per_step[-1]}

    name = f"{OURS}, compiled"
    # Read before the product's matrices are there, which are no part of a step.
    memory = {"peak_gb": torch.cuda.max_memory_allocated() / 1e9} if device.type == "cuda" else {}
    peak = MatmulPeak(device, torch.bfloat16)
    series = run_rounds({name: rate, "limit": peak}, warmup=0, repeats=1 if task.tiny else _REPEATS)
    facts = {"first_step_s": first, "step_ms": 1e3 * min(seconds_per_step), **memory}
    table = "Training, 124 M parameters, context 1,024, bf16"
    training.write_rates(task, table, series, case.hparams, {name: facts})
    return min(seconds_per_step)


def _look_into(task: Task, step: Callable[[], float], seconds: float) -> None:
    found = kernels.trace(step, task.device)
    task.check("torch.profiler sees the step's kernels", bool(found), f"{len(found)} kinds")
    whole, busy = 1e6 * seconds, sum(kernel.microseconds for kernel in found)
    for purpose, microseconds in kernels.shares(found).items():
        task.row(
            "124 M parameters: where a step's time goes",
            what=purpose,
            ms=microseconds / 1e3,
            share=microseconds / whole,
        )
    idle = max(0.0, whole - busy)
    task.row("124 M parameters: where a step's time goes", what="device idle: host", ms=idle / 1e3, share=idle / whole)
    for kernel in found[:_TOP]:
        cells: dict[str, Any] = {"kernel": kernel.name[:100], "what": kernel.purpose, "calls": kernel.calls}
        task.row(
            f"124 M parameters: the {_TOP} kernels that take longest",
            **cells,
            ms=kernel.microseconds / 1e3,
            share=kernel.microseconds / whole,
        )


def _embedding_backward(task: Task, hparams: dict[str, Any], size: int) -> None:
    """Time the gradient of the embedding two ways, for ids as unequally frequent as words, and for equal ids."""
    vocab_size, count = hparams["vocab_size"], size * _context(hparams)
    weight = torch.zeros(vocab_size, hparams["d_model"], device=task.device, requires_grad=True)
    rng = np.random.default_rng(0)
    texts = {"as words": rng.zipf(1.2, count) % vocab_size, "evenly spread": rng.integers(vocab_size, size=count)}
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "index_select": lambda ids: weight.index_select(0, ids),
        "F.embedding": lambda ids: F.embedding(ids, weight),
    }
    for spread, numbers in texts.items():
        ids = torch.from_numpy(numbers.astype(np.int64)).to(task.device)
        for way, look_up in ways.items():
            output = look_up(ids)
            grad = torch.ones_like(output)

            def backward(output: Tensor = output, grad: Tensor = grad) -> None:
                weight.grad = None
                output.backward(grad, retain_graph=True)  # type: ignore[no-untyped-call]

            backward()
            seconds = min(timed(backward, synchronize=partial(synchronize, task.device)) for _ in range(5))
            task.row("Embedding's gradient", ids=spread, way=way, ms=seconds * 1e3)
